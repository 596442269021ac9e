"""Fills the blanks of a plan request, from public facts only: schema, declared sizes, unit and guarantee. Sees no rows.

The constants were chosen on public data (Fashion-MNIST, Adult, handwritten digits, diabetes), on splits kept back from training.
"""

from __future__ import annotations

import math

from cloister.wire.architecture import Architecture, Loss
from cloister.wire.columns import CategoryColumn, Column, InputColumn, NumberColumn, TensorColumn
from cloister.wire.layers import Encode, Layer, Linear, Tanh
from cloister.wire.plans import SGD, Guarantee, PlanRequest, Privacy, TrainingSpec
from cloister_privacy.architecture import check, encoded_width
from cloister_privacy.errors import ArchitectureRefused, PlanImpossible
from cloister_privacy.plan import DPPlan

__all__ = ["require_fit", "resolve"]

_EPSILON = 3.0
_EPOCHS = 20.0
_BATCH_PER_ROOT = 12  # batches of 12 sqrt(nominal_size): large ones drown the noise
_LEAST_BATCH = 64
_HIDDEN = 128
_MOMENTUM = 0.9
_NOISE_WALK: dict[Loss, float] = {"cross_entropy": 0.016, "mean_squared_error": 0.003}
"""The learning rate lets the noise of all steps move a weight by about this, before momentum makes it ten times as much."""

_LARGEST_RATE: dict[Loss, float] = {"cross_entropy": 1.0, "mean_squared_error": 0.05}
_REGRESSION = 0.07
"""Of that rate where values are predicted: nothing squashes the last layer, so every unit of noise reaches the output."""

_MOST_STEPS = 10_000_000
_WIDTH_LIMIT = 2**20


def resolve(
    request: PlanRequest,
    *,
    columns: dict[str, Column],
    nominal_size: int,
    capacity: int,
    delta: float,
    unit: str = "row",
    guarantee: Guarantee | None = None,
) -> TrainingSpec:
    """The run that a request means, without a blank left in it; `delta`, `unit` and `guarantee` are the source's.

    The same request and public facts always give the same spec. Raises PlanError or ArchitectureRefused.
    """
    inputs, (output, loss) = _inputs(request, columns), _goal(request.target, columns)
    architecture = Architecture(
        inputs=inputs,
        layers=request.layers if request.layers is not None else _layers(inputs, output),
        target=request.target,
        output=output,
        loss=loss,
    )
    check(architecture)
    plan = _plan(request, nominal_size=nominal_size, capacity=capacity, delta=delta, unit=unit)
    return TrainingSpec(
        dataset=request.dataset,
        architecture=architecture,
        nominal_size=plan.nominal_size,
        capacity=plan.capacity,
        rows_per_unit=plan.rows_per_unit,
        batch_size=plan.batch_size,
        steps=plan.steps,
        noise_multiplier=plan.noise_multiplier,
        clip=plan.clip,
        clipping=request.privacy.clipping if request.privacy is not None else "flat",
        delta=plan.delta,
        guarantee=guarantee,
        optimizer=request.optimizer or SGD(learning_rate=_learning_rate(plan, loss), momentum=_MOMENTUM),
        precision=request.precision or "float32",
    )


def require_fit(
    spec: TrainingSpec,
    *,
    columns: dict[str, Column],
    nominal_size: int,
    capacity: int,
    unit: str = "row",
    guarantee: Guarantee | None = None,
) -> None:
    """Refuse a spec, however it came about, that is not of this dataset. Raises PlanError or ArchitectureRefused."""
    declared = {**spec.architecture.inputs, spec.architecture.target: spec.architecture.output}
    for name, column in declared.items():
        if columns.get(name) != column:
            raise ArchitectureRefused(f"{name!r} is not a column of the dataset as the spec declares it; plan again")
    for name, given, asked in (
        ("nominal_size", spec.nominal_size, nominal_size),
        ("capacity", spec.capacity, capacity),
    ):
        if given != asked:
            raise PlanImpossible(f"the spec's {name} {given} is not the dataset's {asked}; plan again")
    if spec.guarantee != guarantee:
        raise PlanImpossible("the spec's guarantee is not what the source promises now; plan again")
    check(spec.architecture)
    DPPlan.of(spec, unit=unit)


def _inputs(request: PlanRequest, columns: dict[str, Column]) -> dict[str, InputColumn]:
    readable: dict[str, InputColumn] = {
        name: column
        for name, column in columns.items()
        if isinstance(column, TensorColumn | NumberColumn | CategoryColumn)
    }
    features = request.features
    if features is None:
        features = tuple(name for name in readable if name != request.target)
        if not features:
            raise ArchitectureRefused("the dataset has no column to learn from but the target; declare one")
    for name in features:
        _require(name, columns)
        if name not in readable:
            raise ArchitectureRefused(f"{name!r} is of type {columns[name].type}, which no network reads; leave it out")
    if not features or len(set(features)) != len(features):
        raise ArchitectureRefused("features must name at least one column, and each only once")
    return {name: readable[name] for name in features}


def _goal(target: str, columns: dict[str, Column]) -> tuple[InputColumn, Loss]:
    _require(target, columns)
    match columns[target]:
        case CategoryColumn() as column:
            return column, "cross_entropy"
        case NumberColumn() as column:
            return column, "mean_squared_error"
        case column:
            raise ArchitectureRefused(f"the target {target!r} is of type {column.type}; predict a category or a number")


def _require(name: str, columns: dict[str, Column]) -> None:
    if name not in columns:
        raise ArchitectureRefused(f"{name!r} is not a column of the dataset; it has {', '.join(columns)}")


def _layers(inputs: dict[str, InputColumn], output: InputColumn) -> tuple[Layer, ...]:
    """One bounded hidden layer (arXiv 2007.14191) over all inputs, each mapped from its declared bounds."""
    width = encoded_width(inputs)
    if width > _WIDTH_LIMIT:
        raise ArchitectureRefused(f"the inputs make a vector of {width}, over {_WIDTH_LIMIT}; name fewer features")
    outputs = len(output.values) if isinstance(output, CategoryColumn) else 1
    return (
        Encode(),
        Linear(in_features=width, out_features=_HIDDEN),
        Tanh(),
        Linear(in_features=_HIDDEN, out_features=outputs),
    )


def _plan(request: PlanRequest, *, nominal_size: int, capacity: int, delta: float, unit: str) -> DPPlan:
    privacy = request.privacy or Privacy(epsilon=_EPSILON)
    batch_size = request.batch_size
    if batch_size is None:
        batch_size = min(nominal_size, max(_LEAST_BATCH, round(_BATCH_PER_ROOT * math.sqrt(nominal_size))))
    epochs_steps = (request.epochs or _EPOCHS) * nominal_size / batch_size
    if epochs_steps > _MOST_STEPS:
        raise PlanImpossible(f"this is over {_MOST_STEPS} steps; lower epochs or raise batch_size")
    plan = DPPlan(
        nominal_size=nominal_size,
        capacity=capacity,
        batch_size=batch_size,
        steps=math.ceil(epochs_steps),
        noise_multiplier=privacy.noise_multiplier or 1.0,
        clip=privacy.clip,
        delta=privacy.delta or delta,
        rows_per_unit=request.rows_per_unit or 1,
        unit=unit,
    )
    return plan if privacy.epsilon is None else plan.calibrated_to(privacy.epsilon)


def _learning_rate(plan: DPPlan, loss: Loss) -> float:
    noise_per_step = plan.noise_multiplier / plan.divisor  # of a gradient clipped to 1
    rate = min(_LARGEST_RATE[loss], _NOISE_WALK[loss] / (noise_per_step * math.sqrt(plan.steps)))
    return float(f"{rate / plan.clip:.3g}")
