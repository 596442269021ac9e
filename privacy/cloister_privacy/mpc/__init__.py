"""Private inference: two parties and a dealer compute a network's outputs on shares, and none of them sees a number. No SQL, no HTTP.

docs/private-inference.md says what that is worth, and what it is not.
"""

from cloister_privacy.mpc.dealer import Dealer
from cloister_privacy.mpc.deployment import Deployment, Limits
from cloister_privacy.mpc.errors import (
    CoLocated,
    IndexBurned,
    LayerNotShared,
    MaterialExhausted,
    MaterialRefused,
    PeerRefused,
    PrivateInferenceError,
    RequestDropped,
    RoleFileRefused,
    ScaleRefused,
    SharesOfAnother,
)
from cloister_privacy.mpc.links import Identity, Peer
from cloister_privacy.mpc.network import SharedNetwork, split_weights
from cloister_privacy.mpc.party import Party
from cloister_privacy.mpc.rehearsal import MeasuredError, measure_error
from cloister_privacy.mpc.role_files import OpenedRole, open_role_file, seal_role_file
from cloister_privacy.mpc.scale import choose_scale
from cloister_privacy.mpc.weights import open_shares, seal_shares

__all__ = [
    "CoLocated",
    "Dealer",
    "Deployment",
    "Identity",
    "IndexBurned",
    "LayerNotShared",
    "Limits",
    "MaterialExhausted",
    "MaterialRefused",
    "MeasuredError",
    "OpenedRole",
    "Party",
    "Peer",
    "PeerRefused",
    "PrivateInferenceError",
    "RequestDropped",
    "RoleFileRefused",
    "ScaleRefused",
    "SharedNetwork",
    "SharesOfAnother",
    "choose_scale",
    "measure_error",
    "open_role_file",
    "open_shares",
    "seal_role_file",
    "seal_shares",
    "split_weights",
]
