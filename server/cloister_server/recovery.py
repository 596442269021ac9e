"""The recovery key of the deployment's own keystore: made, replaced, and used where its root is lost. Knows files; no SQL.

It opens the keystore and brings no key back that was destroyed. Other key providers have recovery of their own, or none.
"""

from __future__ import annotations

import logging

from cloister_privacy.sealing import KeyProviderError, LocalKeyProvider, RecoveryKey
from cloister_server import deployment, keys
from cloister_server.errors import Invalid, StartRefused
from cloister_server.keyring import LOCAL
from cloister_server.service import Service
from cloister_server.settings import Settings

__all__ = ["has_key", "recover", "renew", "try_key"]

log = logging.getLogger(__name__)


def has_key(service: Service) -> bool:
    """Whether the keystore has a recovery key. Raises Invalid where there is no keystore."""
    return _own_keystore(service).has_recovery_key


def renew(service: Service) -> RecoveryKey:
    """A recovery key, which is nowhere but in this answer; the one from before opens nothing any more.

    Raises Invalid where the deployment has no keystore of its own.
    """
    keystore = _own_keystore(service)
    with keys.alone(service.settings):
        try:
            key = keystore.new_recovery_key()
        except KeyProviderError as error:
            raise StartRefused(str(error)) from None
    log.info("keystore.recovery_key_made")
    return key


def try_key(settings: Settings, typed: str) -> None:
    """Open the keystore by its recovery key, and change nothing. Raises StartRefused where that does not open it."""
    _require_keystore(settings)
    try:
        LocalKeyProvider.open_by_recovery(settings.key_dir, RecoveryKey.parse(typed))
    except KeyProviderError as error:
        raise StartRefused(str(error)) from None


def recover(settings: Settings, typed: str, *, passphrase: str | None = None) -> None:
    """Make `settings.key_file` anew, or else let a new passphrase open the keystore, by its recovery key.

    Raises StartRefused where that does not open it, or the key file is there or lies with the data; then nothing is changed.
    """
    _require_keystore(settings)
    with keys.alone(settings):
        try:
            LocalKeyProvider.recover(
                settings.key_dir, RecoveryKey.parse(typed), key_file=settings.key_file, passphrase=passphrase
            )
        except KeyProviderError as error:
            raise StartRefused(str(error)) from None
    log.info("keystore.recovered")


def _require_keystore(settings: Settings) -> None:
    deployment.check_initialised(settings)
    deployment.check_apart(settings)
    if not deployment.has_keystore(settings):
        raise StartRefused(
            f"there is no keystore in {settings.key_dir} to recover: with other key providers keys are recovered by their own means, "
            "or not at all; else restore the keystore from a copy"
        )


def _own_keystore(service: Service) -> LocalKeyProvider:
    if LOCAL not in service.keys:
        raise Invalid(
            "this deployment has no keystore of its own, and so no recovery key: its keys are with other providers, which have "
            "recovery of their own, or none"
        )
    return service.keys.own_keystore()
