"""Whole numbers of rows, released with discrete Laplace noise by OpenDP, whose own accounting has to agree before anything is read.

The one module that knows OpenDP. Its chain starts at the rows: multisets of unknown size under the symmetric distance, of which
one unit makes up at most `rows_per_unit`. So OpenDP is the judge of the sensitivity as well as of the noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from cloister_privacy.accounting import Orders
from cloister_privacy.errors import AccountantsDisagree, AccountingError
from cloister_privacy.queries.cost import rdp_of_pure, rdp_of_zcdp
from cloister_privacy.queries.plan import Part
from cloister_privacy.queries.vectors import GRID, Read, Steps

if TYPE_CHECKING:
    from opendp.mod import Measurement, Transformation

__all__ = ["cost_of", "mechanism_of"]


def mechanism_of(part: Part) -> Callable[[Read], tuple[int, ...]]:
    """What releases the part's integers with noise. Raises AccountantsDisagree where OpenDP's own epsilon is above the part's.

    How long a release takes tells something of rows and noise: whoever serves it keeps that to itself.
    """
    measurement = _measurement(part)

    def released(read: Read) -> tuple[int, ...]:
        integers = measurement(part.vector.of(read))
        return tuple(integers) if isinstance(integers, list) else (integers,)

    return released


def cost_of(measurement: Measurement, distance: int, *, orders: Sequence[float]) -> Orders:
    """The RDP at each order of any OpenDP measurement on data that differ by `distance` rows, by its own accounting.

    Raises AccountingError unless it is pure or zCDP: approximate DP has no finite RDP.
    """
    dp = _opendp()
    if measurement.output_measure == dp.max_divergence():
        return rdp_of_pure(_loss(measurement, distance), orders=orders)
    if measurement.output_measure == dp.zero_concentrated_divergence():
        return rdp_of_zcdp(_loss(measurement, distance), orders=orders)
    raise AccountingError(
        f"a measurement in terms of {measurement.output_measure} has no finite RDP, so the filter cannot charge it; "
        "use a pure or a zero-concentrated one"
    )


def _transformation(part: Part) -> Transformation:
    dp = _opendp()
    rows = dp.vector_domain(dp.atom_domain(T="i64")), dp.symmetric_distance()
    if isinstance(part.vector, Steps):
        return cast("Transformation", rows >> dp.t.then_clamp(bounds=(-GRID, GRID)) >> dp.t.then_sum())
    # A row whose bin is not among the declared ones is not counted.
    counts = dp.t.then_count_by_categories(
        categories=list(range(part.vector.size)), null_category=False, MO="L1Distance<i64>", TOA="i64"
    )
    return cast("Transformation", rows >> counts)


def _measurement(part: Part) -> Measurement:
    dp = _opendp()
    measurement = cast("Measurement", _transformation(part) >> dp.m.then_laplace(scale=part.scale))
    if measurement.output_measure != dp.max_divergence():
        raise AccountingError(
            f"the mechanism is accounted as {measurement.output_measure}; only pure epsilon is charged"
        )
    epsilon = _loss(measurement, part.rows_per_unit)
    if not epsilon <= part.epsilon:
        raise AccountantsDisagree(
            f"epsilon of {part.name!r} is {epsilon!r} by OpenDP but {part.epsilon!r} by the plan; nothing was released, "
            "please report these numbers"
        )
    return measurement


def _loss(measurement: Measurement, distance: int) -> float:
    return float(measurement.map(distance))  # type: ignore[no-untyped-call]  # OpenDP does not annotate it


def _opendp() -> Any:
    import opendp.prelude as dp  # slow to import

    # Reviewed, and in part without a proof that was vetted: what OpenDP calls its contributed parts, these constructors included.
    dp.enable_features("contrib")
    return dp
