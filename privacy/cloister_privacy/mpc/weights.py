"""A party's share of the weights on its way: sealed for that party's key, its deployment and its number. Knows bytes and keys."""

from __future__ import annotations

from collections.abc import Mapping

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from cloister.wire._hpke import SUITE
from cloister.wire.shares import Shares
from cloister_privacy.mpc.errors import SharesOfAnother
from cloister_privacy.mpc.network import SharedNetwork
from cloister_privacy.mpc.ring import Ring
from cloister_privacy.sealing.context import length_prefixed

__all__ = ["open_shares", "seal_shares"]

_LINE = b"cloister.mpc.weights/1\n"
_NO_REQUEST = bytes(16)


def seal_shares(
    shares: Mapping[str, Ring], public: X25519PublicKey, *, network: SharedNetwork, deployment: str, party: int
) -> bytes:
    """The share of a party, for the holder of this key alone (HPKE, RFC 9180). Raises SharesOfAnother for another network's."""
    network.check_weights(shares)
    body = Shares(deployment, _NO_REQUEST, party, shares, network.fraction_bits).to_bytes()
    return _LINE + SUITE.encrypt(body, public, info=_info(network, deployment, party))


def open_shares(
    sealed: bytes, private: X25519PrivateKey, *, network: SharedNetwork, deployment: str, party: int
) -> dict[str, Ring]:
    """What was sealed for this party of this deployment and network. Raises SharesOfAnother, and gives out nothing."""
    try:
        if not sealed.startswith(_LINE):
            raise ValueError
        body = SUITE.decrypt(sealed[len(_LINE) :], private, info=_info(network, deployment, party))
    except (InvalidTag, ValueError):
        raise SharesOfAnother(
            "the share of the weights does not open: it was changed, or is for another party, deployment or network; deploy again"
        ) from None
    shares = dict(Shares.from_bytes(body).tensors)
    network.check_weights(shares)
    return shares


def _info(network: SharedNetwork, deployment: str, party: int) -> bytes:
    return _LINE + length_prefixed(deployment, network.digest, str(party))
