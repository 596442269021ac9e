"""The training loop: what it asks before it reads, what noise it adds, what it says, where it stops and how it goes on."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from scipy import stats

from cloister.wire.plans import SGD, Adam, TrainingSpec
from cloister_privacy.architecture import Network, from_bytes
from cloister_privacy.errors import CheckpointRefused, RowsDoNotFit, TrainingDiverged, TrainingError, WeightsRefused
from cloister_privacy.plan import DPPlan
from cloister_privacy.training import engine, train
from cloister_privacy.training.examples import Examples
from cloister_privacy.training.sampler import PoissonSampler

Rows = Mapping[str, np.ndarray]


def run(
    spec: TrainingSpec,
    rows: Rows,
    *,
    chunk_steps: int = 100,
    before_chunk: Callable[[int, int], None] = lambda first, end: None,
    after_chunk: Callable[[int, Callable[[], bytes]], bool] = lambda done, snapshot: True,
    resume: bytes | None = None,
) -> bytes | None:
    return train(
        spec,
        rows,
        plan=DPPlan.of(spec),
        device="cpu",
        chunk_steps=chunk_steps,
        before_chunk=before_chunk,
        after_chunk=after_chunk,
        resume=resume,
    )


def flat(weights: bytes | None) -> np.ndarray:
    assert weights is not None
    return np.concatenate([tensor.numpy(force=True).ravel() for tensor in from_bytes(weights).state_dict().values()])


def checkpoint_at(step: int, spec: TrainingSpec, rows: Rows) -> bytes:
    """A run stopped after that step, as its snapshot."""
    kept: list[bytes] = []

    def stop(done: int, snapshot: Callable[[], bytes]) -> bool:
        kept.append(snapshot())
        return False

    assert run(spec, rows, chunk_steps=step, after_chunk=stop) is None
    return kept[0]


def tensors_and_metadata(checkpoint: bytes) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    header = json.loads(checkpoint[8 : 8 + int.from_bytes(checkpoint[:8], "little")])
    return safetensors.torch.load(checkpoint), header["__metadata__"]


class _Watched(Mapping[str, np.ndarray]):
    """Rows that note when they are looked at."""

    def __init__(self, rows: Rows, diary: list[str]) -> None:
        self._rows, self._diary = rows, diary

    def __getitem__(self, name: str) -> np.ndarray:
        self._diary.append("read")
        return self._rows[name]

    def __contains__(self, name: object) -> bool:
        self._diary.append("read")
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        self._diary.append("read")
        return iter(self._rows)

    def __len__(self) -> int:
        self._diary.append("read")
        return len(self._rows)


def test_every_chunk_is_announced_before_any_row_of_it_is_read(
    spec_of: Callable[..., TrainingSpec], rows_of: Callable[[int], Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    diary: list[str] = []
    gather = Examples.batch

    def watched_gather(self: Examples, indices: Any) -> Any:
        diary.append("read")
        return gather(self, indices)

    monkeypatch.setattr(Examples, "batch", watched_gather)
    announced: list[tuple[int, int]] = []

    def before(first: int, end: int) -> None:
        diary.append("announced")
        announced.append((first, end))

    done: list[int] = []

    def note(step: int, snapshot: Callable[[], bytes]) -> bool:
        done.append(step)
        return True

    run(
        spec_of(steps=7),
        _Watched(rows_of(40), diary),
        chunk_steps=3,
        before_chunk=before,
        after_chunk=note,
    )
    assert announced == [(0, 3), (3, 6), (6, 7)]
    assert done == [3, 6, 7]
    assert diary[0] == "announced"
    assert [entry for i, entry in enumerate(diary) if entry == "announced" or diary[i - 1] == "announced"] == [
        "announced",
        "read",
    ] * 3


def test_a_chunk_that_cannot_be_charged_is_never_read(
    spec_of: Callable[..., TrainingSpec], rows_of: Callable[[int], Rows]
) -> None:
    diary: list[str] = []

    def refuse(first: int, end: int) -> None:
        raise PermissionError("no budget")

    with pytest.raises(PermissionError):
        run(spec_of(), _Watched(rows_of(40), diary), before_chunk=refuse)
    assert diary == []


def test_answering_false_stops_the_run_and_releases_nothing(
    spec_of: Callable[..., TrainingSpec], rows_of: Callable[[int], Rows]
) -> None:
    announced: list[int] = []
    stopped = run(
        spec_of(steps=6),
        rows_of(40),
        chunk_steps=2,
        before_chunk=lambda first, end: announced.append(end),
        after_chunk=lambda done, _: done < 4,
    )
    assert stopped is None
    assert announced == [2, 4]


@pytest.mark.parametrize("count", [0, 1, 40, 80])
def test_steps_and_chunks_are_the_plans_whatever_the_number_of_rows(
    count: int, spec_of: Callable[..., TrainingSpec], rows_of: Callable[[int], Rows]
) -> None:
    seen: list[tuple[int, int]] = []
    weights = run(spec_of(), rows_of(count), chunk_steps=4, before_chunk=lambda first, end: seen.append((first, end)))
    assert seen == [(0, 4), (4, 6)]
    assert len(weights or b"") == len(run(spec_of(), rows_of(40)) or b"")


def everything(spec: TrainingSpec, examples: Examples) -> PoissonSampler:
    return PoissonSampler(examples.count, batch_size=spec.batch_size, nominal_size=spec.nominal_size)


def steps_of(spec: TrainingSpec, rows: Rows, *, count: int) -> np.ndarray:
    """By how much each of `count` single steps moved every weight, times the divisor: the noisy sum, where the rate is 1."""
    spec = spec.model_copy(update={"steps": count + 1})
    run_ = engine._Run(spec, DPPlan.of(spec), device="cpu")
    examples = Examples(run_.network, rows, slots=len(rows["age"]), device="cpu")
    path = []
    for _ in range(count + 1):
        path.append(torch.cat([weight.detach().flatten().double() for weight in run_.network.parameters()]).numpy())
        run_.steps(examples, everything(spec, examples), 0, 1)
    return -np.diff(path, axis=0) * spec.batch_size


def test_without_any_row_a_step_is_pure_noise_of_the_plans_size_on_every_coordinate(
    spec_of: Callable[..., TrainingSpec], rows_of: Callable[[int], Rows]
) -> None:
    spec = spec_of(noise_multiplier=3.0, clip=0.5, optimizer=SGD(learning_rate=1.0))
    noise = steps_of(spec, rows_of(0), count=250) / DPPlan.of(spec).noise_std
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-7
    for coordinate in noise.T:
        assert 1e-7 < stats.chi2.cdf((coordinate**2).sum(), len(coordinate)) < 1 - 1e-7
    assert stats.pearsonr(noise[:-1].ravel(), noise[1:].ravel()).pvalue > 1e-7  # nothing carries over to the next step


def test_a_step_applies_the_clipped_sum_by_the_declared_batch_whatever_the_micro_batch(
    spec_of: Callable[..., TrainingSpec], rows_of: Callable[[int], Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloister_privacy.training.noise.NoiseDraws.take", _no_noise)
    spec = spec_of(
        nominal_size=10, batch_size=10, optimizer=SGD(learning_rate=1.0)
    )  # a rate of 1: all rows, every step
    state = engine._Run(spec, DPPlan.of(spec), device="cpu").network.state_dict()

    def moved(micro_batch: int) -> np.ndarray:
        run_ = engine._Run(spec, DPPlan.of(spec), device="cpu")
        run_.network.load_state_dict(state)
        run_._private.micro_batch = micro_batch
        examples = Examples(run_.network, rows_of(25), slots=25, device="cpu")
        run_.steps(examples, everything(spec, examples), 0, 1)
        return np.concatenate(
            [(state[name] - weight).numpy(force=True).ravel() for name, weight in run_.network.state_dict().items()]
        )

    whole = moved(1000)
    assert 0 < np.linalg.norm(whole) <= 25 * spec.clip / spec.batch_size
    for micro_batch in (1, 7, 24, 25):
        assert moved(micro_batch) == pytest.approx(whole, abs=1e-6)


def test_values_that_are_missing_or_out_of_bounds_are_mended_silently(
    spec_of: Callable[..., TrainingSpec], rows_of: Callable[[int], Rows]
) -> None:
    rows = dict(rows_of(5))
    rows["age"] = np.array([np.nan, np.inf, -np.inf, 1e30, 55], dtype=np.float32)
    rows["colour"] = np.array([-5, 99, 0, 1, 2], dtype=np.int32)
    columns, target = Examples(Network(spec_of().architecture), rows, slots=5, device="cpu").batch(np.arange(5))
    assert columns["age"].squeeze(1).tolist() == [0, 100, 0, 100, 55]
    assert columns["colour"].tolist() == [0, 2, 0, 1, 2]
    assert target.tolist() == rows["kind"].tolist()
    assert np.isfinite(flat(run(spec_of(), rows))).all()


def test_rows_of_another_shape_are_refused_without_a_number_of_theirs(
    spec_of: Callable[..., TrainingSpec], rows_of: Callable[[int], Rows]
) -> None:
    rows = dict(rows_of(41))
    for broken in (
        {name: array for name, array in rows.items() if name != "age"},
        rows | {"age": rows["age"][:, None]},
        rows | {"age": rows["age"][:17]},
    ):
        with pytest.raises(RowsDoNotFit) as refused:
            run(spec_of(), broken)
        assert not any(private in str(refused.value) for private in ("41", "17", "24"))


@pytest.mark.parametrize(
    "optimizer", [SGD(learning_rate=0.1), SGD(learning_rate=0.1, momentum=0.9), Adam(learning_rate=0.01)]
)
def test_a_resumed_run_goes_on_at_its_step_with_the_same_start_and_other_noise(
    optimizer: SGD | Adam, spec_of: Callable[..., TrainingSpec], rows_of: Callable[[int], Rows]
) -> None:
    spec = spec_of(steps=6, optimizer=optimizer)
    checkpoint = checkpoint_at(4, spec, rows_of(40))
    announced: list[tuple[int, int]] = []
    ends = [
        run(spec, rows_of(40), resume=checkpoint, before_chunk=lambda first, end: announced.append((first, end)))
        for _ in range(2)
    ]
    assert announced == [(4, 6), (4, 6)]
    assert (flat(ends[0]) != flat(ends[1])).all()
    _, metadata = tensors_and_metadata(checkpoint)
    assert {from_bytes(end or b"").initial_digest for end in ends} == {metadata["initial_digest"]}


def test_a_checkpoint_holds_weights_optimizer_and_step_and_nothing_random(
    spec_of: Callable[..., TrainingSpec], rows_of: Callable[[int], Rows]
) -> None:
    tensors, metadata = tensors_and_metadata(checkpoint_at(3, spec_of(), rows_of(40)))
    assert set(metadata) == {"format", "training", "step", "initial_digest"}
    assert (metadata["format"], metadata["step"]) == ("cloister.checkpoint/1", "3")
    names = {f"layers.{layer}.{kind}" for layer in (1, 3) for kind in ("weight", "bias")}
    assert set(tensors) == {f"weights.{name}" for name in names} | {f"optimizer.{i}.momentum_buffer" for i in range(4)}


def test_a_checkpoint_from_before_an_upgrade_is_of_the_same_spec(
    spec_of: Callable[..., TrainingSpec], rows_of: Callable[[int], Rows]
) -> None:
    spec = spec_of()
    now = spec.model_dump_json()
    before = now.replace('"with_datasets":[],', "").replace(',"audit":false', "")  # fields that specs did not have
    assert len(now) - len(before) == len('"with_datasets":[],' + ',"audit":false')
    told = hashlib.sha256(before.encode()).hexdigest()
    _, metadata = tensors_and_metadata(checkpoint_at(3, spec, rows_of(40)))
    assert metadata["training"] == told


def test_a_run_that_was_stopped_after_its_last_step_resumes_to_its_weights(
    spec_of: Callable[..., TrainingSpec], rows_of: Callable[[int], Rows]
) -> None:
    checkpoint = checkpoint_at(6, spec_of(steps=6), rows_of(40))
    diary: list[str] = []
    weights = run(spec_of(steps=6), _Watched(rows_of(40), diary), resume=checkpoint)
    tensors, _ = tensors_and_metadata(checkpoint)
    assert (
        from_bytes(weights or b"").state_dict()["layers.1.bias"].tolist() == tensors["weights.layers.1.bias"].tolist()
    )
    assert diary == []


def _no_noise(draws: Any) -> torch.Tensor:
    return torch.zeros(draws._count)


class _Malice:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self._path,)


def test_a_pickle_is_refused_and_never_run(
    spec_of: Callable[..., TrainingSpec], rows_of: Callable[[int], Rows], tmp_path: Path
) -> None:
    malice = pickle.dumps(_Malice(tmp_path / "owned"))
    with pytest.raises(CheckpointRefused, match="not safetensors"):
        run(spec_of(), rows_of(40), resume=malice)
    with pytest.raises(WeightsRefused, match="not safetensors"):
        from_bytes(malice)
    assert not (tmp_path / "owned").exists()


def test_a_checkpoint_that_is_not_of_this_run_is_refused_before_anything_is_charged(
    spec_of: Callable[..., TrainingSpec], rows_of: Callable[[int], Rows]
) -> None:
    spec = spec_of()
    good = checkpoint_at(3, spec, rows_of(40))
    tensors, metadata = tensors_and_metadata(good)

    def made(*, changed: dict[str, torch.Tensor] | None = None, dropped: str = "", **said: str) -> bytes:
        kept = {name: tensor for name, tensor in (tensors | (changed or {})).items() if name != dropped}
        return bytes(safetensors.torch.save(kept, metadata=metadata | said))

    run(spec, rows_of(40), resume=made())
    for bad in (
        b"",
        good[:-1],
        made(format="cloister.weights/1"),
        made(training="0" * 64),
        made(step="0"),
        made(step="7"),
        made(step="-1"),
        made(step="3.0"),
        made(dropped="optimizer.0.momentum_buffer"),
        made(changed={"more": torch.ones(1)}),
        made(changed={"weights.layers.1.bias": torch.ones(4)}),
        made(changed={"weights.layers.1.bias": torch.full((5,), torch.nan)}),
        made(changed={"optimizer.0.momentum_buffer": torch.ones(5, 4, dtype=torch.float64)}),
    ):
        with pytest.raises(CheckpointRefused):
            run(spec, rows_of(40), resume=bad, before_chunk=lambda first, end: pytest.fail("charged"))
    with pytest.raises(CheckpointRefused, match="another training spec"):
        run(spec_of(noise_multiplier=0.5), rows_of(40), resume=good)


def test_weights_that_ran_away_fail_the_run_by_name_at_the_end_of_a_chunk(
    spec_of: Callable[..., TrainingSpec], rows_of: Callable[[int], Rows]
) -> None:
    with pytest.raises(TrainingDiverged, match="lower the learning rate"):
        run(spec_of(noise_multiplier=1000.0, optimizer=SGD(learning_rate=3e38)), rows_of(40))


def test_a_plan_that_is_not_the_specs_is_refused(
    spec_of: Callable[..., TrainingSpec], rows_of: Callable[[int], Rows]
) -> None:
    with pytest.raises(TrainingError, match="what is charged must be what is trained"):
        train(
            spec_of(noise_multiplier=0.5),
            rows_of(40),
            plan=DPPlan.of(spec_of(noise_multiplier=1.0)),
            device="cpu",
            chunk_steps=1,
            before_chunk=lambda first, end: None,
            after_chunk=lambda done, snapshot: True,
        )
