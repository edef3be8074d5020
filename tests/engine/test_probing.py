"""The probing benchmark: what it gathers, that its networks learn what is there and only that, how it is printed."""

import json
from dataclasses import replace

import pytest
import torch

from attune.attention_patches.values import QKV, Place, attention_map
from attune.benchmark import probing
from attune.demo import measure, scenes
from attune.demo.measure import Bench
from attune.demo.model import WEIGHTS

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


# ---- a checkpoint of the user's ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The demo's weights by the path of a copy, and the model that they make."""
    path = tmp_path_factory.mktemp("checkpoint") / "mine.safetensors"
    path.write_bytes(WEIGHTS.read_bytes())
    with torch.inference_mode():
        return path, Bench(0, 0, 2, 5.0, path)


def test_a_checkpoint_s_path_gives_the_same_maps(given, collected):
    maps = probing.collect(given[1], CLASSES, probing.SETS["shapes"][1], 2, 1)[0]
    for name, layers in collected[0].items():
        assert all(torch.equal(a, b) for a, b in zip(layers, maps[name], strict=True)), name


def test_the_paper_s_prompts():
    assert {len(set(classes)) for classes, _ in probing.PAPERS.sets.values()} == {10}
    drawn = {
        asked: [probing.PAPERS.prompt(*describe(name, 1)) for name in classes]
        for asked, (classes, describe) in probing.PAPERS.sets.items()
    }
    assert drawn["colours"][:2] == ["a green car", "a white car"]
    assert drawn["colours of any shape"][0] == "a green bus"
    assert drawn["shapes"][0] == "a dog standing in the park" and drawn["shapes"][-1].startswith("an elephant standing")


def test_every_word_of_the_paper_s_prompts_is_one_token_in_its_place(bench):
    for classes, describe in probing.PAPERS.sets.values():
        for name in classes:
            for number in range(len(probing.OBJECTS)):
                color, noun = describe(name, number)
                at = probing.PAPERS.positions(bench.clip, color, noun)
                want = {probing.ARTICLE: (1,), probing.ADJECTIVE: (2,), probing.NOUN: (3,)}
                assert at == (want if color else {probing.ARTICLE: (1,), probing.NOUN: (2,)}), (color, noun)


def test_large_self_attention_is_kept_by_squares():
    """Whole probabilities, summed over the tokens of a square that are looked at, averaged over those that look."""
    q, k = torch.randn(2, 2, 24, 6).unbind()
    own, grid = QKV(q, k, k), (4, 6)
    assert torch.allclose(probing.squares(own, grid, 3, 24), attention_map(q, k, 3), atol=1e-6)
    found, whole = probing.squares(own, grid, 3, 6), attention_map(q, k, 3)
    assert found.shape == (2, 3, 6, 6) and torch.allclose(found.sum(-1), torch.ones(2, 3, 6), atol=1e-5)
    cells = [[6 * (2 * y + dy) + 2 * x + dx for dy in (0, 1) for dx in (0, 1)] for y in range(2) for x in range(3)]
    for i, asks in enumerate(cells):
        for j, seen in enumerate(cells):
            want = whole[:, :, asks][..., seen].sum(-1).mean(-1)
            assert torch.allclose(found[:, :, i, j], want, atol=1e-6)


def test_the_command_with_a_checkpoint(given, tmp_path, monkeypatch):
    """Its tables have the paper's words, and benchmark/probing.json stays as it is."""
    before = probing.RESULTS.read_bytes()
    few = {asked: (classes[:2], describe) for asked, (classes, describe) in probing.PAPERS.sets.items()}
    monkeypatch.setattr(probing, "PAPERS", replace(probing.PAPERS, sets=few))
    monkeypatch.setattr(probing, "RUN", tmp_path)
    monkeypatch.setattr(measure, "RUN", tmp_path)
    monkeypatch.setattr(probing, "ROUNDS", 2)
    monkeypatch.setattr("comfy.utils.PROGRESS_BAR_ENABLED", True)  # what the command changes is put back
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    monkeypatch.setattr(
        "sys.argv", ["probing", "--checkpoint", str(given[0]), "--count", "4", "--steps", "1", "--self-tokens", "64"]
    )
    probing.main()
    found = json.loads((tmp_path / "probing_mine.json").read_text())
    assert probing.RESULTS.read_bytes() == before and (tmp_path / "probing_mine.png").is_file()
    first, second, third = (part for title, part in found.items() if title.startswith("Table"))
    assert list(first) == list(second) == ["animals", "colours of a car", "colours of any object"]
    assert list(third) == ['colours, at "a"', 'colours, at "car"'] and list(first["animals"]) == ["dog", "horse"]
    assert found["checkpoint"] == "mine.safetensors" and found["size"] == 128 and len(first["animals"]["dog"]) == 16
    assert any("Animals are read better off" in line for line in found["the paper's claims"])


def test_a_file_of_another_kind_is_refused(tmp_path, monkeypatch):
    """The host's own loader reads what is no demo model; what it finds has to be Stable Diffusion 1.x as a whole."""
    with pytest.raises(ValueError, match="There is no file"):
        measure.load_checkpoint(tmp_path / "none.safetensors")
    path = tmp_path / "other.ckpt"
    path.write_bytes(b"other")
    asked, model = [], Bench(0, 0, 2, 5.0)
    parts = [model.model, model.clip, model.vae, None]

    def load(path, embedding_directory=None):
        asked.append(path)
        return tuple(parts)

    monkeypatch.setattr("comfy.sd.load_checkpoint_guess_config", load)
    assert measure.load_checkpoint(path) == tuple(parts[:3]) and asked == [str(path)]
    parts[1] = None
    with pytest.raises(ValueError, match="other.ckpt holds SD15, but a whole Stable Diffusion 1.x checkpoint is"):
        measure.load_checkpoint(path)
