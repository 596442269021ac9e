"""Fills the blanks of a plan request, from public facts only: schema, declared sizes, unit and guarantee. Sees no rows."""

from __future__ import annotations

import math

from cloister.wire.architecture import Architecture, Loss
from cloister.wire.columns import CategoryColumn, Column, InputColumn, NumberColumn, OutputColumn, UnitColumn
from cloister.wire.plans import Guarantee, Initial, PlanRequest, Privacy, TrainingSpec
from cloister_privacy.architecture import check
from cloister_privacy.errors import ArchitectureRefused, PlanImpossible
from cloister_privacy.plan import DPPlan
from cloister_privacy.recipes.habits import Convex, General, habits_of
from cloister_privacy.recipes.networks import columns_read, network

__all__ = ["require_fit", "resolve"]

_EPSILON = 3.0
_MOST_STEPS = 10_000_000


def resolve(
    request: PlanRequest,
    *,
    columns: dict[str, Column],
    nominal_size: int,
    capacity: int,
    delta: float,
    unit: str = "row",
    guarantee: Guarantee | None = None,
    initial: Initial | None = None,
) -> TrainingSpec:
    """The run that a request means, without a blank left in it; `delta`, `unit` and `guarantee` are the source's,
    `initial` the weights that the request names.

    The same request and public facts always give the same spec. Raises PlanError or ArchitectureRefused.
    """
    inputs, (output, loss) = _inputs(request, columns), _goal(request.target, columns)
    layers = request.layers if request.layers is not None else network(inputs, output)
    loss = request.loss or loss
    architecture = Architecture(inputs=inputs, layers=layers, target=request.target, output=output, loss=loss)
    check(architecture)
    habits = habits_of(architecture)
    plan = _plan(request, habits, nominal_size=nominal_size, capacity=capacity, delta=delta, unit=unit)
    return TrainingSpec(
        dataset=request.dataset,
        with_datasets=request.with_datasets,
        architecture=architecture,
        nominal_size=plan.nominal_size,
        capacity=plan.capacity,
        rows_per_unit=plan.rows_per_unit,
        batch_size=plan.batch_size,
        steps=plan.steps,
        noise_multiplier=plan.noise_multiplier,
        clip=plan.clip,
        clipping=(request.privacy and request.privacy.clipping) or habits.clipping,
        delta=plan.delta,
        guarantee=guarantee,
        optimizer=request.optimizer or habits.optimizer(plan),
        precision=request.precision or "float32",
        initial=initial,
        lora=request.lora,
        audit=request.audit,
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
        name: column for name, column in columns.items() if not isinstance(column, UnitColumn)
    }
    features = request.features
    if features is None:
        named = columns_read(request.layers) if request.layers else None
        features = tuple(name for name in readable if name != request.target and (named is None or name in named))
        if not features and named is not None:
            raise ArchitectureRefused(
                f"the layers read {', '.join(map(repr, named))}, and the columns are {', '.join(map(repr, readable))}; name those"
            )
        if not features:
            raise ArchitectureRefused("the dataset has no column to learn from but the target; declare one")
    for name in features:
        _require(name, columns)
        if name not in readable:
            raise ArchitectureRefused(f"{name!r} is of type {columns[name].type}, which no network reads; leave it out")
    if not features or len(set(features)) != len(features):
        raise ArchitectureRefused("features must name at least one column, and each only once")
    return {name: readable[name] for name in features}


def _goal(target: str, columns: dict[str, Column]) -> tuple[OutputColumn, Loss]:
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


def _plan(
    request: PlanRequest, habits: Convex | General, *, nominal_size: int, capacity: int, delta: float, unit: str
) -> DPPlan:
    privacy = request.privacy or Privacy(epsilon=_EPSILON)
    batch_size = request.batch_size or habits.batch_size(nominal_size)
    steps = habits.steps(nominal_size, batch_size)
    if request.epochs is not None:
        drawn = request.epochs * nominal_size / batch_size
        steps = math.ceil(drawn) if drawn <= _MOST_STEPS else _MOST_STEPS + 1
    if steps > _MOST_STEPS:
        raise PlanImpossible(f"this is over {_MOST_STEPS} steps; lower epochs or raise batch_size")
    plan = DPPlan(
        nominal_size=nominal_size,
        capacity=capacity,
        batch_size=batch_size,
        steps=steps,
        noise_multiplier=privacy.noise_multiplier or 1.0,
        clip=privacy.clip,
        delta=privacy.delta or delta,
        rows_per_unit=request.rows_per_unit or 1,
        unit=unit,
    )
    return plan if privacy.epsilon is None else plan.calibrated_to(privacy.epsilon)
