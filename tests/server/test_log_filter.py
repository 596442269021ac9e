"""What libraries print below a warning stays out of the log, at every level of it: some of them print secrets."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from typing import Any

import pytest

NOBODY = "http://127.0.0.1:9"


def logged(script: str) -> list[dict[str, Any]]:
    """The log of a process of its own, at the level DEBUG, in which `script` runs."""
    start = "import logging\nfrom cloister_server import logs\nfrom cloister_server.settings import Settings\n"
    start += 'logs.configure(Settings(log_level="debug"))\n'
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", start + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_aws_library_prints_no_key_that_it_is_given() -> None:
    pytest.importorskip("boto3", reason="boto3 is not installed: pip install 'cloister[aws]'")
    script = f"""
        import boto3, botocore.config, botocore.exceptions
        config = botocore.config.Config(retries={{"total_max_attempts": 1}})
        account = {{"aws_access_key_id": "AKIAIOSFODNN7EXAMPLE", "aws_secret_access_key": "of-tests"}}
        kms = boto3.client("kms", endpoint_url="{NOBODY}", region_name="eu-central-1", config=config, **account)
        # filtered
        logging.getLogger("a.neighbour").debug("still here")
        try:
            kms.encrypt(KeyId="alias/a", Plaintext=b"a data key of a tenant")
        except botocore.exceptions.EndpointConnectionError:
            logging.getLogger("botocore.hooks").warning("told")
        else:
            raise SystemExit("somebody listens there")
    """
    assert [line["event"] for line in logged(script)] == ["still here", "told"]
    bare = logged(script.replace("# filtered", "logging.getLogger().handlers[0].filters.clear()"))
    assert "YSBkYXRhIGtleSBvZiBhIHRlbmFudA==" in json.dumps(bare), "without the filter the key is there, in base64"


@pytest.mark.parametrize(
    "library",
    ["authlib", "boto3", "botocore", "h11", "httpcore2", "httpx2", "hvac", "requests", "s3transfer", "urllib3"],
)
def test_a_library_that_may_print_secrets_is_heard_from_a_warning_on(library: str) -> None:
    script = f"""
        for name in ("{library}", "{library}.a.part", "{library}ish"):
            logging.getLogger(name).setLevel(logging.DEBUG)
            for level in (logging.DEBUG, logging.INFO, logging.WARNING):
                logging.getLogger(name).log(level, "said")
    """
    told = [(line["logger"], line["level"]) for line in logged(script)]
    assert told == [(library, "warning"), (f"{library}.a.part", "warning")] + [
        (f"{library}ish", level) for level in ("debug", "info", "warning")
    ]
