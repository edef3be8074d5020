"""Masks on grids, attention in parts, refinement, and what goals make of a mask."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attune.attention_patches.maps import grown
from attune.attention_patches.mask_strategy import GOALS, strategy
from attune.attention_patches.masks import Mask, Part, attend_parts, fitted, touched
from attune.attention_patches.refinement import SPREAD, STRETCHED, Found, MaskLog, Refinement, standardised
from attune.attention_patches.region_prompts import RegionPrompts
from attune.attention_patches.values import QKV, Place, apply_map, attention_map
from attune.attention_patches.watch import Lookout, Seen, Watch, WatchedWords

HEADS = 2


def place(grid, kind="self", pictures=(0,), number=0):
    return Place(kind, ("input", 1), 0, grid, 0, 50, number, pictures)


def attend(q, k, v):
    return apply_map(attention_map(q, k, HEADS), v, HEADS)


# ---- grids -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 23), st.integers(1, 23), st.integers(1, 9), st.integers(1, 9), st.integers(0, 9999))
def test_a_token_takes_the_greatest_value_that_it_overlaps(height, width, rows, columns, seed):
    mask = torch.rand(1, height, width, generator=torch.Generator().manual_seed(seed))
    found = touched(mask, (rows, columns)).view(rows, columns)
    for row in range(rows):
        for column in range(columns):
            inside = [
                float(mask[0, y, x])
                for y in range(height)
                for x in range(width)
                # A pixel and a token overlap where each begins before the other ends, in whole numbers.
                if y * rows < (row + 1) * height and (y + 1) * rows > row * height
                if x * columns < (column + 1) * width and (x + 1) * columns > column * width
            ]
            assert float(found[row, column]) == max(inside)


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 40), st.integers(8, 40))
def test_a_mask_of_a_picture_that_was_cut_is_cut_about_its_middle(height, width):
    """To multiples of 8, with the odd pixel off the end; and what was cut is put back where it was."""
    whole = torch.arange(1.0, height * width + 1).view(1, height, width)
    size = height // 8 * 8, width // 8 * 8
    top, left = height % 8 // 2, width % 8 // 2
    middle = whole[:, top : top + size[0], left : left + size[1]]
    assert torch.equal(fitted(whole, size), middle)
    around = fitted(middle, (height, width))
    assert torch.equal(around[:, top : top + size[0], left : left + size[1]], middle)
    assert around.sum() == middle.sum() and around.shape == whole.shape


@pytest.mark.parametrize("size", [(64, 64), (72, 64), (80, 80), (128, 128)], ids=str)
def test_a_mask_of_another_picture_is_left_to_be_scaled(size):
    mask = torch.rand(2, 73, 64)  # of one that a VAE cuts to 72x64
    assert (fitted(mask, size) is mask) == (size != (72, 64))


def test_a_mask_is_cut_where_the_pictures_size_is_known():
    """On every grid by itself, however often it is asked."""
    mask = torch.zeros(1, 71, 71)
    mask[:, :, 3 + 32 : 3 + 40] = 1
    asked, cut = Mask(mask), Mask(mask[:, 3:67, 3:67])
    for grid in ((8, 8), (4, 4), (8, 8)):
        here, there = replace(place(grid), size=(64, 64)), replace(place(grid), size=(128, 128))
        assert torch.equal(asked.on(here), cut.on(place(grid)))
        assert torch.equal(asked.on(there), touched(mask, grid))
        assert torch.equal(asked.on(place(grid)), touched(mask, grid))
        assert asked.on(here).sum() < asked.on(there).sum()

@pytest.mark.parametrize("grid", [(64, 64), (16, 16), (8, 8), (8, 12), (2, 2)], ids=str)
def test_a_thin_mask_is_there_at_every_level(grid):
    line = torch.zeros(1, 512, 512)
    line[0, 300, 100:200] = 1
    found = touched(line, grid).view(grid)
    assert found.sum(0).count_nonzero() >= max(1, grid[1] * 100 // 512) and found.sum(1).count_nonzero() == 1


def test_soft_values_stay_and_rows_find_their_picture():
    mask = Mask(torch.stack([torch.full((4, 4), 0.3), torch.zeros(4, 4)]))
    assert mask.on(place((2, 2), pictures=(1, 0, 1))).tolist() == [[0] * 4, [pytest.approx(0.3)] * 4, [0] * 4]
    assert len(Mask(torch.ones(1, 4, 4)).on(place((2, 2), pictures=(1, 0, 1)))) == 1


# ---- attention in parts ----------------------------------------------------------------------------------------------


def random_qkv(rows=2, tokens=12, channels=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return QKV(*(torch.randn(rows, tokens, channels, generator=generator) for _ in range(3)))


def test_parts_add_up_to_masked_attention():
    """Beside attention with the unread keys' scores at minus infinity, and the weights multiplied on."""
    own, other = random_qkv(), random_qkv(seed=1)
    weight = torch.rand(2, 12, generator=torch.Generator().manual_seed(2))
    weight[:, :3], weight[:, 3:6] = 0, 1
    keys = torch.arange(12)[None].repeat(2, 1) % torch.tensor([[2], [3]]) == 0

    def dense(read, keys):
        p = attention_map(own.q, read.k, HEADS) * keys[:, None, None, :]
        return apply_map(p / p.sum(-1, keepdim=True), read.v, HEADS)

    expected = weight[..., None] * dense(other, keys) + (1 - weight)[..., None] * dense(own, torch.ones(2, 12).bool())
    parts = [Part(weight, keys, other), Part(1 - weight, None, own)]
    assert torch.allclose(attend_parts(attend, own, parts), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_without_a_key_to_read_it_is_plain_attention(dtype):
    own, other = (QKV(*(t.to(dtype) for t in random_qkv(seed=s))) for s in (0, 1))
    whole, none = torch.ones(1, 12), torch.zeros(1, 12).bool()
    out = attend_parts(attend, own, [Part(whole, none, other), Part(1 - whole, ~none, other)])
    assert out.isfinite().all() and torch.equal(out, attend(*own))


def test_on_large_grids_only_what_takes_part_is_computed():
    for tokens, queries in ((600, [200, 400]), (12, [12, 12])):
        own, sizes = random_qkv(rows=1, tokens=tokens), []

        def counting(q, k, v, sizes=sizes):
            sizes.append((q.shape[1], k.shape[1]))
            return attend(q, k, v)

        weight = (torch.arange(tokens) < tokens // 3).float()[None]
        parts = [Part(weight, weight > 0.5, own), Part(1 - weight, weight < 0.5, own)]
        out = attend_parts(counting, own, parts)
        assert [q for q, _ in sizes] == queries and [k for _, k in sizes] == [tokens // 3, tokens - tokens // 3]
        inside = [QKV(own.q, *(t[:, part.keys[0]] for t in own[1:])) for part in parts]
        dense = [attend(*one) for one in inside]
        assert torch.allclose(out, torch.where(weight[..., None] > 0, *dense), atol=1e-5)


# ---- region prompts --------------------------------------------------------------------------------------------------


def regions(*masks):
    lengths = (3,) * (len(masks) + 1)
    return RegionPrompts(prompt="x", tokens=sum(lengths), lengths=lengths, regions=tuple(Mask(m[None]) for m in masks))


def test_each_region_reads_its_own_prompt():
    """Beside attention to each prompt alone."""
    q, texts = torch.randn(1, 4, 8), [torch.randn(1, 3, 8) for _ in range(3)]
    left, top = torch.tensor([[1.0, 0], [1, 0]]), torch.tensor([[1.0, 1], [0, 0]])
    joined = torch.cat(texts, 1)
    own = QKV(q, joined, joined)
    out = regions(left, top).cross_output(place((2, 2), "cross"), None, own, {}, attend, None)
    everywhere, by_left, by_top = (attend(q, text, text) for text in texts)
    expected = [(by_left + by_top)[:, 0] / 2, by_top[:, 1], by_left[:, 2], everywhere[:, 3]]
    assert torch.allclose(out, torch.stack(expected, 1), atol=1e-5)
    added = attend(*own) + 3.0  # what another pack makes of plain attention
    beside = regions(left, top).cross_output(place((2, 2), "cross"), added, own, {}, attend, None)
    assert torch.allclose(beside, out + 3.0, atol=1e-5)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=4))
def test_shares_add_up_to_one(values):
    controller = regions(*(torch.full((2, 2), v) for v in values))
    shares = controller.shares(place((2, 2), "cross"))
    assert torch.allclose(shares.sum(0), torch.ones(1, 4)) and (shares >= 0).all()
    assert float(shares[0, 0, 0]) == pytest.approx(max(0.0, 1 - sum(values)), abs=1e-5)


# ---- refinement ------------------------------------------------------------------------------------------------------


def blob(size=16, height=1.0, at=(5, 9)):
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return height * torch.exp(-((y - at[0]) ** 2 + (x - at[1]) ** 2) / 8.0)[None]


@pytest.mark.parametrize("standardisation", [STRETCHED, SPREAD])
def test_standardised_maps_do_not_know_their_scale(standardisation):
    heat = blob()
    one, other = (standardised(h, standardisation) for h in (heat, 7 * heat + 3))
    assert torch.allclose(one, other, atol=1e-4)
    if standardisation == SPREAD:
        assert abs(float(one.mean())) < 1e-5 and float(one.std()) == pytest.approx(1, abs=1e-4)
    assert not standardised(torch.full((1, 4, 4), 0.2), standardisation).any()


def test_a_refined_mask_stands_where_the_words_look_and_grows():
    tight, loose = (Refinement(("x",), threshold=1.0, grow=g).refine(blob()) for g in (0, 1))
    assert tight[0, 5, 9] == 1 and tight[0, 15, 0] == 0
    assert torch.equal(loose, torch.nn.functional.max_pool2d(tight, 3, 1, 1)) and loose.sum() > tight.sum()


def test_it_waits_and_reads_only_the_steps_before():
    one, heat = Refinement(("x",), after=0.2), torch.zeros(4, 1, 16, 16)
    heat[1] = blob()[0]
    assert one.find(9, 50, Seen(heat)) is None and one.find(10, 50, Seen(None, heat)) is None
    assert torch.equal(one.find(10, 50, Seen(heat)), one.refine(blob()))
    assert Refinement(("x",), after=1.0).watch is None


def test_the_log_knows_a_sampling_by_its_latent():
    log, latents = MaskLog(), [torch.full((1, 4, 2, 2), float(i)) for i in range(6)]
    for i, latent in enumerate(latents):
        log.keep(latent, Found(torch.full((1, 1, 4, 4), float(i)), (3,), 5))
    assert float(log.masks(latents[5].clone()).masks.mean()) == 5 and log.masks(latents[0]) is None
    assert log.masks(torch.zeros(1)) is None and log.masks(latents[4]).last((2, 3)).shape == (1, 2, 3)


# ---- looking on ------------------------------------------------------------------------------------------------------


class Watcher:
    prompt = "x"
    watch = Watch(WatchedWords((1,), (2,)), reference="source")


def test_the_lookout_tells_steps_and_layers_apart():
    watcher = Watcher()
    lookout = Lookout({watcher: (2, 2)})
    cross = [place((2, 2), "cross", number=n) for n in range(3)]
    assert lookout.at(cross[0]) == [watcher] == lookout.at(cross[0], "x") and not lookout.at(cross[0], "y")
    assert not lookout.at(place((2, 2))) and not lookout.at(place((4, 4), "cross"))
    maps = [torch.rand(2, HEADS, 4, 3) for _ in range(4)]
    # Two rows that draw pictures 1 and 0.
    lookout.add(watcher, cross[0], maps[0], maps[1], (1, 0), 2)
    lookout.add(watcher, cross[2], maps[2], maps[3], (1, 0), 2)
    assert lookout.seen(watcher).before is None and lookout.seen(watcher, cross[0]).now is None
    first = lookout.seen(watcher, cross[1]).now
    assert torch.equal(first[0, 1].flatten(), maps[0][0, :, :, 1].mean(0)) and not first[2:].any()
    assert torch.allclose(first[1, 0].flatten(), maps[1][1, :, :, 2].mean(0))
    whole = lookout.seen(watcher).now
    assert torch.allclose(whole[0, 1].flatten(), (maps[0] + maps[2])[0, :, :, 1].mean(0))
    lookout.next_step()
    assert lookout.seen(watcher).now is None and torch.equal(lookout.seen(watcher).before, whole)
    lookout.next_step()
    assert torch.equal(lookout.seen(watcher).all, whole)


# ---- strategies ------------------------------------------------------------------------------------------------------


def test_what_goals_make_of_a_mask():
    mask = torch.zeros(1, 32, 32)
    mask[0, 10:20, 12:22] = 1
    loose, none = grown(mask, 3), torch.zeros_like(mask)
    expected = {
        "replace object": (loose, loose, False),
        "change pose or view": (mask, loose, True),
        "edit inside": (mask, mask, False),
        "add": (mask, mask, False),
        "remove": (loose, none, False),
        "change background": (1 - mask, 1 - mask, False),
    }
    assert set(expected) == set(GOALS)
    for goal, (source, target, keep) in expected.items():
        made = strategy(mask, goal, 3)
        assert torch.equal(made.source, source) and torch.equal(made.target, target) and made.keep_object is keep
    assert math.prod(loose.shape) > loose.sum() > mask.sum()
