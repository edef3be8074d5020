"""The benchmark's tables and page, from lines that are given."""

import re
from types import SimpleNamespace

import pytest
from PIL import Image

from attune.benchmark import results
from attune.benchmark.results import Results

TASKS = [(key, method) for key in ("colour-000", "colour-001", "shape-000") for method in ("swap", "blend")]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out & more"


@pytest.fixture
def found(folder):
    """Two methods on three samples: one picture failed, one does not apply, one is missing."""
    kinds = {"colour-000": "colour", "colour-001": "colour", "shape-000": "shape"}
    truths = {key: folder / "samples" / f"{key} truth.png" for key, kind in kinds.items() if kind == "colour"}
    samples = [
        SimpleNamespace(
            key=key, kind=kind, source="a <b> ring", target="a blue ring",
            picture=folder / "samples" / f"{key}.png", truth=truths.get(key),
        )
        for key, kind in kinds.items()
    ]  # fmt: skip
    methods = [
        SimpleNamespace(key="swap", name="P2P | swap", paper="Prompt-to-Prompt", note=""),
        SimpleNamespace(key="blend", name="P2P, blend", paper="", note="with masks"),
    ]
    drawn = [("colour-000", "swap"), ("colour-001", "swap"), ("colour-000", "blend")]
    return Results(
        about={"seed": 7},
        samples=samples,
        methods=methods,
        columns={"success %": "sees it", "PSNR": "dB; higher is better", "CLIP score": "cosine", "L1": "error"},
        why_not={"CLIP score": "There is no network here."},
        problems=["entry 5 has no mask; it is left out."],
        pictures={task: folder / "pictures" / task[1] / f"{task[0]}.png" for task in drawn},
        figures={
            drawn[0]: {"success %": 100.0, "PSNR": 20.0, "L1": None},
            drawn[1]: {"success %": 0.0, "PSNR": None, "L1": None},
            drawn[2]: {"success %": 100.0, "PSNR": 31.25, "L1": None},
        },
        failed={("colour-001", "blend"): "KSampler failed: <no> memory"},
        not_applicable={("shape-000", "blend"): "no mask"},
    )


def cells(text, heading):
    """The table below a heading: its head, and its rows by their first cell."""
    lines = text.split(f"{heading}\n\n", 1)[1].split("\n\n")[0].splitlines()
    head, _, *rows = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines)
    return head, {row[0]: row[1:] for row in rows}


def test_means_are_over_the_pictures_that_have_the_figure(found):
    head, rows = cells(results.markdown(found, "all.jpg"), "## All kinds of edits")
    assert head == ["method", "success %", "PSNR", "rank", "pictures", "failed", "not applicable", "missing"]
    assert rows == {
        "P2P \\| swap": ["50.0 (1 of 2, 9 to 91)", "20.0", "2", "2", "0", "0", "1"],
        "P2P, blend": ["100.0 (1 of 1, 21 to 100)", "31.2", "1", "1", "1", "1", "0"],
    }


def test_each_kind_has_its_own_table_without_methods_that_are_not_for_it(found):
    text = results.markdown(found, "all.jpg")
    assert cells(text, "## Kind: colour")[1]["P2P, blend"][1:] == ["31.2", "1", "1", "1"]
    assert list(cells(text, "## Kind: shape")[1]) == ["P2P \\| swap"]
    head, rows = cells(text, "## success %, by kind of edit")
    assert head == ["method", "colour", "shape"]
    assert rows == {"P2P \\| swap": ["50.0", ""], "P2P, blend": ["100.0", ""]}


def test_what_is_not_there_is_told(found, folder):
    for text in (
        results.markdown(found, "all.jpg"),
        results.html(found, folder).replace("&lt;", "<").replace("&gt;", ">"),
    ):
        assert "CLIP score: There is no network here." in text
        assert "entry 5 has no mask; it is left out." in text
        assert "1 x P2P, blend: KSampler failed: <no> memory" in text
        assert "1 x P2P, blend: no mask" in text
        assert "seed" in text and "7" in text


def test_the_page_needs_nothing_but_its_folder(found, folder):
    """It loads pictures by relative ways only, and what it is told cannot become markup."""
    text = results.html(found, folder)
    loaded = re.findall(r'(?:src|href|srcset|url)\s*[=(]\s*"?([^")\s>]+)', text)
    assert "pictures/swap/colour-001.png" in loaded and "samples/colour-000%20truth.png" in loaded
    assert len(loaded) == 3 + 2 + 3  # sources, true results, edits
    assert not [way for way in loaded if ":" in way or way.startswith("/")]
    assert not re.search(r"https?:|//\w|@import", text)
    assert "a &lt;b&gt; ring" in text and "<no>" not in text
    assert text.count('class="shows"') == 2
    assert "not drawn yet" in text and "not applicable: no mask" in text


def test_the_sheet_has_a_column_for_each_kind_and_a_row_for_each_method(found):
    """Source, true edit and methods below each other; empty where there is no picture."""
    colours = {"source": (255, 0, 0), "truth": (0, 255, 0), "edit": (0, 0, 255)}
    for sample in found.samples:
        for path, name in ((sample.picture, "source"), (sample.truth, "truth")):
            paint(path, colours[name])
    for path in found.pictures.values():
        paint(path, colours["edit"])
    sheet = results.sheet(found, side=32)
    (left, top), white = (sheet.width - 2 * 32, sheet.height - 4 * 32), (255, 255, 255)
    seen = [[sheet.getpixel((left + 32 * x + 10, top + 32 * y + 10)) for x in range(2)] for y in range(4)]
    edit = colours["edit"]
    assert seen == [[colours["source"]] * 2, [colours["truth"], white], [edit, white], [edit, white]]
    assert "](all.jpg)" in results.markdown(found, "all.jpg")


def paint(path, colour):
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), colour).save(path)


def test_without_a_picture_the_page_still_stands(found, folder):
    """As a run shows that was stopped before its first picture, or whose figures all cannot be had."""
    empty = Results(about={}, samples=found.samples, methods=found.methods, columns=found.columns)
    head, rows = cells(results.markdown(empty, "all.jpg"), "## All kinds of edits")
    assert head == ["method", "pictures", "missing"] and rows["P2P, blend"] == ["0", "3"]
    assert results.html(empty, folder).count("not drawn yet") == 6


@pytest.mark.parametrize(
    "value, shown", [(None, ""), (31.25, "31.2"), (0.01234, "0.0123"), (100.0, "100.0"), (0.0, "0")]
)
def test_numbers_are_short(value, shown):
    assert results.number(value) == shown


def test_ranks_are_averaged_and_shared_where_methods_are_equal():
    """By hand: PSNR ranks 1, 2.5, 2.5 and L1, which the third lacks, 2, 1."""
    columns = {"PSNR": "dB; higher is better", "L1": "error; lower is better"}
    rows = [{"PSNR": 30.0, "L1": 0.2}, {"PSNR": 20.0, "L1": 0.1}, {"PSNR": 20.0, "L1": None}]
    assert results.average_ranks(rows, columns) == [(0, 1.5), (1, 1.75), (2, 2.5)]
    assert results.average_ranks([{"L1": None}], columns) == [(0, None)] and results.average_ranks([], columns) == []


def test_what_edits_nothing_takes_no_rank(found):
    found.methods[1].key = "truth"
    for kept in (found.pictures, found.figures, found.failed, found.not_applicable):
        for key, method in list(kept):
            if method == "blend":
                kept[key, "truth"] = kept.pop((key, method))
    swap, truth = found.table()
    assert swap["means"]["rank"] == 1 and truth["means"]["rank"] is None
    assert "ranks by PSNR, 1 is the best" in results.markdown(found, "all.jpg")


def test_beside_true_edits_the_ranks_are_masafusions(found):
    found.figures["colour-000", "swap"]["L1"] = 0.1
    assert found.ranked == ["L1"]
    assert [row["means"]["rank"] for row in found.table()] == [1, None]


@pytest.mark.parametrize("successes, count, low, high", [(8, 16, 0.280, 0.720), (0, 10, 0, 0.278), (10, 10, 0.722, 1)])
def test_intervals_are_wilsons(successes, count, low, high):
    assert results.wilson(successes, count) == pytest.approx((low, high), abs=1e-3)


def test_seconds_are_medians_of_what_was_drawn(found, folder):
    found.seconds.update({("colour-000", "swap"): 9.0, ("colour-001", "swap"): 1.0, ("colour-001", "blend"): 50.0})
    head, rows = cells(results.markdown(found, "all.jpg"), "## All kinds of edits")
    assert [row[head.index("seconds") - 1] for row in rows.values()] == ["5", ""]  # the last one failed
    assert "<td>5</td>" in results.html(found, folder)


def test_figures_of_whole_sets_stand_in_the_table_of_all_kinds_alone(found):
    found.columns["FID"] = "distance; lower is better"
    found.sets["swap"] = {"FID": 12.5}
    text = results.markdown(found, "all.jpg")
    head, rows = cells(text, "## All kinds of edits")
    assert [row[head.index("FID") - 1] for row in rows.values()] == ["12.5", ""]
    assert "FID" not in cells(text, "## Kind: colour")[0] and "- FID: distance" in text
