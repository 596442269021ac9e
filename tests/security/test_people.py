"""People: an account is taken up once, passphrase and code are right together or refused alike, nobody is shut out by others."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, update
from starlette.testclient import TestClient
from typer.testing import CliRunner

from asked import asked_writing
from cloister_server import people, tenants
from cloister_server.app import create_app
from cloister_server.cli.admin import cli
from cloister_server.errors import Invalid, RateLimited, Unauthenticated, Unavailable
from cloister_server.oauth import passphrases, sign_in, totp, verifier
from cloister_server.oauth.sign_in import NotSignedIn
from cloister_server.oauth.verifier import authenticate
from cloister_server.service import Service
from cloister_server.store.identities import SignInTry, User
from cloister_server.store.session import reading
from cloister_server.store.tables import AuditRow, now
from people import PASSPHRASE, Human, Pkce, exchanged, forms, invited, request

HERE = "192.0.2.1"


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passphrases, "MEMORY_KIB", 64)


@pytest.fixture
def ada(service: Service, http: TestClient) -> Human:
    return invited(service, http, "ada").enrol()


@pytest.fixture
def app(make_client: Callable[..., Any]) -> Any:
    return make_client(role="none", public=True, redirect_uris=["http://127.0.0.1/callback"])


def tried(human: Human, *, address: str = HERE, **wrong: str) -> Any:
    right = {"account": human.account, "passphrase": human.passphrase, "code": wrong.get("code") or human.code()}
    return sign_in.sign_in(human.service, **(right | wrong), address=address)


def wrong_code(human: Human) -> str:
    """Of six digits, and of no moment near this one."""
    at = int(time.time()) // totp.STEP_S
    near = {totp.code_at(human.secret, step) for step in range(at - 3, at + 4)}
    return next(code for code in (f"{n:06d}" for n in range(100)) if code not in near)


def test_totp_is_rfc_6238s() -> None:
    secret = b"12345678901234567890"  # RFC 6238, appendix B: its last six digits
    for at_s, code in ((59, "287082"), (1111111109, "081804"), (1234567890, "005924"), (20000000000, "353130")):
        assert totp.code_at(secret, at_s // totp.STEP_S) == code


def test_a_secret_is_sealed_for_one_person() -> None:
    pepper, secret = b"p" * 32, b"s" * 20
    sealed = totp.seal_secret(pepper, secret, tenant_id="tn_1", user_id="us_1")
    assert totp.open_secret(pepper, sealed, tenant_id="tn_1", user_id="us_1") == secret and secret not in sealed
    for other in ({"tenant_id": "tn_1", "user_id": "us_2"}, {"tenant_id": "tn_2", "user_id": "us_1"}):
        with pytest.raises(Exception, match="seal"):
            totp.open_secret(pepper, sealed, **other)


def test_whoever_signs_in_has_account_passphrase_and_code(ada: Human) -> None:
    assert tried(ada).id == ada.id
    with reading(ada.service.engine) as session:
        user = session.scalars(select(User)).one()
    assert (
        user.passphrase is not None and user.passphrase.startswith("$argon2id$") and PASSPHRASE not in user.passphrase
    )
    assert user.totp_sealed is not None and ada.secret not in user.totp_sealed and user.invitation_mac is None


def test_every_wrong_thing_is_refused_in_the_same_words(ada: Human, http: TestClient) -> None:
    invited(ada.service, http, "bob")
    invited(ada.service, http, "cleo").enrol()
    with asked_writing(ada.service) as session:
        operator = tenants.operator_of(tenants.find_tenant(session, "acme"), request_id="request-of-a-test")
        people.disable(session, ada.service, operator, "cleo")
    cases: dict[str, dict[str, str]] = {
        "passphrase": {"passphrase": "four words somebody guesses"},
        "code": {"code": wrong_code(ada)},
        "both": {"passphrase": "four words somebody guesses", "code": wrong_code(ada)},
        "no such person": {"account": "acme/nobody"},
        "no such tenant": {"account": "nowhere/ada"},
        "no account": {"account": ""},
        "an id": {"account": ada.id},
        "not yet taken up": {"account": "acme/bob"},
        "disabled": {"account": "acme/cleo"},
        "empty passphrase": {"passphrase": ""},
        "empty code": {"code": "   "},
        "a code with more": {"code": wrong_code(ada) + "0"},
        "not of ascii": {"code": "١٢٣٤٥٦"},
        "a long passphrase": {"passphrase": "x" * 5000},
        "a surrogate": {"passphrase": "\ud800" * 12},
    }
    words = set()
    for at, (name, wrong) in enumerate(cases.items()):
        with pytest.raises(NotSignedIn) as refused:
            tried(ada, address=f"198.51.100.{at}", **wrong)
        words.add((refused.value.message, refused.value.status, refused.value.code))
        assert tried(ada, address=f"203.0.113.{at}").id == ada.id, name
    assert len(words) == 1


def test_an_unknown_account_costs_one_derivation_as_a_known_one_does(
    ada: Human, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[bool, int]] = []
    real, real_step = passphrases.matches, totp.step_of
    monkeypatch.setattr(
        passphrases, "matches", lambda p, stored, **k: (asked.append((True, 1)), real(p, stored, **k))[1]
    )
    monkeypatch.setattr(totp, "step_of", lambda *a, **k: (asked.append((False, 1)), real_step(*a, **k))[1])
    for account in (ada.account, "acme/nobody"):
        with pytest.raises(NotSignedIn):
            tried(ada, account=account, passphrase="four words somebody guesses")
    assert asked == [(True, 1), (False, 1)] * 2
    argon2id = passphrases._of_nobody(b"p" * 32)
    with reading(ada.service.engine) as session:
        stored = session.scalars(select(User.passphrase)).one()
    assert argon2id.split("$")[:4] == str(stored).split("$")[:4], "the same cost"


def test_a_code_is_taken_once_by_whichever_of_two_comes_first(ada: Human) -> None:
    code = ada.code()
    assert tried(ada, code=code).id == ada.id
    for _ in range(2):
        with pytest.raises(NotSignedIn):
            tried(ada, code=code)
    with asked_writing(ada.service) as session:
        session.execute(update(User).values(totp_step=0))
    start = threading.Barrier(4)

    def race(at: int) -> bool:
        start.wait()
        try:
            return tried(ada, code=code, address=f"198.51.100.{at}").id == ada.id
        except (NotSignedIn, Unavailable):
            return False

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(race, range(4))) <= 1


def test_failures_make_the_next_try_wait_from_there_alone(ada: Human, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sign_in, "_FIRST_DELAY_S", 600.0)
    refusals = []
    for _ in range(6):
        with pytest.raises((NotSignedIn, RateLimited)) as refused:
            tried(ada, passphrase="four words somebody guesses")
        refusals.append(type(refused.value))
    assert refusals == [NotSignedIn] * 3 + [RateLimited] * 3
    with pytest.raises(RateLimited):
        tried(ada)
    assert tried(ada, address="192.0.2.2").id == ada.id, "nobody else is shut out"
    with pytest.raises(NotSignedIn):
        tried(ada, account="acme/nobody")
    with reading(ada.service.engine) as session:
        assert max(row.failures for row in session.scalars(select(SignInTry))) == 3, "what waits is not counted"
    with asked_writing(ada.service) as session:
        session.execute(update(SignInTry).values(next_try=now() - timedelta(seconds=1)))
    assert tried(ada).id == ada.id
    with pytest.raises(NotSignedIn):
        tried(ada, passphrase="four words somebody guesses")
    assert tried(ada).id == ada.id, "after a success the first failures are free again"


def test_the_wait_grows_to_a_quarter_of_an_hour_and_an_unknown_account_waits_alike(ada: Human) -> None:
    waits: dict[str, list[float]] = {ada.account: [], "acme/nobody": []}
    for account, seen in waits.items():
        for _ in range(16):
            with pytest.raises(NotSignedIn):
                tried(ada, account=account, passphrase="four words somebody guesses")
            with asked_writing(ada.service) as session:
                row = max(session.scalars(select(SignInTry)), key=lambda each: each.until)
                seen.append(round((row.next_try - row.until).total_seconds() + 86_400))
                row.next_try = now() - timedelta(seconds=1)
    assert (
        waits[ada.account] == waits["acme/nobody"] == [0, 0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 900, 900, 900, 900]
    )


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8::1", "2001:db8::ffff", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("", "noise", True),
    ],
)
def test_an_address_is_a_subscriber(one: str, other: str, is_same: bool) -> None:
    assert (sign_in.network(one) == sign_in.network(other)) is is_same


def test_a_flood_of_tries_is_turned_away_and_fills_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passphrases, "_LONGEST_WAIT_S", 60.0)
    entered, leave = threading.Semaphore(0), threading.Event()

    def hold() -> str:
        try:
            with passphrases.at_work():
                entered.release()
                leave.wait(60)
                return "worked"
        except Unavailable:
            return "turned away"

    with ThreadPoolExecutor(30) as pool:
        held = [pool.submit(hold) for _ in range(30)]
        for _ in range(2):
            assert entered.acquire(timeout=60)
        while sum(each.done() for each in held) < 12:  # all beyond the two at work and the sixteen that wait
            time.sleep(0.01)
        assert not entered.acquire(blocking=False), "two at once"
        leave.set()
        told = [each.result() for each in held]
    assert (told.count("worked"), told.count("turned away")) == (18, 12)


def test_an_invitation_is_good_once(service: Service, http: TestClient) -> None:
    human = invited(service, http, "ada")
    first = forms(http.get("/oauth/invitation").text)["invitation"]
    human.enrol()
    for code in (human.invitation, "inv_" + "0" * 32, "", "noise"):
        answer = human.send("invitation", first | {"account": human.account, "invitation": code})
        assert answer.status_code == 403 and "otpauth" not in answer.text


def test_an_invitation_is_over_after_a_day(service: Service, http: TestClient) -> None:
    human = invited(service, http, "ada")
    with asked_writing(service) as session:
        session.execute(update(User).values(invitation_until=now()))
    with pytest.raises(NotSignedIn):
        people.offer(service, account=human.account, code=human.invitation)


def test_another_persons_invitation_is_of_no_use(service: Service, http: TestClient) -> None:
    ada, bob = invited(service, http, "ada"), invited(service, http, "bob")
    with pytest.raises(NotSignedIn):
        people.offer(service, account=ada.account, code=bob.invitation)
    assert people.offer(service, account=ada.account, code=ada.invitation) == people.offer(
        service, account=ada.account, code=ada.invitation
    ), "the page can be opened again"


@pytest.mark.parametrize("chosen", ["short", "aaaaaaaaaaaaaaaa", "I am Ada herself", "x" * 257])
def test_an_easy_passphrase_is_refused_and_the_invitation_stays(
    service: Service, http: TestClient, chosen: str
) -> None:
    human = invited(service, http, "ada")
    first = forms(http.get("/oauth/invitation").text)["invitation"]
    shown = human.send("invitation", first | {"account": human.account, "invitation": human.invitation})
    secret, _ = people.offer(service, account=human.account, code=human.invitation)
    human.secret = base64.b32decode(secret)
    fields = forms(shown.text)["invitation"] | {"passphrase": chosen, "again": chosen, "code": human.code()}
    refused = human.send("invitation", fields)
    assert refused.status_code == 422 and chosen not in refused.text
    differing = human.send("invitation", fields | {"passphrase": PASSPHRASE})
    assert differing.status_code == 400
    with pytest.raises(Invalid, match="code"):
        given = {"account": human.account, "invitation": human.invitation, "passphrase": PASSPHRASE}
        people.take_up(service, **given, code=wrong_code(human), request_id="request-of-a-test")
    human.enrol()


@pytest.fixture
def admin(service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    for name in ("data_dir", "key_dir", "key_file"):
        monkeypatch.setenv(f"CLOISTER_{name.upper()}", str(getattr(service.settings, name)))

    def run(*words: str, fails: bool = False) -> Any:
        done = CliRunner().invoke(cli, [*words, "--json"])
        assert done.exit_code == int(fails), done.output
        return json.loads(done.stderr if fails else done.stdout)

    yield run


def test_an_operator_makes_resets_disables_and_deletes_accounts(
    service: Service, http: TestClient, admin: Callable[..., Any]
) -> None:
    admin("tenant", "create", "acme")
    made = admin("user", "create", "--tenant", "acme", "--name", "ada", "--role", "trainer")
    assert made["account"] == "acme/ada" and made["page"] == f"{service.settings.issuer}/oauth/invitation"
    human = Human(service, http, made["account"], made["id"], made["invitation"]).enrol()
    assert tried(human).id == made["id"]
    (row,) = admin("user", "list", "--tenant", "acme")
    assert (row["name"], row["status"]) == ("ada", "active") and len(row) == 4, "nothing secret"
    verbs = {each["verb"] for each in admin("grant", "list", "--tenant", "acme", "--to", "ada")}
    assert "dataset.train" in verbs
    assert admin("grant", "add", "--tenant", "acme", "--to", "ada", "--verb", "model.predict")["to_name"] == "ada"
    again = admin("user", "reset", "ada", "--tenant", "acme")
    with pytest.raises(NotSignedIn):
        tried(human)
    human.invitation = again["invitation"]
    old = human.secret
    assert tried(human.enrol()).id == made["id"] and human.secret != old
    assert admin("user", "disable", "ada", "--tenant", "acme")["status"] == "disabled"
    with pytest.raises(NotSignedIn):
        tried(human)
    assert admin("user", "delete", "ada", "--tenant", "acme", fails=True)["code"] == "not_confirmed"
    assert admin("user", "delete", "ada", "--tenant", "acme", "--confirm", "ada")["deleted"] == made["id"]
    assert admin("user", "list", "--tenant", "acme") == [] == admin("grant", "list", "--tenant", "acme")
    with reading(service.engine) as session:
        told = list(session.scalars(select(AuditRow.verb).where(AuditRow.verb.startswith("user."))))
    assert {"user.create", "user.enrol", "user.reset", "user.disable", "user.delete"} == set(told)


def test_names_are_one_persons_or_one_clients(service: Service, admin: Callable[..., Any]) -> None:
    admin("tenant", "create", "acme")
    admin("tenant", "create", "other")
    admin("user", "create", "--tenant", "acme", "--name", "ada")
    for words in (("user", "create"), ("client", "create")):
        assert admin(*words, "--tenant", "acme", "--name", "ada", fails=True)["code"] == "conflict"
    assert admin("user", "create", "--tenant", "acme", "--name", "a/b", fails=True)["code"] == "invalid_request"
    for words in (("reset",), ("disable",), ("delete", "--confirm", "ada")):
        verb, *more = words
        assert admin("user", verb, "ada", "--tenant", "other", *more, fails=True)["code"] == "not_found"


def bearer(http: TestClient, human: Human, app: Any) -> dict[str, str]:
    pkce = Pkce()
    answer = exchanged(http, app, pkce, human.authorize(app, pkce)["code"])
    assert answer.status_code == 200, answer.text
    return {"Authorization": f"Bearer {answer.json()['access_token']}"}


@pytest.mark.parametrize("how", ["disable", "reset", "remove"])
def test_a_person_who_is_shut_out_is_refused_here_at_once_and_elsewhere_within_a_second(
    service: Service,
    second_process: Service,
    http: TestClient,
    ada: Human,
    app: Any,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pkce = Pkce()
    tokens = exchanged(http, app, pkce, ada.authorize(app, pkce)["code"]).json()
    headers = {"Authorization": f"Bearer {tokens['access_token']}"}
    waiting = ada.authorize(app, pkce)["code"]

    def elsewhere() -> str:
        given = [(b"authorization", headers["Authorization"].encode())]
        return authenticate(second_process, given, method="GET", path="/v1/sources").id

    assert http.get("/v1/sources", headers=headers).status_code == 200 and elsewhere() == ada.id
    with asked_writing(service) as session:
        operator = tenants.operator_of(tenants.find_tenant(session, "acme"), request_id="request-of-a-test")
        getattr(people, how)(session, service, operator, "ada")
    assert http.get("/v1/sources", headers=headers).status_code == 401
    refresh = {"grant_type": "refresh_token", "client_id": app.id, "refresh_token": tokens["refresh_token"]}
    assert http.post("/oauth/token", data=refresh).json()["error"] == "invalid_grant"
    assert exchanged(http, app, pkce, waiting).json()["error"] == "invalid_grant"
    assert "sign-in" in forms(http.get("/oauth/authorize", params=request(app, pkce)).text), "in no browser either"
    later = time.monotonic() + 1.01
    monkeypatch.setattr(verifier, "monotonic", lambda: later)
    with pytest.raises(Unauthenticated):
        elsewhere()


def test_a_person_may_do_what_they_are_granted_and_no_more(service: Service, http: TestClient, app: Any) -> None:
    steward, reader = invited(service, http, "steward").enrol(), invited(service, http, "reader", role="none")
    body = {"name": "people", "unit": "row", "epsilon": 3.0, "delta": 1e-6}
    made = http.post("/v1/sources", json=body, headers=bearer(http, steward, app))
    assert made.status_code == 201, made.text
    http.cookies.clear()
    of_reader = bearer(http, reader.enrol(), app)
    assert http.get(f"/v1/sources/{made.json()['id']}", headers=of_reader).status_code == 404
    assert http.get("/v1/sources", headers=of_reader).json()["items"] == []
    assert http.post("/v1/sources", json=body | {"name": "more"}, headers=of_reader).status_code == 403


def test_a_proxy_is_believed_where_it_is_trusted(ada: Human, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sign_in, "_FIRST_DELAY_S", 600.0)
    service = ada.service
    trusting = Service(
        service.settings.model_copy(update={"trusted_proxies": ("testclient",)}),
        service.engine,
        service.keys,
        service.blobs,
    )
    with TestClient(create_app(trusting)) as browser:
        human = Human(trusting, browser, ada.account, ada.id, secret=ada.secret)
        for address in ("192.0.2.1", "192.0.2.2"):
            statuses = []
            for _ in range(4):
                page = browser.get("/oauth/device")
                fields = forms(page.text)["sign-in"] | {"account": ada.account, "passphrase": "x", "code": "1"}
                answer = human.send("sign-in", fields, headers={"X-Forwarded-For": f"203.0.113.9, {address}"})
                statuses.append(answer.status_code)
            assert statuses == [403, 403, 403, 429], address
