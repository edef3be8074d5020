"""The benchmarks of edits measure what they say: checked on pictures whose figures are known, and on tiny runs."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attune.attention_patches import host
from attune.attention_patches.words import read_list
from attune.benchmark import cost, editing, prompts
from attune.benchmark.datasets import Sample
from attune.demo import scenes
from attune.nodes.edit import AttunePromptRefine, AttunePromptSwap

from .bench import STEPS, outputs


@pytest.fixture(scope="module")
def asked():
    drawn = editing.draw_scenes(12, 5, pattern=False)
    return [task for row in editing.all_tasks(drawn, 5) for task in row]


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    with torch.inference_mode():
        return editing.Studio(5, 0, tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def patient(studio):
    """A task and its trajectory."""
    drawn = editing.draw_scenes(1, 5, pattern=False)
    with torch.inference_mode():
        return editing.all_tasks(drawn, 5)[0], studio.invert(drawn, "test")[0]


def test_success_is_the_target_and_nothing_else(asked):
    """True renders of the target succeed, all of them; the untouched source and a target that lost a thing do not."""
    assert {task.kind for task in asked} == set(editing.KINDS)
    for task in asked:
        assert editing.succeeded(task, scenes.render(task.target)[0]), task
        assert not editing.succeeded(task, scenes.render(task.source)[0]), task
        if len(task.target.things) == 2:
            assert not editing.succeeded(task, scenes.render(scenes.remove_thing(task.target, 1))[0]), task


def test_the_kept_region_is_what_the_true_edit_keeps(asked):
    for task in asked:
        before, after = (scenes.render(scene)[0] for scene in (task.source, task.target))
        kept, farther = editing.kept_region(task), editing.kept_region(task, editing.MARGIN)
        assert np.abs(before - after)[kept].max() < 0.02
        assert np.abs(before - after)[~kept].max() > 0.1
        assert kept.sum() > farther.sum() > 0 or task.kind == "background"
        assert not (farther & ~kept).any()


def test_patterns_are_told_apart():
    rng, right = np.random.default_rng(3), []
    for _ in range(40):
        scene = scenes.random_scene(rng)
        picture, masks = scenes.render(scene)
        right += [editing.pattern_of(picture, m) == t.pattern for m, t in zip(masks, scene.things, strict=True)]
    assert all(right) and len(right) > 40


def test_local_blend_keeps_more_of_the_picture(studio, patient):
    tasks, trajectory = patient
    settings = editing.Settings(0.8, 0.4, 2.0)
    source = studio.source("source", trajectory)
    pictures = {m: studio.edited(m, trajectory, tasks[0], m, settings) for m in editing.METHODS}
    outside = {m: editing.mark(tasks[0], p, source)[2] for m, p in pictures.items()}
    assert outside[editing.BLEND] > outside[editing.EDIT] + 6
    assert len({p.tobytes() for p in pictures.values()}) == len(pictures)


def test_a_stopped_run_goes_on(studio, patient):
    """A picture that is there is read, not made again; one that was being written is made again."""
    tasks, trajectory = patient

    def fail():
        raise AssertionError("made again")

    first = studio.source("kept", trajectory)
    assert np.array_equal(studio.draw("kept", trajectory, 2.0, fail), first)
    (studio.folder / "half.part").write_bytes(b"")
    assert np.array_equal(studio.source("half", trajectory), first)


def test_direct_inversion_is_the_same_edit(studio, patient):
    tasks, trajectory = patient
    won = {tasks[0].kind: {editing.DDIM: {"won": vars(editing.Settings(0.8, 0.4, 2.0))}}}
    assert editing.direct_is_ddim(studio, tasks[0], trajectory, won)


def test_weights_are_heard(studio, patient):
    """The weighing reaches the picture: a factor of 1 is not a factor of 4."""
    tasks, trajectory = patient
    settings, word = editing.Settings(1.0, 0.0, 7.5), tasks[0].source.things[0].color
    task = editing.Task("weight", tasks[0].source, tasks[0].source, tasks[0].source.things[0].shape)
    for method in (editing.PLAIN, editing.EDIT):
        make = studio.weigh, trajectory, task, method, settings, word
        one, more = (studio.draw(f"{method} {f:g}", trajectory, 7.5, *make, f) for f in (1.0, 4.0))
        assert np.abs(one - more).max() > 0.05


def test_cost_counts_rows_and_bytes():
    with torch.inference_mode():
        it = cost.demo_size(2)
        rows = {name: row["rows a step"] for name, row in cost.times(it, 1).items()}
        assert rows.pop(cost.STOCK) == rows.pop("region prompts") == rows.pop("swap again, cached") == 2
        assert set(rows.values()) == {3}
        figures = cost.memory(it)
    assert figures[cost.STOCK]["over stock"] == 1
    # Two rows of the topmost level's attention are the least that a guided step holds: q, k, v and the result.
    assert figures[cost.STOCK]["peak MB"] > 4 * 2 * 256 * 64 * 4 / 1e6
    for name in cost.EDITS:
        assert 1 <= figures[name]["over stock, weights counted"] < 1.25, name


def test_tables():
    found = {"colour": {"edit": {"success %": 50.0, "dB": 20.0}, "plain": {"success %": 0.0, "dB": 10.0}}}
    lines = editing.table(found, "edit").splitlines()
    assert lines[0] == "| edit | method | success % | dB |" and lines[3] == "| colour | plain | 0.0 | 10.0 |"


# ---- captions of data sets ---------------------------------------------------------------------------------------


def sample(source, target="", words=()):
    return Sample(key="one", kind="text", source=source, target=target or source, picture=None, words=words)


@pytest.mark.parametrize("caption", [
    "a photo of a (red) car", "a poster (1990s: 3) on a wall", "a smiley :-) and a cat", "a (very (old)) car (",
    "a path C:\\(x) and \\ a \\\\(y)", "a sign \\(open\\)", "a caf\u00e9, a cafe\u0301's T-shirt, 10 \u732b",
    "a " * 90 + "(cat)",
])  # fmt: skip
def test_a_caption_is_read_by_the_host_as_it_stands(bench, caption):
    as_it_stands(bench, caption)


@given(st.text("ab (:1)\\", min_size=1, max_size=30))
def test_every_caption_is_read_by_the_host_as_it_stands(bench, caption):
    as_it_stands(bench, caption)


def as_it_stands(bench, caption):
    given = prompts.value_of("$source", sample(caption), prompts.Setup())
    chunks = bench.clip.tokenize(given)["l"]
    assert {weight for chunk in chunks for _, weight in chunk} == {1.0}
    theirs, ours = host.read_words(bench.clip, given), prompts.words_of(caption)
    assert [w.keys for w in theirs.words] == [w.keys for w in ours.words]
    whole = bench.clip.tokenizer.clip_l.tokenizer(caption)["input_ids"][1:-1]
    assert len(theirs.keys) == len(whole)


def test_words_with_brackets_are_found_in_their_caption(bench):
    one = sample("a (red) car on a (wet: 2) road", words=(("(red)", ""), ("(wet: 2)", ""), ("road", "")))
    given = {name: prompts.value_of(name, one, prompts.Setup()) for name in ("$source", "$words", "$braced")}
    read = host.read_words(bench.clip, given["$source"])
    nouns = [at for _, at in host.read_nouns(bench.clip, given["$braced"])[1]]
    assert nouns == [(2, 3, 4), (8, 9, 10, 11, 12), (13,)]
    assert list(read.positions(read_list(given["$words"]))) == [p for at in nouns for p in at]


@pytest.mark.parametrize("source, target", [
    ("a woman in a t-shirt", "a woman in a sweater"), ("a dog's bowl", "a cats bowl"), ("2 cats", "10 dogs"),
    ("a red door.", "a red door"), ("a cat, sitting", "a dog sitting"), ("a (red) cake", "a (round) cake"),
    ("a red circle on a gray wall", "a circle on a dark gray wall"), ("a star " * 50, "a heart " * 50),
])  # fmt: skip
def test_every_pair_of_captions_runs_in_the_node_that_is_chosen_for_it(bench, caplog, source, target):
    one = sample(source, target)
    values = [prompts.value_of(name, one, prompts.Setup()) for name in ("$source", "$target")]
    nodes = {"AttunePromptSwap": AttunePromptSwap, "AttunePromptRefine": AttunePromptRefine}
    node = nodes[prompts.value_of("$exchange", one, prompts.Setup(steps=STEPS))]
    outputs(node, bench.model, bench.clip, bench.trajectory, *values, 0.0, 0.8, 0.0, 0.4, 1024)
    assert "stand at other places" not in caplog.text
