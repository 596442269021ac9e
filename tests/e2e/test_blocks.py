"""A source that people join day by day: each block has a budget of its own, and what reads two of them must fit both."""

from __future__ import annotations

import numpy as np
import pytest

import cloister
from journeys import COLUMNS, SQLITE

pytestmark = pytest.mark.parametrize("deployment", [SQLITE], indirect=True)  # what the ledger does is tried on both

LITTLE = cloister.DP(noise_multiplier=0.65)
"""So little noise that ten steps leave too little of epsilon 10 for ten more."""

MUCH = cloister.DP(noise_multiplier=4)

LAYERS = [cloister.layers.Flatten(), cloister.layers.Linear(in_features=64, out_features=10)]


def plan(client: cloister.Cloister, *datasets: cloister.Dataset, privacy: cloister.DP) -> cloister.Plan:
    """Ten steps where one dataset is read, twenty where two are."""
    return client.plan(datasets, target="digit", layers=LAYERS, privacy=privacy, batch_size=100, epochs=1)


def upload_day(
    client: cloister.Cloister,
    name: str,
    rows: dict[str, np.ndarray],
    source: cloister.Source,
    *,
    block: str | None = None,
) -> cloister.Dataset:
    return client.datasets.upload(
        name, rows, source=source, block=block, columns=COLUMNS, nominal_size=1000, capacity=1200
    )


def test_a_day_that_is_used_up_does_not_use_up_the_next(
    client: cloister.Cloister, digits: dict[str, np.ndarray]
) -> None:
    days = [{name: column[part] for name, column in digits.items()} for part in (slice(900), slice(900, None))]
    source = client.sources.create("digits-people", epsilon=10, delta=1e-5)
    day1 = upload_day(client, "day1", days[0], source)
    first = client.train(plan(client, day1, privacy=LITTLE), model="first")
    with pytest.raises(cloister.BudgetExceeded, match="raise the budget"):
        client.train(plan(client, day1, privacy=LITTLE), model="again")

    assert client.sources.open_block(source, "day2", reason="a new day").number == 1
    day2 = upload_day(client, "day2", days[1], source, block="day2")
    assert (day1.block, day2.block) == (0, 1)
    both = plan(client, day1, day2, privacy=cloister.DP(noise_multiplier=0.5))
    assert not both.quote.fits and both.quote.block == 0, "because of day 1"
    assert "2 together" in str(both) and "in block 0, does not fit" in str(both)
    with pytest.raises(cloister.BudgetExceeded) as refused:
        client.train(both, model="both")
    assert refused.value.details["block"] == 0

    alone = plan(client, day2, privacy=LITTLE)
    assert alone.quote.fits and alone.quote.block == 1 and alone.quote.before == 0
    jobs = [first, client.train(alone, model="second")]
    together = plan(client, day1, day2, privacy=MUCH)
    assert together.quote.fits, "there is room for a little on both"
    jobs.append(client.train(together, model="both"))
    model = [job.wait() for job in jobs][-1]
    assert model.predict(digits["scan"][:3]).shape == (3,)

    told = client.budget(source)
    charged = [(each.job, each.block, each.steps_charged, each.is_settled) for each in told.entries if each.job]
    assert [(each.block, each.reason) for each in told.entries if each.kind == "block"] == [("day2", "a new day")]
    assert charged == [
        (jobs[0].id, "first", 10, True),
        (jobs[1].id, "day2", 10, True),
        (jobs[2].id, "first", 20, True),
        (jobs[2].id, "day2", 20, True),
    ]
    assert [each.name for each in told.budget.blocks] == ["first", "day2"]
    assert {each.block: each.spent for each in told.entries[-2:]} == {
        each.name: each.spent for each in told.budget.blocks
    }
    assert "model both" in str(told) and told.to_csv().count("\n") == 6 and "<svg" in told._repr_html_()
    with pytest.raises(cloister.InvalidRequest, match="cannot be taken back"):
        client.sources.set_budget(source, epsilon=5, reason="too late")


def test_a_person_of_an_earlier_day_is_not_taken_into_the_next(client: cloister.Cloister) -> None:
    source = client.sources.create("patients", epsilon=10, delta=1e-5, unit="user")
    client.sources.open_block(source, "day2", reason="a new day")
    columns = {"who": cloister.Unit(), "x": cloister.Number(low=0, high=1)}
    public = {"source": source, "columns": columns, "nominal_size": 100, "capacity": 200, "capacity_rows": 400}
    client.datasets.upload("day1", {"who": ["ann", "bob", "ann"], "x": [0, 1, 0]}, block="first", **public)
    with pytest.raises(cloister.RowsRefused, match="another block of this source") as refused:
        client.datasets.upload("day2", {"who": ["cid", "bob"], "x": [0, 1]}, block="day2", **public)
    assert refused.value.row == 1
    day2 = client.datasets.upload("day2", {"who": ["cid", "dot"], "x": [0, 1]}, block="day2", **public)
    assert day2.status == "ready" and day2.block == 1, "taken up where it was refused, without those rows"
