"""Named tensors as bytes: safetensors with a format in its metadata. Refuses anything else, and never unpickles."""

from __future__ import annotations

import json
from collections.abc import Mapping

import safetensors.torch
import torch
from torch import Tensor

from cloister_privacy.errors import PrivacyError

__all__ = ["most_bytes", "read", "require", "write"]

_LONGEST_DTYPE = "F8_E4M3FNUZ"


def write(tensors: Mapping[str, Tensor], *, format: str, metadata: Mapping[str, str]) -> bytes:
    """The tensors, copied to the CPU, with `format` and the rest of `metadata` in the header."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    body: bytes = safetensors.torch.save(on_cpu, metadata={"format": format, **metadata})
    return body


def most_bytes(tensors: Mapping[str, Tensor], *, format: str, metadata: Mapping[str, str]) -> int:
    """The most bytes that `write` makes of such tensors, which may be on no device: their sizes alone are asked for."""
    size = sum(each.nbytes for each in tensors.values())
    header: dict[str, object] = {"__metadata__": {"format": format, **metadata}}
    for name, each in tensors.items():
        # json writes blanks and escapes that safetensors leaves out; no offset is longer than the last one.
        header[name] = {"dtype": _LONGEST_DTYPE, "shape": list(each.shape), "data_offsets": [size, size]}
    return 8 + len(json.dumps(header)) + 8 + size  # the header's length, the header, its padding, the data


def read(
    body: bytes | memoryview, *, format: str, refused: type[PrivacyError]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of bytes that `write` made with this format; raises `refused` for any others."""
    body = bytes(body)
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(body)
        header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
        metadata: dict[str, str] = header.get("__metadata__", {})
    except Exception as exc:  # safetensors raises errors of several families, none of them documented
        raise refused(
            f"these bytes are not safetensors ({type(exc).__name__}); they are damaged or of another kind"
        ) from None
    if metadata.get("format") != format:
        raise refused(f"the format is {metadata.get('format')!r}, not {format!r}; use the version that wrote it")
    return tensors, metadata


def require(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor], *, refused: type[PrivacyError]) -> None:
    """Raise `refused` unless names, shapes and types are those of `like` and every number is finite."""
    if tensors.keys() != like.keys():
        raise refused("the tensors are not those of this network; it was made from another spec")
    for name, tensor in tensors.items():
        if tensor.shape != like[name].shape or tensor.dtype != like[name].dtype:
            raise refused(
                f"tensor {name!r} has another shape or type than this network's; it was made from another spec"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise refused(f"tensor {name!r} has values that are not finite")
