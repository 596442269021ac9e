"""Cloister's SDK: private training and predictions on a Cloister server.

Everything is loaded when it is first used, so that importing this package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cloister._budgets import BudgetReport as BudgetReport
    from cloister._client import AsyncCloister as AsyncCloister
    from cloister._client import Cloister as Cloister
    from cloister._errors import APIError as APIError
    from cloister._errors import AuthenticationFailed as AuthenticationFailed
    from cloister._errors import BadRequest as BadRequest
    from cloister._errors import BudgetExceeded as BudgetExceeded
    from cloister._errors import CloisterError as CloisterError
    from cloister._errors import ConfigurationError as ConfigurationError
    from cloister._errors import Conflict as Conflict
    from cloister._errors import ConnectionFailed as ConnectionFailed
    from cloister._errors import InvalidArgument as InvalidArgument
    from cloister._errors import InvalidRequest as InvalidRequest
    from cloister._errors import JobCancelled as JobCancelled
    from cloister._errors import JobFailed as JobFailed
    from cloister._errors import NotFound as NotFound
    from cloister._errors import PartiesNotApart as PartiesNotApart
    from cloister._errors import PartyAnswerRefused as PartyAnswerRefused
    from cloister._errors import PartyBusy as PartyBusy
    from cloister._errors import PartyRefused as PartyRefused
    from cloister._errors import PartyUnavailable as PartyUnavailable
    from cloister._errors import PermissionDenied as PermissionDenied
    from cloister._errors import PrivateInferenceFailed as PrivateInferenceFailed
    from cloister._errors import RateLimited as RateLimited
    from cloister._errors import RevisionMoved as RevisionMoved
    from cloister._errors import RowsNotFit as RowsNotFit
    from cloister._errors import RowsRefused as RowsRefused
    from cloister._errors import ServerFault as ServerFault
    from cloister._errors import StaleDeployment as StaleDeployment
    from cloister._errors import StillRunning as StillRunning
    from cloister._errors import TenantKeyRefused as TenantKeyRefused
    from cloister._errors import TimedOut as TimedOut
    from cloister._errors import TooLarge as TooLarge
    from cloister._errors import UnexpectedAnswer as UnexpectedAnswer
    from cloister._errors import UploadDiffers as UploadDiffers
    from cloister._handles import AsyncJob as AsyncJob
    from cloister._handles import AsyncModel as AsyncModel
    from cloister._handles import Job as Job
    from cloister._handles import Model as Model
    from cloister._plans import Plan as Plan
    from cloister._private import AsyncPrivateModel as AsyncPrivateModel
    from cloister._private import PrivateModel as PrivateModel
    from cloister._queries import AsyncQueryJob as AsyncQueryJob
    from cloister._queries import QueryJob as QueryJob
    from cloister.wire import layers as layers
    from cloister.wire import queries as queries
    from cloister.wire.certificate import Certificate as Certificate
    from cloister.wire.certificate import InvalidCertificate as InvalidCertificate
    from cloister.wire.certificate import verify as verify
    from cloister.wire.columns import AudioColumn as Audio
    from cloister.wire.columns import CategoryColumn as Category
    from cloister.wire.columns import NumberColumn as Number
    from cloister.wire.columns import TensorColumn as Tensor
    from cloister.wire.columns import TextColumn as Text
    from cloister.wire.columns import UnitColumn as Unit
    from cloister.wire.jobs import ModelSchema as ModelSchema
    from cloister.wire.ledger import BudgetEntry as BudgetEntry
    from cloister.wire.plans import EMA as EMA
    from cloister.wire.plans import SGD as SGD
    from cloister.wire.plans import Adam as Adam
    from cloister.wire.plans import AdamW as AdamW
    from cloister.wire.plans import LoRA as LoRA
    from cloister.wire.plans import Privacy as DP  # noqa: N814 (DP is its public name)
    from cloister.wire.plans import Schedule as Schedule
    from cloister.wire.plans import Tail as Tail
    from cloister.wire.private_deployments import Role as Role
    from cloister.wire.sources import Allowance as Allowance
    from cloister.wire.sources import Block as Block
    from cloister.wire.sources import Budget as Budget
    from cloister.wire.sources import Dataset as Dataset
    from cloister.wire.sources import Source as Source

_ERRORS = [
    "APIError",
    "AuthenticationFailed",
    "BadRequest",
    "BudgetExceeded",
    "CloisterError",
    "ConfigurationError",
    "Conflict",
    "ConnectionFailed",
    "InvalidArgument",
    "InvalidRequest",
    "JobCancelled",
    "JobFailed",
    "NotFound",
    "PartiesNotApart",
    "PartyAnswerRefused",
    "PartyBusy",
    "PartyRefused",
    "PartyUnavailable",
    "PermissionDenied",
    "PrivateInferenceFailed",
    "RateLimited",
    "RevisionMoved",
    "RowsNotFit",
    "RowsRefused",
    "ServerFault",
    "StaleDeployment",
    "StillRunning",
    "TenantKeyRefused",
    "TimedOut",
    "TooLarge",
    "UnexpectedAnswer",
    "UploadDiffers",
]

_HOME: dict[str, tuple[str, str]] = {
    **{name: ("cloister._errors", name) for name in _ERRORS},
    **{name: ("cloister._client", name) for name in ("AsyncCloister", "Cloister")},
    **{name: ("cloister._handles", name) for name in ("AsyncJob", "AsyncModel", "Job", "Model")},
    **{name: ("cloister._private", name) for name in ("AsyncPrivateModel", "PrivateModel")},
    **{name: ("cloister.wire.certificate", name) for name in ("Certificate", "InvalidCertificate", "verify")},
    **{
        name: ("cloister.wire.columns", f"{name}Column")
        for name in ("Audio", "Category", "Number", "Tensor", "Text", "Unit")
    },
    **{name: ("cloister.wire.plans", name) for name in ("EMA", "SGD", "Adam", "AdamW", "LoRA", "Schedule", "Tail")},
    **{name: ("cloister.wire.sources", name) for name in ("Allowance", "Block", "Budget", "Dataset", "Source")},
    "BudgetEntry": ("cloister.wire.ledger", "BudgetEntry"),
    "BudgetReport": ("cloister._budgets", "BudgetReport"),
    "ModelSchema": ("cloister.wire.jobs", "ModelSchema"),
    "DP": ("cloister.wire.plans", "Privacy"),
    "Plan": ("cloister._plans", "Plan"),
    "Role": ("cloister.wire.private_deployments", "Role"),
    **{name: ("cloister._queries", name) for name in ("AsyncQueryJob", "QueryJob")},
    "layers": ("cloister.wire.layers", ""),
    "queries": ("cloister.wire.queries", ""),
}
"""Public name -> the module that has it and its name there; no name where it is the module itself."""

__all__ = sorted(_HOME)  # noqa: PLE0605 (a list, computed from the one table)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cloister' has no attribute {name!r}")
    module, attribute = _HOME[name]
    home = import_module(module)
    value = getattr(home, attribute) if attribute else home
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
