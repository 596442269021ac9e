"""Operations on other issuers whose tokens are taken, and on whom of a tenant's their subjects are."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from sqlalchemy.orm import Session

from cloister.wire._model import Body
from cloister_server import issuers as issuers_
from cloister_server.issuers import DEFAULT_ALGORITHMS, Discovered
from cloister_server.operations.definition import Acting, Destroys, Given, InTenant, operation
from cloister_server.service import Service
from cloister_server.store.issuers import Issuer

__all__ = ["AddIssuer", "MapSubject", "OneIssuer", "OneSubject", "add", "listed", "map_", "remove", "subjects", "unmap"]


class OneIssuer(Body):
    issuer: Given
    """Its URL, exactly as `iss` in its tokens has it."""


class AddIssuer(OneIssuer):
    audience: Given | None = None
    algorithms: Annotated[tuple[Given, ...], Field(max_length=8)] = ()
    typ: Literal["at+jwt", "JWT"] = "at+jwt"
    network: Literal["public", "private", "loopback"] = "public"


class _Found(AddIssuer):
    found: Discovered


class OneSubject(InTenant):
    issuer: Given
    subject: Given


class MapSubject(OneSubject):
    to: Given
    """The person or app of the tenant that it is."""


def _discovered(request: AddIssuer) -> AddIssuer:
    algorithms = list(request.algorithms) or DEFAULT_ALGORITHMS
    found = issuers_.discover(request.issuer, network=request.network, algorithms=algorithms)
    return _Found.model_construct(**{**dict(request), "found": found})


@operation("issuer.add", AddIssuer, changes=True, prepare=_discovered)
def add(session: Session, service: Service, _: Acting, request: AddIssuer) -> dict[str, Any]:
    if not isinstance(request, _Found):
        raise TypeError("an issuer is asked for its keys before the transaction")
    added = issuers_.add(session, service, request.found, audience=request.audience, typ=request.typ)
    return {**_told(added), "keys": request.found.key_ids}


@operation("issuer.list", Body)
def listed(session: Session, _: Service, __: Acting, ___: Body) -> list[dict[str, Any]]:
    return [{**_told(each), "subjects": count} for each, count in issuers_.listed(session)]


_GONE: Destroys[OneIssuer] = Destroys(
    lambda session, request: issuers_.find(session, request.issuer).url,
    "Whoever comes by this issuer is let in no more, and each would have to be mapped anew.",
)


@operation("issuer.remove", OneIssuer, changes=True, destroys=_GONE)
def remove(session: Session, service: Service, by: Acting, request: OneIssuer) -> dict[str, Any]:
    gone = issuers_.remove(session, service, request.issuer, request_id=by.request_id, by=by.id)
    return {"removed": request.issuer, "subjects": gone}


@operation("issuer.map", MapSubject, changes=True)
def map_(session: Session, service: Service, by: Acting, request: MapSubject) -> dict[str, Any]:
    principal = by.into(session, request.tenant)
    row = issuers_.map_subject(session, service, principal, url=request.issuer, subject=request.subject, to=request.to)
    return {"issuer": request.issuer, "subject": row.subject, "principal": row.principal_id}


@operation("issuer.unmap", OneSubject, changes=True)
def unmap(session: Session, service: Service, by: Acting, request: OneSubject) -> dict[str, Any]:
    principal = by.within(session, request.tenant)
    row = issuers_.unmap_subject(session, service, principal, url=request.issuer, subject=request.subject)
    return {"issuer": request.issuer, "unmapped": row.subject, "principal": row.principal_id}


@operation("issuer.subjects", InTenant)
def subjects(session: Session, _: Service, by: Acting, request: InTenant) -> list[dict[str, Any]]:
    rows = issuers_.subjects(session, by.within(session, request.tenant))
    return [
        {"issuer": of.url, "subject": each.subject, "principal": each.principal_id, "created": each.created}
        for each, of in rows
    ]


def _told(issuer: Issuer) -> dict[str, Any]:
    return {
        "issuer": issuer.url,
        "jwks_uri": issuer.jwks_uri,
        "audience": issuer.audience,
        "algorithms": issuer.algorithms,
        "typ": issuer.typ,
        "network": issuer.network,
    }
