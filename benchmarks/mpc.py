"""Private inference beside CrypTen and SPU, sustained at batch 1: the same networks, each side in processes of its own.

make bench NAME=mpc [ARGS="--quick"]

The sides are in `mpc_sides`: ours; CrypTen by its insecure provider (TFP) and by its third party (TTP); SPU by SEMI2K. Ours runs
over TLS, with the dealer's work and bytes and the burning of indices included; the links of the others are plain. Input and weights
are shared before, and outputs stay shared, on all sides; after each block they are opened, and compared with the network in the
clear. Blocks of requests take turns; a ratio is of the medians of a request's time. Bytes are those that one party sends, and for
ours all that the dealer sends too. All of it on loopback, and again (`_20ms`) with a round trip of 20 ms between any two processes.

`joined` is ours with eight requests in one program, as when eight clients wait at once: a figure without a bound, for no peer joins.

SPU has a virtual environment of its own, `.venv-bench-mpc`, made at the first run out of the dependency group `bench-mpc`.
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
import tomllib
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from mpc_sides import ours
from mpc_sides.latency import LOOPBACK, Link, NoLatency, delayed
from mpc_sides.networks import NETWORKS, outputs_in_the_clear, write_case

from ports import free_port

ROOT = Path(__file__).resolve().parents[1]
PEERS_VENV = ROOT / ".venv-bench-mpc"
SIDES = {
    "ours": ("ours", 3),
    "joined": ("ours", 3),
    "tfp": ("crypten_peer", 2),
    "ttp": ("crypten_peer", 3),
    "spu": ("spu_peer", 2),
}
"""The module of each, and how many processes it takes."""
PEERS = {"tfp": "crypten_tfp", "ttp": "crypten_ttp", "spu": "spu_semi2k"}
TOLERANCE = 1e-2
ROUND_TRIP_S = 0.02


class SPUMissing(Exception):
    """Why it cannot be measured here."""


def install_spu() -> Path:
    """Its interpreter. Raises SPUMissing, in the words of pip or of the import."""
    python = PEERS_VENV / "bin" / "python"
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["bench-mpc"]
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(PEERS_VENV)], check=True)
    for command in ("-m", "pip", "install", "--quiet", *wanted), ("-c", "import spu"):
        done = subprocess.run([str(python), *command], check=False, capture_output=True, text=True)
        if done.returncode:
            raise SPUMissing((done.stderr.strip().splitlines() or ["it ended without a word"])[-1])
    return python


class Side:
    """The processes of one side."""

    def __init__(self, side: str, python: Path, directory: Path, *, link: Link) -> None:
        """Started; `directory` is the network's, and has its name."""
        module, count = SIDES[side]
        here = directory / side
        here.mkdir()
        self._name, self._logs = f"{side} ({directory.name})", [here / f"{rank}.log" for rank in range(count)]
        addresses = [(host, free_port()) for host in link.hosts[:count]]
        if module == "ours":
            ours.prepare(directory.name, here, addresses)
        paths = [str(ROOT / "benchmarks"), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "WORLD_SIZE": "2",
            "DISTRIBUTED_BACKEND": "gloo", "RENDEZVOUS": f"file://{here / 'rendezvous'}",
        }  # fmt: skip
        if link.device:
            environment["GLOO_SOCKET_IFNAME"] = link.device
        self._processes = []
        for rank, log in enumerate(self._logs):
            command = [*link.prefixes[rank], str(python), "-m", f"mpc_sides.{module}", str(rank), str(here)]
            command += [f"{host}:{port}" for host, port in addresses]
            with log.open("w") as errors:
                self._processes.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        text=True,
                        cwd=here,
                        env={**environment, "RANK": str(rank)},
                    )
                )

    def wait(self) -> dict[str, Any]:
        """What the first process tells, when all have told."""
        told = [process.stdout.readline() for process in self._processes if process.stdout is not None]
        for said, log in zip(told, self._logs, strict=True):
            if not said:
                raise RuntimeError(f"a process of {self._name} died: {log.read_text()[-2000:]}")
        return dict(json.loads(told[0]))

    def ask(self, count: int) -> dict[str, Any]:
        """So many requests, one after the other."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{count}\n")
            process.stdin.flush()
        return self.wait()

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


def measure(name: str, pythons: dict[str, Path], *, link: Link, blocks: int, count: int) -> dict[str, dict[str, Any]]:
    """Of each side the median time of a request, its bytes and its largest error. Raises AssertionError for a wrong answer."""
    clear = outputs_in_the_clear(name)
    found: dict[str, dict[str, Any]] = {side: {"times": [], "max_error": 0.0} for side in pythons}
    with tempfile.TemporaryDirectory() as made, ExitStack() as stack:
        directory = Path(made) / name
        directory.mkdir()
        write_case(name, directory)
        sides = {}
        for key, python in pythons.items():
            sides[key] = Side(key, python, directory, link=link)
            stack.callback(sides[key].close)
        for side in sides.values():
            side.wait()
            side.ask(2)  # warm
        for _ in range(blocks):
            for key, side in sides.items():
                told, so_far = side.ask(count), found[key]
                error = float(np.abs(np.array(told["outputs"]) - clear).max())
                assert error < TOLERANCE, f"{key} is off by {error} on the {name}"
                so_far["times"] += told["times"]
                so_far["max_error"] = max(so_far["max_error"], error)
                so_far["bytes"] = told.get("bytes")
    for each in found.values():
        each["median_ms"] = statistics.median(each.pop("times")) * 1e3
    return found


def ratios_of(name: str, found: dict[str, dict[str, Any]], *, suffix: str) -> dict[str, float]:
    ratios = {
        f"{PEERS[side]}_over_ours_{name}{suffix}": round(each["median_ms"] / found["ours"]["median_ms"], 3)
        for side, each in found.items()
        if side in PEERS
    }
    if not suffix:
        ratios[f"bytes_ours_over_tfp_{name}"] = round(found["ours"]["bytes"] / found["tfp"]["bytes"], 4)
    return ratios


def conditions_of(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    joined = found["joined"]
    joined["requests_a_second_over_ours"] = ours.JOINED * found["ours"]["median_ms"] / joined["median_ms"]
    return {
        side: {key: float(f"{value:.4g}") for key, value in sorted(each.items()) if value is not None}
        for side, each in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests")
    quick = parser.parse_args().quick
    pythons = dict.fromkeys(("ours", "joined", "tfp", "ttp"), Path(sys.executable))
    conditions: dict[str, Any] = {
        "device": "cpu", "cores": os.cpu_count(), "threads_each": 1, "machine": platform.machine(),
        "python": platform.python_version(), "torch": version("torch"), "crypten": version("crypten"),
    }  # fmt: skip
    try:
        pythons["spu"] = install_spu()
    except SPUMissing as exc:
        conditions["spu"] = f"not measured: {exc}"
    else:
        conditions["spu"] = subprocess.check_output(
            [str(pythons["spu"]), "-c", "import spu; print(spu.__version__)"], text=True
        ).strip()
        conditions["spu_settings"] = (
            "SEMI2K, FM64, 20 fraction bits, trusted first party (it knows every mask), truncation that leaves the high bits right, "
            "masks of the weights opened once"
        )
    ratios: dict[str, float] = {}
    blocks, count = (2, 5) if quick else (10, 10)
    conditions["requests"] = blocks * count
    for name in NETWORKS:
        found = measure(name, pythons, link=LOOPBACK, blocks=blocks, count=count)
        ratios |= ratios_of(name, found, suffix="")
        conditions[name] = conditions_of(found)
        print(name, conditions[name])
    blocks, count = (1, 2) if quick else (4, 5)
    suffix = f"_{ROUND_TRIP_S * 1e3:.0f}ms"
    try:
        with delayed(round_trip_s=ROUND_TRIP_S) as link:
            conditions[f"requests{suffix}"] = blocks * count
            conditions[f"link{suffix}"] = (
                "network namespaces; a relay in user space holds each packet for half the round trip"
            )
            for name in NETWORKS:
                found = measure(name, pythons, link=link, blocks=blocks, count=count)
                ratios |= ratios_of(name, found, suffix=suffix)
                conditions[f"{name}{suffix}"] = conditions_of(found)
                print(name + suffix, conditions[f"{name}{suffix}"])
    except NoLatency as exc:
        conditions[f"link{suffix}"] = f"not measured: {exc}"
    print(json.dumps({"name": "mpc", "ratios": ratios, "conditions": conditions}))


if __name__ == "__main__":
    main()
