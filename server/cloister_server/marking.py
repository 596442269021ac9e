"""Whose an object store is: a marker in it names one deployment, and no other deletes, shreds or serves there. Knows SQL and blobs."""

from __future__ import annotations

import json

from sqlalchemy.orm import Session

from cloister_server.errors import Unavailable
from cloister_server.service import Service
from cloister_server.store.acting import ALL_TENANTS, for_tenants
from cloister_server.store.queries import public_keys, tenants
from cloister_server.store.session import reading

__all__ = ["adopt", "mark_new", "place_of", "require_ours"]

_FORMAT = "cloister.store/1"


def require_ours(service: Service) -> None:
    """Raise Unavailable `storage_foreign` unless the store is marked as this deployment's; or what keeps it from being asked."""
    marked, place = _marked(service), place_of(service)
    with reading(service.engine, for_tenants()) as session:
        own = _name(session)
    if marked == own:
        return
    what = "carries no marker of any deployment" if marked is None else "is another deployment's"
    raise Unavailable(
        f"the store of sealed objects {place} {what}, so that nothing is served from it, collected or shredded in it; correct "
        "CLOISTER_BLOB_URL, or where this database belongs to these objects, run `cloister-admin storage adopt`",
        code="storage_foreign",
    )


def mark_new(service: Service) -> None:
    """Mark an empty store as this deployment's, where the deployment has no tenants yet: there is nothing to take for another's."""
    with reading(service.engine, ALL_TENANTS) as session:
        is_new, own = session.scalars(tenants().limit(1)).first() is None, _name(session)
    if is_new and _marked(service) is None and not service.blobs.tenants():
        service.blobs.mark(_content(own), is_new=True)


def adopt(service: Service) -> None:
    """Mark the store as this deployment's, whatever it was marked as."""
    with reading(service.engine, for_tenants()) as session:
        own = _name(session)
    service.blobs.mark(_content(own), is_new=False)


def place_of(service: Service) -> str:
    """Where the store is, as settings name it."""
    return service.settings.blob_url or str(service.settings.data_dir / "objects")


def _name(session: Session) -> str:
    """The deployment by its first certificate key: it is in every copy of its database, and in no other's."""
    return str(public_keys(session, "certificate")[0]["kid"])


def _content(deployment: str) -> bytes:
    return json.dumps({"format": _FORMAT, "deployment": deployment}).encode() + b"\n"


def _marked(service: Service) -> str | None:
    """The deployment that the marker names; None where there is none. What is no marker of ours names nobody."""
    content = service.blobs.marker()
    try:
        read = json.loads(content) if content is not None else None
        return None if read is None else str(read["deployment"]) if read["format"] == _FORMAT else ""
    except (ValueError, LookupError, TypeError):
        return ""
