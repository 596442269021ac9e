"""Recipes: blanks are filled from public facts, the same way every time, and what cannot be is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cloister.wire.columns import CategoryColumn, Column, NumberColumn, TensorColumn, TextColumn, UnitColumn
from cloister.wire.layers import Encode, Flatten, Linear, ReLU, Tanh
from cloister.wire.plans import SGD, Adam, Guarantee, PlanRequest, Privacy, TrainingSpec
from cloister_privacy import DPPlan
from cloister_privacy.errors import ArchitectureRefused, BatchLargerThanNominal, PlanImpossible, PrivacyError
from cloister_privacy.recipes import require_fit, resolve

COLUMNS: dict[str, Column] = {
    "image": TensorColumn(shape=(28, 28), low=0, high=1),
    "age": NumberColumn(low=0, high=120),
    "note": TextColumn(max_length=10),
    "label": CategoryColumn(values=tuple("abcdefghij")),
    "who": UnitColumn(),
}


GUARANTEE = Guarantee(epsilon=5.0, delta=1e-6)


def resolved(nominal_size: int = 60000, *, unit: str = "row", **fields: Any) -> TrainingSpec:
    request = PlanRequest(**({"dataset": "ds_" + "0" * 32, "target": "label"} | fields))
    return resolve(
        request, columns=COLUMNS, nominal_size=nominal_size, capacity=2 * nominal_size, delta=1e-6, unit=unit,
        guarantee=GUARANTEE,
    )  # fmt: skip


def test_with_nothing_given_every_column_is_read_by_fixed_features_at_a_default_epsilon() -> None:
    spec = resolved()
    assert list(spec.architecture.inputs) == ["image", "age", "note"]
    types = [layer.type for layer in spec.architecture.layers]
    image, text, table = ["rescale", "scattering", "linear"], ["hashed_text", "linear"], ["encode", "linear"]
    assert types == [*image, *text, *table, "add"]
    assert spec.architecture.loss == "cross_entropy"
    assert (spec.batch_size, spec.clipping) == (15000, "automatic")
    assert isinstance(spec.optimizer, SGD)
    assert spec.delta == 1e-6
    assert 2.999 < DPPlan.of(spec).epsilon() <= 3.0


def test_the_same_request_gives_the_same_spec() -> None:
    assert resolved() == resolved()


def test_what_is_given_is_kept_and_only_the_rest_is_filled() -> None:
    spec = resolved(
        features=("age",),
        batch_size=600,
        epochs=1.5,
        privacy=Privacy(noise_multiplier=2.0, clip=0.5, delta=1e-7),
        optimizer=Adam(learning_rate=0.003),
    )
    assert list(spec.architecture.inputs) == ["age"]
    assert (spec.batch_size, spec.steps, spec.noise_multiplier, spec.clip, spec.delta) == (600, 150, 2.0, 0.5, 1e-7)
    assert spec.optimizer == Adam(learning_rate=0.003)


def test_the_seed_settings_are_expressible_to_the_letter() -> None:
    spec = resolved(
        features=("image",),
        layers=(Flatten(), Linear(in_features=784, out_features=128), ReLU(), Linear(in_features=128, out_features=10)),
        privacy=Privacy(noise_multiplier=1.0, clip=1.0),
        batch_size=256,
        epochs=10,
        optimizer=SGD(learning_rate=0.01),
    )
    assert (spec.steps, spec.noise_multiplier, spec.optimizer) == (2344, 1.0, SGD(learning_rate=0.01, momentum=0.0))


@pytest.mark.parametrize("epsilon", [0.5, 3.0, 8.0])
def test_a_target_epsilon_is_met_from_below(epsilon: float) -> None:
    assert epsilon * 0.999 < DPPlan.of(resolved(privacy=Privacy(epsilon=epsilon))).epsilon() <= epsilon


def test_networks_of_people_s_own_are_trained_in_batches_that_grow_with_the_root_of_the_rows() -> None:
    spec = resolved(features=("age",), layers=(Encode(), Linear(in_features=1, out_features=10)))
    assert (spec.batch_size, spec.steps) == (2939, 409)


def test_layers_that_name_columns_are_given_those_alone() -> None:
    head = Linear(in_features=2, out_features=10)
    spec = resolved(layers=(Encode(reads=("age",), bins=1), head.model_copy(update={"in_features": 2})))
    assert list(spec.architecture.inputs) == ["age"]


@pytest.mark.parametrize("batch_size", [None, 600, 59_999])
def test_the_steps_on_fixed_features_do_not_depend_on_the_batch(batch_size: int | None) -> None:
    assert resolved(features=("age",), batch_size=batch_size).steps == resolved(features=("age",)).steps


def test_a_number_is_learnt_by_squared_error() -> None:
    spec = resolved(target="age")
    assert spec.architecture.loss == "mean_squared_error"
    assert resolved(target="age", features=("label",)).architecture.layers == (
        Encode(),
        Linear(in_features=10, out_features=128),
        Tanh(),
        Linear(in_features=128, out_features=1),
    )


@pytest.mark.parametrize("nominal_size", [1, 2, 63, 64, 65, 1000, 10**9])
def test_every_nominal_size_has_a_batch_that_fits(nominal_size: int) -> None:
    spec = resolved(nominal_size, privacy=Privacy(noise_multiplier=1.0))
    assert 1 <= spec.batch_size <= nominal_size


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"batch_size": 60001}, BatchLargerThanNominal, "lower batch_size"),
        ({"batch_size": 1, "epochs": 1000.0}, PlanImpossible, "over 10000000 steps"),
        ({"epochs": 1e300}, PlanImpossible, "over 10000000 steps"),
        ({"privacy": Privacy(epsilon=1e-4)}, PlanImpossible, "raise epsilon"),
        ({"target": "colour"}, ArchitectureRefused, "'colour' is not a column"),
        ({"target": "image"}, ArchitectureRefused, "predict a category or a number"),
        ({"target": "note"}, ArchitectureRefused, "predict a category or a number"),
        ({"features": ("who",)}, ArchitectureRefused, "of type unit"),
        ({"features": ("colour",)}, ArchitectureRefused, "not a column"),
        ({"features": ("age", "age")}, ArchitectureRefused, "only once"),
        ({"features": ()}, ArchitectureRefused, "at least one column"),
        ({"features": ("label",)}, ArchitectureRefused, "both an input and the target"),
        ({"layers": (Flatten(),)}, ArchitectureRefused, "put encode first to join them"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_by_name(
    fields: dict[str, Any], error: type[PrivacyError], message: str
) -> None:
    with pytest.raises(error, match=message):
        resolved(**fields)


def test_a_spec_is_held_against_the_dataset_that_it_names(spec_of: Callable[..., TrainingSpec]) -> None:
    spec = resolved()
    facts: dict[str, Any] = {"columns": COLUMNS, "nominal_size": 60000, "capacity": 120000, "guarantee": GUARANTEE}
    require_fit(spec, **facts)
    with pytest.raises(PlanImpossible, match="nominal_size 60000 is not the dataset's 60001"):
        require_fit(spec, **facts | {"nominal_size": 60001})
    with pytest.raises(PlanImpossible, match="capacity 120000 is not the dataset's 120001"):
        require_fit(spec, **facts | {"capacity": 120001})
    for guarantee in (None, Guarantee(epsilon=6.0, delta=1e-6)):
        with pytest.raises(PlanImpossible, match="guarantee is not what the source promises now"):
            require_fit(spec, **facts | {"guarantee": guarantee})
    wider = {**COLUMNS, "age": NumberColumn(low=0, high=121)}
    with pytest.raises(ArchitectureRefused, match="'age' is not a column of the dataset as the spec declares it"):
        require_fit(spec, **facts | {"columns": wider})


def test_the_declared_sizes_and_the_sources_guarantee_stand_in_the_spec() -> None:
    spec = resolved(1000)
    assert (spec.nominal_size, spec.capacity, spec.rows_per_unit, spec.guarantee) == (1000, 2000, 1, GUARANTEE)


def test_several_rows_of_a_unit_are_for_users_only() -> None:
    spec = resolved(unit="user", rows_per_unit=4)
    assert spec.rows_per_unit == 4
    facts: dict[str, Any] = {"columns": COLUMNS, "nominal_size": 60000, "capacity": 120000, "guarantee": GUARANTEE}
    require_fit(spec, **facts, unit="user")
    with pytest.raises(PlanImpossible, match="a row is the unit"):
        require_fit(spec, **facts)
    with pytest.raises(PlanImpossible, match="a row is the unit"):
        resolved(rows_per_unit=4)
    assert resolved(rows_per_unit=1) == resolved(), "one row of a unit is the row"
