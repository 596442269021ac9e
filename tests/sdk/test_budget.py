"""A budget as its owner and everyone else read it: a table, a plot, CSV and JSON; and the owner's acts as they are sent."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cloister
from cloister.wire.ledger import BudgetEntry
from cloister.wire.sources import BlockBudget, Source
from fake_server import Server

SOURCE = "src_" + "0" * 32
START = datetime(2026, 1, 1, tzinfo=UTC)
OWNER, PARTNER, JOB = "ap_" + "1" * 32, "ap_" + "2" * 32, "job_" + "3" * 32
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = (
    "</text><script>alert(1)</script>",
    '"/><image href="https://example.org/x"/>',
    "\x1b[2Jcleared\nand a second line",
    "\u202emirrored",
    '=HYPERLINK("https://example.org")',
)


def entry(day: float, **fields: Any) -> BudgetEntry:
    return BudgetEntry(**{"revision": 1, "time": START + timedelta(days=day), **fields})


def job(day: float, spent: float, **changed: Any) -> BudgetEntry:
    fields: dict[str, Any] = {
        "kind": "train", "principal": PARTNER, "principal_name": "north/trainer", "block": "first", "job": JOB, "model": "m",
        "dataset": "adult", "steps_reserved": 120, "steps_charged": 120, "is_settled": True, "epsilon": 1.25, "delta": 1e-6,
        "spent": spent,
        "charge": {
            "mechanism": "poisson_subsampled_gaussian", "steps": 120, "noise_multiplier": 1.5, "sampling_rate": 0.01,
        },
    }  # fmt: skip
    return entry(day, **fields | changed)


def act(day: float, kind: str, **fields: Any) -> BudgetEntry:
    return entry(day, kind=kind, principal=OWNER, principal_name="owner", **fields)


def report(*entries: BudgetEntry, is_of_all: bool = True, epsilon: float = 10, **budget: Any) -> cloister.BudgetReport:
    """A report in which every entry has the revision of its place."""
    blocks = budget.pop("blocks", [BlockBudget(number=0, name="first", spent=2.5, left=epsilon - 2.5)])
    told = {"epsilon": epsilon, "delta": 1e-6, "spent": 2.5, "left": 7.5, "revision": len(entries), "blocks": blocks}
    source = {
        "id": SOURCE,
        "name": "census",
        "unit": "row",
        "adjacency": "add_remove",
        "public": False,
        "created": START,
    }
    numbered = tuple(each.model_copy(update={"revision": place}) for place, each in enumerate(entries, 1))
    return cloister.BudgetReport(Source.model_validate({**source, "budget": told | budget}), numbered, is_of_all)


WHOLE = report(
    job(1, 1.5),
    act(2, "budget", was=8, epsilon=10, reason="more people agreed"),
    act(3, "allowance", client=PARTNER, client_name="north/trainer", epsilon=1.5, expires=START, reason="a pilot"),
    job(4, 2.5, steps_charged=60, is_settled=False, model="other"),
)
OWN = report(
    job(1, 1.5, principal=None, principal_name=None),
    entry(2, kind="allowance", client=PARTNER, epsilon=4),
    is_of_all=False,
    allowance=4,
    allowance_expires=START + timedelta(days=90),
)


def parsed(html: str) -> ElementTree.Element:
    return ElementTree.fromstring(html)  # noqa: S314 (it is ours; that it holds no entities is asserted)


def plot(told: cloister.BudgetReport) -> ElementTree.Element:
    (svg,) = parsed(told._repr_html_()).iter(f"{SVG}svg")
    return svg


def test_an_owner_s_report_is_a_table_of_who_used_what() -> None:
    assert str(WHOLE) == (
        "Budget of census: epsilon 10 at delta 1e-06 in each block, unit row\n"
        "\n"
        "block  spent   left\n"
        "first  2.500  7.500\n"
        "\n"
        "revision  time              kind       block       steps  state    epsilon  spent  by             what\n"
        "       1  2026-01-02 00:00  train      first  120 of 120  settled    1.250  1.500  north/trainer  model m on adult\n"
        "       2  2026-01-03 00:00  budget                                  10.000         owner          "
        "from 8 to 10: more people agreed\n"
        "       3  2026-01-04 00:00  allowance                                1.500         owner          "
        "north/trainer: at most 1.5 in each block until 2026-01-01 00:00: a pilot\n"
        "       4  2026-01-05 00:00  train      first   60 of 120  open       1.250  2.500  north/trainer  "
        "model other on adult\n"
        "\n"
        "Times are UTC; spent is of the block, as the job was started. Steps that a job does not run are free again when it is "
        "settled."
    )
    assert repr(WHOLE) == "<BudgetReport of census: 2.500 of 10 spent by all, 4 entries>"


def test_everyone_else_s_report_is_of_its_own_use() -> None:
    heading, *_, note = str(OWN).split("\n\n")
    assert heading == (
        "Your use of the budget of census: epsilon 10 at delta 1e-06 in each block, unit row; your allowance is 4; "
        "it ends 2026-04-01 00:00"
    )
    assert " by " not in str(OWN) and "you" not in note
    assert f"{PARTNER}: at most 4 in each block" in str(OWN)
    assert "spent by you" in repr(OWN)
    assert ">by<" not in OWN._repr_html_()


def test_a_report_without_entries_says_so() -> None:
    assert str(report()).endswith("\n\nNothing was used yet.")
    assert str(report(is_of_all=False)).endswith("\n\nYou have used nothing yet.")


def test_what_a_later_server_tells_is_shown_as_far_as_it_is_known() -> None:
    told = str(report(entry(1, kind="new_kind", reason="because"), entry(2, kind="train", job=JOB)))
    assert "new kind" in told and ": because" in told


def test_nothing_that_people_wrote_reaches_the_terminal_as_more_than_text() -> None:
    told = str(report(*(act(1, "budget", was=1, epsilon=2, reason=each) for each in (*HOSTILE, "r" * 500))))
    assert all(line.isprintable() for line in told.splitlines())
    assert len(told.splitlines()) == 4 + 1 + len(HOSTILE) + 1 + 2 + 1
    assert max(map(len, told.splitlines())) < 220


def test_csv_is_read_back_line_by_line() -> None:
    lines = list(csv.DictReader(io.StringIO(WHOLE.to_csv())))
    assert [line["kind"] for line in lines] == ["train", "budget", "allowance", "train"]
    first, raised, allowed, last = lines
    assert (first["principal_name"], first["model"], first["time"]) == (
        "north/trainer",
        "m",
        "2026-01-02T00:00:00+00:00",
    )
    assert (first["charge_mechanism"], first["charge_noise_multiplier"]) == ("poisson_subsampled_gaussian", "1.5")
    assert (raised["was"], raised["epsilon"], raised["reason"]) == ("8.0", "10.0", "more people agreed")
    assert (raised["charge_steps"], raised["is_settled"]) == ("", "")
    assert allowed["expires"] == START.isoformat()
    assert (last["steps_reserved"], last["steps_charged"], last["is_settled"]) == ("120", "60", "false")


@pytest.mark.parametrize("reason", [*HOSTILE, "+1", "-1", "@sum", "a,b", 'say "no"', "\t=1"])
def test_a_spreadsheet_computes_nothing_that_people_wrote(reason: str) -> None:
    told = report(act(1, "budget", was=1, epsilon=2, reason=reason))
    (line,) = csv.DictReader(io.StringIO(told.to_csv()))
    assert line["reason"][0] not in "=+-@\t\r" and line["reason"].isprintable()
    assert json.loads(told.to_json())["entries"][0]["reason"] == reason, "as it was written"


def test_json_holds_all_that_was_told() -> None:
    told = json.loads(WHOLE.to_json())
    assert told["is_of_all"] is True
    assert Source.model_validate(told["source"]) == WHOLE.source
    assert [BudgetEntry.model_validate(each) for each in told["entries"]] == list(WHOLE.entries)


def test_a_notebook_shows_a_plot_and_the_tables() -> None:
    page = parsed(WHOLE._repr_html_())
    assert [each.tag for each in page] == [f"{SVG}svg", "table", "table", "p"]
    blocks, entries = page.iter("table")
    assert [each.text for each in blocks.iter("td")] == ["first", "2.500", "7.500"]
    assert len(list(entries.iter("tr"))) == 5
    assert all(each.attrib["scope"] == "col" for each in page.iter("th"))
    assert all(table[0].tag == "caption" for table in page.iter("table"))


def test_a_plot_says_what_it_shows_to_whoever_cannot_see_it() -> None:
    svg = plot(WHOLE)
    assert svg.attrib["role"] == "img" and [each.tag for each in svg[:2]] == [f"{SVG}title", f"{SVG}desc"]
    assert svg[0].text == "Budget of census: what is left"
    assert svg[1].text == (
        "Budget of census: epsilon 10 at delta 1e-06 in each block, unit row. block first: 2.500 spent, 7.500 left."
    )
    tips = [each.text or "" for each in svg.iter(f"{SVG}title")]
    assert "2026-01-02 00:00 train by north/trainer: model m on adult; epsilon 1.250 on its own" in tips
    assert "first: 7.500 left now" in tips


def test_a_plot_is_the_server_s_numbers_and_reads_on_light_and_on_dark() -> None:
    html = WHOLE._repr_html_()
    svg = plot(WHOLE)
    attributes = {name for each in svg.iter() for name in each.attrib}
    assert not {name for name in attributes if name.startswith("on") or name in ("id", "class", "style", "href")}
    assert "url(" not in html and "<!" not in html
    colours = {each.attrib.get(name, "none") for each in svg.iter() for name in ("fill", "stroke")}
    assert colours <= {"none", "currentColor", "#3b82f6"}
    assert svg.attrib["fill"] == "currentColor", "text takes the page's colour"


def test_what_people_wrote_is_text_in_a_notebook_and_never_markup() -> None:
    told = report(*(act(place, "budget", was=1, epsilon=2, reason=each) for place, each in enumerate(HOSTILE)))
    html = told._repr_html_()
    assert "<!" not in html and "<script" not in html and "<image" not in html
    assert all(each.isprintable() for each in html.replace("\n", ""))
    tags = {each.tag.removeprefix(SVG) for each in parsed(html).iter()}
    assert tags <= {"div", "svg", "title", "desc", "path", "text", "circle", "g", "table", "caption", "thead", "tbody",
                    "tr", "th", "td", "p"}  # fmt: skip


def levels(svg: ElementTree.Element) -> list[list[tuple[float, float]]]:
    """The corners of each thick line but those of the legend."""
    found = []
    for path in svg.iter(f"{SVG}path"):
        if path.attrib.get("stroke-width") != "2" or " h" in path.attrib["d"]:
            continue
        x = y = 0.0
        corners = []
        for way, numbers in re.findall(r"([MHV])([-\d. ]+)", path.attrib["d"]):
            told = [float(each) for each in numbers.split()]
            x, y = (told[0], told[1]) if way == "M" else (told[0], y) if way == "H" else (x, told[0])
            corners.append((x, y))
        found.append(corners)
    return found


def test_the_line_falls_with_what_is_spent_and_rises_with_the_cap() -> None:
    cap, first, now = levels(plot(WHOLE))
    assert first[0][1] == cap[0][1] and first[-1] == now[0]
    falls = [after[1] - before[1] for before, after in pairwise(first) if after[1] != before[1]]
    assert [fall > 0 for fall in falls] == [True, False, True], "a job, a raise, a job"
    assert now[-1][1] == first[-1][1], "what is left now is what the entries leave"


def test_a_written_off_budget_leaves_nothing() -> None:
    blocks = [BlockBudget(number=0, name="first", spent=1.5, left=0)]
    svg = plot(report(job(1, 1.5), act(2, "write_off", reason="an old backup"), blocks=blocks))
    _, first, now = levels(svg)
    assert first[-1][1] == now[-1][1] == max(y for line in levels(svg) for _, y in line)


def test_a_later_block_begins_with_its_first_job() -> None:
    blocks = [BlockBudget(number=0, name="first", spent=1, left=9), BlockBudget(number=1, name="day2", spent=1, left=9)]
    blocks.append(BlockBudget(number=2, name="day3", spent=0, left=10))
    svg = plot(report(job(1, 1), job(3, 1, block="day2"), blocks=blocks))
    cap, first, _, second, _, third = levels(svg)
    assert first[0][0] == cap[0][0] < second[0][0] and second[0][1] == cap[0][1]
    assert len(third) == 3, "now alone"
    assert {"first", "day2", "day3", "cap"} <= {each.text for each in svg.iter(f"{SVG}text")}


_NUMBERS = st.floats(1e-6, 1000)
_ENTRIES = st.lists(
    st.one_of(
        st.builds(job, st.floats(-1, 4000), st.floats(0, 2000), block=st.sampled_from(["first", "b1", "b2", "gone"])),
        st.builds(lambda day, was, to: act(day, "budget", was=was, epsilon=to), st.floats(0, 4000), _NUMBERS, _NUMBERS),
        st.builds(lambda day: act(day, "write_off"), st.floats(0, 4000)),
    ),
    max_size=12,
)


@settings(max_examples=80, deadline=None)
@given(_ENTRIES, _NUMBERS, st.integers(1, 40), st.booleans())
def test_every_plot_is_valid_and_stays_in_its_frame(
    entries: list[BudgetEntry], epsilon: float, count: int, is_of_all: bool
) -> None:
    names = ["first", *(f"b{number}" for number in range(1, count))]
    blocks = [BlockBudget(number=n, name=name, spent=0.5, left=epsilon / 2) for n, name in enumerate(names)]
    told = report(*entries, epsilon=epsilon, blocks=blocks, is_of_all=is_of_all)
    svg = plot(told)
    width, height = (float(svg.attrib[each]) for each in ("width", "height"))
    assert all(0 <= x <= width and 0 <= y <= height for line in levels(svg) for x, y in line)
    assert all(0 <= float(each.attrib["y"]) <= height for each in svg.iter(f"{SVG}text"))
    assert len([each for each in svg.iter(f"{SVG}text") if each.attrib.get("text-anchor") == "end"]) <= 8
    assert "e+" not in told._repr_html_() and "nan" not in told._repr_html_()
    assert str(told) and told.to_csv() and told.to_json()


def test_a_long_report_is_cut_in_a_notebook_and_nowhere_else() -> None:
    told = report(*(job(day, 1) for day in range(250)))
    assert "50 older entries are not shown" in told._repr_html_()
    assert len(told.to_csv().splitlines()) == 251 and len(str(told).splitlines()) == 258


def on_wire(told: cloister.BudgetReport) -> dict[str, Any]:
    return dict(json.loads(told.to_json()))


def serve(server: Server, told: cloister.BudgetReport, *, size: int = 3) -> Server:
    """The routes of a source and its ledger, in pages."""
    answer = on_wire(told)

    def page(request: httpx2.Request) -> dict[str, Any]:
        after = int(request.url.params.get("cursor", 0))
        left = [each for each in answer["entries"] if each["revision"] > after]
        more = str(left[size - 1]["revision"]) if len(left) > size else None
        return {"is_of_all": answer["is_of_all"], "items": left[:size], "next": more, "later": "unknown"}

    for name in ("census", SOURCE):
        server.on(f"/v1/sources/{name}", answer["source"])
    return server.on(f"/v1/sources/{SOURCE}/ledger", page)


def both(server: Server, sync: Callable[[cloister.Cloister], Any], name: str, *given: Any, **more: Any) -> list[Any]:
    """What a call gives, and what the async client's call of this name gives."""

    async def journey() -> Any:
        async with server.async_client() as client:
            found: Any = client
            for part in name.split("."):
                found = getattr(found, part)
            return await found(*given, **more)

    with server.client() as client:
        return [sync(client), asyncio.run(journey())]


def test_a_report_is_of_all_pages_sync_and_async(server: Server) -> None:
    serve(server, WHOLE)
    for given_ in ("census", SOURCE, WHOLE.source):
        assert both(server, lambda c, g=given_: c.budget(g), "budget", given_) == [WHOLE, WHOLE]
    limits = {request.url.params["limit"] for request in server.requests(f"/v1/sources/{SOURCE}/ledger")}
    assert limits == {"200"} and len(server.requests(f"/v1/sources/{SOURCE}/ledger")) == 12
    assert WHOLE.budget.spent == 2.5 and WHOLE.budget is WHOLE.source.budget


def test_a_report_holds_nothing_newer_than_its_budget(server: Server) -> None:
    moved = report(*WHOLE.entries, revision=3)
    serve(server, moved)
    with server.client() as client:
        assert client.budget("census").entries == WHOLE.entries[:3]


def test_what_names_no_source_is_not_asked_for(server: Server) -> None:
    with server.client() as client:
        for wrong in ("no name", "../jobs", 3, None):
            with pytest.raises(cloister.InvalidArgument):
                client.budget(wrong)  # type: ignore[arg-type]  (that is the test)
    assert server.asked == []


def test_the_owner_s_acts_are_sent_as_they_are_meant(server: Server) -> None:
    serve(server, WHOLE)
    until = datetime(2027, 1, 1, tzinfo=UTC)
    bound = {"source": SOURCE, "client": PARTNER, "epsilon": 1.5, "expires": until.isoformat()}
    server.on("/v1/sources/census/budget", on_wire(WHOLE)["source"])
    server.on("/v1/sources/census/allowances/trainer", bound)
    server.on(f"/v1/sources/census/allowances/{PARTNER}", {**bound, "epsilon": None, "expires": None})
    server.on("/v1/sources/census/blocks", {"source": SOURCE, "number": 1, "name": "day2"})
    more: dict[str, Any] = {"epsilon": 12.0, "reason": "r"}
    for told in both(server, lambda c: c.sources.set_budget("census", **more), "sources.set_budget", "census", **more):
        assert told == WHOLE.source
    more = {"client": "trainer", "epsilon": 1.5, "expires": until, "reason": "r"}
    for told in both(server, lambda c: c.sources.allow("census", **more), "sources.allow", "census", **more):
        assert isinstance(told, cloister.Allowance) and (told.client, told.epsilon, told.expires) == (
            PARTNER,
            1.5,
            until,
        )
    more = {"client": PARTNER, "reason": "r"}
    for told in both(server, lambda c: c.sources.allow("census", **more), "sources.allow", "census", **more):
        assert told.epsilon is None
    for told in both(
        server,
        lambda c: c.sources.open_block("census", "day2", reason="a new day"),
        "sources.open_block",
        "census",
        "day2",
        reason="a new day",
    ):
        assert isinstance(told, cloister.Block) and (told.number, told.name) == (1, "day2")
    sent = [request for request in server.asked if request.method in ("PUT", "POST") and "/v1/" in str(request.url)]
    bodies = [{"epsilon": 12.0, "reason": "r"}, {"epsilon": 1.5, "expires": "2027-01-01T00:00:00Z", "reason": "r"},
              {"reason": "r"}, {"name": "day2", "reason": "a new day"}]  # fmt: skip
    assert [json.loads(each.content) for each in sent] == [body for body in bodies for _ in range(2)]
    assert [each.method for each in sent] == ["PUT"] * 6 + ["POST"] * 2
    assert len({each.headers["idempotency-key"] for each in sent}) == 8


@pytest.mark.parametrize(
    ("act_of", "words"),
    [
        (lambda sources: sources.set_budget("census", epsilon=float("nan"), reason="r"), "epsilon"),
        (lambda sources: sources.set_budget("census", epsilon=0, reason="r"), "epsilon"),
        (lambda sources: sources.set_budget("census", epsilon=1001, reason="r"), "epsilon"),
        (lambda sources: sources.set_budget("census", epsilon=1, reason=""), "reason"),
        (lambda sources: sources.allow("census", client="c", epsilon=-1, reason="r"), "epsilon"),
        (lambda sources: sources.allow("census", client="c", expires=datetime(2027, 1, 1), reason="r"), "expires"),  # noqa: DTZ001
        (lambda sources: sources.allow("census", client="not a name", reason="r"), "neither a name"),
        (lambda sources: sources.open_block("census", "day 2", reason="r"), "name"),
        (lambda sources: sources.open_block("the census", "day2", reason="r"), "neither a name"),
    ],
)
def test_an_act_that_no_server_would_accept_is_not_sent(
    server: Server, act_of: Callable[[Any], Any], words: str
) -> None:
    with server.client() as client, pytest.raises(cloister.InvalidArgument, match=words):
        act_of(client.sources)
    assert server.asked == []
