"""Editing in turns: what the next source is made of, and that no pixel outside the masks ever changes."""

import pytest
import torch

from attune.inversion import turns
from attune.inversion.trajectory import LearnedWords, Trajectory


def a_mask(height=40, width=56):
    mask = torch.zeros(1, height, width)
    mask[:, 9:31, 12:44] = 1
    mask[:, :4, :7] = 1  # reaches the picture's corner
    mask[:, 35, 50] = 1  # a single pixel
    return mask


@pytest.mark.parametrize("feather", [0, 1, 2, 3, 4, 9, 16, 256])
@pytest.mark.parametrize("masks", [1, 2])
def test_outside_every_pixel_is_the_first_pictures(feather, masks):
    first, finished = torch.rand(2, 2, 40, 56, 3)
    touched = a_mask()
    touched = touched if masks == 1 else torch.cat([touched, touched.flip(1)])
    pasted = turns.paste(first, finished, touched, feather)
    assert pasted.shape == first.shape
    for picture in range(2):
        outside = touched[picture % masks] == 0
        assert torch.equal(pasted[picture][outside], first[picture][outside])
    # Between the two, and never beyond either.
    assert (pasted >= torch.minimum(first, finished) - 1e-6).all()
    assert (pasted <= torch.maximum(first, finished) + 1e-6).all()


def share_of(touched, feather):
    first = torch.zeros(1, *touched.shape[1:], 3)
    return turns.paste(first, first + 1, touched, feather)[0, ..., 0]


def test_without_feather_it_is_cut():
    touched = a_mask()
    assert torch.equal(share_of(touched, 0), touched[0])


@pytest.mark.parametrize("feather", [2, 4, 10])
def test_the_soft_border_lies_inside(feather):
    """A straight edge rises over ``feather`` pixels, from the first one inside."""
    touched = torch.zeros(1, 32, 64)
    touched[..., 20:] = 1
    rise = [min(1.0, (depth + 1) / (feather + 1)) for depth in range(44)]
    assert torch.allclose(share_of(touched, feather)[16], torch.tensor(20 * [0.0] + rise), atol=1e-6)


def test_an_odd_feather_is_no_harder_than_the_one_before():
    touched = torch.zeros(1, 32, 64)
    touched[..., 20:] = 1
    soft = [int(((share_of(touched, f)[16] > 0) & (share_of(touched, f)[16] < 1)).sum()) for f in range(6)]
    assert soft == [0, 2, 2, 4, 4, 6]


@pytest.mark.parametrize("feather", [1, 4, 16])
def test_an_edit_in_a_narrow_mask_is_not_lost(feather):
    touched = torch.zeros(1, 64, 64)
    touched[:, 5:8, 5:60] = 1  # a line
    touched[:, 20:60, 20:60] = 1
    share = share_of(touched, feather)
    assert (share[5:8, 5:60] == 1).all() if feather > 2 else share[6, 30] == 1
    assert share[40, 40] == 1 and 0 < share[20, 40] < 1


def test_a_full_mask_is_the_finished_picture():
    """The picture's own border is no border of the mask."""
    touched = torch.ones(1, 24, 24)
    assert torch.equal(share_of(touched, 8), touched[0])


# ---- the next source ---------------------------------------------------------------------------------------------


def two_ways(pictures=2, steps=3):
    sigmas, text = torch.tensor([9.0, 4.0, 1.0, 0.0]), torch.randn(1, 77, 8)
    source = Trajectory(
        sigmas, torch.randn(steps + 1, pictures, 4, 5, 6), steps + 1, {"method": "ddim", "seed": 3, "prompt": "old"},
        [[text, {}]], [[text, {}]], torch.randn(steps, 1, 77, 8), (0.0, 0.3, 0.6, 1.0),
    )  # fmt: skip
    words = LearnedWords("old", ("old",), ((1,),), {"l": torch.randn(steps, 1, 1, 8)})
    edited = Trajectory(
        sigmas, torch.randn(steps + 1, pictures, 4, 5, 6), steps, {"method": "recorded", "weights": [1.0]},
        [[text, {"mask": 1}]], [], torch.randn(steps, 1, 77, 8), (0.0, 0.3, 0.6, 1.0), words,
    )  # fmt: skip
    return source, edited


@pytest.mark.parametrize("masks", [1, 2])
def test_the_next_source_has_each_ones_way_on_its_side(masks):
    source, edited = two_ways()
    region = torch.zeros(masks, 5, 6)
    region[0, 1:3, 2:5] = 1
    region[-1, 4, 0] = 1
    before = source.latents.clone(), edited.latents.clone()
    text, negative = [[torch.zeros(1, 77, 8), {}]], [[torch.ones(1, 77, 8), {}]]
    made = turns.next_source(source, edited, region, text, negative, "new")
    for picture in range(2):
        inside = region[picture % masks] > 0
        assert torch.equal(made.latents[:, picture][..., inside], edited.latents[:, picture][..., inside])
        assert torch.equal(made.latents[:, picture][..., ~inside], source.latents[:, picture][..., ~inside])
    assert torch.equal(source.latents, before[0]) and torch.equal(edited.latents, before[1])


def test_what_was_learned_for_the_source_is_dropped():
    source, edited = two_ways()
    text, negative = [[torch.zeros(1, 77, 8), {}]], [[torch.ones(1, 77, 8), {}]]
    made = turns.next_source(source, edited, torch.ones(1, 5, 6), text, negative, "new")
    assert made.nulls is None and made.windows == () and made.learned is None
    assert made.conditioning is text and made.negative is negative
    assert made.header == {"method": "turn", "weights": [1.0], "prompt": "new"}
    assert made.steps == source.steps == 4 and torch.equal(made.sigmas, source.sigmas)


# ---- the history -------------------------------------------------------------------------------------------------


def test_turns_add_up():
    left, right = torch.zeros(2, 1, 4, 8)
    left[..., :2], right[..., 1:4] = 1, 1
    first = turns.Turns((turns.Turn("a star", 7, 0.25),), left)
    both = first.then(turns.Turn(None, None, 0.375), right)
    assert first.done == (turns.Turn("a star", 7, 0.25),) and torch.equal(first.touched[0, 0, :3], left[0, 0, :3])
    assert both.touched[0, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    lines = both.text().splitlines()
    assert lines[0] == "1. a star, seed 7, mask 25% of the picture"
    assert lines[1].startswith("2. ") and "None" not in lines[1] and "seed" not in lines[1] and len(lines) == 2
    assert "seed 0" in turns.Turns((turns.Turn("x", 0, 1.0),), left).text()
    # One mask for all pictures, then one for each.
    assert both.then(turns.Turn("x", 1, 0.5), torch.ones(2, 4, 8)).touched.shape == (2, 4, 8)
