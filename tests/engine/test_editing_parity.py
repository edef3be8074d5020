"""Prompt-to-Prompt edits beside an independent implementation of the paper on diffusers, on the same weights."""

import functools
from dataclasses import replace

import pytest
import torch

pytest.importorskip(
    "diffusers", reason="diffusers for Python 3.10 wants an older huggingface-hub than transformers does"
)

from attune.attention_patches.values import Window
from attune.benchmark import editing_parity
from attune.benchmark import reference_p2p as paper
from attune.inversion import host as runs
from attune.nodes import edit

SAME = 1e-4  # of the latents' size; rounding leaves a twentieth of it
STEPS = 5


@pytest.fixture(scope="module")
def sides():
    with torch.inference_mode():
        return editing_parity.Sides(editing_parity.Bench(1, seed=0, steps=STEPS, guidance=7.5))


@pytest.fixture(scope="module")
def cases(sides):
    (scene,), _, _ = sides.bench.scenes(objects=2)
    return editing_parity.cases(scene)


@pytest.fixture(scope="module")
def recorded(sides, cases):
    with torch.inference_mode():
        return sides.record(cases["swap"].source, cases["swap"].grid, 0)


@pytest.fixture(scope="module")
def papers(sides, cases, recorded):
    """A case's latents as the paper has it, each drawn once."""

    @functools.cache
    def draw(name):
        return sides.theirs(cases[name], recorded)

    return draw


def test_every_edit_is_the_papers(sides):
    found = editing_parity.measure_cases(sides)
    assert len(found) > 15
    for name, row in found.items():
        assert row["latents apart"] < SAME and row["pictures dB"] > 60, name
        assert row["source rows apart"] < SAME, name  # a recorded run is the lockstep source row
        assert row["edit"] > 500 * SAME, name


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("swap", {"cross": (0.2, 0.8)}),
        ("swap", {"cross": (0.0, 0.6)}),
        ("swap", {"self_": (0.0, 0.2)}),
        ("swap", {"self_": (0.2, 0.4)}),
        ("swap", {"limit": 64}),
        ("swap, a window for one word", {"word_windows": ()}),
        ("swap, one word preserved", {"preserve": ()}),
        ("re-weight after swap", {"weights": ()}),
        ("re-weight after swap, a window for one word", {"weight_windows": ()}),
        ("swap, cross-attention in layers 1-6 and 8", {"cross_layers": ""}),
        ("swap, self-attention in layers 4-14", {"self_layers": "4-13"}),
        ("swap, local blend by pairs of words", {"source_inside": ()}),
        ("swap, local blend with two thresholds", {"outside_threshold": 0.0}),
        ("swap, local blend", {"inside": ()}),
        ("refine, local blend with a word outside", {"outside": ()}),
    ],
)
def test_another_choice_would_be_seen(sides, cases, recorded, papers, name, other):
    """One setting moved by a notch, in the reference alone: far above what the two sides may differ by."""
    assert cases[name].source == cases["swap"].source  # what was recorded
    another = sides.theirs(replace(cases[name], **other), recorded)[1]
    assert editing_parity.relative(another, papers(name)[1]) > 100 * SAME


def test_the_blends_mask(sides, cases, recorded, papers):
    case = cases["swap, local blend"]
    latent = sides.ours(case, recorded)
    ours = editing_parity.call(
        edit.AttuneBlendMask, recorded, {"samples": runs.to_host_scale(sides.bench.model, latent)}
    )[0]
    theirs = papers("swap, local blend")[2]
    assert 0.02 < theirs.mean() < 0.9
    assert torch.equal(ours, torch.nn.functional.interpolate(theirs, scale_factor=8)[0])


def test_where_the_authors_code_is_left(sides):
    for name, row in editing_parity.measure_differences(sides).items():
        assert row["from the right one"] < SAME and row["from the authors' code"] > 100 * SAME, name


def test_why_what_follows_a_longer_word_is_read_from_its_own_place(sides, cases):
    """In the authors' code each word behind the swapped one looks where some other word of the source looked."""
    case = cases["swap, more tokens in the new word"]
    source, target = sides.prompt(case.source), sides.prompt(case.target)
    wrong = []
    for quirk in (False, True):
        mapper, _ = paper.swap(source, target, quirk)
        pairs = zip(source.words[2:], target.words[2:], strict=True)
        wrong.append([ours != mapper[:, theirs].nonzero()[:, 0].tolist() for ours, theirs in pairs])
    assert not any(wrong[0]) and all(wrong[1])


def test_why_padding_does_not_read_a_removed_word(sides, cases):
    case = cases["refine, words removed"]
    source, target = sides.prompt(case.source), sides.prompt(case.target)
    padding = range(target.words[-1][-1] + 2, paper.CHUNK)
    read = []
    for quirk in (False, True):
        mapper, keep = paper.refine(source, target, quirk)
        assert torch.equal(mapper.sum(0) + keep, torch.ones(paper.CHUNK))
        read.append([source.pieces[at] for at in mapper[:, padding].nonzero()[:, 0]])
    assert not any(read[0])
    assert "".join(read[1]) == "".join(w for w in source.text.split(" ")[-3:])


def test_a_share_means_its_step():
    """58 % of 50 steps are 29; the authors' code takes the whole part of 28.999... and so one step less."""
    assert int(0.58 * 50) == 28
    window = Window(0.0, 0.58)
    assert window.contains(28, 50) and not window.contains(29, 50)


def test_why_the_source_row_is_pinned(sides):
    """On a real picture the paper's source row drifts under guidance, and the edit follows it; the pinned one is what
    the autoencoder makes of the picture."""
    found = {name: row["PSNR dB"] for name, row in editing_parity.measure_source_row(sides).items()}
    best = found["the autoencoder alone"]
    assert found["source row, pinned (Attune)"] == pytest.approx(best, abs=0.01)
    assert found["source row, free (paper)"] < best - 3
    assert found["background of the edit, free (paper)"] < found["background of the edit, pinned (Attune)"] - 1
