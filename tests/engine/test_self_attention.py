"""Free-Prompt-Editing, mutual self-attention, context-preserving edits and region prompts on the demo model."""

import comfy_extras.nodes_custom_sampler as custom
import numpy as np
import pytest
import torch

import nodes as stock
from attune.attention_patches import host
from attune.demo import scenes
from attune.inversion import host as runs
from attune.inversion.trajectory import Trajectory
from attune.nodes.edit import AttuneLocalBlend, AttunePromptSwap
from attune.nodes.invert import GRIDS, LEVELS, AttuneDDIMInversion
from attune.nodes.mask import AttuneMaskRefinement, AttuneMaskStrategy, AttuneRefinedMask
from attune.nodes.self_attention import AttuneRegionPrompts

from .bench import (
    SOURCE,
    TARGET,
    Bench,
    context_preserving,
    free_prompt_editing,
    half,
    mutual,
    outputs,
    region_prompts,
)

STEPS = 10
BLACK, WHITE = torch.zeros(1, 128, 128), torch.ones(1, 128, 128)
RIGHT = torch.cat([torch.zeros(1, 128, 64), torch.ones(1, 128, 64)], 2)


def decibels(a, b):
    return float(-10 * ((a - b).square().mean()).log10())


class Picture(Bench):
    """A drawn scene, inverted without a caption."""

    def __init__(self, caption=SOURCE, seed=3):
        super().__init__()
        scene = scenes.scene_from_caption(caption, np.random.default_rng(seed))
        picture, masks = scenes.render(scene)
        self.masks = torch.from_numpy(masks)
        latent = outputs(stock.VAEEncode, self.vae, torch.from_numpy(picture)[None])[0]
        made = outputs(AttuneDDIMInversion, self.model, latent, self.text(""), STEPS, GRIDS[0], LEVELS[0])
        self.trajectory, self.sigmas = made[0], made[0].sigmas
        self.noise = {"samples": runs.to_host_scale(self.model, self.trajectory.noise)}
        self.guidance = 7.5
        self.source = self.decode(runs.host_latent(self.trajectory, -1))

    def decode(self, samples):
        return outputs(stock.VAEDecode, self.vae, {"samples": samples})[0][0]

    def draw(self, made, **kwargs):
        return self.decode(self.sample(*made, **kwargs))


@pytest.fixture(scope="module")
def picture():
    with torch.inference_mode():
        return Picture()


def cpam(picture, source, target=None, prompt=TARGET, **settings):
    return context_preserving(picture, 1, None, source, target, prompt, **settings)


# ---- masks, at their ends ----------------------------------------------------------------------------------------


def test_an_empty_mask_gives_the_source_back(picture):
    """To within 1 dB of the reconstruction, at the papers' guidance, which acts on nothing here."""
    back = decibels(picture.draw((picture.model, picture.text("")), guidance=1.0), picture.source)
    kept = decibels(picture.draw(cpam(picture, BLACK, BLACK)), picture.source)
    changed = decibels(picture.draw((picture.model, picture.text(TARGET))), picture.source)
    assert kept > back - 1 and kept > changed + 6


def test_a_full_mask_is_the_method_without_one(picture):
    plain = picture.sample(picture.model, picture.text(TARGET))
    assert torch.equal(picture.sample(*cpam(picture, WHITE)), plain)
    unmasked = picture.sample(*mutual(picture, 1))
    assert torch.equal(picture.sample(*mutual(picture, 1, source_mask=WHITE)), unmasked)
    assert (unmasked - plain).abs().max() > 0.1
    kept = cpam(picture, WHITE, keep_object=True, object_start=0.2, object_layer=8, plain_share=0.0)
    assert torch.allclose(picture.sample(*kept), unmasked, atol=1e-4)


def test_half_a_mask_changes_half_the_picture(picture):
    """Local Blend by the same mask makes it so; without it, guidance carries the change over (see the help page)."""
    model, positive = cpam(picture, RIGHT)
    words = SOURCE, TARGET, "", "", 0.3, 0.0, 256, RIGHT
    blended, _ = outputs(AttuneLocalBlend, model, picture.clip, picture.trajectory, *words)
    made = picture.draw((blended, positive))
    # The autoencoder blurs over less than two of the finest tokens, of 8 pixels.
    assert decibels(made[:, :48], picture.source[:, :48]) > 40
    assert decibels(made[:, 72:], picture.source[:, 72:]) < 25


def test_outside_the_mask_a_layer_reads_only_the_background():
    """At one place, whatever the object's keys and values hold, the outside puts out the same."""
    bench = Bench()
    model, _ = context_preserving(bench, 1, None, RIGHT, RIGHT, plain_share=0.0)
    (controller,) = model.model_options["transformer_options"]["attune"].controllers
    place = host.Place("self", ("input", 1), 0, (8, 8), 0, 5)
    own, source, other = (host.QKV(*torch.randn(3, 1, 64, 32)) for _ in range(3))
    outside = (torch.arange(64) % 8) < 4
    mixed = host.QKV(*(torch.where(outside[None, :, None], s, o) for s, o in zip(source, other, strict=True)))

    def attend(q, k, v):
        return host.apply_map(host.attention_map(q, k, 2), v, 2)

    one, two = (
        controller.self_output(place, own, {"source without text": read}, attend, host.Lookout().seen(controller))
        for read in (source, mixed)
    )
    assert torch.equal(one, two)
    assert torch.allclose(one[:, ~outside], attend(*own)[:, ~outside], atol=1e-6)


@pytest.mark.parametrize("size", [(7, 5), (512, 512), (96, 300)], ids=str)
def test_masks_of_any_size(picture, size):
    mask = torch.zeros(1, *size)
    mask[:, :, size[1] // 2 :] = 1
    assert picture.sample(*cpam(picture, mask)).isfinite().all()


def test_thin_and_tiny_masks_are_finite_in_half_precision(picture):
    line = BLACK.clone()
    line[:, 60] = 1
    model, positive = cpam(picture, line, keep_object=True)
    model.set_model_compute_dtype(torch.bfloat16)
    thin = picture.sample(model, positive)
    assert thin.isfinite().all()


# ---- what the methods do -----------------------------------------------------------------------------------------


def test_free_prompt_editing_changes_the_colour_and_keeps_the_layout(picture):
    """The circle is red; the target's is yellow. All else is to stay more than without the edit."""
    plain = picture.draw((picture.model, picture.text(TARGET)), guidance=2.0)
    edited = picture.draw(free_prompt_editing(picture, 1, source=""), guidance=2.0)
    circle, outside = picture.masks[0] > 0.99, picture.masks.amax(0) == 0
    red, yellow = picture.source[circle].mean(0), edited[circle].mean(0)
    assert yellow[1] > red[1] + 0.2
    assert decibels(edited[outside], picture.source[outside]) > decibels(plain[outside], picture.source[outside])


def test_the_papers_layers_are_not_the_codes(picture):
    """By 1024 tokens all 16 layers of this small model act; 1-16 names the same, 4-14 fewer."""
    by_tokens = picture.sample(*free_prompt_editing(picture, 1, source=""))
    assert torch.equal(picture.sample(*free_prompt_editing(picture, 1, source="", layers="1-16")), by_tokens)
    named = picture.sample(*free_prompt_editing(picture, 1, source="", layers="4-14"))
    assert (named - by_tokens).abs().max() > 0.05
    assert torch.equal(picture.sample(*free_prompt_editing(picture, 1, source="", layers="4, 5 6-14")), named)


def test_mutual_attention_keeps_the_colour(picture):
    """It takes the source's look: what the prompt wants yellow stays redder than without."""
    circle = picture.masks[0] > 0.99
    edited = picture.draw(mutual(picture, 1, start=0.0, layer=4), guidance=2.0)
    fpe = picture.draw(free_prompt_editing(picture, 1, source=""), guidance=2.0)
    assert edited[circle].mean(0)[1] < fpe[circle].mean(0)[1] - 0.1


def test_removal_and_replacement(picture):
    """With the true mask of the circle: replaced by yellow, or gone, as far as the mask's inside shows."""
    mask = picture.masks[:1]
    circle = picture.masks[0] > 0.99
    source, target, keep = outputs(AttuneMaskStrategy, mask, "replace object", 4)
    replaced = picture.draw(cpam(picture, source, target, keep_object=keep), guidance=2.0)
    assert replaced[circle].mean(0)[1] > picture.source[circle].mean(0)[1] + 0.2
    source, target, keep = outputs(AttuneMaskStrategy, mask, "remove", 4)
    assert not target.any() and not keep
    back = picture.draw(cpam(picture, BLACK, BLACK), guidance=2.0)
    gone = picture.draw(cpam(picture, source, target, keep_object=keep), guidance=2.0)
    assert decibels(gone[circle], picture.source[circle]) < decibels(back[circle], picture.source[circle]) - 3


def test_the_seed_draws_the_plain_layers(picture):
    one, again, other, once = (
        picture.sample(*cpam(picture, RIGHT, plain_share=0.3, **settings))
        for settings in ({}, {}, {"seed": 1}, {"plain_draw": "once for all steps"})
    )
    assert torch.equal(one, again) and (one - other).abs().max() > 1e-3 and (one - once).abs().max() > 1e-3
    model, _ = cpam(picture, RIGHT, plain_share=0.1)
    (controller,) = model.model_options["transformer_options"]["attune"].controllers
    places = [host.Place("self", ("input", 1), 0, (8, 8), s, 50, n) for s in range(50) for n in range(16)]
    assert 0.07 < np.mean([controller.is_plain(p) for p in places]) < 0.13


def test_the_object_can_be_read_by_either_mask(picture):
    left = 1 - RIGHT
    one, other = (
        picture.sample(*cpam(picture, RIGHT, left, keep_object=True, source_keys=f"{which} mask"))
        for which in ("source", "target")
    )
    assert (one - other).abs().max() > 1e-2


def test_one_region_over_everything_is_its_prompt(picture):
    """And none, or only black ones, is the prompt for everywhere."""
    arguments = picture.model, picture.clip, SOURCE, TARGET
    alone = picture.sample(picture.model, picture.text(TARGET))
    regional = picture.sample(*outputs(AttuneRegionPrompts, *arguments, mask_1=WHITE))
    assert torch.allclose(regional, alone, atol=2e-3 * float(alone.std()))
    without = picture.sample(*outputs(AttuneRegionPrompts, *arguments, mask_1=BLACK))
    assert torch.equal(without, picture.sample(picture.model, picture.text(SOURCE)))


def test_regions_show_their_own_prompts(picture):
    made = outputs(
        AttuneRegionPrompts, picture.model, picture.clip, "a gray background",
        "a red circle on a gray background", "a blue square on a gray background", mask_1=1 - RIGHT, mask_2=RIGHT,
    )  # fmt: skip
    shares = []
    for seed in range(3):
        start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) * float(picture.sigmas[0])
        noise = {"samples": runs.to_host_scale(picture.model, start)}
        drawn = picture.draw(made, latent=noise, guidance=5.0)
        blue = drawn[..., 2] - drawn[..., 0]
        shares.append(float(blue[:, 64:].mean() - blue[:, :64].mean()))
    assert np.mean(shares) > 0.1, shares


# ---- refinement --------------------------------------------------------------------------------------------------


def refined(picture, after=0.2):
    refinement = outputs(AttuneMaskRefinement, "circle", after, "standard deviations", 0.0, 1, 256)[0]
    return refinement, cpam(picture, RIGHT, refinement=refinement)


def test_a_refined_mask_comes_out_behind_the_sampler(picture):
    refinement, made = refined(picture)
    one = picture.sample(*made, guidance=2.0)
    other = picture.sample(*made, guidance=3.0)
    assert (one - picture.sample(*cpam(picture, RIGHT), guidance=2.0)).abs().max() > 1e-2
    found = refinement.log.masks(one)
    assert found.steps == tuple(range(2, STEPS)) and found.total == STEPS
    mask, strip = outputs(AttuneRefinedMask, refinement, {"samples": one}, 64)
    assert mask.shape == (1, 128, 128) and 0 < mask.mean() < 1 and strip.shape[1] >= 64
    again, _ = outputs(AttuneRefinedMask, refinement, {"samples": other}, 64)
    assert again.shape == mask.shape  # each sampling's own, though both rode on one model
    assert torch.equal(refinement.log.masks(one).masks, found.masks)
    with pytest.raises(ValueError, match="Attune Refined Mask"):
        outputs(AttuneRefinedMask, refinement, {"samples": one + 1}, 64)


def test_the_refined_mask_finds_the_object(picture):
    """The edit draws the circle where it was: the last mask agrees with the true one far better than chance."""
    refinement = outputs(AttuneMaskRefinement, "circle", 0.2, "standard deviations", 1.0, 0, 256)[0]
    made = cpam(picture, WHITE, WHITE, prompt=SOURCE, keep_object=True, refinement=refinement)
    mask = outputs(AttuneRefinedMask, refinement, {"samples": picture.sample(*made, guidance=2.0)}, 64)[0][0] > 0
    true = picture.masks[0] > 0.5
    assert (mask & true).sum() / (mask | true).sum() > 0.3 and (mask & true).sum() > 0.5 * mask.sum()


def test_refinement_off_is_the_given_mask(picture):
    _, made = refined(picture, after=1.0)
    assert torch.equal(picture.sample(*made), picture.sample(*cpam(picture, RIGHT)))


# ---- together with others ----------------------------------------------------------------------------------------


def test_behind_a_word_swap_both_act(picture):
    """The swap reads the source under its caption, the context the source without one: one row more."""
    swapped, positive = outputs(
        AttunePromptSwap, picture.model, picture.clip, picture.trajectory, SOURCE, TARGET, 0.0, 0.8, 0.0, 0.0, 1024
    )
    both, _ = context_preserving(picture, 1, swapped, RIGHT)
    rows = []
    handle = picture.model.model.diffusion_model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        together = picture.sample(both, positive)
    finally:
        handle.remove()
    assert max(rows) == 4 and together.isfinite().all()
    for alone in (swapped, cpam(picture, RIGHT)[0]):
        assert (together - picture.sample(alone, positive)).abs().max() > 1e-2


@pytest.mark.parametrize(
    "make, rows",
    [
        (lambda p: free_prompt_editing(p, 1.25, source=""), 3),
        (lambda p: mutual(p, 1, start=0.0), 3),
        (lambda p: mutual(p, 1, start=0.0, source=SOURCE), 4),
        (lambda p: cpam(p, RIGHT), 3),
        (lambda p: region_prompts(p, 1), 2),
    ],
    ids=["free prompt editing", "mutual", "mutual with a caption", "context preserving", "region prompts"],
)
def test_rows_a_step(picture, make, rows):
    made, seen = make(picture), []
    handle = picture.model.model.diffusion_model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    try:
        picture.sample(*made)
    finally:
        handle.remove()
    assert sum(seen) == rows * STEPS


def test_two_pictures_with_a_mask_each():
    both = Bench(batch=2)
    masks = torch.cat([RIGHT, 1 - RIGHT])
    made = both.sample(*context_preserving(both, 1, None, masks))
    for i in range(2):
        one = Bench()
        one.noise = {"samples": both.noise["samples"][i : i + 1]}
        one.trajectory = Trajectory(
            both.trajectory.sigmas, both.trajectory.latents[:, i : i + 1], both.trajectory.steps, both.trajectory.header
        )
        alone = one.sample(*context_preserving(one, 1, None, masks[i : i + 1]))
        assert (alone[0] - made[i]).abs().max() < 2e-3 * made.std()


def test_a_second_of_its_kind_is_refused(picture):
    first, _ = cpam(picture, RIGHT)
    for again in (context_preserving, mutual):
        with pytest.raises(ValueError, match="already carries"):
            again(picture, 1, first)


# ---- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["a", "0", "5-3", "4-14;", "-3", "1-99"])
def test_layers_that_are_none(picture, layers):
    with pytest.raises(ValueError, match="Attune Free Prompt Editing"):
        free_prompt_editing(picture, 1, source="", layers=layers)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"words": ("circle", "circle")}, "source_prompt"),
        ({"words": ("", "circle")}, "source_mask"),
        ({"target_mask": RIGHT}, "source_mask"),
        ({"source": SOURCE, "words": ("circle", "")}, "target_words"),
        ({"source": SOURCE, "words": ("dog", "circle")}, "dog"),
        ({"layer": 16}, "16 layers"),
        ({"start": 1.5}, "start of Attune Mutual Self-Attention is 1.5, but needs a number from 0 to 1"),
    ],
    ids=str,
)
def test_mutual_attention_says_what_is_missing(picture, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        mutual(picture, 1, **settings)


def test_masks_of_another_batch_are_refused(picture):
    three = torch.ones(3, 8, 8) * half(8)
    for made in (cpam(picture, three), mutual(picture, 1, source_mask=three)):
        with pytest.raises(ValueError, match="3 masks, but the sampler draws 1"):
            picture.sample(*made)


def test_a_region_needs_both_its_parts(picture):
    for given, sentence in (({"mask_1": RIGHT}, "no prompt"), ({"prompt_1": TARGET}, "no mask")):
        with pytest.raises(ValueError, match=sentence):
            outputs(AttuneRegionPrompts, picture.model, picture.clip, SOURCE, **given)


def test_refinement_needs_words_of_the_prompt(picture):
    with pytest.raises(ValueError, match="Attune Mask Refinement"):
        outputs(AttuneMaskRefinement, " ", 0.2, "standard deviations", 0.0, 1, 256)
    refinement = outputs(AttuneMaskRefinement, "dog", 0.2, "standard deviations", 0.0, 1, 256)[0]
    with pytest.raises(ValueError, match="dog"):
        cpam(picture, RIGHT, refinement=refinement)


def test_choices_are_checked(picture):
    with pytest.raises(ValueError, match="goal"):
        outputs(AttuneMaskStrategy, RIGHT, "fly", 8)
    with pytest.raises(ValueError, match="plain_draw"):
        cpam(picture, RIGHT, plain_draw="never")
    with pytest.raises(ValueError, match="source_keys"):
        cpam(picture, RIGHT, source_keys="both")


def test_the_sampler_nodes_it_was_made_for(picture):
    """KSampler draws the same as the custom sampler, on the trajectory's own grid."""
    model, positive = cpam(picture, RIGHT)
    euler = outputs(custom.KSamplerSelect, "euler")[0]
    arguments = model, False, 0, 3.0, positive, picture.text(""), euler, picture.sigmas, picture.noise
    by_custom = outputs(custom.SamplerCustom, *arguments)[0]["samples"]
    assert torch.equal(by_custom, picture.sample(model, positive, guidance=3.0))


def test_mutual_attention_by_lists_of_layers_and_steps(picture):
    """The lists that name what layer, start and end do, draw the same to the bit; others do not."""
    steps = picture.trajectory.steps
    usual = picture.sample(*mutual(picture, 1, start=0.0, layer=10))
    for lists in ({"layers": "10-15"}, {"steps": f"0-{steps - 1}"}, {"layers": "10 11,12-15", "steps": "0-999"}):
        assert torch.equal(picture.sample(*mutual(picture, 1, start=0.0, layer=10, **lists)), usual)
    for lists in ({"layers": "10-14"}, {"steps": "1-999"}, {"reads": "source and itself"}):
        assert not torch.equal(picture.sample(*mutual(picture, 1, start=0.0, layer=10, **lists)), usual)


@pytest.mark.parametrize(
    "lists, sentence",
    [
        ({"layers": "a"}, '"a" is no list of numbers from 0 on .* change layers on Attune Mutual Self-Attention'),
        ({"layers": "5-3"}, "change layers on Attune Mutual Self-Attention"),
        ({"layers": "16"}, "go to 16, but the MODEL has 16 layers"),
        ({"steps": "-1"}, "change steps on Attune Mutual Self-Attention"),
        ({"steps": "500-600"}, "change steps there"),
    ],
)
def test_lists_of_mutual_attention_that_are_none(picture, lists, sentence):
    with pytest.raises(ValueError, match=sentence):
        mutual(picture, 1, **lists)
