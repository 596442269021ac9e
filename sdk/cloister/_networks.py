"""Networks that a caller brings: described by layers or imported with their weights, frozen by name. Sends nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from cloister._errors import InvalidArgument
from cloister.wire.layers import Layer, has_weights

__all__ = ["ImportedNetwork", "network_of"]


class ImportedNetwork(Protocol):
    """What `from_torch`, `from_keras` and `from_onnx` of `cloister_privacy.architecture` give."""

    @property
    def layers(self) -> tuple[Layer, ...]: ...

    @property
    def weights(self) -> Mapping[str, NDArray[np.float32]]: ...


def network_of(
    layers: Sequence[Layer] | None, network: ImportedNetwork | None, freeze: Sequence[str]
) -> tuple[Sequence[Layer] | None, bytes | None]:
    """The layers to plan with, and the weights to start from as safetensors. Raises InvalidArgument."""
    if layers is not None and network is not None:
        raise InvalidArgument("give layers or network, not both: a network brings its layers")
    weights = None
    if network is not None and not (hasattr(network, "layers") and hasattr(network, "weights")):
        raise InvalidArgument(
            f"network is a {type(network).__name__}; import it first, by from_torch, from_keras or from_onnx of "
            "cloister_privacy.architecture"
        )
    if network is not None:
        layers = network.layers
        weights = save({name: np.ascontiguousarray(each, dtype=np.float32) for name, each in network.weights.items()})
    if not freeze:
        return layers, weights
    if isinstance(freeze, str):
        raise InvalidArgument(f"freeze is a sequence of names; give [{freeze!r}]")
    if layers is None:
        raise InvalidArgument("freeze names layers of a network; give layers or network")
    _require_named(layers, freeze)
    return [_frozen(layer, freeze) for layer in layers], weights


def _require_named(layers: Sequence[Layer], freeze: Sequence[str]) -> None:
    names = [layer.name for layer in layers if layer.name is not None]
    for pattern in freeze:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InvalidArgument(
                f"freeze names {pattern!r}, and no layer is called so; named are {', '.join(names) or 'none'}"
            )


def _frozen(layer: Layer, freeze: Sequence[str]) -> Any:
    is_named = layer.name is not None and any(fnmatchcase(layer.name, pattern) for pattern in freeze)
    return layer.model_copy(update={"frozen": True}) if is_named and has_weights(layer) else layer
