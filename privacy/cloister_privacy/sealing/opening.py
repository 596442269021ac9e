"""Opens a key provider by its kind. Knows their names; a provider's library is loaded only where it is the one asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from cloister_privacy.sealing.local import LocalKeyProvider
from cloister_privacy.sealing.provider import KeyProvider

__all__ = ["ProviderKind", "open_provider"]

ProviderKind = Literal["local", "pkcs11", "aws_kms", "aws_kms_held", "vault_transit"]


def open_provider(kind: ProviderKind, **settings: Any) -> KeyProvider:
    """Open a provider with the settings of its class, secrets among them; nothing is read from the environment.

    - `local`: directory, and one of key_file, passphrase and root_key: LocalKeyProvider.
    - `pkcs11`: library, token_label, pin, and more: PKCS11KeyProvider.
    - `aws_kms`: region, and more: AWSKMSKeyProvider.
    - `aws_kms_held`: key_arn, and more: HeldAWSKMSKeyProvider.
    - `vault_transit`: address, token, and more: VaultTransitKeyProvider.

    Raises KeyProviderError where the provider refuses or its extra is not installed, TypeError for a setting that is
    missing or unknown, ValueError for one that cannot be.
    """
    if kind not in _OPENERS:
        raise ValueError(f"there is no key provider {kind!r}; take one of {', '.join(get_args(ProviderKind))}")
    return _OPENERS[kind](**settings)


def _local(*, directory: Path, root_key: bytes | None = None, **root: Any) -> KeyProvider:
    if root_key is None:
        return LocalKeyProvider.open(directory, **root)
    if root:
        raise ValueError("give exactly one of root_key, key_file and passphrase")
    return LocalKeyProvider(directory, root_key=root_key)


def _pkcs11(**settings: Any) -> KeyProvider:
    from cloister_privacy.sealing.pkcs11 import PKCS11KeyProvider

    return PKCS11KeyProvider(**settings)


def _aws_kms(**settings: Any) -> KeyProvider:
    from cloister_privacy.sealing.aws_kms import AWSKMSKeyProvider

    return AWSKMSKeyProvider(**settings)


def _aws_kms_held(**settings: Any) -> KeyProvider:
    from cloister_privacy.sealing.aws_kms_held import HeldAWSKMSKeyProvider

    return HeldAWSKMSKeyProvider(**settings)


def _vault_transit(**settings: Any) -> KeyProvider:
    from cloister_privacy.sealing.vault_transit import VaultTransitKeyProvider

    return VaultTransitKeyProvider(**settings)


_OPENERS: dict[str, Callable[..., KeyProvider]] = {
    "local": _local,
    "pkcs11": _pkcs11,
    "aws_kms": _aws_kms,
    "aws_kms_held": _aws_kms_held,
    "vault_transit": _vault_transit,
}
