"""The probing benchmark: what it gathers, that its networks learn what is there and only that, how it is printed."""

import json

import pytest
import torch

from attune.attention_patches.values import QKV, Place, attention_map
from attune.benchmark import probing
from attune.demo import scenes
from attune.demo.measure import Bench

CLASSES, NOISES = ("circle", "star"), 20


@pytest.fixture(scope="module")
def bench():
    with torch.inference_mode():
        return Bench(0, 0, 2, 5.0)


@pytest.fixture(scope="module")
def collected(bench):
    with torch.inference_mode():
        return probing.collect(bench, CLASSES, probing.SETS["shapes"][1], 2, 1)


def test_every_layer_gives_its_maps(collected):
    """Sixteen layers in the UNet's order, a number a picture token of words, tokens by tokens of the picture itself."""
    maps, _, _ = collected
    tokens = [256] * 2 + [64] * 2 + [16] * 2 + [4] + [16] * 3 + [64] * 3 + [256] * 3
    assert set(maps) == {probing.ARTICLE, probing.ADJECTIVE, probing.NOUN, probing.SELF}
    for name, layers in maps.items():
        width = [n * n for n in tokens] if name == probing.SELF else tokens
        assert [tuple(x.shape) for x in layers] == [(2, 2, n) for n in width], name
    # Each row of a self-attention map adds up to 1, in each of the two steps.
    rows = maps[probing.SELF][4].unflatten(2, (16, 16)).sum(-1)
    assert torch.allclose(rows, torch.full_like(rows, 2.0), atol=1e-4)


def test_the_same_noises_for_every_class(collected):
    """At its first layer a picture's self-attention hardly knows its text yet, but knows its noise."""
    layer = collected[0][probing.SELF][0]
    layer = layer / layer.norm(dim=-1, keepdim=True)
    alike = torch.einsum("ksd,lsd->kls", layer, layer).mean()
    other = torch.einsum("ksd,lsd->kls", layer, layer.flip(1)).mean()
    assert 1 - alike < 0.5 * (1 - other)


def test_a_word_s_map_is_that_word_s(bench):
    """The positions are where the prompt's tokens lie, and a map is the column of that token."""
    at = probing.positions(bench.clip, "red", "circle")
    assert at == {probing.ARTICLE: (1,), probing.ADJECTIVE: (2,), probing.NOUN: (3,)}
    q, k = torch.randn(2, 3, 4, 8).unbind()
    place, own = Place("cross", ("input", 1), 0, (2, 2), 0, 1), QKV(q, k, k)
    columns = attention_map(q, k, 2)[..., 2]  # (3, 2, 4)
    for heads, steps, want in (
        (probing.MEAN, probing.MEAN, 2 * columns.mean(1)),
        (probing.BESIDE, probing.MEAN, 2 * columns.flatten(1)),
        (probing.BESIDE, probing.BESIDE, torch.cat([columns.flatten(1)] * 2, 1)),
    ):
        gathered = probing.Gathered({"word": (2,)}, heads, steps)
        gathered.add(place, own, 2)
        gathered.add(place, own, 2)
        assert torch.allclose(gathered.maps()["word"][0], want, atol=1e-6)


@pytest.mark.parametrize("width", (12, 3000))
def test_a_probe_learns_what_is_there(width):
    """Narrower and wider than there are maps, and whatever their scale: classes that differ are told apart.

    Noise is not, though a network can learn by heart all that it is shown.
    """
    torch.manual_seed(0)
    noise = torch.rand(8, NOISES, width)
    apart = noise + 3 * torch.randn(8, 1, width)
    scale = 10 ** torch.linspace(-9, 0, width)  # a map's numbers are of very different sizes
    assert float(probing.probe(apart * scale).mean()) > 0.97
    guessed = float(probing.probe(noise * scale).mean())
    assert abs(guessed - 1 / 8) < 4 * (7 / 64 / (8 * NOISES)) ** 0.5


def test_components_keep_what_a_network_can_learn():
    """Distances between maps survive: to each other exactly, and the leading ones first."""
    torch.manual_seed(0)
    train, test = torch.rand(40, 500), torch.rand(7, 500)
    narrow, asked = probing.prepare(train, test)
    wide = (train - train.mean(0)) / train.std(0)
    ratio = torch.pdist(narrow) / torch.pdist(wide)
    assert float(ratio.std() / ratio.mean()) < 1e-4
    assert narrow.shape == (40, 39) and asked.shape == (7, 39)
    again = probing.prepare(train, train[:7])[1]
    assert torch.allclose(again, narrow[:7], atol=1e-4)
    few = probing.prepare(train, test, 5)[0]
    assert few.shape == (40, 5) and float(few.square().sum(0).min()) > 1


def test_a_feature_that_never_varies_says_nothing():
    torch.manual_seed(0)
    train, test = torch.rand(30, 6), torch.rand(9, 6)
    train[:, 2], test[:, 2] = 0.1, 0.1 * (1 + 1e-6)
    assert float(probing.prepare(train, test)[1][:, 2].abs().max()) < 0.2


def test_few_noises_are_refused():
    with pytest.raises(ValueError, match="There are 3 noises"):
        probing.probe(torch.rand(2, 3, 4))


def test_tables_are_laid_out_as_the_paper_s():
    accuracies = [n / 16 for n in range(1, 17)]
    lines = probing.table({"shapes": {"circle": accuracies, "square": [0.0] * 16}}).splitlines()
    assert lines[0] == "| Class | Layer 3 | Layer 6 | Layer 9 | Layer 10 | Layer 12 | Layer 14 | Layer 16 | Avg. |"
    assert lines[2] == "| circle | 0.19 | 0.38 | 0.56 | 0.62 | 0.75 | 0.88 | 1.00 | 0.62 |"
    assert lines[4] == "| shapes: mean (chance 0.50) | 0.09 | 0.19 | 0.28 | 0.31 | 0.38 | 0.44 | 0.50 | 0.31 |"


def test_claims_are_confirmed_or_contradicted():
    every = {name: [0.9] * 16 for name in scenes.COLORS}
    guessed = {name: [0.125] * 16 for name in scenes.COLORS}
    found = {(1, "colours", probing.ADJECTIVE): every, (2, "colours", probing.SELF): every}
    first, second, third = probing.claims(found | {(2, "colours", probing.SELF): guessed})
    assert "Table 1, colours: the paper's maps carry the class" in first and first.endswith("0.12: confirmed")
    assert "do not carry" in second and second.endswith("confirmed")
    assert "cross-attention than off self-attention" in third and third.endswith("0.90 against 0.12: confirmed")
    _, second, third = probing.claims(found)
    assert second.endswith("these do, 0.90 where chance is 0.12: contradicted")
    assert third.endswith("0.90 against 0.90: contradicted")


def test_the_file_is_short_and_json():
    found = {"a": {"b": [0.1, 0.2]}, "c": [], "d": "[1,\n 2]", "e": ["x", "y"]}
    text = probing.written(found)
    assert json.loads(text) == found and "[0.1, 0.2]" in text and '"x",\n' in text
