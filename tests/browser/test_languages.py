"""The interface in other languages: what the nodes are called, their tooltips, and their help pages."""

import pytest

from attune.tests import locales

WORKFLOW, NODE = "Attune - Mutual self-attention", "AttuneMutualSelfAttention"  # its help page has a picture
WIDGET = "layer"
# Of every node of the pack: its title, the labels of its inputs and widgets by id, and those of its outputs by place.
LABELS = """() => Object.fromEntries(Object.keys(LiteGraph.registered_node_types).filter(id => id.startsWith("Attune"))
    .map(id => {
        const node = LiteGraph.createNode(id), named = {};
        for (const input of node.inputs) named[input.name] = input.localized_name;
        for (const widget of node.widgets ?? []) if (widget.name in named) named[widget.name] = widget.label;
        node.onRemoved?.();
        return [id, {title: node.title, inputs: named, outputs: node.outputs.map(o => o.localized_name)}];
    }))"""


@pytest.fixture
def spoken(comfy):
    """The interface with one of our nodes open, and in English again afterwards."""
    comfy.load(comfy.template(WORKFLOW), WORKFLOW)
    yield comfy
    comfy.speak("en")


@pytest.mark.parametrize("session", ["classic"], indirect=True)  # both renderers take their labels from these nodes
@pytest.mark.parametrize("language", locales.LANGUAGES)
def test_every_node_is_labelled_in_the_language(language, spoken):
    spoken.speak(language)
    texts = locales.load(language, "nodeDefs")
    labels = spoken.page.evaluate(LABELS)
    assert labels.keys() == texts.keys()
    for node, found in labels.items():
        said = texts[node]
        assert found["title"] == said["display_name"]
        assert {locales.key(k): v for k, v in found["inputs"].items()} == {
            k: v["name"] for k, v in said["inputs"].items()
        }
        assert found["outputs"] == [said["outputs"][str(k)]["name"] for k in range(len(said["outputs"]))]
    assert not spoken.complaints()


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_node_explains_itself_in_the_language(language, spoken):
    """Its tooltip and its help page; where a page is not translated, ComfyUI shows the English one."""
    spoken.speak(language)
    said = locales.load(language, "nodeDefs")[NODE]
    number = spoken.find(NODE)
    spoken.select(number)
    assert spoken.tooltip(number, WIDGET) == said["inputs"][WIDGET]["tooltip"]
    spoken.page.get_by_test_id("info-button").click()
    page = spoken.page.locator(".node-help-content")
    page.locator("h1").wait_for()
    picture = page.locator("img").first.element_handle()
    spoken.page.wait_for_function("img => img.complete && img.naturalWidth > 0", arg=picture)
    spoken.shot(f"help {language}")
    assert spoken.page.locator(".side-bar-panel").get_by_text(said["display_name"]).count()
    local = locales.ROOT / "web" / "docs" / NODE / f"{language}.md"
    english = locales.ROOT / "web" / "docs" / f"{NODE}.md"
    heading = (local if local.exists() else english).read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    assert page.locator("h1").inner_text() == heading
    assert not spoken.complaints()
