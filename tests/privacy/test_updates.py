"""What happens to noisy gradients: rates by step, averages of weights, and a resumed run that goes on as if never stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cloister.wire.plans import EMA, SGD, Adam, AdamW, Optimizer, Schedule, Tail, TrainingSpec
from cloister_privacy import DPPlan
from cloister_privacy.architecture import build, from_bytes
from cloister_privacy.training import engine, train
from cloister_privacy.training.updates import Updates, factor, newest_share

Rows = Mapping[str, np.ndarray]


@pytest.mark.parametrize(
    ("shape", "reference"),
    [
        ("cosine", lambda optimizer: CosineAnnealingLR(optimizer, T_max=20, eta_min=0.1)),
        ("linear", lambda optimizer: LinearLR(optimizer, 1.0, 0.1, total_iters=20)),
    ],
)
def test_rates_are_those_of_torch_s_schedulers(shape: Any, reference: Callable[..., Any]) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = reference(optimizer)
    schedule = Schedule(shape=shape, final=0.1)
    for step in range(20):
        assert factor(schedule, step, 20) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


@given(
    shape=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.integers(0, 300),
    final=st.floats(0, 1),
    steps=st.integers(1, 200),
)
def test_a_rate_rises_to_its_full_height_falls_to_no_less_than_its_end_and_is_never_0(
    shape: Any, warmup: int, final: float, steps: int
) -> None:
    rates = [factor(Schedule(shape=shape, warmup_steps=warmup, final=final), step, steps) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    top = min(warmup, steps)
    assert rates[:top] == pytest.approx([(step + 1) / top for step in range(top)])
    assert all(later <= earlier + 1e-12 for earlier, later in zip(rates[top:], rates[top + 1 :], strict=False))
    assert min(rates[top:], default=1) >= (1 if shape == "constant" else final) - 1e-12


@given(share=st.floats(0.01, 1), weights=st.lists(st.floats(-5, 5), min_size=1, max_size=60))
def test_a_tail_average_is_the_mean_of_the_last_weights(share: float, weights: list[float]) -> None:
    average = 99.0
    for step, weight in enumerate(weights):
        average += newest_share(Tail(share=share), step, len(weights)) * (weight - average)
    assert average == pytest.approx(np.mean(weights[-max(1, int(np.ceil(share * len(weights)))) :]), abs=1e-9)


def test_an_ema_is_torch_s_once_it_is_long_enough(spec_of: Callable[..., TrainingSpec]) -> None:
    spec = spec_of(steps=400, optimizer=SGD(learning_rate=0.1, averaging=EMA(decay=0.9)))
    network = build(spec.architecture)
    updates = Updates(network, spec)
    reference: AveragedModel | None = None
    for step in range(300):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        updates.after(step)
        if step == 100:  # from 81 on the decay is the one asked for
            reference = AveragedModel(updates.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
            reference.update_parameters(updates.model)
        elif reference is not None:
            reference.update_parameters(network)
    assert reference is not None
    for ours, theirs in zip(updates.model.parameters(), reference.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": SGD(learning_rate=0.1, momentum=0.9, schedule=Schedule(warmup_steps=3)),
    "adam": Adam(learning_rate=0.01, averaging=Tail(share=0.5)),
    "adamw": AdamW(learning_rate=0.01, weight_decay=0.1, schedule=Schedule(shape="linear"), averaging=EMA(decay=0.8)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_that_is_stopped_and_resumed_ends_where_one_that_was_not_does(
    name: str,
    spec_of: Callable[..., TrainingSpec],
    rows_of: Callable[[int], Rows],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the noise taken away and every row in every step, so that nothing is left to chance but the initial weights."""
    monkeypatch.setattr("cloister_privacy.training.noise.NoiseDraws.take", lambda draws: torch.zeros(draws._count))
    spec = spec_of(nominal_size=10, batch_size=10, steps=8, optimizer=OPTIMIZERS[name])
    snapshots: dict[int, bytes] = {}

    def keep(done: int, snapshot: Callable[[], bytes]) -> bool:
        snapshots[done] = snapshot()
        return True

    def run(resume: bytes | None) -> dict[str, torch.Tensor]:
        end = train(
            spec,
            rows_of(25),
            plan=DPPlan.of(spec),
            device="cpu",
            chunk_steps=5,
            before_chunk=lambda first, end: None,
            after_chunk=keep,
            resume=resume,
        )
        return dict(from_bytes(end or b"").state_dict())

    whole = run(None)
    resumed = run(snapshots[5])
    for key, weight in whole.items():
        torch.testing.assert_close(resumed[key], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fields", [{"clipping": "automatic"}, {"clipping": "per_layer"}, {"precision": "bfloat16"}])
def test_every_way_to_clip_and_to_compute_bounds_a_step(
    fields: dict[str, Any],
    spec_of: Callable[..., TrainingSpec],
    rows_of: Callable[[int], Rows],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cloister_privacy.training.noise.NoiseDraws.take", lambda draws: torch.zeros(draws._count))
    spec = spec_of(nominal_size=1, batch_size=1, steps=1, optimizer=SGD(learning_rate=1.0), clip=1e-3, **fields)
    run = engine._Run(spec, DPPlan.of(spec), device="cpu")
    before = torch.cat([each.detach().flatten() for each in run.network.parameters()]).double()
    examples = engine.Examples(run.network, rows_of(1), slots=1, device="cpu")
    run.steps(examples, engine.PoissonSampler(1, batch_size=1, nominal_size=1), 0, 1)
    after = torch.cat([each.detach().flatten() for each in run.network.parameters()]).double()
    # Weights are rounded to float32, so the move is told to about 1e-7 for each of them.
    assert 0 < float((after - before).norm()) <= spec.clip * (1 + 1e-5) + 1e-6
