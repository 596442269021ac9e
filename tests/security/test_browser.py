"""The pages in a real browser, with scripts off: forms, cookies, policies and redirects as Chromium takes them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx2
import pytest

from cloister_server.service import Service
from people import Human, Pkce, exchanged, request

NODE_CLIENTS = Path(__file__).parent / "node"
BACK = "http://127.0.0.1:9/callback"
"""Where nothing listens: the browser's own request there is what is looked at."""


@pytest.mark.long
def test_a_browser_signs_in_allows_an_app_and_a_device(served: Service, new_app: Any, online: Human) -> None:
    node, chromium = shutil.which("node"), shutil.which("chromium")
    if node is None or chromium is None:
        pytest.skip("node or chromium is not installed")
    if not (NODE_CLIENTS / "node_modules" / "playwright-core").is_dir():
        pytest.skip(f"run `npm ci` in {NODE_CLIENTS.relative_to(Path(__file__).parents[2])}")
    issuer, pkce = served.settings.issuer, Pkce()
    app = new_app("in-a-browser", role="none", public=True, redirect_uris=["http://127.0.0.1/callback"])
    device = httpx2.post(f"{issuer}/oauth/device_authorization", data={"client_id": "cloister-cli"}, timeout=60).json()
    given = {
        "chromium": chromium,
        "authorize": f"{issuer}/oauth/authorize?{urlencode(request(app, pkce, BACK))}",
        "device": device["verification_uri_complete"],
        "redirect_uri": BACK,
        "account": online.account,
        "passphrase": online.passphrase,
        "code": online.code(),
    }
    done = subprocess.run(
        [node, str(NODE_CLIENTS / "browser.mjs")], input=json.dumps(given), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["complaints"] == [] and told["heading"] == "Allowed"
    back = {name: value[0] for name, value in parse_qs(urlsplit(told["back"]).query).items()}
    assert back["iss"] == issuer and back["state"] == "a state"
    assert exchanged(online.http, app, pkce, back["code"], BACK).status_code == 200
