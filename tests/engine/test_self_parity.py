"""Free-Prompt-Editing and MasaCtrl beside an independent implementation on diffusers, on the same weights."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip(
    "diffusers", reason="diffusers for Python 3.10 wants an older huggingface-hub than transformers does"
)

from attune.benchmark import reference_self as paper
from attune.benchmark import self_parity

SAME = 2e-5  # of the latents' size; rounding leaves a tenth of it
STEPS = 5


@pytest.fixture(scope="module")
def sides():
    with torch.inference_mode():
        return self_parity.Sides(self_parity.Bench(1, seed=0, steps=STEPS, guidance=7.5))


@pytest.fixture(scope="module")
def cases(sides):
    (scene,), _, _ = sides.bench.scenes(objects=2)
    return self_parity.cases(scene)


@pytest.fixture(scope="module")
def apart(sides):
    """How far the reference's latents of a case are from another's on the same trajectory; the first drawn once."""
    drawn = {}

    def compare(case, other):
        if id(case) not in drawn:
            trajectory = sides.trajectory(case, 0)
            drawn[id(case)] = trajectory, sides.theirs(case, trajectory)[1]
        trajectory, one = drawn[id(case)]
        return self_parity.relative(sides.theirs(other, trajectory)[1], one)

    return compare


def test_every_edit_is_the_papers(sides):
    found = self_parity.measure_cases(sides)
    assert len(found) > 15
    for name, row in found.items():
        assert row["latents apart"] < SAME and row["pictures dB"] > 60, name
        assert row["edit"] > 1000 * SAME, name


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("FPE", {"start": 0.2}),
        ("FPE", {"end": 1.0}),
        ("FPE", {"token_limit": 64}),
        ("FPE, layers 4-14", {"layers": "3-13"}),
        ("FPE, layers 4-14", {"layers": "4-13"}),
        ("MasaCtrl", {"start": 0.2}),
        ("MasaCtrl", {"end": 0.8}),
        ("MasaCtrl", {"layer": 9}),
        ("MasaCtrl", {"layer": 11}),
        ("MasaCtrl, masks", {"source_mask": None, "target_mask": None}),
        ("MasaCtrl, drawn picture, masks of words", {"threshold": 0.2}),
        ("MasaCtrl, drawn picture, masks of words", {"source_words": "background"}),
        ("MasaCtrl, drawn picture, masks of words", {"target_words": "background"}),
    ],
)
def test_another_choice_would_be_seen(cases, apart, name, other):
    """One setting moved by a notch, in the reference alone: far above what the two sides may differ by."""
    case = cases[name]
    moved = replace(case, changed=tuple((case.settings | other).items()))
    assert apart(case, moved) > 10 * SAME


def test_other_masks_would_be_seen(cases, apart):
    case = cases["MasaCtrl, masks"]
    source, target = (case.settings[key] for key in ("source_mask", "target_mask"))
    for changed in ({"source_mask": target}, {"target_mask": source}, {"source_mask": source.roll(8, -1)}):
        moved = replace(case, changed=tuple((case.settings | changed).items()))
        assert apart(case, moved) > 10 * SAME, changed


@pytest.mark.parametrize("name", ["FPE", "MasaCtrl"])
def test_the_prompts_would_be_seen(cases, apart, name):
    """A source read under its caption, or a target under none, is another edit."""
    case = cases[name]
    assert apart(case, replace(case, source=case.target)) > 10 * SAME
    assert apart(case, replace(case, target="")) > 10 * SAME


def test_null_text_embeddings_are_taken(sides, cases):
    """The negative's learned embeddings reach both sides: without them the edit is another one."""
    case = cases["FPE, null-text embeddings"]
    trajectory = sides.trajectory(case, 0)
    assert trajectory.nulls is not None
    without = replace(trajectory, nulls=None, negative=sides.empty)
    assert self_parity.relative(sides.theirs(case, without)[1], sides.theirs(case, trajectory)[1]) > 100 * SAME


def test_the_reference_alone_draws_as_the_other_reference_does(sides, cases):
    """Without an edit both references are plain drawing."""
    case = cases["FPE, drawn picture"]
    trajectory = sides.trajectory(case, 0)
    plain = self_parity.editing_parity.Case(
        case.target, case.target, self_parity.editing_parity.NONE, cross=(0.0, 0.0), self_=(0.0, 0.0)
    )
    other = self_parity.editing_parity.Sides.theirs(sides, plain, trajectory)[1]
    assert self_parity.relative(sides.theirs(case, trajectory, plain=True)[1], other) < SAME


def test_where_the_authors_code_is_left(sides):
    for name, row in self_parity.measure_differences(sides).items():
        assert row["from the right one"] < SAME and row["from the authors' code"] > 100 * SAME, name


def test_why_an_object_with_nothing_to_read_attends_to_itself():
    """With no key left, the authors' code reads all of the source alike, which is a blur."""
    scores, values, plain = torch.tensor([[[3.0, 0.0, -2.0]]]), torch.tensor([[[0.0], [1.0], [5.0]]]), torch.ones(1, 1)
    nothing = torch.zeros(3, dtype=torch.bool)
    right, theirs = (paper.Mutual((0, 1), quirk=q).among(scores, values, nothing, plain) for q in (False, True))
    assert right is plain and theirs.item() == pytest.approx(values.mean().item())


def test_why_the_source_row_is_pinned(sides):
    """On a real picture a free source row drifts off: under a caption by guidance, and with so few steps also under
    the empty text, by the inversion's own error."""
    found = self_parity.measure_source_row(sides)
    best = found["the autoencoder alone"]["source dB"]
    for text in ("empty text", "caption"):
        free, pinned = found[f"{text}, free"], found[f"{text}, pinned (Attune)"]
        assert pinned["source dB"] == pytest.approx(best, abs=0.01)
        assert free["source dB"] < best - 3, text
