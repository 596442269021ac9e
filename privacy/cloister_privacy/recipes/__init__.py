"""Plans without hyper-parameters: a network and its training from public facts alone, for images, tables, text, sound and mixtures."""

from __future__ import annotations

from cloister_privacy.recipes.resolve import require_fit, resolve

__all__ = ["require_fit", "resolve"]
