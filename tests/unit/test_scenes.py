import contextlib

import numpy as np
import pytest

from attune.demo import checker, scenes


def draws(count, seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    return [scenes.draw_scene(rng, held_out=False, **kwargs) for _ in range(count)]


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_mask_and_picture_agree(shape):
    """On a flat scene every pixel is background, object or a mix by the covered share: the mask is exact."""
    source = scenes.scene("white", scenes.thing(shape, "black", r=0.3, angle=0.2))
    picture, masks = scenes.render(source, 96)
    white, black = (np.array(scenes.canonical_rgb(c), np.float32) for c in ("white", "black"))
    assert picture.shape == (96, 96, 3) and masks.shape == (1, 96, 96)
    assert np.allclose(picture, white + masks[0][..., None] * (black - white), atol=1e-5)
    assert 0.05 < masks.mean() < 0.3 and masks.max() == 1 and ((masks > 0) & (masks < 1)).any()


def test_area_of_a_circle_is_a_circles():
    mask = scenes.render(scenes.scene("white", scenes.thing("circle", "red", r=0.25)), 256)[1]
    assert abs(mask.sum() / 256**2 - np.pi * (0.9 * 0.25) ** 2) < 2e-4


def test_same_scene_at_any_size():
    for source in draws(3):
        small, large = scenes.render(source, 64)[0], scenes.render(source, 128)[0]
        assert np.abs(large.reshape(64, 2, 64, 2, 3).mean((1, 3)) - small).mean() < 0.03


def test_editing_changes_the_object_and_nothing_else():
    for source in draws(10, objects=2):
        before, masks = scenes.render(source)
        after = scenes.render(
            scenes.edit_thing(source, 0, color="white" if source.things[0].color != "white" else "red")
        )[0]
        assert np.array_equal(before[masks[0] == 0], after[masks[0] == 0])
        assert not np.allclose(before[masks[0] == 1], after[masks[0] == 1], atol=0.05)


def test_removing_and_repainting():
    source = draws(1, objects=2)[0]
    gone = scenes.remove_thing(source, 0)
    assert gone.things == source.things[1:]
    other = scenes.edit_background(source, "pink" if source.background != "pink" else "gray")
    masks = scenes.render(source)[1]
    assert np.array_equal(scenes.render(source)[0][masks.max(0) == 1], scenes.render(other)[0][masks.max(0) == 1])


def test_objects_never_touch_and_stay_inside():
    for source in draws(200):
        masks = scenes.render(source, 64)[1]
        assert (masks.sum(0) <= 1).all()
        assert masks[:, [0, -1]].max() == 0 and masks[:, :, [0, -1]].max() == 0


def test_captions_are_true():
    rng = np.random.default_rng(1)
    seen = set()
    for source in draws(300):
        pairs = scenes.caption_words(source, rng)
        words = [w for w, _ in pairs]
        seen.update(words)
        assert set(words) <= set(scenes.WORDS)
        for word, owner in pairs:
            if owner is not None and word not in ("a", "an", "big", "small"):
                item = source.things[owner]
                assert word in (item.shape, item.color, item.pattern)
        order = [o for w, o in pairs if w in scenes.SHAPES]
        assert sorted(order) == list(range(len(source.things)))
        if "left" in words:
            assert source.things[order[0]].x < source.things[order[1]].x
        if "right" in words:
            assert source.things[order[0]].x > source.things[order[1]].x
        if "on" in words:
            assert words[-2] == source.background
    assert seen == set(scenes.WORDS)


def test_plain_caption():
    source = scenes.scene("gray", scenes.thing("circle", "red"), scenes.thing("square", "orange", "striped"))
    assert scenes.caption(source) == "a red circle and a striped orange square on a gray background"
    source = scenes.scene("orange", scenes.thing("star", "orange"))
    assert scenes.caption(source) == "an orange star on an orange background"


def test_caption_back_to_scene():
    for text in ("a red circle and a striped blue square on a gray background", "a star left of a dotted white heart"):
        for seed in range(5):
            source = scenes.scene_from_caption(text, np.random.default_rng(seed))
            kinds = [(t.pattern, t.shape) for t in source.things]
            if "circle" in text:
                assert scenes.caption(source) == text
            else:
                assert kinds == [("plain", "star"), ("dotted", "heart")] and source.things[0].x < source.things[1].x


@pytest.mark.parametrize(
    "text,word",
    [
        ("a red cat", "cat"),
        ("a red background", "0 objects"),
        ("a star and a star and a star", "3 objects"),
        ("a pink star", "backgrounds only"),
        ("a red star on a red background", "would not be seen"),
        ("a star left of", "names one object"),
        ("a big star and a red ring", "only one alone"),
        ("a small red circle", "only one of two is small"),
    ],
)
def test_captions_from_outside_are_refused(text, word):
    with pytest.raises(ValueError, match=word):
        scenes.scene_from_caption(text, np.random.default_rng(0))


def test_held_out_does_not_depend_on_place_or_order():
    source = draws(1, objects=2)[0]
    assert not scenes.is_held_out(source)
    turned = scenes.Scene(source.things[::-1], source.background)
    assert not scenes.is_held_out(turned)
    share = np.mean([scenes.is_held_out(scenes.random_scene(np.random.default_rng(i))) for i in range(1000)])
    assert 0.07 < share < 0.13


def test_checker_reads_true_renders():
    marks = [checker.grade(scenes.render(s)[0], s) for s in draws(150, seed=3)]
    assert np.mean([m["everything"] for m in marks]) >= 0.98


def test_checker_sees_what_is_wrong():
    source = scenes.scene(
        "gray", scenes.thing("circle", "red", x=0.25, r=0.18), scenes.thing("star", "blue", x=0.75, r=0.2)
    )

    def marks(other):
        return {k for k, right in checker.grade(scenes.render(other)[0], source).items() if not right}

    assert marks(source) == set()
    assert marks(scenes.edit_thing(source, 0, color="green")) == {"colours", "shapes", "everything"}
    assert marks(scenes.edit_thing(source, 0, shape="square")) == {"shapes", "everything"}
    assert marks(scenes.edit_background(source, "white")) == {"background", "everything"}
    extra = scenes.scene("gray", *source.things, scenes.thing("square", "red", y=0.85, r=0.1))
    assert marks(extra) == {"nothing surplus", "everything"}


# ---- edits by caption --------------------------------------------------------------------------------------------

PAIR = "a red circle and a striped blue square on a gray background"


def of_caption(text, seed=0):
    return scenes.scene_from_caption(text, np.random.default_rng(seed))


@pytest.mark.parametrize(
    "after",
    [
        "a red star and a striped blue square on a gray background",
        "a red circle and a dotted yellow heart on a gray background",
        "a red circle and a striped blue square on a white background",
        "a green ring and a blue square on a pink background",
    ],
)
def test_a_caption_changes_what_it_says(after):
    source = of_caption(PAIR)
    edited = scenes.edit_by_caption(source, after)
    assert scenes.caption(edited) == after
    for old, new in zip(source.things, edited.things, strict=True):
        assert (new.x, new.y, new.r, new.angle) == (old.x, old.y, old.r, old.angle)
        assert (new.rgb == old.rgb) == (new.color == old.color)  # an exact hue stays with its name
    assert (edited.background_rgb == source.background_rgb) == (edited.background == source.background)
    assert scenes.edit_by_caption(source, PAIR) == source


def test_what_a_caption_leaves_open_stays():
    source = of_caption(PAIR)
    edited = scenes.edit_by_caption(source, "a star and a striped square")
    assert scenes.caption(edited) == "a red star and a striped blue square on a gray background"
    assert edited.background_rgb == source.background_rgb and edited.things[0].rgb == source.things[0].rgb


@pytest.mark.parametrize(
    "after, kept",
    [
        ("a red circle on a gray background", 0),
        ("a striped blue square on a gray background", 1),
        ("a green square", 1),
        ("a red heart", 0),
    ],
)
def test_the_thing_that_a_caption_leaves_out_goes(after, kept):
    source = of_caption(PAIR)
    edited = scenes.edit_by_caption(source, after)
    assert len(edited.things) == 1
    assert (edited.things[0].x, edited.things[0].y) == (source.things[kept].x, source.things[kept].y)


@pytest.mark.parametrize("seed", range(12))
def test_a_further_thing_is_added_where_there_is_room(seed):
    source = of_caption("a red circle on a gray background", seed)
    try:
        edited = scenes.edit_by_caption(source, "a red circle and a dotted star on a gray background")
    except ValueError as refused:
        assert "no room" in str(refused) and source.things[0].r > 0.25
        return
    assert edited.things[0] == source.things[0]
    new = edited.things[1]
    assert (new.shape, new.pattern) == ("star", "dotted") and new.color not in ("red", "gray")
    masks = scenes.render(edited)[1]
    assert (masks.sum(0) <= 1).all() and masks[:, [0, -1]].max() == 0 and masks[:, :, [0, -1]].max() == 0
    assert masks[1].sum() > 100


def test_most_scenes_of_one_thing_have_room():
    added = 0
    for source in draws(60, objects=1):
        with contextlib.suppress(ValueError):
            added += len(scenes.add_thing(source, "cross", scenes.free_color(source)).things) == 2
    assert added > 40


def test_no_room_is_said():
    full = scenes.scene("gray", scenes.thing("square", "red", r=0.42))
    with pytest.raises(ValueError, match="no room for a green ring .* Attune Demo Edit"):
        scenes.add_thing(full, "ring", "green")


@pytest.mark.parametrize(
    "text, word", [("a red cat", "cat"), ("a star and a star and a star", "3 objects"), ("gray", "0 objects")]
)
def test_edits_that_no_scene_can_show_are_refused(text, word):
    with pytest.raises(ValueError, match=word):
        scenes.edit_by_caption(of_caption(PAIR), text)


@pytest.mark.parametrize(
    "text", ["a gray star and a blue square", "a gray circle", "a circle and a striped square on a blue background"]
)
def test_a_thing_in_the_backgrounds_colour_is_refused(text):
    with pytest.raises(ValueError):
        scenes.edit_by_caption(of_caption(PAIR), text)


def test_what_changed_is_the_old_thing_and_the_new():
    source = of_caption(PAIR)
    masks = scenes.render(source)[1]
    starred = scenes.edit_by_caption(source, "a red star and a striped blue square on a gray background")
    new = scenes.render(starred)[1]
    found = scenes.changed(source, starred)
    assert np.array_equal(found, np.maximum(masks[0], new[0])) and found.dtype == np.float32
    assert np.array_equal(scenes.changed(source, scenes.remove_thing(source, 1)), masks[1])
    assert not scenes.changed(source, source).any()
    assert (scenes.changed(source, scenes.edit_background(source, "white"), 64) == np.ones((64, 64))).all()
    # Outside it the two pictures are one.
    before, after = scenes.render(source)[0], scenes.render(starred)[0]
    assert np.array_equal(before[found == 0], after[found == 0])
    assert (before != after).any(-1)[found == 1].any()
