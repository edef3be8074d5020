"""The benchmark of learned words: its scenes leak as they should, and its figures are what they say."""

import numpy as np
import pytest
import torch

from attune.benchmark import dynamic_prompt as benchmark
from attune.demo import scenes


def test_scenes_leak_in_their_way_and_were_never_shown():
    for i, one in enumerate(benchmark.draw_scenes(6, 0, benchmark.TEST)):
        first, second = one.things
        assert scenes.is_held_out(one) and (first.color, first.shape) != (second.color, second.shape)
        assert i % 3 != 0 or first.color == second.color
        assert i % 3 != 1 or first.shape == second.shape
        assert (one.texture > 0.1) == (i % 3 == 2)


def test_parts_draw_other_scenes_and_a_seed_the_same():
    captions = [
        {scenes.caption(s) for s in benchmark.draw_scenes(5, 0, part)}
        for part in (benchmark.TUNING, benchmark.TEST, benchmark.SWAPS)
    ]
    again = {scenes.caption(s) for s in benchmark.draw_scenes(5, 0, benchmark.TUNING)}
    assert captions[0] == again
    assert all(len(a & b) < 2 for i, a in enumerate(captions) for b in captions[:i])


def test_overlap_counts_pixels():
    maps = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    masks = (torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(2)) > 0.6).float()
    batch = benchmark.Batch([], [], [], None, [masks], None)
    found = benchmark.overlaps(batch, maps)[0]
    for at, threshold in enumerate(benchmark.THRESHOLDS.tolist()):
        expected = []
        for map_, mask in zip(maps[0].numpy(), masks.numpy(), strict=True):
            above = map_ / map_.max() > np.float32(threshold)
            expected.append((above & (mask > 0.5)).sum() / max(1, (above | (mask > 0.5)).sum()))
        assert float(found[at]) == pytest.approx(np.mean(expected), abs=1e-6)
    assert found[-1] == 0  # nothing is above the greatest value


def test_summary_compares_each_method_at_its_own_best():
    steps = len(benchmark.THRESHOLDS)
    base, better = torch.zeros(60, steps), torch.zeros(60, steps)
    base[:, 10] = 0.5
    better[:, 20] = 0.5 + 0.2 * torch.rand(60, generator=torch.Generator().manual_seed(0))
    found = benchmark.summary({benchmark.NULL_TEXT: base, "better": better})
    low, high = found["better"]["95 % interval"]
    gain = float((better[:, 20] - 0.5).mean())
    error = float(better[:, 20].std()) / 60**0.5
    assert found["better"]["above null-text"] == pytest.approx(gain, abs=1e-4)
    assert low == pytest.approx(gain - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(gain + 1.96 * error, abs=0.3 * error)
    assert found[benchmark.NULL_TEXT]["95 % interval"] == [0.0, 0.0]


@pytest.mark.parametrize("what", ["color", "shape"])
def test_the_truth_passes_and_the_source_does_not(what):
    rng = np.random.default_rng(3)
    right = wrong = 0
    for source in benchmark.draw_scenes(4, 0, benchmark.SWAPS):
        goal = benchmark.exchanged(source, what, rng)
        (truth, _), (before, masks) = scenes.render(goal), scenes.render(source)
        truth, before, masks = torch.from_numpy(truth), torch.from_numpy(before), torch.from_numpy(masks)
        for thing, mask in zip(goal.things, masks, strict=True):
            right += benchmark.told(truth, thing, what, mask)
            wrong += benchmark.told(before, thing, what, mask)
        _, _, outside, whole, similar = benchmark.mark(truth, goal, what, before, truth, masks)
        assert whole == pytest.approx(100) and similar == pytest.approx(1, abs=1e-4) and outside > 25
    assert right >= 7 and wrong == 0
