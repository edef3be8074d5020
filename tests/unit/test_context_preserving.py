"""Context-Preserving Adaptive Manipulation (CPAM) beside its equations, looped over tokens and keys in plain floats."""

import math

import pytest
import torch
from torch.nn import functional as F

from attune.attention_patches.context_preserving import ContextPreserving
from attune.attention_patches.controller import NULL
from attune.attention_patches.masks import Mask
from attune.attention_patches.values import QKV, Place, split_heads

HEADS, WIDTH = 2, 8
SAME, SEEN = 1e-6, 1e-2  # both sides are in double precision, but the masks' values are not


# ---- the equations, in plain floats -------------------------------------------------------------------------------


def values_under(mask, grid):
    """The greatest value of ``mask`` (H, W) under each token of ``grid`` (h, w): a list of h * w floats."""
    height, width = mask.shape
    rows, columns = grid
    return [
        max(
            float(mask[y, x])
            for y in range(height)
            for x in range(width)
            # Pixel y reaches from y / height to (y + 1) / height, token i from i / rows to (i + 1) / rows.
            if y * rows < (i + 1) * height and (y + 1) * rows > i * height
            if x * columns < (j + 1) * width and (x + 1) * columns > j * width
        )
        for i in range(rows)
        for j in range(columns)
    ]


def attended(query, keys, values, among):
    """One head's attention of one query (D,) over the keys numbered ``among``: D floats."""
    scores = [sum(a * b for a, b in zip(query, keys[n], strict=True)) / math.sqrt(len(query)) for n in among]
    weights = [math.exp(s - max(scores)) for s in scores]
    read = [[w * x for x in values[n]] for w, n in zip(weights, among, strict=True)]
    return [sum(column) / sum(weights) for column in zip(*read, strict=True)]


def per_head(x, head):
    """(N, C) as N lists of one head's D floats."""
    size = x.shape[-1] // HEADS
    return x[:, head * size : (head + 1) * size].tolist()


def self_by_hand(own, source, source_mask, target_mask, grid, kept=False, keys_by_target=False):
    """Equations 1 to 3 for one picture, (N, C); ``own`` and ``source`` are q, k, v of shape (N, C).

    A set of keys without any is no attention at all; there the target attends as ever.
    """
    tokens = range(len(own.q))
    object_keys = [n for n, m in enumerate(values_under(source_mask, grid)) if m >= 0.5]
    background_keys = [n for n in tokens if n not in object_keys]
    if keys_by_target:
        object_keys = [n for n, m in enumerate(values_under(target_mask, grid)) if m >= 0.5]
    weight = values_under(target_mask, grid)
    heads = []
    for head in range(HEADS):
        q, k, v, source_k, source_v = (per_head(x, head) for x in (*own, source.k, source.v))
        out = []
        for n in tokens:
            plain = attended(q[n], k, v, tokens)
            background = attended(q[n], source_k, source_v, background_keys) if background_keys else plain
            thing = attended(q[n], source_k, source_v, object_keys) if kept and object_keys else plain
            out.append([weight[n] * f + (1 - weight[n]) * b for f, b in zip(thing, background, strict=True)])
        heads.append(torch.tensor(out))
    return torch.cat(heads, -1)


def cross_by_hand(own, null, target_mask, grid):
    """Equation 4 for one picture, (N, C). ``own`` is q (N, C), k and v (T, C) under its prompt, ``null`` under ""."""
    weight, heads = values_under(target_mask, grid), []
    for head in range(HEADS):
        q, k, v, null_k, null_v = (per_head(x, head) for x in (*own, null.k, null.v))
        out = []
        for n, w in enumerate(weight):
            texts = attended(q[n], k, v, range(len(k))), attended(q[n], null_k, null_v, range(len(null_k)))
            out.append([w * a + (1 - w) * b for a, b in zip(*texts, strict=True)])
        heads.append(torch.tensor(out))
    return torch.cat(heads, -1)


# ---- what the pack makes of the same ------------------------------------------------------------------------------


def attend(q, k, v):
    q, k, v = (split_heads(x, HEADS) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def place(kind="self", grid=(4, 4), step=30, number=12, pictures=(0,), **more):
    return Place(kind, ("output", 6), 0, grid, step, 50, number=number, pictures=pictures, **more)


def editing(source_mask, target_mask, keys_by_target=False, plain_share=0.0, **settings):
    source, target = Mask(source_mask), Mask(target_mask)
    keys = target if keys_by_target else source
    return ContextPreserving(
        prompt="x", tokens=7, source_mask=source, target_mask=target, object_keys=keys, plain_share=plain_share,
        **settings,
    )  # fmt: skip


def layer(tokens, rows=1, texts=None, seed=0, dtype=torch.float64):
    """q, k, v of rows x tokens, spread enough for attention to have a sharp opinion."""
    generator = torch.Generator().manual_seed(seed)
    counts = tokens, texts or tokens, texts or tokens
    return QKV(*(2 * torch.randn(rows, n, WIDTH, generator=generator, dtype=torch.float64).to(dtype) for n in counts))


def pictured(own, row):
    return QKV(*(x[row].double() for x in own))


def box(top, bottom, left, right, size=(32, 32), value=1.0):
    mask = torch.zeros(1, *size)
    mask[:, top:bottom, left:right] = value
    return mask


def soft(size=(32, 32)):
    """A mask whose values run from 0 to 1 and that has both ends."""
    ramp = torch.linspace(-0.3, 1.3, size[1]).clamp(0, 1)
    return ramp.expand(1, *size) * (torch.arange(size[0]) > 5)[:, None]


OBJECT, ELSEWHERE = box(3, 18, 5, 20), box(10, 27, 9, 30)
NOTHING, ALL = box(0, 0, 0, 0), box(0, 32, 0, 32)
LINE = box(0, 32, 13, 14)  # one pixel wide


def apart(a, b):
    return float((a - b).abs().max())


def both(source_mask, target_mask, grid=(4, 4), **settings):
    """A self-attention layer's output by the pack and by hand, (N, C) both."""
    own, source = layer(grid[0] * grid[1], seed=1), layer(grid[0] * grid[1], seed=2)
    chosen = {"keep_object": settings.get("kept", False), "keys_by_target": settings.get("keys_by_target", False)}
    edit = editing(source_mask, target_mask, **chosen)
    ours = edit.self_output(place(grid=grid), own, {NULL: source}, attend, None)
    hand = pictured(own, 0), pictured(source, 0), source_mask[0], target_mask[0]
    return ours[0], self_by_hand(*hand, grid, **settings), self_by_hand(*hand, grid)


# ---- equations 1 to 3 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"kept": True}, {"kept": True, "keys_by_target": True}])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (7, 2)])
@pytest.mark.parametrize("target", [OBJECT, ELSEWHERE, soft(), LINE], ids=["same", "other", "soft", "thin"])
def test_self_attention_is_the_equations(target, grid, settings):
    ours, theirs, replaced = both(OBJECT, target, grid, **settings)
    assert apart(ours, theirs) < SAME
    if settings:
        assert apart(theirs, replaced) > SEEN


@pytest.mark.parametrize("size", [(37, 29), (2, 3), (64, 16)])
def test_masks_of_any_size_on_any_grid(size):
    height, width = size
    sharp = box(0, height // 2, 0, width // 3 + 1, size)
    for grid in ((4, 4), (3, 5)):
        for masks in ((sharp, soft(size)), (soft(size), sharp)):
            ours, theirs, _ = both(*masks, grid, kept=True)
            assert apart(ours, theirs) < SAME


def test_where_the_objects_keys_are_taken_from_is_seen():
    by_source, by_target = (both(OBJECT, ELSEWHERE, kept=True, keys_by_target=way)[0] for way in (False, True))
    assert apart(by_source, by_target) > SEEN


@pytest.mark.parametrize(
    ("source", "target"),
    [(NOTHING, OBJECT), (ALL, OBJECT), (NOTHING, NOTHING), (ALL, NOTHING), (NOTHING, ALL), (ALL, ALL), (OBJECT, ALL)],
)
@pytest.mark.parametrize("kept", [False, True])
def test_empty_and_full_masks(source, target, kept):
    ours, theirs, _ = both(source, target, kept=kept)
    assert apart(ours, theirs) < SAME


def test_without_keys_to_read_attention_is_plain_and_not_even():
    own, source = layer(16, seed=1), layer(16, seed=2)
    plain = attend(*own)
    edit = editing(ALL, NOTHING)  # a source without background, of which all is to be background
    out = edit.self_output(place(), own, {NULL: source}, attend, None)
    assert apart(out, plain) < SAME
    even = source.v.mean(1, keepdim=True).expand_as(plain)
    assert apart(plain, even) > SEEN


def test_a_mask_that_only_the_coarsest_level_fills():
    """Empty sets come and go with the level: 7 of 8 columns leave a background at 8x8 and none at 2x2."""
    wide = box(0, 32, 0, 28)
    for grid, background in (((8, 8), True), ((2, 2), False)):
        ours, theirs, _ = both(wide, NOTHING, grid)
        assert apart(ours, theirs) < SAME
        assert (apart(ours, attend(*layer(grid[0] * grid[1], seed=1))[0]) > SEEN) == background


def test_a_thin_line_is_there_at_every_level():
    for grid in ((16, 16), (8, 8), (4, 4), (2, 2)):
        own, source = layer(grid[0] * grid[1], seed=1), layer(grid[0] * grid[1], seed=2)
        out = editing(LINE, LINE).self_output(place(grid=grid), own, {NULL: source}, attend, None)
        column = 13 * grid[1] // 32
        lines = (x.unflatten(1, grid)[:, :, column] for x in (out, attend(*own)))
        assert apart(*lines) < SAME


@pytest.mark.parametrize("pictures", [(0, 1), (1, 0), (1, 1, 0)])
def test_pictures_of_a_batch_have_masks_of_their_own(pictures):
    sources, targets = torch.cat([OBJECT, LINE]), torch.cat([ELSEWHERE, soft()])
    rows = len(pictures)
    own, source = layer(16, rows, seed=1), layer(16, rows, seed=2)
    edit = editing(sources, targets, keep_object=True)
    out = edit.self_output(place(pictures=pictures), own, {NULL: source}, attend, None)
    for row, picture in enumerate(pictures):
        hand = pictured(own, row), pictured(source, row), sources[picture], targets[picture]
        assert apart(out[row], self_by_hand(*hand, (4, 4), kept=True)) < SAME
        other = *hand[:2], sources[1 - picture], targets[1 - picture]
        assert apart(out[row], self_by_hand(*other, (4, 4), kept=True)) > SEEN


def test_one_mask_serves_all_pictures_and_a_target_may_differ_beside_it():
    own, source = layer(16, 2, seed=1), layer(16, 2, seed=2)
    edit = editing(OBJECT, torch.cat([ELSEWHERE, soft()]))
    out = edit.self_output(place(pictures=(0, 1)), own, {NULL: source}, attend, None)
    for row, target in enumerate((ELSEWHERE, soft())):
        hand = self_by_hand(pictured(own, row), pictured(source, row), OBJECT[0], target[0], (4, 4))
        assert apart(out[row], hand) < SAME


@pytest.mark.parametrize(("step", "number", "kept"), [(3, 12, False), (4, 8, False), (4, 9, True), (49, 15, True)])
def test_an_object_is_kept_after_step_3_and_layer_8(step, number, kept):
    own, source = layer(16, seed=1), layer(16, seed=2)
    edit = editing(OBJECT, ELSEWHERE, keep_object=True)
    out = edit.self_output(place(step=step, number=number), own, {NULL: source}, attend, None)[0]
    hand = pictured(own, 0), pictured(source, 0), OBJECT[0], ELSEWHERE[0], (4, 4)
    assert apart(out, self_by_hand(*hand, kept=kept)) < SAME
    assert apart(out, self_by_hand(*hand, kept=not kept)) > SEEN


@pytest.mark.parametrize("masks", [(OBJECT, ELSEWHERE), (NOTHING, OBJECT), (ALL, soft()), (ALL, NOTHING)])
def test_half_precision_stays_finite(masks):
    own, source = (layer(16, seed=seed, dtype=torch.float16) for seed in (1, 2))
    edit = editing(*masks, keep_object=True)
    out = edit.self_output(place(), own, {NULL: source}, attend, None)
    assert out.dtype == torch.float16 and out.isfinite().all()
    hand = self_by_hand(pictured(own, 0), pictured(source, 0), *(m[0] for m in masks), (4, 4), kept=True)
    assert apart(out[0].double(), hand) < SEEN


# ---- equation 4 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
@pytest.mark.parametrize("target", [ELSEWHERE, soft(), LINE, NOTHING, ALL])
def test_localized_extraction_is_the_equation(target, grid, negative):
    """In either guidance half, whatever prompt the row has."""
    own, null = layer(grid[0] * grid[1], texts=7, seed=3), layer(grid[0] * grid[1], texts=5, seed=4)
    edit = editing(OBJECT, target)
    here = place("cross", grid, negative=negative)
    out = edit.cross_output(here, attend(*own), own, {NULL: null}, attend, None)[0]
    assert apart(out, cross_by_hand(pictured(own, 0), pictured(null, 0), target[0], grid)) < SAME
    assert edit.both_halves
    nowhere = cross_by_hand(pictured(own, 0), pictured(null, 0), NOTHING[0], grid)
    assert (apart(out, nowhere) > SEEN) == bool(target.any())


def test_what_another_pack_added_to_the_prompt_stays_inside():
    """The output that is localized is the one that the layer would put out, not the prompt's alone."""
    own, null = layer(16, texts=7, seed=3), layer(16, texts=5, seed=4)
    out = editing(OBJECT, ELSEWHERE).cross_output(place("cross"), attend(*own) + 5, own, {NULL: null}, attend, None)[0]
    weight = torch.tensor(values_under(ELSEWHERE[0], (4, 4)))[:, None]
    plain = cross_by_hand(pictured(own, 0), pictured(null, 0), ELSEWHERE[0], (4, 4))
    assert apart(out, plain + 5 * weight) < SAME


def test_localized_extraction_in_a_batch_and_in_half_precision():
    targets = torch.cat([ELSEWHERE, soft()])
    own, null = (layer(16, 2, texts, seed=texts, dtype=torch.float16) for texts in (7, 5))
    edit = editing(OBJECT, targets)
    out = edit.cross_output(place("cross", pictures=(1, 0)), attend(*own), own, {NULL: null}, attend, None)
    assert out.dtype == torch.float16
    for row, picture in enumerate((1, 0)):
        hand = cross_by_hand(pictured(own, row), pictured(null, row), targets[picture], (4, 4))
        assert apart(out[row].double(), hand) < SEEN


# ---- the tenth of the layers ---------------------------------------------------------------------------------------


def drawn(steps=50, layers=16, **settings):
    """The (step, layer) of self-attention that are left alone."""
    edit = editing(OBJECT, OBJECT, **settings)
    acts = {(s, n): edit.edits(place(step=s, number=n)) for s in range(steps) for n in range(layers)}
    return {at for at, acting in acts.items() if not acting}


def test_a_tenth_of_the_layers_is_left_alone():
    left = drawn(plain_share=0.1)
    assert 50 < len(left) < 110  # of 800; the spread is 8.5
    assert left == drawn(plain_share=0.1) and left != drawn(plain_share=0.1, seed=1)
    assert len({n for _, n in left}) == 16 and len({s for s, _ in left}) > 30
    assert not drawn(plain_share=0.0) and len(drawn(plain_share=1.0)) == 800
    edit = editing(OBJECT, OBJECT, plain_share=1.0)
    assert edit.edits(place("cross"))  # what is left alone is self-attention


def test_the_tenth_may_be_drawn_once():
    left = drawn(plain_share=0.3, plain_every_step=False)
    layers = {n for _, n in left}
    assert left == {(s, n) for s in range(50) for n in layers} and 0 < len(layers) < 16
    counts = [len(drawn(1, plain_share=0.1, plain_every_step=False, seed=seed)) for seed in range(200)]
    assert sum(counts) / 200 == pytest.approx(1.6, abs=0.4)  # of 16; the spread of the mean is 0.08


def test_a_target_of_everything_is_no_edit():
    assert not any(editing(OBJECT, ALL).edits(place(kind)) for kind in ("self", "cross"))
    assert editing(OBJECT, ALL, keep_object=True).edits(place())


@pytest.mark.parametrize(("off", "left"), [("preservation", "cross"), ("extraction", "self")])
def test_a_module_that_is_off_leaves_its_attention_alone(off, left):
    edit = editing(OBJECT, OBJECT, **{off: False})
    assert [kind for kind in ("self", "cross") if edit.edits(place(kind))] == [left]
