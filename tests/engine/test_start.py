"""A sampling that does not start on the source's trajectory, or that leaves it, is told on the edit's node."""

import logging

import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch

import nodes as stock
from attune.inversion import host as runs
from attune.inversion.trajectory import NULL_CFG, negative_of
from attune.nodes.fusion import AttuneSourceFusion
from attune.nodes.invert import (
    GRIDS,
    LEVELS,
    AttuneDDIMInversion,
    AttuneNullTextInversion,
    AttuneRecordTrajectory,
)
from attune.nodes.trajectory import AttuneTrajectoryLatent

from .bench import METHODS, SOURCE, Bench, half, outputs, prompt_swap, region_prompts


@pytest.fixture(scope="module")
def bench():
    """An inversion on the grid of ComfyUI's scheduler, as users make it."""
    with torch.inference_mode():
        made = Bench(height=8, width=8, steps=4)
        picture = {"samples": runs.host_latent(made.trajectory, -1)}
        path, noise, sigmas = outputs(
            AttuneDDIMInversion, made.model, picture, made.text(SOURCE), 4, GRIDS[0], LEVELS[0]
        )
        return made.but(trajectory=path, noise=noise, sigmas=sigmas, steps=4)


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.WARNING, "attune")
    # The bench reads the source in a layer of which another warning has something to say.
    return lambda: [
        record.getMessage()
        for record in caplog.records
        if record.name == "attune" and not record.getMessage().startswith("Layer")
    ]


def k_sampler(bench, edited, steps=4, denoise=1.0, latent=None, scheduler="ddim_uniform"):
    latent = bench.noise if latent is None else latent
    away = bench.away(edited[1])
    node = stock.KSampler
    return outputs(node, edited[0], 0, steps, 5.0, "euler", scheduler, edited[1], away, latent, denoise)


def advanced(bench, edited, add_noise="disable", steps=4, first=0, last=10000, latent=None, scheduler="ddim_uniform"):
    latent = bench.noise if latent is None else latent
    return outputs(
        stock.KSamplerAdvanced, edited[0], add_noise, 0, steps, 5.0, "euler", scheduler, edited[1],
        bench.away(edited[1]), latent, first, last, "disable",
    )[0]  # fmt: skip


def empty(bench):
    return {"samples": torch.zeros_like(bench.noise["samples"])}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_right_way_is_silent(method, bench, told):
    bench.sample(*method(bench.but(), 1))
    assert told() == []


def test_other_right_ways_are_silent(bench, told):
    edited = prompt_swap(bench, 1)
    advanced(bench, edited)
    begun = outputs(
        stock.KSamplerAdvanced, edited[0], "disable", 0, 4, 5.0, "euler", "ddim_uniform", edited[1],
        bench.away(edited[1]), bench.noise, 0, 2, "enable",
    )[0]  # fmt: skip
    advanced(bench, edited, first=2, latent=begun)
    latent, sigmas = outputs(AttuneTrajectoryLatent, bench.trajectory, 0.5, -1)
    bench.sample(*edited, latent=latent, sigmas=sigmas)
    for sampler in ("heun", "dpmpp_2m", "uni_pc"):
        bench.sample(*edited, sampler=sampler)
    assert told() == []


def test_a_recorded_image_is_edited_from_the_same_seed(bench, told):
    """An empty latent and noise are right where they are what the trajectory began with."""
    euler = outputs(custom.KSamplerSelect, "euler")[0]
    rest = True, 7, 5.0, bench.text(SOURCE), bench.text(""), euler, bench.sigmas, empty(bench)
    path = outputs(AttuneRecordTrajectory, bench.model, *rest)[0]
    model, positive = prompt_swap(bench.but(trajectory=path), 1)
    outputs(custom.SamplerCustom, model, True, 7, 5.0, positive, *rest[4:])
    assert told() == []


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        (k_sampler, "switch add_noise off (SamplerCustom has it under its advanced inputs, and KSampler (Advanced)"),
        (lambda b, e: k_sampler(b, e, denoise=0.5), "adds noise"),
        (lambda b, e: k_sampler(b, e, latent=empty(b)), "adds noise"),
        (lambda b, e: advanced(b, e, add_noise="enable"), "adds noise"),
        (lambda b, e: advanced(b, e, latent=empty(b)), "empty LATENT"),
        (lambda b, e: advanced(b, e, steps=3), "fewer steps than the inversion's"),
        (lambda b, e: advanced(b, e, first=1), "at sigma"),
        (lambda b, e: b.sample(*e, sigmas=b.sigmas[[0, 2, 4]]), "takes 2 steps at other sigmas than the 4"),
        (lambda b, e: b.sample(*e, latent={"samples": b.noise["samples"].flip(-1)}), "another latent"),
    ],
)
def test_a_mistake_is_told_once_in_one_sentence(sample, words, bench, told):
    sample(bench, prompt_swap(bench, 1))
    (text,) = told()
    assert words in text and text.endswith(".") and ". " not in text


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_edit_tells_of_added_noise(method, bench, told):
    """But those without a source, whose sampler may start anywhere."""
    k_sampler(bench, method(bench, 1))
    assert bool(told()) == (method not in (region_prompts, METHODS["proximal guidance"]))


def test_source_fusion_tells_of_added_noise(bench, told):
    made = outputs(
        AttuneSourceFusion, bench.model, bench.trajectory, bench.text("a star"), bench.text(""), 0.0, 1.0, 4, half()
    )
    bench.sample(*made[:2])
    assert told() == []
    k_sampler(bench, made[:2])
    assert "adds noise" in told()[0]


@pytest.mark.parametrize("sampler", comfy.samplers.SAMPLER_NAMES)
def test_samplers_that_add_noise_at_their_steps(sampler, bench, told):
    """Told just where another seed gives another image."""
    edited = prompt_swap(bench, 1)
    one, other = (bench.sample(*edited, sampler=sampler, seed=seed) for seed in (1, 2))
    noisy = [text for text in told() if f"The sampler {sampler}" in text]
    assert bool(noisy) == (not torch.equal(one, other))


def test_null_text_at_another_cfg(bench, told):
    learned, null = outputs(
        AttuneNullTextInversion, bench.trajectory, bench.model, bench.text(""), 3.0, 1, 0.01, 1e-5, True
    )
    assert null[0][1][NULL_CFG] == 3.0 == negative_of(learned)[1][1][NULL_CFG]
    edited = prompt_swap(bench.but(trajectory=learned), 1)
    bench.sample(*edited, negative=null, guidance=3.0)
    bench.sample(*edited, guidance=5.0)  # the empty text fits every cfg
    assert told() == []
    bench.sample(*edited, negative=null, guidance=5.0)
    (text,) = told()
    assert "cfg is 5, but the null-text embeddings in its negative were learned for 3; set cfg to 3" in text
