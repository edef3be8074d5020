"""Outlines of pictures whose edges are known."""

import time

import pytest
import torch
from kornia.filters import canny
from torch.nn import functional as F

from attune.attention_patches.sketch import connected, outlines


def halves(left, right, height=32, width=48, at=20):
    """A picture of two colours, with the border in front of column ``at``."""
    picture = torch.empty(1, height, width, 3)
    picture[:, :, :at], picture[:, :, at:] = torch.tensor(left), torch.tensor(right)
    return picture


def columns(lines):
    """The columns that hold a line, of which every row must have one."""
    assert lines[0].any(1).all(), "the line has gaps"
    return lines[0].any(0).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("smooth", [0.0, 1.0, 3.0])
def test_a_step_is_found_where_it_is(smooth):
    for picture, turn in ((halves((0.0,) * 3, (1.0,) * 3), False), (halves((0.9,) * 3, (0.2,) * 3), True)):
        lines = outlines(picture.transpose(1, 2) if turn else picture, 0.2, smooth, 1)
        lines = lines.transpose(1, 2) if turn else lines
        assert set(columns(lines)) <= {19, 20}
        assert set(lines.unique().tolist()) == {0.0, 1.0} and lines.dtype == torch.float32


def test_two_colours_of_one_brightness():
    """Their gray is the same: 0.299 of red, 0.587 of green."""
    assert set(columns(outlines(halves((1.0, 0.0, 0.0), (0.0, 0.299 / 0.587, 0.0)), 0.2, 1.0, 1))) <= {19, 20}


@pytest.mark.parametrize("channel", range(3))
@pytest.mark.parametrize("smooth", [0.0, 1.0, 2.5])
def test_the_threshold_is_a_step_in_a_colour(channel, smooth):
    """Whatever the blur: a step of just less gives no line, of just more a whole one."""
    dark, light = [0.3] * 3, [0.3] * 3
    light[channel] += 0.4
    picture = halves(dark, light)
    assert not outlines(picture, 0.42, smooth, 1).any()
    assert set(columns(outlines(picture, 0.38, smooth, 1))) <= {19, 20}


def test_a_blur_leaves_textures_out_and_edges_in():
    picture = halves((0.0,) * 3, (0.6,) * 3)
    picture[:, ::2, 24:] += 0.4  # stripes a pixel wide
    assert outlines(picture, 0.2, 0.0, 1)[..., 26:].any()
    soft = outlines(picture, 0.2, 2.0, 1)
    assert not soft[..., 26:].any() and soft[..., 17:23].any(-1).all()


@pytest.mark.parametrize("width", [1, 2, 3, 6])
def test_lines_are_as_wide_as_told(width):
    """In the middle of a thin line's place, to half a pixel."""
    picture = halves((0.0,) * 3, (1.0,) * 3)
    thin = columns(outlines(picture, 0.2, 1.0, 1))
    wide = columns(outlines(picture, 0.2, 1.0, width))
    assert len(wide) == len(thin) + width - 1 and wide == list(range(wide[0], wide[-1] + 1))
    assert abs((wide[0] + wide[-1]) - (thin[0] + thin[-1])) <= 1


def test_nothing_to_see():
    for flat in (torch.zeros(1, 16, 16, 3), torch.full((2, 16, 16, 3), 0.7)):
        assert not outlines(flat, 0.2, 1.0, 2).any() and not outlines(flat, 0.0, 1.0, 2).any()


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (17, 33), (64, 64)], ids=str)
def test_a_batch_of_any_size_is_its_pictures(size):
    pictures = torch.rand(3, *size, 3, generator=torch.Generator().manual_seed(0))
    assert outlines(pictures, 0.3, 20.0, 2).shape == (3, *size)  # a blur wider than the picture
    lines = outlines(pictures, 0.3, 1.0, 2)
    assert lines.shape == (3, *size) and lines.isfinite().all()
    for picture, line in zip(pictures, lines, strict=True):
        assert torch.equal(outlines(picture[None], 0.3, 1.0, 2)[0], line)


def test_half_precision_and_alpha():
    picture = halves((0.25, 0.5, 0.0), (0.75, 0.5, 0.0))
    lines = outlines(picture, 0.3, 1.0, 2)
    assert torch.equal(outlines(picture.half(), 0.3, 1.0, 2), lines)
    alpha = torch.zeros(1, 32, 48, 1)
    alpha[:, 10:] = 1  # an edge that is no colour's
    assert torch.equal(outlines(torch.cat([picture, alpha], -1), 0.3, 1.0, 2), lines)


# ---- hysteresis --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (17, 33), (48, 48)], ids=str)
@pytest.mark.parametrize("smooth", [0.5, 2.0])
def test_weak_edges_stay_where_kornia_keeps_them(size, smooth):
    """Noise at several scales, so that chains of weak edges of all lengths hang on strong ones or on none."""
    generator = torch.Generator().manual_seed(0)
    grids = [[-(-side // n) for side in size] for n in (1, 4, 9)]
    pictures = sum(F.interpolate(torch.rand(4, 1, *grid, generator=generator), size) for grid in grids)
    kernel = (3, 3) if min(size) > 2 else (1, 1)
    settings = pictures, 0.3, 1.1, kernel, (smooth, smooth)
    apart, whole = (canny(*settings, hysteresis=on)[1][:, 0] for on in (False, True))
    assert torch.equal(connected(apart), whole)
    assert set(apart.unique().tolist()) <= {0.0, 0.5, 1.0} and (min(size) < 9 or (apart == 0.5).any())


def test_a_chain_is_kept_from_its_strong_end_and_stays_in_its_picture():
    edges = torch.zeros(3, 4, 6)
    edges[0] = torch.tensor([[0.5, 0, 0, 0, 0, 0.5], [0, 0.5, 0, 0.5, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0.5, 0]])
    edges[1, 2, 2] = 0.5  # below the strong one of the picture before
    edges[2] = 0.5  # a whole field of weak ones
    kept = connected(edges)
    assert kept.dtype == torch.float32 and not kept[1:].any()
    assert kept[0].nonzero().tolist() == [[0, 0], [1, 1], [1, 3], [2, 2]]  # diagonals hang together


def test_a_long_chain_takes_no_longer_than_a_short_one():
    """A line that winds through the whole picture, strong at one end: 700000 pixels one after the other."""
    edges = torch.zeros(1, 1200, 1200)
    edges[:, ::2] = 0.5
    edges[:, 1::4, -1] = edges[:, 3::4, 0] = 0.5
    edges[0, 0, 0] = 1
    start = time.process_time()
    kept = connected(edges)
    assert time.process_time() - start < 5
    assert torch.equal(kept, (edges > 0).float())
