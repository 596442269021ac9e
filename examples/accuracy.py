"""Train on one file, judge on another, through the public SDK alone and without one hyper-parameter.

python examples/accuracy.py DATASET EPSILON TRAIN TEST. The files, by data set:
  fashion_mnist  .npz with images uint8 [n, 28, 28] and labels [n]
  adult          .csv or .csv.gz with a header: the 14 features by their usual names, and the income
  sst2           .tsv or .tsv.gz with the columns sentence and label (0 or 1)
  spoken_digits  .npz with samples int16 of all recordings in a row (8 kHz), lengths [n] and labels [n]

Starts a server of its own on SQLite; the last line is
{"accuracy": per cent}.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from local_server import running_server

import cloister

DELTA = 1e-5
ROUND = 100
"""A declared size is a round number, as an owner would declare it: never the count of the rows."""


@dataclass(frozen=True)
class Task:
    """What is public about a data set: its columns as an owner would declare them, and how its files are read."""

    target: str
    columns: Mapping[str, Any]
    read: Callable[[Path], dict[str, Any]]


def _images(path: Path) -> dict[str, Any]:
    with np.load(path) as arrays:
        return {"image": arrays["images"], "label": arrays["labels"].astype(np.int32)}


def _sound(path: Path) -> dict[str, Any]:
    with np.load(path) as arrays:
        ends = np.cumsum(arrays["lengths"])
        return {"sound": np.split(arrays["samples"], ends[:-1]), "digit": arrays["labels"].astype(np.int32)}


def _open(path: Path) -> IO[str]:
    return gzip.open(path, "rt", newline="") if path.suffix == ".gz" else path.open(newline="")


def _sentences(path: Path) -> dict[str, Any]:
    with _open(path) as lines:
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    return {"sentence": [row["sentence"] for row in rows], "sentiment": np.array([int(row["label"]) for row in rows])}


def _one_of(values: str) -> cloister.Category:
    return cloister.Category(values=tuple(values.split()))


ADULT = {
    "age": cloister.Number(low=0, high=100),
    "workclass": _one_of(
        "Federal-gov Local-gov Never-worked Private Self-emp-inc Self-emp-not-inc State-gov Without-pay ?"
    ),
    "fnlwgt": cloister.Number(low=0, high=1_500_000),
    "education": _one_of(
        "10th 11th 12th 1st-4th 5th-6th 7th-8th 9th Assoc-acdm Assoc-voc Bachelors Doctorate HS-grad Masters Preschool "
        "Prof-school Some-college"
    ),
    "education-num": cloister.Number(low=1, high=16),
    "marital-status": _one_of(
        "Divorced Married-AF-spouse Married-civ-spouse Married-spouse-absent Never-married Separated Widowed"
    ),
    "occupation": _one_of(
        "Adm-clerical Armed-Forces Craft-repair Exec-managerial Farming-fishing Handlers-cleaners Machine-op-inspct "
        "Other-service Priv-house-serv Prof-specialty Protective-serv Sales Tech-support Transport-moving ?"
    ),
    "relationship": _one_of("Husband Not-in-family Other-relative Own-child Unmarried Wife"),
    "race": _one_of("Amer-Indian-Eskimo Asian-Pac-Islander Black Other White"),
    "sex": _one_of("Female Male"),
    "capital-gain": cloister.Number(low=0, high=99_999),
    "capital-loss": cloister.Number(low=0, high=5_000),
    "hours-per-week": cloister.Number(low=0, high=99),
    "native-country": _one_of(
        "Cambodia Canada China Columbia Cuba Dominican-Republic Ecuador El-Salvador England France Germany Greece "
        "Guatemala Haiti Holand-Netherlands Honduras Hong Hungary India Iran Ireland Italy Jamaica Japan Laos Mexico Nicaragua "
        "Outlying-US(Guam-USVI-etc) Peru Philippines Poland Portugal Puerto-Rico Scotland South Taiwan Thailand Trinadad&Tobago "
        "United-States Vietnam Yugoslavia ?"
    ),
}


def _census(path: Path) -> dict[str, Any]:
    """Values are spelled in several ways in the copies that go around: blanks, and a full stop after the class."""
    with _open(path) as lines:
        rows = [
            {name.strip(): value.strip() for name, value in row.items()}
            for row in csv.DictReader(lines, skipinitialspace=True)
        ]
    (income,) = rows[0].keys() - ADULT.keys()
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in ADULT}
    for name, column in columns.items():
        if isinstance(ADULT[name], cloister.Category):
            columns[name] = [value or "?" for value in column]
    return {**columns, "income": [row[income].rstrip(".") for row in rows]}


TASKS = {
    "fashion_mnist": Task(
        "label",
        {
            "image": cloister.Tensor(shape=(28, 28), low=0, high=255, dtype="uint8"),
            "label": cloister.Category(
                values=("top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
            ),
        },
        _images,
    ),
    "adult": Task(
        "income",
        {
            **ADULT,
            "income": _one_of("<=50K >50K"),
        },
        _census,
    ),
    "sst2": Task(
        "sentiment",
        {"sentence": cloister.Text(max_length=384), "sentiment": cloister.Category(values=("negative", "positive"))},
        _sentences,
    ),
    "spoken_digits": Task(
        "digit",
        {
            "sound": cloister.Audio(rate=8000, max_samples=24_000),
            "digit": cloister.Category(
                values=("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
            ),
        },
        _sound,
    ),
}


def accuracy(
    client: cloister.Cloister, task: Task, *, epsilon: float, train: Path, test: Path, name: str = "judged"
) -> float:
    """Upload, plan with nothing but epsilon, train, predict; per cent of the test rows."""
    rows, judged = task.read(train), task.read(test)
    size = -(-len(rows[task.target]) // ROUND) * ROUND
    source = client.sources.create(f"{name}-people", epsilon=epsilon * 1.01, delta=DELTA)
    data = client.datasets.upload(
        name, rows, source=source, columns=dict(task.columns), nominal_size=size, capacity=size
    )
    plan = client.plan(data, target=task.target, privacy=cloister.DP(epsilon=epsilon))
    print(plan, flush=True)
    model = client.train(plan, model=name).wait(progress=True)
    truth = judged.pop(task.target)
    predicted = model.predict(judged, decoded=not isinstance(truth, np.ndarray))
    return 100 * float(np.mean(np.asarray(predicted) == np.asarray(truth)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=TASKS)
    parser.add_argument("epsilon", type=float)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    asked = parser.parse_args()
    missing = [str(path) for path in (asked.train, asked.test) if not path.exists()]
    if missing:
        sys.exit(f"there is no {' and no '.join(missing)}; this example needs the data set's own files")
    if not asked.epsilon > 0:
        sys.exit("epsilon must be above 0")
    try:
        for path in (asked.train, asked.test):
            TASKS[asked.dataset].read(path)
    except (KeyError, ValueError, AttributeError, OSError) as error:
        sys.exit(f"the files are not of the format that --help tells for {asked.dataset}: {error}")
    with (
        tempfile.TemporaryDirectory(prefix="cloister-accuracy-") as directory,
        running_server(Path(directory)) as client,
    ):
        found = accuracy(client, TASKS[asked.dataset], epsilon=asked.epsilon, train=asked.train, test=asked.test)
    print(json.dumps({"accuracy": round(found, 2)}))


if __name__ == "__main__":
    main()
