"""The labelled pictures. ``nodes`` needs ComfyUI, but this file of it does not, so it is loaded by itself."""

import importlib.util
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from attune.attention_patches import maps

path = Path(__file__).resolve().parents[2] / "nodes" / "sheet.py"
spec = importlib.util.spec_from_file_location("attune_sheet", path)
sheet = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sheet)


def found(words, layers=1, steps=1, pictures=1, grid=(16, 16)):
    kept = tuple(torch.rand(len(words), steps, pictures, *grid) for _ in range(layers))
    names = tuple(f"{i} up 16x16" for i in range(layers))
    numbers = tuple((5 * i,) for i in range(steps)) if steps > 1 else ((0, 5, 10),)
    return maps.WordMaps(tuple(words), names, numbers, 50, kept)


def inked(band):
    """Whether letters stand on the paper."""
    return float((band - torch.tensor(sheet.PAPER) / 255).abs().max()) > 0.3


def test_thirty_words_are_readable():
    words = [f"word{i}" for i in range(29)] + ["antidisestablishmentarianism"]
    out = sheet.map_sheet(found(words), maps.stretch)
    assert out.shape[0] == 1 and out.shape[3] == 3
    assert out.shape[2] <= sheet.WIDTH + 2 * sheet.GAP
    pitch, top = 128 + sheet.GAP, 28 + sheet.GAP
    tile = sheet._labelled(Image.new("RGB", (128, 128)), "x", 16)
    for number in range(30):
        x = sheet.GAP + pitch * (number % 8)
        y = top + (tile.height + sheet.GAP) * (number // 8)
        assert out[0, y : y + 128, x : x + 128].std() > 0.1, f"no map {number}"
        assert inked(out[0, y + 128 : y + tile.height, x : x + 128]), f"no label {number}"
    empty = sheet.GAP + pitch * 6  # the last row holds six
    assert not inked(out[0, y : y + tile.height, empty:])


def letters(tile, height=128):
    """Height in pixels of the lettering below a picture."""
    rows = np.nonzero((np.asarray(tile)[height:] != sheet.PAPER).any((1, 2)))[0]
    return rows.max() - rows.min() + 1


def test_long_words_get_smaller_before_they_are_cut():
    blank = Image.new("RGB", (128, 128))
    size = {text: letters(sheet._labelled(blank, text, 16)) for text in ("H", "H" * 13, "H" * 40)}
    assert size["H"] > size["H" * 13] >= 8  # letters without descenders at 12 pixels
    assert size["H" * 40] >= size["H" * 13] - 1
    cut, font = np.asarray(sheet._labelled(blank, "H" * 40, 12)), ImageFont.load_default(12)
    fitting = [text for text in ("H" * n + "~" for n in range(5, 40)) if font.getlength(text) <= 128]
    assert np.array_equal(cut, sheet._labelled(blank, fitting[-1], 12))


def test_what_varies_stands_under_a_map_and_the_rest_above():
    plain = sheet.map_sheet(found("ab"), maps.stretch)
    layers = sheet.map_sheet(found("ab", layers=3), maps.stretch)
    both = sheet.map_sheet(found("ab", layers=3, steps=4), maps.stretch)
    row = 128 + round(1.35 * 16) + round(16 / 3)
    assert plain.shape[1] == 28 + row + 2 * sheet.GAP
    assert layers.shape[1] == 28 + row + 16 + 2 * sheet.GAP  # one small line more
    assert both.shape[1] == 3 * (row + 32) + 4 * sheet.GAP  # nothing in common, two lines more, two runs of 4 a row


def test_a_words_steps_stay_together():
    out = sheet.map_sheet(found("abc", steps=5), maps.stretch)
    assert out.shape[2] == 5 * (128 + sheet.GAP) + sheet.GAP
    many = sheet.map_sheet(found("abc", steps=20), maps.stretch)
    assert many.shape[2] == 7 * (128 + sheet.GAP) + sheet.GAP  # 7 + 7 + 6


def test_one_map_leaves_room_for_the_heading():
    out = sheet.map_sheet(found("a"), maps.stretch)
    assert out.shape[2] > 128 + 2 * sheet.GAP
    letters = (out[0, :28] - torch.tensor(sheet.PAPER) / 255).abs().amax((0, 2)) > 0.1
    assert letters.any() and not letters[: sheet.GAP].any() and not letters[-sheet.GAP :].any()


def test_each_picture_of_a_batch_and_a_narrow_one():
    out = sheet.map_sheet(found("ab", pictures=3, grid=(32, 8)), maps.stretch)
    assert out.shape[0] == 3 and not torch.equal(out[0], out[1])
    assert out.shape[2] == 2 * (96 + sheet.GAP) + sheet.GAP  # room for the label


def test_more_maps_than_can_be_told_apart():
    with pytest.raises(ValueError) as error:
        sheet.map_sheet(found("abcd", layers=16, steps=10), maps.stretch)
    assert "640 maps" in str(error.value) and "Attune Attention Maps" in str(error.value)
    assert str(error.value).count(".") == 1


# ---- comparing ---------------------------------------------------------------------------------------------------


def test_a_difference_is_what_changed_times_the_gain():
    one, other = torch.full((4, 6, 3), 0.5), torch.full((4, 6, 3), 0.5)
    other[1, 2] = torch.tensor([0.5, 0.3, 0.6])
    apart, mean = sheet.difference(one, other, 2.0)
    assert abs(float(apart[1, 2]) - 0.4) < 1e-6 and apart.sum() == apart[1, 2]
    assert abs(mean - 0.3 / 72) < 1e-7
    assert sheet.difference(one, other, 100.0)[0].max() == 1
    assert sheet.difference(one, torch.cat([one, torch.rand(4, 6, 1)], -1), 2.0)[1] == 0  # alpha is no change


def test_another_size_is_brought_to_the_firsts():
    y = torch.linspace(0, 1, 32)[:, None, None].expand(32, 32, 3)
    big = torch.nn.functional.interpolate(y.permute(2, 0, 1)[None], (64, 96), mode="bilinear")[0].permute(1, 2, 0)
    apart, mean = sheet.difference(y, big, 1.0)
    assert apart.shape == (32, 32) and mean < 0.01


@pytest.mark.parametrize(("kind", "count"), [("first and last", 2), ("each to the first", 4), ("none", 0)])
def test_differences_row_by_row(kind, count):
    rows = [[torch.full((8, 12, 3), v) for v in values] for values in ((0.1, 0.2, 0.4), (0.9, 0.8, 0.4))]
    out, apart = sheet.compare_sheet(rows, ["one"], 64, kind, 1.0)
    assert out.shape[0] == 1
    if not count:
        assert apart is None
        return
    assert apart.shape == (count, 8, 12, 3)
    wanted = [0.3, 0.5] if count == 2 else [0.1, 0.3, 0.1, 0.5]
    assert torch.allclose(apart[:, 0, 0, 0], torch.tensor(wanted), atol=1e-6)


def test_a_difference_stands_below_its_picture():
    rows = [[torch.zeros(64, 64, 3), torch.zeros(64, 64, 3), torch.ones(64, 64, 3)]]
    out, _ = sheet.compare_sheet(rows, ["", "", ""], 128, "each to the first", 1.0)
    pitch = 128 + sheet.GAP
    lower = out[0, out.shape[1] // 2 :]
    bright = [float(lower[:, sheet.GAP + pitch * i : pitch * (i + 1)].mean()) for i in range(3)]
    assert bright[2] > 0.5 and bright[1] < bright[0] < 0.2  # nothing, black, white


def test_contact_sheets_are_as_before():
    pictures = [torch.rand(64, 64, 3) for _ in range(3)]
    out = sheet.contact_sheet(pictures, ["a", "b"], 128, torch.rand(1, 30, 300, 3))
    assert out.shape[2] == 3 * (128 + sheet.GAP) + sheet.GAP


# ---- lettering ---------------------------------------------------------------------------------------------------

SCRIPTS = {
    "accents": ("caf\u00e9 na\u00efve", "caf\u00e8 na\u00efve", "\u00fc", "\u00f6", "\u00f1", "\u00df", "\u0142"),
    "Greek": ("\u03b1\u03b2", "\u03b3\u03b4", "\u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac"),
    "Cyrillic": ("\u043f\u043e\u0441\u043b\u0435", "\u0434\u043e\u0436\u0434\u0438"),
    "Chinese": ("\u539f\u56fe", "\u7f16\u8f91", "\u82f9\u679c", "\u9999\u8549", "\u7e41\u9ad4"),
    "kana": ("\u3053\u3093", "\u30ab\u30bf"),
    "Hangul": ("\ud55c\uad6d", "\uace0\uc591"),
    "full width": ("\uff0c", "\uff08\uff09"),
}


def lettering(text, width=128):
    return np.asarray(sheet._labelled(Image.new("RGB", (width, 8)), text, 16))[8:]


@pytest.mark.parametrize("script", SCRIPTS)
def test_letters_beyond_ascii_are_drawn_as_they_are(script):
    for label in SCRIPTS[script]:
        assert sheet._readable(label) == label
    shown = [lettering(label) for label in (*SCRIPTS[script], "")]
    for number, one in enumerate(shown):
        assert not any(np.array_equal(one, other) for other in shown[:number])


def test_a_letter_that_no_font_has_is_told_by_its_number():
    for label, told in {
        "a \U0001f34e circle": "a U+1F34E circle",
        "\u05e9\u05dc": "U+05E9U+05DC",  # written from right to left
        "x\u0302": "xU+0302",  # a mark that no letter is made with
        "half an emoji \ud83d": "half an emoji U+D83D",
        "\x00\x1b[0m": "U+0000U+001B[0m",
        "\u200b\ue000\U0010ffff": "U+200BU+E000U+10FFFF",
    }.items():
        assert sheet._readable(label) == told
        assert np.array_equal(lettering(label, 300), lettering(told, 300))


def test_letters_are_composed_and_every_space_is_one():
    assert sheet._readable("cafe\u0301") == "caf\u00e9"
    assert sheet._readable("\u1112\u1161\u11ab") == "\ud55c"
    assert sheet._readable("a\tb\u00a0c\u3000d") == "a b c d"
    assert np.array_equal(lettering("cafe\u0301"), lettering("caf\u00e9"))


@pytest.mark.parametrize("letter", ["x", "i", "\u4e2d", "\U0001f34e", "e\u0301"])
def test_a_long_label_takes_no_longer_than_it_shows(letter):
    """And is cut to what fits, with a mark behind it."""
    blank = Image.new("RGB", (2048, 8))
    start = time.process_time()
    shown = [sheet._labelled(blank, letter * count, 146) for count in (4_000, 100_000)]
    assert time.process_time() - start < 2
    assert np.array_equal(*shown)
    line, font = sheet._readable(letter * 4000), sheet._font(sheet.SMALL, letter.isascii() or letter == "\U0001f34e")
    cut = next(n for n in range(1, len(line)) if font.getlength(line[: n + 1] + "~") > 2048)
    small = [sheet._labelled(blank, text, sheet.SMALL) for text in (letter * 4000, line[:cut] + "~")]
    assert np.array_equal(*small)


def test_a_label_is_set_as_large_as_it_fits():
    for count in range(1, 30):
        font = sheet._fitting("W" * count, 40, 300)
        larger = sheet._font(font.size + 1, True).getlength("W" * count)
        assert font.size == 40 or larger > 300
        assert font.size == sheet.SMALL or font.getlength("W" * count) <= 300


class Cancelled(Exception):
    pass


def test_a_sheet_ends_where_its_loop_is_ended():
    """However many pictures are still to come."""

    def after(count):
        def each(items):
            for number, item in enumerate(items):
                if number == count:
                    raise Cancelled
                yield item

        return each

    pictures = [torch.rand(8, 8, 3) for _ in range(4)]
    for draw in (
        lambda each: sheet.contact_sheet(pictures, ["a"], 64, each=each),
        lambda each: sheet.compare_sheet([[p, p] for p in pictures], ["a"], 64, "none", 1.0, each=each),
        lambda each: sheet.mask_strip(torch.ones(4, 1, 8, 8), (0, 1, 2, 3), 4, 64, each=each),
        lambda each: sheet.map_sheet(found("a", steps=4), maps.stretch, each=each),
    ):
        with pytest.raises(Cancelled):
            draw(after(2))
        assert draw(after(5)) is not None


# ---- components and clusters -------------------------------------------------------------------------------------


def test_clusters_keep_their_colours_and_shares():
    labels = torch.tensor([0] * 12 + [1] * 4)
    out = sheet.cluster_sheet(labels, 2, (4, 4))
    first = out[0, sheet.GAP : sheet.GAP + 192, sheet.GAP : sheet.GAP + 192]
    assert len(first.reshape(-1, 3).unique(dim=0)) == 2
    top, bottom = first[10, 10], first[-10, 10]
    assert torch.allclose(top, torch.tensor(sheet._color(0, 2)), atol=0.01)
    assert torch.allclose(bottom, torch.tensor(sheet._color(1, 2)), atol=0.01)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_three_components_make_a_colour_picture(count):
    parts = torch.linalg.qr(torch.randn(16, count))[0].T
    out = sheet.component_sheet(parts, torch.full((count,), 0.1), (4, 4))
    tiles = count + (count >= 3)
    rows = -(-tiles // 5)
    assert out.shape[2] == -(-tiles // rows) * (192 + sheet.GAP) + sheet.GAP
    corner = out[0, sheet.GAP : sheet.GAP + 192, sheet.GAP : sheet.GAP + 192]
    assert (float(corner.std(-1).max()) > 0.05) == (count >= 3)


# ---- backgrounds and learned words -------------------------------------------------------------------------------


def tile(out, column, row_top, side):
    """A tile's picture on a sheet (1, H, W, 3)."""
    x = sheet.GAP + column * (side + sheet.GAP)
    return out[0, row_top : row_top + side, x : x + side]


def test_a_background_sheet_shows_parts_owners_and_masks():
    labels = torch.tensor([0] * 8 + [1] * 6 + [2] * 2)
    scores = torch.tensor([[0.02, 0.7, 0.1], [0.05, 0.3, 0.6]])
    masks = torch.zeros(3, 64, 64)
    masks[0, :32] = 1
    masks[2, 60:] = 1
    out = sheet.background_sheet(labels, torch.tensor([-1, 0, 1]), scores, ("cat", "dog"), (4, 4), masks)
    top, colors = sheet.GAP, [torch.tensor(sheet._color(i, 3)) for i in range(3)]
    whole = tile(out, 0, top, 192)
    for y, part in ((10, 0), (130, 1), (150, 1)):
        assert torch.allclose(whole[y, 10], colors[part], atol=0.01)
    assert torch.allclose(whole[-10, -10], colors[2], atol=0.01)
    for i, lit in enumerate(((10, 10), (130, 10), (-10, -10))):
        part = tile(out, 1 + i, top, 192)
        assert torch.allclose(part[lit], colors[i], atol=0.01)
        assert int((part.amax(-1) > 0.05).sum()) == int((labels == i).sum()) * 48 * 48
    one = sheet._labelled(Image.new("RGB", (192, 192)), "background\ncat 0.02, dog 0.05", 16, 96)
    label = (np.asarray(one)[192:] / 255.0).astype(np.float32)
    assert np.allclose(out[0, top + 192 : top + one.height, sheet.GAP + 200 : sheet.GAP + 392], label, atol=1e-3)
    below = top + one.height + sheet.GAP
    for column, share in enumerate((0.5, 0.0, 4 / 64)):
        assert float(tile(out, column, below, 192).mean()) == pytest.approx(share, abs=0.02)
    named = sheet._labelled(Image.new("RGB", (192, 192)), "mask of dog", 16, 96)
    label = (np.asarray(named)[192:] / 255.0).astype(np.float32)
    assert np.allclose(out[0, below + 192 : below + named.height, sheet.GAP + 400 : sheet.GAP + 592], label, atol=1e-3)


class Settings:
    """As DynamicPrompt, whose thresholds are all that is asked of it."""

    def thresholds(self, step, steps):
        return 0.3 - 0.1 * step, 0.9, 0.7


def learned(pictures=2, kinds=("balance", "disjoint", "background"), words=2, steps=3):
    losses = [
        [[{kind: 0.9 - 0.1 * look for kind in kinds} for look in range(4)] for _ in range(pictures)]
        for _ in range(steps)
    ]
    return torch.rand(2, pictures, words, 8, 8), losses


def lines(out, color):
    return int(((out * 255).round() == torch.tensor(color, dtype=torch.float)).all(-1).sum())


def test_a_learning_sheet_has_before_and_after_and_a_curve_for_each_loss():
    seen, losses = learned()
    seen[0, :, :, :, :4] *= 0.01
    out = sheet.learning_sheet(seen, ("cat", "dog"), losses, Settings())
    assert out.shape[0] == 2 and not torch.equal(out[0], out[1])
    for column in range(4):
        map_ = tile(out, column, sheet.GAP, 128)
        dark = map_[:, :48].mean() < 0.2 * map_[:, 80:].mean()
        assert bool(dark) == (column % 2 == 0)  # before, after, before, after
    one = sheet._labelled(Image.new("RGB", (128, 128)), "cat\nafter", 16, 96)
    label = (np.asarray(one)[128:] / 255.0).astype(np.float32)
    x = sheet.GAP + 136
    assert np.allclose(out[0, sheet.GAP + 128 : sheet.GAP + one.height, x : x + 128], label, atol=1e-3)
    plain = sheet.learning_sheet(*learned(kinds=())[:1], ("cat", "dog"), learned(kinds=())[1], Settings())
    row = (out.shape[1] - plain.shape[1]) / 3
    assert row == int(row) > 120
    all_ = sheet.learning_sheet(
        seen, ("cat", "dog"), learned(kinds=("balance", "disjoint", "background", "null-text"))[1], Settings()
    )
    assert all_.shape[1] == plain.shape[1] + 4 * row
    # Null-text inversion has no threshold here, the three others have.
    first, last, limit = sheet.INKS[:3]
    assert lines(all_[:1], limit) == lines(out[:1], limit) > 300
    assert lines(all_[:1], first) > 1.2 * lines(out[:1], first) and lines(plain[:1], first) == 0


def test_the_pair_of_a_word_has_one_scale():
    """So that a map that has become fainter looks fainter."""
    seen, losses = learned(1)
    seen[1, 0, 0] = 0.25 * seen[0, 0, 0]
    out = sheet.learning_sheet(seen, ("cat", "dog"), losses, Settings())
    before, after = (tile(out, column, sheet.GAP, 128).mean() for column in range(2))
    assert float(after / before) == pytest.approx(0.25, abs=0.02)
    assert float(tile(out, 0, sheet.GAP, 128).max()) > 0.95
    black = sheet.learning_sheet(0 * seen, ("cat", "dog"), losses, Settings())
    assert float(tile(black, 0, sheet.GAP, 128).max()) == 0


def test_losses_that_only_some_steps_have_are_left_out():
    seen, losses = learned(1, kinds=("background",))
    whole = sheet.learning_sheet(seen, ("cat", "dog"), losses, Settings())
    losses[1][0] = []
    assert sheet.learning_sheet(seen, ("cat", "dog"), losses, Settings()).shape[1] < whole.shape[1]


def test_a_plot_of_small_values_is_not_flat():
    """Null-text inversion's losses are near 1e-5."""
    values = {"loss": [1e-5, 5e-6, 1e-6]}

    def height(least):
        ink = (np.asarray(sheet.plot(values, 320, 180, least)) == sheet.INKS[0]).all(-1)[:, 150:]
        rows = np.nonzero(ink.any(1))[0]
        return rows.max() - rows.min()

    assert height(1e-9) > 60 and height(0.05) < 6


@pytest.mark.parametrize("grid", [(4, 4), (4, 6)])
def test_a_place_is_outlined_and_what_it_looks_at_is_green(grid):
    look, chosen = torch.zeros(grid), torch.zeros(grid, dtype=torch.bool)
    look[3, 3], chosen[0, :2] = 1.0, True
    alone = sheet.place_sheet(look, chosen)
    both = sheet.place_sheet(look, chosen, torch.full((64, 16 * grid[1], 3), 0.5))
    assert both.shape[2] > alone.shape[2] and both.shape[1] == alone.shape[1]
    red, green = ((both[0] - torch.tensor(ink) / 255).abs().amax(-1) < 0.02 for ink in (sheet.RED, sheet.GREEN))
    assert red.any() and not green.any()  # the veil lets the picture through
    greenish = both[0, ..., 1] - both[0, ..., 0] > 0.2
    side = 256 // grid[1]
    assert 0.8 * side**2 < float(greenish.sum()) < 1.2 * side**2
    ys, xs = (red & (torch.arange(red.shape[1]) < sheet.GAP + 260)).nonzero().T
    assert abs(int(ys.max() - ys.min()) - side) < 4 and abs(int(xs.max() - xs.min()) - 2 * side) < 4
    # Lines all around, and none between the two.
    assert all(int((ys == y).sum()) > 1.8 * side for y in (ys.min(), ys.max()))
    assert all(int((xs == x).sum()) > 0.8 * side for x in (xs.min(), xs.max()))
    assert not (red[int(ys.min()) + 4 : int(ys.max()) - 3, int(xs.min()) + 4 : int(xs.max()) - 3]).any()
