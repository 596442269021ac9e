"""The operator's commands: `cloister-server` and `cloister-admin`."""
