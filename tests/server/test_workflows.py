"""Every shipped workflow is the same in both of its forms, and runs on the real server as it is."""

import itertools
import json

import numpy as np
import pytest
from scipy import ndimage

from attune.demo import checker, scenes
from attune.tests import host
from attune.tests.server import workflow

NOTES = {"Note", "MarkdownNote"}  # of the canvas; the server does not know them
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
REAL = "Attune - Word swap on a real image"
QUICK_SIDE = 256
XL_SWAP, XL_FPE = "Attune - SDXL word swap on a real image", "Attune - SDXL free prompt editing"
SAVE, LOAD = "Attune - Save and reuse a trajectory", "Attune - Edit a saved trajectory"
SHEETS = {
    "contact sheet", "attention maps", "inversion report", "maps layer by layer", "maps step by step", "self-attention",
    "clusters", "compare", "masks step by step", "parts of the picture", "learning report",
    "learned and original words",
}  # fmt: skip
# What is painted by hand, and an adapter of SD 1.5's widths, are in the demo world only; so these run there alone.
FUSION = {name for name in workflow.NAMES if "Redraw" in name or "turns" in name}
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
    "Attune - Proximal guidance": "reconstruction, without proximal guidance, word swap, contact sheet",
    "Attune - Refine a prompt": "pinned source, refined, without attention control, contact sheet",
    "Attune - Re-weight a word": "a word of the caption raised, new word raised, new word lowered, contact sheet",
    "Attune - Local blend": "pinned source, word swap, with local blend, blend mask, contact sheet",
    "Attune - Preserve an object": "object preserved, every word kept, without attention control, contact sheet",
    "Attune - Free prompt editing": "pinned source, free prompt editing, without attention control, contact sheet",
    XL_SWAP: "pinned source, word swap, without attention control, contact sheet",
    XL_FPE: "pinned source, free prompt editing, without attention control, contact sheet",
    "Attune - Several edits of one picture": "another colour, another background, a third one, contact sheet",
    "Attune - Mutual self-attention": (
        "mask of a word, mutual self-attention, with masks, without attention control, contact sheet"
    ),
    "Attune - Replace an object": "mask of a word, object replaced, without attention control, contact sheet",
    "Attune - Remove an object": "mask of a word, object removed, without attention control, contact sheet",
    "Attune - Change the background": "mask of a word, background changed, without attention control, contact sheet",
    "Attune - Refine a mask while sampling": (
        "mask of a word, mask refined, mask as given, masks step by step, refined mask, contact sheet"
    ),
    "Attune - Choose your method": (
        "mask of a word, prompt swap and local blend, free prompt editing, mutual self-attention, context preserving, "
        "without attention control, contact sheet"
    ),
    "Attune - Prompts by region": "prompts by region, one prompt, contact sheet",
    "Attune - Seeing attention": (
        "maps layer by layer, maps step by step, mask of a word, self-attention, clusters, edit inside the mask, "
        "compare"
    ),
    "Attune - Dynamic prompt learning": (
        "parts of the picture, learning report, drawn again, with learned words, with the words as they were, "
        "contact sheet"
    ),
    "Attune - Learned and original words": (
        "parts of the picture, learning report, learned and original words, new picture with the saved word, "
        "new picture with the word as it was, contact sheet"
    ),
    "Attune - Record and edit a generated picture": "source, word swap, without attention control, contact sheet",
    "Attune - Start an edit part of the way": "reconstruction, edit, contact sheet",
    "Attune - Null-text inversion": "reconstruction, without null-text, word swap, contact sheet, inversion report",
    "Attune - Embedding control": "reconstruction, embedding control, without embedding control, contact sheet",
    "Attune - Redraw from a sketch": "sketch, intermediate, redrawn, contact sheet",
    "Attune - Redraw without a sketch": (
        "mask of a word, redrawn in the mask, redrawn everywhere, without attention control, contact sheet"
    ),
    "Attune - Edit in three turns": (
        "source, sketch of turn 1, intermediate of turn 1, after turn 1, sketch of turn 2, intermediate of turn 2, "
        "after turn 2, after turn 3, contact sheet"
    ),
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


def quick(prompt: dict) -> dict:
    """A smaller picture and fewer steps and updates than are shipped: the minutes that they take show no more."""
    return workflow.resized(prompt, QUICK_SIDE, steps=4, updates=2)


def run_and_look(name: str, server: host.Server):
    change = (lambda prompt: prompt) if name == workflow.DEMO else quick
    prepare(name, server, change)
    pictures = pictures_of(change(workflow.load(name)), server)
    assert set(pictures) == set(TITLES[name].split(", "))
    # The stand-in for Stable Diffusion hardly hears words; what the pictures show is looked at in the demo world.
    side, least = (workflow.SIDE, 1) if name == workflow.DEMO else (QUICK_SIDE, 0)
    for title, picture in pictures.items():
        assert title in BLENDED or picture.std() > 2, f"{title} is one flat colour"
        assert title in SHEETS or picture.shape == (side, side, 3), title
    for one, other in itertools.combinations(set(pictures) - SHEETS - BLENDED, 2):
        apart = abs(pictures[one].astype(int) - pictures[other]).mean()
        assert apart > least, f"{one} and {other} are the same picture"


@pytest.mark.hosts
def test_the_demo_runs_as_it_is_shipped(every_server):
    run_and_look(workflow.DEMO, every_server)


@pytest.mark.parametrize("name", [name for name in TITLES if name not in {workflow.DEMO, *FUSION}])
def test_it_runs(name, server):
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


def is_green(picture):
    return picture[..., 1] - picture[..., ::2].max(-1) > 40


def learned(pictures, source):
    """Of two things alike each takes its own new colour, which without learning both take of one word."""
    circle, square = (one.mask for one in sorted(checker.look(source / 255)[1], key=lambda one: one.shape))
    new, plain = pictures["with learned words"], pictures["with the words as they were"]
    assert min(overlap(is_yellow(new), circle), overlap(is_green(new), square)) > 0.8
    assert overlap(is_yellow(plain), circle) < 0.5 and overlap(is_green(plain), square) < 0.2
    again = pictures["drawn again"]
    assert overlap(is_red(again), circle | square) > 0.85 and psnr(again, source) > 23


def saved_word(pictures, _):
    new, plain = (pictures[f"new picture with the {which}"] for which in ("saved word", "word as it was"))
    for picture in (new, plain):
        assert checker.look(picture / 255)[0] == "white" and is_red(picture).mean() > 0.03
    assert abs(new - plain).mean() > 1, "it is the word as it was"


def sees(picture, thing):
    return thing in {f"{found.color} {found.shape}" for found in checker.look(picture / 255)[1]}


def prompt_edited(pictures, source):
    """The new colour stands where the old one stood; plain sampling moves it."""
    swapped(pictures["free prompt editing"], source)
    circle = is_red(source)
    good, plain = (
        overlap(is_yellow(pictures[title]), circle) for title in ("free prompt editing", "without attention control")
    )
    assert good > 0.75 and plain < 0.3, f"{good:.2f}, {plain:.2f} without attention control"


def same_thing(pictures, source):
    """The prompt asks for a purple star: the star comes, the purple gives way to the source's red."""

    def red(title):
        red, _, blue = pictures[title][is_red(source)].mean(0)
        return red - blue

    plain, whole, masked = (red(t) for t in ("without attention control", "mutual self-attention", "with masks"))
    assert sees(pictures["without attention control"], "purple star")
    for title in ("mutual self-attention", "with masks"):
        assert sees(pictures[title], "red star") and sees(pictures[title], "blue square")
    assert masked > whole + 10 > plain + 50, f"{masked:.0f}, {whole:.0f}, {plain:.0f} without attention control"


def replaced(pictures, source):
    new, plain = pictures["object replaced"], pictures["without attention control"]
    assert sees(new, "yellow star") and not is_red(new).any()
    assert overlap(is_blue(new), is_blue(source)) > 0.9 and not is_blue(plain).any()
    around = ~ndimage.binary_dilation(is_red(source), iterations=20)
    good, other = (psnr(p[around], source[around]) for p in (new, plain))
    assert good > max(24, other + 8), f"{good:.1f} dB, {other:.1f} dB without attention control"


def removed(pictures, source):
    """What was behind the object is there: the background, to within the autoencoder's faults and its light."""
    circle, square = is_red(source), is_blue(source)
    new, plain = pictures["object removed"], pictures["without attention control"]
    around = ndimage.binary_dilation(circle, iterations=16) & ~ndimage.binary_dilation(circle, iterations=4) & ~square
    background = np.median(source[around], 0)
    assert abs(source[circle] - background).mean() > 50
    assert abs(new[circle] - background).mean() < 12, "the object is still there"
    assert overlap(is_blue(new), square) > 0.9 > overlap(is_blue(plain), square) + 0.3


def new_background(pictures, source):
    """The prompt names no circle, so without attention control there is none."""
    new, plain = pictures["background changed"], pictures["without attention control"]
    assert checker.look(new / 255)[0] == checker.look(plain / 255)[0] == "green"
    assert overlap(is_red(new), is_red(source)) > 0.7 and not is_red(plain).any()


def found_anew(pictures, source):
    """The refined mask lies on the new object, and is smaller than the loose one that the edit began with."""
    new, mask = pictures["mask refined"], pictures["refined mask"][..., 0] > 127
    star = is_yellow(new)
    assert sees(new, "yellow star")
    assert mask[star].mean() > 0.9 and mask.mean() < 0.15
    assert mask.mean() < 6 * star.mean()
    lies, goes = (ndimage.center_of_mass(where) for where in (pictures["mask of a word"][..., 0] > 127, mask))
    true = ndimage.center_of_mass(star)
    assert np.hypot(*np.subtract(goes, true)) < np.hypot(*np.subtract(lies, true)) / 2, "it is where the old one was"
    assert overlap(is_blue(new), is_blue(source)) > 0.9
    assert abs(new - pictures["mask as given"]).mean() > 1, "the mask was found and not used"


def compared(pictures, source):
    """Each method does its own: the swap is exact off the blend, free prompt editing keeps the layout, mutual
    self-attention goes by the prompt's layout with the source's looks, context preserving goes by the mask."""
    swap, free, mutual, kept, plain = (
        pictures[title]
        for title in (
            "prompt swap and local blend", "free prompt editing", "mutual self-attention", "context preserving",
            "without attention control",
        )
    )  # fmt: skip
    circle, square = is_red(source), is_blue(source)
    for picture in (swap, free, kept, plain):
        assert sees(picture, "yellow heart")
    assert min(overlap(is_yellow(picture), circle) for picture in (swap, free)) > 0.6
    assert not is_yellow(plain)[circle].any(), "it stays in place without attention control, too"
    around = ~ndimage.binary_dilation(circle, iterations=20)
    exact, loose, none = (psnr(picture[around], source[around]) for picture in (swap, free, plain))
    assert exact > 30 and exact > loose + 5 and loose > none + 5, f"{exact:.1f}, {loose:.1f}, {none:.1f} dB"
    thing = is_yellow(plain)
    assert mutual[thing, 1].mean() < plain[thing, 1].mean() - 80, "it has not taken the source's looks"
    assert (mutual[..., 0] - mutual[..., 2])[thing].mean() > 80, "it is not where the prompt draws it"
    place = ndimage.binary_dilation(pictures["mask of a word"][..., 0] > 127, iterations=16)
    assert place[is_yellow(kept)].mean() > 0.6 and not place[thing].any(), "it is not in the mask"
    assert overlap(is_yellow(kept), circle) < 0.5, "it keeps the old outline"
    assert overlap(is_blue(kept), square) > 0.85


def by_region(pictures, _):
    """Each thing in its box of the workflow; the plain prompt puts them elsewhere from the same seed."""
    left, right = np.zeros((2, workflow.SIDE, workflow.SIDE), bool)
    left[32:96, 8:56], right[32:96, 72:120] = True, True

    def in_place(title):
        picture = pictures[title]
        red, yellow = is_red(picture), is_yellow(picture)
        assert red.any() and yellow.any(), title
        return left[red].mean(), right[yellow].mean()

    assert min(in_place("prompts by region")) > 0.8 and max(in_place("one prompt")) < 0.2
    assert checker.look(pictures["prompts by region"] / 255)[0] == "gray"


# -- in a mask, from a sketch ------------------------------------------------------------------------------------------


def true_edit(caption):
    """The scene perfectly edited, the things in it, and the pixels that may change, or none of them."""
    scene = scenes.scene_from_caption(workflow.SOURCE, np.random.default_rng(workflow.SEED))
    edited = scenes.edit_by_caption(scene, caption)
    place = ndimage.maximum_filter(scenes.changed(scene, edited), 2 * workflow.GROW + 1) > 0
    return scenes.render(edited, workflow.SIDE)[1] > 0.5, place


def redrawn(pictures, source):
    """The star stands where the sketch has it, and the rest is the source as the autoencoder gives it back."""
    (star, square), place = true_edit(workflow.STAR)
    edit, sketch = pictures["redrawn"], pictures["sketch"][..., 0] > 127
    assert sketch[ndimage.binary_dilation(star, iterations=2) & ~ndimage.binary_erosion(star, iterations=2)].any()
    assert not sketch[ndimage.binary_erosion(star, iterations=4)].any(), "the circle's outline was not wiped out"
    assert sees(edit, "red star") and sees(edit, "blue square")
    assert overlap(is_red(edit), star) > max(0.6, overlap(is_red(source), star) + 0.1)
    around = ~ndimage.binary_dilation(place, iterations=8)
    assert overlap(is_blue(edit), square) > 0.85 and psnr(edit[around], source[around]) > 21


def redrawn_by_source(pictures, source):
    """The prompt names the circle alone: only the mask keeps the square."""
    inside, everywhere, plain = (
        pictures[title] for title in ("redrawn in the mask", "redrawn everywhere", "without attention control")
    )
    circle, square = is_red(source), is_blue(source)
    assert overlap(is_yellow(inside), circle) > 0.55 and not is_red(inside).any()
    assert overlap(is_blue(inside), square) > 0.85
    for other in (everywhere, plain):
        assert overlap(is_blue(other), square) < 0.2
    assert abs(everywhere - plain).mean() > 0.5, "the source is not read"


def in_turns(pictures, source):
    """A star, a heart, and the star in yellow; what no mask ever touched is the first picture, to the last bit."""
    one, two, three = (pictures[f"after turn {n}"] for n in (1, 2, 3))
    (star, _), first = true_edit(workflow.STAR)
    (_, heart), second = true_edit(workflow.HEART)
    assert (one == source)[~first].all() and (one != source)[first].any()
    assert (two == source)[~(first | second)].all() and (two != one)[second].any()
    assert (three == source)[~(first | second)].all() and (three != two)[first].any()
    assert sees(one, "red star") and sees(one, "blue square")
    assert overlap(is_red(one), star) > 0.6 and overlap(is_red(two), star) > 0.6
    assert sees(two, "blue heart") and overlap(is_blue(two), heart) > 0.8 and overlap(is_blue(three), heart) > 0.8
    assert sees(three, "yellow star") and is_yellow(three)[star].mean() > 0.4 and not is_red(three).any()


def edited_three_times(pictures, source):
    """Each prompt alone is seen in its picture, whoever was the first to read the source."""
    circle, square = is_red(source), is_blue(source)
    colour, ground, third = (pictures[title] for title in ("another colour", "another background", "a third one"))
    for picture in pictures.values():
        assert picture.shape != source.shape or overlap(is_blue(picture), square) > 0.8
    assert is_yellow(colour)[circle].mean() > 0.8 and not is_red(colour).any()
    for picture, wanted in ((ground, (0, 160, 30)), (third, (240, 240, 240))):
        assert overlap(is_red(picture), circle) > 0.8
        assert abs(np.median(picture[~circle & ~square], 0) - wanted).max() < 60


SHOWN = {
    "Attune - Redraw from a sketch": redrawn,
    "Attune - Redraw without a sketch": redrawn_by_source,
    "Attune - Edit in three turns": in_turns,
    "Attune - Dynamic prompt learning": learned,
    "Attune - Learned and original words": saved_word,
    "Attune - Free prompt editing": prompt_edited,
    XL_FPE: prompt_edited,
    "Attune - Several edits of one picture": edited_three_times,
    "Attune - Mutual self-attention": same_thing,
    "Attune - Replace an object": replaced,
    "Attune - Remove an object": removed,
    "Attune - Change the background": new_background,
    "Attune - Refine a mask while sampling": found_anew,
    "Attune - Choose your method": compared,
    "Attune - Prompts by region": by_region,
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
    prompt = workflow.load(name)
    scene = workflow.scene(workflow.caption_of(prompt))
    pictures = pictures_of(workflow.in_the_demo_world(prompt), server)
    assert set(pictures) == set(TITLES[name].split(", "))
    pictures = {title: picture.astype(float) for title, picture in pictures.items()}
    source = pictures.get("source", scene)
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
