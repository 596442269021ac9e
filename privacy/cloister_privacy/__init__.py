"""Differentially private training as a library: plans, accounting, networks as data, training, sealing. No SQL, no HTTP.

Importing the package, its plans or its errors loads no torch.
"""

from cloister_privacy.errors import PrivacyError
from cloister_privacy.plan import DPPlan

__all__ = ["DPPlan", "PrivacyError"]
