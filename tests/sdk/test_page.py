"""The page of a certificate: it says what is stated, in all digits, and lets nothing that is stated act on its reader."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from certificates import CERTIFICATE
from cloister.wire.certificate import Certificate
from cloister.wire.page import html

VOID = {"meta"}


class Page(HTMLParser):
    """A page taken apart: its tags, its attributes and its text. Every tag that is opened is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data


def text_of(**changes: Any) -> str:
    return Page(html(CERTIFICATE.model_copy(update=changes))).text


def test_the_promise_is_in_plain_words_and_in_all_digits() -> None:
    text = text_of(epsilon=1.2500000001)
    assert "epsilon = 1.2500000001 at delta = 1e-06, for one row added or removed" in text
    assert "by a factor of at most e1.2500000001, about 3.5, and by 1e-06 on top of it" in text
    for told in ("1.1", "0.0042", "2,344", "60,000", "80,000", "poisson", "torch 2.13.0", "0.1.0", "rdp"):
        assert told in text


def test_a_promise_for_users_is_told_of_users() -> None:
    text = text_of(unit="user", rows_per_unit=4)
    assert "for all rows of one user added or removed" in text and "at most 80,000 users" in text


def test_a_factor_is_never_rounded_down() -> None:
    assert "about 2.72," in text_of(epsilon=1.0)
    assert "about 22,100," in text_of(epsilon=10.0)
    assert ", about" not in text_of(epsilon=800.0) and "at most e800.0, and" in text_of(epsilon=800.0)


@pytest.mark.parametrize("change", [{"unit": "household"}, {"adjacency": "replace_one"}], ids=str)
def test_a_unit_or_adjacency_without_words_is_named_and_not_explained(change: dict[str, str]) -> None:
    text = text_of(**change)
    assert "this page has no words for" in text and "changes by a factor" not in text
    assert all(value in text for value in change.values())


def test_every_digest_and_every_id_is_told() -> None:
    text = Page(html(CERTIFICATE, digest="f" * 64, signer="ed25519:0")).text
    dumped = CERTIFICATE.model_dump(mode="json")
    told = {value for name, value in dumped.items() if name.endswith("_digest")}
    told |= {dumped[name] for name in ("tenant", "model", "job", "source", "dataset")} | {*dumped["datasets"]}
    told |= {row[name] for row in dumped["events"] for name in ("id", "digest")} | {"f" * 64, "ed25519:0"}
    assert all(each in text for each in told) and len(told) == 17


@pytest.mark.parametrize(
    ("initial", "words"),
    [
        ("drawn", "drawn at random"),
        ("uploaded", "were uploaded. Whatever they were trained on before is not covered"),
        (None, "trained on before, if anything, is not covered"),
    ],
)
def test_the_start_is_told_for_what_it_is(initial: str | None, words: str) -> None:
    assert words in text_of(initial=initial)


def test_it_names_its_limits_and_proves_nothing_by_itself() -> None:
    text = text_of()
    for words in (
        "docs/assumptions.md",
        "The operator of the service is trusted",
        "This page proves nothing",
        "cloister verify",
    ):
        assert words in text


def test_what_was_not_told_is_left_out() -> None:
    unknown = {name: None for name, field in Certificate.model_fields.items() if not field.is_required()}
    text = text_of(**unknown)
    assert "None" not in text and "Sampler" not in text and "Capacity" not in text
    assert CERTIFICATE.dataset in text


def test_nothing_in_it_acts_or_is_fetched_whatever_is_stated() -> None:
    hostile = "<script>alert(1)</script><img src=//x onerror=y>\"'&"
    event = CERTIFICATE.event.model_copy(update={"mechanism": hostile})
    open_sets = ("accountant", "sampler", "code_version", "unit", "adjacency", "initial")
    stated = {"event": event, "engine": {hostile: hostile}, **dict.fromkeys(open_sets, hostile)}
    text = html(CERTIFICATE.model_copy(update=stated), digest=hostile, signer=hostile)
    page, plain = Page(text), Page(html(CERTIFICATE))
    assert page.tags <= plain.tags and "script" not in page.tags and "img" not in page.tags
    assert {name for name, _ in page.attributes} <= {"lang", "charset", "name", "content", "http-equiv", "class"}
    assert hostile in page.text
    assert not re.search(r"url\(|@import|https?:|//x[ >]", text.replace("//x onerror", ""))
    assert "default-src 'none'" in text and "color-scheme: light dark" in text
