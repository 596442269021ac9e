"""Empirical audits of the training engine on synthetic rows: checks that find faults, and a one-run canary audit.

They see what a run releases and nothing of how it came about. They find faults; they prove nothing, and no figure of theirs is a
privacy guarantee.
"""

from cloister_privacy.canaries.audit import Audit, audit_run, epsilon_lower_bound
from cloister_privacy.canaries.checks import check_clip, check_divisor, check_engine, check_noise, check_sampling
from cloister_privacy.canaries.report import Finding, Report

__all__ = [
    "Audit",
    "Finding",
    "Report",
    "audit_run",
    "check_clip",
    "check_divisor",
    "check_engine",
    "check_noise",
    "check_sampling",
    "epsilon_lower_bound",
]
