"""Masks, words and layers that do not fit, over HTTP: each is one sentence, and the next run is as if nothing was."""

import copy
import functools

import numpy as np
import pytest

from attune.tests import host
from attune.tests.server import workflow

KEEP, MUTUAL, FPE = "AttuneContextPreserving", "AttuneMutualSelfAttention", "AttuneFreePromptEditing"
STRATEGY, REFINEMENT, REGIONS = "AttuneMaskStrategy", "AttuneMaskRefinement", "AttuneRegionPrompts"
SAMPLER = "SamplerCustom"
REPLACE, MASKED = ("Attune - Replace an object", "object replaced"), ("Attune - Mutual self-attention", "with masks")
LAYOUT = "Attune - Free prompt editing", "free prompt editing"
REFINED = "Attune - Refine a mask while sampling", "mask refined"
BY_REGION = "Attune - Prompts by region", "prompts by region"
BLENDED, BLEND = ("Attune - Local blend", "with local blend"), "AttuneLocalBlend"
STEPS = 8


def drawing(name, title):
    """A workflow in the demo world, cut down to one of its pictures and to few steps."""
    prompt = workflow.cut(workflow.in_the_demo_world(workflow.load(name)), title)
    for node in prompt.values():
        if isinstance(node["inputs"].get("steps"), int):  # others choose among steps
            node["inputs"]["steps"] = STEPS
    return prompt


def inputs(prompt, kind):
    return prompt[workflow.find(prompt, kind)]["inputs"]


def solid(prompt, value, box=None):
    """A socket with a mask of one value, or black with a box (x, y, width, height) of that value, of 128 pixels."""

    def add(kind, **values):
        number = str(900 + len(prompt))
        prompt[number] = {"class_type": kind, "inputs": values, "_meta": {"title": f"{kind} {number}"}}
        return [number, 0]

    if box is None:
        return add("SolidMask", value=value, width=128, height=128)
    x, y, width, height = box
    part, black = add("SolidMask", value=value, width=width, height=height), solid(prompt, 0.0)
    return add("MaskComposite", destination=black, source=part, x=x, y=y, operation="add")


@pytest.fixture(scope="module")
def draw(server):
    def draw(prompt, title):
        return workflow.pixels(server, workflow.saved(prompt, server.run(prompt))[title])

    return draw


@pytest.fixture(scope="module")
def undisturbed(server, draw):
    """A picture of a workflow, drawn with nothing before it; each only once."""

    @functools.cache
    def undisturbed(name, title):
        workflow.forget(server)
        return draw(drawing(name, title), title)

    return undisturbed


# -- what is refused ---------------------------------------------------------------------------------------------------


def two_masks(prompt):
    keep = inputs(prompt, KEEP)
    keep["source_mask"] = keep["target_mask"] = [workflow.find(prompt, "AttuneDemoScene"), 1]


def two_masks_behind_a_strategy(prompt):
    inputs(prompt, STRATEGY)["mask"] = [workflow.find(prompt, "AttuneDemoScene"), 1]


def two_regions_masks(prompt):
    scene = {"caption": workflow.SOURCE, "seed": 0, "size": 128}
    prompt["900"] = {"class_type": "AttuneDemoScene", "inputs": scene, "_meta": {"title": "scene"}}
    inputs(prompt, REGIONS)["mask_1"] = ["900", 1]


def change(kind, **values):
    return lambda prompt: inputs(prompt, kind).update(values)


def drop(kind, name):
    return lambda prompt: inputs(prompt, kind).pop(name)


def words_alone(prompt):
    drop(MUTUAL, "source_mask")(prompt)
    change(MUTUAL, source_words="circle")(prompt)


def unpainted(kind, name):
    """What Load Image gives for a picture that nothing was painted on."""

    def spoil(prompt):
        load = {"class_type": "LoadImage", "inputs": {"image": "example.png"}, "_meta": {"title": "unpainted"}}
        prompt["900"] = load
        inputs(prompt, kind)[name] = ["900", 1]

    return spoil


def nothing_painted(prompt):
    drop(KEEP, "target_mask")(prompt)
    unpainted(KEEP, "source_mask")(prompt)


CASES = {
    "a strategy of nothing": (REPLACE, unpainted(STRATEGY, "mask"), STRATEGY, "of Attune Mask Strategy is black, so"),
    "an object that is nowhere": (
        MASKED, unpainted(MUTUAL, "source_mask"), MUTUAL, "source_mask of Attune Mutual Self-Attention is black, so it"
    ),
    "nothing that may change": (REPLACE, nothing_painted, KEEP, "(right-click Load Image > Open in MaskEditor)"),
    "a blend in nothing": (BLENDED, unpainted(BLEND, "mask"), BLEND, "The mask of Attune Local Blend is black, so it"),
    "two masks for one picture": (
        REPLACE, two_masks, SAMPLER, "source_mask of Attune Context Preserving holds 2 masks, but the sampler"
    ),
    "two masks behind a strategy": (REPLACE, two_masks_behind_a_strategy, SAMPLER, "holds 2 masks, but the sampler"),
    "two masks for one region": (BY_REGION, two_regions_masks, "KSampler", "Region Prompts holds 2 masks, but the"),
    "a region without a mask": (BY_REGION, drop(REGIONS, "mask_2"), REGIONS, "Region 2 has a prompt but no mask; give"),
    "a region without a prompt": (BY_REGION, change(REGIONS, prompt_1=" "), REGIONS, "Region 1 has a mask but no"),
    "a target without a source": (MASKED, drop(MUTUAL, "source_mask"), MUTUAL, "connect a source_mask to Attune"),
    "words without a source prompt": (MASKED, words_alone, MUTUAL, "the source prompt, which is empty; fill in"),
    "words not in the prompt": (MASKED, change(MUTUAL, target_words="dragon"), MUTUAL, '"dragon" is not in the prompt'),
    "refined by words not in the prompt": (REFINED, change(REFINEMENT, words="dragon"), KEEP, '"dragon" is not in the'),
    "refined by no words": (REFINED, change(REFINEMENT, words=" , "), REFINEMENT, "fill in words on Attune Mask"),
    "a layer that is not there": (MASKED, change(MUTUAL, layer=16), MUTUAL, "go to 16, but the MODEL has 16 layers"),
    "an object layer that is not there": (REPLACE, change(KEEP, object_layer=70), KEEP, "go to 70, but the MODEL has"),
    "layers that are not there": (LAYOUT, change(FPE, layers="4-40"), FPE, "go to 40, but the MODEL has 16 layers of"),
    "layers from the wrong end": (LAYOUT, change(FPE, layers="9-4"), FPE, '"9-4" is no list of numbers from 1 on'),
    "a reversed window": (LAYOUT, change(FPE, start=0.8, end=0.2), FPE, "start to end is 0.8 to 0.2, but it needs"),
    "a reversed window of reading": (MASKED, change(MUTUAL, start=1.0, end=0.5), MUTUAL, "start to end is 1 to 0.5"),
    "an unknown goal": (REPLACE, change(STRATEGY, goal="move"), STRATEGY, 'goal of Attune Mask Strategy is "move"'),
}  # fmt: skip


@pytest.mark.parametrize("picture, spoil, culprit, words", CASES.values(), ids=CASES)
def test_what_does_not_fit_is_one_sentence_and_does_no_harm(server, draw, undisturbed, picture, spoil, culprit, words):
    expected, prompt = undisturbed(*picture), drawing(*picture)
    spoiled = copy.deepcopy(prompt)
    spoil(spoiled)
    entry = server.wait_for_history(server.queue(spoiled))
    (error,) = (data for kind, data in entry["status"]["messages"] if kind == "execution_error")
    message = error["exception_message"].strip()
    assert (error["node_type"], error["exception_type"]) == (culprit, "ValueError"), error
    assert words in message
    assert message.endswith(".") and "\n" not in message
    assert np.array_equal(draw(prompt, picture[1]), expected), "the next run draws something else"


@pytest.mark.parametrize("kind, name", [(KEEP, "source_mask"), (STRATEGY, "mask")])
def test_a_mask_that_is_not_connected_is_refused_before_anything_runs(server, draw, undisturbed, kind, name):
    expected, prompt = undisturbed(*REPLACE), drawing(*REPLACE)
    without = copy.deepcopy(prompt)
    drop(kind, name)(without)
    with pytest.raises(host.HostError, match=rf"{kind} \(node \d+\): Required input is missing: {name}"):
        server.queue(without)
    assert np.array_equal(draw(prompt, REPLACE[1]), expected)


# -- what is odd and works --------------------------------------------------------------------------------------------


def masked(source, target, **more):
    """CPAM's picture under masks that ``solid`` makes of the arguments."""
    prompt = drawing(*REPLACE)
    keep = inputs(prompt, KEEP)
    keep.update(
        source_mask=solid(prompt, *source), target_mask=solid(prompt, *target), **{"keep_object": False, **more}
    )
    return workflow.cut(prompt, REPLACE[1])


def apart(one, other):
    return abs(one.astype(float) - other).mean()


def test_an_empty_mask_gives_the_source_back(draw, undisturbed):
    """As well as sampling back under the inversion's own prompt does."""
    title = "without attention control"
    back = drawing(REPLACE[0], title)
    sampler = inputs(back, SAMPLER)
    sampler.update(positive=sampler["negative"], cfg=1.0)
    picture = workflow.scene()

    def far(drawn):
        return np.square(drawn - picture).mean()

    edited, reconstruction = draw(masked([0.0], [0.0]), REPLACE[1]), draw(workflow.cut(back, title), title)
    assert far(edited) < 10**0.1 * far(reconstruction)  # 1 dB
    assert far(undisturbed(*REPLACE)) > 4 * far(edited)


def test_a_full_mask_gives_the_plain_picture(draw, undisturbed):
    plain = undisturbed(REPLACE[0], "without attention control")
    assert np.array_equal(draw(masked([1.0], [1.0]), REPLACE[1]), plain)
    assert apart(undisturbed(*REPLACE), plain) > 1


@pytest.mark.parametrize("keep_object", [False, True])
def test_masks_without_overlap(draw, undisturbed, keep_object):
    """The object's old place fills with background, and the new one is drawn; neither may be flat or noise."""
    edited = draw(masked([1.0, (64, 24, 64, 80)], [1.0, (8, 72, 48, 48)], keep_object=keep_object), REPLACE[1])
    source = undisturbed("Attune - Free prompt editing", "pinned source")
    edited, source = edited.astype(float), source.astype(float)
    was_there = source[..., 0] - source[..., 1:].max(-1) > 80
    assert was_there.sum() > 500
    assert (edited[..., 0] - edited[..., 1:].max(-1) > 80)[was_there].mean() < 0.5, "the object is still there"
    assert edited[80:112, 16:48].std() > 5, "nothing is drawn in the target mask"
    assert apart(edited[8:56, 16:56], source[8:56, 16:56]) < 20, "what lies outside both has changed"
    assert np.array_equal(draw(drawing(*REPLACE), REPLACE[1]), undisturbed(*REPLACE))
