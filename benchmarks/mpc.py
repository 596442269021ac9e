"""Private inference beside CrypTen, sustained at batch 1: the same networks, each side in processes of its own on loopback.

make bench NAME=mpc [ARGS="--quick"]

CrypTen runs as it is: by its insecure provider (TFP, where party 0 knows every mask) and by its third party (TTP), over plain gloo.
Ours runs two parties and the dealer over TLS, with the dealer's work and bytes and the burning of indices included; material for
one request alone is dealt ahead, so that none of the work hides in the others' turns. Input and weights are shared before, and
outputs stay shared, on all sides. Blocks of requests take turns; a ratio is of the medians of a request's time. Bytes are those
that one party sends, and for ours all that the dealer sends too; CrypTen's are by its own count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from cloister.wire import layers as wire
from cloister.wire.shares import Shares, decode, join
from cloister_privacy.architecture import Network
from cloister_privacy.mpc import Dealer, Limits, Party
from cloister_privacy.mpc.crypten_compat import load_crypten
from mpc_groups import ROLES, Group, network_of, shares_of

NETWORKS: dict[str, tuple[tuple[int, ...], tuple[wire.Layer, ...]]] = {
    "mlp": (
        (784,),
        (
            wire.Linear(in_features=784, out_features=128),
            wire.ReLU(),
            wire.Linear(in_features=128, out_features=10),
        ),
    ),
    "cnn": (
        (1, 28, 28),
        (
            wire.Conv2d(in_channels=1, out_channels=16, kernel_size=(3, 3), padding=(1, 1)),
            wire.ReLU(),
            wire.MaxPool(kernel_size=(2, 2)),
            wire.Conv2d(in_channels=16, out_channels=32, kernel_size=(3, 3), padding=(1, 1)),
            wire.ReLU(),
            wire.MaxPool(kernel_size=(2, 2)),
            wire.Flatten(),
            wire.Linear(in_features=1568, out_features=10),
        ),
    ),
}
SIDES = {"ours": 3, "tfp": 2, "ttp": 3}
"""How many processes each takes."""


def network(name: str) -> Network:
    """The same at each process: its weights are drawn from a fixed seed."""
    shape, layers = NETWORKS[name]
    made = network_of(shape, *layers)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in made.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return made


def image(name: str) -> np.ndarray[Any, Any]:
    return np.random.default_rng(3).uniform(0, 1, (1, *NETWORKS[name][0])).astype(np.float32)


class Side:
    """The processes of one side; the first tells times."""

    def __init__(self, side: str, name: str, directory: Path) -> None:
        self.processes = []
        common = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "DISTRIBUTED_BACKEND": "gloo"}
        common["RENDEZVOUS"] = f"file://{directory / side}-{name}"
        for rank in range(SIDES[side]):
            command = [
                sys.executable,
                __file__,
                "--role",
                side,
                "--rank",
                str(rank),
                "--network",
                name,
                "--directory",
                str(directory),
            ]
            self.processes.append(
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**common, "RANK": str(rank)}
                )
            )
        self._told()

    def run(self, count: int) -> dict[str, Any]:
        """So many requests, one after the other."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{count}\n")
            process.stdin.flush()
        return self._told()

    def _told(self) -> dict[str, Any]:
        told = [json.loads(process.stdout.readline()) for process in self.processes if process.stdout is not None]
        return dict(told[0])

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def tell(**said: Any) -> None:
    print(json.dumps(said), flush=True)


def run_crypten(side: str, name: str, rank: int) -> None:
    warnings.simplefilter("ignore")
    crypten = load_crypten()
    crypten.cfg.mpc.provider = side.upper()
    if rank == 2:
        import threading

        threading.Thread(target=crypten.mpc.provider.TTPServer, daemon=True).start()
        tell()
        for _ in sys.stdin:
            tell()
        return
    crypten.init()
    model = crypten.nn.Sequential(*crypten_layers(crypten, network(name)))
    model.eval()
    for module in model.modules():
        module.encrypted = True
    model.encrypted = True
    x = crypten.cryptensor(torch.from_numpy(image(name)), src=0)
    with crypten.no_grad(), torch.inference_mode():
        found = model(x).get_plain_text()
        error = float((found - network(name)({"x": torch.from_numpy(image(name))})).abs().max())
        crypten.cfg.communicator.verbose = True
        crypten.reset_communication_stats()
        model(x)
        sent = crypten.comm.get().get_communication_stats()["bytes"]
        crypten.cfg.communicator.verbose = False
        tell()
        for line in sys.stdin:
            times = []
            for _ in range(int(line)):
                started = time.perf_counter()
                model(x)
                times.append(time.perf_counter() - started)
            tell(times=times, bytes=sent, error=error)


def crypten_layers(crypten: Any, made: Network) -> list[Any]:
    found = []
    for layer, module in zip(made.architecture.layers, made.layers, strict=True):
        match layer:
            case wire.Linear():
                found.append(crypten.nn.Linear(layer.in_features, layer.out_features))
            case wire.Conv2d():
                found.append(
                    crypten.nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding)
                )
            case wire.MaxPool():
                found.append(crypten.nn.MaxPool2d(layer.kernel_size[0], stride=layer.kernel_size[0]))
            case wire.ReLU():
                found.append(crypten.nn.ReLU())
            case _:
                found.append(crypten.nn.Flatten())
        for key, weight in module.state_dict().items():
            found[-1].set_parameter(key, crypten.cryptensor(weight, src=0))
    return found


def run_ours(name: str, rank: int, directory: Path) -> None:
    made, limits = network(name), Limits(form_s=120, request_s=120, ahead=1)
    group = _group(made, directory, name, rank)
    role = ROLES[rank]
    if rank == 2:
        Dealer(group.identities[role], group.deployment, group.network, limits=limits)
        tell()
        for _ in sys.stdin:
            tell()
        return
    party = Party(
        rank,
        group.identities[role],
        group.deployment,
        group.network,
        group.weights[rank],
        directory / name / role,
        limits=limits,
    )
    party.form()
    tell()
    share = Shares.from_bytes((directory / name / f"{rank}.shares").read_bytes())
    for line in sys.stdin:
        times, before = [], party.bytes_sent
        for _ in range(int(line)):
            started = time.perf_counter()
            found = party.lead(share) if rank == 0 else party.follow(lambda request: share, wait_s=120)
            times.append(time.perf_counter() - started)
        assert found is not None
        (directory / name / f"{rank}.out").write_bytes(found.to_bytes())
        dealt = sum(part.nbytes for kind in group.network.program(1) for part in kind.derived)
        tell(times=times, bytes=(party.bytes_sent - before) / int(line) + dealt)


def _group(made: Network, directory: Path, name: str, rank: int) -> Group:
    """Made by the first process, and read by the others: identities, peers and shares of the weights."""
    here, done = directory / name, directory / name / "done"
    if rank == 0:
        here.mkdir()
        group = Group.create(here, made)
        for number, share in enumerate(shares_of(group, image(name))):
            (here / f"{number}.shares").write_bytes(share.to_bytes())
            weights = Shares("bench", bytes(16), number, group.weights[number])
            (here / f"{number}.weights").write_bytes(weights.to_bytes())
        ports = [peer.port for peer in (*group.deployment.parties, group.deployment.dealer)]
        (here / "ports").write_text(json.dumps(ports))
        done.touch()
        return group
    while not done.exists():
        time.sleep(0.05)
    return Group.read(here, made, json.loads((here / "ports").read_text()))


def error_of_ours(name: str, directory: Path) -> float:
    found = [Shares.from_bytes((directory / name / f"{rank}.out").read_bytes()) for rank in (0, 1)]
    outputs = decode(join([each.tensors["outputs"] for each in found]), fraction_bits=found[0].fraction_bits)
    with torch.inference_mode():
        clear = network(name)({"x": torch.from_numpy(image(name))}).numpy()
    return float(np.abs(outputs - clear).max())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests")
    parser.add_argument("--role")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--network")
    parser.add_argument("--directory", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.role == "ours":
        return run_ours(given.network, given.rank, given.directory)
    if given.role:
        return run_crypten(given.role, given.network, given.rank)
    ratios: dict[str, float] = {}
    measured: dict[str, Any] = {}
    blocks, count = (2, 5) if given.quick else (10, 10)
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        for name in NETWORKS:
            sides = {side: Side(side, name, directory) for side in SIDES}
            times: dict[str, list[float]] = {side: [] for side in SIDES}
            last: dict[str, dict[str, Any]] = {}
            for side in sides.values():
                side.run(2)  # warm
            for _ in range(blocks):
                for key, side in sides.items():
                    last[key] = side.run(count)
                    times[key] += last[key]["times"]
            for side in sides.values():
                side.close()
            median = {key: statistics.median(each) for key, each in times.items()}
            errors = {key: last[key].get("error", 0.0) for key in ("tfp", "ttp")}
            errors["ours"] = error_of_ours(name, directory)
            measured[name] = {"median_ms": {k: round(v * 1e3, 2) for k, v in median.items()}, "max_error": errors}
            measured[name]["bytes"] = {key: each["bytes"] for key, each in last.items()}
            for peer in ("tfp", "ttp"):
                ratios[f"crypten_{peer}_over_ours_{name}"] = round(median[peer] / median["ours"], 3)
            ratios[f"bytes_ours_over_tfp_{name}"] = round(last["ours"]["bytes"] / last["tfp"]["bytes"], 4)
            print(name, measured[name])
    conditions = {
        "crypten": version("crypten"), "torch": torch.__version__, "requests": blocks * count, "cores": os.cpu_count(),
        "threads_each": 1, "machine": platform.machine(), "python": platform.python_version(), "link": "loopback",
        "measured": measured,
    }  # fmt: skip
    print(json.dumps({"name": "mpc", "ratios": ratios, "conditions": conditions}))


if __name__ == "__main__":
    main()
