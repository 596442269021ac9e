"""A customer that holds its key in a KMS of its own: it withdraws the key and is served no more, and nobody else notices."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

import cloister
from certificates import CERTIFICATE
from cloister.wire.architecture import Architecture
from cloister.wire.certificate import sign
from cloister.wire.layers import Encode, Flatten, Linear
from cloister_privacy.architecture import build, to_bytes
from cloister_server import vault
from cloister_server.store.tables import Model, ModelVersion, new_id
from harness import App, Deployment
from journeys import COLUMNS, upload
from key_providers import ACCOUNT, kms_server

pytestmark = pytest.mark.long

KEPT_S, PATIENCE_S = 2, 2
"""How long a key is trusted, and how long the KMS is waited for."""


@dataclass(frozen=True)
class Served:
    """A deployment with a tenant whose key is in its own KMS and one whose key is here, and a model of each."""

    deployment: Deployment
    kms_url: str
    kms: Any
    """As the customer reaches it, and not the service."""
    key_id: str
    customer: App
    model: cloister.Model
    bystander_url: str
    bystander_token: str
    rows: np.ndarray

    def bystander_answers(self) -> None:
        answer = httpx2.post(
            self.bystander_url,
            json={"inputs": [{"name": "scan", "shape": [1, 8, 8], "datatype": "FP32", "data": self.rows[0].ravel().tolist()}]},
            headers={"Authorization": f"Bearer {self.bystander_token}"},
            timeout=60.0,
        )  # fmt: skip
        assert answer.status_code == 200, answer.text

    def refused_after(self, kind: type[cloister.APIError], *, within_s: float) -> tuple[cloister.APIError, float]:
        """The refusal of the customer's predictions, and how long it went on without; the other is answered all the while."""
        began = time.monotonic()
        while time.monotonic() - began < within_s:
            try:
                self.model.predict(self.rows[:2])
            except kind as refusal:
                return refusal, time.monotonic() - began
            self.bystander_answers()
        raise AssertionError(f"predictions went on for {within_s} s")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, digits: dict[str, np.ndarray]) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("customer")
    with kms_server(root) as kms_url:
        import boto3  # there where the server above is

        file = root / "providers.json"
        file.touch(mode=0o600)
        credentials = {name: ACCOUNT[name] for name in ("access_key_id", "secret_access_key")}
        kms = boto3.client(
            "kms",
            endpoint_url=kms_url,
            region_name=ACCOUNT["region"],
            **{f"aws_{name}": value for name, value in credentials.items()},
        )
        key_arn = kms.create_key(KeyUsage="ENCRYPT_DECRYPT", KeySpec="SYMMETRIC_DEFAULT")["KeyMetadata"]["Arn"]
        customers = {
            "kind": "aws_kms_held", "key_arn": key_arn, "endpoint_url": kms_url, "timeout_s": PATIENCE_S, **credentials,
        }  # fmt: skip
        file.write_text(
            json.dumps(
                {"format": "cloister.key-providers/1", "default": "local", "providers": {"customers-kms": customers}}
            )
        )
        deployment = Deployment(
            root / "cloister",
            chunk_steps=10_000,  # each chunk has a key of its own, for which the KMS is asked
            extra_env={
                "CLOISTER_KEY_PROVIDERS": str(file),
                "CLOISTER_KEY_CACHE_S": str(KEPT_S),
                "CLOISTER_STRICT": "1",
            },
        ).init()
        try:
            deployment.start()
            deployment.admin("tenant", "create", "customer", "--key-provider", "customers-kms")
            customer = deployment.app("customer", "steward")
            bystander = deployment.app(deployment.tenant("bystander"), "steward")
            with deployment.client(customer, max_retries=0) as client:
                data = upload(client, {name: column[:1200] for name, column in digits.items()})
                plan = client.plan(data, target="digit", privacy=cloister.DP(noise_multiplier=2.0), epochs=1)
                model = client.train(plan, model="reader").wait(timeout_s=120)
                url = f"{deployment.url}/v2/models/{_published(deployment, bystander)}/infer"
                yield Served(
                    deployment, kms_url, kms, key_arn.rpartition("/")[2], customer, model, url,
                    deployment.token(bystander), digits["scan"],
                )  # fmt: skip
        finally:
            deployment.kill()


def _published(deployment: Deployment, app: App) -> str:
    """A certified model of the app's tenant, for which nobody waits until it is trained."""
    spec = Architecture(
        inputs={"scan": COLUMNS["scan"]},
        layers=(Encode(), Flatten(), Linear(in_features=64, out_features=10)),
        target="digit",
        output=COLUMNS["digit"],
        loss="cross_entropy",
    )
    body = to_bytes(build(spec))
    with deployment._operating() as (service, session):
        model = Model(tenant_id=app.tenant_id, id=new_id("mdl"), name="reader", champion=1)
        session.add(model)
        session.flush()
        key_id, private_key = vault.certificate_signer(session, service.keys)
        certificate = CERTIFICATE.model_copy(
            update={
                "tenant": app.tenant_id,
                "model": model.id,
                "version": 1,
                "weights_digest": hashlib.sha256(body).hexdigest(),
                "architecture_digest": hashlib.sha256(spec.model_dump_json().encode()).hexdigest(),
            }
        )
        row = ModelVersion(
            tenant_id=app.tenant_id,
            model_id=model.id,
            version=1,
            job_id=new_id("job"),
            weights_id=vault.seal_object(session, service.blobs, body, tenant_id=app.tenant_id, kind="weights"),
            certificate=sign(certificate, private_key=private_key, key_id=key_id),
        )
        session.add(row)
        return model.id


def test_a_customer_that_disables_its_key_is_served_no_more_in_time_and_again_when_it_enables_it(
    served: Served,
) -> None:
    assert served.model.predict(served.rows[:2]).shape == (2,)
    served.bystander_answers()
    served.kms.disable_key(KeyId=served.key_id)
    refusal, after_s = served.refused_after(cloister.TenantKeyRefused, within_s=20)
    assert after_s <= KEPT_S + 1, "as long as docs/keys.md says, and the length of a request"
    assert (refusal.status, refusal.code) == (403, "tenant_key_refused")
    assert isinstance(refusal, cloister.PermissionDenied)
    with pytest.raises(cloister.TenantKeyRefused):
        served.model.predict(served.rows[:2])
    served.bystander_answers()
    served.kms.enable_key(KeyId=served.key_id)
    assert served.model.predict(served.rows[:2]).shape == (2,)


def test_a_job_whose_key_is_withdrawn_waits_for_it_and_fails_not(served: Served) -> None:
    with served.deployment.client(served.customer) as client:
        plan = client.plan(
            client.datasets.get("digits"), target="digit", privacy=cloister.DP(noise_multiplier=2.0), epochs=1
        )
        job = client.train(plan, model="second")
        served.kms.disable_key(KeyId=served.key_id)
        try:
            deadline = time.monotonic() + 60
            while "attempt.no_key" not in served.deployment.log.read_text() and time.monotonic() < deadline:
                time.sleep(0.2)
            assert "attempt.no_key" in served.deployment.log.read_text()
            assert job.refresh().status in ("queued", "running")
        finally:
            served.kms.enable_key(KeyId=served.key_id)
        assert job.wait(timeout_s=120).version == 1


def test_while_the_kms_is_away_its_customer_is_told_so_and_is_served_when_it_is_back(served: Served) -> None:
    assert served.model.predict(served.rows[:2]).shape == (2,)
    with _stopped(served.kms_url):
        refusal, after_s = served.refused_after(cloister.ServerFault, within_s=20)
        assert after_s <= KEPT_S + PATIENCE_S + 1
        assert (refusal.status, refusal.code) == (503, "unavailable")
        assert "key provider" in refusal.message
        served.bystander_answers()
    assert served.model.predict(served.rows[:2]).shape == (2,)


def test_in_strict_mode_a_certified_model_is_evaluated(served: Served, digits: dict[str, np.ndarray]) -> None:
    held = {name: column[1200:] for name, column in digits.items()}
    with served.deployment.client(served.customer) as client:
        (source,) = client.sources.list()
        test = client.datasets.upload("held-out", held, source=source, columns=COLUMNS, nominal_size=600, capacity=600)
        (result,) = client.queries.evaluate(client.models.get("reader"), test, epsilon=4.0).wait()
    assert result.type == "class_evaluation" and result.accuracy is not None
    exact = float(np.mean(served.model.predict(held["scan"]) == held["digit"]))
    assert abs(result.accuracy - exact) < 0.1


@contextmanager
def _stopped(url: str) -> Iterator[None]:
    """The KMS takes connections and answers none: its process is stopped, and goes on afterwards with the keys it had."""
    port = url.rsplit(":", 1)[1]
    (pid,) = [
        int(each.name)
        for each in Path("/proc").iterdir()
        if each.name.isdigit() and _is_moto(each) and _listens(each, int(port))
    ]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _is_moto(process: Path) -> bool:
    """A child of ours that is moto's server."""
    try:
        parent = int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
        return parent == os.getpid() and b"moto.server" in (process / "cmdline").read_bytes()
    except OSError:
        return False


def _listens(process: Path, port: int) -> bool:
    """Whether a listening socket of this port is among its files (proc(5), /proc/net/tcp)."""
    sockets = {
        line.split()[9]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and int(line.split()[1].split(":")[1], 16) == port
    }
    return any(
        str(each.readlink()) in {f"socket:[{inode}]" for inode in sockets} for each in (process / "fd").iterdir()
    )
