"""Texts and recordings as people have them: in an upload and in a prediction, and what is refused before anything is sent."""

from __future__ import annotations

import io
import wave
from typing import Any

import numpy as np
import pytest

import cloister
from cloister._convert import convert
from cloister._inputs import model_inputs
from cloister.wire.rows import RowsRefused, check_rows, decode_rows, encode_rows, open_form, seal_form

SOUND = cloister.Audio(rate=8000, max_samples=10)
NOTE = cloister.Text(max_length=6)


def wav(samples: list[int], *, rate: int = 8000, channels: int = 1, width: int = 2) -> bytes:
    body = io.BytesIO()
    with wave.open(body, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(np.array(samples, dtype="<i2").tobytes())
    return body.getvalue()


def test_a_recording_is_the_same_as_samples_as_fractions_and_as_a_wav_file() -> None:
    samples = [0, 16384, -32768, 32767]
    given: list[Any] = [np.array(samples), np.array(samples) / 2**15, wav(samples), np.array(samples, np.int16)]
    rows = convert("sound", SOUND, given, 0)
    assert rows["sound"].dtype == np.int16
    assert rows["sound.length"].tolist() == [4] * 4
    for row in rows["sound"]:
        assert row[:4].tolist() == samples
        assert not row[4:].any()


def test_recordings_and_texts_cross_the_wire_and_lie_in_a_dataset_as_they_are() -> None:
    columns = {"sound": SOUND, "note": NOTE}
    rows = convert("sound", SOUND, [[1, 2, 3], []], 0) | convert("note", NOTE, ["é", b"abcdef"], 0)
    for again in (decode_rows(columns, encode_rows(columns, rows)), open_form(columns, seal_form(columns, rows, 7))):
        assert all((again[name] == array).all() for name, array in rows.items())
    rows["sound"][1, 4] = 1
    with pytest.raises(RowsRefused, match="past its own length"):
        check_rows(columns, rows)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (np.zeros(11), "11 samples, and at most 10"),
        (np.zeros((2, 2)), "no recording"),
        ([[1], [2, 3]], "no recording"),
        ("text", "no recording"),
        (np.array([40_000]), "beyond 16 bits"),
        (np.array([1.5]), "not from -1 to 1"),
        (np.array([np.nan]), "not from -1 to 1"),
        (b"RIFF", "no WAV file"),
        (wav([1], rate=16_000), "16000 samples a second, and 8000 are declared; resample it"),
        (wav([1, 2], channels=2), "2 channels of 16 bits"),
    ],
)
def test_what_is_no_recording_of_the_column_is_refused_by_row(value: Any, why: str) -> None:
    for refused in (
        lambda: convert("sound", SOUND, [[0], value], 40),
        lambda: model_inputs({"sound": SOUND}, [[0], value]),
    ):
        with pytest.raises(cloister.RowsNotFit, match=why):
            refused()
    with pytest.raises(cloister.RowsNotFit, match="row 41"):
        convert("sound", SOUND, [[0], value], 40)


def test_inputs_are_sent_no_longer_than_the_longest_of_them() -> None:
    inputs = model_inputs({"sound": SOUND, "note": NOTE}, {"sound": [[1, 2], [3]], "note": ["a", "é"]})
    assert inputs["sound"].tolist() == [[1, 2], [3, 0]]
    assert inputs["note"].tolist() == ["a", "é"]


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (["toolong"], "7 bytes, and the model reads 6"),
        ([b"\xff"], "not UTF-8"),
        ([7], "neither"),
        ("one", r"add one: \[x\]"),
    ],
)
def test_what_is_no_text_of_the_column_is_refused(value: Any, why: str) -> None:
    with pytest.raises(cloister.RowsNotFit, match=why):
        model_inputs({"note": NOTE}, value)


def test_pixels_that_were_scaled_are_no_uint8() -> None:
    pixels = {"image": cloister.Tensor(shape=(2,), low=0, high=255, dtype="uint8")}
    assert model_inputs(pixels, [[0, 255]])["image"].tolist() == [[0, 255]]
    for wrong in ([[0.5, 1]], [[256, 0]], [[-1, 0]]):
        with pytest.raises(cloister.RowsNotFit, match="do not scale it"):
            model_inputs(pixels, wrong)
