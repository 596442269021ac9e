"""OAuth clients that are not ours find their way in, and out again: oauth4webapi and openid-client (npm), and Authlib's."""

from __future__ import annotations

import json
import secrets
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
from people import REDIRECT, Human, allowed

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


@pytest.fixture(scope="session")
def node() -> str:
    """Where node is, with the packages that its scripts need."""
    found = shutil.which("node")
    if found is None:
        pytest.skip("node is not installed")
    if not (NODE_CLIENTS / "node_modules").is_dir():
        pytest.skip(f"run `npm ci` in {NODE_CLIENTS.relative_to(Path(__file__).parents[2])}")
    return found


def test_clients_from_npm(node: str, served: Service, apps: dict[str, Any]) -> None:
    given: dict[str, Any] = {"issuer": served.settings.issuer}
    given |= {name: {"id": apps[name].id, "secret": apps[name].secret} for name in ("secret", "bound")}
    given |= {name: {"id": apps[name].id, "jwk": private_jwk(signer)} for name, signer in SIGNERS.items()}
    done = subprocess.run(
        [node, str(NODE_CLIENTS / "clients.mjs")], input=json.dumps(given), capture_output=True, text=True, timeout=300
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


@pytest.fixture
def for_people(new_app: Any) -> dict[str, Any]:
    name, registered = secrets.token_hex(4), [REDIRECT]
    return {
        "public": new_app(f"public-{name}", role="none", public=True, redirect_uris=registered),
        "secret": new_app(f"secret-{name}", redirect_uris=registered),
    }


def test_clients_from_npm_act_for_a_person(
    node: str, served: Service, online: Human, for_people: dict[str, Any]
) -> None:
    given = {"issuer": served.settings.issuer, "redirect_uri": REDIRECT, "person": online.id}
    given |= {name: {"id": app.id, "secret": app.secret} for name, app in for_people.items()}
    command = [node, str(NODE_CLIENTS / "people.mjs")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(given) + "\n")
        said: dict[str, str] = {}
        for line in process.stdout:
            said = json.loads(line)
            if "visit" in said:
                process.stdin.write(json.dumps(allowed(online, said["visit"])) + "\n")
    assert process.returncode == 0 and len(said) == 8
    assert {name: what for name, what in said.items() if what != "ok"} == {}


def test_authlibs_client_acts_for_a_person(served: Service, online: Human, for_people: dict[str, Any]) -> None:
    issuer, app = served.settings.issuer, for_people["public"]
    client = OAuth2Client(
        app.id, token_endpoint_auth_method="none", code_challenge_method="S256", redirect_uri=REDIRECT
    )
    with client:
        found = client.request("GET", f"{issuer}/.well-known/oauth-authorization-server", withhold_token=True).json()
        verifier = secrets.token_urlsafe(48)
        url, state = client.create_authorization_url(found["authorization_endpoint"], code_verifier=verifier)
        first = client.fetch_token(
            found["token_endpoint"], authorization_response=allowed(online, url), code_verifier=verifier, state=state
        )
        assert client.get(f"{issuer}/v1/sources").status_code == 200
        second = client.refresh_token(found["token_endpoint"], refresh_token=first["refresh_token"])
        assert second["refresh_token"] != first["refresh_token"]
        assert client.get(f"{issuer}/v1/sources").status_code == 200
        client.revocation_endpoint_auth_method = "none"
        client.revoke_token(found["revocation_endpoint"], token=second["refresh_token"])
        assert client.get(f"{issuer}/v1/sources").status_code == 401
