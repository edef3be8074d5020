"""A picture's background out of clusters and where nouns look, against loops over places."""

import pytest
import torch

from attune.attention_patches.background import NOBODY, agreement, forbidden, masks, owners


def example(grid=(8, 6), small=(4, 3), nouns=3, count=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(nouns, *small, generator=generator) * torch.tensor([1.0, 0.2, 0.01])[:nouns, None, None]
    return maps + 0.001, torch.randint(count, (grid[0] * grid[1],), generator=generator)


@pytest.mark.parametrize("grid", [(8, 6), (4, 3), (7, 5)], ids=str)
def test_agreement_is_the_papers(grid):
    """The map enlarged by repetition, lowered by its least and divided by its greatest value, and averaged."""
    maps, labels = example(grid)
    scores = agreement(maps, labels, grid, 6)
    for noun, seen in enumerate(maps.tolist()):
        flat = [v for row in seen for v in row]
        sums, sizes = [0.0] * 6, [0] * 6
        for token, label in enumerate(labels.tolist()):
            y, x = divmod(token, grid[1])
            value = seen[int((y + 0.5) * 4 / grid[0])][int((x + 0.5) * 3 / grid[1])]
            sums[label] += (value - min(flat)) / max(flat)
            sizes[label] += 1
        expected = [a / max(1, b) for a, b in zip(sums, sizes, strict=True)]
        assert scores[noun].tolist() == pytest.approx(expected, abs=1e-5)
    assert scores[:, 5].eq(0).all()  # a cluster without a place


def test_agreement_is_not_stretched_to_1():
    """A noun that sees everything almost alike owns nothing, as it would if its map were stretched to 0..1."""
    maps = torch.full((1, 2, 2), 0.9)
    maps[0, 0, 0] = 1.0
    labels = torch.tensor([0, 1, 1, 1])
    assert agreement(maps, labels, (2, 2), 2)[0].tolist() == pytest.approx([0.1, 0.0], abs=1e-6)


def test_a_flat_map_agrees_with_nothing():
    labels = torch.tensor([0, 0, 1, 1])
    for value in (0.0, 0.5):
        scores = agreement(torch.full((2, 2, 2), value), labels, (2, 2), 2)
        assert scores.eq(0).all()


def test_owners_are_those_that_agree_most():
    scores = torch.tensor([[0.5, 0.1, 0.2, 0.3], [0.4, 0.15, 0.1, 0.6]])
    found, said = owners(scores, 0.2)
    # The third is on the threshold, which is not above it.
    assert found.tolist() == [0, NOBODY, NOBODY, 1] and said == ""
    assert owners(scores, 0.19)[0].tolist() == [0, NOBODY, 0, 1]


def test_a_tie_goes_to_the_first_noun():
    scores = torch.tensor([[0.5, 0.0, 0.3], [0.5, 0.0, 0.3], [0.4, 0.0, 0.5]])
    assert owners(scores, 0.2)[0].tolist() == [0, NOBODY, 2]


def sentence(text, threshold, remedy):
    assert text.endswith(f"; {remedy}.") and ". " not in text and f"above {threshold:g}" in text


def test_without_a_background_the_part_least_agreed_with_is_it():
    scores = torch.tensor([[0.5, 0.1, 0.2], [0.4, 0.15, 0.6]])
    found, said = owners(scores, 0.05)
    assert found.tolist() == [0, NOBODY, 1]
    sentence(said, 0.05, "raise the threshold or the number of clusters")


def test_without_objects_each_noun_has_the_part_it_agrees_with_most():
    scores = torch.tensor([[0.5, 0.1, 0.2], [0.4, 0.15, 0.6]])
    found, said = owners(scores, 0.9)
    assert found.tolist() == [0, NOBODY, 1]
    sentence(said, 0.9, "lower the threshold")
    assert scores.tolist() == torch.tensor([[0.5, 0.1, 0.2], [0.4, 0.15, 0.6]]).tolist()


@pytest.mark.parametrize("size", [(64, 48), (8, 6), (60, 50)], ids=str)
def test_masks_are_the_owners_places(size):
    _, labels = example()
    whose = torch.tensor([1, NOBODY, 0, NOBODY, 1])
    found = masks(labels, whose, 3, (8, 6), size)
    assert found.shape == (4, *size)
    for y in range(size[0]):
        for x in range(size[1]):
            token = int((y + 0.5) * 8 / size[0]) * 6 + int((x + 0.5) * 6 / size[1])
            owner = int(whose[labels[token]])
            assert found[:, y, x].tolist() == [float(owner == who) for who in (NOBODY, 0, 1, 2)]
    assert found[3].eq(0).all()  # a noun that owns nothing


BACKGROUND = torch.tensor([[0.0, 0.5, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]])
OWN = torch.tensor([[1.0, 0.25, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1.0], [0, 0, 1.0, 1.0]])


def test_what_nouns_must_not_look_at():
    assert forbidden(None, None, 2, 3) == [None] * 3
    both = forbidden(BACKGROUND, None, 2, 2)
    assert [f.tolist() for f in both] == [[row, row] for row in BACKGROUND.tolist()]
    shared = forbidden(BACKGROUND[:1], None, 3, 2)
    assert [f.shape for f in shared] == [(3, 4)] * 2 and torch.equal(shared[0], shared[1])


def test_a_noun_keeps_to_its_own_place():
    """But one whose mask is black keeps out of the background, or, without one, may look everywhere."""
    one, two = forbidden(BACKGROUND, OWN, 2, 2)
    assert one.tolist() == [[0.0, 0.75, 1.0, 1.0], BACKGROUND[0].tolist()]
    assert two.tolist() == [[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]]
    bare = forbidden(None, OWN[:2], 2, 2)  # the same masks for both pictures
    assert [f.tolist() for f in bare] == [[[0.0, 0.75, 1.0, 1.0], [0.0] * 4]] * 2
    mixed = forbidden(BACKGROUND, OWN[:2], 2, 2)
    assert mixed[1].tolist() == [[0.0, 0.75, 1.0, 1.0], BACKGROUND[1].tolist()]


@pytest.mark.parametrize(
    ("scores", "whose"),
    [
        ([[0.1, 0.0, 0.0], [0.1, 0.05, 0.0]], [0, 1, NOBODY]),  # both agree most with the first part
        ([[0.05, 0.0, 0.01], [0.1, 0.02, 0.0]], [1, NOBODY, 0]),
        ([[0.1, 0.0], [0.0, 0.1]], [0, NOBODY]),  # a background there must be
    ],
)
def test_where_all_is_background_each_noun_gets_a_part_of_its_own(scores, whose):
    found, said = owners(torch.tensor(scores), 0.9)
    assert found.tolist() == whose and "lower the threshold" in said
