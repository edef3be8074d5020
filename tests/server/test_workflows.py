"""Every shipped workflow is the same in both of its forms, and runs on the real server as it is."""

import itertools
import json

import numpy as np
import pytest
from scipy import ndimage

from attune.demo import checker
from attune.tests import host
from attune.tests.server import workflow

NOTES = {"Note", "MarkdownNote"}  # of the canvas; the server does not know them
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
REAL = "Attune - Word swap on a real image"
SAVE, LOAD = "Attune - Save and reuse a trajectory", "Attune - Edit a saved trajectory"
SHEETS = {
    "contact sheet", "attention maps", "inversion report", "maps layer by layer", "maps step by step", "self-attention",
    "clusters", "compare",
}  # fmt: skip
BLENDED = {"blend mask", "with local blend"}  # in a random network words look everywhere, so there the mask is white
BACK = {"reconstruction", "pinned source"}  # should look like the source
PLAIN = {"without null-text", "with an empty negative", "without pins"}  # what guidance does to it otherwise
# The pictures that each workflow saves. They run in this order: what two in a row have in common is computed once.
TITLES = {
    workflow.DEMO: "source, reconstruction, word swap, without attention control, attention maps, contact sheet",
    REAL: "reconstruction, word swap",
    "Attune - Direct inversion": "pinned source, without pins, word swap, contact sheet, inversion report",
    "Attune - Negative-prompt inversion": (
        "reconstruction, with an empty negative, word swap, contact sheet, inversion report"
    ),
    "Attune - Refine a prompt": "pinned source, refined, without attention control, contact sheet",
    "Attune - Re-weight a word": "a word of the caption raised, new word raised, new word lowered, contact sheet",
    "Attune - Local blend": "pinned source, word swap, with local blend, blend mask, contact sheet",
    "Attune - Preserve an object": "object preserved, every word kept, without attention control, contact sheet",
    "Attune - Seeing attention": (
        "maps layer by layer, maps step by step, mask of a word, self-attention, clusters, edit inside the mask, "
        "compare"
    ),
    "Attune - Record and edit a generated picture": "source, word swap, without attention control, contact sheet",
    "Attune - Start an edit part of the way": "reconstruction, edit, contact sheet",
    "Attune - Null-text inversion": "reconstruction, without null-text, word swap, contact sheet, inversion report",
    "Attune - Embedding control": "reconstruction, embedding control, without embedding control, contact sheet",
    SAVE: "reconstruction",
    LOAD: "reconstruction, word swap, contact sheet",
}


def slots(definition: dict):
    """(name, type, settings, choices) of every input of a node, in the order that the canvas uses."""
    for group in ("required", "optional"):
        for name in definition["input_order"].get(group, []):
            kind, *rest = definition["input"][group][name]
            settings = rest[0] if rest else {}
            choices = kind if isinstance(kind, list) else settings.get("options")
            yield name, "COMBO" if isinstance(kind, list) else kind, settings, choices


def exported(ui: dict, info: dict) -> dict:
    """What the canvas exports as API form. Written for plain workflows: no subgraph, no node switched off."""
    links = {link[0]: link for link in ui["links"]}
    nodes = {node["id"]: node for node in ui["nodes"] if node["type"] not in NOTES}
    prompt, used = {}, []
    for number, node in nodes.items():
        definition, values, inputs, kinds = info[node["type"]], iter(node["widgets_values"]), {}, {}
        for name, kind, settings, choices in slots(definition):
            kinds[name] = kind
            if kind in WIDGETS:
                inputs[name] = next(values)
                # A file of the user's own is on the list only where it has been written.
                listed = choices is None or node["type"] == "AttuneLoadTrajectory" or inputs[name] in choices
                assert listed, (node["type"], name, inputs[name])
                if settings.get("control_after_generate"):
                    assert next(values) == "fixed", f"{node['type']} would change its seed after every run"
                if settings.get("image_upload"):
                    assert next(values) == "image"
        assert not list(values), f"{node['type']} {number} has more values than widgets"
        for slot, socket in enumerate(node["inputs"]):
            if socket["link"] is not None:
                used.append(socket["link"])
                _, source, output, *target, kind = links[socket["link"]]
                assert target == [number, slot]
                assert kind == info[nodes[source]["type"]]["output"][output]
                assert kinds[socket["name"]] in (kind, "*")
                assert socket["link"] in nodes[source]["outputs"][output]["links"]
                inputs[socket["name"]] = [str(source), output]
        assert [socket["name"] for socket in node["outputs"]] == definition["output_name"]
        assert node["mode"] == 0
        title = node.get("title") or definition["display_name"] or node["type"]
        prompt[str(number)] = {"inputs": inputs, "class_type": node["type"], "_meta": {"title": title}}
    assert sorted(used) == sorted(links)
    return prompt


def test_every_workflow_is_there_in_both_forms():
    assert set(workflow.NAMES) == set(TITLES)
    assert {path.stem for path in (workflow.FOLDER / "api").glob("*.json")} == set(workflow.NAMES)
    assert all(name.startswith("Attune - ") for name in workflow.NAMES)


@pytest.mark.hosts
@pytest.mark.parametrize("name", workflow.NAMES)
def test_both_forms_say_the_same(name, every_server):
    info = every_server.object_info()
    ui, api = json.loads((workflow.FOLDER / f"{name}.json").read_text(encoding="utf-8")), workflow.load(name)
    unknown = {node["type"] for node in ui["nodes"]} - NOTES - set(info)
    assert not unknown, f"ComfyUI with this pack has no {', '.join(unknown)}"
    assert exported(ui, info) == api


@pytest.mark.parametrize("name", workflow.NAMES)
def test_a_missing_pack_can_be_looked_up(name, server):
    info = server.object_info()
    nodes = json.loads((workflow.FOLDER / f"{name}.json").read_text(encoding="utf-8"))["nodes"]
    ours = [n for n in nodes if n["type"] in info and info[n["type"]]["python_module"] == "custom_nodes.attune"]
    project = (host.ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    assert ours
    assert all(f'name = "{node["properties"]["cnr_id"]}"' in project for node in ours)


def pictures_of(prompt: dict, server: host.Server) -> dict:
    images = workflow.saved(prompt, server.run(prompt))
    return {title: workflow.pixels(server, image) for title, image in images.items()}


def prepare(name: str, server: host.Server, change=lambda prompt: prompt):
    """Run the workflow whose file this one reads. Costs next to nothing where it has just been run."""
    if name == LOAD:
        server.run(change(workflow.load(SAVE)))


def run_and_look(name: str, server: host.Server):
    prepare(name, server)
    pictures = pictures_of(workflow.load(name), server)
    assert set(pictures) == set(TITLES[name].split(", "))
    # The stand-in for Stable Diffusion hardly hears words; what the pictures show is looked at in the demo world.
    side, least = (workflow.SIDE, 1) if name == workflow.DEMO else (512, 0)
    for title, picture in pictures.items():
        assert title in BLENDED or picture.std() > 2, f"{title} is one flat colour"
        assert title in SHEETS or picture.shape == (side, side, 3), title
    for one, other in itertools.combinations(set(pictures) - SHEETS - BLENDED, 2):
        apart = abs(pictures[one].astype(int) - pictures[other]).mean()
        assert apart > least, f"{one} and {other} are the same picture"


@pytest.mark.hosts
def test_the_demo_runs_as_it_is_shipped(every_server):
    run_and_look(workflow.DEMO, every_server)


@pytest.mark.parametrize("name", [name for name in TITLES if name != workflow.DEMO])
def test_it_runs_as_it_is_shipped(name, server):
    run_and_look(name, server)


# -- what the pictures show, in the demo world ------------------------------------------------------------------------


def psnr(ours: np.ndarray, true: np.ndarray) -> float:
    return 10 * float(np.log10(255**2 / np.square(ours - true).mean()))


def is_red(picture):
    return picture[..., 0] - picture[..., 1:].max(-1) > 80


def is_yellow(picture):
    return picture[..., :2].min(-1) - picture[..., 2] > 80


def is_blue(picture):
    return picture[..., 2] - picture[..., :2].max(-1) > 80


def overlap(one, other):
    """Of two masks, the share of what either covers that both cover."""
    return (one & other).sum() / (one | other).sum()


def swapped(picture, source):
    circle = is_red(source)
    rest = ~circle & ~is_yellow(picture)
    assert is_yellow(picture)[circle].mean() > 0.8, "the circle is not yellow"
    assert is_yellow(picture)[~circle].mean() < 0.03, "something else is yellow"
    assert psnr(picture[rest], source[rest]) > 21, "the rest has changed"


def refined(pictures, source):
    circle, picture = is_red(source), pictures["refined"]
    stripes = picture.min(-1) > 120
    assert 0.15 < stripes[circle].mean() < 0.6, "the circle has no light stripes"
    rest = ~ndimage.binary_dilation(circle, iterations=4)
    good, plain = (psnr(pictures[title][rest], source[rest]) for title in ("refined", "without attention control"))
    assert good > max(23, plain + 3), f"the rest has changed: {good:.1f} dB, {plain:.1f} dB without attention control"


def reweighted(pictures, source):
    circle, sky = is_red(source), ~is_red(source) & ~is_blue(source)

    def red(picture):
        return (picture[..., 0] - picture[..., 1:].max(-1))[circle].mean()

    def green(title):
        return (pictures[title][..., 1] - pictures[title][..., 0])[sky].mean()

    assert red(pictures["a word of the caption raised"]) > red(source) + 15
    assert green("new word raised") > green("new word lowered") + 40


def blended(pictures, source):
    with_blend, without, pinned = (pictures[title] for title in ("with local blend", "word swap", "pinned source"))
    swapped(with_blend, source)
    mask = pictures["blend mask"][..., 0] > 127
    assert mask[is_red(source)].all() and mask.mean() < 0.3
    outside = ~ndimage.binary_dilation(mask, iterations=16)  # of the autoencoder's reach
    assert abs(with_blend - pinned)[outside].max() <= 8 and psnr(with_blend[outside], pinned[outside]) > 50
    assert psnr(without[outside], pinned[outside]) < 30
    assert psnr(with_blend[~mask], source[~mask]) > psnr(without[~mask], source[~mask]) + 5


def preserved(pictures, source):
    circle, square = is_red(source), is_blue(source)
    kept, every, plain = (
        pictures[title] for title in ("object preserved", "every word kept", "without attention control")
    )
    assert checker.look(kept / 255)[0] == "green"
    assert overlap(is_red(kept), circle) > max(0.8, overlap(is_red(plain), circle) + 0.1)
    assert overlap(is_blue(kept), square) < overlap(is_blue(every), square) - 0.1, "the rest was kept, too"


def controlled(pictures, source):
    """The background turns white; the rest holds better than under the whole new caption."""
    ours, plain = pictures["embedding control"], pictures["without embedding control"]
    assert checker.look(ours / 255)[0] == "white"
    for seen in (is_red, is_blue):
        good, other = (overlap(seen(p), seen(source)) for p in (ours, plain))
        assert good > max(0.6, other + 0.05), f"{good:.2f}, {other:.2f} without embedding control"


def seen(pictures, source):
    circle, mask = is_red(source), pictures["mask of a word"][..., 0] > 127
    assert mask[circle].mean() > 0.9, "the mask misses the circle"
    assert mask.mean() < 3 * circle.mean(), "the mask covers more than the circle"
    swapped(pictures["edit inside the mask"], source)
    outside = ~ndimage.binary_dilation(mask, iterations=16)
    assert psnr(pictures["edit inside the mask"][outside], source[outside]) > 30


SHOWN = {
    "Attune - Refine a prompt": refined,
    "Attune - Re-weight a word": reweighted,
    "Attune - Local blend": blended,
    "Attune - Preserve an object": preserved,
    "Attune - Embedding control": controlled,
    "Attune - Seeing attention": seen,
}


@pytest.mark.parametrize("name", [name for name in TITLES if name not in (workflow.DEMO, REAL)])
def test_it_does_what_it_says_in_the_demo_world(name, server):
    prepare(name, server, workflow.in_the_demo_world)
    pictures = pictures_of(workflow.in_the_demo_world(workflow.load(name)), server)
    pictures = {title: picture.astype(float) for title, picture in pictures.items()}
    source = pictures.get("source", workflow.scene())
    for title in BACK & set(pictures):
        good = psnr(pictures[title], source)
        assert good > 29, f"{title}: {good:.1f} dB"
        for plain in PLAIN & set(pictures):
            assert psnr(pictures[plain], source) < good - 4, f"{plain} is as good as {title}"
    if "word swap" in pictures:
        swapped(pictures["word swap"], source)
    if "edit" in pictures:
        assert is_yellow(pictures["edit"]).sum() > is_red(source).sum() / 2
        assert not is_red(pictures["edit"]).any()
    if name in SHOWN:
        SHOWN[name](pictures, source)
