"""The help pages say what the schemas say, and show pictures; a translated page says what the English one says."""

import itertools
import re

import numpy as np
import pytest
from PIL import Image

from attune.benchmark import pictures
from attune.nodes import NODES
from attune.tests import locales

SCHEMAS = {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in NODES}
FILES = {path.name: path for path in pictures.FOLDER.glob("*.jpg")}
LINK = re.compile(r"!\[(.+?)\]\((.+?)\)")
LARGEST = 100 << 10  # bytes of a picture
LANGUAGES = ("zh",)  # those with pages of their own; where there is none, the frontend shows the English one


def page(name):
    return (pictures.FOLDER / f"{name}.md").read_text(encoding="utf-8")


def translated(name, language):
    return (pictures.FOLDER / name / f"{language}.md").read_text(encoding="utf-8")


def tables(text):
    """The cells of each table, without its head."""
    found = re.findall(r"(?:^\|.*\n)+", text, re.M)
    return [[[cell.strip() for cell in row.strip("|").split("|")] for row in one.splitlines()[2:]] for one in found]


def rows(text, heading):
    """The cells of the first table under a heading."""
    return tables(text.split(f"\n## {heading}\n", 1)[1].split("\n## ")[0])[0]


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


def numbers(text):
    return re.findall(r"(?<![A-Za-z\d.])\d+(?:\.\d+)?", text)


def labelled(cell, labels):
    """A first cell as a translated page has it: each name's label on the canvas, then the name itself."""
    return ", ".join(f"{labels[one]} `{one}`" for one in names(cell))


def test_every_node_has_a_page_in_each_of_these_languages_and_no_other():
    found = {(path.parent.name, path.name) for path in pictures.FOLDER.glob("*/*")}
    assert found == {(name, f"{language}.md") for name in SCHEMAS for language in LANGUAGES}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", SCHEMAS)
def test_a_translated_table_is_the_english_one_with_the_canvas_labels(name, language):
    schema, known = SCHEMAS[name], locales.load(language, "nodeDefs")[name]
    inputs = {one.id: known["inputs"][locales.key(one.id)]["name"] for one in schema.inputs}
    outputs = {one.display_name or one.id: known["outputs"][str(k)]["name"] for k, one in enumerate(schema.outputs)}
    combos = {one.id for one in schema.inputs if one.io_type == "COMBO"}
    ours, theirs = tables(page(name)), tables(translated(name, language))
    assert [[len(row) for row in table] for table in theirs] == [[len(row) for row in table] for table in ours]
    assert all(row[-1] for table in theirs for row in table), "a cell was left empty"
    if inputs:
        for (cell, default, _), (label, said, _) in zip(ours.pop(0), theirs.pop(0), strict=True):
            assert label == labelled(cell, inputs)
            assert numbers(said) == numbers(default), label
            assert said == default or cell not in combos, f"{label}: the values of a list are not translated"
    for (cell, *_), (label, *_) in zip(ours[0], theirs[0], strict=True):
        assert label == labelled(cell, outputs)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_default_is_translated_in_one_way(language):
    pairs = set()
    for name in (name for name in SCHEMAS if SCHEMAS[name].inputs):
        both = zip(tables(page(name))[0], tables(translated(name, language))[0], strict=True)
        pairs |= {(ours[1], theirs[1]) for ours, theirs in both}
    for side in zip(*pairs, strict=True):
        assert len(set(side)) == len(pairs), sorted(pairs)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", SCHEMAS)
def test_a_translated_page_has_the_same_parts_pictures_and_numbers(name, language):
    ours, theirs = page(name), translated(name, language)
    said = {node: texts["display_name"] for node, texts in locales.load(language, "nodeDefs").items()}
    assert theirs.startswith(f"# {said[name]}\n")
    assert re.findall(r"^#+ ", theirs, re.M) == re.findall(r"^#+ ", ours, re.M)
    # The frontend puts the same folder before a picture's name in every language.
    assert [file for _, file in LINK.findall(theirs)] == [file for _, file in LINK.findall(ours)]
    assert not any('"' in text for text, _ in LINK.findall(theirs)), "the frontend would end the picture's text there"
    assert set(numbers(theirs)) == set(numbers(ours))
    assert set(re.findall(r"\u201c(Attune .+?)\u201d", theirs)) <= set(said.values()), "it names a node by another name"


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_chinese_paragraph_is_one_line(name):
    """A line's end shows as a space, which Chinese does not have between its words."""
    for one, following in itertools.pairwise(translated(name, "zh").splitlines()):
        assert not one or not following or one.startswith("|") and following.startswith("|"), following
