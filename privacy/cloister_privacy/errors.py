"""What the privacy package refuses, and why. Messages speak of public numbers only, never of rows.

    PrivacyError
    ├── PlanError
    │   ├── BatchLargerThanNominal
    │   ├── PlanImpossible
    │   ├── QueryRefused
    │   │   ├── BinsRefused
    │   │   └── ColumnNotQueryable
    │   └── UnitNotSupported
    ├── AccountingError
    │   └── AccountantsDisagree
    ├── ArchitectureRefused
    │   ├── ClippingNotExact
    │   ├── CrossExampleLayer
    │   ├── InPlaceLayer
    │   ├── UncoveredParameter
    │   └── ModelNotSupported (of the importers)
    ├── WeightsRefused
    │   └── InitialRefused
    ├── InputRefused
    └── TrainingError
        ├── CheckpointRefused
        ├── RowsDoNotFit
        └── TrainingDiverged

`cloister_privacy.sealing` hangs its own errors under the same root.
"""

from __future__ import annotations

__all__ = [
    "AccountantsDisagree",
    "AccountingError",
    "ArchitectureRefused",
    "BatchLargerThanNominal",
    "BinsRefused",
    "CheckpointRefused",
    "ClippingNotExact",
    "ColumnNotQueryable",
    "CrossExampleLayer",
    "InPlaceLayer",
    "InitialRefused",
    "InputRefused",
    "PlanError",
    "PlanImpossible",
    "PrivacyError",
    "QueryRefused",
    "RowsDoNotFit",
    "TrainingDiverged",
    "TrainingError",
    "UncoveredParameter",
    "UnitNotSupported",
    "WeightsRefused",
]


class PrivacyError(Exception):
    """The root of every refusal that this package makes."""


class PlanError(PrivacyError):
    """A plan cannot be made from these public numbers."""


class BatchLargerThanNominal(PlanError):
    """The expected batch exceeds nominal_size."""


class PlanImpossible(PlanError):
    """No setting within the limits gives what was asked."""


class QueryRefused(PlanError):
    """A question about a dataset that cannot be asked."""


class BinsRefused(QueryRefused):
    """Bins that are too many, do not ascend, or lie outside of the column's bounds."""


class ColumnNotQueryable(QueryRefused):
    """A column that is not there, or of a kind that this question is not for."""


class UnitNotSupported(PlanError):
    """The source's unit or adjacency is one that the engine cannot protect yet."""


class AccountingError(PrivacyError):
    """Numbers that the accountants or the filter cannot take."""


class AccountantsDisagree(AccountingError):
    """One accountant came out above another that bounds it, so one of them is wrong."""


class ArchitectureRefused(PrivacyError):
    """A network whose parts do not fit together, or that is too large."""


class CrossExampleLayer(ArchitectureRefused):
    """A layer that mixes the examples of a batch, so that clipping one of them bounds nothing."""


class ClippingNotExact(ArchitectureRefused):
    """The engine's clipped sum is not the sum of clipped gradients, as tried on synthetic examples."""


class InPlaceLayer(ArchitectureRefused):
    """A layer that overwrites its input."""


class UncoveredParameter(ArchitectureRefused):
    """A trainable parameter whose gradient the engine cannot clip by example."""


class WeightsRefused(PrivacyError):
    """Bytes that are not the weights of a network of ours."""


class InitialRefused(WeightsRefused):
    """Weights that somebody gave to start training from, and that are not of the network or no weights at all."""


class InputRefused(PrivacyError):
    """An input to a prediction that its column does not allow."""

    def __init__(self, column: str, problem: str) -> None:
        super().__init__(f"input {column!r} {problem}")
        self.column = column
        self.problem = problem


class TrainingError(PrivacyError):
    """A run that cannot start or go on, for reasons that are public."""


class CheckpointRefused(TrainingError):
    """Bytes that are not a checkpoint of this very run."""


class RowsDoNotFit(TrainingError):
    """The rows are not shaped as the columns of the spec say."""


class TrainingDiverged(TrainingError):
    """The noisy weights are no longer finite."""
