"""The hot path: predictions by the Open Inference Protocol v2, as raw ASGI. Authorise, compute, answer.

Every request is authorised anew, and no request's rows are kept, logged or mixed with another's. Which models are open, and
for how long, is for `networks` to say.
"""

from __future__ import annotations

import asyncio
import re
import zlib
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, assert_never

from pydantic import ValidationError
from pydantic_core import to_json

from cloister.wire.columns import AudioColumn, CategoryColumn, InputColumn, NumberColumn, TensorColumn, TextColumn
from cloister.wire.oip import InferRequest, MalformedTensor, decode_inputs, encode_outputs
from cloister_server import models, policy
from cloister_server.errors import BadRequest, Forbidden, Invalid, NotFound, TooLarge
from cloister_server.networks import Networks
from cloister_server.policy import Authorized, Decided
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.acting import for_principal
from cloister_server.store.serving import Serving
from cloister_server.store.tables import Model

if TYPE_CHECKING:
    from cloister_privacy.architecture import Network

__all__ = ["PredictRoute"]

_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_VERB = "model.predict"
_MODEL_PATH = re.compile(
    r"^/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[1-9][0-9]{0,8}))?(?P<verb>/infer|/ready)?$"
)


class PredictRoute:
    """The ASGI application under /v2. Errors are raised as ServerError; the edge gives them their one shape."""

    def __init__(self, service: Service) -> None:
        self._service, self._networks, self._serving = service, Networks(service), Serving(service.engine)

    async def __call__(self, scope: MutableMapping[str, Any], receive: _Receive, send: _Send) -> None:
        method, path = scope["method"], scope["path"].rstrip("/")
        if method == "GET" and path in ("/v2", "/v2/health/live", "/v2/health/ready"):
            about = {"name": "cloister", "version": "2", "extensions": []} if path == "/v2" else {}
            await _answer(send, about)
            return
        match = _MODEL_PATH.match(path)
        if match is None or (method == "POST") != (match["verb"] == "/infer") or method not in ("GET", "POST"):
            raise NotFound("route")
        body = await _body(scope, receive, self._service.settings.max_body_bytes) if method == "POST" else b""
        recalled = self._recalled(scope["state"], match, body)
        if recalled is not None:
            # To predict takes a thread, lest others wait for it; to say that the model is there does not.
            await _answer(send, await asyncio.to_thread(recalled) if method == "POST" else recalled())
            return
        told = await asyncio.to_thread(self._respond, scope["state"], match, body)
        if not isinstance(
            told, dict
        ):  # no thread waits while a key is asked for: there are few, and others' models to answer with
            opening, answer = told
            told = await asyncio.to_thread(answer, await asyncio.wrap_future(opening))
        await _answer(send, told)

    def _recalled(
        self, state: Mapping[str, Any], match: re.Match[str], body: bytes
    ) -> Callable[[], dict[str, Any]] | None:
        """How to answer where the model is open, and is the principal's by what this process knows of its grants; None elsewhere."""
        principal: Principal = state["principal"]
        number = int(match["version"]) if match["version"] else None
        found = policy.find_served(self._serving, principal, _VERB, match["model"], number)
        if found is None:
            return None
        authorized, served = found
        of = {"tenant_id": principal.tenant_id, "model_id": served.model_id, "weights_id": served.weights_id}
        network = self._networks.opened(**of, version=served.version)
        if network is None:
            return None
        state["noted"].decided.append(Decided(_VERB, principal.tenant_id, served.model_id, authorized.grant_id))
        return partial(_answered, authorized, served.version, match["verb"], body, network)

    def _respond(
        self, state: Mapping[str, Any], match: re.Match[str], body: bytes
    ) -> dict[str, Any] | tuple[Future[Network], Callable[[Network], dict[str, Any]]]:
        """The answer, or, where the model is not open, what will be its network and how to answer with that."""
        principal: Principal = state["principal"]
        number = int(match["version"]) if match["version"] else None
        authorized, version = self._service.read(
            for_principal(principal),
            state["noted"].within(
                lambda session: models.find_version(session, principal, match["model"], number, verb=_VERB)
            ),
        )
        answer = partial(_answered, authorized, version.version, match["verb"], body)
        network = self._networks.get(version)
        return (network, answer) if isinstance(network, Future) else answer(network)


def _answered(
    authorized: Authorized[Model], version: int, verb: str | None, body: bytes, network: Network
) -> dict[str, Any]:
    model, bound = authorized.resource, authorized.conditions.outputs
    if verb == "/ready":
        return {"name": model.name, "ready": True}
    if verb is None:
        return _metadata(model, version, network, bound)
    return _infer(model, version, network, body, bound)


def _infer(model: Model, version: int, network: Network, body: bytes, bound: str | None) -> dict[str, Any]:
    from cloister_privacy.errors import InputRefused

    try:
        request = InferRequest.model_validate_json(body)
        columns = decode_inputs(request)
    except ValidationError as error:
        fields = [
            {"field": ".".join(map(str, e["loc"])), "problem": e["msg"]} for e in error.errors(include_input=False)
        ]
        raise Invalid(
            "the inference request is not of the Open Inference Protocol v2; see details", details={"fields": fields}
        ) from None
    except MalformedTensor as error:
        raise Invalid(str(error)) from None
    try:
        outputs = bounded(network.predict(columns), bound)
    except InputRefused as error:
        raise Invalid(str(error)) from None
    asked = {output.name for output in request.outputs or ()}
    if not asked <= outputs.keys():
        raise Invalid(
            f"the model has outputs {', '.join(outputs)}, and not {', '.join(sorted(asked - outputs.keys()))}"
        )
    if asked:
        outputs = {name: outputs[name] for name in outputs if name in asked}
    answer = {"model_name": model.name, "model_version": str(version), "outputs": encode_outputs(outputs)}
    return {**answer, "id": request.id} if request.id is not None else answer


def bounded(outputs: Mapping[str, Any], bound: str | None) -> dict[str, Any]:
    """As much of a model's outputs as a grant allows: all; figures 'rounded' to two digits; or 'labels' alone, and no figures.

    Raises Forbidden where a model that answers with figures has no labels.
    """
    if bound is None:
        return dict(outputs)
    if bound == "rounded":
        return {name: _rounded(values) for name, values in outputs.items()}
    labels = {name: values for name, values in outputs.items() if name == "index"}
    if not labels:
        raise Forbidden(
            "your grant is for labels alone, and this model answers with figures; ask its owner for another"
        )
    return labels


def _rounded(values: Any) -> Any:
    """To two significant digits, so that what is near nothing tells no more than what is near one."""
    import numpy as np

    if values.dtype.kind != "f":
        return values
    sizes = np.abs(values, dtype=np.float64)
    unit = 10.0 ** (np.floor(np.log10(sizes, where=sizes > 0, out=np.zeros_like(sizes))) - 1)
    return (np.round(values / unit) * unit).astype(values.dtype)


def _metadata(model: Model, version: int, network: Network, bound: str | None) -> dict[str, Any]:
    spec = network.architecture
    inputs = [_input_metadata(name, column) for name, column in spec.inputs.items()]
    if isinstance(spec.output, CategoryColumn):
        outputs = [
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, len(spec.output.values)]},
            {"name": "index", "datatype": "INT64", "shape": [-1]},
        ]
    else:
        outputs = [{"name": "value", "datatype": "FP32", "shape": [-1]}]
    if bound is not None and bound != "rounded":
        outputs = [each for each in outputs if each["name"] == "index"]
    return {
        "name": model.name,
        "versions": [str(version)],
        "platform": "cloister",
        "inputs": inputs,
        "outputs": outputs,
    }


def _input_metadata(name: str, column: InputColumn) -> dict[str, Any]:
    match column:
        case TensorColumn():
            return {"name": name, "datatype": "FP32", "shape": [-1, *column.shape]}
        case NumberColumn():
            return {"name": name, "datatype": "FP32", "shape": [-1]}
        case CategoryColumn():
            return {"name": name, "datatype": "INT64", "shape": [-1]}
        case TextColumn():
            return {"name": name, "datatype": "BYTES", "shape": [-1]}
        case AudioColumn():
            return {"name": name, "datatype": "INT16", "shape": [-1, -1]}
        case _:
            assert_never(column)


async def _body(scope: MutableMapping[str, Any], receive: _Receive, limit: int) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise BadRequest("the request ended before its body did; send it again", code="body_truncated")
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break
    encoding = next((value for name, value in scope["headers"] if name.lower() == b"content-encoding"), b"identity")
    if encoding == b"identity":
        return bytes(body)
    if encoding not in (b"gzip", b"deflate"):
        raise BadRequest("this content encoding is not spoken here; send gzip, deflate or no encoding")
    return _inflate(bytes(body), limit)


def _inflate(body: bytes, limit: int) -> bytes:
    inflater = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # gzip or zlib, told from the header
    try:
        plain = inflater.decompress(body, limit)
    except zlib.error:
        raise BadRequest("the body is not what its Content-Encoding says; compress it again") from None
    if inflater.unconsumed_tail:
        raise TooLarge(f"the body unpacks to more than {limit} bytes; send fewer rows at a time")
    if not inflater.eof:
        raise BadRequest("the compressed body is cut short; send it again", code="body_truncated")
    return plain


async def _answer(send: _Send, body: dict[str, Any]) -> None:
    payload = to_json(body)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(payload)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": payload})
