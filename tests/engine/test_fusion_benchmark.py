"""The benchmark of masked fusion: its edits are what they are called, and its figures see them."""

from dataclasses import replace

import numpy as np
import pytest

from attune.benchmark import fusion as benchmark
from attune.demo import scenes


@pytest.fixture(scope="module")
def asked():
    return benchmark.draw_tasks(6, 0, benchmark.TEST)


def test_edits_are_what_they_are_called(asked):
    for shape, move, addition in asked:
        assert scenes.is_held_out(shape.source)
        (old, kept), (new, same) = shape.source.things, shape.target.things
        assert same == kept and replace(new, shape=old.shape) == old and new.shape not in (old.shape, kept.shape)
        (old, kept), (new, same) = move.source.things, move.target.things
        assert same == kept and replace(new, x=old.x, y=old.y) == old and np.hypot(new.x - old.x, new.y - old.y) > 0.3
        assert addition.target.things[:1] == addition.source.things and len(addition.target.things) == 2


def test_a_moved_object_stays_in_the_picture_and_off_the_other(asked):
    for task in (row[1] for row in asked):
        masks = scenes.render(task.target)[1]
        assert (masks.min(0) < 0.01).all()
        assert not np.concatenate([masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]], 1).any()


def test_parts_draw_other_scenes_and_a_seed_the_same():
    captions = [
        {row[0].prompts for row in benchmark.draw_tasks(5, 0, part)}
        for part in (benchmark.SETTINGS, benchmark.TEST, benchmark.TURNS)
    ]
    assert captions[0] == {row[0].prompts for row in benchmark.draw_tasks(5, 0, benchmark.SETTINGS)}
    assert all(not a & b for i, a in enumerate(captions) for b in captions[:i])


def test_a_mask_covers_what_changes_and_grows_and_shrinks(asked):
    for task in (task for row in asked for task in row):
        before, after = (scenes.render(scene)[0] for scene in (task.source, task.target))
        different = np.abs(before - after).max(-1) > 0.1
        sizes = []
        for grow in (-4, 0, benchmark.GROW, 128):
            mask = replace(task, grow=grow).mask[0].numpy()
            assert grow < 0 or (mask[different] > 0).all()
            sizes.append(mask.mean())
        assert sizes == sorted(sizes) and sizes[0] < sizes[1] and sizes[-1] == 1


def test_the_truth_succeeds_and_the_source_does_not(asked):
    for task in (task for row in asked for task in row):
        before, after = (scenes.render(scene)[0] for scene in (task.source, task.target))
        assert benchmark.succeeded(task, after) and not benchmark.succeeded(task, before)
        truth, source = benchmark.mark(task, after, before), benchmark.mark(task, before, before)
        assert truth["L1"] == truth["L2"] == 0 and truth["new outline IoU"] > 0.9 > source["new outline IoU"]
        assert source["L1"] > 0.001 and truth["outside dB"] > 60
        spoiled = np.where(replace(task, grow=benchmark.GROW).mask[0].numpy()[..., None] > 0, after, after * 0.9)
        assert benchmark.mark(task, spoiled, before)["outside dB"] < 40


def test_five_turns_change_one_thing_each(asked):
    steps = benchmark.five(asked[0][0].source, np.random.default_rng(0))
    for before, after in zip(steps[:-1], steps[1:], strict=True):
        changed = [(b, a) for b, a in zip(before.things, after.things, strict=True) if b != a]
        assert len(changed) == 1
        ((old, new),) = changed
        assert (old.shape != new.shape) != (old.color != new.color)
        assert len({t.shape for t in after.things}) == len({t.color for t in after.things}) == 2


def test_intervals():
    """Wilson's has the values of its formula's tables; the resampled one holds the mean and narrows with the number."""
    assert benchmark.wilson(5, 10) == [23.7, 76.3] and benchmark.wilson(0, 8) == [0.0, 32.4]
    assert benchmark.wilson(8, 8) == [67.6, 100.0]
    low, high = benchmark.resampled(np.arange(24.0))
    assert 8 < low < 11.5 < high < 15 and benchmark.resampled([3.0] * 5) == [3.0, 3.0]
    few = benchmark.resampled([0.0, 23.0])
    assert few[1] - few[0] > 2 * (high - low)
    marks = [{"success %": 100.0 * (i % 2), "L1": float(i)} for i in range(10)]
    assert benchmark.summed(marks)["95 %"]["success %"] == benchmark.wilson(5, 10)
    less = benchmark.difference(marks, [{"success %": 0.0, "L1": i - 1.0} for i in range(10)])
    assert less["L1"] == [1.0, 1.0, 1.0] and less["success %"][0] == 50.0 and less["success %"][1] < 50.0


def test_a_seam_shows_where_the_masks_latent_pixels_end():
    mask = np.zeros((64, 64), bool)
    mask[20:30, 20:30] = True  # latent pixels 16 to 32
    step = np.zeros((64, 64, 3))
    step[16:32, 16:32] = 0.1
    soft = np.zeros((64, 64, 3))
    soft[12:36, 12:36] = 0.001
    assert benchmark.seam_of(np.zeros_like(step), mask) == 0
    assert benchmark.seam_of(step, mask) > 50 * benchmark.seam_of(soft, mask) > 0
    assert benchmark.seam_of(np.roll(step, 30, (0, 1)), mask) < 0.3 * benchmark.seam_of(step, mask)
    assert benchmark.seam_of(step + 0.3, mask) == pytest.approx(benchmark.seam_of(step, mask)), "a shade is no seam"
    assert benchmark.seam_of(step, np.ones_like(mask)) == 0
