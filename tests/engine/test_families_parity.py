"""Prompt-to-Prompt and Free-Prompt-Editing on SDXL and SD 2.x beside plain implementations on diffusers."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip(
    "diffusers", reason="diffusers for Python 3.10 wants an older huggingface-hub than transformers does"
)

from attune.benchmark import families_parity
from attune.benchmark.inversion import relative

SAME = 2e-5  # of the latents' size; rounding leaves a tenth of it


@pytest.fixture(params=families_parity.CASES, scope="module")
def sides(request):
    with torch.inference_mode():
        return families_parity.Sides(request.param)


def test_every_edit_is_the_papers(sides):
    for name, case in families_parity.CASES[sides.words.bench.family].items():
        apart, effect = sides.measure(case)
        assert apart < SAME and effect > 1000 * SAME, name


def test_what_the_families_have_of_their_own_would_be_seen(sides, monkeypatch):
    """The other half's pooled text, sizes the other way round, or v taken for epsilon, in the reference alone."""
    case = families_parity.CASES[sides.words.bench.family]["FPE"]
    by = sides.structure
    trajectory, network = by.trajectory(case, 0), by.network
    right = by.theirs(case, trajectory)[1]

    def off():
        return relative(type(by).theirs(by, case, trajectory)[1], right)  # not the one that is kept

    if sides.words.bench.family == "SD2":
        monkeypatch.setattr(network, "predicts_v", False)
        assert off() > 20 * SAME
        return
    unet = network.unet
    faults = {"text_embeds": lambda rows: rows.roll(2, 0), "time_ids": lambda sizes: sizes[:, [1, 0, 2, 3, 5, 4]]}
    for told, fault in faults.items():

        def wrong(*args, added_cond_kwargs, told=told, fault=fault, **kwargs):
            return unet(*args, added_cond_kwargs={**added_cond_kwargs, told: fault(added_cond_kwargs[told])}, **kwargs)

        monkeypatch.setattr(network, "unet", wrong)
        wrong.attn_processors, wrong.set_attn_processor = unet.attn_processors, unet.set_attn_processor
        assert off() > 20 * SAME, told


def test_another_choice_would_be_seen(sides):
    """One setting moved by a notch, in the reference alone."""
    case, by = families_parity.CASES[sides.words.bench.family]["FPE"], sides.structure
    trajectory = by.trajectory(case, 0)
    right = by.theirs(case, trajectory)[1]
    for changed in ({"token_limit": 95}, {"end": 0.6}, {"layers": "5-12"}):
        moved = replace(case, changed=tuple((case.settings | changed).items()))
        assert relative(by.theirs(moved, trajectory)[1], right) > 20 * SAME, changed
