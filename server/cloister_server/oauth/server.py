"""The token endpoint: Authlib's core with one token format and our own client check. Knows SQL and keys; no framework.

An app gets tokens for itself by client_credentials, which is Authlib's grant; for a person by what that person allowed, of which
`authorizations` and `logins` say what it is good for. No scopes but that of operators: what somebody may do is in their grants and
never in a token.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from authlib.oauth2.rfc6749 import (
    AuthorizationServer,
    InvalidRequestError,
    InvalidScopeError,
    OAuth2Error,
    OAuth2Request,
    UnauthorizedClientError,
)
from authlib.oauth2.rfc6749.grants import ClientCredentialsGrant
from authlib.oauth2.rfc6749.requests import BasicOAuth2Payload
from authlib.oauth2.rfc9068 import JWTBearerTokenGenerator
from joserfc.jwk import ECKey, KeySet

from cloister_server import vault
from cloister_server.oauth import verifier
from cloister_server.oauth.access_tokens import ADMIN_SCOPE, ALGORITHM
from cloister_server.oauth.authorizations import ADMIN, redeem_code, redeem_device
from cloister_server.oauth.clients import authenticate_client
from cloister_server.oauth.dpop import InvalidProof, proven_key
from cloister_server.oauth.form import TokenRequest, read_token_request
from cloister_server.oauth.logins import Begun, refresh
from cloister_server.service import Service
from cloister_server.store.tables import App, new_id

__all__ = ["GRANT_TYPES", "issue_token"]

DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"  # RFC 8628, section 3.4
GRANT_TYPES = ("client_credentials", "authorization_code", "refresh_token", DEVICE_GRANT)

_NEEDED = {
    "authorization_code": ("code", "redirect_uri", "code_verifier"),
    "refresh_token": ("refresh_token",),
    DEVICE_GRANT: ("device_code",),
}
_WHY = {
    "invalid_grant": "the code or refresh token is not this client's, is over or was used before, or does not go with what was sent; "
    "let the person sign in again",
    "authorization_pending": "the person has not decided yet; ask again after the interval",
    "slow_down": "this was asked too soon; wait five seconds longer from now on",
    "access_denied": "the person has not allowed it, or may not allow it any more",
    "expired_token": "the person has not decided in time; begin again",
    "invalid_target": "tokens are for this server alone",
}

logging.getLogger("authlib").setLevel(logging.WARNING)  # at DEBUG its grants print the tokens that they issue


def issue_token(
    service: Service, headers: Sequence[tuple[bytes, bytes]], *, query: bytes, body: bytes
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Answer a token request: status, JSON body and headers, as RFC 6749, section 5, has them."""
    try:
        request = read_token_request(headers, query, body)
        client = _Client(authenticate_client(service, request))
        grant_type = _grant_type(request, client.app)
        jkt = _bound_to(service, client.app, headers)
        if grant_type != "client_credentials":
            return _issue_for_person(service, request, client, jkt, request_id=verifier.request_id_of(headers))
    except OAuth2Error as error:
        status, answer, more = error()
        return status, answer, dict(more)
    answered: tuple[int, dict[str, Any], dict[str, str]] = _Server(service, client, jkt).create_token_response(request)
    return answered


def _grant_type(request: TokenRequest, app: App) -> str:
    """RFC 6749, 5.2. Authlib says both alike, and of neither what to send."""
    if "grant_type" not in request.parameters:
        raise InvalidRequestError("there is no grant_type; send grant_type=client_credentials")
    grant_type = request.parameters["grant_type"]
    if grant_type not in GRANT_TYPES:
        raise _UnsupportedGrant()
    if app.public and grant_type == "client_credentials":
        raise UnauthorizedClientError("a public client has no secret, and gets no token but for a person")
    return grant_type


def _issue_for_person(
    service: Service, request: TokenRequest, client: _Client, jkt: str | None, *, request_id: str
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """A token for the person who allowed it, and the refresh token for the next one. Raises OAuth2Error."""
    form, app = request.parameters, client.app
    if form.get("scope"):
        raise InvalidScopeError("there are no scopes here; what a person may do is in their grants; ask for none")
    if form.get("resource", service.settings.issuer) != service.settings.issuer:
        raise _Refused("invalid_target")
    grant_type = form["grant_type"]
    _require(form, _NEEDED[grant_type])
    if grant_type == "authorization_code":
        begun: Begun | str | None = redeem_code(service, app, form, proven=jkt, request_id=request_id)
    elif grant_type == "refresh_token":
        begun = refresh(service, form["refresh_token"], client_id=app.id, proven=jkt, is_public=app.public)
    else:
        begun = redeem_device(service, app, form, proven=jkt, request_id=request_id)
    if not isinstance(begun, Begun):
        raise _Refused(begun or "invalid_grant")
    token = _Tokens(service, jkt, begun).generate(
        grant_type, client, user=_Person(begun.user_id), scope=_scope(app), include_refresh_token=False
    )
    token["refresh_token"] = begun.refresh_token.get_secret_value()
    return 200, token, {"Cache-Control": "no-store", "Pragma": "no-cache"}


def _scope(app: App) -> str:
    """Operators' tokens, of which `logins` and `authorizations` see to it that nobody else's come by this client."""
    return ADMIN_SCOPE if app is ADMIN else ""


def _require(form: Mapping[str, str], names: Sequence[str]) -> None:
    for name in names:
        if name not in form:
            raise InvalidRequestError(f"there is no {name}; this grant is asked for with {', '.join(names)}")


class _UnsupportedGrant(OAuth2Error):  # type: ignore[misc]  # Authlib has no types
    error = "unsupported_grant_type"
    description = f"this grant is not given here; it is one of {', '.join(GRANT_TYPES)}"


class _Refused(OAuth2Error):  # type: ignore[misc]  # Authlib has no types
    def __init__(self, error: str) -> None:
        super().__init__(description=_WHY[error])
        self.error = error


def _bound_to(service: Service, app: App, headers: Sequence[tuple[bytes, bytes]]) -> str | None:
    """The key that the token is to be bound to; None where the client shows none and need not."""
    if not app.dpop and not any(name.lower() == b"dpop" for name, _ in headers):
        return None
    try:
        return proven_key(service, headers, method="POST", path="/oauth/token")
    except InvalidProof:
        raise _InvalidProof() from None


class _InvalidProof(OAuth2Error):  # type: ignore[misc]  # Authlib has no types
    error = "invalid_dpop_proof"
    description = (
        "the DPoP header is no proof for this request, or there is none and this client must send one; send a fresh one (RFC 9449) "
        "with htm POST, htu this endpoint under the issuer, iat of this minute and a jti never used before"
    )


class _Client:
    """An app as Authlib asks for a client."""

    def __init__(self, app: App) -> None:
        self.app = app

    def get_client_id(self) -> str:
        return self.app.id

    def check_grant_type(self, grant_type: str) -> bool:
        return grant_type == "client_credentials"

    def get_allowed_scope(self, scope: str | None) -> str:
        return _scope(self.app)


class _Person:
    """A person as Authlib asks for a user."""

    def __init__(self, user_id: str) -> None:
        self._user_id = user_id

    def get_user_id(self) -> str:
        return self._user_id


class _Request(OAuth2Request):  # type: ignore[misc]  # Authlib has no types
    def __init__(self, read: TokenRequest) -> None:
        # The URI is nobody's: TLS ends before this process, and Authlib only wants to see the scheme.
        super().__init__("POST", "https://localhost/oauth/token")
        self.payload = BasicOAuth2Payload(dict(read.parameters))
        self.read = read


class _Tokens(JWTBearerTokenGenerator):  # type: ignore[misc]  # Authlib has no types
    """RFC 9068 tokens for this very server: audience and issuer are one."""

    def __init__(self, service: Service, jkt: str | None, begun: Begun | None = None) -> None:
        super().__init__(service.settings.issuer, ALGORITHM, expires_generator=self._lifetime_s)
        self._service, self._jkt, self._begun = service, jkt, begun

    def generate(self, *given: Any, **more: Any) -> dict[str, Any]:
        token: dict[str, Any] = super().generate(*given, **more)
        return token if self._jkt is None else {**token, "token_type": "DPoP"}

    def get_jwks(self) -> KeySet:
        key = vault.service_key(self._service, "token")
        # A set, though of one key: with a bare key the header has no kid.
        return KeySet([ECKey.import_key(key.secret, {"kid": key.id, "use": "sig", "alg": ALGORITHM})])

    def get_audiences(self, client: _Client, user: object, scope: str) -> str:
        return str(self.issuer)

    def get_jti(self, client: _Client, grant_type: str, user: object, scope: str) -> str:
        return new_id("tok")

    def get_extra_claims(self, client: _Client, grant_type: str, user: object, scope: str) -> dict[str, Any]:
        tenant_id = client.app.tenant_id if self._begun is None else self._begun.tenant_id
        claims: dict[str, Any] = {"tenant": tenant_id}  # for people who read tokens; no verifier of ours looks at it
        if self._begun is not None:
            claims["sid"] = self._begun.login_id
        return claims if self._jkt is None else {**claims, "cnf": {"jkt": self._jkt}}

    def _lifetime_s(self, client: _Client, grant_type: str) -> int:
        return self._service.settings.token_lifetime_s


class _Server(AuthorizationServer):  # type: ignore[misc]  # Authlib has no types
    """Authlib's core for one request."""

    def __init__(self, service: Service, client: _Client, jkt: str | None) -> None:
        super().__init__()
        self._client = client
        self.register_grant(ClientCredentialsGrant)
        self.register_token_generator("default", _Tokens(service, jkt))

    def create_oauth2_request(self, request: TokenRequest) -> OAuth2Request:
        return _Request(request)

    def authenticate_client(self, request: _Request, methods: object, endpoint: str = "token") -> _Client:
        return self._client  # who it is was asked before: what a client shows once is taken in a transaction of its own

    def validate_requested_scope(self, scope: str | None) -> None:
        if scope:
            raise InvalidScopeError("there are no scopes here; what an app may do is in its grants; ask for none")

    def save_token(self, token: dict[str, Any], request: OAuth2Request) -> None:
        """Kept nowhere: a token is its own proof, and the app's row is what revokes it."""

    def send_signal(self, name: str, *args: object, **kwargs: object) -> None:
        """Nobody listens."""

    def handle_response(
        self, status: int, body: dict[str, Any], headers: Iterable[tuple[str, str]]
    ) -> tuple[int, dict[str, Any], dict[str, str]]:
        return status, body, dict(headers)
