"""Who owns what and who was granted what, as sets: what the isolation machine holds the server against. Knows no server."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["ANY", "CREATOR", "VERBS", "Oracle", "Permit", "Row", "Who"]

ANY = "*"

VERBS = {
    "tenant": ("source.create", "weights.create", "policy.read"),
    "source": ("source.read", "source.own", "dataset.create"),
    "dataset": ("dataset.read", "dataset.upload", "dataset.train"),
    "job": ("job.read", "job.cancel"),
    "model": ("model.read", "model.predict", "model.publish", "model.deploy_private"),
    "weights": ("weights.use",),
}
"""By kind of thing, what may be done to it; whoever may do one of these to a thing may know that it is there."""

CREATOR = {
    "source": VERBS["source"],
    "dataset": VERBS["dataset"],
    "job": VERBS["job"],
    "model": ("model.read", "model.predict", "model.publish"),
    "weights": VERBS["weights"],
}
"""What whoever makes a thing may do to it from then on."""


@dataclass(frozen=True)
class Row:
    """A thing of a tenant that one can be granted something on."""

    kind: str
    tenant: str
    id: str
    name: str


@dataclass
class Who:
    """An app or a person, with the header of its requests.

    Whoever is gone is no more, nor is what it held. Whoever is signed out is there and holds what it held, but its tokens are refused.
    """

    tenant: str
    id: str
    kind: str
    name: str
    bearer: dict[str, str] = field(repr=False)
    secret: str = field(default="", repr=False)
    is_gone: bool = False
    is_signed_out: bool = False


@dataclass
class Permit:
    """A grant or a denial of one verb, of everything or of one thing of a tenant."""

    tenant: str
    id: str
    holder: str
    verb: str
    on: str
    allows: bool
    is_over: bool = False


@dataclass
class Oracle:
    """The rules, in as few words as they have: a denial goes before every permit, and what nothing permits is refused."""

    suspended: dict[str, bool] = field(default_factory=dict)
    """Of each tenant whether it is."""
    people: list[Who] = field(default_factory=list)
    rows: dict[str, Row] = field(default_factory=dict)
    permits: list[Permit] = field(default_factory=list)
    groups: dict[str, tuple[str, set[str]]] = field(default_factory=dict)
    """By id: the tenant and the members."""

    def is_let_in(self, who: Who) -> bool:
        return not (who.is_gone or who.is_signed_out or self.suspended[who.tenant])

    def may(self, who: Who, verb: str, row: Row) -> bool:
        holders = {who.id} | {group for group, (_, members) in self.groups.items() if who.id in members}
        bearing = [
            each.allows
            for each in self.permits
            if each.tenant == row.tenant
            and each.verb == verb
            and each.on in (row.id, ANY)
            and each.holder in holders
            and not each.is_over
        ]
        return not self.suspended[row.tenant] and bool(bearing) and all(bearing)

    def sees(self, who: Who, row: Row) -> bool:
        return any(self.may(who, verb, row) for verb in VERBS[row.kind])

    def seen(self, who: Who, kind: str) -> set[str]:
        return {row.id for row in self.of(kind) if self.sees(who, row)}

    def of(self, kind: str) -> list[Row]:
        return [row for row in self.rows.values() if row.kind == kind]

    def tenant(self, tenant: str) -> Row:
        """A tenant as a thing of its own."""
        return Row("tenant", tenant, tenant, tenant)

    def named(self, who: Who, kind: str, name: str) -> Row | None:
        """What a name means to somebody: what their own tenant calls so."""
        return next((row for row in self.of(kind) if row.tenant == who.tenant and row.name == name), None)

    def holds_directly(self, who: Who, tenant: str) -> bool:
        return any(each.tenant == tenant and each.holder == who.id for each in self.permits)

    def made(self, who: Who, row: Row) -> None:
        self.rows[row.id] = row
        self.permits += [Permit(row.tenant, "", who.id, verb, row.id, True) for verb in CREATOR[row.kind]]

    def deleted(self, row_id: str) -> None:
        del self.rows[row_id]
        self.permits = [each for each in self.permits if each.on != row_id]

    def left(self, holder: str) -> None:
        """A principal or a group is no more, and nor is what it held."""
        self.permits = [each for each in self.permits if each.holder != holder]
        self.groups.pop(holder, None)
        for _, members in self.groups.values():
            members.discard(holder)

    def tellable(self, who: Who, row: Row) -> set[str]:
        """Tenants whose ids an answer about this thing may hold: the asker's and its own, and of principals with something there."""
        holders = {each.holder for each in self.permits if each.tenant == row.tenant}
        there = {each.tenant for each in self.people if each.id in holders}
        return {who.tenant, row.tenant} | there | {self.groups[each][0] for each in holders if each in self.groups}

    def owners(self) -> dict[str, str]:
        """Every id that there is, with the tenant that it is of."""
        return {
            **{row.id: row.tenant for row in self.rows.values()},
            **{who.id: who.tenant for who in self.people},
            **{group: tenant for group, (tenant, _) in self.groups.items()},
            **{tenant: tenant for tenant in self.suspended},
            **{each.id: each.tenant for each in self.permits if each.id},
        }
