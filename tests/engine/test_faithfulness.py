"""The table of faithfulness: a row of every method holds, a fault shows, and the command says so."""

import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip(
    "diffusers", reason="diffusers for Python 3.10 wants an older huggingface-hub than transformers does"
)

from attune.attention_patches.values import Window
from attune.benchmark import faithfulness, reference_fusion, reference_preserving, reference_tokens

STEPS = 4
METHODS = {
    "Noise levels", "DDIM step", "DDIM inversion step", "Text encoder", "T2I-Adapter", "Attention maps",
    "DDIM inversion", "Null-text inversion", "Direct inversion", "Negative-prompt inversion",
    "Negative-prompt inversion, interpolated",
    "Prompt-to-Prompt, word swap", "Prompt-to-Prompt, refinement", "Prompt-to-Prompt, re-weighting",
    "Prompt-to-Prompt, local blend", "Free-Prompt-Editing", "MasaCtrl", "EmbCtrl", "Dynamic Prompt Learning",
    "MaSaFusion", "CPAM", "Region Prompts", "Proximal guidance",
}  # fmt: skip
# One row of each kind; the other engine tests hold the cases of Prompt-to-Prompt, FPE, MasaCtrl and the inversions.
ROWS = (
    "DDIM step, against", "DDIM inversion step", "Noise levels", "thresholds of all", "of random maps",
    "embedding, against transformers", "probabilities of all 32 layers",
    "Negative-prompt inversion, last latents of the guided", "Proximal guidance",
    "EmbCtrl, last latents, empty", "what every step's vectors learned", "what every step's null embedding learned",
    "of every look", "background mask", "features of every level", "intermediate picture, mixed", "target, latents",
    "target, own queries outside, latents", "target, layers and steps", "next turn's source",
    "of every look", "of a picture's maps", "which way thresholds go", "the update of the words",
    "that the background is found by",
    "background mask", "features of every level", "intermediate picture, mixed", "target, latents",
    "last latents: mask refinement",
    "the masks of every step", "where windows end",
)  # fmt: skip


@pytest.fixture(scope="module")
def sides():
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode(False):
        patch.setattr(faithfulness, "INNER", 2)
        patch.setattr(faithfulness, "WORD_RATE", 0.005)  # so few updates shall move something
        yield faithfulness.Sides(faithfulness.Bench(1, seed=0, steps=STEPS, guidance=7.5))


@pytest.fixture(scope="module")
def checks(sides):
    return faithfulness.checks(sides)


def named(checks, part):
    return [check for check in checks if part in check.name and "null-text" not in check.compared]


def test_every_method_has_its_rows(checks):
    assert {check.method for check in checks} == METHODS
    names = [check.name for check in checks]
    assert len(set(names)) == len(names) > 100
    assert all(check.paper for check in checks)


@pytest.mark.parametrize("part", ROWS)
def test_it_holds(checks, part):
    found = named(checks, part)
    assert found
    for check in found:
        row = faithfulness.measured(check, 1)
        assert row.holds, (check.name, row.distance, row.effect)


def test_a_fault_shows(sides, checks, monkeypatch):
    """Every window opens one step late."""
    (check,) = (check for check in checks if check.compared == "last latents: swap")
    assert faithfulness.measured(check, 1).holds

    def late(window, step, steps):
        return window.start * steps + 1 <= step < window.end * steps

    monkeypatch.setattr(Window, "contains", late)
    sides.prompts.ours.cache_clear()
    row = faithfulness.measured(check, 1)
    assert not row.holds and row.distance > 100 * check.bound


def row(distance, effect, **changes):
    settings = {"method": "a", "paper": "b", "compared": "c", "measure": None, "bound": 1e-3} | changes
    return faithfulness.Row(faithfulness.Check(**settings), distance, effect)


@pytest.mark.parametrize(
    ("found", "holds"),
    [
        (row(0.0, 1.0), True),
        (row(2e-3, 1.0), False),
        (row(0.0, 5e-3), False),  # what is compared hardly depends on the method
        (row(0.0, 0.0, bound=0.0), False),
        (row(float("nan"), 1.0), False),
        (row(float("inf"), 0.0), False),
    ],
)
def test_when_a_row_holds(found, holds):
    assert found.holds is holds
    assert ("| NO |" in faithfulness.markdown([found])) is not holds


def test_departures_stand_apart():
    page = row(0.0, 1.0, departs="printed so", printed=True)
    text = faithfulness.markdown([row(0.0, 1.0), page, row(0.0, 1.0, departs="because")])
    assert text.index("| c |") < text.index("departs on purpose") < text.index("because")
    assert text.index("because") < text.index("from the page") < text.index("printed so")
    text = faithfulness.markdown([row(0.0, 1.0, departs="because"), row(0.0, 1.0, departs="unsaid", printed=True)])
    assert text.index("because") < text.index("something else, or nothing") < text.index("unsaid")
    assert text.count("because") == text.count("unsaid") == 1


def test_the_page_of_dynamic_prompt_learning_is_not_its_code():
    """Two words at one place each: sums of both orders and of both words, and no competition."""
    maps = torch.full((16, 77), 1e-3)
    maps[5, 2], maps[5, 4] = 0.5, 0.25
    outside = torch.zeros(16)
    outside[5] = 1
    both = reference_tokens.losses, reference_tokens.printed_losses
    code, page = (how(maps, [(2,), (4,)], outside) for how in both)
    assert float(page[1]) == pytest.approx(2 * float(code[1])) and float(page[2]) == pytest.approx(2 * float(code[2]))
    peak = float(reference_tokens.gaussian(maps[:, 4].view(4, 4)).max())
    assert float(page[0]) == pytest.approx(1 - peak) and float(code[0]) > float(page[0])


@pytest.mark.parametrize(("worst", "code"), [(0.0, 0), (1.0, 1)])
def test_the_command(monkeypatch, tmp_path, sides, worst, code):
    page = tmp_path / "page.md"
    measure = {"once": True, "measure": lambda number: (worst, 1.0)}
    monkeypatch.setattr(faithfulness, "PAGE", page)
    monkeypatch.setattr(faithfulness, "Bench", lambda *_: sides.bench)
    monkeypatch.setattr(faithfulness, "Sides", lambda _: sides)
    monkeypatch.setattr(faithfulness, "checks", lambda sides: [replace(row(0, 0).check, **measure)])
    monkeypatch.setattr(sys, "argv", ["faithfulness", "--count", "1", "--steps", "5"])
    assert faithfulness.main() == code
    text = page.read_text()
    assert f"{1 - code} of 1 rows hold" in text and "5 steps" in text and "diffusers" in text
    monkeypatch.setattr(sys, "argv", ["faithfulness", "--count", "1", "--steps", "5", "--only", "nothing"])
    page.unlink()
    assert faithfulness.main() == 1 and not page.exists()


def test_the_plain_encoder_begins_its_placeholders_as_the_words(sides):
    prompt, nouns = sides.nouns(0)
    ids = [prompt.ids[column] for columns in nouns for column in columns]
    encoder = reference_tokens.Encoder(sides.weights["text"], ids, faithfulness.HEADS)
    rows = [encoder.row(number) for number in prompt.ids]
    replaced = list(rows)
    for column, placeholder in zip([c for columns in nouns for c in columns], encoder.placeholders, strict=True):
        replaced[column] = placeholder
    with torch.no_grad():
        assert torch.equal(encoder(rows), encoder(replaced))


def test_a_plain_rule_is_the_unet(sides):
    """Without a rule the plain passes predict what diffusers' own attention does."""
    generator = torch.Generator().manual_seed(0)
    z, text = torch.randn(1, 4, 16, 16, generator=generator), sides.empty[0][0].float()
    with torch.no_grad():
        ours = reference_fusion.predict(sides.network, z, 500, text, reference_fusion.Plain())
        assert faithfulness.relative(ours, sides.network(z, 500, encoder_hidden_states=text).sample) < 1e-5
    assert reference_preserving.grid(384, 1.5) == (16, 24)
