"""HTTP routers: parse, authorise, call a feature, return."""
