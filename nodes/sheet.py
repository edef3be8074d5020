"""Labelled pictures, drawn with Pillow."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

INKS = ((250, 204, 21), (96, 165, 250), (244, 114, 182), (74, 222, 128))  # of curves
GAP, PAPER, INK = 8, (24, 24, 27), (228, 228, 231)


def to_pil(picture):
    """(H, W, 3 or 4) or (H, W) in 0..1 to a Pillow picture."""
    array = (picture.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(array[..., :3] if array.ndim == 3 else array).convert("RGB")


def from_pil(picture):
    """A Pillow picture to IMAGE (1, H, W, 3)."""
    return torch.from_numpy(np.asarray(picture, np.float32) / 255)[None]


def _labelled(picture, text, size):
    """The picture with its text below, shortened to fit."""
    font = ImageFont.load_default(size)
    tile = Image.new("RGB", (picture.width, picture.height + round(1.7 * size)), PAPER)
    tile.paste(picture, (0, 0))
    while len(text) > 1 and font.getlength(text) > picture.width:
        text = text.rstrip("~")[:-1] + "~"
    left = max(0, (picture.width - font.getlength(text)) / 2)
    ImageDraw.Draw(tile).text((left, picture.height + 0.25 * size), text, INK, font)
    return tile


def rows_of(tiles, columns):
    """Tiles in rows from left to right, on one sheet."""
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
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


def _scaled(picture, height):
    kind = Image.Resampling.LANCZOS if picture.height > height else Image.Resampling.BICUBIC
    return picture.resize((max(1, round(picture.width * height / picture.height)), height), kind)


def contact_sheet(pictures, labels, height, wide=None):
    """IMAGE (1, H, W, 3) of pictures (H, W, 3) side by side, ``height`` pixels tall, each over its label.

    ``wide`` is an IMAGE batch whose first picture goes below across the width; its label follows the others'.
    """
    labels = labels + [""] * (len(pictures) + 1)
    tiles = [_labelled(_scaled(to_pil(p), height), labels[i], max(12, height // 14)) for i, p in enumerate(pictures)]
    top = rows_of(tiles, len(tiles))
    if wide is None:
        return from_pil(top)
    below = to_pil(wide[0])
    width = top.width - 2 * GAP
    below = below.resize((width, max(1, round(below.height * width / below.width))), Image.Resampling.LANCZOS)
    below = _labelled(below, labels[len(pictures)], max(12, height // 14))
    out = Image.new("RGB", (top.width, top.height + below.height + GAP), PAPER)
    out.paste(top, (0, 0))
    out.paste(below, (GAP, top.height))
    return from_pil(out)


def map_sheet(maps, labels, side=128, columns=8):
    """IMAGE (B, H, W, 3): for each picture of the batch, one word's map (B, h, w) in 0..1 after another, labelled."""
    sheets = []
    for picture in range(len(maps[0])):
        tiles = []
        for heat, label in zip(maps, labels, strict=True):
            tile = to_pil(heat[picture]).resize(
                (round(side * heat.shape[2] / heat.shape[1]), side), Image.Resampling.BICUBIC
            )
            tiles.append(_labelled(tile, label, max(12, side // 8)))
        sheets.append(from_pil(rows_of(tiles, min(columns, len(tiles)))))
    return torch.cat(sheets)


def plot(curves, width, height=180):
    """A Pillow picture of ``curves``, name to a list of values of 0 or more: steps to the right, percent upward."""
    font, left, bottom, top = ImageFont.load_default(12), 52, 20, 8
    out = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(out)
    highest = max(0.05, *(max(values) for values in curves.values())) * 1.05
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
