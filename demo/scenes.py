"""The demo world: a scene is a description that can be drawn, captioned and edited.

A scene holds one or two objects, each with a shape, a colour and a pattern, on a coloured background. Drawing
gives an anti-aliased picture and one exact mask per object. Because the picture is a function of the description,
editing the description and drawing it again gives the *true* edited picture, which is what every method of this
pack is measured against. numpy only.

Units: places and sizes are fractions of the picture's side, colours are RGB in 0..1, y points down.
"""

import math
import zlib
from dataclasses import dataclass, replace

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart")
PATTERNS = ("plain", "striped", "dotted")

# Several sRGB anchors per name: the pure colours that other programs draw with, and softer ones. A drawn colour is
# a random mix of its name's anchors, so a name covers a patch of colour space and not a point.
ANCHORS_8BIT = {
    "red": ((220, 40, 40), (255, 0, 0), (190, 30, 45)),
    "green": ((40, 160, 60), (0, 128, 0), (30, 200, 60)),
    "blue": ((40, 80, 220), (0, 0, 255), (30, 60, 180)),
    "yellow": ((240, 215, 50), (255, 255, 0), (250, 220, 0)),
    "purple": ((140, 50, 170), (128, 0, 128), (150, 60, 190)),
    "orange": ((245, 130, 30), (255, 165, 0), (240, 120, 10)),
    "white": ((245, 245, 245), (255, 255, 255), (235, 235, 230)),
    "black": ((20, 20, 20), (0, 0, 0), (35, 35, 40)),
    "gray": ((128, 128, 128), (150, 150, 150), (110, 112, 115)),
    "pink": ((250, 170, 190), (255, 192, 203), (255, 150, 190)),
}
ANCHORS = {name: np.array(rgbs, np.float32) / 255 for name, rgbs in ANCHORS_8BIT.items()}
BACKGROUNDS = tuple(ANCHORS)
COLORS = tuple(name for name in ANCHORS if name not in ("gray", "pink"))

SIZE = 128
# How far a shape of radius 1 reaches from its centre, whichever way it is turned.
REACH = {"circle": 0.9, "square": 1.14, "triangle": 1.25, "star": 1.08, "cross": 1.02, "ring": 0.96, "heart": 1.06}


@dataclass(frozen=True)
class Thing:
    """One object. ``r`` is its radius, ``angle`` its turn in radians, ``rgb``/``tone`` its first and second colour."""

    shape: str
    color: str
    pattern: str
    x: float
    y: float
    r: float
    angle: float = 0.0
    rgb: tuple = ()
    tone: tuple = ()
    slant: float = 0.6
    phase: float = 0.0


@dataclass(frozen=True)
class Scene:
    """A picture's description. ``light`` is a brightness gradient (dx, dy), ``texture`` an amplitude, both 0 = flat."""

    things: tuple
    background: str
    background_rgb: tuple = ()
    light: tuple = (0.0, 0.0)
    texture: float = 0.0
    seed: int = 0


def canonical_rgb(name):
    """The colour that an edit paints with: the first anchor of a name."""
    return tuple(float(c) for c in ANCHORS[name][0])


def second_tone(rgb, mix=0.65):
    """The stripe or dot colour: a tint of dark colours, a shade of light ones."""
    rgb = np.asarray(rgb, np.float32)
    other = 1.0 if rgb @ np.array([0.3, 0.59, 0.11], np.float32) < 0.55 else 0.0
    return tuple(float(c) for c in rgb + (other - rgb) * mix * (1.0 if other else 0.8))


def thing(shape, color, pattern="plain", x=0.5, y=0.5, r=0.22, angle=0.0):
    """An object in canonical colours, for scenes written by hand."""
    rgb = canonical_rgb(color)
    return Thing(shape, color, pattern, x, y, r, angle, rgb, second_tone(rgb))


def scene(background, *things):
    """A flat scene in canonical colours, for scenes written by hand."""
    return Scene(tuple(things), background, canonical_rgb(background))


# ---- editing ----------------------------------------------------------------------------------------------------


def edit_thing(source, index, **changes):
    """The scene with one object's shape, colour or pattern changed; its place, size and light stay."""
    old = source.things[index]
    if "color" in changes:
        rgb = canonical_rgb(changes["color"])
        changes |= {"rgb": rgb, "tone": second_tone(rgb)}
    things = list(source.things)
    things[index] = replace(old, **changes)
    return replace(source, things=tuple(things))


def edit_background(source, name):
    """The scene on another background."""
    return replace(source, background=name, background_rgb=canonical_rgb(name))


def remove_thing(source, index):
    """The scene without one object."""
    return replace(source, things=source.things[:index] + source.things[index + 1 :])


# ---- drawing ----------------------------------------------------------------------------------------------------


def _polygon_distance(px, py, corners):
    """Signed distance to a closed polygon, negative inside."""
    best = np.full(px.shape, np.inf, np.float32)
    sign = np.ones(px.shape, np.float32)
    for (ax, ay), (bx, by) in zip(corners, corners[-1:] + corners[:-1], strict=True):
        ex, ey = bx - ax, by - ay
        wx, wy = px - ax, py - ay
        t = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        best = np.minimum(best, (wx - ex * t) ** 2 + (wy - ey * t) ** 2)
        above, below, left = py >= ay, py < by, ex * wy > ey * wx
        flip = (above & below & left) | (~above & ~below & ~left)
        sign = np.where(flip, -sign, sign)
    return sign * np.sqrt(best)


def _star_corners(points, outer, inner):
    angles = [math.pi * i / points - math.pi / 2 for i in range(2 * points)]
    return [((outer, inner)[i % 2] * math.cos(a), (outer, inner)[i % 2] * math.sin(a)) for i, a in enumerate(angles)]


_L, _W = 0.95, 0.33
_CORNERS = {
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "triangle": [(0.0, -1.0), (1.0, 0.75), (-1.0, 0.75)],
    "star": _star_corners(5, 1.08, 0.46),
    "cross": [(-_W, -_L), (_W, -_L), (_W, -_W), (_L, -_W), (_L, _W), (_W, _W),
              (_W, _L), (-_W, _L), (-_W, _W), (-_L, _W), (-_L, -_W), (-_W, -_W)],
}  # fmt: skip


def _heart_distance(px, py):
    x, y = np.abs(px) / 1.7, 0.55 - py / 1.7
    lobe = np.hypot(x - 0.25, y - 0.75) - math.sqrt(2) / 4
    m = 0.5 * np.maximum(x + y, 0)
    tip = np.sqrt(np.minimum(x**2 + (y - 1) ** 2, (x - m) ** 2 + (y - m) ** 2)) * np.sign(x - y)
    return np.where(x + y > 1, lobe, tip) * 1.7


def shape_distance(shape, px, py):
    """Signed distance of a shape of radius 1 at the origin, in radii, negative inside."""
    if shape == "circle":
        return np.hypot(px, py) - 0.9
    if shape == "ring":
        return np.abs(np.hypot(px, py) - 0.73) - 0.23
    if shape == "heart":
        return _heart_distance(px, py)
    return _polygon_distance(px, py, _CORNERS[shape])


def _window(item, size):
    """The rows and columns that an object can touch; drawing only there is several times faster."""
    reach = 1.35 * item.r

    def span(centre):
        return slice(max(0, int((centre - reach) * size) - 1), max(0, int((centre + reach) * size) + 2))

    return span(item.y), span(item.x)


def _pattern_coverage(item, px, py, size):
    """Share (0..1) of each pixel that shows the second tone; coordinates in sides, relative to the object."""
    c, s = math.cos(item.slant), math.sin(item.slant)
    u, v = px * c + py * s, py * c - px * s
    period = max(0.125, 0.55 * item.r)
    if item.pattern == "striped":
        wave = np.abs((u / period + item.phase) % 1 - 0.5) * period  # distance to a stripe's middle line
        return np.clip(0.5 + (0.21 * period - wave) * size, 0, 1)
    if item.pattern == "dotted":
        du, dv = (u / period + item.phase) % 1 - 0.5, (v / period + item.phase) % 1 - 0.5
        return np.clip(0.5 + (0.3 - np.hypot(du, dv)) * period * size, 0, 1)
    return np.zeros_like(px)


def _texture(source, size):
    rng = np.random.default_rng(source.seed)
    coarse = rng.standard_normal((9, 9)).astype(np.float32)
    at = np.linspace(0, 8, size, dtype=np.float32)
    low = np.minimum(at.astype(int), 7)
    f = at - low
    rows = coarse[low] * (1 - f)[:, None] + coarse[low + 1] * f[:, None]
    return rows[:, low] * (1 - f) + rows[:, low + 1] * f


def render(source, size=SIZE):
    """Draws a scene.

    Returns the picture, (size, size, 3) float32 in 0..1, and the objects' masks, (objects, size, size) float32 in
    0..1, where a pixel cut by an outline holds its covered share.
    """
    at = (np.arange(size, dtype=np.float32) + 0.5) / size
    picture = np.broadcast_to(np.asarray(source.background_rgb, np.float32), (size, size, 3)).copy()
    masks = np.zeros((len(source.things), size, size), np.float32)
    for i, item in enumerate(source.things):
        rows, cols = _window(item, size)
        px, py = np.meshgrid(at[cols] - item.x, at[rows] - item.y)
        c, s = math.cos(item.angle), math.sin(item.angle)
        distance = shape_distance(item.shape, (px * c + py * s) / item.r, (py * c - px * s) / item.r)
        cover = np.clip(0.5 - distance * item.r * size, 0, 1)
        masks[i, rows, cols] = cover
        paint = np.asarray(item.rgb, np.float32)
        if item.pattern != "plain":
            paint = paint + _pattern_coverage(item, px, py, size)[..., None] * (np.asarray(item.tone) - paint)
        picture[rows, cols] += cover[..., None] * (paint - picture[rows, cols])
    shade = 1 + source.light[0] * (at - 0.5) + source.light[1] * (at - 0.5)[:, None]
    if source.texture:
        shade = shade + source.texture * _texture(source, size)
    return np.clip(picture * shade[..., None], 0, 1).astype(np.float32), masks


def changed(before, after, size=SIZE):
    """Where two scenes' objects differ, (size, size) float32: all of every object that only one of them has."""
    (_, old), (_, new) = render(before, size), render(after, size)
    kept = set(before.things) & set(after.things)
    gone = [mask for one, mask in zip(before.things, old, strict=True) if one not in kept]
    come = [mask for one, mask in zip(after.things, new, strict=True) if one not in kept]
    everywhere = np.full((size, size), float(before.background != after.background), np.float32)
    return np.maximum.reduce([everywhere, *gone, *come])


# ---- captions ---------------------------------------------------------------------------------------------------


def _article(words):
    return ["an" if words[0][0] in "aeiou" else "a", *words]


def _size_word(item):
    return "big" if item.r > 0.26 else "small" if item.r < 0.18 else ""


def _phrase(item, color, size):
    words = [_size_word(item) if size else "", "" if item.pattern == "plain" else item.pattern]
    words += [item.color if color else "", item.shape]
    return _article([w for w in words if w])


def caption_words(source, rng=None, background=True):
    """A caption as (word, owner) pairs; owner is the number of the object that the word describes, or None.

    Without a random generator it is the plain one ("a red circle and a ... on a ... background"). With one, the
    phrasing varies: order, "left of" and "right of" (only when true), a size word, a missing colour, with and
    without the background.
    """
    chance = (lambda p: rng.random() < p) if rng is not None else (lambda p: False)
    order = list(range(len(source.things)))
    if len(order) == 2 and chance(0.5):
        order.reverse()
    things = [source.things[i] for i in order]
    joint = ["and"]
    if len(order) == 2 and abs(things[0].x - things[1].x) > 0.2 and chance(0.25):
        joint = ["left", "of"] if things[0].x < things[1].x else ["right", "of"]
    words = [(w, None) for w in ("a", "picture", "of")] if chance(0.1) else []
    for n, (i, item) in enumerate(zip(order, things, strict=True)):
        words += [(w, None) for w in joint] if n else []
        words += [(w, i) for w in _phrase(item, color=not chance(0.05), size=chance(0.3))]
    if background and not chance(0.15):
        words += [(w, None) for w in ("on", *_article([source.background]), "background")]
    return words


def caption(source, rng=None, background=True):
    """A caption of the scene as text; see :func:`caption_words`."""
    return " ".join(word for word, _ in caption_words(source, rng, background))


# Every word a caption can hold. Each is one token of CLIP's vocabulary.
WORDS = tuple(
    dict.fromkeys(
        (*SHAPES, *PATTERNS[1:], *ANCHORS, "big", "small", "a", "an", "and", "on", "background")
        + ("left", "right", "of", "picture")
    )
)


# ---- drawing lots -----------------------------------------------------------------------------------------------


def _random_rgb(name, rng):
    mix = rng.dirichlet(np.ones(len(ANCHORS[name])))
    return tuple(float(c) for c in np.clip(mix @ ANCHORS[name] + rng.normal(0, 0.012, 3), 0, 1))


def _gap(tone, background_rgb):
    """How far a stripe's colour is from the background, so that stripes do not seem to cut the object apart."""
    return min(float(np.linalg.norm(np.subtract(tone, background_rgb))), 0.4)


def _random_places(shapes, rng):
    """Radii and centres of objects that keep their distance; all are redrawn together when they do not fit."""
    reach = np.array([REACH[s] for s in shapes])
    while True:
        radii = rng.uniform(0.2, 0.34, 1) if len(shapes) == 1 else rng.uniform(0.155, 0.255, 2)
        room = radii * reach + 0.02
        centres = [rng.uniform(r, 1 - r, 2) for r in room]
        if len(shapes) == 1 or np.hypot(*(centres[0] - centres[1])) > room.sum() + 0.03:
            return radii, centres


def _compose(kinds, background, rng):
    """A scene of (shape, color, pattern) kinds at random places, with random hues, turns and light."""
    flat = rng.random() < 0.4
    background_rgb = _random_rgb(background, rng)
    things = []
    for (shape, color, pattern), r, (x, y) in zip(kinds, *_random_places([k[0] for k in kinds], rng), strict=True):
        rgb = _random_rgb(color, rng)
        angle = 0.0 if rng.random() < 0.4 else float(rng.uniform(-0.26, 0.26))
        tone = max((second_tone(rgb, mix) for mix in rng.uniform(0.4, 0.9, 3)), key=lambda t: _gap(t, background_rgb))
        slant, phase = float(rng.uniform(0, math.pi)), float(rng.random())
        things.append(Thing(shape, color, pattern, float(x), float(y), float(r), angle, rgb, tone, slant, phase))
    light = (0.0, 0.0) if flat else tuple(float(g) for g in rng.uniform(-0.18, 0.18, 2))
    texture = 0.0 if flat else float(rng.uniform(0, 0.03))
    return Scene(tuple(things), background, background_rgb, light, texture, int(rng.integers(2**31)))


def random_scene(rng, objects=None):
    """A random scene: 1 or 2 objects (2 more often), no two of one colour, none of the background's colour."""
    count = objects or (1 if rng.random() < 0.3 else 2)
    background = str(rng.choice(BACKGROUNDS))
    colors = rng.permutation([c for c in COLORS if c != background])[:count]
    kinds = [(str(rng.choice(SHAPES)), str(c), str(rng.choice(PATTERNS, p=(0.6, 0.2, 0.2)))) for c in colors]
    return _compose(kinds, background, rng)


def _read_caption(text):
    """(kinds, sizes, background or None, whether the first lies left (1) or right (-1) of the second) of a caption.

    Raises ValueError for a caption with words from outside the world, or that no scene can show.
    """
    words = text.lower().replace(",", " ").replace(".", " ").split()
    unknown = [w for w in words if w not in WORDS]
    if unknown:
        raise ValueError(
            f'The caption "{text}" has the word "{unknown[0]}", but the demo world only knows: {", ".join(WORDS)}. '
            "Change the caption of Attune Demo Scene."
        )
    scenery = words.index("on") if "on" in words else len(words)
    kinds, sizes, color, pattern, size = [], [], None, "plain", ""
    for word in words[:scenery]:
        color = word if word in ANCHORS else color
        pattern = word if word in PATTERNS else pattern
        size = word if word in ("big", "small") else size
        if word in SHAPES:
            kinds.append((word, color, pattern))
            sizes.append(size)
            color, pattern, size = None, "plain", ""
    used = {c for _, c, _ in kinds if c}
    background = next((w for w in words[scenery:] if w in BACKGROUNDS), None)
    apart = next(({"left": 1, "right": -1}[w] for w in words[:scenery] if w in ("left", "right")), 0)
    problem = ""
    if len(kinds) not in (1, 2):
        problem = f"names {len(kinds)} objects, but a scene holds one or two shapes"
    elif used & {"gray", "pink"}:
        problem = "asks for a gray or pink object, but those are colours of backgrounds only"
    elif background in used:
        problem = f"asks for a {background} object on a {background} background, where it would not be seen"
    elif apart and len(kinds) == 1:
        problem = "says left of or right of, but names one object"
    elif "small" in sizes and len(kinds) == 1:
        problem = "asks for a small object alone, but only one of two is small"
    elif "big" in sizes and len(kinds) == 2:
        problem = "asks for a big object beside another, but only one alone has the room"
    if problem:
        raise ValueError(f'The caption "{text}" {problem}; change the caption of Attune Demo Scene.')
    return kinds, sizes, background, apart


def scene_from_caption(text, rng):
    """A scene that a caption of this world describes; what it leaves open is drawn by lot.

    Raises ValueError for a caption with words from outside the world, or that no scene can show.
    """
    kinds, sizes, background, apart = _read_caption(text)
    used = {c for _, c, _ in kinds if c}
    background = background or str(rng.choice([b for b in BACKGROUNDS if b not in used]))
    free = [c for c in rng.permutation(COLORS) if c not in used and c != background]
    kinds = [(shape, c or str(free.pop()), pattern) for shape, c, pattern in kinds]
    while True:
        drawn = _compose(kinds, background, rng)
        fits = all(s in ("", _size_word(t)) for s, t in zip(sizes, drawn.things, strict=True))
        if fits and (not apart or (drawn.things[1].x - drawn.things[0].x) * apart > 0.2):
            return drawn


def edit_by_caption(source, text):
    """The scene with what another caption says changed: object by object in the caption's order, and the background.

    A further object is added where there is room, and of two objects the one that the caption leaves out goes. Raises
    ValueError for a caption that no scene can show, or where a further object finds no room.
    """
    kinds, _, background, _ = _read_caption(text)
    things = list(source.things)
    if len(kinds) < len(things):  # the one that is most alike stays
        things = [max(things, key=lambda t: (t.shape == kinds[0][0]) + (t.color == kinds[0][1]))]
    edited = replace(source, things=tuple(things))
    for i, (shape, color, pattern) in enumerate(kinds):
        if i < len(things):
            old = things[i]
            changes = {"shape": shape, "pattern": pattern} | (
                {"color": color} if color not in (None, old.color) else {}
            )
            edited = edit_thing(edited, i, **changes)
        else:
            edited = add_thing(edited, shape, color or free_color(edited), pattern)
    if background not in (None, source.background):
        edited = edit_background(edited, background)
    if edited.background in {t.color for t in edited.things}:
        raise ValueError(
            f'The caption "{text}" leaves a {edited.background} object on a {edited.background} background, where it '
            "would not be seen; change the edited_caption of Attune Demo Edit."
        )
    return edited


def free_color(source):
    """A colour that neither the background nor an object has."""
    return next(c for c in COLORS if c != source.background and c not in {t.color for t in source.things})


def add_thing(source, shape, color, pattern="plain"):
    """The scene with a further object where the most room is. Raises ValueError where there is too little."""
    places = [(x, y) for x in np.linspace(0.16, 0.84, 18) for y in np.linspace(0.16, 0.84, 18)]

    def room(place):
        x, y = place
        others = [np.hypot(x - t.x, y - t.y) - t.r * REACH[t.shape] for t in source.things]
        return min([*others, x, y, 1 - x, 1 - y]) - 0.02

    x, y = max(places, key=room)
    r = min(0.22, room((x, y)) / REACH[shape])
    if r < 0.12:
        raise ValueError(
            f"There is no room for a {color} {shape} in the scene; choose another seed of Attune Demo Edit."
        )
    return replace(source, things=(*source.things, thing(shape, color, pattern, float(x), float(y), float(r))))


def is_held_out(source):
    """True for about a tenth of all combinations of colour, pattern, shape and background; training never sees them.

    It depends on the combination alone, not on order, place or exact hue.
    """
    words = sorted(f"{t.color} {t.pattern} {t.shape}" for t in source.things) + [source.background]
    return zlib.crc32(" | ".join(words).encode()) % 10 == 0


def draw_scene(rng, held_out, objects=None):
    """A random scene from the training side or the held-out side."""
    while True:
        drawn = random_scene(rng, objects)
        if is_held_out(drawn) == held_out:
            return drawn
