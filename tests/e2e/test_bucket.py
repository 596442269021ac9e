"""The main job with every sealed object in an S3 bucket, on a real server that speaks S3: upload, train, predict, collect."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cloister
from harness import Deployment
from journeys import upload
from key_providers import ACCOUNT, kms_server

SECRET = "a-secret-access-key-of-the-bucket"


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[tuple[str, Any]]:
    """The endpoint, and what looks into the bucket from outside."""
    (tmp_path / "moto").mkdir()
    with kms_server(tmp_path / "moto") as url:
        import boto3

        outside = boto3.client(
            "s3",
            endpoint_url=url,
            region_name=ACCOUNT["region"],
            aws_access_key_id=ACCOUNT["access_key_id"],
            aws_secret_access_key=SECRET,
        )
        outside.create_bucket(Bucket="sealed", CreateBucketConfiguration={"LocationConstraint": ACCOUNT["region"]})
        yield url, outside


@pytest.mark.long
def test_a_model_is_trained_and_served_with_all_that_is_sealed_in_a_bucket(
    tmp_path: Path, bucket: tuple[str, Any], digits: dict[str, np.ndarray]
) -> None:
    url, outside = bucket
    deployment = Deployment(
        tmp_path / "d",
        extra_env={
            "CLOISTER_BLOB_URL": "s3://sealed/of/cloister",
            "CLOISTER_BLOB_ENDPOINT": url,
            "CLOISTER_BLOB_REGION": ACCOUNT["region"],
            "CLOISTER_BLOB_ACCESS_KEY_ID": ACCOUNT["access_key_id"],
            "CLOISTER_BLOB_SECRET_ACCESS_KEY": SECRET,
        },
    )

    def objects() -> set[str]:
        """All but the mark that the store is this deployment's."""
        found = {each["Key"] for each in outside.list_objects_v2(Bucket="sealed").get("Contents", ())}
        return found - {"of/cloister/store-id"}

    deployment.init()
    app = deployment.app(deployment.tenant("acme"), "steward")
    try:
        deployment.start()
        with deployment.client(app) as client:
            data = upload(client, {name: column[:1200] for name, column in digits.items()})
            plan = client.plan(data, target="digit", privacy=cloister.DP(epsilon=12), epochs=4)
            model = client.train(plan, model="reader").wait()
            assert model.predict(digits["scan"][1200:]).shape == (597,)
            environments = [
                Path(f"/proc/{pid}/environ").read_bytes() + Path(f"/proc/{pid}/cmdline").read_bytes()
                for pid in deployment.pids("cloister_server.")
            ]
            assert len(environments) >= 2 and not any(SECRET.encode() in each for each in environments)
        before = objects()
        assert len(before) >= 4 and all(key.startswith(f"of/cloister/{app.tenant_id}/obj_") for key in before)
        one = outside.get_object(Bucket="sealed", Key=min(before))["Body"].read()
        assert one.startswith(b"cloister.sealed/1\n")
        assert not (deployment.data_dir / "objects").exists()
        outside.put_object(Bucket="sealed", Key=f"of/cloister/{app.tenant_id}/obj_{'7' * 32}", Body=b"left over")
        outside.put_object(Bucket="sealed", Key="of/cloister/another/thing", Body=b"not ours")
        collected = deployment.admin("storage", "collect")
        assert (collected["blobs"], collected["bytes"]) == (1, 9)
        assert collected["keys"] > 0, "keys that the attempt was given and had no use for"
        assert objects() == before | {"of/cloister/another/thing"}
        quota = deployment.admin("tenant", "quota", "acme")["storage"]
        assert quota["allowed"] is None
        total = sum(each["Size"] for each in outside.list_objects_v2(Bucket="sealed")["Contents"])
        assert total * 0.99 < quota["used"] + len(b"not ours") < total * 1.01
        doctor = {row["check"]: row["state"] for row in deployment.admin("doctor")}
        assert "FAULT" not in doctor.values()
        assert SECRET not in deployment.log.read_text()
        with deployment.client(app) as client:
            assert client.models.get("reader").predict(digits["scan"][:3]).shape == (3,)
        deployment.stop()
    finally:
        deployment.kill()
