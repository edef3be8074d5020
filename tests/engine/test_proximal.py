"""Proximal guidance: its formula, and that sampling follows it, alone, on an edit, and beside others' guidance."""

import comfy.samplers
import pytest
import torch

from attune.attention_patches.proximal import HARD, RULES, SOFT, proximal
from attune.nodes.guidance import AttuneProximalGuidance

from .bench import SOURCE, TARGET, Bench, outputs, prompt_swap


@pytest.fixture(scope="module")
def bench():
    return Bench(height=8, width=8, steps=4)


def on(model, quantile, rule=SOFT):
    return outputs(AttuneProximalGuidance, model, quantile, rule)[0]


def draw(bench, model, guidance=5.0, positive=None):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(bench.text(TARGET) if positive is None else positive, bench.text(SOURCE))
    guider.set_cfg(guidance)
    start = bench.noise["samples"]
    sampler = comfy.samplers.sampler_object("euler")
    return guider.sample(torch.zeros_like(start), start, sampler, bench.sigmas, disable_pbar=True)


@pytest.mark.parametrize("scale", [1, -3e-3])
def test_the_formula(scale):
    # Of 1, 2, 3, 4, 5 the quantile 0.5 is 3; a second picture has a threshold of its own.
    values = scale * torch.tensor([[[1.0, -2.0, 3.0, -4.0, 5.0]], [[10.0, -20.0, 30.0, -40.0, 50.0]]])
    hard = scale * torch.tensor([[[0.0, 0.0, 0.0, -4.0, 5.0]], [[0.0, 0.0, 0.0, -40.0, 50.0]]])
    soft = scale * torch.tensor([[[0.0, 0.0, 0.0, -1.0, 2.0]], [[0.0, 0.0, 0.0, -10.0, 20.0]]])
    torch.testing.assert_close(proximal(values, 0.5, HARD), hard)
    torch.testing.assert_close(proximal(values, 0.5, SOFT), soft)
    assert not proximal(values, 1.0, SOFT).any() and not proximal(values, 1.0, HARD).any()


@pytest.mark.parametrize("rule", RULES)
def test_it_is_the_proximal_operator(rule):
    """Of all numbers, what it gives is the nearest to the value under the norm's price."""
    values = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).double()
    limit = values.abs().quantile(0.6)
    tried = torch.linspace(-4, 4, 8001, dtype=torch.float64)[:, None]
    price = limit * tried.abs() if rule == SOFT else limit**2 / 2 * (tried.abs() > 1e-9)
    best = tried[(0.5 * (tried - values) ** 2 + price).argmin(0), 0]
    torch.testing.assert_close(proximal(values, 0.6, rule)[0], best, atol=1e-3, rtol=0)


@pytest.mark.parametrize("rule", RULES)
def test_half_precision_keeps_its_format(rule):
    bent = proximal(torch.randn(2, 4, 8, 8).bfloat16(), 0.5, rule)
    assert bent.dtype == torch.bfloat16 and bent.isfinite().all() and bent.any()


def test_quantile_0_is_the_model_as_it_is(bench):
    assert torch.equal(draw(bench, on(bench.model, 0.0)), draw(bench, bench.model))


def test_quantile_1_draws_the_negative_alone(bench):
    alone = comfy.samplers.CFGGuider(bench.model)
    alone.set_conds(bench.text(SOURCE), bench.text(""))
    alone.set_cfg(1.0)
    start, sampler = bench.noise["samples"], comfy.samplers.sampler_object("euler")
    drawn = alone.sample(torch.zeros_like(start), start, sampler, bench.sigmas, disable_pbar=True)
    torch.testing.assert_close(draw(bench, on(bench.model, 1.0)), drawn, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_follows_the_formula(bench, rule, guidance):
    """Written out in noise, as the paper has it, from what the plain model says of the first step."""
    seen = []

    model = on(bench.model, 0.6, rule).clone()
    plain = bench.model.clone()
    for one in (model, plain):
        one.set_model_sampler_post_cfg_function(lambda args: (seen.append(args), args["denoised"])[1], True)
    draw(bench, model, guidance)
    bent = seen[0]
    seen.clear()
    draw(bench, plain, guidance)
    given = seen[0]
    guided, unguided = ((given["input"] - given[key]) / given["sigma"] for key in ("cond_denoised", "uncond_denoised"))
    delta = guided - unguided
    limit = delta.abs().flatten().sort().values[round(0.6 * (delta.numel() - 1))]
    moved = delta - delta.clamp(-limit, limit) if rule == SOFT else delta * (delta.abs() > limit)
    wanted = unguided + guidance * moved
    found = (bent["input"] - bent["denoised"]) / bent["sigma"]
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=1e-3)
    assert (found - (unguided + guidance * delta)).abs().max() > 0.01


def test_the_higher_the_nearer_to_the_negative(bench):
    source = draw(bench, on(bench.model, 1.0))
    far = [float((draw(bench, on(bench.model, q)) - source).std()) for q in (0.0, 0.5, 0.8)]
    assert far[0] > far[1] > far[2] > 0


def test_it_acts_on_an_edit(bench):
    edited, positive = prompt_swap(bench, 1)
    drawn = draw(bench, on(edited, 0.5), positive=positive)
    assert not torch.equal(drawn, draw(bench, edited, positive=positive))
    assert not torch.equal(drawn, draw(bench, on(bench.model, 0.5), positive=positive))


@pytest.mark.parametrize("order", ["before", "behind"])
def test_another_nodes_guidance_is_still_asked(bench, order):
    asked = []

    def guide(args):
        asked.append(1)
        return args["uncond"] + 5.0 * (args["cond"] - args["uncond"])

    model = bench.model.clone() if order == "before" else on(bench.model, 0.5)
    model.set_model_sampler_cfg_function(guide)
    model = on(model, 0.5) if order == "before" else model
    torch.testing.assert_close(draw(bench, model), draw(bench, on(bench.model, 0.5)), atol=2e-3, rtol=2e-3)
    assert len(asked) == 4


@pytest.mark.parametrize("order", ["before", "behind"])
@pytest.mark.parametrize("times", [1, 2])
def test_what_others_add_behind_guidance_goes_by_the_models_prediction(bench, order, times):
    """Perturbed attention takes a prediction of its own off the prompt's; of a bent one, it would multiply the bend."""

    def first_of(model):
        seen = []
        model.set_model_sampler_post_cfg_function(lambda args: (seen.append(args), args["denoised"])[1], True)
        if order == "before" and model is not plain:
            for _ in range(times):
                model = on(model, 0.5)
        draw(bench, model)
        return seen[0]

    plain = bench.model.clone()
    bent = bench.model.clone()
    for _ in range(times if order == "behind" else 0):
        bent = on(bent, 0.5)
    given, found = first_of(plain), first_of(bent)
    for key in ("cond_denoised", "uncond_denoised"):
        torch.testing.assert_close(found[key], given[key], atol=1e-4, rtol=1e-4)
    assert (found["denoised"] - given["denoised"]).abs().max() > 0.01
