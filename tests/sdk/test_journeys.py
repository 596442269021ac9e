"""Plans, jobs and predictions as their callers meet them: what is sent, what is shown, and how waiting ends."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import sys
from typing import Any

import httpx2
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

import cloister
from cloister.wire.certificate import key_id, sign
from fake_server import Server, refusal

DATASET, JOB, MODEL = "ds_" + "1" * 32, "job_" + "2" * 32, "mdl_" + "3" * 32
NOW = "2026-01-01T00:00:00Z"
PLAN: dict[str, Any] = {
    "training": {
        "dataset": DATASET,
        "architecture": {
            "inputs": {"scan": {"type": "tensor", "shape": [8, 8], "low": 0, "high": 16}},
            "layers": [{"type": "flatten"}, {"type": "linear", "in_features": 64, "out_features": 2}],
            "target": "digit",
            "output": {"type": "category", "values": ["<0>", "1"]},
            "loss": "cross_entropy",
        },
        "nominal_size": 1000,
        "capacity": 2000,
        "batch_size": 100,
        "steps": 40,
        "noise_multiplier": 1.5,
        "clip": 1.0,
        "delta": 1e-5,
        "optimizer": {"type": "sgd", "learning_rate": 0.5},
    },
    "event": {
        "mechanism": "poisson_subsampled_gaussian",
        "noise_multiplier": 1.5,
        "sampling_rate": 0.1,
        "steps": 40,
        "unit": "row",
        "adjacency": "add_remove",
    },
    "epsilon": 3.125,
    "epsilon_pld": 2.875,
    "delta": 1e-5,
    "source": "src_" + "0" * 32,
    "quote": {"revision": 7, "cap": 20, "delta": 1e-5, "before": 1.5, "after": 4.25, "left": 15.75, "fits": True},
}
VERSION = {"model": MODEL, "name": "m", "version": 2, "job": JOB, "certificate": {}, "created": NOW}
SCHEMA: dict[str, Any] = {
    "inputs": PLAN["training"]["architecture"]["inputs"],
    "target": "digit",
    "output": {"type": "category", "values": [f"v{index}" for index in range(600)]},
}
TABLE = {
    "inputs": {
        "age": {"type": "number", "low": 0, "high": 120},
        "region": {"type": "category", "values": ["north", "south"]},
    },
    "target": "cost",
    "output": {"type": "number", "low": 0, "high": 9},
}
SCHEMA_PATH = f"/v1/models/{MODEL}/versions/2/schema"
INFER = f"/v2/models/{MODEL}/versions/2/infer"


def job(status: str, steps_done: int = 0, **more: Any) -> dict[str, Any]:
    rest = {"steps": 40, "epsilon": 3.125, "delta": 1e-5, "created": NOW, "request_id": "req-of-the-start"}
    return {"id": JOB, "model": MODEL, "dataset": DATASET, "status": status, "steps_done": steps_done, **rest, **more}


def trained(server: Server) -> Server:
    done = job("done", 40, version=2)
    server.on("/v1/plans", PLAN).on("/v1/jobs", job("queued"))
    server.on(f"/v1/jobs/{JOB}", job("queued"), job("running", 20), done).on(
        f"/v1/jobs/{JOB}/cancel", job("cancelling")
    )
    server.on("/v1/models/m/versions/2", VERSION).on(f"/v1/models/{MODEL}/versions/2", VERSION)
    return server.on(SCHEMA_PATH, SCHEMA).on(INFER, predict)


def predict(request: httpx2.Request) -> dict[str, Any]:
    """The sum of each row, as the index; and a first probability that says the same."""
    tensors = {tensor["name"]: tensor for tensor in json.loads(request.content)["inputs"]}
    shape, data = tensors["scan"]["shape"], tensors["scan"]["data"]
    sums = np.asarray(data).reshape(shape).sum(axis=(1, 2)).astype(int)
    outputs = [
        {"name": "probabilities", "datatype": "FP32", "shape": [len(sums), 1], "data": (sums / 1000).tolist()},
        {"name": "index", "datatype": "INT64", "shape": [len(sums)], "data": sums.tolist()},
    ]
    return {"model_name": "m", "model_version": "2", "outputs": outputs}


def body(request: httpx2.Request) -> Any:
    return json.loads(request.content)


def test_a_plan_asks_with_what_was_given_and_leaves_the_rest_to_the_recipe(server: Server) -> None:
    trained(server)
    layers = [cloister.layers.Flatten(), cloister.layers.Linear(in_features=64, out_features=2)]
    with server.client() as client:
        client.plan(DATASET, target="digit")
        client.plan(
            DATASET,
            target="digit",
            features=["scan"],
            layers=layers,
            privacy=cloister.DP(noise_multiplier=1, clip=0.5),
            batch_size=100,
            epochs=4,
            optimizer=cloister.Adam(learning_rate=0.1),
            rows_per_unit=4,
        )
    short, whole = map(body, server.requests("/v1/plans"))
    assert short == {"dataset": DATASET, "target": "digit"}
    assert whole == {
        "dataset": DATASET,
        "target": "digit",
        "features": ["scan"],
        "layers": [layer.model_dump(mode="json", exclude_none=True) for layer in layers],
        "privacy": {"noise_multiplier": 1, "clip": 0.5},
        "batch_size": 100,
        "epochs": 4,
        "optimizer": {"type": "adam", "learning_rate": 0.1},
        "rows_per_unit": 4,
    }


def test_a_plan_reads_well(server: Server) -> None:
    trained(server)
    with server.client() as client:
        plan = client.plan(DATASET, target="digit")
    for part in (
        "flatten - 64x2, cross_entropy",
        "40 of 100 expected rows (q = 0.1)",
        "multiplier 1.5",
        "epsilon 3.125 at delta 1e-05",
        "PLD: 2.875",
        "1.500 -> 4.250 of 20, fits, 15.750 would be left",
        "A plan spends nothing.",
    ):
        assert part in str(plan)
    assert repr(plan) == "<Plan of 40 steps, epsilon 3.125 at delta 1e-05, fits>"
    assert plan._repr_html_().startswith("<pre>network")


def test_a_plan_that_does_not_fit_says_what_is_left(server: Server) -> None:
    server.on("/v1/plans", {**PLAN, "quote": {**PLAN["quote"], "fits": False, "left": 0.5}})
    with server.client() as client:
        plan = client.plan(DATASET, target="digit")
    assert "does not fit: 0.500 is left" in str(plan) and "does not fit" in repr(plan)


def test_what_was_planned_is_what_is_started(server: Server) -> None:
    trained(server)
    with server.client() as client:
        plan = client.plan(DATASET, target="digit")
        client.train(plan, model="m")
        client.train(plan, model="m", require_revision=True)
    free, bound = map(body, server.requests("/v1/jobs"))
    assert (
        free["training"] == plan.training.model_dump(mode="json", exclude_none=True) and "require_revision" not in free
    )
    assert bound == {**free, "require_revision": 7}


def test_a_job_is_watched_gently_until_its_model_is_there(server: Server, pauses: list[float]) -> None:
    trained(server).on(f"/v1/jobs/{JOB}", *[job("running", done) for done in range(20)], job("done", 40, version=2))
    with server.client() as client:
        started = client.train(client.plan(DATASET, target="digit"), model="m")
        assert repr(started) == f"<Job {JOB} queued 0/40 steps>"
        model = started.wait()
    assert (model.id, model.name, model.version) == (MODEL, "m", 2)
    assert started.status == "done" and started.steps_done == 40
    assert pauses[0] == pytest.approx(0.2) and pauses == sorted(pauses) and pauses[-1] == 2.0


def test_waiting_for_a_finished_job_returns_at_once(server: Server, pauses: list[float]) -> None:
    trained(server).on(f"/v1/jobs/{JOB}", job("done", 40, version=2))
    with server.client() as client:
        assert client.jobs.get(JOB).wait(progress=True).version == 2
    assert pauses == []


@pytest.mark.parametrize(("status", "kind"), [("failed", cloister.JobFailed), ("cancelled", cloister.JobCancelled)])
def test_a_job_without_a_model_is_an_error_in_the_servers_words(
    server: Server, pauses: list[float], status: str, kind: type[cloister.JobFailed]
) -> None:
    server.on(f"/v1/jobs/{JOB}", job(status, error="the weights are no longer finite", error_code="diverged"))
    with server.client() as client, pytest.raises(kind) as told:
        client.jobs.get(JOB).wait()
    assert str(told.value) == f"job {JOB}: the weights are no longer finite [diverged, request req-of-the-start]"
    assert type(told.value) is kind and told.value.request_id == "req-of-the-start"


def test_a_wait_that_times_out_leaves_the_job_and_says_how_to_return(server: Server, pauses: list[float]) -> None:
    server.on(f"/v1/jobs/{JOB}", job("running", 10))
    with server.client() as client, pytest.raises(cloister.StillRunning, match=r"client\.jobs\.get"):
        client.jobs.get(JOB).wait(timeout_s=5)
    assert sum(pauses) == pytest.approx(5)
    assert all(request.method == "GET" for request in server.requests(f"/v1/jobs/{JOB}"))


OUTAGE = [
    httpx2.ConnectError("refused"),
    lambda _: refusal(503, "unavailable", "starting"),
    lambda _: httpx2.Response(502, text="<html>Bad gateway</html>"),
]


@pytest.mark.parametrize("timeout_s", [120, None])
def test_a_watch_outlives_a_restart_of_the_server(server: Server, pauses: list[float], timeout_s: float | None) -> None:
    trained(server)
    server.on(f"/v1/jobs/{JOB}", job("running", 10), job("running", 10), *OUTAGE * 5, job("done", 40, version=2))
    server.on(f"/v1/models/{MODEL}/versions/2", *OUTAGE, VERSION)
    with server.client(max_retries=0) as client:
        assert client.jobs.get(JOB).wait(timeout_s=timeout_s).version == 2


def test_an_async_watch_outlives_a_restart_of_the_server(server: Server, pauses: list[float]) -> None:
    trained(server).on(f"/v1/jobs/{JOB}", job("running", 10), *OUTAGE * 5, job("done", 40, version=2))

    async def journey() -> int:
        async with server.async_client() as client:
            return (await (await client.jobs.get(JOB)).wait(timeout_s=120)).version

    assert asyncio.run(journey()) == 2


@pytest.mark.parametrize(("timeout_s", "patience_s"), [(5, 5), (300, 300), (None, 60)])
def test_a_server_that_stays_away_is_waited_for_until_the_time_is_up(
    server: Server, pauses: list[float], timeout_s: float | None, patience_s: float
) -> None:
    server.on(f"/v1/jobs/{JOB}", job("running", 10), httpx2.ConnectError("refused"))
    with server.client() as client, pytest.raises(cloister.ConnectionFailed) as told:
        client.jobs.get(JOB).wait(timeout_s=timeout_s)
    assert sum(pauses) == pytest.approx(patience_s)
    assert f"client.jobs.get({JOB!r})" in str(told.value)


@pytest.mark.parametrize(
    "answer",
    [
        refusal(500, "internal", "broken"),
        refusal(404, "not_found", "no such job"),
        refusal(401, "unauthenticated", "disabled"),
        httpx2.Response(200, text="<html>"),
    ],
)
def test_whatever_ends_a_watch_names_the_job_and_the_way_back(
    server: Server, pauses: list[float], answer: httpx2.Response
) -> None:
    server.on(f"/v1/jobs/{JOB}", job("running", 10), answer)
    with server.client() as client, pytest.raises(cloister.CloisterError) as told:
        client.jobs.get(JOB).wait(timeout_s=120)
    assert f"client.jobs.get({JOB!r})" in str(told.value)
    assert pauses == []


def test_a_dataset_is_planned_on_by_its_name(server: Server) -> None:
    dataset = {
        "id": DATASET,
        "name": "claims",
        "source": PLAN["source"],
        "columns": SCHEMA["inputs"],
        "nominal_size": 10,
        "capacity": 20,
        "capacity_rows": 20,
        "status": "ready",
        "created": NOW,
    }
    trained(server).on("/v1/datasets/claims", dataset)

    async def journey() -> None:
        async with server.async_client() as client:
            await client.plan("claims", target="digit")

    with server.client() as client:
        for given in ("claims", DATASET, client.datasets.get("claims")):
            client.plan(given, target="digit")
        with pytest.raises(cloister.InvalidArgument, match="neither a name"):
            client.plan("my claims", target="digit")
        with pytest.raises(cloister.InvalidArgument, match=r"\['scan'\]"):
            client.plan("claims", target="digit", features="scan")
        with pytest.raises(cloister.InvalidArgument, match="int names nothing"):
            client.plan(3, target="digit")  # type: ignore[arg-type]  (that is the test)
    asyncio.run(journey())
    assert [body(request)["dataset"] for request in server.requests("/v1/plans")] == [DATASET] * 4


def test_ctrl_c_stops_watching_and_not_the_job(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(server)

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cloister._http.time.sleep", interrupt)
    with server.client() as client, pytest.raises(KeyboardInterrupt):
        client.jobs.get(JOB).wait(progress=True)
    assert f"client.jobs.get('{JOB}')" in capsys.readouterr().err
    assert not server.requests(f"/v1/jobs/{JOB}/cancel")


@pytest.mark.parametrize("with_rich", [True, False])
def test_after_ctrl_c_the_hint_is_the_last_that_is_drawn(
    server: Server, monkeypatch: pytest.MonkeyPatch, with_rich: bool
) -> None:
    trained(server)

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    if with_rich:
        pytest.importorskip("rich", reason="rich comes with the extra cli")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("cloister._http.time.sleep", interrupt)
    with server.client() as client, pytest.raises(KeyboardInterrupt):
        client.jobs.get(JOB).wait(progress=True)
    assert terminal.getvalue().endswith(f"client.jobs.get({JOB!r}) finds it again.\n")
    assert terminal.getvalue().count("client.jobs.get") == 1


def test_a_cancelled_watch_says_how_to_return_too(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    server.on(f"/v1/jobs/{JOB}", job("running", 10))

    async def journey() -> None:
        async with server.async_client() as client:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for((await client.jobs.get(JOB)).wait(progress=True), 0.05)

    asyncio.run(journey())
    assert capfd.readouterr().err.endswith(f"client.jobs.get({JOB!r}) finds it again.\n")


def test_a_job_is_cancelled_and_refreshed(server: Server) -> None:
    trained(server)
    with server.client() as client:
        seen = client.jobs.get(JOB)
        assert seen.cancel().status == "cancelling"
        assert seen.refresh().status == "running"
    assert server.requests(f"/v1/jobs/{JOB}/cancel")[0].headers["idempotency-key"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("with_rich", [True, False])
def test_progress_is_shown_on_a_terminal(
    server: Server, pauses: list[float], monkeypatch: pytest.MonkeyPatch, with_rich: bool
) -> None:
    trained(server)
    if with_rich:
        pytest.importorskip("rich", reason="rich comes with the extra cli")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with server.client() as client:
        client.jobs.get(JOB).wait(progress=True)
    assert "40/40" in terminal.getvalue() and "steps" in terminal.getvalue()


def test_nothing_is_shown_to_whoever_did_not_ask(
    server: Server, pauses: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    trained(server)
    with server.client() as client:
        client.jobs.get(JOB).wait()
    assert capfd.readouterr() == ("", "")


def test_progress_in_a_log_is_a_line_for_each_tenth(
    server: Server, pauses: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    looks = [job("queued"), job("queued"), *[job("running", done) for done in range(41)], job("done", 40, version=2)]
    trained(server).on(f"/v1/jobs/{JOB}", *looks)
    with server.client() as client:
        client.jobs.get(JOB).wait(progress=True)
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 13, err
    assert lines[-3:] == [
        f"{JOB} running: 36/40 steps (90 %)",
        f"{JOB} running: 40/40 steps (100 %)",
        f"{JOB} done: 40/40 steps (100 %)",
    ]


def test_predictions_come_back_in_order_however_many_requests_they_take(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(server)
    monkeypatch.setattr("cloister._operations._ELEMENTS_A_REQUEST", 64 * 3)
    x = np.arange(8)[:, None, None] * np.ones((8, 8, 8))
    with server.client() as client:
        model = client.models.get("m", version=2)
        assert model.predict(x).tolist() == [64 * row for row in range(8)]
        assert model.predict({"scan": x[:1]}).dtype == np.int64
        assert model.predict_proba(x[:2]).shape == (2, 1)
        assert model.predict_proba(x[:2]).dtype == np.float32
    assert len(server.requests(SCHEMA_PATH)) == 1, "what a version reads is asked for once"


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.zeros((2, 8)), r"shape \(2, 8\)"),
        (np.float32(1), r"shape \(\)"),
        (np.zeros((8, 8)), r"one row of shape \(8, 8\), without a row axis; add one: x\[None\]"),
        (np.full((1, 8, 8), np.nan), "finite"),
        (np.full((1, 8, 8), 1e300), "finite"),
        (np.full((1, 8, 8), "a"), "not a number"),
        ({"other": np.zeros((1, 8, 8))}, "reads scan, and was given other"),
        ({}, "given nothing"),
    ],
)
def test_input_that_the_model_cannot_read_is_refused_before_it_is_sent(server: Server, x: Any, words: str) -> None:
    trained(server)
    with server.client() as client, pytest.raises(cloister.RowsNotFit, match=words):
        client.models.get("m", version=2).predict(x)
    assert not server.requests(INFER)


def test_a_model_of_several_inputs_wants_them_by_name_and_never_rounds_a_category(server: Server) -> None:
    value = {"name": "value", "datatype": "FP32", "shape": [2], "data": [1.5, 2]}
    trained(server).on(SCHEMA_PATH, TABLE)
    server.on(INFER, {"model_name": "m", "outputs": [value]})
    with server.client() as client:
        model = client.models.get("m", version=2)
        answer = model.predict({"region": [0, 1], "age": [30, 40]})
        assert answer.tolist() == [1.5, 2] and answer.dtype == np.float32
        with pytest.raises(cloister.InvalidArgument, match="no probabilities"):
            model.predict_proba({"region": [0, 1], "age": [30, 40]})
        for wrong, words in (
            ([1.0], "dict with an array for each"),
            ({"age": [1], "region": [0.5]}, "row 0: 0.5 is not one of the declared categories: north, south"),
            ({"age": [1, 1], "region": ["north", "west"]}, "row 1: 'west' is not one of the declared"),
            ({"age": [1], "region": [2]}, "row 0: 2 is not one of the declared"),
            ({"age": 30, "region": "north"}, r"'age' is a single value, without a row axis; add one: \[x\]"),
            ({"age": [1, 2], "region": [0]}, "different numbers of rows"),
        ):
            with pytest.raises(cloister.RowsNotFit, match=words):
                model.predict(wrong)


def test_a_category_is_given_to_a_prediction_as_to_an_upload(server: Server) -> None:
    value = {"name": "value", "datatype": "FP32", "shape": [3], "data": [1, 2, 3]}
    trained(server).on(SCHEMA_PATH, TABLE).on(INFER, {"model_name": "m", "outputs": [value]})
    with server.client() as client:
        model = client.models.get("m", version=2)
        for region in (["south", "north", "south"], np.array([1, 0, 1]), np.array(["south", "north", "south"], object)):
            model.predict({"age": [30, 40, 50], "region": region})
        assert model.schema().classes is None
    for request in server.requests(INFER):
        (sent,) = (tensor for tensor in body(request)["inputs"] if tensor["name"] == "region")
        assert (sent["datatype"], sent["data"]) == ("INT64", [1, 0, 1])


def test_answers_are_decoded_by_the_models_own_classes(server: Server) -> None:
    trained(server)
    x = np.arange(4)[:, None, None] * np.ones((4, 8, 8))
    with server.client() as client:
        model = client.models.get("m", version=2)
        assert model.schema().target == "digit" and list(model.schema().inputs) == ["scan"]
        assert model.schema().classes == tuple(SCHEMA["output"]["values"])
        assert model.predict(x, decoded=True).tolist() == ["v0", "v64", "v128", "v192"]
        with pytest.raises(cloister.UnexpectedAnswer, match="none of the model's classes"):
            model.predict(100 * x, decoded=True)

    async def journey() -> list[str]:
        async with server.async_client() as client:
            model = await client.models.get("m", version=2)
            assert (await model.schema()).classes == tuple(SCHEMA["output"]["values"])
            return list(await model.predict(x, decoded=True))

    assert asyncio.run(journey()) == ["v0", "v64", "v128", "v192"]
    assert len(server.requests(SCHEMA_PATH)) == 2, "once a client"


def test_who_may_not_predict_is_told_in_the_servers_words(server: Server) -> None:
    trained(server).on(SCHEMA_PATH, refusal(403, "forbidden", "'model.predict' is not granted to you"))
    with server.client() as client, pytest.raises(cloister.PermissionDenied, match=r"model\.predict"):
        client.models.get("m", version=2).predict(np.zeros((2, 8, 8)))


def test_a_prediction_that_contradicts_itself_is_not_believed(server: Server) -> None:
    trained(server).on(
        INFER, {"model_name": "m", "outputs": [{"name": "index", "datatype": "INT64", "shape": [2], "data": [1]}]}
    )
    with server.client() as client, pytest.raises(cloister.UnexpectedAnswer, match="index"):
        client.models.get("m", version=2).predict(np.zeros((2, 8, 8)))


def test_the_champion_is_served_where_no_version_is_named(server: Server) -> None:
    trained(server).on("/v1/models/m", {"id": MODEL, "name": "m", "champion": 2, "created": NOW})
    with server.client() as client:
        assert client.models.get("m").version == 2


def test_a_certificate_is_verified_and_must_be_of_this_very_version(server: Server) -> None:
    private = Ed25519PrivateKey.generate()
    raw = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    jwk = {"kid": key_id(raw), "kty": "OKP", "crv": "Ed25519", "x": _base64url(raw)}
    server.on("/.well-known/cloister-certificate-keys", {"keys": [jwk]})
    with server.client() as client:
        keys = client.certificate_keys()
        assert keys == {key_id(raw): raw}
        for version, holds in ((2, True), (3, False)):
            envelope = sign(_certificate(version), private_key=private, key_id=key_id(raw))
            server.on("/v1/models/m/versions/2", {**VERSION, "certificate": envelope})
            model = client.models.get("m", version=2)
            if holds:
                assert model.verify(keys).version == 2
            else:
                with pytest.raises(cloister.InvalidCertificate, match="version 3"):
                    model.verify(keys)


def test_the_async_client_plans_trains_and_predicts_alike(server: Server, pauses: list[float]) -> None:
    trained(server).on("/v1/jobs/missing", refusal(404, "not_found", "no such job"))

    async def journey() -> np.ndarray[Any, Any]:
        async with server.async_client() as client:
            plan = await client.plan(DATASET, target="digit")
            started = await client.train(plan, model="m", require_revision=True)
            model = await started.wait(progress=True)
            with pytest.raises(cloister.NotFound):
                await client.jobs.get("missing")
            assert (await model.predict_proba(np.ones((2, 8, 8)))).shape == (2, 1)
            return await model.predict(np.ones((2, 8, 8)))

    assert asyncio.run(journey()).tolist() == [64, 64]


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _certificate(version: int) -> cloister.Certificate:
    return cloister.Certificate.model_validate(
        {
            "tenant": "tn_" + "0" * 32,
            "model": MODEL,
            "name": "m",
            "version": version,
            "job": JOB,
            "source": PLAN["source"],
            "dataset": DATASET,
            "weights_digest": "0" * 64,
            "architecture_digest": "1" * 64,
            "initial_digest": "2" * 64,
            "epsilon": 3.125,
            "delta": 1e-5,
            "event": PLAN["event"],
            "clip": 1.0,
            "nominal_size": 1000,
            "unit": "row",
            "adjacency": "add_remove",
            "accountant": "rdp",
            "engine": {},
            "issued": NOW,
        }
    )
