"""Cloister and AsyncCloister: one surface, with and without an event loop, over operations that are written once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from cloister._auth import ClientCredentials
from cloister._budgets import BudgetReport
from cloister._errors import ConfigurationError, InvalidArgument, valid
from cloister._handles import AsyncJob, Job
from cloister._http import AsyncSender, Sender, check_url
from cloister._login import LoginCredentials
from cloister._networks import ImportedNetwork, network_of
from cloister._operations import Operations, id_or_blank
from cloister._plans import Plan
from cloister._policy import AsyncPolicy, Policy
from cloister._possession import PrivateKey
from cloister._private import AsyncPrivateModel, PrivateModel, private_model
from cloister._profiles import Profile, ProfileStore
from cloister._queries import AsyncQueries, Queries
from cloister._resources import (
    AsyncDatasets,
    AsyncJobs,
    AsyncModels,
    AsyncSources,
    Datasets,
    Jobs,
    Models,
    Sources,
)
from cloister.wire import jobs as wire
from cloister.wire.architecture import Loss
from cloister.wire.dsse import Keys
from cloister.wire.layers import Layer
from cloister.wire.plans import LoRA, Optimizer, PlanRequest, Precision, Privacy
from cloister.wire.sources import Dataset, Source

__all__ = ["AsyncCloister", "Cloister", "profile_directory", "profile_name"]

_TIMEOUT_S = 60.0
_CREDENTIALS = ("CLOISTER_CLIENT_ID", "CLOISTER_CLIENT_SECRET", "CLOISTER_PRIVATE_KEY")


class _Connection:
    """Where a client talks to, and as whom: arguments first, then CLOISTER_* of the environment, then who is logged in."""

    def __init__(
        self,
        url: str | None,
        client_id: str | None,
        client_secret: str | None,
        *,
        private_key: str | PathLike[str] | None,
        dpop: bool | None,
        allow_insecure: bool,
    ) -> None:
        if not (client_id or client_secret or private_key) and not any(os.environ.get(name) for name in _CREDENTIALS):
            store = ProfileStore(profile_directory(), profile_name())
            profile = store.read()
            if profile is not None:
                self.url = _url_of(profile, url or os.environ.get("CLOISTER_URL"), allow_insecure=allow_insecure)
                self.auth: ClientCredentials = LoginCredentials(store, profile)
                return
        self.url = check_url(_given(url, "url", "CLOISTER_URL"), allow_insecure=allow_insecure)
        self.auth = ClientCredentials(
            self.url,
            _given(client_id, "client_id", "CLOISTER_CLIENT_ID"),
            _credential(client_secret, private_key),
            dpop=os.environ.get("CLOISTER_DPOP") == "1" if dpop is None else dpop,
        )


def profile_directory() -> Path:
    """Where logins are kept (freedesktop.org base directory specification)."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "cloister" / "profiles"


def profile_name() -> str:
    """Which login is meant."""
    return os.environ.get("CLOISTER_PROFILE") or "default"


def _url_of(profile: Profile, asked_for: str | None, *, allow_insecure: bool) -> str:
    """The server of a login, which is the one that was asked for, if any was. Raises ConfigurationError."""
    url = check_url(profile.url, allow_insecure=allow_insecure or profile.allow_insecure)
    if asked_for is not None and asked_for.rstrip("/") != url:
        raise ConfigurationError(
            f"you are logged in at {url}, and the login's token is for no other server; choose another profile by CLOISTER_PROFILE "
            f"or run `cloister login {asked_for}`, or give a client_id and its secret or key"
        )
    return url


def _credential(client_secret: str | None, private_key: str | PathLike[str] | None) -> str | PrivateKey:
    """The secret or the key: what was passed goes before the environment, and two of the same rank are not chosen between."""
    if not (client_secret or private_key):
        client_secret, private_key = os.environ.get("CLOISTER_CLIENT_SECRET"), os.environ.get("CLOISTER_PRIVATE_KEY")
    if client_secret and private_key:
        raise ConfigurationError(
            "there are a client_secret and a private_key (CLOISTER_CLIENT_SECRET, CLOISTER_PRIVATE_KEY); a client has one of "
            "them: give the one that its operator registered"
        )
    if private_key:
        return PrivateKey.read(Path(private_key))
    return _given(client_secret, "client_secret", "CLOISTER_CLIENT_SECRET")


def _given(value: str | None, name: str, variable: str) -> str:
    found = value or os.environ.get(variable)
    if not found:
        raise ConfigurationError(f"no {name}: pass {name}=... or set {variable}, or run `cloister login URL` once")
    return found


class Cloister:
    """A client of one server. Use it as a context manager, or call `close()`; it may be shared between threads.

    It says who it is by `client_secret`, or by `private_key`, a PEM file whose public half the operator registered. With `dpop`
    its tokens are bound to a key that lives in this object: a stolen one opens nothing.
    `timeout_s` bounds each wait for the server within a request; None waits for ever. `seal_to`: the recipient that every upload
    is sealed for, unless it names another; none goes unsealed then (docs/sdk.md).
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        client_id: str | None = None,
        client_secret: str | None = None,
        private_key: str | PathLike[str] | None = None,
        dpop: bool | None = None,
        timeout_s: float | None = _TIMEOUT_S,
        max_retries: int = 2,
        allow_insecure: bool = False,
        seal_to: str | None = None,
        _transport: Any = None,
    ) -> None:
        connection = _Connection(
            url, client_id, client_secret, private_key=private_key, dpop=dpop, allow_insecure=allow_insecure
        )
        self._operations = Operations(max_retries=max_retries, seal_to=seal_to)
        self._sender = Sender(connection.url, connection.auth, timeout_s=timeout_s, transport=_transport)
        self.sources = Sources(self._sender, self._operations)
        self.datasets = Datasets(self._sender, self._operations)
        self.jobs = Jobs(self._sender, self._operations)
        self.models = Models(self._sender, self._operations)
        self.queries = Queries(self._sender, self._operations)
        self.policy = Policy(self._sender, self._operations)

    def plan(
        self,
        dataset: Dataset | str | Sequence[Dataset | str],
        *,
        target: str,
        features: Sequence[str] | None = None,
        layers: Sequence[Layer] | None = None,
        network: ImportedNetwork | None = None,
        freeze: Sequence[str] = (),
        lora: LoRA | None = None,
        loss: Loss | None = None,
        privacy: Privacy | None = None,
        batch_size: int | None = None,
        epochs: float | None = None,
        optimizer: Optimizer | None = None,
        rows_per_unit: int | None = None,
        precision: Precision | None = None,
        audit: bool = False,
    ) -> Plan:
        """What a run would cost; free. `dataset`: itself, its id or its name. What is left out is filled by a public recipe.

        Several datasets, of one source and the same columns and each of another block, are trained on together; all of their
        blocks are charged.

        `layers` describe a network; `network` is an imported one (`cloister_privacy.architecture.from_torch` and its like),
        whose weights are uploaded and started from. `freeze` names layers that keep theirs, `*` standing for anything ("conv*");
        with `lora` the linear layers among them are trained through adapters. `audit`, of a public source alone, has canaries try the
        run's claim afterwards.
        """
        layers, weights = network_of(layers, network, freeze)
        datasets = _each(dataset)
        request = _plan_request(
            datasets,
            target,
            features,
            layers,
            loss=loss,
            lora=lora,
            privacy=privacy,
            batch_size=batch_size,
            epochs=epochs,
            optimizer=optimizer,
            rows_per_unit=rows_per_unit,
            precision=precision,
            audit=audit,
        )
        return self._sender.run(self._operations.plan(request, datasets, weights=weights))

    def train(self, plan: Plan, *, model: str, require_revision: bool = False) -> Job:
        """Reserve the plan's whole cost and queue the run. Raises BudgetExceeded, or RevisionMoved where it is required."""
        return Job(
            self._sender,
            self._operations,
            self._sender.run(self._operations.start(_start(plan, model, require_revision))),
        )

    def budget(self, source: Source | str) -> BudgetReport:
        """What was used of a source, by whom and on what, and what is left: of all for its owner, of you alone otherwise.

        `print` shows a table, a notebook a plot as well; `to_csv()` and `to_json()` take it elsewhere.
        """
        return self._sender.run(self._operations.budget(source))

    def private(
        self, model: str, *, version: int | None = None, keys: Keys | None = None, development: bool = False
    ) -> PrivateModel:
        """A version that two parties answer for, none of whom sees a row or an answer (docs/private-inference.md).

        `keys` are the certificate keys that you pinned; without them the server's word is taken for its own. Raises
        InvalidCertificate, and PartiesNotApart where two roles are one, unless it is for `development`.
        """
        asked = private_model(self._operations, model, version, keys=keys, development=development)
        return PrivateModel(self._sender, self._operations, *self._sender.run(asked))

    def certificate_keys(self) -> dict[str, bytes]:
        """The public keys that certificates are signed with, by key id, 32 raw bytes each; pin them out of band.

        To keep them as JSON: `{name: key.hex() for name, key in keys.items()}`, which `verify` reads as it is.
        """
        return self._sender.run(self._operations.certificate_keys())

    def close(self) -> None:
        self._sender.close()

    def __enter__(self) -> Cloister:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncCloister:
    """As `Cloister`, for an event loop."""

    def __init__(
        self,
        url: str | None = None,
        *,
        client_id: str | None = None,
        client_secret: str | None = None,
        private_key: str | PathLike[str] | None = None,
        dpop: bool | None = None,
        timeout_s: float | None = _TIMEOUT_S,
        max_retries: int = 2,
        allow_insecure: bool = False,
        seal_to: str | None = None,
        _transport: Any = None,
    ) -> None:
        connection = _Connection(
            url, client_id, client_secret, private_key=private_key, dpop=dpop, allow_insecure=allow_insecure
        )
        self._operations = Operations(max_retries=max_retries, seal_to=seal_to)
        self._sender = AsyncSender(connection.url, connection.auth, timeout_s=timeout_s, transport=_transport)
        self.sources = AsyncSources(self._sender, self._operations)
        self.datasets = AsyncDatasets(self._sender, self._operations)
        self.jobs = AsyncJobs(self._sender, self._operations)
        self.models = AsyncModels(self._sender, self._operations)
        self.queries = AsyncQueries(self._sender, self._operations)
        self.policy = AsyncPolicy(self._sender, self._operations)

    async def plan(
        self,
        dataset: Dataset | str | Sequence[Dataset | str],
        *,
        target: str,
        features: Sequence[str] | None = None,
        layers: Sequence[Layer] | None = None,
        network: ImportedNetwork | None = None,
        freeze: Sequence[str] = (),
        lora: LoRA | None = None,
        loss: Loss | None = None,
        privacy: Privacy | None = None,
        batch_size: int | None = None,
        epochs: float | None = None,
        optimizer: Optimizer | None = None,
        rows_per_unit: int | None = None,
        precision: Precision | None = None,
        audit: bool = False,
    ) -> Plan:
        """As `Cloister.plan`."""
        layers, weights = network_of(layers, network, freeze)
        datasets = _each(dataset)
        request = _plan_request(
            datasets,
            target,
            features,
            layers,
            loss=loss,
            lora=lora,
            privacy=privacy,
            batch_size=batch_size,
            epochs=epochs,
            optimizer=optimizer,
            rows_per_unit=rows_per_unit,
            precision=precision,
            audit=audit,
        )
        return await self._sender.run(self._operations.plan(request, datasets, weights=weights))

    async def train(self, plan: Plan, *, model: str, require_revision: bool = False) -> AsyncJob:
        """As `Cloister.train`."""
        seen = await self._sender.run(self._operations.start(_start(plan, model, require_revision)))
        return AsyncJob(self._sender, self._operations, seen)

    async def budget(self, source: Source | str) -> BudgetReport:
        """As `Cloister.budget`."""
        return await self._sender.run(self._operations.budget(source))

    async def private(
        self, model: str, *, version: int | None = None, keys: Keys | None = None, development: bool = False
    ) -> AsyncPrivateModel:
        """As `Cloister.private`."""
        asked = private_model(self._operations, model, version, keys=keys, development=development)
        return AsyncPrivateModel(self._sender, self._operations, *await self._sender.run(asked))

    async def certificate_keys(self) -> dict[str, bytes]:
        """As `Cloister.certificate_keys`."""
        return await self._sender.run(self._operations.certificate_keys())

    async def close(self) -> None:
        await self._sender.close()

    async def __aenter__(self) -> AsyncCloister:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _each(dataset: Dataset | str | Sequence[Dataset | str]) -> tuple[Dataset | str, ...]:
    """The datasets of a plan, one or several."""
    if isinstance(dataset, str) or not isinstance(dataset, Sequence):
        return (dataset,)
    if not dataset:
        raise InvalidArgument("these are no datasets; give one, or one of each block")
    return tuple(dataset)


def _plan_request(
    datasets: tuple[Dataset | str, ...],
    target: str,
    features: Sequence[str] | None,
    layers: Sequence[Layer] | None,
    **fields: Any,
) -> PlanRequest:
    if isinstance(features, str):
        raise InvalidArgument(f"features is a sequence of names; give [{features!r}]")
    return valid(
        PlanRequest,
        dataset=id_or_blank(datasets[0], "ds"),
        with_datasets=tuple(id_or_blank(each, "ds") for each in datasets[1:]),
        target=target,
        features=None if features is None else tuple(features),
        layers=None if layers is None else tuple(layers),
        **fields,
    )


def _start(plan: Plan, model: str, require_revision: bool) -> wire.StartJob:
    revision = plan.quote.revision if require_revision else None
    return valid(wire.StartJob, training=plan.training, model=model, require_revision=revision)
