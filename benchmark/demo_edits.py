"""The edits that the demo world is asked for, and whether a picture shows them. It knows no model and no ComfyUI.

Eight kinds, each on held-out scenes of two objects of different shapes whose first object is plain. The true edited
scene is known, so the true picture, the true mask and success are known too. Scenes whose true edited picture the
checker misreads, one or two of a hundred, are not used.
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from ..demo import checker, scenes

KINDS = COLOUR, SHAPE, PATTERN, BACKGROUND, ADD, REMOVE, MOVE, TWO = (
    "colour", "shape", "pattern", "background", "add", "remove", "move", "two at once",
)  # fmt: skip
OVERLAP = 0.6  # intersection over union at which an object is in its place
APART = 0.2  # share of the side from which on one object is said to be left or right of another, as in captions
DRAW = 23  # sets these lots apart from those of the other benchmarks


# ---- what is asked for -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """One edit: its kind, the two scenes and their captions, the same as an instruction, and the words that bound it.

    ``words`` are pairs of a word of the source caption and one of the target caption whose places may change, as local
    blending wants them; a side is empty where its caption has no such word. ``kept`` are the words of what has to stay
    where no word says what may change. ``thing`` is the shape that the edit is about.
    """

    kind: str
    before: scenes.Scene
    after: scenes.Scene
    source: str
    target: str
    instruction: str
    thing: str
    words: tuple = ()
    kept: tuple = ()


def draw_edit(kind, seed, number):
    """Edit ``number`` of a kind (one of KINDS) for a seed; it depends on nothing else."""
    rng = np.random.default_rng([seed, DRAW, KINDS.index(kind), number])
    while True:
        drawn = scenes.draw_scene(rng, held_out=True, objects=2)
        first, second = drawn.things
        if first.pattern == "plain" and first.shape != second.shape:
            made = _MAKERS[kind](drawn, rng)
            if made is not None and shows(kind, *made[:2], scenes.render(made[1])[0]):
                before, after, instruction, thing, words = made
                told = _sided if kind == MOVE else scenes.caption
                kept = (first.shape, second.shape) if kind == BACKGROUND else ()
                return Edit(kind, before, after, told(before), told(after), instruction, thing, words, kept)


def _pick(rng, names, drawn):
    """One of the names that nothing in the scene has."""
    used = {drawn.background, *(v for t in drawn.things for v in (t.shape, t.color, t.pattern))}
    return str(rng.choice([n for n in names if n not in used]))


def _colour(drawn, rng):
    color, shape = _pick(rng, scenes.COLORS, drawn), drawn.things[0].shape
    after = scenes.edit_thing(drawn, 0, color=color)
    return drawn, after, f"make the {shape} {color}", shape, ((shape, shape),)


def _shape(drawn, rng):
    old, new = drawn.things[0].shape, _pick(rng, scenes.SHAPES, drawn)
    return drawn, scenes.edit_thing(drawn, 0, shape=new), f"turn the {old} into a {new}", old, ((old, new),)


def _pattern(drawn, rng):
    pattern, shape = str(rng.choice(scenes.PATTERNS[1:])), drawn.things[0].shape
    after = scenes.edit_thing(drawn, 0, pattern=pattern)
    return drawn, after, f"make the {shape} {pattern}", shape, ((shape, shape),)


def _background(drawn, rng):
    name = _pick(rng, scenes.BACKGROUNDS, drawn)
    return drawn, scenes.edit_background(drawn, name), f"make the background {name}", "background", ()


def _add(drawn, rng):
    new = drawn.things[1]
    return scenes.remove_thing(drawn, 1), drawn, f"add a {new.color} {new.shape}", new.shape, (("", new.shape),)


def _remove(drawn, rng):
    old = drawn.things[0].shape
    return drawn, scenes.remove_thing(drawn, 0), f"remove the {old}", old, ((old, ""),)


def _move(drawn, rng):
    """To the other side of the second object, which the captions can say."""
    (first, second), turn = drawn.things, 0
    while abs(first.x - second.x) > APART and turn < 20:
        moved, turn = move(drawn, rng), turn + 1
        if moved is None:
            return None
        now = moved.things[0].x - second.x
        if abs(now) > APART and (first.x > second.x) != (now > 0):
            instruction = f"move the {first.shape} to the {'right' if now > 0 else 'left'} of the {second.shape}"
            return drawn, moved, instruction, first.shape, ((first.shape, first.shape),)
    return None


def _two(drawn, rng):
    color, new = _pick(rng, scenes.COLORS, drawn), _pick(rng, scenes.SHAPES, drawn)
    first, second = (t.shape for t in drawn.things)
    after = scenes.edit_thing(scenes.edit_thing(drawn, 0, color=color), 1, shape=new)
    instruction = f"make the {first} {color} and turn the {second} into a {new}"
    return drawn, after, instruction, first, ((first, first), (second, new))


_MAKERS = dict(zip(KINDS, (_colour, _shape, _pattern, _background, _add, _remove, _move, _two), strict=True))


def _sided(scene):
    """The caption of a scene of two objects, with the side on which the first one lies."""
    first, second = scene.things
    return scenes.caption(scene).replace(" and ", f" {'left' if first.x < second.x else 'right'} of ", 1)


def move(scene, rng):
    """The scene with its first object elsewhere, or None where there is no room."""
    first, *rest = scene.things
    for _ in range(200):
        x, y = rng.uniform(0.2, 0.8, 2)
        reach = first.r * scenes.REACH[first.shape] + 0.03
        inside = all(reach < v < 1 - reach for v in (x, y))
        free = all(np.hypot(x - t.x, y - t.y) > reach + t.r * scenes.REACH[t.shape] for t in rest)
        if inside and free and np.hypot(x - first.x, y - first.y) > 0.3:
            return replace(scene, things=(replace(first, x=float(x), y=float(y)), *rest))
    return None


def changed(edit, size=scenes.SIZE):
    """The true mask (size, size) bool: every pixel that the edit changes. A new background is what no object covers,
    pixels cut by an outline among it."""
    if edit.kind == BACKGROUND:
        return scenes.render(edit.before, size)[1].max(0) < 1
    return scenes.changed(edit.before, edit.after, size) > 0


def scene_of(values):
    """The scene that ``dataclasses.asdict`` took apart, also after JSON, which knows no tuples."""

    def whole(fields):
        return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}

    things = tuple(scenes.Thing(**whole(thing)) for thing in values["things"])
    return scenes.Scene(**whole(values) | {"things": things})


# ---- what a picture shows ----------------------------------------------------------------------------------------


def look_inside(picture, mask):
    """How much a patch of a picture (H, W, 3) varies beside an even fall of light, and how much in one direction.

    The first is a standard deviation in units of the picture, the second from 0 (dots) to 1 (stripes).
    """
    inside = ndimage.binary_erosion(mask > 0.5, iterations=3)
    inside = inside if inside.sum() > 30 else mask > 0.9
    pixels = picture[inside]
    axis = np.linalg.svd(pixels - pixels.mean(0), full_matrices=False)[2][0]
    field = (picture - pixels.mean(0)) @ axis
    y, x = np.nonzero(inside)
    plane = np.stack([np.ones(len(x)), x / len(mask), y / len(mask)], 1)
    rest = field[inside] - plane @ np.linalg.lstsq(plane, field[inside], rcond=None)[0]
    gy, gx = np.gradient(ndimage.gaussian_filter(field, 1.0))
    xx, yy, xy = ((a * b)[inside].sum() for a, b in ((gx, gx), (gy, gy), (gx, gy)))
    return float(rest.std()), float(np.hypot(xx - yy, 2 * xy) / (xx + yy + 1e-12))


def pattern_of(picture, mask):
    """The pattern of the object under a mask. Right on each of 841 true renders, with room on both sides."""
    contrast, direction = look_inside(picture, mask)
    return "plain" if contrast < 0.08 else "striped" if direction > 0.6 else "dotted"


def overlap(a, b):
    return (a & b).sum() / max(1, (a | b).sum())


def shows(kind, before, after, picture):
    """Whether a picture (H, W, 3) in 0..1 shows the true edited scene and no more than that.

    The background has its colour; each object has its colour and shape and stands in its place; there is no other
    object. What is added may stand anywhere, since no caption says where. Patterns count where one is asked for.
    """
    background, found = checker.look(picture)
    if background != after.background or len(found) != len(after.things):
        return False
    for thing, mask in zip(after.things, scenes.render(after, len(picture))[1], strict=True):
        new = thing not in before.things
        if new and kind == ADD:
            if (thing.color, thing.shape) not in [(f.color, f.shape) for f in found]:
                return False
            continue
        seen = max(found, key=lambda f: overlap(f.mask, mask > 0.5))
        if overlap(seen.mask, mask > 0.5) < OVERLAP or (seen.color, seen.shape) != (thing.color, thing.shape):
            return False
        if new and kind == PATTERN and pattern_of(picture, mask) != thing.pattern:
            return False
    return True
