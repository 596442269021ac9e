"""What private training costs: a step of ours beside the eager non-private step and Opacus, in interleaved rounds.

make bench NAME=training [ARGS="--device cuda --only mlp,cnn,wide_resnet,gpt2_lora --rounds 30"]

A step is the whole of it: gather, forward, backward, clip, noise, update; it is timed over some steps in a row, so that what is
prefetched is paid for. The non-private step is eager PyTorch on batches of
the expected size; Opacus runs with its own faster noise (torch's generator, not a cryptographic one) and our gather, which is
faster than its loader. Every figure is the median of the ratios of neighbouring blocks. With the allocator as glibc has it, and
again (`..._tuned_malloc`) with the thresholds that the server sets for its training processes, the same for every side.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

TUNED = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}
NETWORKS = ("mlp", "cnn", "lstm", "transformer")
CLASSES = 10
Step = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """A network, the shape of its inputs, and how many are drawn from how many."""

    network: Any
    shape: tuple[int, ...]
    batch: int
    rows: int
    vocabulary: int = 0


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.LSTM(64, 64, batch_first=True), nn.Linear(64, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.layer(inputs)[0][:, -1])


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.last = nn.Linear(128, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(self.encoder(self.table(tokens)).mean(1))


class Residual(nn.Module):
    """Two convolutions with GroupNorm before each, beside the input."""

    def __init__(self, entering: int, leaving: int, stride: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(16, entering), nn.GroupNorm(16, leaving)])
        self.first = nn.Conv2d(entering, leaving, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(leaving, leaving, 3, padding=1, bias=False)
        self.beside = nn.Conv2d(entering, leaving, 1, stride, bias=False) if entering != leaving else nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(self.norms[0](inputs).relu())
        return self.beside(inputs) + self.second(self.norms[1](hidden).relu())


class GPT(nn.Module):
    """The layers of GPT-2 small: 12, causal, of width 768; a class is told at the last position."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(50_257, 768), nn.Parameter(torch.randn(length, 768) * 0.02)
        layer = nn.TransformerEncoderLayer(768, 12, 3072, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
        self.last = nn.Linear(768, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], tokens.device)
        hidden = self.layers(self.table(tokens) + self.places, mask=mask, is_causal=True)
        return self.last(hidden[:, -1])


def gpt2_lora() -> nn.Module:
    from cloister_privacy.training import with_lora

    return with_lora(GPT(256), rank=8, layers=lambda path: "linear" in path)


def case_of(name: str) -> Case:
    if name == "wide_resnet":
        widths = (16, 64, 64, 128, 128, 256, 256)
        blocks = [Residual(a, b, 2 if a != b and a != 16 else 1) for a, b in itertools.pairwise(widths)]
        wide = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False), *blocks, nn.GroupNorm(16, 256), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(256, CLASSES),
        )  # fmt: skip
        return Case(wide, (3, 32, 32), 256, 50_000)
    if name == "gpt2_lora":
        return Case(gpt2_lora(), (256,), 32, 10_000, vocabulary=50_257)
    if name == "mlp":
        mlp = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, CLASSES))
        return Case(mlp, (784,), 256, 60_000)
    if name == "cnn":
        cnn = nn.Sequential(
            nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(1600, 128), nn.ReLU(), nn.Linear(128, CLASSES),
        )  # fmt: skip
        return Case(cnn, (1, 28, 28), 256, 60_000)
    if name == "lstm":
        return Case(LSTM(), (64, 64), 64, 10_000)
    return Case(Transformer(), (64,), 64, 10_000, vocabulary=1000)


class Bench:
    """The same network and rows for every side."""

    def __init__(self, name: str, device: str) -> None:
        torch.manual_seed(0)
        self.case, self.device = case_of(name), device
        shape = (self.case.rows, *self.case.shape)
        vocabulary = self.case.vocabulary
        inputs = torch.randint(vocabulary, shape) if vocabulary else torch.rand(shape)
        self.inputs, self.targets = inputs.to(device), torch.randint(CLASSES, (self.case.rows,)).to(device)

    def gather(self, indices: Any) -> tuple[Any, Any]:
        indices = torch.as_tensor(indices, device=self.device)
        return self.inputs[indices], self.targets[indices]

    def plan(self) -> Any:
        from cloister_privacy import DPPlan

        return DPPlan(
            nominal_size=self.case.rows, capacity=self.case.rows, batch_size=self.case.batch, steps=10_000,
            noise_multiplier=1.1425, clip=1.0, delta=1e-6,
        )  # fmt: skip

    def network(self) -> Any:
        return copy.deepcopy(self.case.network).to(self.device)

    def nonprivate(self) -> Step:
        network = self.network()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)

        def step() -> None:
            inputs, targets = self.gather(torch.randint(self.case.rows, (self.case.batch,)))
            optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(network(inputs), targets).backward()
            optimizer.step()

        return step

    def ours(self, *, has_constant_work: bool, is_compiled: bool | None = True) -> Step:
        from cloister_privacy.training.sampler import PoissonSampler
        from cloister_privacy.training.steps import GUARD_EXAMPLES, PrivateSteps

        network, plan = self.network(), self.plan()
        sampler = PoissonSampler(self.case.rows, batch_size=self.case.batch, nominal_size=self.case.rows)

        def losses(network: Any, batch: Any) -> Any:
            return functional.cross_entropy(network(batch[0]), batch[1], reduction="none")

        private = PrivateSteps(
            network,
            losses,
            plan=plan,
            optimizer=torch.optim.SGD(network.parameters(), lr=0.01),
            synthetic=self.gather(range(GUARD_EXAMPLES)),
            has_constant_work=has_constant_work,
            is_compiled=is_compiled,
        )
        return lambda: private.step(sampler.draw(), self.gather)

    def opacus(self, mode: str) -> Step:
        from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
        from opacus.validators import ModuleValidator

        from cloister_privacy.training.sampler import PoissonSampler

        network, plan = ModuleValidator.fix(self.network()).to(self.device), self.plan()
        sampler = PoissonSampler(self.case.rows, batch_size=self.case.batch, nominal_size=self.case.rows)
        settings = {
            "noise_multiplier": plan.noise_multiplier,
            "max_grad_norm": plan.clip,
            "expected_batch_size": plan.divisor,
        }
        inner = torch.optim.SGD(network.parameters(), lr=0.01)
        if mode == "hooks":
            wrapped = GradSampleModule(network)
            optimizer: Any = DPOptimizer(inner, **settings)
            loss: Any = nn.CrossEntropyLoss()
        else:
            wrapped = GradSampleModuleFastGradientClipping(network, max_grad_norm=plan.clip, use_ghost_clipping=True)
            optimizer = DPOptimizerFastGradientClipping(inner, **settings)
            loss = DPLossFastGradientClipping(wrapped, optimizer, nn.CrossEntropyLoss())

        def step() -> None:
            inputs, targets = self.gather(sampler.draw())
            optimizer.zero_grad(set_to_none=True)
            loss(wrapped(inputs), targets).backward()
            optimizer.step()

        return step


def ratios_of(sides: dict[str, Step], *, rounds: int, steps: int, device: str) -> dict[str, dict[str, float]]:
    """For each pair of sides the median over the rounds of one's time over the other's, for so many steps in a row."""

    def seconds(step: Step) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(steps):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / steps

    times: dict[str, list[float]] = {side: [] for side in sides}
    peaks = {}
    for side, step in sides.items():
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            step()
        if device == "cuda":
            peaks[side] = round(torch.cuda.max_memory_allocated() / 2**20)
    for _ in range(rounds):
        for side, step in sides.items():
            times[side].append(seconds(step))
    return {
        one: {other: statistics.median(a / b for a, b in zip(times[one], times[other], strict=True)) for other in sides}
        for one in sides
    } | {
        "median_ms": {side: round(statistics.median(values) * 1e3, 3) for side, values in times.items()},
        "cuda_peak_mib": peaks,
    }


def measure_steps(name: str, *, rounds: int, device: str) -> dict[str, Any]:
    """One network in this process."""
    bench = Bench(name, device)
    sides = {
        "nonprivate": bench.nonprivate(),
        "ours": bench.ours(has_constant_work=False),
        "constant_work": bench.ours(has_constant_work=True),
        "hooks": bench.opacus("hooks"),
        "ghost": bench.opacus("ghost"),
    }
    found = ratios_of(sides, rounds=rounds, steps=20 if name == "mlp" else 4, device=device)
    return {
        "median_ms": found["median_ms"],
        "cuda_peak_mib": found["cuda_peak_mib"],
        "ratios": {
            f"dp_over_nonprivate_{name}": found["ours"]["nonprivate"],
            f"dp_over_nonprivate_{name}_constant_work": found["constant_work"]["nonprivate"],
            f"opacus_hooks_over_nonprivate_{name}": found["hooks"]["nonprivate"],
            f"opacus_hooks_over_ours_{name}": found["hooks"]["ours"],
            f"opacus_ghost_over_ours_{name}": found["ghost"]["ours"],
        },
    }


def measure_memory(side: str, *, device: str) -> dict[str, Any]:
    """The most memory that a process with ten steps of the CNN ever held, MiB."""
    bench = Bench("cnn", device)
    step = bench.nonprivate() if side == "nonprivate" else bench.ours(has_constant_work=False)
    for _ in range(10):
        step()
    return {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def measure_end_to_end(side: str, *, device: str) -> dict[str, Any]:
    """Seconds of one epoch of the MLP, from the rows in memory to the weights and their epsilon."""
    bench = Bench("mlp", device)
    case, plan = bench.case, bench.plan()
    steps = case.rows // case.batch
    started = time.perf_counter()
    if side == "ours":
        step = bench.ours(
            has_constant_work=False, is_compiled=False
        )  # as it decides by itself: so few steps do not pay
        for _ in range(steps):
            step()
        plan.epsilon()
        return {"seconds": time.perf_counter() - started}
    from opacus import PrivacyEngine

    network = bench.network()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(bench.inputs, bench.targets), batch_size=case.batch
    )
    engine = PrivacyEngine(accountant="rdp")
    network, optimizer, loader = engine.make_private(
        module=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.01),
        data_loader=loader,
        noise_multiplier=plan.noise_multiplier,
        max_grad_norm=plan.clip,
    )
    loss = nn.CrossEntropyLoss()
    for inputs, targets in loader:
        optimizer.zero_grad(set_to_none=True)
        loss(network(inputs), targets).backward()
        optimizer.step()
    engine.get_epsilon(plan.delta)
    return {"seconds": time.perf_counter() - started}


def in_a_process(task: str, *, device: str, rounds: int, is_tuned: bool = False) -> dict[str, Any]:
    """Run one measurement in a fresh process, whose allocator is the one asked for; its last line is the answer."""
    clean = {name: value for name, value in os.environ.items() if name not in TUNED}
    command = [sys.executable, __file__, "--task", task, "--device", device, "--rounds", str(rounds)]
    done = subprocess.run(command, check=False, env=clean | (TUNED if is_tuned else {}), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{task} failed: {done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(task, "tuned" if is_tuned else "", json.dumps(answer), flush=True)
    return answer


def run_task(task: str, *, device: str, rounds: int) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    kind, _, name = task.partition(":")
    if kind == "steps":
        return measure_steps(name, rounds=rounds if name == "mlp" else max(5, rounds // 2), device=device)
    return (measure_memory if kind == "memory" else measure_end_to_end)(name, device=device)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default=",".join(NETWORKS))
    parser.add_argument("--task", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.task:
        print(json.dumps(run_task(asked.task, device=asked.device, rounds=asked.rounds)))
        return
    import opacus

    ratios: dict[str, float] = {}
    medians: dict[str, Any] = {}
    cuda_peaks: dict[str, Any] = {}
    for name in asked.only.split(","):
        for is_tuned in (False, True) if asked.device == "cpu" else (False,):
            suffix = "_tuned_malloc" if is_tuned else ""
            found = in_a_process(f"steps:{name}", device=asked.device, rounds=asked.rounds, is_tuned=is_tuned)
            ratios |= {key + suffix: round(value, 3) for key, value in found["ratios"].items()}
            medians[name + suffix] = found["median_ms"]
            cuda_peaks[name + suffix] = found["cuda_peak_mib"]
    if "cnn" in asked.only:
        peaks = {
            side: statistics.median(
                in_a_process(f"memory:{side}", device=asked.device, rounds=1)["peak_mib"] for _ in range(3)
            )
            for side in ("ours", "nonprivate")
        }
        ratios["rss_over_nonprivate_cnn"] = round(peaks["ours"] / peaks["nonprivate"], 3)
    if "mlp" in asked.only:
        pairs = [
            [in_a_process(f"whole:{side}", device=asked.device, rounds=1)["seconds"] for side in ("opacus", "ours")]
            for _ in range(3)
        ]
        ratios["end_to_end_over_opacus"] = round(statistics.median(one / other for one, other in pairs), 3)
    conditions = {
        "device": torch.cuda.get_device_name() if asked.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "opacus": opacus.__version__,
        "python": platform.python_version(),
        "rounds": asked.rounds,
        "median_ms": medians,
        "cuda_peak_mib": cuda_peaks,
    }
    print(json.dumps({"name": "training", "ratios": ratios, "conditions": conditions}))


if __name__ == "__main__":
    main()
