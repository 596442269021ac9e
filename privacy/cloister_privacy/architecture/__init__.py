"""Networks as data: spec -> checked shapes -> torch module -> safetensors bytes and back. No code and no pickle.

Importers make specs of networks that people have; `summary` and `picture` show one. What loads torch is imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cloister_privacy.architecture.inputs import validate_inputs
from cloister_privacy.architecture.picture import picture
from cloister_privacy.architecture.shapes import PARAMETER_LIMIT, check, encoded_width, measure
from cloister_privacy.architecture.summary import summary

if TYPE_CHECKING:
    from cloister_privacy.architecture.importers import (
        Imported,
        ModelNotSupported,
        from_keras,
        from_onnx,
        from_torch,
    )
    from cloister_privacy.architecture.network import Network, build
    from cloister_privacy.architecture.weights import from_bytes, to_bytes

__all__ = [
    "PARAMETER_LIMIT",
    "Imported",
    "ModelNotSupported",
    "Network",
    "build",
    "check",
    "encoded_width",
    "from_bytes",
    "from_keras",
    "from_onnx",
    "from_torch",
    "measure",
    "picture",
    "summary",
    "to_bytes",
    "validate_inputs",
]

_LAZY = {
    **dict.fromkeys(("Imported", "ModelNotSupported", "from_keras", "from_onnx", "from_torch"), "importers"),
    **dict.fromkeys(("Network", "build"), "network"),
    **dict.fromkeys(("from_bytes", "to_bytes"), "weights"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
