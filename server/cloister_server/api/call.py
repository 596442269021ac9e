"""One authenticated request and its one transaction; a repeated write gets the answer that it got. Knows no feature.

The answer to a write is stored in the write's own transaction, by its Idempotency-Key: it is there if, and only if,
the write is. A refused write leaves nothing but its denial in the audit log. Whoever repeats a write is asked for every grant that
it was allowed by, as at the first time: an answer is no way around what was taken away since.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Header, Query, Request, Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from cloister_server import policy, vault
from cloister_server.audit import denials_kept
from cloister_server.audit_batches import Noted
from cloister_server.errors import Conflict, IdempotencyMismatch, Unauthenticated
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.acting import ALL_TENANTS, Acting, for_principal
from cloister_server.store.tables import IdempotencyKey

__all__ = ["Call", "Cursor", "Limit", "ReadCall", "WriteCall"]

T = TypeVar("T")

Cursor = Annotated[str | None, Query(max_length=128)]
Limit = Annotated[int, Query(ge=1, le=200)]


class _Raced(Exception):
    """Another request of the same key was answered while this one waited for it."""


@dataclass(frozen=True, slots=True)
class Call:
    """Who asks what of which service."""

    service: Service
    principal: Principal
    idempotency_key: str | None
    route: str
    noted: Noted
    operates: Callable[[Session], None] | None = None
    """For operators' operations alone, which may touch every tenant: before an answer is given again, raises unless whoever asks is an
    operator still, and tells of it."""

    def read(self, work: Callable[[Session], T]) -> T:
        """What `work` answers in a transaction that writes nothing."""
        with denials_kept(self.service.engine):
            return self.service.read(self._acting, self.noted.within(work))

    def write(self, work: Callable[[Session], T]) -> T:
        """What `work` answers in one write transaction; nothing of it is kept for a retry."""
        with denials_kept(self.service.engine):
            done, tells = self.service.write(self._acting, self.noted.of_deed(work))
        self.noted.is_told |= tells
        return done

    @property
    def _acting(self) -> Acting:
        return for_principal(self.principal) if self.operates is None else ALL_TENANTS

    def once(
        self,
        body: BaseModel | bytes,
        work: Callable[[Session], BaseModel],
        *,
        status: int = 201,
        is_secret: bool = False,
    ) -> Response:
        """Answer a write, once for each Idempotency-Key: a retry with the same body gets the same answer again, if it may still do
        what it did.

        Of two at the same time one runs and the other waits for its answer. Raises IdempotencyMismatch where the key
        was used with another body, as the write itself where it is not allowed any more, and Conflict `secret_already_shown` for a
        retry where the answer `is_secret`: then it is kept nowhere.
        """
        if self.idempotency_key is None:
            return _response(_answer(self.write(work)), status)
        content = _content(body)
        try:
            return self._once(self.idempotency_key, content, work, status, is_secret)
        except _Raced:
            return self._once(self.idempotency_key, content, work, status, is_secret)

    def once_made(
        self,
        body: BaseModel,
        make: Callable[[], T],
        work: Callable[[Session, T], BaseModel],
        *,
        place: Callable[[], AbstractContextManager[None]],
    ) -> Response:
        """As `once`, where `make` slowly makes what `work` takes: in no transaction, at a `place`, and not where there is an answer.

        Of two at the same time, the one that comes to its place later finds the answer of the other.
        """
        replay = self._replayed(_content(body))
        if replay is not None:
            return replay
        with place():
            replay = self._replayed(_content(body))
            if replay is not None:
                return replay
            made = make()
            return self.once(body, lambda session: work(session, made))

    def _replayed(self, content: bytes) -> Response | None:
        if self.idempotency_key is None:
            return None
        place = (self.principal.tenant_id, self.principal.id, self.route, self.idempotency_key)

        def found(session: Session) -> Response | None:
            stored = session.get(IdempotencyKey, place)
            return None if stored is None else self._replay(session, stored, self._digest(session, content))

        return self.read(found)

    def _digest(self, session: Session, content: bytes) -> str:
        """Keyed: a plain hash of rows would let whoever reads the database try out what they are."""
        pepper = vault.signing_key(session, self.service.keys, "pepper").secret
        return hmac.new(pepper, content, hashlib.sha256).hexdigest()

    def _once(
        self, key: str, content: bytes, work: Callable[[Session], BaseModel], status: int, is_secret: bool
    ) -> Response:
        place = (self.principal.tenant_id, self.principal.id, self.route, key)

        def claimed(session: Session) -> Response:
            digest = self._digest(session, content)
            stored = session.get(IdempotencyKey, place)
            if stored is not None:
                return self._replay(session, stored, digest)
            row = _claim(session, place, digest)
            answer = _answer(work(session))
            row.answer, row.status = {} if is_secret else answer, status
            row.proofs = policy.proofs(session, self.principal) if self.operates is None else []
            return _response(answer, status)

        return self.write(claimed)

    def _replay(self, session: Session, stored: IdempotencyKey, digest: str) -> Response:
        if not hmac.compare_digest(stored.body_sha256, digest):
            raise IdempotencyMismatch(
                "this Idempotency-Key was used for another request; send a fresh key with every new write"
            )
        if stored.proofs is None:
            raise Conflict(
                "this was done once, by an older version of the server, which did not keep what to ask again before it repeats its "
                "answer; look at what there is now, and send a fresh key only if it is not done",
                code="answer_not_kept",
            )
        if self.operates is not None:
            self.operates(session)
        policy.authorize_again(session, self.principal, stored.proofs)
        if not stored.answer:
            raise Conflict(
                "this was done, and its answer held a secret, which is shown once and kept nowhere; where it was lost, ask for a new "
                "one (`client rotate`, `user reset`)",
                code="secret_already_shown",
            )
        return _response(stored.answer, stored.status, replayed=True)


def _content(body: BaseModel | bytes) -> bytes:
    return body if isinstance(body, bytes) else body.model_dump_json().encode()


def _claim(session: Session, place: tuple[str, str, str, str], digest: str) -> IdempotencyKey:
    """Take the key before the work: whoever else comes with it waits here until this transaction ends."""
    tenant_id, principal_id, route, key = place
    row = IdempotencyKey(
        tenant_id=tenant_id, principal_id=principal_id, route=route, key=key, body_sha256=digest, status=0, answer={}
    )
    session.add(row)
    try:
        session.flush()
    except IntegrityError:
        raise _Raced from None
    return row


def _answer(model: BaseModel) -> dict[str, Any]:
    """A model as it is stored and sent, so that a replay is the same document."""
    answer: dict[str, Any] = json.loads(model.model_dump_json())
    return answer


def _response(answer: dict[str, Any], status: int, *, replayed: bool = False) -> Response:
    headers = {"Idempotency-Replayed": "true"} if replayed else None
    return Response(json.dumps(answer), status, headers, media_type="application/json")


_documented = HTTPBearer(auto_error=False, description="An access token from /oauth/token.")
"""For the API's description alone: the edge has verified the token before anything here runs."""


async def _read_call(request: Request, _: Annotated[Any, Depends(_documented)]) -> Call:
    principal = getattr(request.state, "principal", None)
    if not isinstance(principal, Principal):
        raise Unauthenticated("there is no valid access token; get one at /oauth/token")
    route = f"{request.method} {request.url.path}"
    return Call(request.app.state.service, principal, None, route, request.state.noted)


async def _write_call(
    call: Annotated[Call, Depends(_read_call)],
    idempotency_key: Annotated[str | None, Header(pattern=r"^[A-Za-z0-9_-]{1,128}$")] = None,
) -> Call:
    return replace(call, idempotency_key=idempotency_key)


ReadCall = Annotated[Call, Depends(_read_call)]
WriteCall = Annotated[Call, Depends(_write_call)]
