"""/oauth/*, as people see it in a browser: who they are, what they allow. Reads forms and cookies; decides nothing itself.

A form is taken from a page of this very server alone: its Origin is ours, and it repeats a MAC of the browser's cookie.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from authlib.oauth2.rfc6749 import OAuth2Error
from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import HTMLResponse, RedirectResponse, Response

from cloister_server import operators, people, vault
from cloister_server.errors import BadRequest, Forbidden, ServerError
from cloister_server.oauth import authorizations, pages, sign_in
from cloister_server.oauth.authorizations import RedirectedError
from cloister_server.oauth.form import read_form
from cloister_server.oauth.pages import Page
from cloister_server.oauth.redirects import origin_of
from cloister_server.oauth.sign_in import NotSignedIn, Person, mac
from cloister_server.service import Service

__all__ = ["address_of", "router"]

router = APIRouter(include_in_schema=False)

_COOKIE = re.compile(r"[0-9a-f]{64}")
_FOLLOWING = re.compile(r"/oauth/(authorize\?[\x21-\x7e]{1,4000}|device(\?user_code=[A-Za-z-]{0,16})?)")


@dataclass(frozen=True, slots=True)
class _Visit:
    """One request of a browser: its cookie, which may be new, and who is signed in there."""

    service: Service
    query: str
    form: Mapping[str, str]
    cookie: str
    is_new: bool
    person: Person | None
    address: str
    request_id: str

    @property
    def token(self) -> str:
        """What a form of this browser carries."""
        return _form_token(self.service, self.cookie)

    def field(self, name: str) -> str:
        return self.form.get(name, "")


@dataclass(frozen=True, slots=True)
class _GoTo:
    """The answer to a form: where the browser goes next, with which cookie if that changes."""

    location: str
    cookie: str | None = None


_Step = Callable[[_Visit], Page | _GoTo]


@router.get("/oauth/authorize")
async def authorize(request: Request) -> Response:
    return await _answered(request, _authorize)


@router.post("/oauth/consent")
async def consent(request: Request) -> Response:
    return await _answered(request, _consent)


@router.get("/oauth/device")
async def device(request: Request) -> Response:
    return await _answered(request, _device)


@router.post("/oauth/device")
async def decide_device(request: Request) -> Response:
    return await _answered(request, _decide_device)


@router.get("/oauth/invitation")
async def invitation(request: Request) -> Response:
    return await _answered(request, lambda visit: pages.invitation(token=visit.token))


@router.post("/oauth/invitation")
async def take_up(request: Request) -> Response:
    return await _answered(request, _take_up)


@router.get("/oauth/first-admin")
async def first_admin(request: Request) -> Response:
    return await _answered(request, lambda visit: pages.first_admin(token=visit.token))


@router.post("/oauth/first-admin")
async def redeem_first_admin(request: Request) -> Response:
    return await _answered(request, _redeem_first_admin)


@router.post("/oauth/sign-in")
async def signed_in(request: Request) -> Response:
    return await _answered(request, _sign_in)


@router.post("/oauth/sign-out")
async def sign_out(request: Request) -> Response:
    return await _answered(request, _sign_out)


def _authorize(visit: _Visit) -> Page | _GoTo:
    request = authorizations.read_authorization_request(visit.service, visit.query)
    if visit.person is None:
        return pages.sign_in(token=visit.token, following=f"/oauth/authorize?{visit.query}")
    return pages.consent(
        token=visit.token,
        query=visit.query,
        app=request.client.name,
        account=visit.person.account,
        origin=origin_of(request.redirect_uri),
    )


def _consent(visit: _Visit) -> Page | _GoTo:
    request = authorizations.read_authorization_request(visit.service, visit.field("query"))
    if visit.person is None:
        return pages.sign_in(token=visit.token, following=f"/oauth/authorize?{visit.field('query')}")
    if visit.field("decision") != "allow":
        return _GoTo(authorizations.answer(visit.service, request, "access_denied", "the person has not allowed it"))
    return _GoTo(authorizations.allow(visit.service, request, visit.person))


def _device(visit: _Visit) -> Page | _GoTo:
    code = visit.query.removeprefix("user_code=") if re.fullmatch(r"user_code=[A-Za-z-]{1,16}", visit.query) else ""
    if visit.person is None:
        return pages.sign_in(token=visit.token, following=f"/oauth/device{f'?user_code={code}' if code else ''}")
    return pages.device(token=visit.token, user_code=code)


def _decide_device(visit: _Visit) -> Page | _GoTo:
    if visit.person is None:
        return pages.sign_in(token=visit.token, following="/oauth/device")
    given, address, decision = visit.field("user_code"), visit.address, visit.field("decision")
    if decision in ("allow", "deny"):
        is_allowed = decision == "allow"
        try:
            is_decided = authorizations.decide_device(
                visit.service, visit.person, given, is_allowed=is_allowed, address=address, code=visit.field("code")
            )
        except authorizations.NotConfirmed as again:
            asked = {"token": visit.token, "user_code": given, "account": visit.person.account}
            return pages.admin_consent(**asked, problem=again.refusal.message, status=again.refusal.status)
        if is_decided:
            told = (
                "You can go back to your device." if decision == "allow" else "The device may do nothing in your name."
            )
            return pages.done("Allowed" if decision == "allow" else "Not allowed", told)
        found = None
    else:
        found = authorizations.find_device(visit.service, visit.person, given, address=address)
    if found is None:
        problem = "No device waits with this code: see that it is typed as shown, or begin again on the device."
        return pages.device(token=visit.token, problem=problem, status=400)
    code, client = found
    if client is authorizations.ADMIN:
        return pages.admin_consent(token=visit.token, user_code=code, account=visit.person.account)
    return pages.device_consent(token=visit.token, user_code=code, app=client.name, account=visit.person.account)


def _redeem_first_admin(visit: _Visit) -> Page | _GoTo:
    token, name = visit.field("first_admin_token"), visit.field("name")
    try:
        invited = operators.redeem(visit.service, token, name=name, request_id=visit.request_id)
    except ServerError as refusal:
        return pages.first_admin(token=visit.token, name=name, problem=refusal.message, status=refusal.status)
    return _enrol(visit, invited.account, invited.code.get_secret_value())


def _take_up(visit: _Visit) -> Page | _GoTo:
    return _enrol(visit, visit.field("account"), visit.field("invitation"))


def _enrol(visit: _Visit, account: str, code: str) -> Page:
    try:
        secret, uri = people.offer(visit.service, account=account, code=code)
    except NotSignedIn:
        problem = "The account or the invitation code is wrong, or the invitation is over or was taken up before."
        return pages.invitation(token=visit.token, account=account, problem=problem, status=403)

    def again(problem: str = "", status: int = 200) -> Page:
        return pages.enrol(
            token=visit.token, account=account, invited_by=code, secret=secret, uri=uri, problem=problem, status=status
        )

    if not visit.field("passphrase"):
        return again()
    if visit.field("passphrase") != visit.field("again"):
        return again("The two passphrases are not the same.", 400)
    try:
        people.take_up(
            visit.service,
            account=account,
            invitation=code,
            passphrase=visit.field("passphrase"),
            code=visit.field("code"),
            request_id=visit.request_id,
        )
    except ServerError as refusal:
        return again(refusal.message, refusal.status)
    return pages.done("Your account is set up", "You can close this page, and sign in wherever you are asked to.")


def _sign_in(visit: _Visit) -> Page | _GoTo:
    following, account = visit.field("following"), visit.field("account")
    if not _FOLLOWING.fullmatch(following):
        raise BadRequest("the form does not say where to go on; begin again where you came from")
    try:
        person = sign_in.sign_in(
            visit.service,
            account=account,
            passphrase=visit.field("passphrase"),
            code=visit.field("code"),
            address=visit.address,
        )
    except ServerError as refusal:
        again = {"token": visit.token, "following": following, "account": account}
        return pages.sign_in(**again, problem=refusal.message, status=refusal.status)
    cookie = secrets.token_hex(32)  # another than before: whoever knew that one is not signed in
    sign_in.remember_browser(visit.service, cookie, person)
    return _GoTo(f"{visit.service.settings.issuer}{following}", cookie)


def _sign_out(visit: _Visit) -> Page | _GoTo:
    sign_in.forget_browser(visit.service, visit.cookie)
    return pages.done(
        "Signed out",
        "You are signed out of this browser. Apps that you have allowed go on until you end them.",
    )


async def _answered(request: Request, step: _Step) -> Response:
    service: Service = request.app.state.service
    body = await request.body()
    return await run_in_threadpool(_respond, service, request, body, step)


def _respond(service: Service, request: Request, body: bytes, step: _Step) -> Response:
    cookie = _cookie_of(service, request)
    is_new, cookie = cookie is None, cookie or secrets.token_hex(32)
    changed: str | None = cookie if is_new else None
    try:
        form = _checked_form(service, request, body, cookie) if request.method == "POST" else {}
        person = None if is_new else sign_in.of_browser(service, cookie)
        visit = _Visit(
            service,
            request.scope.get("query_string", b"").decode("ascii", "replace"),
            form,
            cookie,
            is_new,
            person,
            address_of(service, request),
            request.headers.get("x-request-id", ""),
        )
        answer = step(visit)
    except RedirectedError as refusal:
        answer = _GoTo(refusal.location(service.settings.issuer))
    except OAuth2Error as refusal:
        answer = pages.refusal(str(refusal.description), status=400)
    except ServerError as refusal:
        answer = pages.refusal(refusal.message, status=refusal.status)
    if isinstance(answer, Page):
        headers = {"Content-Security-Policy": answer.policy, "Referrer-Policy": "same-origin"}
        response: Response = HTMLResponse(answer.html, answer.status, headers)
    else:
        changed = answer.cookie or changed
        response = RedirectResponse(answer.location, 303)
        response.headers["location"] = answer.location  # as it was registered, character for character
    if changed is not None:
        _set_cookie(service, response, changed)
    return response


def _checked_form(service: Service, request: Request, body: bytes, cookie: str) -> Mapping[str, str]:
    """The form's fields. Raises Forbidden where it is not from a page of ours in this browser, OAuth2Error where it is no form."""
    parts = urlsplit(service.settings.issuer)
    ours = f"{parts.scheme}://{parts.netloc}"
    if (
        request.headers.get("origin", ours) != ours
        or request.headers.get("sec-fetch-site", "same-origin") != "same-origin"
    ):
        raise Forbidden(f"this form does not come from a page of this service; open {ours} itself and begin again")
    form = read_form(request.scope["headers"], body)
    if not hmac.compare_digest(form.get("form_token", "").encode(), _form_token(service, cookie).encode()):
        raise Forbidden(
            "this form is not of this browser, or is too old; allow cookies for this service, go back and begin again"
        )
    return form


def _form_token(service: Service, cookie: str) -> str:
    return mac(vault.pepper(service), "form", cookie).hex()


def _cookie_of(service: Service, request: Request) -> str | None:
    """The browser's cookie; None where there is none, or more than one."""
    name = _cookie_name(service)
    found = [
        part
        for header in request.headers.getlist("cookie")
        for part in header.split(";")
        if part.strip().startswith(f"{name}=")
    ]
    try:
        value = SimpleCookie(found[0])[name].value if len(found) == 1 else ""
    except (CookieError, KeyError):
        return None
    return value if _COOKIE.fullmatch(value) else None


def _cookie_name(service: Service) -> str:
    """Under `__Host-` a browser lets nobody else set it (RFC 6265bis, section 4.1.3.2); it needs TLS for that."""
    return "__Host-cloister" if service.settings.issuer.startswith("https:") else "cloister"


def _set_cookie(service: Service, response: Response, value: str) -> None:
    response.set_cookie(
        _cookie_name(service),
        value,
        max_age=sign_in.BROWSER_S,
        path="/",
        secure=service.settings.issuer.startswith("https:"),
        httponly=True,
        samesite="lax",
    )


def address_of(service: Service, request: Request) -> str:
    """Whose request this is: what a trusted proxy in front says, else the connection's other end."""
    peer = request.client.host if request.client is not None else ""
    if peer in service.settings.trusted_proxies:
        told = ",".join(request.headers.getlist("x-forwarded-for")).rpartition(",")[2].strip()
        return told or peer
    return peer
