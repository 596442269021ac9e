"""`cloister`: for whoever has an account, a certificate or a bundle. Knows arguments and exit statuses; its commands know the rest.

Exit status 0: done. 1: refused, with one sentence on standard error. 2: not how the command is used.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

from cloister.cli import bundle, verify
from cloister.wire._errors import CloisterError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status. Raises SystemExit(2) where the arguments are not understood."""
    parser = ArgumentParser(prog="cloister", description="Work with what a Cloister service gave you.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    verify.describe(
        commands.add_parser("verify", help="check a certificate or a receipt offline", description=verify.__doc__)
    )
    bundle.describe(commands.add_parser("bundle", help="take your tenant's data along", description=bundle.__doc__))
    _describe_logins(commands)
    given = parser.parse_args(arguments)
    try:
        _run(given)
    except CloisterError as refusal:
        print(f"cloister {given.command}: {verify.printable(str(refusal))}", file=sys.stderr)
        return 1
    return 0


def _describe_logins(commands: Any) -> None:
    """What is imported when it is run alone: whoever checks a certificate needs no HTTP library."""
    login = commands.add_parser("login", help="log in at a server as a person")
    login.add_argument("url", metavar="URL", help="the server's base URL, https://HOST")
    login.add_argument("--client-id", help="of a public client of your tenant's own")
    login.add_argument(
        "--allow-insecure", action="store_true", help="plain HTTP to another machine, on a network of yours"
    )
    commands.add_parser("logout", help="end the login (CLOISTER_PROFILE names another than the default one)")
    whoami = commands.add_parser("whoami", help="say who is meant: by the environment's credentials, or else the login")
    whoami.add_argument("--json", action="store_true", help="print it as JSON")


def _run(given: Namespace) -> None:
    offline = {"verify": verify.run, "bundle": bundle.run}
    if given.command in offline:
        offline[given.command](given)
        return
    from cloister.cli import login

    {"login": login.login, "logout": login.logout, "whoami": login.whoami}[given.command](given)
