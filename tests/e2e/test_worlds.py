"""Two worlds: the same script against D and D' (half the rows) tells everyone but the uploader the same, byte for byte.

Apart from ids, clocks, ciphertext (signatures) and outputs that were charged for.
"""

from __future__ import annotations

import base64
import json
import re
import time
from typing import Any

import httpx2
import numpy as np
import pytest

from harness import Deployment
from journeys import COLUMNS, POSTGRES_LONG, SQLITE

ID = re.compile(r"\b[a-z]{2,4}_[0-9a-f]{32}\b")
CLOCK = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)")


_OF_THE_TRANSPORT = ("date", "content-length", "connection")
"""Headers that are not ours: clocks, what the body tells anyway, and whether the connection is kept."""


@pytest.mark.parametrize("deployment", [SQLITE, POSTGRES_LONG], indirect=True)
def test_half_the_rows_change_no_byte_that_others_see(deployment: Deployment, digits: dict[str, np.ndarray]) -> None:
    worlds = []
    for tenant, count in (("whole", 1600), ("half", 800)):
        rows = {column: values[:count] for column, values in digits.items()}
        deployment.tenant(tenant)
        worlds.append(_script(deployment, tenant, rows))
    (seen, disk), (seen_in_half, disk_in_half) = worlds
    assert len(seen) > 15
    for one, other in zip(seen, seen_in_half, strict=True):
        assert one == other
    assert len(disk) > 3
    assert disk == disk_in_half, "the sealed sizes tell the row count"


def _script(deployment: Deployment, tenant: str, rows: dict[str, np.ndarray]) -> tuple[list[str], list[int]]:
    """What an observer with every right asks for, in order, as it was answered; and the sizes of all sealed objects."""
    uploader, observer = deployment.app(tenant, "uploader"), deployment.app(tenant, "observer")
    with deployment.client(uploader) as client:
        source = client.sources.create("people", epsilon=40, delta=1e-5)
        data = client.datasets.upload("d", rows, source=source, columns=COLUMNS, nominal_size=1000, capacity=2000)
    seen: list[str] = []
    with httpx2.Client(
        base_url=deployment.url, timeout=60, headers={"Authorization": f"Bearer {deployment.token(observer)}"}
    ) as http:

        def ask(method: str, path: str, **more: Any) -> Any:
            answer = http.request(method, path, headers={"X-Request-Id": "request-of-a-world"}, **more)
            seen.append(_normalised(f"{method} {path}", answer))
            return answer.json()

        for path in ("sources", f"sources/{source.id}", "datasets", f"datasets/{data.id}", "jobs", "models"):
            ask("GET", f"/v1/{path}")
        ask("PUT", f"/v1/datasets/{data.id}/parts/0", content=b"x")
        ask("POST", f"/v1/datasets/{data.id}/complete")
        asked = {"dataset": data.id, "target": "digit", "privacy": {"epsilon": 3}, "epochs": 2}
        plan = ask("POST", "/v1/plans", json=asked)
        ask("POST", "/v1/plans", json={**asked, "batch_size": 1001})
        ask("POST", "/v1/plans", json={**asked, "target": "nothing"})
        job = ask("POST", "/v1/jobs", json={"training": plan["training"], "model": "m"})
        ask("POST", "/v1/jobs", json={"training": {**plan["training"], "nominal_size": 999}, "model": "m"})
        ask("POST", "/v1/jobs", json={"training": {**plan["training"], "noise_multiplier": 0.3}, "model": "m"})
        asked_of_rows = {"dataset": data.id, "queries": [{"type": "count"}], "epsilon": 0.5}
        ask("POST", "/v1/queries/price", json=asked_of_rows)
        ask("POST", "/v1/queries", json={"query": {**asked_of_rows, "epsilon": 1000}})
        query = ask("POST", "/v1/queries", json={"query": asked_of_rows})
        while http.get(f"/v1/jobs/{job['id']}").json()["status"] not in ("done", "failed"):
            time.sleep(0.2)
        while http.get(f"/v1/jobs/{query['id']}").json()["status"] not in ("done", "failed"):
            time.sleep(0.2)
        for path in (f"jobs/{job['id']}", f"sources/{source.id}", "models", "models/m", "models/m/versions"):
            ask("GET", f"/v1/{path}")
        for path in (f"jobs/{query['id']}", f"sources/{source.id}/ledger", f"queries/{query['id']}/answer"):
            ask("GET", f"/v1/{path}")
        ask("GET", "/v2/models/m")
        scan = {"name": "scan", "shape": [1, 8, 8], "datatype": "FP32", "data": [1.0] * 64}
        ask("POST", "/v2/models/m/infer", json={"inputs": [scan]})
        ask("POST", "/v2/models/m/infer", json={"inputs": [{**scan, "shape": [2, 8, 8]}]})
    return seen, _sizes_on_disk(deployment, observer.tenant_id)


def _normalised(request: str, answer: httpx2.Response) -> str:
    """The answer without ids, clocks, ciphertext and charged outputs."""
    body = answer.json()
    for version in body.get("items", []) if isinstance(body, dict) else []:
        if "certificate" in version:
            payload = json.loads(base64.b64decode(version["certificate"]["payload"]))
            predicate = payload["predicate"]
            payload["subject"] = predicate["weights_digest"] = predicate["initial_digest"] = "<charged>"
            predicate["sealed_digest"] = "<ciphertext>"
            for event in predicate["events"]:  # of rows that hold ids and clocks
                event["digest"] = "<id>"
            version["certificate"] = payload
    for result in body.get("results", []) if isinstance(body, dict) else []:
        result["count"] = "<charged>"
    if "outputs" in body and request.endswith("/infer"):
        for output in body["outputs"]:
            output["data"] = "<charged>"
    headers = {name: value for name, value in answer.headers.items() if name not in _OF_THE_TRANSPORT}
    text = f"{request} {answer.status_code} {json.dumps(headers)} {json.dumps(body)}"
    return CLOCK.sub("<clock>", ID.sub("<id>", text))


def _sizes_on_disk(deployment: Deployment, tenant_id: str) -> list[int]:
    objects = (deployment.data_dir / "objects" / tenant_id).iterdir()
    return sorted(path.stat().st_size for path in objects)
