"""The main job against any Cloister server: upload, plan, train with differential privacy, predict, and be refused.

    CLOISTER_URL=... CLOISTER_CLIENT_ID=... CLOISTER_CLIENT_SECRET=... python examples/01_quickstart.py

The app needs the role `steward`. With OTHER_CLIENT_ID and OTHER_CLIENT_SECRET (an app of another tenant) it also shows
that a stranger sees nothing. `make demo` runs this file against a server of its own.
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import dataclass

import numpy as np
from sklearn.datasets import load_digits

import cloister

EPSILON_CAP, DELTA = 20.0, 1e-5
TRAINING_ROWS = 1200


@dataclass(frozen=True)
class Digits:
    """1,797 scans of handwritten digits (scikit-learn ships them), 8 x 8 pixels of 0 to 16; some rows are kept back."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def load() -> Digits:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = images.reshape(-1, 8, 8).astype(np.float32)[order], labels[order]
    return Digits(x[:TRAINING_ROWS], y[:TRAINING_ROWS], x[TRAINING_ROWS:], y[TRAINING_ROWS:])


def run(client: cloister.Cloister, digits: Digits, *, tag: str) -> dict[str, object]:
    """The journey; what it found out, as plain JSON values."""
    print("1. Declare whose data it is. The budget belongs to these people, not to a job or an account.")
    source = client.sources.create(f"patients-{tag}", epsilon=EPSILON_CAP, delta=DELTA)

    print("2. Upload. The rows travel in parts, and each part is sealed under its own key before it touches a disk.")
    data = client.datasets.upload(
        f"digits-{tag}",
        {"scan": digits.train_x, "digit": digits.train_y},
        source=source,
        columns={
            "scan": cloister.Tensor(shape=(8, 8), low=0, high=16),
            "digit": cloister.Category(values=tuple("0123456789")),
        },
        nominal_size=1_200,  # what you would tell a stranger; never counted from the rows
        capacity=2_000,
    )

    print("3. Ask what training would cost. Asking is free.\n")
    plan = client.plan(data, target="digit", privacy=cloister.DP(epsilon=12))
    print(f"{plan}\n")

    print("4. Train. The whole cost is reserved before a row is touched; Ctrl-C would stop watching, not the job.")
    model = client.train(plan, model=f"digits-{tag}").wait(progress=True)
    budget = client.sources.get(source.id).budget
    print(f"   epsilon spent {budget.spent:.2f}, left {budget.left:.2f} of {budget.epsilon:g}")

    print("5. Predict scans that never left this machine before.")
    accuracy = float(np.mean(model.predict(digits.test_x) == digits.test_y))
    print(f"   {accuracy:.1%} of {len(digits.test_y)} kept-back scans are read right")

    print("6. Ask for more than is left.")
    try:
        client.train(client.plan(data, target="digit", privacy=cloister.DP(epsilon=19)), model=f"digits-{tag}")
        refused_budget = False
    except cloister.BudgetExceeded as refusal:
        refused_budget = client.sources.get(source.id).budget == budget
        print(f"   refused, and the ledger is unchanged: {refusal}")

    return {
        "accuracy": accuracy,
        "epsilon_spent": budget.spent,
        "refused_budget": refused_budget,
        "model": model.id,
        "dataset": data.id,
    }


def stranger_is_refused(stranger: cloister.Cloister, found: dict[str, object], digits: Digits) -> bool:
    """An app of another tenant asks for the very same ids."""
    print("7. Another tenant's app asks for the same model and the same data, by their ids.")
    refusals = 0
    for ask in (
        lambda: stranger.models.get(str(found["model"])).predict(digits.test_x),
        lambda: stranger.datasets.get(str(found["dataset"])),
    ):
        try:
            ask()
        except cloister.NotFound as refusal:
            refusals += 1
            print(f"   refused: {refusal}")
    return refusals == 2


def main() -> None:
    digits = load()
    with cloister.Cloister() as client:
        found = run(client, digits, tag=secrets.token_hex(3))
    if "OTHER_CLIENT_ID" in os.environ:
        with cloister.Cloister(
            client_id=os.environ["OTHER_CLIENT_ID"], client_secret=os.environ["OTHER_CLIENT_SECRET"]
        ) as stranger:
            found["refused_tenant"] = stranger_is_refused(stranger, found, digits)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
