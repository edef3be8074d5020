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
