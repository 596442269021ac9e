"""A network as a picture: valid SVG of every layer, nothing in it but what we drew, and no line through a box."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.wire import layers as wire
from cloister.wire.architecture import Architecture
from cloister.wire.columns import CategoryColumn, InputColumn, NumberColumn, TensorColumn
from cloister_privacy.architecture.picture import picture
from cloister_privacy.errors import ArchitectureRefused
from families import FAMILIES

KIND = CategoryColumn(values=("a", "b", "c"))
NUMBERS: dict[str, InputColumn] = {"numbers": TensorColumn(shape=(4,), low=0, high=1)}
SVG = "{http://www.w3.org/2000/svg}"


def network(*layers: wire.Layer, inputs: dict[str, InputColumn] | None = None, **fields: Any) -> Architecture:
    defaults = {"target": "kind", "output": KIND, "loss": "cross_entropy"}
    return Architecture(inputs=inputs or NUMBERS, layers=layers, **(defaults | fields))


def square(**fields: Any) -> wire.Linear:
    return wire.Linear(in_features=4, out_features=4, **fields)


LAST = wire.Linear(in_features=4, out_features=3)


class Rectangle(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Rectangle) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)  # noqa: S314 (it is ours; that it holds no entities is asserted)


def boxes(root: ElementTree.Element) -> dict[tuple[str, ...], Rectangle]:
    """What each box of the graph holds, and where it is."""
    found = {}
    for group in root.findall(f"{SVG}g"):
        shape = group.find(f"{SVG}rect")
        assert shape is not None
        x, y, width, height = (float(shape.attrib[each]) for each in ("x", "y", "width", "height"))
        found[tuple(group.attrib["data-layers"].split())] = Rectangle(x, y, x + width, y + height)
    return found


def shown(root: ElementTree.Element) -> list[str]:
    """The keys of all layers and inputs, boxes' and folded ones'."""
    return [key for group in root.iter(f"{SVG}g") for key in group.attrib["data-layers"].split()]


def keys_of(architecture: Architecture) -> list[str]:
    layers = [layer.name or f"#{position}" for position, layer in enumerate(architecture.layers)]
    return [*architecture.inputs, *layers]


def lines(root: ElementTree.Element) -> list[list[Rectangle]]:
    """The straight parts of each line between boxes."""
    found = []
    for path in root.findall(f"{SVG}path[@fill='none']"):
        told = re.findall(r"[MLQ]([-\d. ]+)", path.attrib["d"])
        points = [(float(p.split()[0]), float(p.split()[1])) for p in told]
        found.append(
            [Rectangle(min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)) for (x0, y0), (x1, y1) in pairwise(points)]
        )
    return found


def words(root: ElementTree.Element) -> list[str]:
    return [each.text or "" for each in root.iter(f"{SVG}text")]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_input_and_layer_of_every_family_is_in_its_picture_once(family: str) -> None:
    architecture = FAMILIES[family].architecture
    root = parsed(picture(architecture))
    assert sorted(shown(root)) == sorted(keys_of(architecture))
    assert {layer.type for layer in architecture.layers} <= {each.split()[0] for each in words(root)}


def test_a_picture_says_what_it_is_to_whoever_cannot_see_it() -> None:
    root = parsed(picture(network(square(), wire.ReLU(), LAST)))
    assert root.attrib["role"] == "img"
    assert [child.tag for child in root[:2]] == [f"{SVG}title", f"{SVG}desc"]
    assert root[0].text == "A network that predicts kind"
    assert root[1].text == ("3 layers, 35 parameters, all trained. From its 1 inputs down: linear, relu, linear.")
    assert all(group.find(f"{SVG}title") is not None for group in root.findall(f"{SVG}g"))


def test_parameters_and_shapes_are_told_and_frozen_layers_are_marked() -> None:
    root = parsed(
        picture(
            network(
                wire.Conv2d(in_channels=1, out_channels=2, kernel_size=(3, 3), frozen=True),
                wire.Flatten(),
                wire.Linear(in_features=8, out_features=3),
                inputs={"image": TensorColumn(shape=(1, 4, 4), low=0, high=1)},
            )
        )
    )
    told = words(root)
    assert told.count("frozen") == 2  # the layer's, and the legend's
    assert {"20 parameters", "27 parameters", "1\u00d74\u00d74", "2\u00d72\u00d72", "8", "3"} <= set(told)
    assert "3 layers \u00b7 47 parameters \u00b7 27 trained \u00b7 20 frozen" in told


def test_unnamed_activations_are_folded_into_the_layer_before_and_named_ones_are_not() -> None:
    layers = (square(), wire.ReLU(), wire.ReLU(), wire.Dropout(), square(), wire.Tanh(name="out"), wire.ELU(), LAST)
    found = boxes(parsed(picture(network(*layers))))
    assert list(found) == [("numbers",), ("#0",), ("#4",), ("out",), ("#7",), ()]
    folded = parsed(picture(network(*layers))).findall(f"{SVG}g/{SVG}g")
    assert [each.attrib["data-layers"] for each in folded] == ["#1 #2", "#3", "#6"]


def test_what_two_layers_read_is_not_hidden_in_a_box_with_an_activation() -> None:
    layers = (square(name="first"), wire.ReLU(), wire.Add(reads=("first", "second")), LAST)
    skipping = (layers[0], wire.ReLU(), square(name="second"), *layers[2:])
    assert ("#1",) in boxes(parsed(picture(network(*skipping))))


HOSTILE = (
    "</text><script>alert(1)</script>",
    '"/><image href="https://example.org/x"/>',
    "<!ENTITY x SYSTEM 'file:///etc/passwd'>&x;",
    "]]>\x00\x0b\ufffe",
    "\u202emirrored",
    "\u8a9e" * 200,
)


def test_what_people_name_is_text_and_never_markup() -> None:
    column = CategoryColumn(values=HOSTILE[:3])
    for output in (column, CategoryColumn(values=HOSTILE[3:])):
        svg = picture(
            network(wire.Encode(), wire.Linear(in_features=3, out_features=3), inputs={"a": column}, output=output)
        )
        assert "<!" not in svg and "<script" not in svg and "<image" not in svg
        assert all(each.isprintable() for each in svg.replace("\n", ""))
        tags = {each.tag.removeprefix(SVG) for each in parsed(svg).iter()}
        assert tags == {"svg", "title", "desc", "rect", "path", "g", "text"}


def test_a_picture_refers_to_nothing_runs_nothing_and_can_stand_beside_another_in_one_page() -> None:
    for family in FAMILIES.values():
        root = parsed(picture(family.architecture))
        attributes = {name for each in root.iter() for name in each.attrib}
        assert not {name for name in attributes if name.startswith("on") or name in ("id", "class", "style", "href")}
        assert "url(" not in picture(family.architecture)


def test_long_names_stay_in_their_boxes() -> None:
    long = "n" * 63
    root = parsed(picture(network(square(name=long), wire.Tanh(name="t" * 63), LAST, target="k" * 63)))
    assert long in shown(root)  # in full where a program or a pointer looks
    assert max(map(len, words(root))) < 50


@pytest.mark.parametrize("family", ["joined", "residual"])
def test_the_same_network_has_the_same_picture_in_another_process(family: str) -> None:
    code = (
        "from families import FAMILIES; from cloister_privacy.architecture.picture import picture;"
        f"import sys; sys.stdout.write(picture(FAMILIES[{family!r}].architecture))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True, env=environment
    )
    assert done.stdout == picture(FAMILIES[family].architecture)


@st.composite
def graphs(draw: st.DrawFn) -> Architecture:
    """Sums of earlier layers, as many as read anything there is, and at last the sum of what nothing reads yet."""
    names, layers, unread = ["numbers"], [], {"numbers"}
    for number in range(draw(st.integers(1, 14))):
        reads = draw(st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True))
        name, unread = f"n{number}", unread - set(reads)
        unread.add(name)
        layers.append(
            square(name=name, reads=tuple(reads)) if len(reads) == 1 else wire.Add(name=name, reads=tuple(reads))
        )
        names.append(name)
    left = tuple(sorted(unread))
    layers.append(wire.Add(reads=left) if len(left) > 1 else wire.ReLU(reads=left))
    return network(*layers, LAST)


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_boxes_lie_apart_in_the_picture_and_no_line_crosses_one(architecture: Architecture) -> None:
    root = parsed(picture(architecture))
    width, height = (float(root.attrib[each]) for each in ("width", "height"))
    places = list(boxes(root).values())
    for number, place in enumerate(places):
        assert place.left > 0 and place.top > 0 and place.right < width and place.bottom < height
        assert not any(place.meets(other) for other in places[:number])
    inner = [Rectangle(p.left + 1, p.top + 1, p.right - 1, p.bottom - 1) for p in places]
    for line in lines(root):
        for part in line:
            assert part.left > 0 and part.right < width
            thick = Rectangle(part.left - 0.5, part.top - 0.5, part.right + 0.5, part.bottom + 0.5)
            assert not any(thick.meets(each) for each in inner)
    pairs = {
        (name, position) for position, layer in enumerate(architecture.layers) for name in layer.reads or ("before",)
    }
    folded = sum(1 for each in root.findall(f"{SVG}g/{SVG}g"))
    assert len(lines(root)) == len(pairs) - folded + 1


def test_the_longest_chain_is_a_valid_picture_of_all_its_layers() -> None:
    architecture = network(*(square() for _ in range(1023)), LAST)
    start = time.process_time()
    svg = picture(architecture)
    assert time.process_time() - start < 2 and len(svg) < 2_000_000
    assert shown(parsed(svg)) == keys_of(architecture)
    assert "e+" not in svg


def test_many_inputs_of_one_reader_are_one_box() -> None:
    inputs: dict[str, InputColumn] = {f"c{number}": NumberColumn(low=0, high=1) for number in range(1024)}
    svg = picture(network(wire.Encode(), wire.Linear(in_features=1024, out_features=3), inputs=inputs))
    assert len(boxes(parsed(svg))) == 4 and "1024 inputs" in words(parsed(svg))
    assert set(inputs) <= set(shown(parsed(svg)))


def test_the_most_tangled_network_is_drawn_in_seconds() -> None:
    layers: list[wire.Layer] = [square(name="n0")]
    for number in range(1, 300):
        reads = tuple(f"n{each}" for each in range(max(0, number - 64), number))
        layers.append(wire.Add(name=f"n{number}", reads=reads) if len(reads) > 1 else square(name=f"n{number}"))
    start = time.process_time()
    root = parsed(picture(network(*layers, LAST)))
    assert time.process_time() - start < 5 and len(boxes(root)) == 303


def test_a_network_whose_parts_do_not_fit_has_no_picture() -> None:
    with pytest.raises(ArchitectureRefused, match="set in_features=4"):
        picture(network(wire.Linear(in_features=2, out_features=3)))
