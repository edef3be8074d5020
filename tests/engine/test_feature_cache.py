"""Source features that are kept: the same pictures for fewer rows, and never those of something else."""

import pytest
import torch

from attune.nodes.cache import AttuneFeatureCache

from .bench import METHODS, STEPS, Bench, free_prompt_editing, mutual, outputs, prompt_swap
from .test_editing import differ, rows_of, sources

OTHER = "a green circle and a blue square on a gray background"


def caching(bench, limit_mb=1000):
    """The bench with a cache on its MODEL, and the cache."""
    (model,) = outputs(AttuneFeatureCache, bench.model, limit_mb)
    return bench.but(model=model), model.model_options["transformer_options"]["attune_cache"]


@pytest.fixture(scope="module")
def bench():
    return Bench(height=8)


def rows_and_picture(bench, edited, **settings):
    with rows_of(bench) as rows:
        drawn = bench.sample(*edited, **settings)
    return sum(rows), drawn


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_second_edit_runs_no_row_for_its_source(method, bench):
    cached, cache = caching(bench)
    plain_rows, plain = rows_and_picture(bench, method(bench, 1))
    first_rows, first = rows_and_picture(cached, method(cached, 1))
    again_rows, again = rows_and_picture(cached, method(cached, 1))
    drawn = (4 if method is METHODS["masked fusion"] else 2) * STEPS
    assert first_rows == plain_rows and again_rows == drawn
    assert (cache.size > 0) == (plain_rows > drawn) == bool(sources(method(bench, 1)[0]))
    assert differ(first, plain) < 1e-3 and torch.equal(again, first)


def test_another_edit_of_the_same_picture_finds_them(bench):
    cached, _ = caching(bench)
    cached.sample(*prompt_swap(cached, 1))
    rows, drawn = rows_and_picture(cached, prompt_swap(cached, 1, target=OTHER))
    assert rows == 2 * STEPS
    assert differ(drawn, bench.sample(*prompt_swap(bench, 1, target=OTHER))) < 1e-3


def test_what_was_not_read_yet_is_read_then(bench):
    """A second edit that looks at further layers and steps."""
    cached, cache = caching(bench)
    cached.sample(*mutual(cached, 1, start=0.4, layer=12))
    held = cache.size
    rows, drawn = rows_and_picture(cached, mutual(cached, 1, start=0.2, layer=8))
    assert rows == 2 * STEPS + 4 and cache.size > held  # read in four of five steps
    assert differ(drawn, bench.sample(*mutual(bench, 1, start=0.2, layer=8))) < 1e-3
    rows, _ = rows_and_picture(cached, mutual(cached, 1, start=0.4, layer=12))
    assert rows == 2 * STEPS


def other_picture(cached):
    return prompt_swap(cached, 1, trajectory=cached.other)


def other_text(cached):
    return prompt_swap(cached, 1, source="a blue circle and a blue square on a gray background")


def other_weights(cached):
    """As a LoRA between the cache and the edit node."""
    model, name = cached.model.clone(), "diffusion_model.input_blocks.0.0.weight"
    weight = cached.model.model.state_dict()[name]
    model.add_patches({name: (torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)),)}, 0.1)
    return prompt_swap(cached, 1, model)


@pytest.mark.parametrize("make", [other_picture, other_text, other_weights])
def test_what_is_kept_of_something_else_is_not_read(make, bench):
    cached, _ = caching(bench)
    cached.sample(*prompt_swap(cached, 1))
    rows, drawn = rows_and_picture(cached, make(cached))
    fresh, wanted = rows_and_picture(bench, make(bench))
    assert rows == fresh and differ(drawn, wanted) < 1e-3
    assert differ(drawn, bench.sample(*prompt_swap(bench, 1))) > 1e-2


def test_other_noise_levels_are_other_features(bench):
    cached, _ = caching(bench)
    cached.sample(*prompt_swap(cached, 1))
    # Half of its evaluations lie between the trajectory's noise levels.
    rows, drawn = rows_and_picture(cached, prompt_swap(cached, 1), sampler="dpm_2")
    fresh, wanted = rows_and_picture(bench, prompt_swap(bench, 1), sampler="dpm_2")
    assert rows == fresh - (STEPS - 1) and differ(drawn, wanted) < 1e-3


def test_it_stays_within_its_limit(bench):
    cached, cache = caching(bench)
    cached.sample(*free_prompt_editing(cached, 1))
    whole = cache.size
    cache.limit = 5 * whole // 8  # features of two of the four steps that are read
    cached.sample(*free_prompt_editing(cached, 1, source=OTHER))
    assert 3 * whole // 8 < cache.size <= cache.limit  # the older source made way
    rows, drawn = rows_and_picture(cached, free_prompt_editing(cached, 1, source=OTHER))
    assert rows == 2 * STEPS + 2
    assert differ(drawn, bench.sample(*free_prompt_editing(bench, 1, source=OTHER))) < 1e-3


def test_it_says_how_full_it_is(bench):
    cached, cache = caching(bench)
    said = []
    cache.tell = said.append
    cached.sample(*prompt_swap(cached, 1))
    cached.sample(*prompt_swap(cached, 1))
    held = f"{cache.size / 1e6:.0f} of 1000 MB kept in RAM"
    assert said == [f"{held}; {spared} of 4 source passes were not run" for spared in (0, 4)]
    cache.limit = cache.size // 2
    cached.sample(*prompt_swap(cached, 1, source=OTHER))
    assert said[-1].endswith("; raise limit_mb to keep more")


def test_beside_another_packs_patch_nothing_is_kept(bench):
    """Its patch may change the source's features, and no one knows when it does so otherwise."""
    cached, cache = caching(bench)
    model, positive = prompt_swap(cached, 1)
    model.set_model_attn1_patch(lambda q, k, v, options: (q * 1.01, k, v))
    rows, _ = rows_and_picture(cached, (model, positive))
    assert rows == 3 * STEPS - 1 and cache.size == 0


def test_behind_an_edit_it_is_refused(bench):
    with pytest.raises(ValueError, match="connect the MODEL from before the edit node"):
        outputs(AttuneFeatureCache, prompt_swap(bench, 1)[0], 100)


def test_a_batch_and_half_the_pictures(bench):
    pair = Bench(height=8, batch=2)
    cached, cache = caching(pair)
    first = cached.sample(*prompt_swap(cached, 1))
    rows, again = rows_and_picture(cached, prompt_swap(cached, 1))
    assert rows == 4 * STEPS and torch.equal(first, again)
    assert differ(first, pair.sample(*prompt_swap(pair, 1))) < 1e-3
