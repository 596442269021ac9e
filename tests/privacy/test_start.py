"""What a run starts from: given weights and their digest, frozen layers, adapters that are folded in at the end."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from cloister.wire.layers import Layer
from cloister.wire.plans import Adam, Initial, LoRA, TrainingSpec
from cloister_privacy.architecture import Network, build, from_bytes
from cloister_privacy.errors import ArchitectureRefused, InitialRefused, TrainingError
from cloister_privacy.plan import DPPlan
from cloister_privacy.training import train
from cloister_privacy.training.start import digest_of, require_start
from families import FAMILIES, ROWS, converted, spec_of

FAMILY = FAMILIES["attention"]


def weights_of(network: Network) -> bytes:
    return safetensors.torch.save(network.state_dict())


def frozen(layers: tuple[Layer, ...], *types: str) -> tuple[Layer, ...]:
    return tuple(each.model_copy(update={"frozen": True}) if each.type in types else each for each in layers)


def spec_from(weights: bytes | None, *types: str, **fields: Any) -> TrainingSpec:
    architecture = FAMILY.architecture.model_copy(update={"layers": frozen(FAMILY.layers, *types)})
    initial = None if weights is None else Initial(id="wts_" + "0" * 32, digest=digest_of(weights))
    return spec_of(FAMILY, architecture=architecture, initial=initial, **fields)


def trained(
    spec: TrainingSpec, weights: bytes | None, *, stop_at: int | None = None, resume: bytes | None = None
) -> Any:
    kept: list[bytes] = []

    def after_chunk(done: int, snapshot: Any) -> bool:
        kept.append(snapshot())
        return done != stop_at

    body = train(
        spec, converted(FAMILY, ROWS), plan=DPPlan.of(spec), device="cpu", chunk_steps=2, before_chunk=lambda *_: None,
        after_chunk=after_chunk, initial=weights, resume=resume,
    )  # fmt: skip
    return kept[-1] if body is None else from_bytes(body)


def test_a_run_starts_from_the_given_weights_and_tells_their_digest() -> None:
    given = build(FAMILY.architecture)
    weights = weights_of(given)
    network = trained(spec_from(weights, steps=1, noise_multiplier=0.3, clip=1e-6), weights)
    assert network.initial_digest == digest_of(weights) == given.initial_digest
    for name, each in network.state_dict().items():
        torch.testing.assert_close(each, given.state_dict()[name], rtol=0, atol=1e-5)


def test_the_digest_is_of_the_numbers_whatever_order_they_come_in() -> None:
    state = {"b": np.ones((2, 3), np.float32), "a": np.zeros(4, np.float32)}
    assert digest_of(safetensors.numpy.save(state)) == digest_of(safetensors.numpy.save(dict(reversed(state.items()))))


@pytest.mark.parametrize("lora", [None, LoRA(rank=2), LoRA(rank=3, alpha=6.0)])
def test_frozen_layers_move_only_by_what_their_adapters_fold_in(lora: LoRA | None) -> None:
    given = build(FAMILY.architecture)
    weights = weights_of(given)
    network = trained(spec_from(weights, "transformer_layer", "embedding", lora=lora), weights)
    moved = {name for name, each in network.state_dict().items() if not torch.equal(each, given.state_dict()[name])}
    linear = {f"layers.2.{name}.weight" for name in ("attention.in_proj", "attention.out_proj", "linear1", "linear2")}
    assert moved == {"layers.1.table.weight", "layers.4.weight", "layers.4.bias"} | (linear if lora else set())
    for name in linear if lora else ():
        change = network.state_dict()[name] - given.state_dict()[name]
        assert int(torch.linalg.matrix_rank(change.double(), rtol=1e-4)) <= lora.rank  # type: ignore[union-attr]


def test_a_run_with_adapters_goes_on_from_its_checkpoint() -> None:
    weights = weights_of(build(FAMILY.architecture))
    spec = spec_from(weights, "transformer_layer", lora=LoRA(rank=2), optimizer=Adam(learning_rate=0.01))
    network = trained(spec, weights, resume=trained(spec, weights, stop_at=2))
    assert network.initial_digest == digest_of(weights)
    assert all(bool(each.isfinite().all()) for each in network.state_dict().values())


def test_what_cannot_be_started_from_is_refused_by_name() -> None:
    weights = weights_of(build(FAMILY.architecture))
    other = weights_of(build(FAMILIES["lstm"].architecture))
    require_start(FAMILY.architecture, weights, None)
    with pytest.raises(InitialRefused, match="another spec"):
        require_start(FAMILY.architecture, other, None)
    with pytest.raises(InitialRefused, match="not safetensors"):
        require_start(FAMILY.architecture, b"nothing", None)
    with pytest.raises(InitialRefused, match="not finite"):
        digest_of(safetensors.numpy.save({"a": np.array([np.nan], np.float32)}))
    with pytest.raises(InitialRefused, match="float32"):
        digest_of(safetensors.numpy.save({"a": np.zeros(3)}))
    with pytest.raises(ArchitectureRefused, match="random weights"):
        require_start(spec_from(None, "embedding").architecture, None, None)
    with pytest.raises(ArchitectureRefused, match="nothing to adapt"):
        require_start(FAMILY.architecture, weights, LoRA())
    with pytest.raises(TrainingError, match="needs them"):
        trained(spec_from(weights), None)
    with pytest.raises(TrainingError, match="needs them"):
        trained(spec_from(None), weights)


def test_with_every_layer_frozen_adapters_train_alone_and_without_them_nothing_would() -> None:
    given = build(FAMILY.architecture)
    weights, every = weights_of(given), tuple({each.type for each in FAMILY.layers})
    spec = spec_from(weights, *every, lora=LoRA(rank=2))
    require_start(spec.architecture, weights, spec.lora)
    network = trained(spec, weights)
    moved = {name for name, each in network.state_dict().items() if not torch.equal(each, given.state_dict()[name])}
    assert "layers.4.weight" in moved
    assert "layers.4.bias" not in moved
    with pytest.raises(ArchitectureRefused, match="every layer is frozen"):
        require_start(spec.architecture, weights, None)


def test_weights_that_would_cost_more_to_look_at_than_to_send_are_refused_at_once() -> None:
    rank = safetensors.numpy.save({"a": np.zeros([1] * 9, np.float32)})
    header = b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % b",".join([b"1"] * 100_000)
    bomb = len(header).to_bytes(8, "little") + header + bytes(4)
    for body in (rank, bomb, safetensors.numpy.save({}), safetensors.numpy.save({"a": np.zeros((3, 0), np.float32)})):
        started = time.process_time()
        with pytest.raises(InitialRefused, match="at most 8 dimensions"):
            digest_of(body)
        assert time.process_time() - started < 1


def test_adapters_count_among_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, spec = weights_of(build(FAMILY.architecture)), spec_from(None)
    architecture = spec.architecture.model_copy(update={"layers": frozen(FAMILY.layers, "transformer_layer")})
    count = sum(each.numel() for each in build(FAMILY.architecture).parameters())
    monkeypatch.setattr("cloister_privacy.training.start.PARAMETER_LIMIT", count + 100)
    require_start(architecture, weights, LoRA(rank=1))
    with pytest.raises(ArchitectureRefused, match="with its adapters the network has"):
        require_start(architecture, weights, LoRA(rank=100))
