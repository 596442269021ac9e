"""The list of other issuers whose tokens are taken, and whom of a tenant's their subjects are: the operator's to say. Knows SQL.

Being on the list lets nobody in: each subject is let in by a row, as one principal of one tenant, and may what that one is granted.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from cloister_server import audit, grants, policy
from cloister_server.errors import Conflict, Invalid
from cloister_server.grants import NoSuch
from cloister_server.oauth import verifier
from cloister_server.oauth.fetching import Network, NotFetched, fetch_json, require_allowed
from cloister_server.oauth.foreign import LONGEST_SUBJECT, TYPES
from cloister_server.oauth.issuer_keys import ALGORITHMS, fetch_keys
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.issuers import (
    Issuer,
    IssuerSubject,
    issuer_of_url,
    subject_of,
    subjects_of,
    tenants_of_subjects,
)
from cloister_server.store.issuers import issuers as issuers_
from cloister_server.store.tables import App, Tenant, new_id

__all__ = ["Discovered", "add", "discover", "find", "listed", "map_subject", "remove", "subjects", "unmap_subject"]

log = logging.getLogger(__name__)

DEFAULT_ALGORITHMS = ("RS256", "ES256")
_MOST_ISSUERS = 64


@dataclass(frozen=True, slots=True)
class Discovered:
    """What an issuer says of itself, and which of its keys are taken."""

    url: str
    jwks_uri: str
    key_ids: list[str]
    network: Network
    algorithms: tuple[str, ...]


def discover(url: str, *, network: Network, algorithms: Sequence[str]) -> Discovered:
    """Ask an issuer where its keys are (OpenID Connect Discovery, else RFC 8414), and for them, in no transaction. Raises Invalid."""
    if not algorithms or not set(algorithms) <= ALGORITHMS.keys() or network not in get_args(Network):
        raise Invalid(f"an issuer signs with {', '.join(ALGORITHMS)}; name one or more of these, and no other")
    if len(url) > 512:
        raise Invalid("an issuer's URL is at most 512 characters long here")
    try:
        told = _metadata(url, network)
        jwks_uri = told.get("jwks_uri")
        if told.get("issuer") != url or not isinstance(jwks_uri, str):
            raise NotFetched(
                f"what is published for {url} is of another issuer ({str(told.get('issuer'))[:200]!r}), or names no keys"
            )
        keys = fetch_keys(jwks_uri, network=network, algorithms=algorithms)
    except NotFetched as refusal:
        raise Invalid(
            f"{refusal}; see that it is the issuer's URL, exactly as `iss` has it, and that it is reachable"
        ) from None
    if not keys:
        raise Invalid(f"{url} publishes no key that may sign with {', '.join(algorithms)}; name its algorithms")
    return Discovered(url, jwks_uri, sorted(keys), network, tuple(dict.fromkeys(algorithms)))


def add(session: Session, service: Service, found: Discovered, *, audience: str | None, typ: str) -> Issuer:
    """Put an issuer on the list; nobody is let in by that alone. Raises Conflict or Invalid."""
    if typ not in TYPES or (audience is not None and not 0 < len(audience) <= 512):
        raise Invalid(f"tokens are of the type {' or '.join(TYPES)}, for an audience of at most 512 characters")
    if found.url == service.settings.issuer:
        raise Invalid("this is the deployment itself, whose own tokens are taken as they are")
    if issuer_of_url(session, found.url) is not None:
        raise Conflict(
            f"{found.url} is on the list already; remove it first, and its subjects with it, to take it by other rules"
        )
    if (session.scalar(select(func.count()).select_from(Issuer)) or 0) >= _MOST_ISSUERS:
        raise Conflict(f"there are {_MOST_ISSUERS} issuers already; remove one first")
    issuer = Issuer(
        id=new_id("is"),
        url=found.url,
        jwks_uri=found.jwks_uri,
        audience=audience or service.settings.issuer,
        algorithms=list(found.algorithms),
        typ=typ,
        network=found.network,
    )
    session.add(issuer)
    verifier.forget_after(session, service)
    log.info("issuer.added", extra={"issuer": issuer.url, "issuer_id": issuer.id})
    return issuer


def listed(session: Session) -> list[tuple[Issuer, int]]:
    """Every issuer on the list, and how many subjects of it are somebody here."""
    counted = select(IssuerSubject.issuer_id, func.count().label("n")).group_by(IssuerSubject.issuer_id)
    counts = {row.issuer_id: int(row.n) for row in session.execute(counted)}
    return [(each, counts.get(each.id, 0)) for each in session.scalars(issuers_())]


def find(session: Session, url: str) -> Issuer:
    """The issuer of this URL. Raises NoSuch."""
    issuer = issuer_of_url(session, url)
    if issuer is None:
        raise NoSuch("issuer", url)
    return issuer


def remove(session: Session, service: Service, url: str, *, request_id: str, by: str = "operator") -> int:
    """Take an issuer off the list with all of its subjects; how many those were. Its tokens are refused from the next request on,
    elsewhere within a second."""
    issuer = find(session, url)
    of_issuer = IssuerSubject.issuer_id == issuer.id
    tenants = tenants_of_subjects(session, issuer.id)
    gone: int = session.execute(delete(IssuerSubject).where(of_issuer)).rowcount  # type: ignore[attr-defined]  # of a DELETE there is one
    session.delete(issuer)
    for tenant_id in tenants:
        operator = Principal.operator(tenant_id, request_id=request_id, by=by)
        tenant = session.get_one(Tenant, tenant_id)
        audit.allowed(
            session, policy.authorize(session, operator, "tenant.administer", tenant), "issuer.remove", issuer.id
        )
    verifier.forget_after(session, service)
    log.info("issuer.removed", extra={"issuer": url, "issuer_id": issuer.id, "subjects": gone})
    return gone


def subjects(session: Session, principal: Principal) -> list[Any]:
    """(subject, issuer) of each row of the operator's tenant, oldest first."""
    tenant = session.get_one(Tenant, principal.tenant_id)
    policy.authorize(session, principal, "tenant.administer", tenant)
    return list(session.execute(subjects_of(tenant.id)))


def map_subject(
    session: Session, service: Service, principal: Principal, *, url: str, subject: str, to: str
) -> IssuerSubject:
    """Let an issuer's subject in, as this person or app of the operator's tenant. Raises Conflict or Invalid."""
    authorized = policy.authorize_change(session, principal, "tenant.administer")
    tenant, issuer = authorized.resource, find(session, url)
    if not 0 < len(subject) <= LONGEST_SUBJECT or not subject.isprintable():
        raise Invalid(f"a subject is what the issuer's tokens have for `sub`: 1 to {LONGEST_SUBJECT} characters")
    holder = grants.find_principal(session, tenant, to)
    if holder.tenant_id != tenant.id:
        raise Invalid("somebody of another tenant is not this operator's to let in; name that tenant")
    if isinstance(holder, App) and (holder.public or holder.dpop):
        raise Invalid(
            "a public client, or one whose tokens must be bound to its key, is let in by tokens of this deployment alone"
        )
    taken = session.get(IssuerSubject, (issuer.id, subject))
    if taken is not None:
        # Which tenant's it is is that tenant's.
        raise Conflict("this subject is somebody here already; unmap it first, in the tenant where it is mapped")
    row = IssuerSubject(issuer_id=issuer.id, subject=subject, principal_id=holder.id)
    session.add(row)
    audit.allowed(session, authorized, "issuer.map", holder.id)
    return row


def unmap_subject(session: Session, service: Service, principal: Principal, *, url: str, subject: str) -> IssuerSubject:
    """Let an issuer's subject in no more: from the next request on, elsewhere within a second. Raises NoSuch."""
    tenant = session.get_one(Tenant, principal.tenant_id)
    authorized = policy.authorize(session, principal, "tenant.administer", tenant)
    row = subject_of(session, tenant.id, find(session, url).id, subject)
    if row is None:
        raise NoSuch("subject", subject)
    session.delete(row)
    verifier.forget_after(session, service)
    audit.allowed(session, authorized, "issuer.unmap", row.principal_id)
    return row


def _metadata(url: str, network: Network) -> dict[str, Any]:
    parts = require_allowed(url, network=network)
    path = parts.path.rstrip("/")
    origin = f"{parts.scheme}://{parts.netloc}"
    try:
        return fetch_json(f"{origin}{path}/.well-known/openid-configuration", network=network)
    except NotFetched as first:
        try:
            return fetch_json(
                f"{origin}/.well-known/oauth-authorization-server{path}", network=network
            )  # RFC 8414, section 3.1
        except NotFetched:
            raise first from None
