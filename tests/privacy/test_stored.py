"""What a run leaves is told beforehand: never less than it is, and hardly more."""

from __future__ import annotations

from typing import Any

import pytest
import safetensors.torch

from cloister.wire.plans import EMA, SGD, Adam, AdamW, Initial, LoRA
from cloister_privacy.architecture import build
from cloister_privacy.architecture.weights import to_bytes
from cloister_privacy.plan import DPPlan
from cloister_privacy.training import train
from cloister_privacy.training.start import digest_of
from cloister_privacy.training.stored import stored
from families import FAMILIES, ROWS, converted, spec_of

SLACK = 1.1
"""Of so small networks the headers, which are bounded roughly, are a large part."""


@pytest.mark.parametrize("name", FAMILIES)
def test_the_weights_of_every_family_are_told_from_the_spec(name: str) -> None:
    network = build(FAMILIES[name].architecture)
    network.initial_digest = "f" * 64
    length = len(to_bytes(network))
    assert length <= stored(spec_of(FAMILIES[name])).weights <= SLACK * length + 500


@pytest.mark.parametrize(
    "fields",
    [
        {"optimizer": SGD(learning_rate=0.1)},
        {"optimizer": SGD(learning_rate=0.1, momentum=0.9)},
        {"optimizer": AdamW(learning_rate=0.01, weight_decay=0.1, averaging=EMA(decay=0.9))},
        {"optimizer": Adam(learning_rate=0.01), "lora": LoRA(rank=2)},
    ],
    ids=["sgd", "momentum", "averaged", "adapters"],
)
def test_checkpoints_are_told_from_the_spec_whatever_they_keep(fields: dict[str, Any]) -> None:
    family = FAMILIES["attention"]
    initial = safetensors.torch.save(build(family.architecture).state_dict()) if "lora" in fields else None
    if initial is not None:
        layers = tuple(
            each.model_copy(update={"frozen": True}) if each.type == "transformer_layer" else each
            for each in family.layers
        )
        fields |= {"architecture": family.architecture.model_copy(update={"layers": layers})}
        fields |= {"initial": Initial(id="wts_" + "0" * 32, digest=digest_of(initial))}
    spec, lengths = spec_of(family, **fields), []

    def note(_: int, snapshot: Any) -> bool:
        lengths.append(len(snapshot()))
        return True

    body = train(
        spec, converted(family, ROWS), plan=DPPlan.of(spec), device="cpu", chunk_steps=2, before_chunk=lambda *_: None,
        after_chunk=note, initial=initial,
    )  # fmt: skip
    told = stored(spec)
    assert body is not None and len(body) <= told.weights <= SLACK * len(body) + 500
    assert max(lengths) <= told.checkpoint <= SLACK * max(lengths) + 500
