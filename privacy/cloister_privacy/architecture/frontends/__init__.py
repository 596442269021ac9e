"""Fixed front ends: deterministic modules without parameters, from declared facts alone. Nothing in them is fitted on rows.

What an example becomes depends on that example only, so it is computed once for a run and kept.
"""

from __future__ import annotations

from cloister_privacy.architecture.frontends.audio import LogMel
from cloister_privacy.architecture.frontends.scattering import Scattering
from cloister_privacy.architecture.frontends.tables import hats
from cloister_privacy.architecture.frontends.text import TOKENS, HashedText, SparseLinear, places_and_values
from cloister_privacy.architecture.frontends.waves import CosineFeatures

__all__ = [
    "TOKENS",
    "CosineFeatures",
    "HashedText",
    "LogMel",
    "Scattering",
    "SparseLinear",
    "hats",
    "places_and_values",
]
