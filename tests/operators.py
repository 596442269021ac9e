"""An operator with a browser and a command line of their own making: from the first-admin token to a bound token of scope `admin`."""

from __future__ import annotations

import base64
import html
from dataclasses import dataclass, field
from typing import Any

from cloister_server import operators
from cloister_server.service import Service
from cloister_server.store.acting import ALL_TENANTS
from keys_of_clients import Signer
from people import Human, forms

DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
ADMIN_CLIENT = "cloister-admin"


def first_operator(service: Service, browser: Any, *, token: str, name: str = "ada") -> Human:
    """Redeem the token in a browser, and choose a passphrase and a second factor on the page that follows."""
    asked = forms(browser.get("/oauth/first-admin").text)["first-admin"]
    shown = browser.post("/oauth/first-admin", data=asked | {"first_admin_token": token, "name": name})
    assert shown.status_code == 200 and "authenticator" in shown.text, shown.text
    fields = forms(shown.text)["invitation"]
    human = Human(service, browser, f"operators/{name}", _id_of(service, name), fields["invitation"])
    key = html.unescape(shown.text).split("<output>")[1].split("</output>")[0].replace(" ", "")
    human.secret = base64.b32decode(key)
    chosen = {"passphrase": human.passphrase, "again": human.passphrase, "code": human.code()}
    assert "set up" in human.send("invitation", fields | chosen).text
    return human


def _id_of(service: Service, name: str) -> str:
    with_name = service.read(
        ALL_TENANTS, lambda session: [each for each in operators.listed(session) if each.name == name]
    )
    return str(with_name[0].id)


def begun(http: Any, client_id: str = ADMIN_CLIENT, scope: str = "admin", **more: str) -> Any:
    """The device authorization endpoint's answer."""
    form = {"client_id": client_id, "scope": scope} | more
    return http.post("/oauth/device_authorization", data={name: value for name, value in form.items() if value})


def page_of(human: Human, user_code: str) -> Any:
    """The page that asks about a code, once its person has signed in and typed it in."""
    page = human.http.get("/oauth/device")
    if "sign-in" in forms(page.text):
        assert human.sign_in(page).status_code == 303
        page = human.http.get("/oauth/device")
    return human.send("device", forms(page.text)["device"] | {"user_code": user_code})


def allowed(human: Human, user_code: str, **more: str) -> Any:
    """The answer to the person's yes, with the next code of the second factor unless another is given."""
    fields = forms(page_of(human, user_code).text)["device"]
    return human.send("device", fields | {"decision": "allow", "code": human.code()} | more)


@dataclass
class Operating:
    """A login of an operator's, whose tokens are bound to a key."""

    http: Any
    issuer: str
    signer: Signer = field(default_factory=Signer)
    token: str = ""
    refresh_token: str = ""

    def log_in(self, human: Human) -> Operating:
        device = begun(self.http).json()
        assert "Allowed" in allowed(human, device["user_code"]).text
        answer = self.redeem(grant_type=DEVICE_GRANT, device_code=device["device_code"])
        assert answer.status_code == 200 and answer.json()["scope"] == "admin", answer.text
        self.token, self.refresh_token = (answer.json()[f"{kind}_token"] for kind in ("access", "refresh"))
        return self

    def redeem(self, *, signer: Signer | None = None, is_bound: bool = True, **form: str) -> Any:
        proof = (signer or self.signer).proof("POST", f"{self.issuer}/oauth/token")
        headers = {"DPoP": proof} if is_bound else {}
        return self.http.post("/oauth/token", data={"client_id": ADMIN_CLIENT} | form, headers=headers)

    def headers(
        self, path: str, *, method: str = "POST", scheme: str = "DPoP", signer: Signer | None = None
    ) -> dict[str, str]:
        proof = (signer or self.signer).proof(method, f"{self.issuer}{path}", self.token)
        return {"Authorization": f"{scheme} {self.token}", "DPoP": proof}

    def ask(self, name: str, request: dict[str, Any] | None = None, *, key: str = "", **more: Any) -> Any:
        """The API's answer to an operation."""
        headers = self.headers(f"/v1/admin/{name}") | ({"Idempotency-Key": key} if key else {})
        return self.http.post(f"/v1/admin/{name}", json={"request": request or {}} | more, headers=headers)
