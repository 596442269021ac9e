"""The life of the keys that sign access tokens: next, active, retiring, revoked. Knows SQL and the vault; nothing of requests.

'next' is published but signs nothing yet, so that whoever verifies has it before its first token comes. 'active' signs. 'retiring'
signs no more and is believed until the last of its tokens has expired. 'revoked' is believed by nobody, from the moment on.
"""

from __future__ import annotations

import logging
from datetime import timedelta

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloister_server import vault
from cloister_server.errors import Conflict, NotFound, ServerError
from cloister_server.oauth import verifier
from cloister_server.oauth.access_tokens import LONGEST_LIFE_S
from cloister_server.service import Service
from cloister_server.store.tables import SigningKey, now

__all__ = ["complete", "listed", "revoke", "rotate"]

log = logging.getLogger(__name__)

PUBLISHED_S = 120
"""A key is published for this long before it signs: twice what a verifier remembers keys for."""
RETIRES_S = LONGEST_LIFE_S + 60
"""A token lives no longer than that; the minute is for clocks."""


class _NoSuchKey(NotFound):
    def __init__(self, kid: str) -> None:
        ServerError.__init__(
            self, f"there is no token key {kid!r}; `cloister-admin token-key list` shows what there is"
        )


def listed(session: Session) -> list[SigningKey]:
    """Every key of access tokens that there ever was, oldest first."""
    of_tokens = select(SigningKey).where(SigningKey.purpose == "token")
    return list(session.scalars(of_tokens.order_by(SigningKey.created, SigningKey.id)))


def complete(session: Session) -> None:
    """Make the next key where there is none."""
    if not any(key.state == "next" for key in _locked(session)):
        vault.new_signing_key(session, "token", state="next")


def rotate(session: Session, service: Service) -> SigningKey:
    """The next key signs from now on, the active one retires, and another is made next; no valid token is refused for it.

    Raises Conflict where the next key is not published for long enough yet.
    """
    known = _locked(session)
    following = next((key for key in known if key.state == "next"), None)
    if following is None:
        raise Conflict("there is no next key; run `cloister-admin init`, which makes it, and rotate two minutes later")
    age_s = (now() - following.created).total_seconds()
    if age_s < PUBLISHED_S:
        raise Conflict(
            f"the next key is published for {age_s:.0f} s, and not everybody who verifies tokens may have it yet; rotate again "
            f"in {PUBLISHED_S - age_s:.0f} s, or revoke the active key if it is stolen"
        )
    for key in known:
        if key.state == "active":
            key.state, key.until = "retiring", now() + timedelta(seconds=RETIRES_S)
    _succeed(session, service, following)
    return following


def revoke(session: Session, service: Service, kid: str) -> SigningKey:
    """Believe nothing any more that this key signed: here from the next request on, in other processes within a second.

    Where it was the active one, the next one signs from now on. Raises NotFound, or Conflict where it is revoked already.
    """
    known = _locked(session)
    key = next((each for each in known if each.id == kid), None)
    if key is None:
        raise _NoSuchKey(kid)
    if key.state == "revoked":
        raise Conflict(f"the token key {kid} is revoked already; nothing was changed")
    was, key.state, key.until = key.state, "revoked", now()
    if was == "active":
        following = next((each for each in known if each.state == "next"), None)
        if following is None:
            vault.new_signing_key(session, "token")
            session.flush()
        _succeed(session, service, following)
    elif was == "next":
        complete(session)
    verifier.forget_after(session, service)
    log.info("token_key.revoked", extra={"kid": kid, "was": was})
    return key


def _succeed(session: Session, service: Service, following: SigningKey | None) -> None:
    if following is not None:
        following.state = "active"
        log.info("token_key.active", extra={"kid": following.id})
    session.flush()
    complete(session)


def _locked(session: Session) -> list[SigningKey]:
    """All of them, locked: of two who rotate at once one waits for the other and finds a young next key."""
    of_tokens = select(SigningKey).where(SigningKey.purpose == "token").order_by(SigningKey.id)
    return list(session.scalars(of_tokens.with_for_update().execution_options(populate_existing=True)))
