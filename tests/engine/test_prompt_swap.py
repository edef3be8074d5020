"""Word swap on the host: equal to the classic algorithm, and an identity where it must be one."""

import torch

from attune.attention_patches import host
from attune.attention_patches.alignment import swap_map
from attune.attention_patches.values import apply_map, attention_map

from .bench import SOURCE, STEPS, TARGET, prompt_swap


def classic(bench, source, target, cross_steps, self_steps):
    """Prompt-to-Prompt as its authors run it: both prompts in one batch, maps copied between the rows of the
    conditional half. Written apart from the pack, by the layout of the batch and by counting steps."""
    mapper = swap_map(host.read_words(bench.clip, source), host.read_words(bench.clip, target))
    a, b = bench.text(source)[0], bench.text(target)[0]
    positive = [[torch.cat([a[0], b[0]]), {"pooled_output": torch.cat([a[1]["pooled_output"], b[1]["pooled_output"]])}]]
    empty = bench.text("")[0]
    negative = [[empty[0].repeat(2, 1, 1), {"pooled_output": empty[1]["pooled_output"].repeat(2, 1)}]]

    def step(options):
        return int((options["sample_sigmas"] - options["sigmas"][0]).abs().argmin())

    def cross(q, k, v, options):
        assert options["cond_or_uncond"] == [1, 0] and len(q) == 4  # uncond source, uncond target, source, target
        p = attention_map(q, k, options["n_heads"])
        if step(options) < cross_steps:
            p[3] = p[2] @ mapper
        return apply_map(p, v, options["n_heads"])

    def own(q, k, v, options):
        p = attention_map(q, k, options["n_heads"])
        if step(options) < self_steps:
            p[3] = p[2]
        return apply_map(p, v, options["n_heads"])

    model = bench.model.clone()
    blocks = [("input", n) for n in (1, 2, 4, 5, 7, 8)] + [("middle", 0)] + [("output", n) for n in range(3, 12)]
    for block in blocks:
        model.set_model_attn1_replace(own, *block)
        model.set_model_attn2_replace(cross, *block)
    latent = {"samples": bench.noise["samples"].repeat(2, 1, 1, 1)}
    return bench.sample(model, positive, latent=latent, negative=negative)


def test_it_is_the_classic_algorithm(bench):
    """The pinned source is the classic source branch when the trajectory is that branch's own run."""
    cross_steps, self_steps = 3, 2
    both = classic(bench, SOURCE, TARGET, cross_steps, self_steps)
    model, positive = prompt_swap(bench, 1)
    edited = bench.sample(model, positive)
    assert (int(0.8 * (STEPS + 1)), int(0.4 * STEPS)) == (4, 2)  # what the windows come to at this number of steps
    spread = both[1].std()
    assert (edited[0] - both[1]).abs().max() > 0.02 * spread  # one step of cross-attention fewer shows
    both = classic(bench, SOURCE, TARGET, 4, 2)
    assert (edited[0] - both[1]).abs().max() < 2e-3 * spread


def test_different_piece_counts(bench):
    target = TARGET.replace("yellow", "squirrelfish")
    assert len(host.read_words(bench.clip, target).words[1].positions) > 1
    both = classic(bench, SOURCE, target, 4, 2)
    model, positive = prompt_swap(bench, 1, target=target)
    assert (bench.sample(model, positive)[0] - both[1]).abs().max() < 2e-3 * both[1].std()


def test_the_same_prompt_on_its_own_run_changes_nothing(bench):
    """Source and target one prompt, guidance 1, the source's own noise: every step is the source's, to rounding."""
    bench.trajectory = bench.record(SOURCE, 1.0)
    try:
        model, positive = prompt_swap(bench, 1, target=SOURCE)
        again = bench.sample(model, positive, guidance=1.0)
        alone = bench.sample(bench.model, bench.text(SOURCE), guidance=1.0)
        assert (again - alone).abs().max() < 1e-3 * alone.std()
    finally:
        bench.trajectory = bench.record(SOURCE, bench.guidance)


def test_it_costs_one_row_a_step(bench):
    rows = []
    handle = bench.model.model.diffusion_model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        model, positive = prompt_swap(bench, 1)
        bench.sample(model, positive)
        assert sum(rows) == 2 * STEPS + 4  # four of the five steps lie in the window
        rows.clear()
        bench.sample(*prompt_swap(bench, 0))
        assert sum(rows) == 2 * STEPS
    finally:
        handle.remove()


def test_weights_and_two_words(bench):
    model, positive = prompt_swap(
        bench, 1, target="a (yellow:1.3) circle and a blue star on a gray background",
        source="a (red:1.1) circle and a blue square on a gray background",
    )  # fmt: skip
    assert bench.sample(model, positive).isfinite().all()


def test_long_prompts(bench):
    """Over 77 tokens the text comes in chunks."""
    tail = " and".join([" a small white star"] * 20)
    model, positive = prompt_swap(bench, 1, source=SOURCE + " and" + tail, target=TARGET + " and" + tail)
    assert positive[0][0].shape[1] == 154
    assert bench.sample(model, positive).isfinite().all()
