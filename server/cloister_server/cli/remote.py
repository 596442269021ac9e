"""An operation through the API of a deployment elsewhere, as the operator who is logged in. Knows the SDK's login; no keys, no SQL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cloister._http import Ask, Sender, asked, check_url
from cloister._login import LoginCredentials
from cloister._profiles import ProfileStore
from cloister_server.errors import Invalid
from cloister_server.operations import Asked, Operation
from cloister_server.settings import profile_directory

__all__ = ["asking", "store_of"]

_TIMEOUT_S = 120.0
_MOST_RETRIES = 2


def store_of(name: str) -> ProfileStore:
    """The operator's login of this name. Raises CloisterError where it is no name."""
    return ProfileStore(profile_directory(), name, log_in=f"cloister-admin login --profile {name} --url")


def asking(name: str, operation: Operation[Any]) -> Callable[[Asked[Any]], Any]:
    """Asks the deployment of this profile. Raises CloisterError as the SDK does: what the server refused with, or why it was not
    reached; Invalid where nobody is logged in."""
    store = store_of(name)
    profile = store.read()
    if profile is None:
        raise Invalid(
            f"nobody is logged in by profile {name!r}; run `{store.log_in} https://HOST`, or name another profile, or "
            "--local for the deployment of this machine",
            code="not_logged_in",
        )
    url = check_url(profile.url, allow_insecure=profile.allow_insecure)
    credentials = LoginCredentials(store, profile)

    def ask(given: Asked[Any]) -> Any:
        body = {
            "request": given.request.model_dump(mode="json", exclude_unset=True),
            "dry_run": given.dry_run,
            "confirm": given.confirm,
        }
        sender = Sender(url, credentials, timeout_s=_TIMEOUT_S)
        try:
            told = sender.run(asked(Ask("POST", f"/v1/admin/{operation.name}", json=body), max_retries=_MOST_RETRIES))
        finally:
            sender.close()
        return told.get("answer")

    return ask
