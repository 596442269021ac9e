"""The pages that people see: signing in, allowing an app, a device's code, an invitation. Knows HTML; no script, no SQL, no HTTP.

Every value is escaped. What a page may do is in its policy: nothing but its own style, and forms to here and to the app's address.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = [
    "Page",
    "admin_consent",
    "consent",
    "device",
    "device_consent",
    "done",
    "enrol",
    "first_admin",
    "invitation",
    "refusal",
    "sign_in",
]

_STYLE = (
    "body{font:1.05rem/1.5 system-ui,sans-serif;max-width:32rem;margin:3rem auto;padding:0 1rem;color:#111;background:#fff}"
    "h1{font-size:1.4rem}label{display:block;margin:1rem 0 .25rem}"
    "input{font:inherit;width:100%;box-sizing:border-box;padding:.5rem;border:1px solid #555;border-radius:.25rem}"
    "button{font:inherit;margin:1.25rem .75rem 0 0;padding:.5rem 1.25rem;border:1px solid #111;border-radius:.25rem;"
    "background:#fff;color:#111}button.main{background:#111;color:#fff}"
    "[role=alert]{border-left:.3rem solid #b00020;padding:.5rem .75rem;background:#fdecee}"
    "code,output{font-family:ui-monospace,monospace;overflow-wrap:anywhere}"
    ":focus-visible{outline:3px solid #0b57d0;outline-offset:2px}"
    "@media(prefers-color-scheme:dark){body{background:#111;color:#eee}input,button{background:#222;color:#eee;border-color:#999}"
    "button.main{background:#eee;color:#111}[role=alert]{background:#3a1519}}"
)
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()


@dataclass(frozen=True, slots=True)
class Page:
    """A document, and the content security policy that it is shown under."""

    html: str
    policy: str
    status: int = 200


def sign_in(*, token: str, following: str, account: str = "", problem: str = "", status: int = 200) -> Page:
    """`following`: where to go on after it, a path of ours."""
    fields = [
        _field("account", "Account (tenant/name)", value=account, autocomplete="username"),
        _field("passphrase", "Passphrase", kind="password", autocomplete="current-password"),
        _field("code", "Code from your authenticator app", autocomplete="one-time-code", is_numeric=True),
    ]
    form = _form("sign-in", token, [*fields, _hidden("following", following)], [("", "Sign in")])
    return _page("Sign in", form, problem=problem, status=status)


def consent(*, token: str, query: str, app: str, account: str, origin: str) -> Page:
    """May this app act for you? `origin`: where the answer takes the browser."""
    text = (
        f"<p><strong>{escape(app)}</strong> wants to act for <strong>{escape(account)}</strong> at this service: to do "
        "whatever you may do here, until you or the operator end it.</p>"
        f"<p>You are taken to <code>{escape(origin)}</code>. Allow it only if you have just begun this yourself.</p>"
    )
    form = _form("consent", token, [_hidden("query", query)], [("allow", "Allow"), ("deny", "Do not allow")])
    return _page("Allow this app?", text + form + _sign_out(token), form_action=origin)


def device(*, token: str, user_code: str = "", problem: str = "", status: int = 200) -> Page:
    field = _field("user_code", "Code that your device shows", value=user_code, autocomplete="off")
    form = _form("device", token, [field], [("", "Continue")])
    return _page("Connect a device", form + _sign_out(token), problem=problem, status=status)


def device_consent(*, token: str, user_code: str, app: str, account: str) -> Page:
    text = (
        f"<p><strong>{escape(app)}</strong> wants to act for <strong>{escape(account)}</strong> at this service: to do "
        "whatever you may do here, until you or the operator end it.</p>"
        f"<p>Its code is <output>{escape(user_code[:4])}-{escape(user_code[4:])}</output>. Allow it only if a device in front of "
        "you shows this very code, and you have just begun this yourself. Whoever sent you a code wants to act as you.</p>"
    )
    choices = [("allow", "Allow"), ("deny", "Do not allow")]
    form = _form("device", token, [_hidden("user_code", user_code)], choices)
    return _page("Allow this device?", text + form)


def admin_consent(*, token: str, user_code: str, account: str, problem: str = "", status: int = 200) -> Page:
    """May a command line administer the deployment for you? Whoever sits here shows the second factor once more."""
    text = (
        f"<p>A command line wants to <strong>administer this whole deployment</strong> as <strong>{escape(account)}</strong>: every "
        "tenant, its clients, accounts and grants, until you or another operator end it.</p>"
        f"<p>Its code is <output>{escape(user_code[:4])}-{escape(user_code[4:])}</output>. Allow it only if you have just run "
        "<code>cloister-admin login</code> yourself, and it shows this very code. Whoever sent you a code wants to act as you.</p>"
    )
    fields = [
        _hidden("user_code", user_code),
        _field("code", "Next code from your authenticator app", autocomplete="one-time-code", is_numeric=True),
    ]
    form = _form("device", token, fields, [("allow", "Allow")])
    refuse = _form("device", token, [_hidden("user_code", user_code)], [("deny", "Do not allow")])
    body = text + form + refuse.replace(" class=main", "")
    return _page("Administer this deployment?", body, problem=problem, status=status)


def first_admin(*, token: str, name: str = "", problem: str = "", status: int = 200) -> Page:
    text = "<p>For whoever has just set this deployment up: <code>cloister-admin init</code> printed the token.</p>"
    fields = [
        _field("first_admin_token", "First-admin token", kind="password", autocomplete="off"),
        _field("name", "Your name here: letters, digits, _ and -", value=name, autocomplete="username"),
    ]
    form = _form("first-admin", token, fields, [("", "Become the first operator")])
    return _page("The first operator", text + form, problem=problem, status=status)


def invitation(*, token: str, account: str = "", problem: str = "", status: int = 200) -> Page:
    fields = [
        _field("account", "Account (tenant/name)", value=account, autocomplete="username"),
        _field("invitation", "Invitation code", kind="password", autocomplete="off"),
    ]
    return _page(
        "Take up an invitation",
        _form("invitation", token, fields, [("", "Continue")]),
        problem=problem,
        status=status,
    )


def enrol(
    *, token: str, account: str, invited_by: str, secret: str, uri: str, problem: str = "", status: int = 200
) -> Page:
    """`secret`: of the second factor, in base32, and `uri` the same for an authenticator app."""
    groups = " ".join(secret[at : at + 4] for at in range(0, len(secret), 4))
    text = (
        "<p>Add this account to an authenticator app: type in the key, or follow the link where the app is on this device. "
        f"The key is shown here alone.</p><p><output>{escape(groups)}</output></p>"
        f'<p><a href="{escape(uri)}">Open in an authenticator app</a></p>'
    )
    fields = [
        _hidden("account", account),
        _hidden("invitation", invited_by),
        _field("passphrase", "New passphrase, at least 12 characters", kind="password", autocomplete="new-password"),
        _field("again", "The passphrase again", kind="password", autocomplete="new-password"),
        _field("code", "Code that the app shows now", autocomplete="one-time-code", is_numeric=True),
    ]
    form = _form("invitation", token, fields, [("", "Set up the account")])
    return _page("Set up your account", text + form, problem=problem, status=status)


def done(title: str, text: str) -> Page:
    return _page(title, f"<p>{escape(text)}</p>")


def refusal(problem: str, *, status: int) -> Page:
    return _page("This did not work", "", problem=problem, status=status)


def _page(title: str, body: str, *, problem: str = "", status: int = 200, form_action: str = "") -> Page:
    alert = f'<p role="alert">{escape(problem)}</p>' if problem else ""
    html = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)} - Cloister</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><main><h1>{escape(title)}</h1>{alert}{body}</main></body></html>"
    )
    allowed = f"'self' {form_action}".strip()
    policy = f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; form-action {allowed}; base-uri 'none'; frame-ancestors 'none'"
    return Page(html, policy, status)


def _form(action: str, token: str, fields: Sequence[str], choices: Sequence[tuple[str, str]]) -> str:
    buttons = "".join(
        f"<button{' class=main' if at == 0 else ''}{f' name=decision value={value}' if value else ''}>{label}</button>"
        for at, (value, label) in enumerate(choices)
    )
    return f'<form method="post" action="{action}">{_hidden("form_token", token)}{"".join(fields)}{buttons}</form>'


def _sign_out(token: str) -> str:
    return _form("sign-out", token, [], [("", "Sign out")]).replace(" class=main", "")


def _hidden(name: str, value: str) -> str:
    return f'<input type="hidden" name="{name}" value="{escape(value)}">'


def _field(
    name: str, label: str, *, value: str = "", kind: str = "text", autocomplete: str, is_numeric: bool = False
) -> str:
    more = ' inputmode="numeric"' if is_numeric else ""
    return (
        f'<label for="{name}">{label}</label><input id="{name}" name="{name}" type="{kind}" value="{escape(value)}" '
        f'autocomplete="{autocomplete}" autocapitalize="none" spellcheck="false" required{more}>'
    )
