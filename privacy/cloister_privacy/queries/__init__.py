"""Noisy answers about private rows: what they cost, what they will be worth, and their release through OpenDP. Its caller charges.

    plan = QueryPlan.of(request, schema=columns, unit="row")
    charge(plan.event())  # the caller's ledger; its RDP at each order: rdp_of_pure(event.epsilon, orders=...)
    results = release(plan, rows)

Importing the package loads neither OpenDP nor torch.
"""

from cloister_privacy.queries.cost import rdp_of_pure, rdp_of_zcdp
from cloister_privacy.queries.mechanism import cost_of
from cloister_privacy.queries.plan import QueryPlan
from cloister_privacy.queries.release import release

__all__ = ["QueryPlan", "cost_of", "rdp_of_pure", "rdp_of_zcdp", "release"]
