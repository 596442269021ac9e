"""Training work: the one worker of a data directory, its durable workflow, and the child processes that train."""
