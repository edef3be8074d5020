"""The help pages say what the schemas say, and show pictures."""

import re

import numpy as np
import pytest
from PIL import Image

from attune.benchmark import pictures
from attune.nodes import NODES

SCHEMAS = {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in NODES}
FILES = {path.name: path for path in pictures.FOLDER.glob("*.jpg")}
LINK = re.compile(r"!\[(.+?)\]\((.+?)\)")
LARGEST = 100 << 10  # bytes of a picture


def page(name):
    return (pictures.FOLDER / f"{name}.md").read_text(encoding="utf-8")


def rows(text, heading):
    """The cells of the first table under a heading, without its head."""
    lines = text.split(f"\n## {heading}\n", 1)[1].split("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]


def names(cell):
    return [name.strip() for name in cell.split(",")]


def number(value):
    return np.format_float_positional(value, trim="-")


def told(inputs):
    """What a row says of the defaults of its inputs: a value each and, of numbers, their common range, where there is
    one to speak of; nothing of texts, whose defaults are examples, and of sockets, or that they are optional."""
    values, ranges = [], set()
    for one in inputs:
        default = getattr(one, "default", None)
        if isinstance(default, bool):
            values.append("on" if default else "off")
        elif isinstance(default, (int, float)):
            values.append(number(default))
            ranges.add(f" ({number(one.min)} to {number(one.max)})" if one.max < 1 << 20 else "")
        elif one.io_type == "COMBO":
            values.append(default or "")
        else:
            values.append("optional" if one.optional else "")
    assert len(ranges) < 2, f"{[one.id for one in inputs]} have ranges of their own and need rows of their own"
    return ", ".join(values if ranges else dict.fromkeys(values)) + "".join(ranges)


def test_every_node_has_a_page_and_no_other():
    assert {path.stem for path in pictures.FOLDER.glob("*.md")} == set(SCHEMAS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_tables_are_the_schemas(name):
    text, schema = page(name), SCHEMAS[name]
    inputs = {one.id: one for one in schema.inputs}
    table = rows(text, "Inputs") if inputs else []
    assert sorted(one for row in table for one in names(row[0])) == sorted(inputs)
    for cell, default, what in table:
        assert default == told([inputs[one] for one in names(cell)]), cell
        assert what
    outputs = [one.display_name or one.id for one in schema.outputs]
    assert [one for row in rows(text, "Outputs") for one in names(row[0])] == outputs


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_page_has_its_parts(name):
    text = page(name)
    assert text.startswith(f"# {SCHEMAS[name].display_name}\n")
    assert {"When to use it", "Limits"} <= set(re.findall(r"^## (.+)$", text, re.M))
    paper = re.search(r"^(Papers?: .*\b(19|20)\d\d\b|No paper: )", text, re.M | re.S)
    assert paper, "it names no paper with its year, and does not say that there is none"
    said, file = LINK.search(text.split("\n## ")[0]).groups()
    assert file == f"{name}.jpg" and len(said) > 30, "the picture does not stand below the summary"


def test_every_picture_is_there_and_is_used():
    used = {file for name in SCHEMAS for _, file in LINK.findall(page(name))}
    assert used == set(FILES)
    assert {f"{name}.jpg" for name in pictures.PAGES} <= used


@pytest.mark.parametrize("name", FILES)
def test_a_picture_is_a_small_jpeg(name):
    assert FILES[name].stat().st_size < LARGEST
    with Image.open(FILES[name]) as picture:
        assert picture.format == "JPEG" and picture.width >= 500
        assert np.asarray(picture).std() > 10, "it is one flat colour"
