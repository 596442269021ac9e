"""A version that two parties answer for: who they are, that it is signed and whole, and predictions that none of them sees."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister._errors import (
    InvalidArgument,
    PartiesNotApart,
    PartyRefused,
    RowsNotFit,
    StaleDeployment,
    UnexpectedAnswer,
)
from cloister._http import AsyncSender, Operation, Sender
from cloister._inputs import model_inputs
from cloister._operations import Operations
from cloister._parties import Parties
from cloister.wire.certificate import verify
from cloister.wire.columns import CategoryColumn
from cloister.wire.dsse import InvalidCertificate, Keys, digest_of
from cloister.wire.jobs import ModelSchema
from cloister.wire.private_deployments import (
    ROLES,
    Permissions,
    PrivateDeployment,
    PrivateTerms,
    Role,
    network_digest,
    shared_by,
    verify_private_deployment,
)
from cloister.wire.private_inputs import prediction_of, private_inputs

__all__ = ["AsyncPrivateModel", "PrivateModel", "private_model"]

_PATIENCE_S = 60.0
_SPARE_S = 15.0
"""A permission is sent while it is valid so much longer."""


class _PrivateState:
    """What was verified once, and holds for the deployment's life."""

    def __init__(self, operations: Operations, terms: PrivateTerms, statement: PrivateDeployment) -> None:
        self._operations, self._architecture, self.statement = operations, terms.architecture, statement
        self._permissions: Permissions | None = None
        self._permitted_until = 0.0

    @property
    def parties(self) -> tuple[Role, Role]:
        """Who operates each party, as they declare it: `operator`, `host`, and the certificate that is pinned."""
        return self.statement.parties

    @property
    def dealer(self) -> Role:
        """Who deals the random numbers: together with either party it sees all."""
        return self.statement.dealer

    @property
    def _outputs(self) -> int:
        output = self._architecture.output
        is_one = not isinstance(output, CategoryColumn) or self._architecture.loss == "binary_cross_entropy"
        return 1 if is_one else len(output.values)  # type: ignore[union-attr]  # only a category is not one

    def _inputs(self, x: Any) -> dict[str, NDArray[np.float64]]:
        """The numbers to share, checked here. Raises RowsNotFit and PrivateLayer."""
        spec = self._architecture
        rows = dict(model_inputs(spec.inputs, x))
        if not len(next(iter(rows.values()))):
            raise RowsNotFit("there are no rows; give one at least")
        for name, column in spec.inputs.items():
            if rows[name].dtype == object:
                rows |= _bytes_of(name, rows[name], column.max_length)  # type: ignore[union-attr]  # objects are texts
        return private_inputs(spec, rows)

    def _chunks(self, inputs: dict[str, NDArray[np.float64]]) -> Iterator[dict[str, NDArray[np.float64]]]:
        size = self.statement.rows_at_once
        for start in range(0, len(next(iter(inputs.values()))), size):
            yield {name: each[start : start + size] for name, each in inputs.items()}

    def _check_dates(self) -> None:
        for name in ROLES:
            expires = self.statement.role(name).not_after
            if expires <= datetime.now(UTC):
                raise PartyRefused(
                    f"the certificate of {name} expired on {expires:%Y-%m-%d}; nothing was sent; have the version deployed anew"
                )

    def _held(self) -> tuple[str, str] | None:
        """The permissions that are valid for long enough still."""
        if self._permissions is None or time.monotonic() >= self._permitted_until:
            return None
        return self._permissions.permissions

    def _asking(self) -> Operation[Permissions]:
        return self._operations.permissions(self.statement.model, self.statement.version)

    def _hold(self, found: Permissions, asked_at: float) -> tuple[str, str]:
        if found.deployment != self.statement.id:
            raise StaleDeployment("the version was deployed privately anew; ask for it again by client.private(...)")
        self._permissions, self._permitted_until = found, asked_at + found.expires_in - _SPARE_S
        return found.permissions

    def _connected(self, timeout_s: float) -> Parties:
        self._check_dates()
        return Parties(self.statement, outputs=self._outputs, until=time.monotonic() + timeout_s)

    def _predicted(self, outputs: list[NDArray[np.float64]], *, decoded: bool) -> NDArray[Any]:
        found = prediction_of(self._architecture, np.concatenate(outputs))
        if "index" not in found:
            return found["value"]
        classes = _classes(self._architecture)
        if not decoded or classes is None:
            return found["index"]
        texts: NDArray[Any] = np.asarray(classes)[found["index"]]
        return texts

    def _probabilities(self, outputs: list[NDArray[np.float64]]) -> NDArray[np.float32]:
        found = prediction_of(self._architecture, np.concatenate(outputs))
        if "probabilities" not in found:
            raise InvalidArgument("this model predicts a number and has no probabilities; call predict")
        return found["probabilities"]

    def __repr__(self) -> str:
        told = ", ".join(f"{name} by {self.statement.role(name).operator!r}" for name in ROLES)
        return f"<{type(self).__name__} {self.statement.model} version {self.statement.version}: {told}>"


class PrivateModel(_PrivateState):
    """A version that two parties answer for, who see neither the rows nor the answers. For one thread at a time."""

    def __init__(
        self, sender: Sender, operations: Operations, terms: PrivateTerms, statement: PrivateDeployment
    ) -> None:
        super().__init__(operations, terms, statement)
        self._sender = sender

    def predict(self, x: Any, *, decoded: bool = False, timeout_s: float = _PATIENCE_S) -> NDArray[Any]:
        """As `Model.predict`, on shares: int64 indices, or float32 values; one for each row.

        `timeout_s` is for all of it. Raises NotFinite, OutOfRange, RowsNotFit and PrivateLayer with nothing sent, and
        PrivateInferenceFailed.
        """
        return self._predicted(self._asked(x, timeout_s), decoded=decoded)

    def predict_proba(self, x: Any, *, timeout_s: float = _PATIENCE_S) -> NDArray[np.float32]:
        """Probabilities, [rows, categories], made here of the outputs."""
        return self._probabilities(self._asked(x, timeout_s))

    def _asked(self, x: Any, timeout_s: float) -> list[NDArray[np.float64]]:
        inputs, found = self._inputs(x), []
        with self._connected(timeout_s) as parties:
            for chunk in self._chunks(inputs):
                found.append(parties.ask(chunk, self._permissions_now))
        return found

    def _permissions_now(self) -> tuple[str, str]:
        at = time.monotonic()
        return self._held() or self._hold(self._sender.run(self._asking()), at)


class AsyncPrivateModel(_PrivateState):
    """As `PrivateModel`, from an event loop: what waits for the parties is a thread."""

    def __init__(
        self, sender: AsyncSender, operations: Operations, terms: PrivateTerms, statement: PrivateDeployment
    ) -> None:
        super().__init__(operations, terms, statement)
        self._sender = sender

    async def predict(self, x: Any, *, decoded: bool = False, timeout_s: float = _PATIENCE_S) -> NDArray[Any]:
        """As `PrivateModel.predict`."""
        return self._predicted(await self._asked(x, timeout_s), decoded=decoded)

    async def predict_proba(self, x: Any, *, timeout_s: float = _PATIENCE_S) -> NDArray[np.float32]:
        """As `PrivateModel.predict_proba`."""
        return self._probabilities(await self._asked(x, timeout_s))

    async def _asked(self, x: Any, timeout_s: float) -> list[NDArray[np.float64]]:
        inputs, found, loop = self._inputs(x), [], asyncio.get_running_loop()

        def permissions() -> tuple[str, str]:
            return asyncio.run_coroutine_threadsafe(self._permissions_now(), loop).result()

        with self._connected(timeout_s) as parties:
            for chunk in self._chunks(inputs):
                found.append(await asyncio.to_thread(parties.ask, chunk, permissions))
        return found

    async def _permissions_now(self) -> tuple[str, str]:
        at = time.monotonic()
        return self._held() or self._hold(await self._sender.run(self._asking()), at)


def private_model(
    operations: Operations, model: str, version: int | None, *, keys: Keys | None, development: bool
) -> Operation[tuple[PrivateTerms, PrivateDeployment]]:
    """A version's private deployment, signed, about this very version and network, and of roles that are apart.

    Raises InvalidCertificate, UnexpectedAnswer and PartiesNotApart.
    """
    seen = yield from operations.version(model, version)
    terms = yield from operations.private_terms(seen.model, seen.version)
    if keys is None:
        keys = yield from operations.certificate_keys()
    stated = verify_private_deployment(terms.statement, keys)
    certificate = verify(terms.certificate, keys)
    if (stated.model, stated.version) != (seen.model, seen.version) or (certificate.model, certificate.version) != (
        seen.model,
        seen.version,
    ):
        raise InvalidCertificate("the statement or the certificate is of another version than was asked for")
    if digest_of(terms.certificate) != stated.certificate_digest:
        raise InvalidCertificate("the statement names another certificate than the version has")
    if network_digest(terms.architecture, stated.fraction_bits, stated.layer_bits) != stated.network_digest:
        raise UnexpectedAnswer("the architecture is not the one that the parties were given; nothing was sent")
    what = shared_by((*stated.parties, stated.dealer))
    if what is not None and not development:
        raise PartiesNotApart(
            f"two of the parties and the dealer share their {what}, and could put the shares together: ask for parties of different "
            "operators, or say development=True where nothing is private"
        )
    return terms, stated


def _classes(spec: Any) -> tuple[str, ...] | None:
    return ModelSchema(inputs=spec.inputs, target=spec.target, output=spec.output).classes


def _bytes_of(name: str, texts: NDArray[Any], length: int) -> dict[str, NDArray[Any]]:
    """Texts as rows have them: bytes, filled up with zeros, and their lengths."""
    rows, lengths = np.zeros((len(texts), length), np.uint8), np.zeros(len(texts), np.int32)
    for row, text in enumerate(texts):
        raw = text.encode() if isinstance(text, str) else bytes(text)
        rows[row, : len(raw)] = np.frombuffer(raw, np.uint8)
        lengths[row] = len(raw)
    return {name: rows, f"{name}.length": lengths}
