"""A step on any torch module: constant public work, padding that counts for nothing, the same numbers when compiled."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cloister_privacy import DPPlan
from cloister_privacy.errors import CrossExampleLayer, RowsDoNotFit, TrainingError
from cloister_privacy.training import (
    ClippedGradients,
    PoissonSampler,
    PrivateSteps,
    UserSampler,
    compilation,
    sampler_of,
)
from networks import losses

ROWS = 400


def plan(**fields: Any) -> DPPlan:
    defaults: dict[str, Any] = {
        "nominal_size": 400, "capacity": 500, "batch_size": 40, "steps": 10, "noise_multiplier": 1.0, "clip": 0.1, "delta": 1e-5,
    }  # fmt: skip
    return DPPlan(**(defaults | fields))


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


class Counted:
    """Rows that note how many were asked for at once."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs, self.targets = torch.randn(ROWS, 5, generator=generator), torch.arange(ROWS) % 3
        self.asked: list[int] = []

    def gather(self, indices: NDArray[np.intp]) -> tuple[Tensor, Tensor]:
        self.asked.append(len(indices))
        return self.inputs[indices], self.targets[indices]


def steps_of(module: nn.Module, rows: Counted, **options: Any) -> PrivateSteps:
    return PrivateSteps(
        module,
        losses,
        plan=options.pop("plan", plan()),
        optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
        synthetic=(rows.inputs[:8], rows.targets[:8]),
        **options,
    )


def moved(module: nn.Module, before: list[Tensor]) -> Tensor:
    return torch.cat([(a - b).flatten() for a, b in zip(before, module.parameters(), strict=True)]).detach()


@pytest.fixture
def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        PrivateSteps, "_noise", lambda self: torch.zeros(sum(each.numel() for each in self._parameters))
    )


@pytest.mark.parametrize("micro_batch", [None, 7])
def test_the_work_of_a_step_is_the_plans_whatever_was_drawn(micro_batch: int | None) -> None:
    rows = Counted()
    private = steps_of(network(), rows)
    private.micro_batch = micro_batch or private.micro_batch
    seen = []
    for drawn in (0, 1, 40, plan().slots):
        rows.asked.clear()
        private.step(np.arange(drawn), rows.gather)
        seen.append(list(rows.asked))
    assert seen[1:] == seen[:-1]
    assert sum(seen[0]) >= plan().slots > plan().batch_size
    rows.asked.clear()
    private.step(np.arange(plan().slots + 30), rows.gather)
    assert sum(rows.asked) >= plan().slots + 30, "an overflow runs more, and is never cut short"


@pytest.mark.usefixtures("no_noise")
def test_padding_micro_batches_and_the_engine_change_no_number() -> None:
    rows = Counted()
    drawn = np.array([3, 5, 8, 13, 21, 34, 55, 89])
    results = []
    for options, micro_batch in (
        ({}, None), ({}, 3), ({"has_constant_work": False}, None), ({"has_constant_work": False}, 3), ({"engine": "opacus_hooks"}, 3)
    ):  # fmt: skip
        module = network()
        before = [each.detach().clone() for each in module.parameters()]
        private = steps_of(module, rows, **options)
        private.micro_batch = micro_batch or private.micro_batch
        private.step(drawn, rows.gather)
        results.append(moved(module, before) * plan().divisor)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-6)
    assert 0 < results[0].norm() <= len(drawn) * plan().clip


@pytest.mark.long
@pytest.mark.usefixtures("no_noise")
def test_compiled_steps_give_the_same_numbers_and_leave_nothing_behind() -> None:
    in_memory = compilation._IN_MEMORY
    if not in_memory.exists():
        pytest.skip("needs a memory file system")
    before_files = set(in_memory.iterdir())
    rows, results = Counted(), []
    for is_compiled in (False, True):
        module = network()
        before = [each.detach().clone() for each in module.parameters()]
        private = steps_of(module, rows, is_compiled=is_compiled)
        assert (private._sums == private._clipped.sums) is not is_compiled
        for _ in range(3):
            private.step(np.arange(50), rows.gather)
        results.append(moved(module, before))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)
    left = {path for path in in_memory.iterdir() if path not in before_files}
    assert not [path for path in left if path.name.startswith("tmp")]


def test_rows_of_a_user_are_clipped_to_their_share(no_noise: None) -> None:
    rows, module = Counted(), network()
    before = [each.detach().clone() for each in module.parameters()]
    private = steps_of(module, rows, plan=plan(unit="user", rows_per_unit=4))
    rows.inputs[1:4], rows.targets[1:4] = rows.inputs[0], rows.targets[0]
    private.step(np.arange(4), rows.gather)  # four rows, all of the same direction
    assert moved(module, before).norm() * plan().divisor <= plan().clip * (1 + 1e-5)


def test_gradients_that_were_not_clipped_are_never_stepped_on() -> None:
    rows, module = Counted(), network()
    private = steps_of(module, rows)
    before = [each.detach().clone() for each in module.parameters()]
    losses(module, (rows.inputs, rows.targets)).sum().backward()
    with pytest.raises(TrainingError, match="not clipped"):
        private.optimizer.step()
    assert not moved(module, before).any()
    # Nor do they get into a step that follows: with no row drawn it is noise alone.
    private.step(np.arange(0), rows.gather)
    assert 0 < moved(module, before).abs().max() <= 6 * plan().noise_std / plan().divisor
    with pytest.raises(TrainingError, match="no clipped sum"):
        private.optimizer.step()


@pytest.mark.usefixtures("no_noise")
def test_every_parameter_gets_its_own_gradient_whatever_the_order_of_the_optimizer() -> None:
    rows, results = Counted(), []
    for is_reversed in (False, True):
        torch.manual_seed(1)
        module = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
        before = [each.detach().clone() for each in module.parameters()]
        ordered = list(module.parameters())[:: -1 if is_reversed else 1]
        groups = [{"params": ordered[:2], "lr": 1.0}, {"params": ordered[2:], "lr": 1.0}]
        private = PrivateSteps(
            module,
            losses,
            plan=plan(),
            optimizer=torch.optim.SGD(groups),
            synthetic=(rows.inputs[:8], rows.targets[:8]),
        )
        private.step(np.arange(40), rows.gather)
        results.append(moved(module, before))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("chosen", [slice(0, 1), slice(0, 0)])
def test_an_optimizer_of_other_parameters_is_refused(chosen: slice) -> None:
    rows, module = Counted(), network()
    stranger = nn.Linear(5, 3)
    parameters = list(module.parameters())[chosen] or list(stranger.parameters())
    with pytest.raises(TrainingError, match="all of them and no others"):
        PrivateSteps(
            module,
            losses,
            plan=plan(),
            optimizer=torch.optim.SGD(parameters, lr=1.0),
            synthetic=(rows.inputs[:8], rows.targets[:8]),
        )


def test_no_more_steps_are_made_than_the_plan_has() -> None:
    rows, module = Counted(), network()
    private = steps_of(module, rows, plan=plan(steps=2))
    for _ in range(2):
        private.step(np.arange(40), rows.gather)
    rows.asked.clear()
    with pytest.raises(TrainingError, match="all 2 steps of the plan are done"):
        private.step(np.arange(40), rows.gather)
    assert rows.asked == []


@pytest.mark.parametrize("wrong", [{"precision": "bf16"}, {"clipping": "auto"}, {"engine": "opacus"}])
def test_a_word_that_is_none_of_the_choices_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(TrainingError, match="give one of"):
        steps_of(network(), Counted(), **wrong)


@pytest.mark.parametrize(
    "drawn",
    [np.array([3, 3]), np.array([3, -97]), np.ones(ROWS, dtype=bool), np.arange(4).reshape(2, 2), np.array([0.5])],
)
def test_what_is_no_draw_of_a_sampler_is_refused_unread(drawn: NDArray[Any]) -> None:
    rows = Counted()
    private = steps_of(network(), rows)
    with pytest.raises(TrainingError, match="none twice"):
        private.step(drawn, rows.gather)
    assert rows.asked == []


@pytest.mark.parametrize("count", [1, 7])
def test_a_batch_that_holds_another_number_of_examples_moves_nothing(count: int) -> None:
    rows, module = Counted(), network()
    private = steps_of(module, rows)
    before = [each.detach().clone() for each in module.parameters()]
    with pytest.raises(TrainingError, match="one for each index"):
        private.step(np.arange(20), lambda indices: (rows.inputs[:count], rows.targets[:count]))
    assert not moved(module, before).any()


def test_steps_are_neither_copied_nor_pickled_and_go_on_after_the_attempt() -> None:
    rows = Counted()
    private = steps_of(network(), rows)
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TrainingError, match="are not"):
            attempt(private)
    private.step(np.arange(20), rows.gather)


@pytest.mark.usefixtures("no_noise")
def test_autocast_around_a_step_does_not_reach_what_is_clipped() -> None:
    rows, results = Counted(), []
    for is_on in (False, True):
        module = network()
        before = [each.detach().clone() for each in module.parameters()]
        private = steps_of(module, rows)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
            private.step(np.arange(20), rows.gather)
        results.append(moved(module, before))
    assert torch.equal(results[0], results[1])


@pytest.mark.long
def test_compiled_bfloat16_passes_keep_the_clip() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(64, 96), nn.LayerNorm(96), nn.GELU(), nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 3)
    )
    inputs, targets = torch.randn(64, 64), torch.arange(64) % 3
    clipped = ClippedGradients(module, losses, clip=0.01, autocast=True)
    sums = compilation.compiled(clipped.sums, (inputs, targets), torch.ones(64))
    assert sums != clipped.sums
    for index in range(64):
        mask = torch.zeros(64)
        mask[index] = 1
        alone = torch.cat([each.flatten() for each in sums((inputs, targets), mask)]).double()
        assert 0.0099 < float(alone.norm()) <= 0.01 * (1 + 1e-5)


def test_a_sampler_is_the_plan_s() -> None:
    users = np.arange(ROWS) // 4
    assert isinstance(sampler_of(plan(), ROWS), PoissonSampler)
    by_user = plan(unit="user", rows_per_unit=4)
    assert isinstance(sampler_of(by_user, ROWS, users), UserSampler)
    for wrong in ((plan(), users), (by_user, None)):
        with pytest.raises(TrainingError, match="a plan by user needs"):
            sampler_of(wrong[0], ROWS, wrong[1])
    with pytest.raises(RowsDoNotFit):
        sampler_of(by_user, ROWS, users[1:])


def test_a_network_that_mixes_examples_is_refused_before_anything_is_read() -> None:
    rows = Counted()
    with pytest.raises(CrossExampleLayer):
        steps_of(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)), rows)
    assert rows.asked == []


def test_the_example_of_the_docs_runs_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    docs = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", docs, re.DOTALL)
    exec(compile(example, "docs/training.md", "exec"), {})  # noqa: S102 (that is the test)
    spent = float(capsys.readouterr().out.split()[1])
    assert 2.9 < spent <= 3
