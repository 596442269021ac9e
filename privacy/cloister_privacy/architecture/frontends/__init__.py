"""Fixed front ends: deterministic modules without parameters, from declared facts alone. Nothing in them is fitted on rows.

What an example becomes depends on that example only, so it is computed once for a run and kept. Modules are imported from where they
are: `geometry` loads no torch.
"""
