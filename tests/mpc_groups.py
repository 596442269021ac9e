"""A deployment of two parties and a dealer on loopback, with certificates of its own, for tests."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cloister.wire.architecture import Architecture
from cloister.wire.columns import CategoryColumn, TensorColumn
from cloister.wire.layers import Flatten, Layer, Linear, ReLU
from cloister.wire.private_deployments import LayerBits
from cloister.wire.shares import Shares, decode, encode, join, split
from cloister_privacy.architecture import Network, build
from cloister_privacy.mpc import (
    Dealer,
    Deployment,
    Identity,
    Limits,
    Party,
    SharedNetwork,
    SharesOfAnother,
    split_weights,
)
from ports import free_port

__all__ = ["Group", "Running", "network_of", "shares_of", "small_network"]

ROLES = ("party-0", "party-1", "dealer")
_PATIENCE_S = 120.0


@dataclass(frozen=True)
class Group:
    deployment: Deployment
    identities: dict[str, Identity]
    network: SharedNetwork
    weights: tuple[dict[str, NDArray[np.uint64]], ...]

    @classmethod
    def create(
        cls,
        directory: Path,
        network: Network,
        *,
        days: int = 1,
        addresses: Sequence[tuple[str, int]] = (),
        layer_bits: Sequence[LayerBits] = (),
    ) -> Group:
        """Each role at its address; without any on loopback, at ports that are free."""
        identities = {name: Identity.create(directory, name, days=days) for name in ROLES}
        addresses = addresses or [("127.0.0.1", free_port()) for _ in ROLES]
        peers = [identities[name].peer(name, *address) for name, address in zip(ROLES, addresses, strict=True)]
        shared = SharedNetwork(network.architecture, layer_bits=layer_bits)
        deployment = Deployment("dep_" + "0" * 32, (peers[0], peers[1]), peers[2])
        return cls(deployment, identities, shared, split_weights(shared, network.state_dict()))

    @classmethod
    def read(cls, directory: Path, network: Network, addresses: Sequence[tuple[str, int]]) -> Group:
        """What `create` made, in another process; with the shares of the weights that were written beside it."""
        identities = {name: Identity(directory / f"{name}.crt", directory / f"{name}.key") for name in ROLES}
        peers = [identities[name].peer(name, *address) for name, address in zip(ROLES, addresses, strict=True)]
        weights = [Shares.from_bytes((directory / f"{number}.weights").read_bytes()).tensors for number in (0, 1)]
        deployment = Deployment("dep_" + "0" * 32, (peers[0], peers[1]), peers[2])
        return cls(deployment, identities, SharedNetwork(network.architecture), tuple(dict(each) for each in weights))


def network_of(shape: tuple[int, ...], *layers: Layer, values: int = 10) -> Network:
    names = tuple(f"v{k}" for k in range(values))
    architecture = Architecture(
        inputs={"x": TensorColumn(shape=shape, low=0, high=1)},
        layers=layers,
        target="kind",
        output=CategoryColumn(values=names),
        loss="cross_entropy",
    )
    torch.manual_seed(0)
    return build(architecture).eval()


def small_network() -> Network:
    hidden = Linear(in_features=16, out_features=8)
    return network_of((4, 4), Flatten(), hidden, ReLU(), Linear(in_features=8, out_features=10))


def shares_of(group: Group, x: NDArray[Any]) -> tuple[Shares, Shares]:
    """One request's shares for both parties."""
    request = secrets.token_bytes(16)
    first, second = split(encode("x", x, fraction_bits=group.network.fraction_bits))
    bits = group.network.fraction_bits
    return (
        Shares(group.deployment.id, request, 0, {"x": first}, bits),
        Shares(group.deployment.id, request, 1, {"x": second}, bits),
    )


class Running:
    """A group in this process, each party in a thread of its own while both must work."""

    def __init__(self, group: Group, directory: Path, *, limits: Limits | None = None) -> None:
        limits = replace(limits or Limits(), form_s=_PATIENCE_S, request_s=10 * _PATIENCE_S)
        self.group, self.directory, self._limits = group, directory, limits
        self.dealer = Dealer(group.identities["dealer"], group.deployment, group.network, limits=limits)
        self.parties = tuple(
            Party(
                k,
                group.identities[f"party-{k}"],
                group.deployment,
                group.network,
                group.weights[k],
                directory / f"party-{k}",
                limits=limits,
            )
            for k in (0, 1)
        )

    def __enter__(self) -> Running:
        self.form()
        return self

    def __exit__(self, *exc: object) -> None:
        for party in self.parties:
            party.close()
        self.dealer.close()

    def restart_dealer(self) -> None:
        self.dealer.close()
        group = self.group
        self.dealer = Dealer(group.identities["dealer"], group.deployment, group.network, limits=self._limits)

    def form(self) -> str:
        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(lambda party: party.form(), self.parties)
        assert first == second
        return first

    def _follow(self, find: Callable[[bytes], Shares | None]) -> list[Shares]:
        while True:
            followed = self.parties[1].follow(find, wait_s=0.1)
            if followed or not self._is_asking:
                return followed

    def ask(self, x: NDArray[Any]) -> NDArray[np.float64]:
        return self.answer(shares_of(self.group, x))

    def answer(self, shares: tuple[Shares, Shares], *, at_party_1: Shares | None = None) -> NDArray[np.float64]:
        """The outputs; whatever either party raises. `at_party_1` is what it finds in place of its share."""
        (answer,) = self.answers([shares[0]], lambda request: at_party_1 or shares[1])
        if isinstance(answer, SharesOfAnother):
            raise answer
        return answer

    def answers(
        self, led: Sequence[Shares], find: Callable[[bytes], Shares | None]
    ) -> list[NDArray[np.float64] | SharesOfAnother]:
        """The outputs of requests that are led as one, or why one has none; `find` is as party 1 asks it."""
        with ThreadPoolExecutor(1) as pool:
            self._is_asking = True
            following = pool.submit(self._follow, find)
            try:
                answered = self.parties[0].lead(led)
            finally:
                self._is_asking = False
            followed = {each.request: each for each in following.result()}
        return [self._joined(each, followed) if isinstance(each, Shares) else each for each in answered]

    def _joined(self, led: Shares, followed: dict[bytes, Shares]) -> NDArray[np.float64]:
        joined = join([each.tensors["outputs"] for each in (led, followed[led.request])])
        return decode(joined, fraction_bits=led.fraction_bits)
