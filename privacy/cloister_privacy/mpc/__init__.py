"""Private inference: two parties and a dealer compute a network's outputs on shares, and none of them sees a number. No SQL, no HTTP.

docs/private-inference.md says what that is worth, and what it is not.
"""

from cloister_privacy.mpc.errors import (
    IndexBurned,
    LayerNotShared,
    MaterialExhausted,
    MaterialRefused,
    PeerRefused,
    PrivateInferenceError,
    RequestDropped,
    ScaleRefused,
    SharesOfAnother,
)
from cloister_privacy.mpc.network import SharedNetwork, split_weights
from cloister_privacy.mpc.rehearsal import MeasuredError, choose_fraction_bits, measure_error

__all__ = [
    "IndexBurned",
    "LayerNotShared",
    "MaterialExhausted",
    "MaterialRefused",
    "MeasuredError",
    "PeerRefused",
    "PrivateInferenceError",
    "RequestDropped",
    "ScaleRefused",
    "SharedNetwork",
    "SharesOfAnother",
    "choose_fraction_bits",
    "measure_error",
    "split_weights",
]
