"""Labelled pictures, drawn with Pillow.

Where a function takes ``each``, what it draws goes through it one by one, and it may raise there to end the drawing.
"""

import bisect
import colorsys
import functools
import math
import unicodedata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

INKS = ((250, 204, 21), (96, 165, 250), (244, 114, 182), (74, 222, 128))  # of curves
GAP, PAPER, INK, FAINT = 8, (24, 24, 27), (228, 228, 231), (161, 161, 170)
GREEN, RED = (34, 197, 94), (239, 68, 68)
LETTERS = Path(__file__).parent / "fonts" / "wqy-microhei.ttf"  # Latin, Greek, Cyrillic, Chinese, Japanese, Korean
SMALL, WIDTH = 12, 1100  # pixels: the smallest lettering, and how wide a sheet of many tiles gets
MOST = 600  # maps on one sheet
LEARNING_LOSSES = ("balance", "disjoint", "background", "null-text")  # those with thresholds first


def to_pil(picture):
    """(H, W, 3) or (H, W) in 0..1 to a Pillow picture."""
    array = (picture.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(array).convert("RGB")


def from_pil(picture):
    """A Pillow picture to IMAGE (1, H, W, 3)."""
    return torch.from_numpy(np.asarray(picture, np.float32) / 255)[None]


@functools.cache
def _font(size, plain):
    """Pillow's own font, which knows ASCII alone, for ``plain`` text, and the pack's for any other."""
    if plain:
        return ImageFont.load_default(size)
    return ImageFont.truetype(LETTERS, size, layout_engine=ImageFont.Layout.BASIC)


@functools.lru_cache(4096)
def _shown(letter):
    """A letter as a sheet shows it: what no font here draws, such as an emoji, by its number."""
    if letter.isspace():
        return " "
    control = unicodedata.category(letter).startswith("C")
    # The font draws one and the same box for all that it lacks.
    if not control and (letter.isascii() or _drawn(letter) != _drawn("\U0010ffff")):
        return letter
    return f"U+{ord(letter):04X}"


def _drawn(letter):
    mask = _font(16, plain=False).getmask(letter)
    return mask.size, bytes(mask)


def _readable(text):
    return "".join(map(_shown, unicodedata.normalize("NFC", text)))


def _fitting(line, size, width):
    """The largest font of at most ``size`` in which a line is at most ``width`` pixels wide, or the smallest one."""
    sizes = range(SMALL, max(size, SMALL) + 1)
    fits = bisect.bisect(sizes, width, key=lambda s: _font(s, line.isascii()).getlength(line))
    return _font(sizes[max(fits - 1, 0)], line.isascii())


def _labelled(picture, text, size, narrowest=0):
    """The picture with its text below, centred; the first line large, further ones small and gray.

    A line too long is set smaller, down to 12 pixels, and then cut. The tile is at least ``narrowest`` pixels wide.
    """
    width = max(picture.width, narrowest)
    lines = [(line, size if i == 0 else SMALL, INK if i == 0 else FAINT) for i, line in enumerate(text.split("\n"))]
    tile = Image.new(
        "RGB", (width, picture.height + sum(round(1.35 * s) for _, s, _ in lines) + round(size / 3)), PAPER
    )
    tile.paste(picture, ((width - picture.width) // 2, 0))
    draw, y = ImageDraw.Draw(tile), picture.height + 0.25 * size
    for line, size_, ink in lines:
        # No letter is as narrow as a pixel, and two may make one.
        line = _readable(line[: 2 * width])[:width]
        font = _fitting(line, size_, width)
        if font.getlength(line) > width:
            fits = bisect.bisect(range(1, len(line)), width, key=lambda n: font.getlength(line[:n] + "~"))
            line = line[:fits] + "~"
        draw.text((max(0, (width - font.getlength(line)) / 2), y), line, ink, font)
        y += round(1.35 * size_)
    return tile


def _stacked(rows):
    """Rows of tiles, each from left to right, on one sheet."""
    width = max(sum(t.width + GAP for t in row) for row in rows) + GAP
    out = Image.new("RGB", (width, sum(max(t.height for t in row) + GAP for row in rows) + GAP), PAPER)
    y = GAP
    for row in rows:
        x = GAP
        for tile in row:
            out.paste(tile, (x, y))
            x += tile.width + GAP
        y += max(t.height for t in row) + GAP
    return out


def rows_of(tiles, columns):
    """Tiles in rows from left to right, on one sheet."""
    return _stacked(_rows(tiles, columns))


def _rows(tiles, columns):
    return [tiles[i : i + columns] for i in range(0, len(tiles), columns)]


def _in_runs(tiles, run, columns):
    """Tiles on one sheet of at most ``columns``, where every ``run`` of them stay side by side if they fit at all."""
    if run <= columns:
        return rows_of(tiles, run * _even(len(tiles) // run, columns // run))
    wide = _even(run, max(1, columns))
    runs = [tiles[i : i + run] for i in range(0, len(tiles), run)]
    return _stacked([whole[i : i + wide] for whole in runs for i in range(0, run, wide)])


def _even(count, most):
    """How many columns spread ``count`` tiles evenly over as few rows as ``most`` columns need."""
    return math.ceil(count / math.ceil(count / most))


def _headed(picture, text):
    """The picture under a line of text, on a sheet that is wide enough for both."""
    font = ImageFont.load_default(14)
    width = max(picture.width, math.ceil(font.getlength(text)) + 2 * GAP)
    out = Image.new("RGB", (width, picture.height + 28), PAPER)
    ImageDraw.Draw(out).text((GAP, GAP), text, FAINT, font)
    out.paste(picture, (0, 28))
    return out


def _scaled(picture, height):
    kind = Image.Resampling.LANCZOS if picture.height > height else Image.Resampling.BICUBIC
    return picture.resize((max(1, round(picture.width * height / picture.height)), height), kind)


def contact_sheet(pictures, labels, height, wide=None, each=iter):
    """IMAGE (1, H, W, 3) of pictures (H, W, 3) side by side, ``height`` pixels tall, each over its label.

    ``wide`` is an IMAGE batch whose first picture goes below across the width; its label follows the others'.
    """
    labels = labels + [""] * (len(pictures) + 1)
    size = max(SMALL, height // 14)
    tiles = [
        _labelled(_scaled(to_pil(p), height), label, size) for p, label in zip(each(pictures), labels, strict=False)
    ]
    top = rows_of(tiles, len(tiles))
    if wide is None:
        return from_pil(top)
    below = to_pil(wide[0])
    width = top.width - 2 * GAP
    below = below.resize((width, max(1, round(below.height * width / below.width))), Image.Resampling.LANCZOS)
    below = _labelled(below, labels[len(pictures)], size)
    out = Image.new("RGB", (top.width, top.height + below.height + GAP), PAPER)
    out.paste(top, (0, 0))
    out.paste(below, (GAP, top.height))
    return from_pil(out)


def _enlarged(picture, side, kind):
    """A small picture (h, w) or (h, w, 3) in 0..1 as one whose longer side is ``side`` pixels."""
    share = side / max(picture.shape[:2])
    size = (max(1, round(picture.shape[1] * share)), max(1, round(picture.shape[0] * share)))
    return to_pil(picture).resize(size, kind)


def _tokens(picture, side):
    """A picture of tokens, each of them a square, as the papers show them."""
    return _enlarged(picture, side, Image.Resampling.NEAREST)


def mask_strip(masks, steps, total, height, each=iter):
    """IMAGE (1, H, W, 3) of masks (S, B, h, w), ``height`` pixels tall, at the 0-based ``steps`` of ``total``."""
    side = round(height * max(1, masks.shape[3] / masks.shape[2]))
    tiles = [
        _labelled(_tokens(mask, side), _step_name((step,), total), SMALL, 64)
        for picture in range(masks.shape[1])
        for step, mask in zip(steps, each(masks[:, picture]), strict=True)
    ]
    return from_pil(_in_runs(tiles, len(steps), max(1, WIDTH // (tiles[0].width + GAP))))


def _step_name(steps, total):
    return f"step {steps[0] + 1} of {total}" if len(steps) == 1 else f"mean of {len(steps)} steps"


def map_sheet(found, stretch, each=iter):
    """IMAGE (B, H, W, 3) of a ``maps.WordMaps``: every word's map for every layer and step, labelled.

    What all have in common stands above. A word's maps stay together: its steps, layer by layer, or else its layers.
    ``stretch`` brings a map (B, h, w) to 0..1. Raises ValueError for more maps than can be looked at.
    """
    count = len(found.words) * len(found.layers) * len(found.steps)
    if count > MOST:
        raise ValueError(
            f"The sheet would hold {count} maps, but more than {MOST} cannot be told apart; name fewer words, raise "
            "every, or average layers or steps in Attune Attention Maps."
        )
    side = 128 if count <= 96 else 96
    smooth = functools.partial(_enlarged, side=side, kind=Image.Resampling.BICUBIC)
    layers = [name if len(found.layers) > 1 else None for name in found.layers]
    steps = [_step_name(s, found.total) if len(found.steps) > 1 else None for s in found.steps]
    heading = [found.layers[0]] * (len(found.layers) == 1)
    heading += [_step_name(found.steps[0], found.total)] * (len(found.steps) == 1)
    run = next((len(x) for x in (steps, layers) if len(x) > 1), count)
    shown = [[stretch(m) for m in word] for layer in found.maps for word in layer]  # layer by layer, word by word
    sheets = []
    for picture in range(found.maps[0].shape[2]):
        tiles = [
            _labelled(smooth(shown[n * len(found.words) + w][i][picture]), label, side // 8, 96)
            for w, word in enumerate(found.words)
            for n, layer in enumerate(layers)
            for i, step in enumerate(each(steps))
            for label in ["\n".join(filter(None, (word, layer, step)))]
        ]
        whole = _in_runs(tiles, run, WIDTH // (tiles[0].width + GAP))
        sheets.append(from_pil(_headed(whole, ", ".join(heading)) if heading else whole))
    return torch.cat(sheets)


def component_sheet(components, shares, grid, side=192):
    """IMAGE (1, H, W, 3): main components (C, h * w) one by one, and the first three as red, green and blue."""
    pictures = components.unflatten(1, grid)
    low, high = pictures.amin((1, 2), keepdim=True), pictures.amax((1, 2), keepdim=True)
    pictures = (pictures - low) / (high - low).clamp(min=1e-8)
    tiles = [
        _labelled(_tokens(p, side), f"component {i}\n{_percent(share)} of the differences", 16, 96)
        for i, (p, share) in enumerate(zip(pictures, shares.tolist(), strict=True), 1)
    ]
    if len(pictures) >= 3:
        tiles.insert(0, _labelled(_tokens(pictures[:3].permute(1, 2, 0), side), "1 to 3\nas red, green, blue", 16, 96))
    return from_pil(rows_of(tiles, _even(len(tiles), max(1, WIDTH // (side + GAP)))))


def cluster_sheet(labels, count, grid, side=192):
    """IMAGE (1, H, W, 3): clusters (h * w) as colours, and each one by itself with its share of the picture."""
    labels = labels.unflatten(0, grid)
    colors = torch.tensor([_color(i, count) for i in range(count)])
    tiles = [_labelled(_tokens(colors[labels], side), "all clusters", 16, 96)]
    for i, color in enumerate(colors):
        mine = (labels == i).float()
        text = f"cluster {i + 1}\n{_percent(float(mine.mean()))} of the picture"
        tiles.append(_labelled(_tokens(mine[..., None] * color, side), text, 16, 96))
    return from_pil(rows_of(tiles, _even(len(tiles), max(1, WIDTH // (side + GAP)))))


def place_sheet(look, chosen, picture=None, side=256):
    """IMAGE (1, H, W, 3): where a place looks, (h, w) in probabilities, and green over ``picture`` (H, W, 3) if given.

    The tokens of the place, True in ``chosen`` (h, w), are outlined in red on both.
    """
    share, count = look / look.amax().clamp(min=1e-12), int(chosen.sum())
    size = f"{look.shape[1]}x{look.shape[0]}"
    text = f"where the place looks\n{count} of {look.numel()} tokens, {size}, at most {_percent(float(look.amax()))}"
    tiles = [(_tokens(share, side), text)]
    if picture is not None:
        below = _enlarged(picture, side, Image.Resampling.LANCZOS)
        veil = _tokens(share, side).convert("L").resize(below.size).point(lambda v: round(0.8 * v))
        below.paste(Image.new("RGB", below.size, GREEN), (0, 0), veil)
        tiles.append((below, "over the picture\ngreener is looked at more"))
    for tile, _ in tiles:
        _outline(tile, chosen)
    return from_pil(rows_of([_labelled(tile, text, 16, 230) for tile, text in tiles], len(tiles)))


def _outline(tile, chosen):
    """Draws a red line on a picture around the tokens that are True in ``chosen`` (h, w)."""
    draw, (height, width) = ImageDraw.Draw(tile), chosen.shape
    xs, ys = ([round(i * side / n) for i in range(n + 1)] for side, n in ((tile.width, width), (tile.height, height)))
    ends = tile.width - 1, tile.height - 1
    for y, x in chosen.nonzero().tolist():
        left, top, right, bottom = xs[x], ys[y], xs[x + 1], ys[y + 1]
        edges = {
            (y - 1, x): (left, top, right, top), (y + 1, x): (left, bottom, right, bottom),
            (y, x - 1): (left, top, left, bottom), (y, x + 1): (right, top, right, bottom),
        }  # fmt: skip
        for (row, column), line in edges.items():
            if not (0 <= row < height and 0 <= column < width and chosen[row, column]):
                draw.line([min(v, ends[i % 2]) for i, v in enumerate(line)], RED, 2)


def background_sheet(labels, owners, scores, names, grid, masks, side=192):
    """IMAGE (1, H, W, 3): clusters (h * w) as colours, each by itself with its owner and how much every noun agrees
    with it, and the masks (1 + W, H, W), the background's and each noun's.

    ``owners`` (V,) are numbers of ``names``, -1 for the background; ``scores`` (W, V).
    """
    labels, count = labels.unflatten(0, grid), len(owners)
    colors = torch.tensor([_color(i, count) for i in range(count)])
    tiles = [_labelled(_tokens(colors[labels], side), "all parts", 16, 96)]
    for i, (color, owner) in enumerate(zip(colors, owners.tolist(), strict=True)):
        mine = (labels == i).float()
        agree = ", ".join(f"{name} {float(score):.2f}" for name, score in zip(names, scores[:, i], strict=True))
        whose = "background" if owner < 0 else names[owner]
        tiles.append(_labelled(_tokens(mine[..., None] * color, side), f"{whose}\n{agree}", 16, 96))
    columns = max(1, WIDTH // (side + GAP))
    shown = [
        _labelled(_tokens(mask, side), f"mask of {name}", 16, 96)
        for name, mask in zip(("background", *names), masks, strict=True)
    ]
    rows = [row for part in (tiles, shown) for row in _rows(part, _even(len(part), columns))]
    return from_pil(_stacked(rows))


def learning_sheet(seen, names, losses, settings, side=128):
    """IMAGE (B, H, W, 3) of what Dynamic Prompt Learning did: where nouns looked before and after, and its losses.

    ``seen`` (2, B, W, h, w) are the nouns' maps under the words as they were and as learned; ``losses`` those of a
    ``dynamic_prompt.Progress``, ``settings`` its settings.
    """
    limits = [settings.thresholds(i, len(losses)) for i in range(len(losses))]
    sheets = []
    for picture in range(seen.shape[1]):
        tiles = []
        for word, name in enumerate(names):
            pair = seen[:, picture, word]
            for map_, when in zip(pair / pair.amax().clamp(min=1e-12), ("before", "after"), strict=True):
                tile = _enlarged(map_, side, Image.Resampling.BICUBIC)
                tiles.append(_labelled(tile, f"{name}\n{when}", 16, 96))
        rows = _rows(tiles, 2 * _even(len(names), max(1, WIDTH // (2 * (side + GAP)))))
        width = max(480, sum(tile.width + GAP for tile in rows[0]) - GAP)
        for number, kind in enumerate(LEARNING_LOSSES):
            each = [[one[kind] for one in step[picture] if kind in one] for step in losses]
            if all(each):
                curves = {"at first": [v[0] for v in each], "at last": [v[-1] for v in each]}
                if number < len(limits[0]):
                    curves["threshold"] = [limit[number] for limit in limits]
                rows.append([_labelled(plot(curves, width, 120, 1e-9), f"{kind} loss, step by step", 14)])
        sheets.append(from_pil(_stacked(rows)))
    return torch.cat(sheets)


def _percent(share):
    return f"{100 * share:.0f} %" if share >= 0.095 else f"{100 * share:.1f} %"


def _color(number, count):
    """Colours as far apart in hue as there are clusters, every other one darker."""
    return colorsys.hsv_to_rgb(number / count, 0.65, 1.0 if number % 2 == 0 else 0.75)


def difference(picture, other, gain):
    """Where two pictures (H, W, 3) differ, as (H, W) in 0..1, and the mean absolute difference, a share of full white.

    A pixel's greatest difference among red, green and blue, times ``gain``: black is the same. ``other`` is brought
    to the first one's size.
    """
    picture, other = picture[..., :3].float(), other[..., :3].float().to(picture.device)
    if other.shape != picture.shape:
        other = F.interpolate(
            other.permute(2, 0, 1)[None], picture.shape[:2], mode="bicubic", antialias=True
        )[0].permute(1, 2, 0).clamp(0, 1)  # fmt: skip
    apart = (picture - other).abs()
    return (apart.amax(-1) * gain).clamp(0, 1), float(apart.mean())


FIRST_AND_LAST, EACH_TO_FIRST, NO_DIFFERENCE = "first and last", "each to the first", "none"
DIFFERENCES = (FIRST_AND_LAST, EACH_TO_FIRST, NO_DIFFERENCE)


def compare_sheet(rows, captions, height, kind, gain, each=iter):
    """Pictures side by side with captions and where they differ: IMAGE (1, H, W, 3), and the differences.

    ``rows`` are lists of pictures (H, W, 3), one row a batch entry, each picture drawn ``height`` pixels tall over its
    caption. The differences (D, H, W, 3) are as large as the first picture, row by row; None for "none".
    """
    captions = [*captions, *[""] * len(rows[0])]
    size, lines, found = max(SMALL, height // 14), [], []
    for row in each(rows):
        tiles = [_labelled(_scaled(to_pil(p), height), captions[i], size, 96) for i, p in enumerate(row)]
        others = {FIRST_AND_LAST: row[1:][-1:], EACH_TO_FIRST: row[1:], NO_DIFFERENCE: []}[kind]
        below = []
        for other in others:
            apart, mean = difference(row[0], other, gain)
            found.append(apart)
            text = f"difference\nmean change {_percent(mean)}"
            below.append(_labelled(_scaled(to_pil(apart), height), text, size, 96))
        if kind == EACH_TO_FIRST:
            # Each difference stands below the picture it belongs to.
            blank = Image.new("RGB", (tiles[0].width, 1), PAPER)
            lines += [tiles, [blank, *(_centred(b, t.width) for b, t in zip(below, tiles[1:], strict=True))]]
        else:
            lines.append(tiles + below)
    differences = torch.stack(found)[..., None].expand(-1, -1, -1, 3).cpu() if found else None
    return from_pil(_stacked(lines)), differences


def _centred(tile, width):
    """A tile in the middle of a column ``width`` pixels wide, or as wide as it is where it is wider."""
    out = Image.new("RGB", (max(width, tile.width), tile.height), PAPER)
    out.paste(tile, ((out.width - tile.width) // 2, 0))
    return out


def plot(curves, width, height=180, least=0.05):
    """A Pillow picture of ``curves``, name to a list of values of 0 or more: steps to the right, percent upward.

    It reaches up to the greatest value, or to ``least`` if that is more.
    """
    font, left, bottom, top = ImageFont.load_default(12), 52, 20, 8
    out = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(out)
    highest = max(least, *(max(values) for values in curves.values())) * 1.05
    for share in (0, 0.5, 1):
        y = height - bottom - share * (height - bottom - top)
        draw.line((left, y, width - 8, y), (63, 63, 70))
        draw.text((4, y - 7), f"{100 * share * highest:.3g} %", INK, font)
    for row, ((name, values), color) in enumerate(zip(curves.items(), INKS, strict=False)):
        steps = max(1, len(values) - 1)
        xs = [left + i * (width - 8 - left) / steps for i in range(len(values))]
        ys = [height - bottom - v / highest * (height - bottom - top) for v in values]
        draw.line(list(zip(xs, ys, strict=True)), color, 2)
        draw.text((left + 8, top + 15 * row), name, color, font)
    draw.text((left, height - bottom + 3), "noise", INK, font)
    draw.text((width - 60, height - bottom + 3), "picture", INK, font)
    return out


def report_sheet(pictures, labels, curves, height=256):
    """IMAGE (1, H, W, 3): pictures (H, W, 3) side by side over their labels, and below them a plot of ``curves``."""
    width = sum(round(p.shape[1] * height / p.shape[0]) + GAP for p in pictures) - GAP
    drift = from_pil(plot(curves, max(320, width)))
    return contact_sheet(pictures, [*labels, "distance from the trajectory, step by step"], height, drift)
