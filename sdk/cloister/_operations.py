"""What the SDK does, each thing written once as an operation; the clients run them with or without an event loop."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from cloister import _errors
from cloister._http import Ask, Operation, Pause, asked
from cloister._plans import Plan
from cloister._uploads import RowData, known_length, windows
from cloister.wire import oip
from cloister.wire.jobs import FINAL, Job, Model, ModelVersion, Page, StartJob
from cloister.wire.plans import PlanRequest
from cloister.wire.rows import encode_rows
from cloister.wire.sources import CreateDataset, CreateSource, Dataset, Source

__all__ = ["Operations"]

M = TypeVar("M", bound=BaseModel)

_FIRST_POLL_S, _SLOWEST_POLL_S = 0.2, 2.0
_ELEMENTS_A_REQUEST = 500_000
_SEGMENT = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,62}")
"""A name or an id, which is all that may become a part of a path."""


class Operations:
    """The operations of one client, with its retry setting."""

    def __init__(self, *, max_retries: int) -> None:
        self._max_retries = max_retries
        self._inputs_of: dict[tuple[str, int], list[oip.TensorMetadata]] = {}  # a version's inputs never change

    def create_source(self, body: CreateSource) -> Operation[Source]:
        return _told(Source, (yield from self._ask("POST", "/v1/sources", body)))

    def get(self, kind: str, id_or_name: str, model: type[M]) -> Operation[M]:
        """One source, dataset, job or model; the server takes ids and names alike."""
        return _told(model, (yield from self._ask("GET", f"/v1/{kind}/{_segment(id_or_name)}")))

    def page(self, kind: str, model: type[M], *, cursor: str | None) -> Operation[tuple[list[M], str | None]]:
        """One page of a listing, and the cursor of the next."""
        params = {"cursor": cursor} if cursor else {}
        page = _told(Page, (yield from self._ask("GET", f"/v1/{kind}", params=params)))
        return [_told(model, item) for item in page.items], page.next

    def upload(self, body: CreateDataset, data: RowData) -> Operation[Dataset]:
        """Declare, send part by part, close. An upload that was cut short is taken up where it stopped."""
        length = known_length(body.columns, data)
        room = body.capacity_rows or body.capacity
        if length is not None and length > room:
            raise _errors.RowsNotFit(
                f"there are more rows ({length}) than the declared capacity ({room}); declare more"
            )
        dataset = yield from self._declare(body)
        first_row = 0
        for number, rows in enumerate(windows(body.columns, data)):
            count = len(next(iter(rows.values())))
            if first_row + count > room:
                raise _errors.RowsNotFit(f"there are more rows than the declared capacity ({room}); declare more")
            yield from self._send_part(dataset.id, number, encode_rows(body.columns, rows), first_row=first_row)
            first_row += count
        return _told(Dataset, (yield from self._ask("POST", f"/v1/datasets/{dataset.id}/complete")))

    def plan(self, body: PlanRequest) -> Operation[Plan]:
        return _told(Plan, (yield from self._ask("POST", "/v1/plans", body)))

    def start(self, body: StartJob) -> Operation[Job]:
        return _told(Job, (yield from self._ask("POST", "/v1/jobs", body)))

    def cancel(self, job: str) -> Operation[Job]:
        return _told(Job, (yield from self._ask("POST", f"/v1/jobs/{job}/cancel")))

    def watch(self, job: str, *, show: Callable[[Job], None], timeout_s: float | None) -> Operation[Job]:
        """Poll a job until it is over, telling `show` of each look at it. Raises JobFailed, JobCancelled, StillRunning."""
        waited_s, pause_s = 0.0, _FIRST_POLL_S
        while True:
            state = yield from self.get("jobs", job, Job)
            show(state)
            if state.status in FINAL:
                return _concluded(state)
            if timeout_s is not None and waited_s >= timeout_s:
                raise _errors.StillRunning(
                    f"job {job} is {state.status} after {timeout_s:g} s and goes on; client.jobs.get({job!r}).wait() waits again"
                )
            if timeout_s is not None:
                pause_s = min(pause_s, timeout_s - waited_s)
            yield Pause(pause_s)
            waited_s, pause_s = waited_s + pause_s, min(pause_s * 1.3, _SLOWEST_POLL_S)

    def version(self, model: str, version: int | None) -> Operation[ModelVersion]:
        """A version of a model; the champion where none is named."""
        if version is None:
            # Nothing is published as version 0: the server says so in its own words.
            version = (yield from self.get("models", model, Model)).champion or 0
        return _told(ModelVersion, (yield from self._ask("GET", f"/v1/models/{_segment(model)}/versions/{version}")))

    def predict(self, model: str, version: int, x: Any) -> Operation[dict[str, NDArray[Any]]]:
        """The outputs for these rows, asked for in requests of bearable size."""
        path = f"/v2/models/{model}/versions/{version}"
        if (model, version) not in self._inputs_of:
            self._inputs_of[model, version] = _told(oip.ModelMetadata, (yield from self._ask("GET", path))).inputs
        inputs = _inputs(x, self._inputs_of[model, version])
        count = len(next(iter(inputs.values())))
        width = sum(array[:1].size for array in inputs.values())
        size = max(1, _ELEMENTS_A_REQUEST // max(1, width))
        answers = []
        for start in range(0, max(1, count), size):
            body = oip.encode_request({name: array[start : start + size] for name, array in inputs.items()})
            answer = _told(oip.InferResponse, (yield from self._ask("POST", f"{path}/infer", body)))
            try:
                answers.append(oip.decode_outputs(answer))
            except oip.MalformedTensor as error:
                raise _errors.UnexpectedAnswer(f"the prediction cannot be read: {error}") from None
        return {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}

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

    def _declare(self, body: CreateDataset) -> Operation[Dataset]:
        try:
            return _told(Dataset, (yield from self._ask("POST", "/v1/datasets", body)))
        except _errors.Conflict:
            found = yield from self.get("datasets", body.name, Dataset)
            declared = body.model_copy(update={"capacity_rows": body.capacity_rows or body.capacity})
            there = declared.model_copy(update={name: getattr(found, name) for name in CreateDataset.model_fields})
            if there != declared or found.status != "uploading":
                raise
            return found

    def _send_part(self, dataset: str, number: int, content: bytes, *, first_row: int) -> Operation[None]:
        digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
        headers = {"Content-Digest": f"sha-256=:{digest}:", "Content-Type": "application/vnd.cloister.rows"}
        ask = Ask("PUT", f"/v1/datasets/{dataset}/parts/{number}", content=content, headers=headers)
        try:
            yield from asked(ask, max_retries=self._max_retries)
        except _errors.Conflict as refusal:
            if not refusal.details.get("part_exists"):
                raise
        except _errors.RowsRefused as refusal:
            refusal.first_row = first_row
            raise


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


def _concluded(job: Job) -> Job:
    if job.status == "done":
        return job
    kind = _errors.JobCancelled if job.status == "cancelled" else _errors.JobFailed
    raise kind(
        job.error or f"it was {job.status} and published nothing",
        job=job.id,
        code=job.error_code,
        request_id=job.request_id,
    )


def _inputs(x: Any, declared: list[oip.TensorMetadata]) -> dict[str, NDArray[Any]]:
    """The caller's array or arrays as the model's inputs."""
    names = [each.name for each in declared]
    if not isinstance(x, Mapping):
        if len(names) != 1:
            raise _errors.RowsNotFit(f"this model reads {', '.join(names)}; give a dict with an array for each")
        x = {names[0]: x}
    if x.keys() != set(names):
        raise _errors.RowsNotFit(
            f"this model reads {', '.join(names)}, and was given {', '.join(map(str, x)) or 'nothing'}"
        )
    inputs = {each.name: _input(each, x[each.name]) for each in declared}
    if len({len(array) for array in inputs.values()}) != 1:
        raise _errors.RowsNotFit("the inputs have different numbers of rows; give as many of each")
    return inputs


def _input(declared: oip.TensorMetadata, values: Any) -> NDArray[Any]:
    """One input in the model's own type. Nothing is rounded to a whole number on the way."""
    name, row_shape = declared.name, tuple(declared.shape[1:])
    try:
        given = np.asarray(values)
        with np.errstate(over="ignore", invalid="ignore"):
            array = given.astype(np.int64 if declared.datatype == "INT64" else np.float32)
    except (ValueError, TypeError):
        raise _errors.RowsNotFit(
            f"input {name!r} holds what is not a number; a category is given by its index"
        ) from None
    if not array.ndim or array.shape[1:] != row_shape:
        raise _errors.RowsNotFit(f"input {name!r} has shape {array.shape}; the model reads rows of shape {row_shape}")
    if not np.isfinite(array).all() or (array.dtype.kind == "i" and not np.array_equal(array, given)):
        raise _errors.RowsNotFit(
            f"input {name!r} holds values that are no finite {declared.datatype}; remove those rows"
        )
    return array
