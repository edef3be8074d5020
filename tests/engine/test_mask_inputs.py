"""Masks as they come: of pictures whose sides are no multiples of 8, and with nothing painted on them."""

from dataclasses import replace

import comfy.model_management
import pytest
import torch
from comfy.model_management import InterruptProcessingException
from torch.nn import functional as F

from attune.attention_patches.masks import fitted
from attune.nodes import edit, tokens
from attune.nodes.demo import AttuneDemoScene
from attune.nodes.fusion import AttuneIntermediate, AttuneNextTurn, AttuneSketch, AttuneSourceFusion
from attune.nodes.mask import AttuneMaskStrategy
from attune.nodes.self_attention import AttuneRegionPrompts
from attune.nodes.view import AttuneAttentionMaps

from .bench import (
    SOURCE,
    TARGET,
    Bench,
    adapter,
    context_preserving,
    half,
    local_blend,
    mutual,
    outputs,
    prompt_swap,
)

HEIGHT, WIDTH = 69, 79  # of a picture that a VAE cuts to 64x72


@pytest.fixture(scope="module")
def odd():
    """The latents that a VAE makes of such a picture are 8x9."""
    with torch.inference_mode():
        return Bench(height=8, width=9, steps=2)


def painted(height=HEIGHT, width=WIDTH):
    """A mask whose edges lie where a shift by one pixel moves them into another latent pixel."""
    mask = torch.zeros(1, height, width)
    mask[:, 2 + 40 : 2 + 56, 3 + 48 : 3 + 64] = 1  # rows 40 to 55 and columns 48 to 63 of what is left
    return mask


def cut(mask):
    return mask[..., 2:66, 3:75]


def two_regions(bench, mask):
    return outputs(AttuneRegionPrompts, bench.model, bench.clip, SOURCE, "a green star", mask_1=mask)


def source_fusion(bench, mask):
    texts = bench.text(TARGET), bench.text("")
    return outputs(
        AttuneSourceFusion, bench.model, bench.trajectory, *texts, 0.0, 1.0, 4, mask, bench.text(SOURCE)
    )[:3]  # fmt: skip


EDITS = {
    "local blend": lambda b, mask: local_blend(b, 1, prompt_swap(b, 1)[0], mask, start=0.0),
    "mutual self-attention": lambda b, mask: mutual(b, 1, source_mask=mask, start=0.0, layer=0),
    "mutual self-attention, target": lambda b, mask: mutual(
        b, 1, source_mask=half(), target_mask=mask, start=0.0, layer=0
    ),
    "context preserving": lambda b, mask: context_preserving(b, 1, source_mask=mask),
    "context preserving, target": lambda b, mask: context_preserving(b, 1, source_mask=half(), target_mask=mask),
    "region prompts": two_regions,
    "source fusion": source_fusion,
}


def drawn(bench, made):
    model, positive, *negative = made
    return bench.sample(model, positive, negative=negative[0] if negative else None)


# ---- sides that are no multiples of 8 ----------------------------------------------------------------------------


@pytest.mark.parametrize("height", range(64, 73))
@pytest.mark.parametrize("width", [64, 67, 71, 80])
def test_a_mask_is_cut_as_the_vae_cuts_its_picture(bench, height, width):
    pixels = torch.arange(height * width, dtype=torch.float32).view(1, height, width, 1)
    wanted = bench.vae.vae_encode_crop_pixels(pixels)[..., 0]
    assert torch.equal(fitted(pixels[..., 0], wanted.shape[1:]), wanted)
    # And the other way, with nothing around what the VAE takes.
    around = fitted(wanted, (height, width))
    assert torch.equal(bench.vae.vae_encode_crop_pixels(around[..., None])[..., 0], wanted)
    assert around.shape == (1, height, width) and around.sum() == wanted.sum()


@pytest.mark.parametrize("name", EDITS)
def test_a_mask_of_the_whole_picture_is_its_middle(odd, name):
    whole, middle = (drawn(odd, EDITS[name](odd, mask)) for mask in (painted(), cut(painted())))
    assert torch.equal(whole, middle)
    # Squeezed, as a mask of any other size is, it lies elsewhere.
    squeezed = F.interpolate(painted()[None], (64, 72), mode="nearest-exact")[0]
    assert (drawn(odd, EDITS[name](odd, squeezed)) - whole).abs().max() > 1e-3


def test_a_mask_of_another_size_is_scaled(odd):
    small = painted()[:, :68, :68]
    assert torch.equal(fitted(small, (64, 72)), small)
    assert torch.equal(fitted(torch.ones(1, 100, 100), (64, 72)), torch.ones(1, 100, 100))


@pytest.mark.parametrize("first", [3, 10, 30, 60])
def test_a_turn_changes_the_masked_pixels_and_no_others(odd, first):
    image = torch.rand(1, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(0))
    trajectory = replace(odd.trajectory, conditioning=odd.text(SOURCE), negative=odd.text(""))
    edited = replace(trajectory, latents=trajectory.latents + 5.0)
    mask = torch.zeros(1, HEIGHT, WIDTH)
    mask[:, :, first : first + 8] = 1
    shown = outputs(AttuneNextTurn, trajectory, edited, mask, image, odd.vae, 0)[1]
    changed = (shown - image[:, 2:66, 3:75]).abs().amax(-1)[0] > 0
    assert torch.equal(changed, mask[0, 2:66, 3:75] > 0)
    alpha = torch.cat([image, torch.rand_like(image[..., :1])], -1)
    assert torch.equal(outputs(AttuneNextTurn, trajectory, edited, mask, alpha, odd.vae, 0)[1], shown)


def test_a_hint_of_the_whole_picture_is_its_middle(odd):
    """As a sketch of it is. One with alpha, or of one channel, is the same hint."""
    lines = (torch.rand(1, HEIGHT, WIDTH, 1, generator=torch.Generator().manual_seed(0)) > 0.9).float()

    def intermediate(hint):
        return outputs(
            AttuneIntermediate, odd.model, odd.trajectory, odd.text(TARGET), odd.text(""), adapter(), hint, half(),
            odd.vae, 0, 3.0, 1.0, 0.0, 1.0, "both", "gaussian", 0.08, 1.0, 4, odd.text(SOURCE),
        )[0].latents[-1]  # fmt: skip

    three = lines.expand(-1, -1, -1, 3)
    wanted = intermediate(three[:, 2:66, 3:75])
    for hint in (three, torch.cat([three, torch.ones_like(lines)], -1), torch.cat([three, lines], -1), lines):
        assert torch.equal(intermediate(hint), wanted)


def test_a_sketch_is_marked_by_masks_of_either_size(bench):
    image = torch.rand(1, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(0))
    for picture, mask in ((image, cut(painted())), (image[:, 2:66, 3:75], painted()), (image, painted())):
        made = outputs(AttuneSketch, picture, 1.0, 1.0, 1, draw=mask)[0][..., 0]
        inside = painted() if picture is image else cut(painted())
        assert torch.equal(made, inside)


def test_masks_of_learned_words_are_cut(odd):
    """A noun's and the background's; (H, W) of the picture is told."""
    masks = torch.cat([painted(), 1 - painted()])
    found, wanted = (
        tokens._outside(m[:1], m, 2, 1, (8, 9), (64, 72))[0] for m in (masks, cut(masks))
    )
    assert torch.equal(found, wanted) and 0 < found.mean() < 1


def test_masks_that_go_out_have_the_size_of_the_picture_that_goes_out(odd):
    decoded = odd.vae.decode(odd.noise["samples"])
    mask = outputs(AttuneAttentionMaps, odd.model, odd.clip, odd.trajectory, SOURCE, "circle", 64, 2)[2]
    blended = outputs(edit.AttuneBlendMask, odd.trajectory, odd.noise)[0]
    assert mask.shape == blended.shape == decoded.shape[:3] == (1, 64, 72)


# ---- nothing painted ---------------------------------------------------------------------------------------------

BLACK = torch.zeros(1, 64, 64)  # as Load Image gives it for a picture without alpha


def one_sentence(text, name, node):
    assert f"The {name} of {node} is black" in text and "paint white" in text and "Open in MaskEditor" in text
    assert text.endswith(".") and text.count(". ") == 0 and "\n" not in text


@pytest.mark.parametrize(
    "name, node, run",
    [
        ("mask", "Attune Local Blend", lambda b: local_blend(b, 1, mask=BLACK)),
        ("mask", "Attune Local Blend", lambda b: local_blend(b, 1, mask=BLACK, inside="circle")),
        ("source_mask", "Attune Mutual Self-Attention", lambda b: mutual(b, 1, source_mask=BLACK)),
        ("source_mask", "Attune Mutual Self-Attention", lambda b: mutual(b, 1, source_mask=BLACK + 0.4)),
        ("source_mask", "Attune Context Preserving", lambda b: context_preserving(b, 1, source_mask=BLACK)),
        (
            "source_mask",
            "Attune Context Preserving",
            lambda b: context_preserving(b, 1, source_mask=BLACK, target_mask=half(), keep_object=True),
        ),
        ("mask", "Attune Source Fusion", lambda b: source_fusion(b, BLACK)),
        ("mask", "Attune Mask Strategy", lambda b: outputs(AttuneMaskStrategy, BLACK, "replace object", 4)),
        ("mask", "Attune Mask Strategy", lambda b: outputs(AttuneMaskStrategy, BLACK, "change background", 4)),
    ],
)
def test_a_black_mask_is_refused_in_one_sentence(odd, name, node, run):
    with pytest.raises(ValueError) as error:
        run(odd)
    one_sentence(str(error.value), name, node)


@pytest.fixture
def told(monkeypatch):
    """What nodes tell the user."""
    texts = []
    monkeypatch.setattr(edit.runs, "say", lambda node_id, text: texts.append(text))
    return texts


def test_a_black_mask_that_can_be_meant_is_told(odd, told):
    """A region that is left out, and an object that goes nowhere."""
    outputs(AttuneRegionPrompts, odd.model, odd.clip, SOURCE, "a", "b", mask_1=half(), mask_2=BLACK)
    (text,) = told
    assert text.startswith("mask_2 is black, so prompt_2 ") and "Open in MaskEditor" in text
    told.clear()
    mutual(odd, 1, source_mask=half(), target_mask=BLACK, layer=9)
    (text,) = told
    assert text.startswith("target_mask is black") and "Open in MaskEditor" in text
    told.clear()
    mutual(odd, 1, source_mask=BLACK, target_mask=half(), layer=9)
    (text,) = told
    assert text.startswith("source_mask is black") and "Open in MaskEditor" in text


def test_a_black_mask_that_is_meant_is_not(odd, told):
    """A black target mask removes the object, and a black source mask beside a target mask adds one."""
    for masks in ({"source_mask": half(), "target_mask": BLACK}, {"source_mask": BLACK, "target_mask": half()}):
        assert drawn(odd, context_preserving(odd, 1, **masks)).isfinite().all()
    assert told == []


# ---- Cancel ------------------------------------------------------------------------------------------------------


def test_a_batch_of_sketches_hears_cancel(server_progress):
    image = outputs(AttuneDemoScene, SOURCE, 0, 64)[0].repeat(2, 1, 1, 1)
    comfy.model_management.interrupt_current_processing()
    try:
        with pytest.raises(InterruptProcessingException):
            outputs(AttuneSketch, image, 0.2, 1.0, 2)
    finally:
        comfy.model_management.interrupt_current_processing(False)
    assert outputs(AttuneSketch, image, 0.2, 1.0, 2)[0].shape == (2, 64, 64, 3)
