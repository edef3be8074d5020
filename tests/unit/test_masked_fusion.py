"""MaSaFusion's attentions as its page prints them in equations 9, 10, 13 and 14, its regions and its start noises."""

import math

import pytest
import torch

from attune.attention_patches import masked_fusion as fusion
from attune.attention_patches.values import QKV, Place, Window

WHOLE = Window(0, 1)
SOURCE, T2I = (fusion.SOURCE, fusion.SOURCE_NEGATIVE), (fusion.INTERMEDIATE, fusion.INTERMEDIATE_NEGATIVE)
# What each prediction attends with, as the page has it: whose Q, K and V. S is the source, T the row itself.
PAGE = {
    "equation 9, outside: (Q^S, K^S, V^S)": (fusion.LikeSource, SOURCE, "SSS"),
    "equation 10, inside: (Q^t2i, K^t2i, V^T)": (fusion.LikeIntermediate, T2I, "IIT"),
    "equation 13: (Q^T, K^S, V^S)": (fusion.FromSource, SOURCE, "TSS"),
}


def rule(kind, window=WHOLE, layer=0):
    return kind(prompt="a part", tokens=None, window=window, layer=layer)


def random_qkv(rows=2):
    return QKV(*torch.randn(3, rows, 12, 8, dtype=torch.float64))


def attended(q, k, v):
    """One head's attention (N, D), token by token in plain floats: softmax(Q K^T / sqrt(d)) V."""
    out = []
    for query in q.tolist():
        scores = [sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(len(query)) for key in k.tolist()]
        weights = [math.exp(s - max(scores)) for s in scores]
        out.append([sum(w * x for w, x in zip(weights, column, strict=True)) / sum(weights) for column in v.T.tolist()])
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("negative", [False, True], ids=["positive", "negative"])
@pytest.mark.parametrize("kind, reads, whose", PAGE.values(), ids=PAGE)
def test_a_prediction_attends_as_the_page_prints_it(kind, reads, whose, negative):
    """Each half of guidance by itself, whatever the other half and any other reference hold."""
    own, *read = (random_qkv() for _ in range(5))
    references = dict(zip((*SOURCE, *T2I), read, strict=True))
    by_name = {"T": own, "S": references[SOURCE[negative]], "I": references[T2I[negative]]}
    place = Place("self", ("middle", 0), 0, (3, 4), 0, 5, negative=negative)
    found = rule(kind).self_attention(place, own, {name: references[name] for name in reads})
    assert rule(kind).reads == reads
    for row in range(2):
        given = [getattr(by_name[one], part)[row] for one, part in zip(whose, "qkv", strict=True)]
        drawn = torch.nn.functional.scaled_dot_product_attention(*(x[row : row + 1] for x in found))[0]
        assert torch.allclose(drawn, attended(*given), atol=1e-12)
        for other in {"SSS", "IIT", "TSS", "TTT", "SST"} - {whose}:
            given = [getattr(by_name[one], part)[row] for one, part in zip(other, "qkv", strict=True)]
            assert (drawn - attended(*given)).abs().max() > 0.1, other


def test_with_the_sources_queries_the_outside_is_the_source_whatever_is_drawn():
    """Equation 9 has nothing of the row that is drawn in it, so what it attends to comes out the same for any."""
    references = {name: random_qkv() for name in SOURCE}
    place = Place("self", ("middle", 0), 0, (3, 4), 0, 5)
    one, other = (rule(fusion.LikeSource).self_attention(place, random_qkv(), references) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    one, other = (rule(fusion.FromSource).self_attention(place, random_qkv(), references) for _ in range(2))
    assert not torch.equal(one.q, other.q)


def test_the_page_is_the_default_outside():
    assert [*fusion.OUTSIDES] == ["source's", "own"]
    assert [*fusion.OUTSIDES.values()] == [fusion.LikeSource, fusion.FromSource]


@pytest.mark.parametrize("kind, reads, whose", PAGE.values(), ids=PAGE)
def test_where_and_when(kind, reads, whose):
    one = rule(kind, Window(0.2, 0.6), layer=3)
    asked = [
        (kind_, number, step)
        for kind_ in ("self", "cross")
        for number in range(6)
        for step in range(10)
        if one.edits(Place(kind_, ("middle", 0), 0, (4, 4), step, 10, number))
    ]
    assert asked == [("self", number, step) for number in (3, 4, 5) for step in (2, 3, 4, 5)]
    assert one.is_part and one.both_halves
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
