"""Every family of networks in the library: the shapes that were promised, exact clipping, training, bytes, and the stem."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cloister.wire.columns import TensorColumn
from cloister_privacy.architecture import Network, build, check, from_bytes, measure, to_bytes
from cloister_privacy.architecture.values import values_of
from cloister_privacy.errors import ArchitectureRefused, InputRefused
from cloister_privacy.plan import DPPlan
from cloister_privacy.training import engine, train
from cloister_privacy.training.examples import Examples, keeps_stem, synthetic
from cloister_privacy.training.guard import guard, require_exact_clipping
from families import FAMILIES, ROWS, Family, converted, spec_of


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def test_every_layer_gives_the_shape_and_has_the_parameters_that_were_promised(family: Family) -> None:
    network = build(family.architecture).eval()
    values = values_of(family.inputs, converted(family, 5), device="cpu")
    known = dict(values)
    for each, module in zip(measure(family.architecture), network.layers, strict=True):
        known[each.node.key] = module(*[known[name] for name in each.node.reads])
        if not each.gives.is_sparse:
            assert known[each.node.key].shape == (5, *each.gives.shape), each.node.where
        assert sum(parameter.numel() for parameter in module.parameters()) == each.parameters, each.node.where
    assert check(family.architecture) == sum(each.numel() for each in network.parameters())


def test_it_is_clipped_exactly_by_example(family: Family) -> None:
    network = build(family.architecture)
    guard(network)
    require_exact_clipping(network, engine._losses, synthetic(family.architecture, 8, device="cpu"))


def test_it_trains_and_its_bytes_give_the_same_predictions(family: Family) -> None:
    rows = converted(family, ROWS)
    spec = spec_of(family)
    body = train(
        spec, rows, plan=DPPlan.of(spec), device="cpu", chunk_steps=4,
        before_chunk=lambda *_: None, after_chunk=lambda *_: True,
    )  # fmt: skip
    assert body is not None
    network = from_bytes(body)
    asked = {name: values for name, values in family.rows(7).items() if name != "kind"}
    asked = {name: _as_sent(family, name, values) for name, values in asked.items()}
    answer = network.predict(asked)
    again = from_bytes(to_bytes(network)).predict(asked)
    for name, array in answer.items():
        assert len(array) == 7
        assert np.isfinite(array).all()
        np.testing.assert_array_equal(array, again[name])


def _as_sent(family: Family, name: str, values: Any) -> NDArray[Any]:
    from cloister._inputs import _input

    return _input(name, family.inputs[name], values)


@pytest.mark.parametrize("name", ["scattering", "hashed text", "audio"])
def test_what_nothing_trains_is_computed_once_and_changes_no_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES[name]
    network = build(family.architecture)
    rows = converted(family, ROWS)
    assert keeps_stem(network, slots=ROWS)
    kept = Examples(network, rows, slots=ROWS + 10, device="cpu")
    monkeypatch.setattr("cloister_privacy.training.examples._STEM_BYTES", 0)
    assert not keeps_stem(network, slots=ROWS)
    anew = Examples(network, rows, slots=ROWS + 10, device="cpu")
    indices = np.array([5, 2, 40])
    for (ours, targets), (theirs, same) in ((kept.batch(indices), anew.batch(indices)),):
        assert set(ours).isdisjoint(theirs)
        assert targets.tolist() == same.tolist()
        torch.testing.assert_close(network(ours), network(theirs))


def test_a_stem_runs_for_every_slot_whatever_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    family, seen = FAMILIES["scattering"], []
    network = build(family.architecture)
    stem = network.stem
    monkeypatch.setattr(network, "stem", lambda values: seen.append(len(values["image"])) or stem(values))
    for count in (1, 25, ROWS):
        seen.clear()
        Examples(network, converted(family, count), slots=ROWS, device="cpu")
        assert sum(seen) == ROWS


def test_frozen_layers_keep_their_weights_and_those_before_the_first_trained_one_are_a_stem() -> None:
    family = FAMILIES["convolutions"]
    layers = tuple(
        layer.model_copy(update={"frozen": True}) if layer.type in ("conv2d", "group_norm") else layer
        for layer in family.layers
    )
    spec = spec_of(Family(family.inputs, layers, family.rows))
    network = build(spec.architecture)
    assert network.stem_numbers == 64
    run = engine._Run(spec, DPPlan.of(spec), device="cpu")
    before = {name: each.clone() for name, each in run.network.state_dict().items()}
    examples = Examples(run.network, converted(family, ROWS), slots=ROWS, device="cpu")
    run.steps(examples, engine.sampler_of(DPPlan.of(spec), ROWS), 0, 3)
    moved = {name for name, each in run.network.state_dict().items() if not torch.equal(each, before[name])}
    assert moved == {"layers.6.weight", "layers.6.bias"}


def test_padding_after_a_text_or_a_recording_changes_nothing_of_what_masks_it() -> None:
    family = FAMILIES["attention"]
    network = build(family.architecture).eval()
    short = network.predict({"text": np.array(["good"], dtype=object)})["probabilities"]
    alone = network.predict({"text": np.array(["good", "a longer one"], dtype=object)})["probabilities"][:1]
    np.testing.assert_allclose(short, alone, atol=1e-6)


def test_the_work_of_a_run_by_user_does_not_tell_how_many_rows_its_users_have(monkeypatch: pytest.MonkeyPatch) -> None:
    family, seen = FAMILIES["scattering"], []
    spec = spec_of(family, nominal_size=20, capacity=20, batch_size=10, steps=2)
    stem = Network.stem
    monkeypatch.setattr(
        Network, "stem", lambda network, values: seen.append(len(values["image"])) or stem(network, values)
    )
    for rows in (20, 500):
        train(
            spec, converted(family, rows), plan=DPPlan.of(spec, unit="user"), units=lambda rows=rows: np.arange(rows) % 20,
            device="cpu", chunk_steps=2, before_chunk=lambda *_: None, after_chunk=lambda *_: True,
        )  # fmt: skip
    assert not seen, "the plan does not tell how many rows there may be, so none are run at once"


def test_no_layer_has_the_name_of_the_target() -> None:
    family = FAMILIES["hashed text"]
    named = tuple(
        layer.model_copy(update={"name": "kind"}) if layer.type == "hashed_text" else layer for layer in family.layers
    )
    with pytest.raises(ArchitectureRefused, match="each column and the target its own"):
        check(family.architecture.model_copy(update={"layers": named}))


@pytest.mark.parametrize(
    ("shape", "why"), [((8, 4096), "too unequal"), ((64, 32, 32), "at most 4 channels"), ((7, 9), "at least 8 x 8")]
)
def test_images_whose_filters_would_cost_too_much_are_refused(shape: tuple[int, ...], why: str) -> None:
    column = TensorColumn(shape=shape, low=0, high=1)
    with pytest.raises(ArchitectureRefused, match=why):
        check(FAMILIES["scattering"].architecture.model_copy(update={"inputs": {"image": column}}))


def test_what_is_sent_bounds_what_a_prediction_takes() -> None:
    network = build(FAMILIES["audio"].architecture)
    with pytest.raises(InputRefused, match="at least one sample"):
        network.predict({"sound": np.zeros((8000, 0), np.float32)})
    with pytest.raises(InputRefused, match="send fewer"):
        network.predict({"sound": np.zeros((2**20, 1), np.int16)})
    assert 1 <= build(FAMILIES["convolutions"].architecture).rows_at_once <= 1024
