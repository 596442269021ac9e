"""What the end-to-end tests upload again and again."""

from __future__ import annotations

import numpy as np
import pytest

import cloister

SQLITE = pytest.param("sqlite", marks=pytest.mark.xdist_group("sqlite"))
"""For what is the same on every database: `@pytest.mark.parametrize("deployment", [SQLITE], indirect=True)`."""

POSTGRES_LONG = pytest.param("postgres", marks=[pytest.mark.xdist_group("postgres"), pytest.mark.long])
"""Beside SQLITE, for what takes long and must hold on both: on PostgreSQL it runs with the long tests."""

COLUMNS = {
    "scan": cloister.Tensor(shape=(8, 8), low=0, high=16),
    "digit": cloister.Category(values=tuple("0123456789")),
}


def upload(
    client: cloister.Cloister, rows: dict[str, np.ndarray], *, epsilon: float = 20.0, name: str = "digits"
) -> cloister.Dataset:
    """A source and a ready dataset of these rows, in round public numbers."""
    source = client.sources.create(f"{name}-people", epsilon=epsilon, delta=1e-5)
    return client.datasets.upload(name, rows, source=source, columns=COLUMNS, nominal_size=1000, capacity=2000)
