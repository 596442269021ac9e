"""Sessions for tests that do in one block what `Service.read` and `Service.write` do in a function that runs again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from cloister_server import asking
from cloister_server.keyring import KeyRing
from cloister_server.service import Service
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.session import reading, writing

__all__ = ["answering", "asked_reading", "asked_writing"]


class _Known(dict[Any, Any]):
    def __init__(self, keys: KeyRing) -> None:
        super().__init__()
        self.keys = keys

    def __contains__(self, question: object) -> bool:
        return True

    def __missing__(self, question: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:  # a thread that has no transaction open
            self[question] = pool.submit(question.ask, self.keys).result()
        return self[question]


class _Fresh:
    def __init__(self, keys: KeyRing) -> None:
        self.keys = keys

    def get(self, question: Any) -> list[Any]:
        return [_Known(self.keys)[question]]


def answering(session: Session, keys: KeyRing) -> Session:
    """The session, whose questions are answered while it is open."""
    answers: Any = asking._Answers(_Known(keys), fresh=_Fresh(keys), takes=Counter())  # type: ignore[arg-type]  # as far as it is used
    session.info[asking._ANSWERS] = answers
    return session


@contextmanager
def _asked(began: AbstractContextManager[Session], keys: KeyRing) -> Iterator[Session]:
    with began as session:
        yield answering(session, keys)


def asked_reading(service: Service, keys: KeyRing | None = None) -> AbstractContextManager[Session]:
    return _asked(reading(service.engine, ALL_TENANTS), keys or service.keys)


def asked_writing(
    service: Service | None, *, engine: Engine | None = None, keys: KeyRing | None = None
) -> AbstractContextManager[Session]:
    """`engine` and `keys` stand for a service that is not made yet."""
    if service is not None:
        engine, keys = service.engine, service.keys
    assert engine is not None and keys is not None
    return _asked(writing(engine, ALL_TENANTS), keys)
