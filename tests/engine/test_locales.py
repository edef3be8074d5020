"""Every text of every node is there in each language, and none of what is no longer there."""

import pytest

from attune.nodes import NODES
from attune.tests import locales

TRANSLATED = locales.LANGUAGES[1:]
FILES = {"nodeDefs": locales.english(NODES), "main": locales.MAIN}
NAMES = {"name", "display_name"}


def test_every_language_has_its_folder_and_no_other():
    assert {path.name for path in locales.FOLDER.iterdir()} == set(locales.LANGUAGES)
    for language in locales.LANGUAGES:
        assert {path.stem for path in (locales.FOLDER / language).iterdir()} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_the_english_texts_are_those_of_the_nodes(name):
    assert locales.load("en", name) == FILES[name], "`python3 dev.py locales` writes them anew"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("language", TRANSLATED)
def test_a_language_has_the_same_keys(language, name):
    ours, theirs = (locales.paths(texts) for texts in (FILES[name], locales.load(language, name)))
    assert theirs.keys() == ours.keys()
    assert all(isinstance(text, str) and text.strip() == text != "" for text in theirs.values())


@pytest.mark.parametrize("language", TRANSLATED)
def test_it_is_translated(language):
    """Sentences differ from the English ones, and what a text points to is still named in it."""
    ours, theirs = (locales.paths(texts) for texts in (FILES["nodeDefs"], locales.load(language, "nodeDefs")))
    for path, text in ours.items():
        if path[-1] not in NAMES:
            assert theirs[path] != text, ".".join(path)
        for quoted in text.split('"')[1::2]:
            assert quoted in theirs[path], f"{'.'.join(path)} no longer says {quoted}"


@pytest.mark.parametrize("language", locales.LANGUAGES)
def test_nothing_is_left_out_of_a_text_on_the_way_to_the_screen(language):
    """The frontend fills in what stands between bare braces, and cuts at a bar."""
    for name in FILES:
        for path, text in locales.paths(locales.load(language, name)).items():
            assert locales.escaped(locales.shown(text)) == text, ".".join(path)


@pytest.mark.parametrize("language", locales.LANGUAGES)
def test_the_names_in_one_node_differ(language):
    """Two inputs under one name cannot be told apart on the canvas."""
    for node, texts in locales.load(language, "nodeDefs").items():
        for group in ("inputs", "outputs"):
            names = [entry["name"] for entry in texts[group].values()]
            assert len(set(names)) == len(names), (node, group, names)
