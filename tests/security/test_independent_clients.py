"""OAuth clients that are not ours find their way in, and out again: oauth4webapi and openid-client (npm), and Authlib's."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from authlib.integrations.httpx_client import OAuth2Client
from authlib.oauth2.rfc7523 import PrivateKeyJWT
from joserfc.jwk import ECKey

from cloister_server.oauth.signed import read_public_key
from cloister_server.service import Service
from keys_of_clients import Signer, b64

NODE_CLIENTS = Path(__file__).parent / "node"
SIGNERS = {"ES256": Signer(), "Ed25519": Signer.ed25519()}


@pytest.fixture(scope="session")
def apps(new_app: Any) -> dict[str, Any]:
    keyed = {name: new_app(f"by-{name}", public_key=read_public_key(signer.pem)) for name, signer in SIGNERS.items()}
    return {"secret": new_app("by-secret"), "bound": new_app("bound", dpop=True), **keyed}


def private_jwk(signer: Signer) -> dict[str, str]:
    if signer.alg == "Ed25519":
        return {**signer.jwk, "d": b64(signer.private.private_bytes_raw())}
    return {**signer.jwk, "d": b64(signer.private.private_numbers().private_value.to_bytes(32))}


def test_clients_from_npm(served: Service, apps: dict[str, Any]) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    if not (NODE_CLIENTS / "node_modules").is_dir():
        pytest.skip(f"run `npm ci` in {NODE_CLIENTS.relative_to(Path(__file__).parents[2])}")
    given: dict[str, Any] = {"issuer": served.settings.issuer}
    given |= {name: {"id": apps[name].id, "secret": apps[name].secret} for name in ("secret", "bound")}
    given |= {name: {"id": apps[name].id, "jwk": private_jwk(signer)} for name, signer in SIGNERS.items()}
    done = subprocess.run(
        [node, str(NODE_CLIENTS / "clients.mjs")], input=json.dumps(given), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert len(told) == 12
    assert {name: what for name, what in told.items() if what != "ok"} == {}


@pytest.mark.parametrize("method", ["client_secret_basic", "client_secret_post", "private_key_jwt"])
def test_authlibs_client(served: Service, apps: dict[str, Any], method: str) -> None:
    issuer = served.settings.issuer
    if method == "private_key_jwt":
        client = OAuth2Client(apps["ES256"].id, ECKey.import_key(private_jwk(SIGNERS["ES256"])))
        # What it calls the token endpoint is the audience, which is the issuer since RFC 7523 was updated.
        client.register_client_auth_method(PrivateKeyJWT(issuer, alg="ES256"))
    else:
        client = OAuth2Client(apps["secret"].id, apps["secret"].secret)
    client.token_endpoint_auth_method = client.revocation_endpoint_auth_method = method
    with client:
        found = client.request("GET", f"{issuer}/.well-known/oauth-authorization-server", withhold_token=True).json()
        token = client.fetch_token(found["token_endpoint"], grant_type="client_credentials")
        assert client.get(f"{issuer}/v1/sources").status_code == 200
        introspected = client.introspect_token(found["introspection_endpoint"], token=token["access_token"]).json()
        assert introspected["active"] is True
        assert client.revoke_token(found["revocation_endpoint"], token=token["access_token"]).status_code == 200
        assert client.get(f"{issuer}/v1/sources").status_code == 401
