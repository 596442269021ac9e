"""Log in at a server as a person, log out, and say who is logged in."""

from __future__ import annotations

import json
import sys
from argparse import Namespace

from cloister._client import Cloister, profile_directory, profile_name
from cloister._http import Ask, asked, check_url
from cloister._login import CLIENT_ID, begin, log_out, wait
from cloister._profiles import ProfileStore
from cloister.cli.verify import printable
from cloister.wire.identities import Identity

__all__ = ["login", "logout", "whoami"]


def login(given: Namespace) -> None:
    """Show a code, wait for its person, and keep the login. Raises CloisterError."""
    url = check_url(given.url, allow_insecure=given.allow_insecure)
    store = ProfileStore(profile_directory(), profile_name())
    device = begin(url, given.client_id or CLIENT_ID)
    print(f"Open {printable(device.page)} in a browser and type in the code {printable(device.user_code)}")
    sys.stdout.flush()
    profile = wait(device, allow_insecure=given.allow_insecure)
    with store.alone():
        store.write(profile)
    print(f"Logged in at {url} (profile {store.name}).")


def logout(given: Namespace) -> None:
    """Let the server end the login, and forget it here either way. Raises CloisterError where the server was not told."""
    store = ProfileStore(profile_directory(), profile_name())
    profile = log_out(store)
    print(f"Logged out of {profile.url} (profile {store.name}).")


def whoami(given: Namespace) -> None:
    """Ask the server who this is, by the environment's credentials or else the login. Raises CloisterError."""
    with Cloister() as client:
        told = client._sender.run(asked(Ask("GET", "/v1/whoami"), max_retries=2))
    known = Identity.model_validate(told)
    if given.json:
        print(json.dumps(known.model_dump()))
    else:
        print(f"{printable(known.tenant)}/{printable(known.name)} ({printable(known.kind)} {printable(known.id)})")
