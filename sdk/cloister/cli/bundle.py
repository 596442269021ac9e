"""Make a key for a bundle of your tenant's data, and open the bundle that the operator made for it."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from argparse import ArgumentParser, Namespace
from pathlib import Path

from cloister.cli.files import read_keys, unusable
from cloister.wire._errors import InvalidArgument
from cloister.wire.bundles import (
    CONTENTS,
    InvalidBundle,
    contents_digest,
    new_private_key,
    open_members,
    private_key_of,
    public_line,
    verify_contents,
)

__all__ = ["describe", "run"]


def describe(parser: ArgumentParser) -> None:
    """What the command takes."""
    steps = parser.add_subparsers(required=True, metavar="STEP", dest="step")
    key = steps.add_parser("key", help="make a key pair; its public line is for the operator")
    key.add_argument("--to", type=Path, required=True, metavar="FILE", help="where the private key goes (0600)")
    opened = steps.add_parser("open", help="open a bundle into a new directory")
    opened.add_argument("bundle", type=Path, metavar="BUNDLE")
    opened.add_argument("--key", type=Path, required=True, metavar="FILE", help="the private key's file")
    opened.add_argument(
        "--keys", type=Path, required=True, metavar="KEYS.json", help="the service's public keys, as for `verify`"
    )
    opened.add_argument("--to", type=Path, required=True, metavar="DIRECTORY", help="made; nothing is overwritten")


def run(given: Namespace) -> None:
    """Raises InvalidBundle, InvalidCertificate or InvalidArgument; a refused bundle leaves nothing on the disk."""
    _make_key(given.to) if given.step == "key" else _open(given)


def _make_key(path: Path) -> None:
    line = new_private_key()
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(handle)  # nothing else opens the bundle
    except OSError as exc:
        raise unusable(path, exc) from exc
    print(public_line(private_key_of(line)))


def _open(given: Namespace) -> None:
    try:
        private_key = private_key_of(given.key.read_text(encoding="ascii", errors="replace").strip())
    except OSError as exc:
        raise unusable(given.key, exc) from exc
    if given.to.exists():
        raise InvalidArgument(f"{given.to} is there already, and nothing is overwritten; name a new directory")
    keys = read_keys(given.keys)
    draft = given.to.with_name(f".{given.to.name}-{secrets.token_hex(8)}")
    try:
        draft.mkdir(mode=0o700, parents=True)
        digests: list[tuple[str, str]] = []
        contents = b""
        with given.bundle.open("rb") as file:
            for name, content in open_members(file, private_key=private_key):
                digests.append((name, hashlib.sha256(content).hexdigest()))
                place = draft / name
                place.parent.mkdir(parents=True, exist_ok=True)
                with os.fdopen(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
                    out.write(content)
                contents = content
        if not digests or digests[-1][0] != CONTENTS:
            raise InvalidBundle()
        stated = verify_contents(contents, keys)
        others = digests[:-1]
        if (stated.members, stated.contents_digest) != (len(others), contents_digest(others)):
            raise InvalidBundle("the bundle does not hold what the service has signed; get it again")
        if stated.recipient != public_line(private_key):
            raise InvalidBundle(
                "the service has made this bundle for another key, and somebody sealed it anew for yours"
            )
        draft.rename(given.to)
    except OSError as exc:
        raise unusable(Path(exc.filename or given.to), exc) from exc
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    print(json.dumps({"tenant": stated.tenant, "members": stated.members, "directory": str(given.to)}))
