"""A tenant whose ledger is behind its anchor waits, and keeps nobody else waiting; once it is mended its job goes on."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

import cloister
from cloister import queries
from harness import App, Deployment
from journeys import SQLITE, upload

pytestmark = pytest.mark.parametrize("deployment", [SQLITE], indirect=True)


@pytest.mark.long
def test_a_frozen_tenant_keeps_nobody_else_waiting(
    client: cloister.Cloister, deployment: Deployment, app: App, digits: dict[str, np.ndarray]
) -> None:
    rows = {name: column[:400] for name, column in digits.items()}
    frozen = deployment.app(deployment.tenant(f"frozen{app.tenant[1:]}"), "steward")
    with deployment.client(frozen) as other:
        theirs = upload(other, rows)
        job = other.train(other.plan(theirs, target="digit", privacy=cloister.DP(epsilon=10), epochs=60), model="slow")
        while job.refresh().steps_done == 0:
            time.sleep(0.2)
        anchor = next(deployment.root.rglob(f"anchors/{frozen.tenant_id}.json"))
        ahead = json.loads(anchor.read_text())
        anchor.write_text(json.dumps({**ahead, "count": ahead["count"] + 1000}))

        data = upload(client, rows)
        (counted,) = client.queries.ask(data, [queries.Count()], epsilon=1.0).wait(timeout_s=60)
        assert abs(counted.count - 400) < 40
        with pytest.raises(cloister.APIError) as refused:
            other.sources.create("more-people", epsilon=1, delta=1e-5)
        assert refused.value.code == "ledger_rolled_back"
        assert job.refresh().status == "running", "it waits"

        anchor.write_text(json.dumps(ahead))
        assert isinstance(job.wait(timeout_s=120), cloister.Model)
