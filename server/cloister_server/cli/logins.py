"""`cloister-admin login`, `logout`, `first-admin` and `operator`: who operates, from here or from elsewhere."""

from __future__ import annotations

import getpass
import sys
from typing import Annotated

import typer

from cloister.wire._model import Body
from cloister_server import deployment, operators
from cloister_server.cli.terminal import (
    DEFAULT_PROFILE,
    JSON,
    Confirm,
    DryRun,
    operate,
    profile,
    refusals,
    request_id,
    settings_here,
    show,
)
from cloister_server.operations import people
from cloister_server.service import Service

__all__ = ["first_admin", "login", "logout", "operator_cli", "print_first_admin_token"]

operator_cli = typer.Typer(no_args_is_help=True, help="People who may administer this deployment from elsewhere.")

_KEPT_AS = "The name that the login is kept by; `default` unless CLOISTER_PROFILE names another."
Profile = Annotated[str | None, typer.Option("--profile", metavar="NAME", help=_KEPT_AS)]
Named = Annotated[str, typer.Argument(metavar="NAME", help="The operator, by name.")]


def login(
    url: Annotated[str, typer.Option(help="The deployment's base URL, https://HOST.")],
    allow_insecure: Annotated[
        bool, typer.Option("--allow-insecure", help="Plain HTTP to another machine, on a network of yours.")
    ] = False,
    named: Profile = None,
) -> None:
    """Log in at a deployment as an operator: it shows a code to type in a browser."""
    from cloister import _login
    from cloister._http import check_url
    from cloister._possession import PrivateKey
    from cloister.cli.verify import printable
    from cloister_server.cli import remote

    with refusals(False):
        base, store = check_url(url, allow_insecure=allow_insecure), remote.store_of(_named(named))
        device = _login.begin(base, "cloister-admin", scope="admin")
        print(f"Open {printable(device.page)} in a browser and type in the code {printable(device.user_code)}")
        sys.stdout.flush()
        found = _login.wait(device, proves_by=PrivateKey.generate(), allow_insecure=allow_insecure, log_in=store.log_in)
        with store.alone():
            store.write(found)
        print(f"Logged in at {base} (profile {store.name}).")


def logout(named: Profile = None) -> None:
    """End the login of a profile, there and here."""
    from cloister import _login
    from cloister_server.cli import remote

    with refusals(False):
        found = _login.log_out(remote.store_of(_named(named)))
        print(f"Logged out of {found.url}.")


def first_admin(
    name: Annotated[str, typer.Option(help="What the first operator is called.")], as_json: JSON = False
) -> None:
    """Make the first operator, by the token that `init` printed: it is asked for, or read from standard input.

    The invitation is taken up in a browser, where the passphrase and the second factor are chosen. The page /oauth/first-admin of
    the deployment does the same.
    """
    with refusals(as_json):
        service = deployment.open_service(settings_here())
        token = getpass.getpass("First-admin token: ") if sys.stdin.isatty() else sys.stdin.readline()
        invited = operators.redeem(service, token.strip(), name=name, request_id=request_id())
        show(
            {
                "id": invited.user_id,
                "account": invited.account,
                "invitation": invited.code.get_secret_value(),
                "page": f"{service.settings.issuer}/oauth/invitation",
            },
            as_json,
        )


def print_first_admin_token(service: Service) -> None:
    """On standard error: what `init` prints otherwise is kept and handed around, for its public keys."""
    token = operators.first_admin_token(service)
    if token is not None:
        print(
            f"First-admin token, good once and for an hour: {token.get_secret_value()}\n"
            f"Make the first operator by it: {service.settings.issuer}/oauth/first-admin, or `cloister-admin first-admin`.",
            file=sys.stderr,
        )


@operator_cli.command("add")
def add(name: Named, dry_run: DryRun = False, as_json: JSON = False) -> None:
    """Make an operator. The invitation code, good once and for a day, is printed this once: hand it over in private."""
    operate(people.add_operator, people.Named(name=name), as_json, dry_run=dry_run)


@operator_cli.command("remove")
def remove(name: Named, confirm: Confirm = None, dry_run: DryRun = False, as_json: JSON = False) -> None:
    """Delete an operator's account: refused from the next request on."""
    operate(people.remove_operator, people.Named(name=name), as_json, dry_run=dry_run, confirm=confirm)


@operator_cli.command("list")
def listed(as_json: JSON = False) -> None:
    """List the operators."""
    operate(people.operators_, Body(), as_json)


def _named(given: str | None) -> str:
    """Which login: `default` unless another was asked for."""
    return given or profile() or DEFAULT_PROFILE
