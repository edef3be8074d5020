"""Attune's inversions beside an independent implementation on diffusers, on the same weights."""

import pytest
import torch

pytest.importorskip(
    "diffusers", reason="diffusers for Python 3.10 wants an older huggingface-hub than transformers does"
)

from attune.benchmark import inversion
from attune.demo import scenes


def test_step_by_step():
    found = inversion.parity(inversion.Bench(2, seed=1, steps=4, guidance=7.5), inner=3)
    assert found["DDIM latents"] < 1e-3 and found["null-text losses"] < 0.01
    assert found["direct, exact"] is True and found["direct ablation"] < 1e-3


def test_a_wrong_convention_would_be_seen():
    """The tolerance is far below what the two ways of asking for epsilon differ by."""
    bench = inversion.Bench(1, seed=1, steps=5, guidance=7.5)
    drawn, pictures, _ = bench.scenes()
    latent, text = bench.encode(pictures), bench.text(scenes.caption(drawn[0]))
    a, b = (
        inversion.call(
            inversion.invert.AttuneDDIMInversion, bench.model, latent, text, 5, inversion.host.HOST_GRID, level
        )[0]
        for level in inversion.LEVELS
    )
    assert inversion.relative(a.latents, b.latents) > 0.01
    assert torch.equal(a.sigmas, b.sigmas)
