"""Blind rating: what the page hides, and what is read out of the answers."""

import json
from types import SimpleNamespace

import pytest
from PIL import Image

from attune.benchmark import rating

METHODS = {"swapper": "P2P of yore", "blender": "FPE of yore", "zzz": "Third of all"}


@pytest.fixture
def folder(tmp_path):
    """Two samples, three methods, as a run leaves them; one picture is missing."""
    samples, pictures = [], {}
    for number in range(2):
        source = tmp_path / "samples" / f"{number}.png"
        samples.append(SimpleNamespace(key=f"s{number}", source="a <b> ring", target="a blue ring", picture=source))
        for key in METHODS:
            pictures[f"s{number}", key] = tmp_path / "pictures" / key / f"s{number}.png"
        for path in (source, *pictures.values()):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), "red").save(path)
    del pictures["s1", "zzz"]
    pictures["s0", rating.SOURCE] = samples[0].picture  # no edit, so it is not shown
    methods = [SimpleNamespace(key=key, name=name) for key, name in [*METHODS.items(), (rating.SOURCE, "")]]
    told = rating.about(samples, methods, pictures, tmp_path)
    (tmp_path / rating.ABOUT).write_text(json.dumps(told))
    return tmp_path


def names(key):
    return {tuple(of): name for name, of in key.items()}


@pytest.mark.parametrize("how", [[], ["--choice"]])
def test_the_page_names_no_method_and_needs_nothing_else(folder, how, capsys):
    rating.main([str(folder), *how])
    text = (folder / rating.PAGE).read_text()
    for word in (*METHODS, *METHODS.values(), "pictures/", str(folder)):
        assert word not in text
    assert "http" not in text and text.isascii()
    assert text.count("data:image/png") == 2 + 5 and "a &lt;b&gt; ring" in text
    key = json.loads((folder / rating.KEY).read_text())
    assert len(key) == 5 and all(name in text for name in key)
    assert text.count('type="radio"') == (5 if how else 5 * 4 * 6)
    assert "keep rating.key.json to yourself" in capsys.readouterr().out


def test_orders_depend_on_seed_and_sample(folder):
    run = json.loads((folder / rating.ABOUT).read_text())
    run["samples"] = [{**run["samples"][0], "key": f"s{n}"} for n in range(20)]
    items, key = rating.shuffled(run, 0)
    orders = [tuple(key[name][1] for name, _ in item["pictures"]) for item in items]
    assert len(set(orders)) > 3 and rating.shuffled(run, 0) == (items, key) != rating.shuffled(run, 1)
    assert {of[1] for of in rating.shuffled(run, 0, ("zzz",))[1].values()} == {"swapper", "blender"}


def answers(folder, rows):
    path = folder / "answers.csv"
    path.write_text("\n".join(["rater,sample,picture,question,answer", *(",".join(row) for row in rows)]) + "\n")
    return path


def test_scales_are_means_with_intervals(folder, capsys):
    rating.main([str(folder)])
    of = names(json.loads((folder / rating.KEY).read_text()))
    rows = [
        (rater, "0", of[f"s{n}", "swapper"], "realism", answer)
        for rater, n, answer in (("a", 0, "1"), ("a", 0, "2"), ("a", 1, "4"), ("b", 0, "6"))
    ]
    path = answers(folder, [*rows, ("a", "0", of["s0", "blender"], "realism", "5")])
    capsys.readouterr()
    rating.main([str(folder), "--read", str(path)])
    said = capsys.readouterr().out
    assert "| P2P of yore | 4.00 (1.74 to 6.26, 3) |" in said  # 2, which was corrected, 4 and 6
    assert "| FPE of yore | 5.00 (5.00 to 5.00, 1) |" in said


def test_choices_are_shares_of_the_samples_in_which_a_method_was_shown(folder, capsys):
    rating.main([str(folder), "--choice"])
    of = names(json.loads((folder / rating.KEY).read_text()))
    chosen = [(rater, str(n), of[f"s{n}", m], "best", "1") for rater, n, m in (("a", 0, "zzz"), ("a", 1, "swapper"))]
    key = json.loads((folder / rating.KEY).read_text())
    found = rating.read_answers([answers(folder, chosen)], key)["best"]
    assert {m: sorted(v) for m, v in found.items()} == {"swapper": [0, 1], "blender": [0, 0], "zzz": [1]}
    assert "| Third of all | 100 % (1 of 1, 21 to 100) |" in rating.table({"best": found}, METHODS)


@pytest.mark.parametrize("row, says", [
    (("a", "0", "strange", "realism", "1"), "another page"),
    (("a", "0", "PICTURE", "realism", "7"), "1 to 6 is needed"),
    (("a", "0", "PICTURE", "beauty", "1"), "answers 'beauty'"),
])  # fmt: skip
def test_answers_of_another_page_or_scale_are_refused(folder, row, says):
    rating.main([str(folder)])
    name = next(iter(json.loads((folder / rating.KEY).read_text())))
    path = answers(folder, [[name if part == "PICTURE" else part for part in row]])
    with pytest.raises(SystemExit, match=says):
        rating.main([str(folder), "--read", str(path)])
    (folder / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="has not the columns"):
        rating.main([str(folder), "--read", str(folder / "other.csv")])
    with pytest.raises(SystemExit, match=r"holds no rating\.json"):
        rating.main([str(folder / "samples")])
