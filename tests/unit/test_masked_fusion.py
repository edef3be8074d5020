"""MaSaFusion's two attentions beside its equations 9 and 10, its regions and its start noises."""

import math

import pytest
import torch

from attune.attention_patches import masked_fusion as fusion
from attune.attention_patches.values import QKV, Place, Window

WHOLE = Window(0, 1)
RULES = {
    "outside": (fusion.FromSource, (fusion.SOURCE, fusion.SOURCE_NEGATIVE)),
    "inside": (fusion.LikeIntermediate, (fusion.INTERMEDIATE, fusion.INTERMEDIATE_NEGATIVE)),
}


def rule(kind, window=WHOLE, layer=0):
    return kind(prompt="a part", tokens=None, window=window, layer=layer)


def random_qkv(rows=2):
    return QKV(*torch.randn(3, rows, 12, 8, dtype=torch.float64))


def attended(q, k, v):
    """One head's attention (N, D), token by token in plain floats."""
    out = []
    for query in q.tolist():
        scores = [sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(len(query)) for key in k.tolist()]
        weights = [math.exp(s - max(scores)) for s in scores]
        out.append([sum(w * x for w, x in zip(weights, column, strict=True)) / sum(weights) for column in v.T.tolist()])
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("negative", [False, True], ids=["positive", "negative"])
def test_outside_reads_the_sources_keys_and_values(negative):
    """Equation 9: Attention(Q target, K source, V source), each half of guidance its own."""
    own, source, other = random_qkv(), random_qkv(), random_qkv()
    references = {fusion.SOURCE: source, fusion.SOURCE_NEGATIVE: other}
    read = other if negative else source
    place = Place("self", ("middle", 0), 0, (3, 4), 0, 5, negative=negative)
    found = rule(fusion.FromSource).self_attention(place, own, references)
    for row in range(2):
        by_hand = attended(own.q[row], read.k[row], read.v[row])
        drawn = torch.nn.functional.scaled_dot_product_attention(*(x[row : row + 1] for x in found))[0]
        assert torch.allclose(drawn, by_hand, atol=1e-12)
        assert (drawn - attended(*(x[row] for x in own))).abs().max() > 0.1


@pytest.mark.parametrize("negative", [False, True], ids=["positive", "negative"])
def test_inside_has_the_intermediates_map_on_its_own_values(negative):
    """Equation 10: Attention(Q intermediate, K intermediate, V target), each half of guidance its own."""
    own, led, unled = random_qkv(), random_qkv(), random_qkv()
    references = {fusion.INTERMEDIATE: led, fusion.INTERMEDIATE_NEGATIVE: unled}
    read = unled if negative else led
    place = Place("self", ("middle", 0), 0, (3, 4), 0, 5, negative=negative)
    found = rule(fusion.LikeIntermediate).self_attention(place, own, references)
    for row in range(2):
        by_hand = attended(read.q[row], read.k[row], own.v[row])
        drawn = torch.nn.functional.scaled_dot_product_attention(*(x[row : row + 1] for x in found))[0]
        assert torch.allclose(drawn, by_hand, atol=1e-12)
        assert (drawn - attended(*(x[row] for x in own))).abs().max() > 0.1


@pytest.mark.parametrize("kind, reads", RULES.values(), ids=RULES)
def test_where_and_when(kind, reads):
    one = rule(kind, Window(0.2, 0.6), layer=3)
    asked = [
        (kind_, number, step)
        for kind_ in ("self", "cross")
        for number in range(6)
        for step in range(10)
        if one.edits(Place(kind_, ("middle", 0), 0, (4, 4), step, 10, number))
    ]
    assert asked == [("self", number, step) for number in (3, 4, 5) for step in (2, 3, 4, 5)]
    assert one.reads == reads and one.is_part and one.both_halves
    assert not any(rule(kind, Window(0.5, 0.5)).edits(Place("self", (), 0, (4, 4), step, 10)) for step in range(10))


# ---- regions -----------------------------------------------------------------------------------------------------


def cells_by_hand(mask, size):
    """1 where any pixel of ``mask`` (H, W) that a cell of ``size`` overlaps is 0.5 or more."""
    (height, width), (rows, columns) = mask.shape, size
    return [
        [
            float(
                any(
                    mask[y, x] >= 0.5
                    for y in range(height)
                    for x in range(width)
                    if y * rows < (i + 1) * height and (y + 1) * rows > i * height
                    if x * columns < (j + 1) * width and (x + 1) * columns > j * width
                )
            )
            for j in range(columns)
        ]
        for i in range(rows)
    ]


@pytest.mark.parametrize("size", [(5, 7), (37, 53), (40, 60), (1, 1)], ids=str)
def test_a_region_is_every_cell_with_white_in_it(size):
    mask = torch.zeros(2, 37, 53)
    mask[0, 10, 20:31] = 1
    mask[0, 30:, 50] = 0.49  # gray is black
    mask[1, 0, 0] = 0.5  # and half is white
    mask[1, 20:25, 3:9] = torch.rand(5, 6)
    found = fusion.region(mask, size)
    assert found.shape == (2, *size) and found.dtype == torch.float32
    assert torch.equal(found, torch.tensor([cells_by_hand(one, size) for one in mask]))
    assert found.any() and set(found.unique().tolist()) <= {0.0, 1.0}


def test_one_white_pixel_opens_its_cell_alone():
    mask = torch.zeros(1, 128, 128)
    mask[0, 47, 88] = 1
    found = fusion.region(mask, (16, 16))
    assert found.nonzero().tolist() == [[0, 5, 11]]
    assert torch.equal(fusion.region(mask.half(), (16, 16)), found)


# ---- start noise -------------------------------------------------------------------------------------------------


def test_start_noises():
    gaussian, source = torch.randn(2, 2, 4, 5, 6)
    for inside in (torch.zeros(1, 5, 6), torch.zeros(2, 5, 6)):
        inside[-1, 1:3, 2:] = 1
        mixed = fusion.start_noise(fusion.MIXED, gaussian, source, inside)
        for picture in range(2):
            white = inside[picture % len(inside)] > 0
            assert torch.equal(mixed[picture][:, white], gaussian[picture][:, white])
            assert torch.equal(mixed[picture][:, ~white], source[picture][:, ~white])
        assert torch.equal(fusion.start_noise(fusion.GAUSSIAN, gaussian, source, inside), gaussian)
        assert torch.equal(fusion.start_noise(fusion.INVERTED, gaussian, source, inside), source)
