"""Plans (free) and the training specs that jobs are started from. Public numbers only."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cloister.wire._model import Count, Identifier, Name, PositiveFloat, Probability, Request, Response
from cloister.wire.architecture import LAYER_LIMIT, Architecture, Loss
from cloister.wire.layers import Layer

__all__ = [
    "EMA",
    "SGD",
    "Adam",
    "AdamW",
    "Clipping",
    "Event",
    "Guarantee",
    "Initial",
    "LoRA",
    "MoreDatasets",
    "NetworkView",
    "Optimizer",
    "Plan",
    "PlanRequest",
    "Precision",
    "Privacy",
    "Quote",
    "RowsPerUnit",
    "Schedule",
    "Tail",
    "TrainingSpec",
]

RowsPerUnit = Annotated[int, Field(ge=1, le=1000)]

MoreDatasets = Annotated[tuple[Identifier, ...], Field(max_length=255)]
"""Further datasets that the run reads: of the same source and columns, and each in a block of its own."""

_Sigma = Annotated[float, Field(ge=0.3, le=1000, allow_inf_nan=False)]


Clipping = Literal["flat", "per_layer", "automatic"]
"""How a gradient g is bounded by clip C: flat, g min(1, C / |g|) over all parameters together; per_layer, each of m parameter
tensors to C / sqrt(m); automatic, g C / (|g| + 0.01), which needs no tuned C (arXiv 2206.07136)."""

Precision = Literal["float32", "bfloat16"]
"""Of the network's own arithmetic. Norms, sums, noise and weights are float32 in either."""


class Privacy(Request):
    """What a run may cost: a target epsilon, the noise multiplier itself, or all that is left of the budget; exactly one."""

    epsilon: Annotated[PositiveFloat, Field(le=1000)] | None = None
    noise_multiplier: _Sigma | None = None
    all_left: bool | None = None
    """The least noise with which the run fits what is left now, in every block that it reads."""
    delta: Annotated[Probability, Field(le=0.1)] | None = None
    """The delta at which epsilon is told; by default the source's."""
    clip: PositiveFloat = 1.0
    """The L2 norm to which each unit's gradient is clipped."""
    clipping: Clipping | None = None
    """By default as the recipe has it."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Privacy:
        if (self.epsilon is not None) + (self.noise_multiplier is not None) + bool(self.all_left) != 1:
            raise ValueError("give exactly one of epsilon, noise_multiplier and all_left")
        return self


class Schedule(Request):
    """What the learning rate is multiplied by: it rises to 1 over `warmup_steps`, then goes from 1 to `final` over the rest."""

    shape: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Where a linear or cosine schedule ends, as a share of the learning rate."""


class EMA(Request):
    """The model is the exponential moving average of the weights after each step, with min(decay, (1 + t) / (10 + t)) at step t."""

    type: Literal["ema"] = "ema"
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999


class Tail(Request):
    """The model is the mean of the weights after each of the last steps: this share of them."""

    type: Literal["tail"] = "tail"
    share: Annotated[float, Field(gt=0, le=1)] = 0.25


class _Updates(Request):
    """How noisy gradients become a model: all of it works on what is private already, so none of it costs epsilon."""

    learning_rate: PositiveFloat
    schedule: Schedule | None = None
    averaging: Annotated[EMA | Tail, Field(discriminator="type")] | None = None


class SGD(_Updates):
    """torch.optim.SGD."""

    type: Literal["sgd"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Adam(_Updates):
    """torch.optim.Adam with its default betas."""

    type: Literal["adam"] = "adam"


class AdamW(_Updates):
    """torch.optim.AdamW with its default betas."""

    type: Literal["adamw"] = "adamw"
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.01


Optimizer = Annotated[SGD | Adam | AdamW, Field(discriminator="type")]


class LoRA(Request):
    """Frozen linear layers, those of attention too, are trained through low-rank adapters, which are folded in at the end (Hu et al.,
    ICLR 2022): W + alpha / rank B A. Without alpha the factor is 1."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 8
    alpha: PositiveFloat | None = None


class Initial(Request):
    """Uploaded weights that training starts from. What they were trained on before is outside of what is promised."""

    id: Identifier
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class PlanRequest(Request):
    """Ask what a run would cost. What is left out is filled by the public recipe."""

    dataset: Identifier
    with_datasets: MoreDatasets = ()
    target: Name
    features: tuple[Name, ...] | None = None
    """Columns that the network reads; by default all that it can but the target."""
    layers: Annotated[tuple[Layer, ...], Field(min_length=1, max_length=LAYER_LIMIT, fail_fast=True)] | None = None
    loss: Loss | None = None
    """By default cross-entropy for a category, the squared error for a number."""
    privacy: Privacy | None = None
    batch_size: Count | None = None
    """The expected number of units in a step: q = batch_size / nominal_size."""
    rows_per_unit: RowsPerUnit | None = None
    """The most rows of one drawn user that a step reads, each clipped to clip / rows_per_unit; 1 where a row is the unit."""
    initial: Identifier | None = None
    """Uploaded weights to start from; of `layers`, by their places."""
    lora: LoRA | None = None
    epochs: PositiveFloat | None = None
    """Steps = ceil(epochs * nominal_size / batch_size)."""
    optimizer: Optimizer | None = None
    precision: Precision | None = None
    audit: bool = False
    """Try the run's claim with canaries afterwards, and sign what they gave away. Only of a source that is declared public."""


class Guarantee(Request):
    """What a source promises of all its runs together."""

    epsilon: Annotated[PositiveFloat, Field(le=1000)]
    delta: Annotated[Probability, Field(le=0.1)]


class TrainingSpec(Request):
    """A run without a blank left in it: what is planned is what is charged is what is trained."""

    format: Literal["cloister.training/1"] = "cloister.training/1"
    dataset: Identifier
    with_datasets: MoreDatasets = ()
    architecture: Architecture
    nominal_size: Count
    capacity: Count
    """The most units there can be, as the owner declared: how many slots a step runs follows from it."""
    rows_per_unit: RowsPerUnit = 1
    batch_size: Count
    steps: Annotated[int, Field(ge=1, le=10_000_000)]
    noise_multiplier: _Sigma
    clip: PositiveFloat
    clipping: Clipping = "flat"
    delta: Annotated[Probability, Field(le=0.1)]
    guarantee: Guarantee | None = None
    """The source's, when this was planned: steps get so many slots that overflowing them is negligible beside it, too."""
    optimizer: Optimizer
    precision: Precision = "float32"
    initial: Initial | None = None
    lora: LoRA | None = None
    audit: bool = False


class Event(Response):
    """What the ledger charges, exactly: one mechanism, composed `steps` times."""

    mechanism: Literal["poisson_subsampled_gaussian"] | str
    noise_multiplier: float
    sampling_rate: float
    steps: int
    unit: str
    adjacency: str
    overflow: float = 0.0
    """The most that steps which draw more units than there are slots may add to delta; 0 where a step has no fixed slots."""


class Quote(Response):
    """What the source's budget would be, at one revision of its ledger."""

    revision: int
    cap: float
    delta: float
    before: float
    after: float
    left: float
    """Left after this run, if it ran; below zero never: where it does not fit, what is left now."""
    fits: bool
    """Whether the filter admits it, what overflowing steps may add to delta stays below a thousandth of it, and your allowance
    suffices: in every block that the run reads."""
    block: int = 0
    """The block that these figures are of: that which the run leaves least of."""


class NetworkView(Response):
    """A network as people look at it."""

    summary: str
    """A table: each layer, what it gives, its parameters, and whether it is trained."""
    picture: str
    """The same as an SVG."""

    def __str__(self) -> str:
        return self.summary

    def _repr_html_(self) -> str:
        return self.picture


class Plan(Response):
    training: TrainingSpec
    network: NetworkView | None = None
    event: Event
    epsilon: float
    """The run's own epsilon at `delta`, by RDP: what it would cost as the only run ever."""
    epsilon_pld: float
    """The same by privacy-loss distributions: tighter, displayed, and never what decides."""
    delta: float
    source: Identifier
    quote: Quote
