"""The pictures that the registry shows, drawn from the demo world: ``dev.py bench emblem`` writes them to assets/.

A circle in three states, as in an edit: the source, where its word looks, and the result.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..demo import scenes
from ..tests import host

FOLDER = host.ROOT / "assets"
ICON, BANNER = (400, 400), (1680, 720)
CELLS = 10  # of a map to the icon's side
FINER = 4  # how much larger it is drawn, for smooth edges
DARK, LIGHT, SOFT = (24, 24, 27), (244, 244, 245), (161, 161, 170)


def states(side):
    """Source, map and result (3, side, side, 3), floats in 0..1."""
    source = scenes.scene("gray", scenes.thing("circle", "red", r=0.4))
    drawn, masks = scenes.render(source, side)
    edited = scenes.render(scenes.edit_thing(source, 0, color="yellow"), side)[0]
    cell = side // CELLS
    # A map is coarse, and brightest in the middle of its thing.
    coarse = masks[0].reshape(CELLS, cell, CELLS, cell).mean((1, 3))
    far = np.hypot(*np.meshgrid(*2 * [np.linspace(-1, 1, CELLS)]))
    look = (coarse * (1 - 0.55 * far)).repeat(cell, 0).repeat(cell, 1)
    return np.stack([drawn, np.repeat(look[..., None], 3, 2) * 0.95 + 0.05, edited])


def icon(size):
    """The three states side by side in slanting strips."""
    side = size[0] * FINER
    y, x = np.mgrid[:side, :side] / side
    strip = np.digitize(x + 0.3 * (y - 0.5), [0.36, 0.64])
    mixed = np.take_along_axis(states(side), strip[None, ..., None], 0)[0]
    return Image.fromarray((255 * mixed + 0.5).astype(np.uint8)).resize(size, Image.Resampling.BOX)


def banner():
    """The icon, the name and what it is for."""
    picture = Image.new("RGB", BANNER, DARK)
    pen, mark = ImageDraw.Draw(picture), icon((480, 480))
    left, middle = 120, BANNER[1] // 2
    picture.paste(mark, (left, middle - mark.height // 2))
    left += mark.width + 96
    pen.text((left, middle + 8), "Attune", LIGHT, ImageFont.load_default(200), anchor="ls")
    lines = "Edit pictures with Stable Diffusion\nby steering its attention"
    pen.multiline_text((left + 8, middle + 56), lines, SOFT, ImageFont.load_default(48), spacing=16)
    return picture


def main():
    for name, picture in (("icon", icon(ICON)), ("banner", banner())):
        picture.save(FOLDER / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
