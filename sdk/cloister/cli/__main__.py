"""`python -m cloister.cli`, which is `cloister` where no script was installed."""

from __future__ import annotations

import sys

from cloister.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
