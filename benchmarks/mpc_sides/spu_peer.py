"""SecretFlow's SPU, protocol SEMI2K, over its own links, in an environment of its own.

Its dealer is the default, party 0, which then knows every mask. Its truncation is the default too, which like ours is never wildly
wrong. Weights are masked once (`make_cached_var`), as ours are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import spu
from spu.experimental import make_cached_var, reveal
from spu.utils import frontend

from mpc_sides.seat import Case, Seat, answer

FRACTION_BITS = 20
"""As ours; its own default is 18."""


def main() -> None:
    seat = Seat.taken()
    case = seat.case()
    config = spu.RuntimeConfig(spu.ProtocolKind.SEMI2K, spu.FieldType.FM64, FRACTION_BITS)
    io = spu.Io(2, config)
    weights = {
        f"{number}_{key}": _laid_out(key, weight)
        for number, (_, arrays) in enumerate(case.layers)
        for key, weight in arrays.items()
    }
    values = {"x": _channels_last(case.x), **weights}
    shared = seat.directory / "1.shares"
    if seat.rank == 0:
        shares = {name: io.make_shares(value, spu.Visibility.VIS_SECRET) for name, value in values.items()}
        shared.write_text(json.dumps({name: _packed(each[1]) for name, each in shares.items()}))
    runtime = spu.Runtime(_link(seat), config)
    for name in values:
        mine = shares[name][0] if seat.rank == 0 else _unpacked(json.loads(shared.read_text())[name])
        runtime.set_var(name, mine)

    large = [name for name, value in weights.items() if value.ndim > 1]
    held = {name: f"{name}_held" if name in large else name for name in values}
    runtime.run(
        _compiled(
            lambda *given: [make_cached_var(each) for each in given],
            values,
            {n: n for n in large},
            [held[n] for n in large],
        )
    )
    infer = _compiled(lambda *given: _infer(case, dict(zip(values, given, strict=True))), values, held, ["outputs"])
    opened = _compiled(reveal, {"outputs": np.zeros((1, 10), np.float32)}, {"outputs": "outputs"}, ["opened"])

    def told(count: int) -> dict[str, Any]:
        runtime.run(opened)
        return {"outputs": io.reconstruct([runtime.get_var("opened")] * 2).tolist()}

    answer(lambda: runtime.run(infer), told=told)


def _infer(case: Case, given: dict[str, Any]) -> Any:
    found = given["x"]
    for number, (layer, _) in enumerate(case.layers):
        weight, bias = given.get(f"{number}_weight"), given.get(f"{number}_bias")
        match layer["type"]:
            case "linear":
                found = found @ weight + bias
            case "conv2d":
                around = [(each, each) for each in layer["padding"]]
                order = ("NHWC", "HWIO", "NHWC")
                found = jax.lax.conv_general_dilated(found, weight, (1, 1), around, dimension_numbers=order) + bias
            case "max_pool":
                window = (1, *layer["kernel_size"], 1)
                found = jax.lax.reduce_window(found, -np.inf, jax.lax.max, window, window, "VALID")
            case "relu":
                found = jax.nn.relu(found)
            case "flatten":
                found = found.transpose(0, 3, 1, 2).reshape(1, -1)
            case other:
                raise AssertionError(f"no {other} here")
    return found


def _laid_out(key: str, weight: Any) -> Any:
    """As `_infer` multiplies by it: SPU keeps a mask only of what it is given as it is."""
    if key == "bias":
        return weight
    return np.ascontiguousarray(weight.T if weight.ndim == 2 else weight.transpose(2, 3, 1, 0))


def _channels_last(x: Any) -> Any:
    return x if x.ndim == 2 else np.ascontiguousarray(x.transpose(0, 2, 3, 1))


def _compiled(function: Callable[..., Any], values: dict[str, Any], inputs: dict[str, str], outputs: list[str]) -> Any:
    """`inputs` says by which variable each value is given."""
    shapes = [values[name] for name in inputs]
    secret = [spu.Visibility.VIS_SECRET] * len(shapes)
    names = list(inputs.values())
    return frontend.compile(frontend.Kind.JAX, function, shapes, {}, names, secret, lambda flat: outputs)[0]


def _link(seat: Seat) -> Any:
    description = spu.link.Desc()
    for rank, (host, port) in enumerate(seat.addresses):
        description.add_party(f"party-{rank}", f"{host}:{port}")
    return spu.link.create_brpc(description, seat.rank)


def _packed(share: Any) -> dict[str, Any]:
    return {"meta": share.meta.hex(), "chunks": [chunk.hex() for chunk in share.share_chunks]}


def _unpacked(said: dict[str, Any]) -> Any:
    share = spu.libspu.Share()
    share.meta, share.share_chunks = bytes.fromhex(said["meta"]), [bytes.fromhex(chunk) for chunk in said["chunks"]]
    return share


if __name__ == "__main__":
    main()
