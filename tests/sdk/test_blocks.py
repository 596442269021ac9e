"""Blocks as the SDK sends them: uploads that say whose block they are, taken up where they stopped; plans on several datasets."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2
import numpy as np
import pytest

import cloister
from fake_server import Server, refusal

SOURCE, DATASET, MORE = "src_" + "0" * 32, "ds_" + "1" * 32, "ds_" + "2" * 32
NOW = "2026-01-01T00:00:00Z"
COLUMNS = {"x": cloister.Number(low=0, high=1)}
DECLARED: dict[str, Any] = {
    "name": "d",
    "source": SOURCE,
    "columns": {"x": {"type": "number", "low": 0, "high": 1}},
    "nominal_size": 500,
    "capacity": 1000,
}
DATASET_THERE = {**DECLARED, "id": DATASET, "block": 0, "capacity_rows": 1000, "status": "uploading", "created": NOW}
SOURCE_THERE = {
    "id": SOURCE, "name": "census", "unit": "row", "adjacency": "add_remove", "public": False, "created": NOW,
    "budget": {
        "epsilon": 10, "delta": 1e-6, "spent": 0, "left": 10, "revision": 0,
        "blocks": [
            {"number": 0, "name": "first", "spent": 0, "left": 10}, {"number": 1, "name": "day2", "spent": 0, "left": 10},
        ],
    },
}  # fmt: skip
SPEC: dict[str, Any] = {
    "dataset": DATASET,
    "architecture": {
        "inputs": {"x": {"type": "number", "low": 0, "high": 1}},
        "layers": [{"type": "encode"}, {"type": "linear", "in_features": 1, "out_features": 1}],
        "target": "y",
        "output": {"type": "number", "low": 0, "high": 1},
        "loss": "mean_squared_error",
    },
    "nominal_size": 1000,
    "capacity": 2000,
    "batch_size": 100,
    "steps": 40,
    "noise_multiplier": 1.5,
    "clip": 1.0,
    "delta": 1e-5,
    "optimizer": {"type": "sgd", "learning_rate": 0.5},
}
PLAN: dict[str, Any] = {
    "training": SPEC,
    "event": {
        "mechanism": "poisson_subsampled_gaussian", "noise_multiplier": 1.5, "sampling_rate": 0.1, "steps": 40, "unit": "row",
        "adjacency": "add_remove",
    },
    "epsilon": 3.125, "epsilon_pld": 2.875, "delta": 1e-5, "source": SOURCE,
    "quote": {"revision": 7, "cap": 20, "delta": 1e-5, "before": 1.5, "after": 4.25, "left": 15.75, "fits": True},
}  # fmt: skip


def upload(client: cloister.Cloister, **changed: Any) -> cloister.Dataset:
    given: dict[str, Any] = {"source": SOURCE, "columns": COLUMNS, "nominal_size": 500, "capacity": 1000}
    return client.datasets.upload("d", {"x": np.zeros(3)}, **{**given, **changed})


def interrupted(server: Server, *, block: int) -> Server:
    """A server that holds an upload of this block, cut short before its first part."""
    there = {**DATASET_THERE, "block": block}
    server.on("/v1/datasets", refusal(409, "conflict", "a dataset named 'd' is already there"))
    server.on("/v1/datasets/d", there).on(f"/v1/sources/{SOURCE}", SOURCE_THERE)
    server.on(f"/v1/datasets/{DATASET}/parts/0", {"part": 0})
    return server.on(f"/v1/datasets/{DATASET}/complete", {**there, "status": "ready"})


def test_an_upload_says_its_block_by_name(server: Server) -> None:
    interrupted(server, block=1).on("/v1/datasets", {**DATASET_THERE, "block": 1})

    async def journey() -> None:
        async with server.async_client() as client:
            given: dict[str, Any] = {"source": SOURCE, "columns": COLUMNS, "nominal_size": 500, "capacity": 1000}
            await client.datasets.upload("d", {"x": np.zeros(3)}, block="day2", **given)

    with server.client() as client:
        upload(client, block="day2")
        upload(client)
        with pytest.raises(cloister.InvalidArgument, match="block"):
            upload(client, block="day 2")
    asyncio.run(journey())
    told = [json.loads(request.content) for request in server.requests("/v1/datasets")]
    assert told == [{**DECLARED, "block": "day2"}, DECLARED, {**DECLARED, "block": "day2"}]


@pytest.mark.parametrize(("there", "declared"), [(0, None), (0, "first"), (1, "day2")])
def test_an_interrupted_upload_is_taken_up_in_its_block(server: Server, there: int, declared: str | None) -> None:
    interrupted(server, block=there)
    with server.client() as client:
        assert upload(client, block=declared).status == "ready"
    assert len(server.requests(f"/v1/datasets/{DATASET}/parts/0")) == 1


@pytest.mark.parametrize(("there", "declared"), [(0, "day2"), (1, None), (1, "first"), (2, None), (2, "day2")])
def test_an_interrupted_upload_of_another_block_is_never_mixed_with_this_one(
    server: Server, there: int, declared: str | None
) -> None:
    interrupted(server, block=there)
    with server.client() as client, pytest.raises(cloister.Conflict, match=r"another declaration \(block\); delete it"):
        upload(client, block=declared)
    assert not server.requests(f"/v1/datasets/{DATASET}/parts/0")


def test_whoever_may_not_see_the_source_cannot_take_up_an_upload_of_a_later_block(server: Server) -> None:
    interrupted(server, block=1).on(f"/v1/sources/{SOURCE}", refusal(403, "forbidden", "no"))
    with server.client() as client, pytest.raises(cloister.Conflict, match="is already there"):
        upload(client, block="day2")
    interrupted(server, block=0).on(f"/v1/sources/{SOURCE}", refusal(403, "forbidden", "no"))
    with server.client() as client:
        assert upload(client).status == "ready"


def test_a_server_from_before_blocks_is_taken_up_with(server: Server) -> None:
    interrupted(server, block=0)
    server.on("/v1/datasets/d", {name: value for name, value in DATASET_THERE.items() if name != "block"})
    with server.client() as client:
        assert upload(client).status == "ready"


def test_a_plan_on_several_datasets_names_each(server: Server) -> None:
    server.on("/v1/plans", PLAN).on("/v1/datasets/more", {**DATASET_THERE, "id": MORE, "name": "more"})

    async def journey() -> None:
        async with server.async_client() as client:
            await client.plan([DATASET, "more"], target="y")

    with server.client() as client:
        for given in ([DATASET, "more"], (DATASET, client.datasets.get("more")), [DATASET], DATASET):
            client.plan(given, target="y")
    asyncio.run(journey())
    asked = [json.loads(request.content) for request in server.requests("/v1/plans")]
    alone, together = {"dataset": DATASET, "target": "y"}, {"dataset": DATASET, "target": "y", "with_datasets": [MORE]}
    assert asked == [together, together, alone, alone, together]


@pytest.mark.parametrize("wrong", [[], (), [3], [DATASET, "no name"], {DATASET}, None])
def test_what_names_no_datasets_is_not_sent(server: Server, wrong: Any) -> None:
    with server.client() as client, pytest.raises(cloister.InvalidArgument):
        client.plan(wrong, target="y")
    assert server.asked == []


@pytest.mark.parametrize(
    ("more", "block", "told"),
    [
        ([], 0, "1.500 -> 4.250 of 20, fits"),
        ([], 2, "1.500 -> 4.250 of 20 in block 2, fits"),
        ([MORE], 0, "1.500 -> 4.250 of 20 in block 0, fits"),
    ],
)
def test_a_plan_tells_of_which_block_its_figures_are(server: Server, more: list[str], block: int, told: str) -> None:
    quote = {**PLAN["quote"], "block": block}
    server.on("/v1/plans", {**PLAN, "training": {**SPEC, "with_datasets": more}, "quote": quote})
    with server.client() as client:
        plan = client.plan(DATASET, target="y")
    assert told in str(plan)
    assert ("2 together, each charged to a block of its own" in str(plan)) == bool(more)


def test_what_was_planned_on_several_is_started_on_them(server: Server) -> None:
    server.on("/v1/plans", {**PLAN, "training": {**SPEC, "with_datasets": [MORE]}})
    server.on("/v1/jobs", _refused)
    with server.client() as client, pytest.raises(cloister.BudgetExceeded) as refused:
        client.train(client.plan([DATASET, MORE], target="y"), model="m")
    (started,) = server.requests("/v1/jobs")
    assert json.loads(started.content)["training"]["with_datasets"] == [MORE]
    assert refused.value.details["block"] == 1


def _refused(_: httpx2.Request) -> httpx2.Response:
    return refusal(409, "budget_exceeded", "it does not fit", left=1.5, block=1)
