"""`cloister`: for whoever was given a certificate or a bundle. Knows arguments and exit statuses; its commands know the rest.

Exit status 0: done. 1: refused, with one sentence on standard error. 2: not how the command is used.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence

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
    given = parser.parse_args(arguments)
    try:
        {"verify": verify.run, "bundle": bundle.run}[given.command](given)
    except CloisterError as refusal:
        print(f"cloister {given.command}: {verify.printable(str(refusal))}", file=sys.stderr)
        return 1
    return 0
