"""Other people's nodes in one graph with edits: a LoRA, a ControlNet, an IP-Adapter-like pack, an inpainting mask."""

import functools
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import ndimage

from attune.tests.server import workflow

STEPS, SIDE, SEED = 12, 128, 2
REFINED = "a striped red circle and a blue square on a gray background"
EDGE = 64  # pixels from the left: where the inpainting mask begins
REACH = 16  # pixels: how far the autoencoder carries a latent
ROUNDING = 5  # of 255: what is left of that beyond


def stay(add, *values):
    return values


def inverted(add, model, vae, scene, caption, negative, sampler):
    """A picture's trajectory, and what a sampler needs to draw from its noise."""
    trajectory = add(
        "AttuneDDIMInversion", model=model, latent=add("VAEEncode", pixels=scene, vae=vae), conditioning=caption,
        steps=STEPS, grid="host (ends at t = 1)", epsilon="later level (papers' code)", refine=0, guidance=1.0,
    )  # fmt: skip
    return trajectory, {"add_noise": False, "latent_image": (trajectory[0], 1), "sigmas": (trajectory[0], 2)}


@dataclass(frozen=True)
class Neighbour:
    """What it does to the MODEL before the edits and after them, to the conditionings, and where the source is from."""

    model: object = stay
    edited: object = stay
    conds: object = stay
    source: object = inverted


def lora(add, model):
    return (add("LoraLoaderModelOnly", model=model, lora_name="demo.safetensors", strength_model=1.0),)


def adapter(add, model):
    return (add("StandInAdapter", model=model, weight=0.3),)


def control_net(add, positive, negative):
    net = add("ControlNetLoader", control_net_name="demo.safetensors")
    hint = add("AttuneDemoScene", caption="a green star on a white background", seed=5, size=SIDE)
    at = add(
        "ControlNetApplyAdvanced", positive=positive, negative=negative, control_net=net, image=hint, strength=0.5,
        start_percent=0.0, end_percent=1.0,
    )  # fmt: skip
    return at, (at[0], 1)


def inpainted(add, model, vae, scene, caption, negative, sampler):
    """The right half of a picture drawn anew with the stock nodes, and recorded; what a sampler needs for the same."""
    keep = add("SolidMask", value=0.0, width=SIDE, height=SIDE)
    free = add("SolidMask", value=1.0, width=SIDE - EDGE, height=SIDE)
    mask = add("MaskComposite", destination=keep, source=free, x=EDGE, y=0, operation="add")
    latent = add("SetLatentNoiseMask", samples=add("VAEEncode", pixels=scene, vae=vae), mask=mask)
    sigmas = add("BasicScheduler", model=model, scheduler="ddim_uniform", steps=STEPS, denoise=1.0)
    drawing = {"add_noise": True, "latent_image": latent, "sigmas": sigmas}
    return add(
        "AttuneRecordTrajectory", model=model, positive=caption, negative=negative, sampler=sampler, cfg=5.0,
        noise_seed=SEED, **drawing,
    ), drawing  # fmt: skip


def draw(server, neighbour):
    """Refinement, re-weighting and a blend with and without the edit, as pictures (H, W, 3), and the blend's mask."""
    graph = {}

    def add(kind, title=None, **inputs):
        number = str(len(graph) + 1)
        inputs = {name: list(value) if isinstance(value, tuple) else value for name, value in inputs.items()}
        graph[number] = {"class_type": kind, "inputs": inputs, "_meta": {"title": title or kind}}
        return number, 0

    model = add("AttuneDemoCheckpoint")
    clip, vae = (model[0], 1), (model[0], 2)

    def show(title, samples):
        add("SaveImage", title, images=add("VAEDecode", samples=samples, vae=vae), filename_prefix=f"attune/{title}")

    scene = add("AttuneDemoScene", caption=workflow.SOURCE, seed=workflow.SEED, size=SIDE)
    caption, negative = (add("CLIPTextEncode", text=text, clip=clip) for text in (workflow.SOURCE, ""))
    sampler = add("KSamplerSelect", sampler_name="euler")
    trajectory, drawing = neighbour.source(add, model, vae, scene, caption, negative, sampler)
    windows = {"cross_start": 0.0, "cross_end": 0.8, "self_start": 0.0, "self_end": 0.4, "token_limit": 1024}
    source = {"clip": clip, "trajectory": trajectory}
    prompts = {"source_prompt": workflow.SOURCE, "target_prompt": REFINED}
    (plain,) = neighbour.model(add, model)
    edited = add("AttunePromptRefine", model=plain, **source, **prompts, **windows, word_windows="", preserve="")
    edited = add("AttunePromptReweight", model=edited, **source, prompt=REFINED, weights="striped: 1.5", **windows)
    edited = add(
        "AttuneLocalBlend", model=edited, **source, **prompts, inside="circle", outside="", threshold=0.3, start=0.2,
        tokens=256,
    )  # fmt: skip
    positive, negative = neighbour.conds(add, (edited[0], 1), negative)
    for title, start in (("edit", edited), ("plain", plain)):
        (steered,) = neighbour.edited(add, start)
        drawn = add(
            "SamplerCustom", model=steered, noise_seed=SEED, cfg=5.0, positive=positive, negative=negative,
            sampler=sampler, **drawing,
        )  # fmt: skip
        show(title, drawn)
        if title == "edit":
            mask = add("AttuneBlendMask", "preview", trajectory=trajectory, latent=drawn)
            add("MaskPreview", "mask", mask=mask)
    show("picture", add("VAEEncode", pixels=scene, vae=vae))
    show("source", add("AttuneTrajectoryLatent", trajectory=trajectory, strength=0.0, step=-1))

    images = workflow.saved(graph, server.run(graph))
    shown = {title: workflow.pixels(server, image).astype(float) for title, image in images.items()}
    return SimpleNamespace(**{**shown, "mask": shown["mask"][..., 0] > 127})


def apart(one, other, where):
    """The mean difference of two pictures in a region, in 0..255."""
    assert where.sum() > 500, "the region is too small to say anything"
    return abs(one - other)[where].mean()


def away(mask):
    return ~ndimage.binary_dilation(mask, iterations=REACH)


def check_blend(drawn, where):
    """Both edits show inside the blend's mask, and outside, as far as ``where`` reaches, there is the source."""
    assert apart(drawn.edit, drawn.plain, drawn.mask) > 10, "the edit does nothing"
    assert apart(drawn.edit, drawn.source, drawn.mask) > 10
    outside = where & away(drawn.mask)
    assert abs(drawn.edit - drawn.source)[outside].max() <= ROUNDING
    kept, lost = (apart(picture, drawn.source, outside) for picture in (drawn.edit, drawn.plain))
    assert lost > 1 and lost > 4 * kept, "there is nothing to keep out"


EVERYWHERE = np.ones((SIDE, SIDE), bool)
NEIGHBOURS = {
    "LoRA": Neighbour(model=lora),
    "ControlNet": Neighbour(conds=control_net),
    "IP-Adapter before": Neighbour(model=adapter),
    "IP-Adapter behind": Neighbour(edited=adapter),
}


@pytest.fixture(scope="module")
def drawn(server):
    """What is drawn beside a neighbour, or alone; each only once."""
    return functools.cache(lambda name=None: draw(server, NEIGHBOURS[name] if name else Neighbour()))


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_an_edit_and_a_neighbour_both_show(name, drawn):
    alone, both = drawn(), drawn(name)
    check_blend(alone, EVERYWHERE)
    check_blend(both, EVERYWHERE)
    assert np.array_equal(both.source, alone.source)
    assert apart(both.plain, alone.plain, EVERYWHERE) > 1, "the neighbour does nothing at all"
    assert apart(both.edit, alone.edit, both.mask & alone.mask) > 2, "the neighbour does nothing under the edit"


def test_the_place_of_an_ip_adapter_does_not_matter(drawn):
    assert np.array_equal(drawn("IP-Adapter before").edit, drawn("IP-Adapter behind").edit)


def test_a_stock_inpainting_mask(server):
    """What the mask leaves out stays the picture; inside it a new picture is drawn, and that one is edited."""
    both = draw(server, Neighbour(source=inpainted))
    across = np.arange(SIDE)[None].repeat(SIDE, 0)
    left, right = across < EDGE - REACH, across >= EDGE + REACH
    for picture in (both.edit, both.plain, both.source):
        assert abs(picture - both.picture)[left].max() <= ROUNDING
    assert apart(both.source, both.picture, right) > 10
    check_blend(both, right)


# -- edits by self-attention and by region ----------------------------------------------------------------------------

EDITS = {"AttuneFreePromptEditing", "AttuneMutualSelfAttention", "AttuneContextPreserving", "AttuneRegionPrompts"}


def beside(server, name, titles, neighbour):
    """Pictures (H, W, 3) of a workflow in the demo world, in which a neighbour is at every sampler; by title."""
    prompt = workflow.cut(workflow.in_the_demo_world(workflow.load(name)), *titles)
    for node in prompt.values():
        if node["class_type"] in ("AttuneDDIMInversion", "KSampler"):
            node["inputs"]["steps"] = STEPS

    def add(kind, **inputs):
        number = str(900 + len(prompt))
        inputs = {name: list(value) if isinstance(value, tuple) else value for name, value in inputs.items()}
        prompt[number] = {"class_type": kind, "inputs": inputs, "_meta": {"title": f"{kind} {number}"}}
        return number, 0

    samplers = [
        node["inputs"] for node in prompt.values() if "Sampler" in node["class_type"] and "cfg" in node["inputs"]
    ]
    checkpoint = [workflow.find(prompt, "AttuneDemoCheckpoint"), 0]
    (model,) = neighbour.model(add, tuple(checkpoint))
    edits = [node["inputs"] for node in prompt.values() if node["class_type"] in EDITS]
    for inputs in (*edits, *samplers):
        if inputs["model"] == checkpoint:
            inputs["model"] = list(model)
    for inputs in samplers:
        (steered,) = neighbour.edited(add, tuple(inputs["model"]))
        texts = neighbour.conds(add, tuple(inputs["positive"]), tuple(inputs["negative"]))
        inputs.update(model=list(steered), positive=list(texts[0]), negative=list(texts[1]))
    images = workflow.saved(prompt, server.run(prompt))
    return {title: workflow.pixels(server, images[title]).astype(float) for title in titles}


def is_red(picture):
    return picture[..., 0] - picture[..., 1:].max(-1) > 80


def layout_kept(picture, source):
    """How near the picture is to the source where the source has nothing red, in dB."""
    return -10 * np.log10(np.square(picture - source)[away(is_red(source))].mean())


def redness(picture, source):
    """How much more red than blue there is where the source is red."""
    red, _, blue = picture[is_red(source)].mean(0)
    return red - blue


def in_the_box(picture, _):
    """How much more red than blue there is in the left box, where a red circle belongs."""
    red, _, blue = picture[40:88, 16:48].mean((0, 1))
    return red - blue


PLAIN = "without attention control"
BY_SELF = {  # workflow: its edit, its picture without it, the neighbour, what the edit raises, and by how much
    "Attune - Free prompt editing": ("free prompt editing", PLAIN, "ControlNet", layout_kept, 6),
    "Attune - Mutual self-attention": ("mutual self-attention", PLAIN, "LoRA", redness, 20),
    "Attune - Replace an object": ("object replaced", PLAIN, "ControlNet", layout_kept, 6),
    "Attune - Remove an object": ("object removed", PLAIN, "IP-Adapter behind", layout_kept, 6),
    "Attune - Prompts by region": ("prompts by region", "one prompt", "LoRA", in_the_box, 100),
}


@pytest.mark.parametrize("name", BY_SELF)
def test_an_edit_by_self_attention_or_region_and_a_neighbour_both_show(name, server):
    edit, plain, which, does, least = BY_SELF[name]
    alone, both = (beside(server, name, (edit, plain), n) for n in (Neighbour(), NEIGHBOURS[which]))
    for pictures in (alone, both):
        much, little = (does(pictures[title], workflow.scene()) for title in (edit, plain))
        assert much > little + least, f"the edit does nothing: {much:.1f}, {little:.1f} without it"
    # Without it the same pixels come out, so anything above rounding is the neighbour's.
    assert apart(both[plain], alone[plain], EVERYWHERE) > 0.2, "the neighbour does nothing at all"
    assert apart(both[edit], alone[edit], EVERYWHERE) > 0.2, "the neighbour does nothing under the edit"
