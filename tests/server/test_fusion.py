"""Edits from a sketch, over HTTP: what does not fit is one sentence and does no harm, what is odd and fits works."""

import numpy as np
import pytest

from attune.tests.server import workflow

INTERMEDIATE, FUSION, SOURCE, TURN = (
    "AttuneIntermediate", "AttuneMaskedFusion", "AttuneSourceFusion", "AttuneNextTurn",
)  # fmt: skip
INVERSION, SAMPLER, SKETCH, SAVE = "AttuneDDIMInversion", "SamplerCustom", "AttuneSketch", "AttuneSaveTrajectory"
STEPS = 3
BY_SKETCH = "Attune - Redraw from a sketch", "redrawn"
BY_SOURCE = "Attune - Redraw without a sketch", "redrawn in the mask"
IN_TURNS = "Attune - Edit in three turns", "after turn 1"


def drawing(name, title):
    """A workflow in the demo world, cut down to one of its pictures and to three steps."""
    prompt = workflow.cut(workflow.in_the_demo_world(workflow.load(name)), title)
    inputs(prompt, INVERSION)["steps"] = STEPS
    return prompt


def inputs(prompt, key):
    return prompt[workflow.find(prompt, key)]["inputs"]


def socket(prompt, key, slot=0):
    return [workflow.find(prompt, key), slot]


def ran(server, prompt):
    entry = server.wait_for_history(server.queue(prompt))
    assert entry["status"]["status_str"] == "success", entry["status"]
    return entry


def draw(server, prompt, title):
    return workflow.pixels(server, workflow.saved(prompt, ran(server, prompt))[title])


def apart(one, other):
    return abs(one.astype(float) - other).mean()


@pytest.fixture(scope="module")
def undisturbed(server):
    """The edit from a sketch, drawn with nothing before it."""
    workflow.forget(server)
    return draw(server, drawing(*BY_SKETCH), BY_SKETCH[1])


# -- what is refused ---------------------------------------------------------------------------------------------------


def change(kind, **values):
    return lambda prompt: inputs(prompt, kind).update(values)


def mask_of(kind, value):
    def spoil(prompt):
        inputs(prompt, kind)["mask"] = workflow.add(prompt, "SolidMask", value=value, width=128, height=128)

    return spoil


def two_masks(kind, name="mask"):
    def spoil(prompt):
        scene = {"caption": workflow.SOURCE, "seed": workflow.SEED, "size": workflow.SIDE}
        inputs(prompt, kind)[name] = [workflow.add(prompt, "AttuneDemoScene", **scene)[0], 1]

    return spoil


def inversion_of(prompt, steps=STEPS, seed=workflow.SEED, side=workflow.SIDE):
    """A socket of another picture's trajectory, or of the same one's with other steps."""
    scene = workflow.add(prompt, "AttuneDemoScene", caption=workflow.SOURCE, seed=seed, size=side)
    latent = workflow.add(prompt, "VAEEncode", pixels=scene, vae=socket(prompt, "AttuneDemoCheckpoint", 2))
    return workflow.add(prompt, INVERSION, **{**inputs(prompt, INVERSION), "latent": latent, "steps": steps})


def source_of(kind, name="trajectory", **more):
    def spoil(prompt):
        inputs(prompt, kind)[name] = inversion_of(prompt, **more)

    return spoil


def another_model(prompt):
    found = workflow.add(prompt, "CheckpointLoaderSimple", ckpt_name="v1-5-pruned-emaonly-fp16.safetensors")
    inputs(prompt, FUSION)["model"] = found


def edited_model(kind):
    def spoil(prompt):
        inputs(prompt, kind)["model"] = workflow.add(
            prompt, "AttunePromptSwap", model=socket(prompt, "AttuneDemoCheckpoint"),
            clip=socket(prompt, "AttuneDemoCheckpoint", 1), trajectory=socket(prompt, INVERSION),
            source_prompt=workflow.SOURCE, target_prompt=workflow.TARGET, cross_start=0.0, cross_end=0.8,
            self_start=0.0, self_end=0.4, token_limit=1024, word_windows="", preserve="",
        )  # fmt: skip

    return spoil


def plain(*names):
    def spoil(prompt):
        texts = {name: inputs(prompt, INTERMEDIATE)[at] for name, at in (("positive", "target"), ("negative",) * 2)}
        inputs(prompt, SAMPLER).update({name: texts[name] for name in names})

    return spoil


def intermediate_for_a_source(prompt):
    inputs(prompt, FUSION)["intermediate"] = socket(prompt, INVERSION)


def turns_of_a_smaller_picture(prompt):
    turn, small = inputs(prompt, TURN), inversion_of(prompt, side=64)
    before = {**turn, "trajectory": small, "edited": small}
    before["image"] = workflow.add(prompt, "AttuneDemoScene", caption=workflow.SOURCE, seed=workflow.SEED, size=64)
    turn["turns"] = [workflow.add(prompt, TURN, **before)[0], 2]


def larger_picture(prompt):
    scene = workflow.add(prompt, "AttuneDemoScene", caption=workflow.SOURCE, seed=workflow.SEED, size=192)
    inputs(prompt, TURN)["image"] = scene


CASES = {
    "an adapter of another family": (
        BY_SKETCH, change("ControlNetLoader", control_net_name="t2iadapter_sketch_sd15v2.pth"), INTERMEDIATE,
        "The CONTROL_NET is a T2I-Adapter of widths [320, 640, 1280, 1280], but the MODEL needs widths [",
    ),
    "a black mask for the intermediate": (BY_SKETCH, mask_of(INTERMEDIATE, 0.0), INTERMEDIATE, "Intermediate is black"),
    "a black mask for the fusion": (BY_SKETCH, mask_of(FUSION, 0.0), FUSION, "mask of Attune Masked Fusion is black,"),
    "a black mask without a sketch": (BY_SOURCE, mask_of(SOURCE, 0.0), SOURCE, "of Attune Source Fusion is black, so"),
    "a black mask for a turn": (IN_TURNS, mask_of(TURN, 0.0), TURN, "The mask of Attune Next Turn is black, so"),
    "two masks for the intermediate": (BY_SKETCH, two_masks(INTERMEDIATE), INTERMEDIATE, "The mask holds 2 masks, but"),
    "two masks for the fusion": (BY_SKETCH, two_masks(FUSION), FUSION, "connect one mask to Attune Masked Fusion, or"),
    "two masks without a sketch": (BY_SOURCE, two_masks(SOURCE), SOURCE, "connect one mask to Attune Source Fusion, o"),
    "two masks for a turn": (IN_TURNS, two_masks(TURN), TURN, "connect one mask to Attune Next Turn, or one for each"),
    "two masks to wipe out": (BY_SKETCH, two_masks(SKETCH, "erase"), SKETCH, "erase holds 2 masks, but the image hold"),
    "two masks to draw": (BY_SKETCH, two_masks(SKETCH, "draw"), SKETCH, "draw holds 2 masks, but the image holds 1"),
    "another grid": (BY_SKETCH, source_of(FUSION, steps=4), FUSION, "The source TRAJECTORY has 4 steps from sigma"),
    "another source": (
        BY_SKETCH, source_of(FUSION, seed=5), FUSION, "The intermediate was drawn beside another source than the one"
    ),
    "a source in the intermediate's place": (
        BY_SKETCH, intermediate_for_a_source, FUSION, "The intermediate TRAJECTORY was made without a target or a"
    ),
    "a layer of the intermediate that is not there": (
        BY_SKETCH, change(INTERMEDIATE, layer=16), INTERMEDIATE, "of Attune Intermediate go to 16, but the MODEL has 16"
    ),
    "a layer of the fusion that is not there": (
        BY_SKETCH, change(FUSION, layer=16), FUSION, "of Attune Masked Fusion go to 16, but the MODEL has 16 layers of"
    ),
    "a layer that is not there": (BY_SOURCE, change(SOURCE, layer=99), SOURCE, "Fusion go to 99, but the MODEL has 16"),
    "a reversed window of the intermediate": (
        BY_SKETCH, change(INTERMEDIATE, start=0.8, end=0.2), INTERMEDIATE, "start to end is 0.8 to 0.2, but it needs"
    ),
    "a reversed window of the adapter": (
        BY_SKETCH, change(INTERMEDIATE, start_percent=0.8, end_percent=0.2), INTERMEDIATE,
        "start_percent to end_percent is 0.8 to 0.2, but it needs",
    ),
    "a reversed window of the fusion": (BY_SKETCH, change(FUSION, start=1.0, end=0.5), FUSION, "end is 1 to 0.5, but"),
    "a reversed window": (BY_SOURCE, change(SOURCE, start=0.9), SOURCE, "start to end is 0.9 to 0.4, but it needs"),
    "another checkpoint": (BY_SKETCH, another_model, FUSION, "The TRAJECTORY was made with model family SD15 (UNetMod"),
    "an edit on the intermediate's model": (BY_SKETCH, edited_model(INTERMEDIATE), INTERMEDIATE, "carries an"),
    "an edit on the fusion's model": (BY_SKETCH, edited_model(FUSION), FUSION, "carries an"),
    "the prompt in the node's place": (BY_SKETCH, plain("positive", "negative"), SAMPLER, "outputs of the same Attune"),
    "the positive in the node's place": (BY_SKETCH, plain("positive"), SAMPLER, "is the part outside the mask that"),
    "the negative in the node's place": (BY_SKETCH, plain("negative"), SAMPLER, "outputs of the same Attune fusion"),
    "an edit on other sigmas": (IN_TURNS, source_of(TURN, "edited", steps=4), TURN, "but the edited one has 4 steps f"),
    "an edit of another size": (IN_TURNS, source_of(TURN, "edited", side=64), TURN, "for 1 pictures of 8x8 latents;"),
    "a picture of another size": (IN_TURNS, larger_picture, TURN, "The IMAGE holds 1 pictures of 192x192, but the TRA"),
    "turns of another picture": (
        IN_TURNS, turns_of_a_smaller_picture, TURN, "The picture is 128x128, but the turns are of one of 64x64; connec"
    ),
}  # fmt: skip


def refused(server, prompt, culprit):
    """The sentence with which a node of a class refuses a prompt."""
    entry = server.wait_for_history(server.queue(prompt))
    (error,) = (data for kind, data in entry["status"]["messages"] if kind == "execution_error")
    assert (error["node_type"], error["exception_type"]) == (culprit, "ValueError"), error
    message = error["exception_message"].strip()
    assert message.endswith(".") and "\n" not in message and ". " not in message
    return message


@pytest.mark.parametrize("picture, spoil, culprit, words", CASES.values(), ids=CASES)
def test_what_does_not_fit_is_one_sentence(server, undisturbed, picture, spoil, culprit, words):
    prompt = drawing(*picture)
    spoil(prompt)
    assert words in refused(server, prompt, culprit)


@pytest.mark.parametrize(
    "picture, kind, words",
    [
        (BY_SKETCH, INTERMEDIATE, "save the source's, and draw the intermediate again with Attune Intermediate."),
        (IN_TURNS, "AttuneRecordTrajectory", "save that of Attune Next Turn where it is an edit, or take"),
    ],
    ids=["an intermediate", "an edit as it was drawn"],
)
def test_what_an_adapter_was_used_for_is_no_trajectory_for_a_file(server, undisturbed, picture, kind, words):
    prompt = drawing(*picture)
    workflow.add(prompt, SAVE, trajectory=socket(prompt, kind), filename_prefix="attune/middle")
    prompt = workflow.cut(prompt, SAVE)
    before = set(server.base.rglob("*.safetensors"))
    assert words in refused(server, prompt, SAVE)
    assert set(server.base.rglob("*.safetensors")) == before


def test_afterwards_the_picture_is_the_same(server, undisturbed):
    assert np.array_equal(draw(server, drawing(*BY_SKETCH), BY_SKETCH[1]), undisturbed)


# -- what is odd and works --------------------------------------------------------------------------------------------


def with_hint(prompt, width, height):
    hint = inputs(prompt, INTERMEDIATE)["hint"]
    inputs(prompt, INTERMEDIATE)["hint"] = workflow.add(
        prompt, "ImageScale", image=hint, upscale_method="nearest-exact", width=width, height=height, crop="disabled"
    )
    return prompt


def test_a_hint_of_another_size_is_resized(server, undisturbed):
    """As the stock node does: cut to the picture's shape and sampled, so that doubled lines are the same lines."""
    doubled, wide = (draw(server, with_hint(drawing(*BY_SKETCH), *size), "redrawn") for size in ((256, 256), (256, 96)))
    assert np.array_equal(doubled, undisturbed)
    assert wide.shape == undisturbed.shape and apart(wide, undisturbed) > 0.5


def test_a_white_mask_redraws_everything(server, undisturbed):
    prompt = drawing(*BY_SKETCH)
    for kind in (INTERMEDIATE, FUSION):
        mask_of(kind, 1.0)(prompt)
    picture, square = draw(server, prompt, "redrawn"), (slice(32), slice(32))  # the source's
    assert picture.std() > 5 and apart(picture[square], undisturbed[square]) > 5


def test_a_stock_controlnet_leads_too(server, undisturbed):
    """A random one that fits the demo model; it only has to be read."""
    prompt = drawing(*BY_SKETCH)
    change("ControlNetLoader", control_net_name="demo.safetensors")(prompt)
    assert apart(draw(server, prompt, "redrawn"), undisturbed) > 0.5


def test_another_sampler_draws_about_the_same(server):
    """Where the steps are fine enough for it."""
    prompt, pictures = drawing(*BY_SKETCH), []
    inputs(prompt, INVERSION)["steps"] = 10
    for name in ("euler", "dpmpp_2m"):
        inputs(prompt, "KSamplerSelect")["sampler_name"] = name
        pictures.append(draw(server, prompt, "redrawn"))
    assert 0.5 < apart(*pictures) < 15


def test_a_turns_trajectory_is_saved_and_loaded(server):
    """It begins and ends as it did, and says what it was made under."""
    prompt, title = drawing(*IN_TURNS), "the latent"
    made = socket(prompt, TURN)
    kept = workflow.add(prompt, SAVE, trajectory=made, filename_prefix="attune/turn")[0]
    vae = socket(prompt, "AttuneDemoCheckpoint", 2)

    def show(prompt, trajectory, vae):
        latent = workflow.add(prompt, "AttuneTrajectoryLatent", strength=0.0, step=-1, trajectory=trajectory)
        pixels = workflow.add(prompt, "VAEDecode", samples=latent, vae=vae)
        shown = workflow.add(prompt, "SaveImage", filename_prefix="attune/latent", images=pixels)[0]
        prompt[shown]["_meta"]["title"] = title
        return prompt

    prompt = show(prompt, made, vae)
    entry = ran(server, prompt)
    (told,) = entry["outputs"][kept]["text"]
    name = told.removeprefix("saved as ") + " [output]"
    before = workflow.pixels(server, workflow.saved(prompt, entry)[title])

    prompt = {}
    loaded = workflow.add(prompt, "AttuneLoadTrajectory", file=name)
    shown = workflow.add(prompt, "PreviewAny", source=[loaded[0], 1])[0]
    prompt = show(prompt, loaded, [workflow.add(prompt, "AttuneDemoCheckpoint")[0], 2])
    entry = ran(server, prompt)
    assert entry["outputs"][shown]["text"] == [workflow.STAR]
    assert np.array_equal(workflow.pixels(server, workflow.saved(prompt, entry)[title]), before)
