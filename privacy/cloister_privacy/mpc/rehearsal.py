"""All three roles in one process, on inputs that are public: how far a shared network is from the one in the clear, and what it costs.

It hides nothing from anybody: it is for publishing a network, on synthetic or public rows, and for tests.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cloister.wire.private_deployments import LayerBits
from cloister.wire.private_inputs import private_inputs
from cloister.wire.shares import FRACTION_BITS, decode, encode, join, split
from cloister_privacy.architecture.network import Network
from cloister_privacy.architecture.values import values_of
from cloister_privacy.mpc.computation import Computation, Shared, Weight
from cloister_privacy.mpc.keystream import Index, Keystream
from cloister_privacy.mpc.material import Material, corrections, masks_of
from cloister_privacy.mpc.network import SharedNetwork, split_weights
from cloister_privacy.mpc.ring import Ring

__all__ = ["MeasuredError", "measure_error", "outputs_of", "rehearse"]

_PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class MeasuredError:
    """A shared network beside the network in the clear, on public rows."""

    max_error: float
    """The largest difference of an output: a logit, or a number in units of its declared range."""
    equal_argmax: float
    """The share of rows with the same largest output."""
    exchanges: int
    bytes_sent: int
    """By each party."""
    bytes_dealt: int
    """To party 0."""


@dataclass(frozen=True, slots=True)
class _Rehearsed:
    outputs: NDArray[np.float64]
    exchanges: int
    bytes_sent: int
    bytes_dealt: int


def rehearse(network: SharedNetwork, weights: Mapping[str, torch.Tensor], inputs: Mapping[str, Ring]) -> _Rehearsed:
    """The network's outputs, [n, k], as two parties in this process compute them of public inputs in fixed point."""
    rows = len(next(iter(inputs.values())))
    keys, index = (os.urandom(32), os.urandom(32)), Index(rows, 1)
    masks = masks_of(keys, network.masked)
    program = network.program(rows)
    body = corrections(program, index=index, keys=keys, masks=masks)
    weight_shares = split_weights(network, weights)
    opened = {name: join([each[name] for each in weight_shares]) - mask for name, mask in masks.items()}
    shared = {name: split(each) for name, each in inputs.items()}
    ways: tuple[queue.Queue[bytes], queue.Queue[bytes]] = (queue.Queue(), queue.Queue())
    sent: list[int] = []

    def compute(party: int) -> Shared:
        def exchange(payload: bytes) -> bytes:
            if party == 0:
                sent.append(len(payload))
            ways[1 - party].put(payload)
            return ways[party].get(timeout=_PATIENCE_S)

        own = masks_of(keys[party : party + 1], network.masked)
        c = Computation(
            party,
            Material(Keystream.of(keys[party], index), corrections=body if party == 0 else None),
            exchange,
            weights={n: Weight(e, own[n] + e if party == 0 else own[n]) for n, e in opened.items()},
            shares={name: weight_shares[party][name] for name in network.added},
            fraction_bits=network.fraction_bits,
        )
        return network.run(c, {name: Shared(each[party], network.fraction_bits) for name, each in shared.items()})

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(compute, (0, 1)))
    total: Ring = join([each.share for each in found])
    return _Rehearsed(decode(total, fraction_bits=found[0].bits), len(sent), sum(sent), len(body))


def measure_error(
    network: Network,
    rows: Mapping[str, NDArray[Any]],
    *,
    fraction_bits: int = FRACTION_BITS,
    layer_bits: Sequence[LayerBits] = (),
) -> MeasuredError:
    """How far the shared network is from this one on public rows, as `cloister.wire.rows` has them.

    Raises LayerNotShared, and NotFinite or OutOfRange for inputs that cannot be shared.
    """
    architecture = network.architecture
    shared = SharedNetwork(architecture, fraction_bits=fraction_bits, layer_bits=layer_bits)
    inputs = private_inputs(architecture, rows)
    words = {name: encode(name, each, fraction_bits=fraction_bits) for name, each in inputs.items()}
    found = rehearse(shared, network.state_dict(), words)
    clear = outputs_of(network, rows)
    return MeasuredError(
        float(np.abs(found.outputs - clear).max()),
        float((found.outputs.argmax(axis=1) == clear.argmax(axis=1)).mean()),
        found.exchanges,
        found.bytes_sent,
        found.bytes_dealt,
    )


def outputs_of(network: Network, rows: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    """[n, k] in the clear, before a number is told in its own units."""
    last: list[torch.Tensor] = []
    hook = network.layers[-1].register_forward_hook(lambda module, given, outputs: last.append(outputs))
    try:
        with torch.inference_mode():
            network(values_of(network.architecture.inputs, rows, device="cpu"))
    finally:
        hook.remove()
    found: NDArray[np.float64] = last[0].numpy().astype(np.float64)
    return found.reshape(len(found), -1)
