"""What private inference refuses, and why. Messages speak of public facts only: names, shapes, digests, indices.

PrivateInferenceError
├── LayerNotShared (an ArchitectureRefused)
├── ScaleRefused
├── SharesOfAnother
├── RoleFileRefused
├── CoLocated
├── MaterialError
│   ├── MaterialRefused
│   ├── MaterialExhausted
│   └── IndexBurned
└── RequestDropped
    └── PeerRefused
"""

from __future__ import annotations

from cloister_privacy.errors import ArchitectureRefused, PrivacyError

__all__ = [
    "CoLocated",
    "IndexBurned",
    "LayerNotShared",
    "MaterialError",
    "MaterialExhausted",
    "MaterialRefused",
    "PeerRefused",
    "PrivateInferenceError",
    "RequestDropped",
    "RoleFileRefused",
    "ScaleRefused",
    "SharesOfAnother",
]


class PrivateInferenceError(PrivacyError):
    """The root of what private inference refuses."""


class CoLocated(PrivateInferenceError):
    """Two roles that must not be one are, as far as they say."""


class LayerNotShared(PrivateInferenceError, ArchitectureRefused):
    """A layer that cannot be computed on shares well; the message names what to take in its place."""


class ScaleRefused(PrivateInferenceError):
    """Numbers of a network leave the range of fixed point, as public inputs tell."""


class SharesOfAnother(PrivateInferenceError):
    """Shares of another deployment, party, version or shape; nothing was spent on them."""


class RoleFileRefused(PrivateInferenceError):
    """What a role was given is not for it, not of this version, or not stated by whom it trusts."""


class MaterialError(PrivateInferenceError):
    """Correlated randomness that cannot be used."""


class MaterialRefused(MaterialError):
    """Material that was changed, is of another request, or is for another network."""


class MaterialExhausted(MaterialError):
    """The dealer gives no more in this generation, or within the budget."""


class IndexBurned(MaterialError):
    """An index that was used, or may have been, by a request before."""


class RequestDropped(PrivateInferenceError):
    """A peer failed, was late or disagreed: the request is gone with its material, and the group must be formed anew. Try again."""


class PeerRefused(RequestDropped):
    """Who answered does not hold the certificate that is pinned for it, or its certificate has expired."""
