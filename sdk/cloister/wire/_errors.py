"""The root of everything that the SDK raises, and the refusal of a value that no server would accept. Knows no library.

Both are here, and not in `cloister._errors`, because the wire raises them too; the whole tree is drawn there.
"""

from __future__ import annotations

__all__ = ["CloisterError", "InvalidArgument"]


class CloisterError(Exception):
    """The root of everything the SDK raises."""


class InvalidArgument(CloisterError, ValueError):
    """An argument that no server would accept; nothing was sent."""
