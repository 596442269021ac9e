"""What the SDK does, each thing written once as an operation; the clients run them with or without an event loop."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from cloister import _errors
from cloister._budgets import BudgetReport
from cloister._http import Ask, Operation, Pause, asked, is_passing
from cloister._inputs import model_inputs
from cloister._plans import Plan
from cloister._uploads import RowData, checked, windows
from cloister.wire import oip
from cloister.wire.answers import Answer, QueryPrice, StartQuery
from cloister.wire.jobs import FINAL, Job, Model, ModelSchema, ModelVersion, Page, StartJob
from cloister.wire.ledger import BudgetEntry, LedgerPage
from cloister.wire.plans import NetworkView, PlanRequest
from cloister.wire.policy import Explanation, Holders
from cloister.wire.private_deployments import (
    ROLES,
    DeployPrivately,
    Permissions,
    PrivateDeploymentView,
    PrivateTerms,
    Role,
    RoleFile,
)
from cloister.wire.queries import QueryRequest
from cloister.wire.recipients import SEALED_ROWS_TYPE, RecipientKey, padded_bytes, seal_part
from cloister.wire.rows import encode_rows
from cloister.wire.sources import (
    Allowance,
    Block,
    CreateDataset,
    CreateSource,
    Dataset,
    OpenBlock,
    SetAllowance,
    SetBudget,
    Source,
)
from cloister.wire.weights import WEIGHTS_TYPE, Weights

__all__ = ["Operations", "id_or_blank"]

M = TypeVar("M", bound=BaseModel)

_FIRST_POLL_S, _SLOWEST_POLL_S = 0.2, 2.0
_LONGEST_SILENCE_S = 60.0
"""How long a watcher without a time limit of its own goes on asking a server that does not answer."""

_ELEMENTS_A_REQUEST = 500_000
_ENTRIES_A_PAGE = "200"
_ROWS_TYPE = "application/vnd.cloister.rows"
_ID = re.compile(r"[a-z]{2,4}_[0-9a-f]{32}")
_SEGMENT = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,62}")
"""A name or an id, which is all that may become a part of a path."""


class Operations:
    """The operations of one client, with its retry setting, and whom its uploads are sealed for unless they say so themselves."""

    def __init__(self, *, max_retries: int, seal_to: str | None = None) -> None:
        self._max_retries = max_retries
        self._recipient = None if seal_to is None else RecipientKey.parse(seal_to)
        self._schemas: dict[tuple[str, int], ModelSchema] = {}  # a version's schema never changes

    def create_source(self, body: CreateSource) -> Operation[Source]:
        return _told(Source, (yield from self._ask("POST", "/v1/sources", body)))

    def set_budget(self, source: Source | str, body: SetBudget) -> Operation[Source]:
        return _told(Source, (yield from self._ask("PUT", f"/v1/sources/{_named(source)}/budget", body)))

    def allow(self, source: Source | str, client: str, body: SetAllowance) -> Operation[Allowance]:
        path = f"/v1/sources/{_named(source)}/allowances/{_segment(client)}"
        return _told(Allowance, (yield from self._ask("PUT", path, body)))

    def open_block(self, source: Source | str, body: OpenBlock) -> Operation[Block]:
        return _told(Block, (yield from self._ask("POST", f"/v1/sources/{_named(source)}/blocks", body)))

    def budget(self, source: Source | str) -> Operation[BudgetReport]:
        """A source's budget and the whole ledger as it was then: what was entered since is left out."""
        seen = yield from self.get("sources", _named(source), Source)
        params: dict[str, str] = {"limit": _ENTRIES_A_PAGE}
        entries: list[BudgetEntry] = []
        while True:
            page = _told(LedgerPage, (yield from self._ask("GET", f"/v1/sources/{seen.id}/ledger", params=params)))
            entries += [entry for entry in page.items if entry.revision <= seen.budget.revision]
            if page.next is None:
                return BudgetReport(seen, tuple(entries), page.is_of_all)
            params["cursor"] = page.next

    def explain(self, *, principal: str, verb: str, resource: str, address: str | None) -> Operation[Explanation]:
        params = {"principal": principal, "verb": verb, "resource": resource}
        params |= {"address": address} if address is not None else {}
        return _told(Explanation, (yield from self._ask("GET", "/v1/policy/explain", params=params)))

    def who_can(self, *, verb: str, resource: str) -> Operation[Holders]:
        params = {"verb": verb, "resource": resource}
        return _told(Holders, (yield from self._ask("GET", "/v1/policy/who-can", params=params)))

    def get(self, kind: str, id_or_name: str, model: type[M]) -> Operation[M]:
        """One source, dataset, job or model; the server takes ids and names alike."""
        return _told(model, (yield from self._ask("GET", f"/v1/{kind}/{_segment(id_or_name)}")))

    def page(self, kind: str, model: type[M], *, cursor: str | None) -> Operation[tuple[list[M], str | None]]:
        """One page of a listing, and the cursor of the next."""
        params = {"cursor": cursor} if cursor else {}
        page = _told(Page, (yield from self._ask("GET", f"/v1/{kind}", params=params)))
        return [_told(model, item) for item in page.items], page.next

    def upload(
        self, body: CreateDataset, data: RowData, *, source: Source | str, ignore_undeclared: bool, seal_to: str | None
    ) -> Operation[Dataset]:
        """Check all rows, declare, send part by part, close. An upload that was cut short is taken up where it stopped."""
        recipient = self._recipient if seal_to is None else RecipientKey.parse(seal_to)
        most_rows = body.capacity_rows or body.capacity
        for _ in checked(body.columns, data, most_rows=most_rows, ignore_undeclared=ignore_undeclared):
            yield Pause(0)  # an event loop has other things to do between two windows
        body = body.model_copy(update={"source": (yield from self._id("sources", source, Source))})
        dataset = yield from self._declare(body)
        first_row = 0
        for number, rows in enumerate(windows(body.columns, data, ignore_undeclared=ignore_undeclared)):
            count = len(next(iter(rows.values())))
            if first_row + count > most_rows:
                raise _errors.RowsNotFit("the file has grown while it was read; upload what does not change")
            content, content_type = encode_rows(body.columns, rows), _ROWS_TYPE
            if recipient is not None:
                size = padded_bytes(body.columns, capacity_rows=most_rows, part=number)
                # Whoever answers in the server's place may name another dataset of the tenant, and so choose where these rows
                # go; reading them takes the pinned key. Sealed once: a retry must send the same bytes.
                content = seal_part(recipient, content, dataset=dataset.id, part=number, padded_to=size)
                content_type = SEALED_ROWS_TYPE
            yield from self._send_part(dataset, number, content, content_type, first_row=first_row)
            first_row += count
        return _told(Dataset, (yield from self._ask("POST", f"/v1/datasets/{dataset.id}/complete")))

    def delete_dataset(self, dataset: Dataset | str) -> Operation[None]:
        found = yield from self._id("datasets", dataset, Dataset)
        yield from self._ask("DELETE", f"/v1/datasets/{found}")

    def plan(self, body: PlanRequest, datasets: Sequence[Dataset | str], *, weights: bytes | None) -> Operation[Plan]:
        """Quote a run; weights to start from are uploaded first."""
        found = []
        for dataset in datasets:
            found.append((yield from self._id("datasets", dataset, Dataset)))
        body = body.model_copy(update={"dataset": found[0], "with_datasets": tuple(found[1:])})
        if weights is not None:
            body = body.model_copy(update={"initial": (yield from self._upload_weights(weights)).id})
        given = {name for name, field in PlanRequest.model_fields.items() if getattr(body, name) != field.default}
        asked_for = body.model_dump(mode="json", exclude_none=True, include=given)  # the rest is the server's to fill
        return _told(Plan, (yield from self._ask("POST", "/v1/plans", asked_for)))

    def _upload_weights(self, content: bytes) -> Operation[Weights]:
        ask = Ask("POST", "/v1/weights", content=content, headers={"Content-Type": WEIGHTS_TYPE})
        return _told(Weights, (yield from asked(ask, max_retries=self._max_retries)))

    def start(self, body: StartJob) -> Operation[Job]:
        return _told(Job, (yield from self._ask("POST", "/v1/jobs", body)))

    def cancel(self, job: str) -> Operation[Job]:
        return _told(Job, (yield from self._ask("POST", f"/v1/jobs/{job}/cancel")))

    def watch(self, job: str, *, show: Callable[[Job], None], timeout_s: float | None) -> Operation[ModelVersion]:
        """Poll a job until it is over, telling `show` of each look at it; the version that it published.

        Raises JobFailed, JobCancelled, StillRunning, or what kept it from looking; each names the job.
        """
        until = None if timeout_s is None else monotonic() + timeout_s
        state = yield from self._watch(job, show, timeout_s=timeout_s, until=until)
        path = f"/v1/models/{state.model}/versions/{state.version or 0}"
        return (yield from self._look(path, ModelVersion, job=job, until=until))

    def price_query(self, body: QueryRequest, dataset: Dataset | str) -> Operation[QueryPrice]:
        body = body.model_copy(update={"dataset": (yield from self._id("datasets", dataset, Dataset))})
        return _told(QueryPrice, (yield from self._ask("POST", "/v1/queries/price", body)))

    def start_query(self, body: QueryRequest, dataset: Dataset | str) -> Operation[Job]:
        body = body.model_copy(update={"dataset": (yield from self._id("datasets", dataset, Dataset))})
        return _told(Job, (yield from self._ask("POST", "/v1/queries", StartQuery(query=body))))

    def watch_query(self, job: str, *, show: Callable[[Job], None], timeout_s: float | None) -> Operation[Answer]:
        """Poll a query until it is over; its answers. Raises as `watch`."""
        until = None if timeout_s is None else monotonic() + timeout_s
        yield from self._watch(job, show, timeout_s=timeout_s, until=until)
        return (yield from self._look(f"/v1/queries/{job}/answer", Answer, job=job, until=until))

    def _watch(
        self, job: str, show: Callable[[Job], None], *, timeout_s: float | None, until: float | None
    ) -> Operation[Job]:
        pause_s = _FIRST_POLL_S
        while True:
            state = yield from self._look(f"/v1/jobs/{job}", Job, job=job, until=until)
            show(state)
            if state.status in FINAL:
                _check_done(state)
                return state
            left_s = pause_s if until is None else until - monotonic()
            if left_s <= 0:
                raise _errors.StillRunning(
                    f"job {job} is {state.status} after {timeout_s:g} s and goes on; client.jobs.get({job!r}).wait() waits again"
                )
            yield Pause(min(pause_s, left_s))
            pause_s = min(pause_s * 1.3, _SLOWEST_POLL_S)

    def version(self, model: str, version: int | None) -> Operation[ModelVersion]:
        """A version of a model; the champion where none is named."""
        if version is None:
            # Nothing is published as version 0: the server says so in its own words.
            version = (yield from self.get("models", model, Model)).champion or 0
        return _told(ModelVersion, (yield from self._ask("GET", f"/v1/models/{_segment(model)}/versions/{version}")))

    def schema(self, model: str, version: int) -> Operation[ModelSchema]:
        """What a version reads and predicts; asked for once."""
        if (model, version) not in self._schemas:
            answer = yield from self._ask("GET", f"/v1/models/{model}/versions/{version}/schema")
            self._schemas[model, version] = _told(ModelSchema, answer)
        return self._schemas[model, version]

    def statement(self, model: str, version: int, about: Literal["deployment", "audit"]) -> Operation[dict[str, Any]]:
        """A signed envelope about a version."""
        return (yield from self._ask("GET", f"/v1/models/{model}/versions/{version}/{about}"))

    def network(self, model: str, version: int) -> Operation[NetworkView]:
        return _told(NetworkView, (yield from self._ask("GET", f"/v1/models/{model}/versions/{version}/network")))

    def predict(self, model: str, version: int, x: Any, *, decoded: bool) -> Operation[NDArray[Any]]:
        """Indices or values; the categories themselves where they are asked for."""
        outputs = yield from self._infer(model, version, x)
        if "index" not in outputs:
            return outputs["value"]
        indices, classes = outputs["index"], (yield from self.schema(model, version)).classes
        if not decoded or classes is None:
            return indices
        if ((indices < 0) | (indices >= len(classes))).any():
            raise _errors.UnexpectedAnswer("the prediction is an index that stands for none of the model's classes")
        texts: NDArray[Any] = np.asarray(classes)[indices]
        return texts

    def predict_proba(self, model: str, version: int, x: Any) -> Operation[NDArray[np.float32]]:
        outputs = yield from self._infer(model, version, x)
        if "probabilities" not in outputs:
            raise _errors.InvalidArgument("this model predicts a number and has no probabilities; call predict")
        return outputs["probabilities"]

    def deploy_privately(
        self, model: str, version: int, x: Any, *, parties: tuple[Role, Role], dealer: Role, development: bool
    ) -> Operation[tuple[PrivateDeploymentView, dict[str, bytes]]]:
        """Share a version's weights; the deployment, and by role the file that its operator is to be given."""
        inputs = model_inputs((yield from self.schema(model, version)).inputs, x)
        rows = oip.encode_request(inputs)["inputs"]
        body = _errors.valid(
            DeployPrivately, version=version, parties=parties, dealer=dealer, public_rows=rows, development=development
        )
        path = f"/v1/models/{model}/private-deployments"
        seen = _told(PrivateDeploymentView, (yield from self._ask("POST", path, body)))
        files: dict[str, bytes] = {}
        for role in ROLES:
            path = f"/v1/models/{model}/versions/{version}/private-deployment/roles/{role}"
            found = _told(RoleFile, (yield from self._ask("GET", path)))
            if found.deployment != seen.id:
                raise _errors.StaleDeployment(
                    "the version was deployed anew by somebody else; take theirs, or deploy again"
                )
            files[role] = base64.b64decode(found.file)
        return seen, files

    def end_private(self, model: str, version: int) -> Operation[PrivateDeploymentView]:
        path = f"/v1/models/{model}/versions/{version}/private-deployment"
        return _told(PrivateDeploymentView, (yield from self._ask("DELETE", path)))

    def private_terms(self, model: str, version: int) -> Operation[PrivateTerms]:
        """What must be known to share an input."""
        path = f"/v1/models/{model}/versions/{version}/private-deployment"
        return _told(PrivateTerms, (yield from self._ask("GET", path)))

    def permissions(self, model: str, version: int) -> Operation[Permissions]:
        """One for each party."""
        path = f"/v1/models/{model}/versions/{version}/private-deployment/permissions"
        return _told(Permissions, (yield from self._ask("GET", path)))

    def certificate_keys(self) -> Operation[dict[str, bytes]]:
        """Key id -> raw Ed25519 public key. Pin them out of band: whoever serves a forged certificate can serve a forged key."""
        answer = yield from self._ask("GET", "/.well-known/cloister-certificate-keys")
        try:
            return {
                key["kid"]: base64.urlsafe_b64decode(key["x"] + "=" * (-len(key["x"]) % 4)) for key in answer["keys"]
            }
        except (KeyError, TypeError, binascii.Error):
            raise _errors.UnexpectedAnswer("the answer holds no certificate keys; is this a Cloister server?") from None

    def _ask(
        self,
        method: str,
        path: str,
        body: BaseModel | dict[str, Any] | None = None,
        *,
        params: Mapping[str, str] | None = None,
    ) -> Operation[dict[str, Any]]:
        json_body = body.model_dump(mode="json", exclude_none=True) if isinstance(body, BaseModel) else body
        return (yield from asked(Ask(method, path, params or {}, json_body), max_retries=self._max_retries))

    def _id(self, kind: str, given: Any, model: type[M]) -> Operation[str]:
        """The id of a thing given as itself, as its id or as its name."""
        if not isinstance(given, str):
            return str(given.id)
        if _ID.fullmatch(given):
            return given
        answer = yield from self._ask("GET", f"/v1/{kind}/{_segment(given)}")
        _told(model, answer)
        return str(answer["id"])

    def _look(self, path: str, model: type[M], *, job: str, until: float | None) -> Operation[M]:
        """One look for a watcher, which outlives a server that is away: until then, or for the longest silence."""
        until, pause_s = monotonic() + _LONGEST_SILENCE_S if until is None else until, _FIRST_POLL_S
        while True:
            try:
                return _told(model, (yield from asked(Ask("GET", path), max_retries=0)))
            except _errors.CloisterError as failure:
                left_s = until - monotonic()
                if not is_passing(failure) or left_s <= 0:
                    raise _errors.name_the_job(failure, job) from None
                told_s = failure.retry_after_s if isinstance(failure, _errors.APIError) else None
            yield Pause(min(told_s or pause_s, left_s))
            pause_s = min(pause_s * 1.3, _SLOWEST_POLL_S)

    def _infer(self, model: str, version: int, x: Any) -> Operation[dict[str, NDArray[Any]]]:
        """The outputs for these rows, asked for in requests of bearable size."""
        inputs = model_inputs((yield from self.schema(model, version)).inputs, x)
        count = len(next(iter(inputs.values())))
        width = sum(_width(array) for array in inputs.values())
        size = max(1, _ELEMENTS_A_REQUEST // max(1, width))
        answers = []
        for start in range(0, max(1, count), size):
            body = oip.encode_request({name: array[start : start + size] for name, array in inputs.items()})
            path = f"/v2/models/{model}/versions/{version}/infer"
            answer = _told(oip.InferResponse, (yield from self._ask("POST", path, body)))
            try:
                answers.append(oip.decode_outputs(answer))
            except oip.MalformedTensor as error:
                raise _errors.UnexpectedAnswer(f"the prediction cannot be read: {error}") from None
        return {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}

    def _declare(self, body: CreateDataset) -> Operation[Dataset]:
        try:
            return _told(Dataset, (yield from self._ask("POST", "/v1/datasets", body)))
        except _errors.Conflict as conflict:
            refusal = conflict
        try:
            found = yield from self.get("datasets", body.name, Dataset)
        except (_errors.NotFound, _errors.PermissionDenied):
            raise refusal from None
        if found.status != "uploading":
            raise refusal
        declared = body.model_copy(update={"capacity_rows": body.capacity_rows or body.capacity})
        try:
            block = yield from self._block_name(found, declared.block)
        except (_errors.NotFound, _errors.PermissionDenied):  # who may not see the source cannot tell
            raise refusal from None
        there = declared.model_copy(
            update={name: getattr(found, name) for name in CreateDataset.model_fields} | {"block": block}
        )
        if there != declared:
            differ = [name for name in CreateDataset.model_fields if getattr(there, name) != getattr(declared, name)]
            raise _errors.Conflict(
                f"{refusal.message}: an upload that was not completed, with another declaration ({', '.join(differ)}); "
                f"{_delete_first(found)}",
                **_known(refusal),
            )
        return found

    def _block_name(self, dataset: Dataset, declared: str | None) -> Operation[str | None]:
        """The block that a dataset was declared in, by name; None for the source's first where none is named now either."""
        if declared is None and dataset.block == 0:
            return None
        blocks = (yield from self.get("sources", dataset.source, Source)).budget.blocks
        return next((each.name for each in blocks if each.number == dataset.block), "")

    def _send_part(
        self, dataset: Dataset, number: int, content: bytes, content_type: str, *, first_row: int
    ) -> Operation[None]:
        digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
        headers = {"Content-Digest": f"sha-256=:{digest}:", "Content-Type": content_type}
        ask = Ask("PUT", f"/v1/datasets/{dataset.id}/parts/{number}", content=content, headers=headers)
        try:
            yield from asked(ask, max_retries=self._max_retries)
        except _errors.Conflict as refusal:
            if not refusal.details.get("part_exists"):
                raise
            if refusal.details.get("same_content") is False:
                raise _errors.UploadDiffers(
                    f"an earlier upload of {dataset.name!r} was cut short, and holds other rows than these from row "
                    f"{first_row} on; {_delete_first(dataset)}",
                    **_known(refusal),
                ) from None
        except _errors.RowsRefused as refusal:
            refusal.first_row = first_row
            raise


def _width(array: NDArray[Any]) -> int:
    """About how many elements of a request one row takes; a text takes its longest one's letters."""
    return max(map(len, array), default=1) if array.dtype == object else array[:1].size


def _told(model: type[M], answer: dict[str, Any]) -> M:
    try:
        return model.model_validate(answer)
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, each["loc"])) for each in error.errors(include_input=False))
    raise _errors.UnexpectedAnswer(
        f"the answer is no {model.__name__} as this release knows it (wrong: {fields}); upgrade, or check the URL"
    )


def _segment(id_or_name: str) -> str:
    if not _SEGMENT.fullmatch(id_or_name):
        raise _errors.InvalidArgument(
            f"{id_or_name!r} is neither a name (a letter, then letters, digits, _ and -; at most 63) nor an id"
        )
    return id_or_name


def id_or_blank(given: Any, prefix: str) -> str:
    """The id where it is known; where a name is given, a blank of the id's form, until the name is looked up."""
    if isinstance(given, str):
        return given if _ID.fullmatch(given) else f"{prefix}_{_segment(given) and '0' * 32}"
    if not isinstance(getattr(given, "id", None), str):
        raise _errors.InvalidArgument(
            f"a {type(given).__name__} names nothing here; give the thing itself, its id or its name"
        )
    return str(given.id)


def _named(given: Any) -> str:
    """What stands for a thing in a path: the id of itself, or the id or name that was given."""
    return _segment(given) if isinstance(given, str) else id_or_blank(given, "")


def _delete_first(dataset: Dataset) -> str:
    return f"delete it with client.datasets.delete({dataset.name!r}), then upload again"


def _known(refusal: _errors.APIError) -> dict[str, Any]:
    """What a refusal in other words keeps of the server's own."""
    return {
        "status": refusal.status,
        "code": refusal.code,
        "request_id": refusal.request_id,
        "details": refusal.details,
    }


def _check_done(job: Job) -> None:
    if job.status == "done":
        return
    kind = _errors.JobCancelled if job.status == "cancelled" else _errors.JobFailed
    raise kind(
        job.error or f"it was {job.status} and published nothing",
        job=job.id,
        code=job.error_code,
        request_id=job.request_id,
    )
