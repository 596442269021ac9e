"""Networks that people already have, as layers of the language and weights. Runs on the client, and sends nothing.

The source is read, never kept: what comes out is data. Each importer loads its framework when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cloister_privacy.architecture.importers.imported import Imported, ModelNotSupported

if TYPE_CHECKING:
    from cloister_privacy.architecture.importers.keras_source import from_keras
    from cloister_privacy.architecture.importers.onnx_source import from_onnx
    from cloister_privacy.architecture.importers.torch_source import from_torch

__all__ = ["Imported", "ModelNotSupported", "from_keras", "from_onnx", "from_torch"]

_LAZY = {"from_keras": "keras_source", "from_onnx": "onnx_source", "from_torch": "torch_source"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
