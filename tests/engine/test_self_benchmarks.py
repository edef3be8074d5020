"""The benchmark of edits through self-attention measures what it says."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from attune.attention_patches import host as patches
from attune.attention_patches.values import Place
from attune.benchmark import cost, editing, layers
from attune.benchmark import self_editing as bench
from attune.demo import scenes


@pytest.fixture(scope="module")
def asked():
    return [task for row in bench.draw_tasks(10, 5) for task in row]


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    with torch.inference_mode():
        return bench.Room.open(editing.Studio(5, 0, tmp_path_factory.mktemp("pictures")), "test", 1, 5)


def of(asked, kind):
    return [task for task in asked if task.kind == kind]


def picture(scene):
    return scenes.render(scene)[0]


def test_success_is_the_target_and_nothing_else(asked):
    assert {task.kind for task in asked} == set(bench.KINDS)
    for task in asked:
        assert bench.succeeded(task, picture(task.target)), task
        assert not bench.succeeded(task, picture(task.source)), task


def test_a_removal_leaves_nothing_and_takes_nothing_else(asked):
    for task in of(asked, bench.REMOVAL) + of(asked, bench.EMPTYING):
        gone = task.source.things[0]
        rest = replace(task.target, things=(replace(gone, r=gone.r / 2), *task.target.things))
        assert not bench.succeeded(task, picture(rest))
        other = "pink" if task.target.background != "pink" else "gray"
        assert not bench.succeeded(task, picture(scenes.edit_background(task.target, other)))
        empty = picture(replace(task.target, things=()))
        assert bench.succeeded(task, empty) == (task.kind == bench.EMPTYING)


def test_an_addition_may_stand_anywhere_but_must_be_what_was_asked_for(asked):
    elsewhere = 0
    for task in of(asked, bench.ADDITION):
        kept, new = task.target.things
        other = next(s for s in scenes.SHAPES if s not in (kept.shape, new.shape))
        assert not bench.succeeded(task, picture(scenes.edit_thing(task.target, 1, shape=other)))
        assert not bench.succeeded(task, picture(replace(task.target, things=(new,))))
        # The corner that is farthest from the other thing, where the new one is not meant to stand there itself.
        x, y = (0.8 if at < 0.5 else 0.2 for at in (kept.x, kept.y))
        if np.hypot(x - new.x, y - new.y) > 0.3:
            moved = replace(task.target, things=(kept, replace(new, x=x, y=y, r=0.14)))
            assert bench.succeeded(task, picture(moved))
            figures = bench.mark(task, picture(moved), picture(task.source), picture(task.target))
            assert figures["new outline IoU"] < 0.2
            elsewhere += 1
    assert elsewhere


def test_regions_and_outlines_are_those_of_the_true_edit(asked):
    for task in asked:
        before, after = picture(task.source), picture(task.target)
        kept, farther = bench.kept_region(task), bench.kept_region(task, bench.MARGIN)
        assert np.abs(before - after)[kept].max() < 0.02
        assert np.abs(before - after)[~kept].max() > 0.1
        assert kept.sum() > farther.sum() and not (farther & ~kept).any()
        stay = {bench.COLOUR: 2, bench.BACKGROUND: 2, bench.EMPTYING: 0}.get(task.kind, 1)
        assert len(bench.staying(task)) == stay
        figures = bench.mark(task, after, before, np.zeros_like(after))
        assert figures["success %"] == 100
        assert figures["kept outlines IoU"] > 0.9 if stay else figures["kept outlines IoU"] is None
        new = figures["new outline IoU"]
        assert (new is not None and new > 0.9) == (task.kind in (bench.SHAPE, bench.ADDITION))


def test_figures_see_what_they_are_for(asked):
    """Darker outside costs outside, darker inside costs inside, a thing that shrank costs its outline."""
    for task in asked:
        before, after = picture(task.source), picture(task.target)
        inside = bench.changed(task) > 0.5
        plain = bench.mark(task, after, before, after * 0.99)
        dark_outside = bench.mark(task, np.where(inside[..., None], after, after * 0.8), before, after * 0.99)
        dark_inside = bench.mark(task, np.where(inside[..., None], after * 0.8, after), before, after * 0.99)
        assert dark_outside["outside dB"] < plain["outside dB"] - 3
        assert dark_inside["inside, to the truth dB"] < plain["inside, to the truth dB"] - 3
        if task.kind == bench.EMPTYING:
            continue
        number = len(task.target.things) - 1 if task.kind != bench.ADDITION else 0
        thing = task.target.things[number]
        shrunk = picture(scenes.edit_thing(task.target, number, r=thing.r * 0.7))
        assert bench.mark(task, shrunk, before, after)["kept outlines IoU"] < plain["kept outlines IoU"] - 0.1


def test_averages_leave_out_what_is_not_there():
    rows = [{"a": 1.0, "b": None}, {"a": 2.0, "b": None}, {"a": None, "b": None}]
    assert bench.average(rows) == {"a": 1.5, "b": None}
    assert "| 1.5 |  |" in editing.table({"kind": {"method": bench.average(rows)}}, "edit")


def test_the_best_has_most_successes_then_leaves_most_alone():
    rows = {
        "calm": {"success %": 50.0, "outside dB": 40.0},
        "good": {"success %": 75.0, "outside dB": 20.0},
        "better": {"success %": 75.0, "outside dB": 21.0},
    }
    assert bench.best(rows) == "better"


def made_up(better, worse, key="success %"):
    """Marks in which one method has more of a figure than another, everywhere."""
    marks = {}
    for kind in bench.KINDS:
        for method in bench.METHODS:
            value = 100.0 if method == better else 0.0 if method == worse else 50.0
            mark = {"success %": 50.0, "outside dB": 20.0, "inside, to the truth dB": 20.0} | {key: value}
            marks[kind, method] = [dict(mark), dict(mark)]
    return marks


@pytest.mark.parametrize(
    ("claim", "better", "worse", "key"),
    [
        ("FPE changes colours that P2P fails to change", bench.FPE, bench.P2P, "success %"),
        ("CPAM keeps backgrounds that MasaCtrl alters", bench.CPAM, bench.MASA, "outside dB"),
        ("CPAM keeps backgrounds that MasaCtrl, masked alters", bench.CPAM, bench.MASKED, "outside dB"),
    ],
)
def test_claims_can_be_borne_out_and_not(claim, better, worse, key):
    assert bench.claims(made_up(better, worse, key))[claim]["verdict"] == "confirmed"
    assert bench.claims(made_up(worse, better, key))[claim]["verdict"] == "contradicted"


def test_every_method_makes_a_picture_of_its_own(room):
    """And every setting that is tried reaches the picture: no two of a method are alike."""
    task = of(room.asked[0], bench.SHAPE)[0]
    pictures = {}
    for method in bench.METHODS:
        for settings in bench.TRIED[method]:
            if "start" not in settings or settings["start"] == 0.08:  # 0.3 of 5 steps is a step like 0.2
                pictures[method, bench.say(settings)] = room.edited(0, task, method, settings)
    assert len({p.tobytes() for p in pictures.values()}) == len(pictures)


def test_prompts_for_a_mask_say_the_picture_or_what_is_new(room):
    for kind in (bench.COLOUR, bench.BACKGROUND, bench.ADDITION):
        task = of(room.asked[0], kind)[0]
        settings = ({"guidance": 2.0, "prompt": prompt} for prompt in (bench.WHOLE, bench.NEW))
        whole, new = (room.edited(0, task, bench.CPAM, each) for each in settings)
        assert np.abs(whole - new).max() > 0.05


def test_more_noise_leaves_less(room):
    task = of(room.asked[0], bench.COLOUR)[0]
    marks = [room.mark(0, task, room.edited(0, task, m, {"guidance": 2.0})) for m in bench.SDEDIT]
    assert marks[0]["outside dB"] > marks[1]["outside dB"] + 1


def test_sources_are_the_tasks_own(room):
    """An addition starts from the picture without the new thing, inverted under its own caption or under none."""
    for task in room.asked[0]:
        assert np.abs(room.source(0, task.kind) - picture(task.source)).mean() < 0.05
        assert np.abs(room.truth(0, task) - picture(task.target)).mean() < 0.05
        captioned, bare = (room.runs[task.kind, text][0] for text in (scenes.caption, bench.empty))
        assert torch.equal(captioned.latents[-1], bare.latents[-1])
        assert (captioned.noise - bare.noise).abs().max() > 0.01


def test_kernels_are_timed_by_pairs_and_put_back():
    before = patches._EditPatch._self_attention
    it = cost.demo_size(2)
    found = cost.kernels(it, 1)
    assert patches._EditPatch._self_attention is before
    assert list(found) == ["256 tokens", "64 tokens", "16 tokens", "4 tokens"]
    for row in found.values():
        assert row["the host's own, microseconds"] > 0 and 0.3 < row["over the host's own"] < 30


def test_the_colour_claim_is_decided_by_pictures_that_one_of_the_two_alone_gets_right():
    def won(*values):
        return [{"success %": 100.0 * value, "outside dB": 20.0} for value in values]

    ten, none = won(*[True] * 10), won(*[False] * 10)
    assert layers.judge(ten, none)["verdict"] == "confirmed"
    assert layers.judge(none, ten)["verdict"] == "contradicted"
    assert layers.judge(ten, ten) == {"succeeds alone": 0, "the other alone": 0, "chance": 1.0, "verdict": "open"}
    assert layers.judge(won(*[True] * 3), won(*[False] * 3))["verdict"] == "open"  # 3 of 3 is chance in one of four


def test_a_share_comes_with_its_interval():
    told = layers.figures([{"success %": 100.0, "outside dB": 20.0}] * 3 + [{"success %": 0.0, "outside dB": 24.0}])
    assert (told["pictures"], told["success %"], told["outside dB"]) == (4, 75.0, 21.0)
    low, high = told["its interval"]
    assert low == pytest.approx(30.1, abs=0.1) and high == pytest.approx(95.4, abs=0.1)  # Wilson's, of 3 in 4


def test_the_rows_of_layers_edit_where_their_names_say(room):
    """In the demo world 1024 tokens are all 16 layers, 64 those that the papers' code edits: 3 to 13."""
    task, bench_of = of(room.asked[0], bench.COLOUR)[0], room.studio.bench
    side = scenes.SIZE // 8
    grids = list(patches._grids(bench_of.model.model.diffusion_model, side, side).items())
    acts = {}
    for name, (method, settings) in layers.ROWS.items():
        trajectory = room.runs[task.kind, scenes.caption][0]
        model = bench.MAKERS[method](bench_of, task, trajectory, 2.0, **settings)[0]
        ours = model.model_options["transformer_options"][patches.KEY].controllers[0]
        found = set()
        for number, ((block, depth), grid) in enumerate(grids):
            at = Place("self", block, depth, grid, step=0, steps=20, number=number)
            found |= {number + 1} if ours.edits(at) else set()
        acts[name] = found
    for name, found in acts.items():
        first, last = (1, 16) if "all layers" in name else (3, 13) if "64" in name else (4, 14)
        assert found == set(range(first, last + 1)), name
