"""What an operation is: a typed request, what is done with it, and what must be known of that beforehand. Does nothing itself.

Each of the operator's commands is one, and is run alike at the deployment itself and through the API.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Generic, TypeVar

from pydantic import AfterValidator, StringConstraints
from sqlalchemy.orm import Session

from cloister.wire._model import Body
from cloister_server import operators, tenants
from cloister_server.principal import Principal
from cloister_server.service import Service

__all__ = [
    "OPERATIONS",
    "Acting",
    "Asked",
    "Destroys",
    "Given",
    "InTenant",
    "Moment",
    "Operation",
    "in_utc",
    "operation",
    "plain",
]

R = TypeVar("R", bound=Body)
Q = TypeVar("Q", bound=Body)


def in_utc(moment: datetime) -> datetime:
    """Raises ValueError for the first and the last hours that there are, which are of no year in UTC."""
    try:
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("this is before the first year or after the last") from None


Given = Annotated[str, StringConstraints(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""What an operator types: a name, an id, a URL; no control characters."""


Moment = Annotated[datetime, AfterValidator(in_utc)]
"""UTC, unless it says otherwise."""


class InTenant(Body):
    """About one tenant, by name or id."""

    tenant: Given


class Asked(Body, Generic[Q]):
    """A request as it comes, and how it is meant."""

    request: Q
    dry_run: bool = False
    """Say what would be done, and change nothing."""
    confirm: Given | None = None
    """The name of what is to be destroyed, once more."""


@dataclass(frozen=True, slots=True)
class Acting:
    """Who operates: a person by a token of scope `admin`, or whoever runs a command at the deployment itself."""

    id: str
    request_id: str
    is_local: bool

    @classmethod
    def local(cls, user: str) -> Acting:
        """The operating system's user of this name, who holds the keys: nobody could refuse them."""
        return cls(f"local:{user}"[:40], f"cli_{secrets.token_hex(12)}", is_local=True)

    @classmethod
    def remote(cls, principal: Principal) -> Acting:
        """A person who has come by the API, of whom `running` asks whether they are an operator."""
        return cls(principal.id, principal.request_id, is_local=False)

    def within(self, session: Session, tenant: str) -> Principal:
        """As the operator at work in the tenant of this name or id. Raises NoSuch."""
        return tenants.operator_of(tenants.find_tenant(session, tenant), request_id=self.request_id, by=self.id)

    def into(self, session: Session, tenant: str) -> Principal:
        """The same in any tenant but the operators' own, which is given nothing and loses nobody but by `operator`. Raises NoSuch, or
        Conflict `operators_tenant`."""
        found = tenants.find_tenant(session, tenant)
        operators.require_other(found.name)
        return self.within(session, found.id)


@dataclass(frozen=True, slots=True)
class Destroys(Generic[R]):
    """What an operation destroys: the name that is to be typed once more, and why to think twice."""

    name: Callable[[Session, R], str]
    warning: str


Work = Callable[[Session, Service, Acting, R], Any]


@dataclass(frozen=True, slots=True)
class Operation(Generic[R]):
    """One of the operator's commands. `work` is one transaction; its answer is JSON but for datetimes."""

    name: str
    request: type[R]
    work: Work[R]
    changes: bool
    """Whether it writes; what only reads sees one moment, however long it takes."""
    fresh: Collection[str] = ()
    """What another run would not answer, and a plan leaves out: ids, and secrets that are shown once."""
    secret: Collection[str] = ()
    """What of the answer is kept nowhere, so that a retry is not answered with it again."""
    destroys: Destroys[R] | None = None
    plan: Work[R] | None = None
    """The answer to a dry run, where the work could not be rolled back."""
    prepare: Callable[[R], R] | None = None
    """What takes long, and so is done before the transaction."""


OPERATIONS: dict[str, Operation[Any]] = {}
"""Every operation by its name, as the package's modules define them."""


def operation(name: str, request: type[R], *, changes: bool = False, **more: Any) -> Callable[[Work[R]], Operation[R]]:
    """Make a function an operation. What holds a secret is fresh, too."""

    def made(work: Work[R]) -> Operation[R]:
        fresh = (*more.pop("fresh", ()), *more.get("secret", ()))
        OPERATIONS[name] = Operation(name, request, work, changes, fresh=fresh, **more)
        return OPERATIONS[name]

    return made


def plain(answer: Any) -> Any:
    """An answer as JSON has it."""
    return json.loads(json.dumps(answer, default=_text))


def of_fields(request: Body, *names: str) -> Mapping[str, Any]:
    """Those fields of a request, as keywords."""
    return {name: getattr(request, name) for name in names}


def _text(value: datetime) -> str:
    return value.isoformat()
