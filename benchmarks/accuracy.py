"""Accuracy at a price: the recipes, with nothing but epsilon given, beside the same networks trained without privacy.

make bench NAME=accuracy [ARGS="--quick --only adult,sst2 --seeds 3 --data FOLDER"]

Each data set's training file is split once; what is printed is of the part kept back, means over seeds, in per cent. The recipe is
resolved from the schema and the declared size, and trained by the library as the server does. Without privacy: the same network on the
same rows, the same optimizer and steps, no noise and no clip.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from accuracy import TASKS  # noqa: E402 (the example's own schemas)

from cloister._convert import convert  # noqa: E402
from cloister.wire.plans import PlanRequest, Privacy, TrainingSpec  # noqa: E402
from cloister_privacy.architecture import from_bytes  # noqa: E402
from cloister_privacy.architecture.network import Network  # noqa: E402
from cloister_privacy.plan import DPPlan  # noqa: E402
from cloister_privacy.recipes import resolve  # noqa: E402
from cloister_privacy.training import ClippedGradients, engine, train  # noqa: E402
from cloister_privacy.training.examples import Examples  # noqa: E402

DELTA = 1e-5
KEPT_BACK = 6  # one row in so many
ROUND = 100
_ROWS_AT_ONCE = 4096

Rows = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Case:
    file: str
    epsilons: tuple[float, ...]
    bars: tuple[float, ...]
    kept_back: str = ""
    """A file of its own; else a part of the training file."""


CASES = {
    "fashion_mnist": Case("fashion_mnist_train.npz", (3, 1), (90.0, 88.0)),
    "adult": Case("adult_train.csv.gz", (1,), (84.5,)),
    "spoken_digits": Case("spoken_digits_train.npz", (8,), (50.0,)),
    "sst2": Case("sst2_train.tsv.gz", (3,), (70.0,), kept_back="sst2_dev.tsv.gz"),
}


def rows_of(name: str, path: Path) -> Rows:
    task = TASKS[name]
    given = task.read(path)
    return {
        key: array
        for column, kind in task.columns.items()
        for key, array in convert(column, kind, given[column], 0).items()
    }


def split(name: str, data: Path) -> tuple[Rows, Rows]:
    case = CASES[name]
    rows = rows_of(name, data / case.file)
    if case.kept_back:
        return rows, rows_of(name, data / case.kept_back)
    count = len(next(iter(rows.values())))
    order = np.random.default_rng(0).permutation(count)
    kept, trained = order[: count // KEPT_BACK], order[count // KEPT_BACK :]
    return {n: a[trained] for n, a in rows.items()}, {n: a[kept] for n, a in rows.items()}


def spec_of(name: str, count: int, epsilon: float) -> TrainingSpec:
    size = -(-count // ROUND) * ROUND
    request = PlanRequest(dataset="ds_" + "0" * 32, target=TASKS[name].target, privacy=Privacy(epsilon=epsilon))
    return resolve(request, columns=dict(TASKS[name].columns), nominal_size=size, capacity=size, delta=DELTA)


def judged(network: Network, rows: Rows) -> float:
    """Per cent of the rows whose category is predicted."""
    examples, right = Examples(network.eval(), rows, slots=0, device="cpu"), 0
    with torch.no_grad():
        for start in range(0, examples.count, _ROWS_AT_ONCE):
            values, target = examples.batch(np.arange(start, min(start + _ROWS_AT_ONCE, examples.count)))
            right += int((network(values).argmax(1) == target).sum())
    return 100 * right / examples.count


def private(spec: TrainingSpec, rows: Rows, kept: Rows) -> float:
    body = train(
        spec, rows, plan=DPPlan.of(spec), device="cpu", chunk_steps=spec.steps,
        before_chunk=lambda *_: None, after_chunk=lambda *_: True,
    )  # fmt: skip
    assert body is not None
    return judged(from_bytes(body), kept)


def without_privacy(spec: TrainingSpec, rows: Rows, kept: Rows) -> float:
    """The recipe's network, optimizer and steps on the mean gradient of each batch, neither clipped nor noisy."""
    plan = DPPlan.of(spec)
    run = engine._Run(spec, plan, device="cpu")
    examples = Examples(run.network, rows, slots=plan.capacity, device="cpu")
    whole = ClippedGradients(
        run.network, engine._losses, clip=1e12
    )  # which clips nothing: its sums are the fastest here
    random = np.random.default_rng()
    # Without the clip an image's features, of length 10, ask for a rate that is smaller by their square.
    rate = 0.02 if spec.clipping == "automatic" else 1.0
    for step in range(spec.steps):
        run.updates.before(step)
        for group in run.updates.optimizer.param_groups:
            group["lr"] *= rate
        drawn = np.flatnonzero(random.random(examples.count) < plan.batch_size / plan.nominal_size)
        total = [torch.zeros_like(each) for each in whole.parameters]
        for part in np.array_split(drawn, max(1, len(drawn) // _ROWS_AT_ONCE)):
            torch._foreach_add_(total, whole.sums(examples.batch(part), torch.ones(len(part))))
        for parameter, each in zip(whole.parameters, total, strict=True):
            parameter.grad = each / len(drawn)
        run.updates.optimizer.step()
        run.updates.after(step)
    return judged(run.updates.model, kept)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one seed, and Adult and spoken digits alone")
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help="where the data sets' files are"
    )
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    names = ["adult", "spoken_digits"] if asked.quick else asked.only.split(",")
    missing = [CASES[name].file for name in names if not (asked.data / CASES[name].file).exists()]
    if missing:
        print(f"skipped: {asked.data} holds no {', '.join(missing)}; give the folder of the data sets with --data")
        print(json.dumps({"name": "accuracy", "ratios": {}, "conditions": {"skipped": missing}}))
        return
    ratios: dict[str, float] = {}
    spread: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}

    def measured(key: str, values: list[float]) -> None:
        ratios[key], spread[key] = round(statistics.mean(values), 2), [round(value, 2) for value in values]
        print(key, ratios[key], spread[key], flush=True)

    for name in names:
        started = time.monotonic()
        rows, kept = split(name, asked.data)
        count = len(rows[TASKS[name].target])
        seeds = range(1 if asked.quick else asked.seeds)
        for epsilon in CASES[name].epsilons:
            spec = spec_of(name, count, epsilon)
            measured(f"{name}_eps{epsilon:g}", [private(spec, rows, kept) for _ in seeds])
        spec = spec_of(name, count, CASES[name].epsilons[0])
        measured(f"{name}_nonprivate", [without_privacy(spec, rows, kept)])  # which seed changes it but little
        seconds[name] = round(time.monotonic() - started, 1)
    conditions = {
        "delta": DELTA, "unit": "row", "adjacency": "add_remove", "spread": spread, "seconds": seconds,
        "bars": {f"{n}_eps{e:g}": bar for n in names for e, bar in zip(CASES[n].epsilons, CASES[n].bars, strict=True)},
        "torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads(),
    }  # fmt: skip
    print(json.dumps({"name": "accuracy", "ratios": ratios, "conditions": conditions}))


if __name__ == "__main__":
    main()
