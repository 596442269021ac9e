"""Fixed front ends: deterministic modules without parameters, from declared facts alone. Nothing in them is fitted on rows.

What an example becomes depends on that example only, so it is computed once for a run and kept.
"""

from __future__ import annotations

from cloister_privacy.architecture.frontends.audio import LogMel
from cloister_privacy.architecture.frontends.scattering import Scattering
from cloister_privacy.architecture.frontends.tables import hats
from cloister_privacy.architecture.frontends.text import HashedText

__all__ = ["HashedText", "LogMel", "Scattering", "hats"]
