"""What a transaction must know of a key provider, asked for while there is none: it ends, the provider is asked, it runs again.

Knows sessions and the key ring; nothing of what is asked for. A provider may be as slow as its network: asked in a transaction it
would hold up, on SQLite, everybody who writes, and on any database a connection. What must be written whatever becomes of the
transaction, as a grant's count is, is asked for likewise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from sqlalchemy.orm import Session

from cloister_server.keyring import AskedInTransaction, KeyRing
from cloister_server.store.session import in_transaction

__all__ = ["Question", "answered", "is_answered", "note", "run", "taken"]

_ANSWERS = "cloister_answers"

T = TypeVar("T")
A_co = TypeVar("A_co", covariant=True)


class Question(Protocol[A_co]):
    """What is asked, of a provider or not: a frozen value, the same in every run of one transaction, or it would be asked for ever."""

    def ask(self, keys: KeyRing) -> A_co: ...


def run(within: Callable[[], AbstractContextManager[Session]], keys: KeyRing, work: Callable[[Session], T]) -> T:
    """What `work` gives in a transaction of `within`; rolled back and run anew as often as it asks for what is not answered yet.

    So `work` writes to its session alone until its last question is answered. Raises what the providers raise, in no transaction,
    and AskedInTransaction where this thread has one open.
    """
    if in_transaction():
        raise AskedInTransaction("a transaction that may ask a key provider is begun in no other one")
    answers = _Answers()
    while True:
        try:
            with within() as session:
                answers.takes.clear()
                session.info[_ANSWERS] = answers
                return work(session)
        except _Unanswered as unanswered:
            known, fresh = unanswered.known, unanswered.fresh
        answers.known.update((each, each.ask(keys)) for each in known)
        for each in fresh:
            answers.fresh.setdefault(each, []).append(each.ask(keys))


def answered(session: Session, *questions: Question[T]) -> list[T]:
    """The answers, where all are known; ends the transaction otherwise, so that they are asked for together.

    Raises AskedInTransaction in one that `run` did not begin.
    """
    answers = _answers(session)
    if missing := [each for each in questions if each not in answers.known]:
        raise _Unanswered(known=missing, fresh=list(answers.takes.elements()))
    return [answers.known[each] for each in questions]


def taken(session: Session, question: Question[T]) -> T:
    """An answer that is used once: whoever asks again, in this run or in another one, gets another. Ends the transaction as above."""
    answers = _answers(session)
    answers.takes[question] += 1
    if not (fresh := answers.fresh.get(question)):
        raise _Unanswered(fresh=list(answers.takes.elements()))  # those that this run has taken are gone
    answer: T = fresh.pop()
    return answer


def is_answered(session: Session, question: Question[Any]) -> bool:
    """Whether nobody need be asked, in this run of the transaction."""
    return question in _answers(session).known


def note(session: Session, question: Question[T], answer: T) -> None:
    """What follows from another answer, so that nobody is asked for it."""
    _answers(session).known[question] = answer


@dataclass(slots=True)
class _Answers:
    """What one caller of `run` knows by now. Holds secrets: it ends with the call, and has no repr of them."""

    known: dict[Question[Any], Any] = field(default_factory=dict, repr=False)
    fresh: dict[Question[Any], list[Any]] = field(default_factory=dict, repr=False)
    takes: Counter[Question[Any]] = field(default_factory=Counter, repr=False)


class _Unanswered(BaseException):
    """Ends a transaction whose work needs answers first. No failure, so that nothing that handles failures takes it for one."""

    def __init__(self, *, known: Sequence[Question[Any]] = (), fresh: Sequence[Question[Any]] = ()) -> None:
        super().__init__()
        self.known, self.fresh = known, fresh


def _answers(session: Session) -> _Answers:
    found: _Answers | None = session.info.get(_ANSWERS)
    if found is None:
        raise AskedInTransaction("this transaction cannot be run again; begin it by `Service.read` or `Service.write`")
    return found
