"""A person with a browser and an authenticator app, against a deployment of a test: forms are read from pages and sent back."""

from __future__ import annotations

import base64
import hashlib
import html
import re
import secrets
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from asked import asked_writing
from cloister_server import people, tenants
from cloister_server.oauth import totp
from cloister_server.service import Service
from cloister_server.store.identities import User

PASSPHRASE = "four words nobody guesses"
REDIRECT = "http://127.0.0.1/callback"
FORM = re.compile(r'<form method="post" action="([a-z-]+)">(.*?)</form>', re.S)
INPUT = re.compile(r'<input[^>]*?name="([a-z_]+)"[^>]*?value="([^"]*)"')


def forms(page: str) -> dict[str, dict[str, str]]:
    """Action -> the fields of each form, as the page fills them."""
    return {
        action: {name: html.unescape(value) for name, value in INPUT.findall(content)}
        for action, content in FORM.findall(page)
    }


@dataclass
class Pkce:
    """A verifier, and the challenge that goes before it (RFC 7636)."""

    verifier: str = field(default_factory=lambda: secrets.token_urlsafe(32))

    @property
    def challenge(self) -> str:
        return base64.urlsafe_b64encode(hashlib.sha256(self.verifier.encode()).digest()).rstrip(b"=").decode()


@dataclass
class Human:
    """Somebody who has an account, or is to have one."""

    service: Service
    http: Any
    """Their browser: keeps cookies."""
    account: str
    id: str
    invitation: str = ""
    secret: bytes = b""
    passphrase: str = PASSPHRASE
    step: int = 0

    def code(self) -> str:
        """One that was not shown before: the database forgets the last one, since no test waits for the clock."""
        with asked_writing(self.service) as session:
            tenant_id = next(t.id for t in tenants.tenants(session) if t.name == self.account.partition("/")[0])
            user = session.get(User, (tenant_id, self.id))
            if user is not None:
                user.totp_step = 0
        return totp.code_at(self.secret, int(time.time()) // totp.STEP_S)

    def send(self, action: str, fields: dict[str, str], **more: Any) -> Any:
        return self.http.post(f"/oauth/{action}", data=fields, follow_redirects=False, **more)

    def enrol(self) -> Human:
        """Take up the invitation."""
        first = forms(self.http.get("/oauth/invitation").text)["invitation"]
        shown = self.send("invitation", first | {"account": self.account, "invitation": self.invitation})
        assert shown.status_code == 200, shown.text
        key = html.unescape(shown.text).split("<output>")[1].split("</output>")[0].replace(" ", "")
        self.secret = base64.b32decode(key)
        chosen = {"passphrase": self.passphrase, "again": self.passphrase, "code": self.code()}
        done = self.send("invitation", forms(shown.text)["invitation"] | chosen)
        assert done.status_code == 200 and "set up" in done.text, done.text
        return self

    def sign_in(self, page: Any, **wrong: str) -> Any:
        """Send the sign-in form of this page, right but for what is given."""
        right = {"account": self.account, "passphrase": self.passphrase}
        if "code" not in wrong:
            right["code"] = self.code()
        return self.send("sign-in", forms(page.text)["sign-in"] | right | wrong)

    def asked(self, **query: str) -> Any:
        """The page that an app's request leads to, after signing in."""
        page = self.http.get("/oauth/authorize", params=query, follow_redirects=False)
        if "sign-in" not in forms(page.text):
            return page
        signed_in = self.sign_in(page)
        assert signed_in.status_code == 303, signed_in.text
        parts = urlsplit(signed_in.headers["location"])
        return self.http.get(f"{parts.path}?{parts.query}", follow_redirects=False)

    def decide(self, page: Any, decision: str = "allow") -> dict[str, str]:
        """What the app is told, once the person has decided."""
        answer = self.send("consent", forms(page.text)["consent"] | {"decision": decision})
        assert answer.status_code == 303, answer.text
        return told(answer)

    def authorize(self, app: Any, pkce: Pkce, redirect_uri: str = REDIRECT, **more: str) -> dict[str, str]:
        return self.decide(self.asked(**request(app, pkce, redirect_uri, **more)))


def request(app: Any, pkce: Pkce, redirect_uri: str = REDIRECT, **more: str) -> dict[str, str]:
    """An app's right request, but for what is given; what is given as '' is left out."""
    right = {
        "response_type": "code",
        "client_id": app.id,
        "redirect_uri": redirect_uri,
        "code_challenge": pkce.challenge,
        "code_challenge_method": "S256",
        "state": "a state",
    }
    return {name: value for name, value in (right | more).items() if value}


def told(answer: Any) -> dict[str, str]:
    """The parameters that a redirect brings back to the app."""
    return {name: value[0] for name, value in parse_qs(urlsplit(answer.headers["location"]).query).items()}


def invited(service: Service, http: Any, name: str, *, tenant: str = "acme", role: Any = "steward") -> Human:
    """Somebody of a tenant, which is made where there is none of its name."""
    with asked_writing(service) as session:
        found = next((each for each in tenants.tenants(session) if each.name == tenant), None)
        made = found or tenants.create_tenant(session, service.keys, name=tenant, request_id="request-of-a-test")
        session.flush()
        operator = tenants.operator_of(made, request_id="request-of-a-test")
        invitation = people.create(session, service, operator, name=name, role=role)
    return Human(service, http, invitation.account, invitation.user_id, invitation.code.get_secret_value())


def exchanged(http: Any, app: Any, pkce: Pkce, code: str, redirect_uri: str = REDIRECT, **more: str) -> Any:
    """The token endpoint's answer to a code; what is given as '' is left out."""
    right = {
        "grant_type": "authorization_code",
        "client_id": app.id,
        "code": code,
        "redirect_uri": redirect_uri,
        "code_verifier": pkce.verifier,
    }
    return http.post("/oauth/token", data={name: value for name, value in (right | more).items() if value})


def refreshed(http: Any, client_id: str, token: str, **more: Any) -> Any:
    form = {"grant_type": "refresh_token", "client_id": client_id, "refresh_token": token}
    return http.post("/oauth/token", data=form, **more)


def query(**parameters: str) -> str:
    return urlencode(parameters)


def allowed(human: Human, url: str, decision: str = "allow") -> str:
    """Where the browser ends when the person goes to an app's or a device's page, and decides on what is asked there."""
    parts = urlsplit(url)
    page = human.http.get(f"{parts.path}?{parts.query}")
    if "sign-in" in forms(page.text):
        assert human.sign_in(page).status_code == 303
        page = human.http.get(f"{parts.path}?{parts.query}")
    if parts.path.endswith("/device"):
        shown = human.send("device", forms(page.text)["device"])
        done = human.send("device", forms(shown.text)["device"] | {"decision": decision})
        assert done.status_code == 200, done.text
        return url
    answer = human.send("consent", forms(page.text)["consent"] | {"decision": decision})
    assert answer.status_code == 303, answer.text
    return str(answer.headers["location"])
