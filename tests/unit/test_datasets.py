"""The readers of the public formats, on small folders written here, and the demo world's edits."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from attune.benchmark import datasets, demo_edits
from attune.demo import scenes

SCENE = scenes.scene("gray", scenes.thing("circle", "red", x=0.3, r=0.15), scenes.thing("star", "blue", x=0.75, r=0.15))


def draw(path, scene=SCENE, size=64):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((scenes.render(scene, size)[0] * 255).round().astype(np.uint8)).save(path)
    return path


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def by_key(samples):
    return {sample.key: sample for sample in samples}


# ---- the demo world ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    samples, problems = datasets.read("demo", tmp_path_factory.mktemp("demo"), 2, 0)
    assert problems == []
    return samples


def test_every_kind_of_edit_is_there_as_often_as_asked(demo):
    kinds = [sample.kind for sample in demo]
    assert sorted(kinds) == sorted(2 * demo_edits.KINDS)
    assert kinds[:8] == list(demo_edits.KINDS)  # a run that is stopped has seen all of them
    assert len({sample.key for sample in demo}) == len(demo)


def test_a_sample_depends_on_seed_and_number_alone(demo, tmp_path):
    one = datasets.read("demo", tmp_path / "one", 1, 0)[0]
    for mine, theirs in zip(one, demo[:8], strict=True):
        assert mine.extras == theirs.extras and mine.target == theirs.target
        for part in datasets.PARTS:
            assert getattr(mine, part).read_bytes() == getattr(theirs, part).read_bytes()
    assert demo_edits.draw_edit(demo_edits.COLOUR, 1, 0) != demo_edits.draw_edit(demo_edits.COLOUR, 0, 0)


def test_pictures_are_the_scenes_and_differ_under_the_mask_alone(demo):
    for sample in demo:
        before, after = (demo_edits.scene_of(sample.extras[part]) for part in ("before", "after"))
        source, truth, mask = (pixels(path) for path in (sample.picture, sample.truth, sample.mask))
        assert np.abs(source / 255 - scenes.render(before)[0]).max() <= 0.5 / 255 + 1e-6
        assert np.abs(truth / 255 - scenes.render(after)[0]).max() <= 0.5 / 255 + 1e-6
        assert set(np.unique(mask)) == {0, 255} and mask.shape == source.shape[:2]
        assert np.array_equal(source[mask == 0], truth[mask == 0])
        assert (source != truth).any(-1)[mask == 255].mean() > 0.2  # dots leave most of a thing as it was
        assert scenes.is_held_out(before) or sample.kind == demo_edits.ADD and scenes.is_held_out(after)


def test_scenes_survive_json(demo):
    edit = demo_edits.draw_edit(demo[0].kind, 0, demo[0].extras["seed"])
    again = json.loads(json.dumps(demo[0].extras))
    assert [demo_edits.scene_of(again[part]) for part in ("before", "after")] == [edit.before, edit.after]
    hash(demo_edits.scene_of(again["after"]))


def test_captions_and_words_say_the_edit(demo):
    for sample in demo:
        assert sample.source != sample.target and sample.extras["instruction"]
        for source, target in sample.words:
            assert source in ("", *sample.source.split()) and target in ("", *sample.target.split())
        words = {kind: len(s.source.split()) == len(s.target.split()) for kind, s in ((s.kind, s) for s in demo)}
        assert words["move"] and not words["add"] and not words["remove"] and not words["pattern"]
    moved = next(sample for sample in demo if sample.kind == "move")
    assert {"left", "right"} == ({*moved.source.split()} ^ {*moved.target.split()})


def success(kind, before, after, shown):
    return demo_edits.shows(kind, before, after, scenes.render(shown)[0])


@pytest.mark.parametrize("kind", demo_edits.KINDS)
def test_the_true_edit_is_a_success_and_nothing_else_is(kind):
    edit = demo_edits.draw_edit(kind, 0, 0)
    before, after = edit.before, edit.after
    assert success(kind, before, after, after)
    assert not success(kind, before, after, before)
    used = {after.background, before.background, *(t.color for s in (before, after) for t in s.things)}
    free = [c for c in scenes.COLORS if c not in used][0]
    assert not success(kind, before, after, scenes.edit_background(after, free))
    assert not success(kind, before, after, scenes.remove_thing(after, 0))
    for number, thing in enumerate(after.things):
        shapes = [s for s in scenes.SHAPES if s not in [t.shape for t in (*before.things, *after.things)]]
        assert not success(kind, before, after, scenes.edit_thing(after, number, color=free)), thing
        assert not success(kind, before, after, scenes.edit_thing(after, number, shape=shapes[0])), thing


def test_what_is_added_may_stand_anywhere_but_not_what_was_there():
    edit = demo_edits.draw_edit(demo_edits.ADD, 0, 0)
    old, new = edit.after.things
    elsewhere = next(
        scenes.Scene((old, scenes.thing(new.shape, new.color, x=x, y=y, r=0.13)), edit.after.background,
                     edit.after.background_rgb)
        for x, y in ((0.2, 0.2), (0.8, 0.2), (0.2, 0.8), (0.8, 0.8))
        if np.hypot(old.x - x, old.y - y) > 1.3 * old.r + 0.2
    )  # fmt: skip
    assert success(edit.kind, edit.before, edit.after, elsewhere)
    moved = demo_edits.draw_edit(demo_edits.MOVE, 0, 0)
    assert not success(demo_edits.COLOUR, moved.before, moved.after, moved.before)
    flipped = scenes.Scene(tuple(scenes.replace(t, y=1 - t.y) for t in edit.after.things), edit.after.background,
                           edit.after.background_rgb)  # fmt: skip
    assert abs(old.y - 0.5) > 0.1 and not success(edit.kind, edit.before, edit.after, flipped)


def test_a_pattern_counts_where_it_is_asked_for():
    plain = scenes.scene("white", scenes.thing("circle", "blue", x=0.3), scenes.thing("star", "red", x=0.75, r=0.18))
    striped, dotted = (scenes.edit_thing(plain, 0, pattern=pattern) for pattern in ("striped", "dotted"))
    assert success(demo_edits.PATTERN, plain, striped, striped)
    assert not success(demo_edits.PATTERN, plain, striped, dotted)
    assert success(demo_edits.COLOUR, plain, striped, dotted)


# ---- PIE-Bench ---------------------------------------------------------------------------------------------------


def pie_entry(**changes):
    return {
        "image_path": "1_change_object_80/a.png",
        "original_prompt": "a [red] circle and a blue star",
        "editing_prompt": "a [green] circle and a blue star",
        "editing_instruction": "make the circle green",
        "editing_type_id": "6",
        "blended_word": "circle circle",
        "mask": [1000, 3],
    } | changes


@pytest.fixture
def pie(tmp_path):
    """A function that writes a PIE-Bench of some entries and reads it."""
    draw(tmp_path / "data" / "annotation_images" / "1_change_object_80" / "a.png", size=512)
    draw(tmp_path / "data" / "annotation_images" / "small.png")

    def read(entries, count=0, second=None):
        write(tmp_path / "data" / "mapping_file.json", entries)
        if second:
            write(tmp_path / "data" / "mapping_file_ti2i_benchmark.json", second)
        return datasets.read(f"pie-bench:{tmp_path}", tmp_path / "made", count)

    return read


def test_pie_bench(pie):
    samples, problems = pie({"000": pie_entry(), "001": pie_entry(blended_word="", mask="1000 3 2000 1")})
    assert problems == [] and [s.key for s in samples] == ["000", "001"]
    first, second = samples
    assert first.source == "a red circle and a blue star" and first.target == "a green circle and a blue star"
    assert (first.kind, first.words, first.thing) == ("change colour", (("circle", "circle"),), "circle")
    assert first.extras == {"instruction": "make the circle green", "seed": 1234} and first.truth is None
    assert second.words == () and second.thing == ""
    masks = [pixels(sample.mask) for sample in samples]
    for mask, inside in zip(masks, ([1000, 1001, 1002], [1000, 1001, 1002, 2000]), strict=True):
        expected = np.zeros(512 * 512)
        expected[inside] = 255
        expected = expected.reshape(512, 512)
        expected[0], expected[-1], expected[:, 0], expected[:, -1] = 255, 255, 255, 255
        assert np.array_equal(mask, expected)


def test_pie_bench_takes_the_first_of_each_kind_and_the_second_file(pie):
    entries = {f"{i:03d}": pie_entry(editing_type_id=str(i % 2)) for i in range(6)}
    samples, _ = pie(entries, count=2)
    assert [s.key for s in samples] == ["000", "001", "002", "003"]
    samples, _ = pie(entries, second={"000": pie_entry(original_prompt="")})
    assert by_key(samples)["ti2i-000"].source == "" and len(samples) == 7


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"mask": None}, "is not a list or a text"),
        ({"mask": [1, 2, 3]}, "pairs of a start and a length"),
        ({"mask": [-1, 2]}, "pairs of a start and a length"),
        ({"mask": [1.5, 2]}, "pairs of a start and a length"),
        ({"mask": "1 two"}, "pairs of a start and a length"),
        ({"mask": [512 * 512, 1]}, "starts at 262144, past the last pixel"),
        ({"blended_word": "circle"}, 'the one blended word "circle"'),
        ({"editing_type_id": "10"}, 'editing type "10"'),
        ({"editing_type_id": 6}, "is not a text"),
        ({"image_path": "gone.png"}, "gone.png, which is not there"),
        ({"image_path": "small.png"}, "a picture of 64x64"),
        ({"image_path": "../mapping_file.json"}, "no picture that can be read"),
        (None, "is not a set of named fields"),
    ],
)
def test_a_malformed_entry_is_told_and_left_out(pie, changes, said):
    bad = None if changes is None else pie_entry(**changes)
    samples, problems = pie({"bad": bad, "good": pie_entry()})
    assert [s.key for s in samples] == ["good"]
    assert len(problems) == 1 and said in problems[0] and problems[0].startswith("pie-bench entry bad ")
    assert problems[0].count("; it is left out.") == 1


@pytest.mark.parametrize("field", ["image_path", "original_prompt", "editing_prompt", "editing_type_id", "mask"])
def test_a_missing_field_is_told(pie, field):
    bad = pie_entry()
    del bad[field]
    samples, problems = pie({"bad": bad})
    assert samples == [] and f"has no {field}" in problems[0]


def test_a_run_over_the_end_is_clipped():
    mask = datasets.pie_mask([14, 100], side=4, border=False)
    assert np.array_equal(np.flatnonzero(mask), [14, 15])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), min_size=49, max_size=49), st.booleans())
def test_masks_come_back_from_their_runs(flat, as_text):
    true = np.array(flat)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], true, [0]])))
    runs = [int(n) for start, end in zip(edges[::2], edges[1::2], strict=True) for n in (start, end - start)]
    given = " ".join(map(str, runs)) if as_text else runs
    assert np.array_equal(datasets.pie_mask(given, 7, border=False).ravel(), true)
    framed = datasets.pie_mask(given, 7)
    assert np.array_equal(framed[1:-1, 1:-1], true.reshape(7, 7)[1:-1, 1:-1])
    assert framed.sum() == framed[1:-1, 1:-1].sum() + 24


# ---- TEdBench and the manifest -----------------------------------------------------------------------------------


def test_tedbench(tmp_path):
    for name in ("bird.jpeg", "bird.png"):
        draw(tmp_path / "originals" / name)
    entries = [
        {"img_name": "bird.jpeg", "target_text": "A bird spreading its wings."},
        {"img_name": "bird.png", "target_text": "A bird spreading its wings."},
        {"img_name": "bird.png"},
        {"img_name": "gone.png", "target_text": "A bird."},
        "bird.png",
    ]
    write(tmp_path / "input_list.json", entries)
    samples, problems = datasets.read(f"tedbench:{tmp_path}", tmp_path / "made")
    assert [s.key for s in samples] == ["bird.jpeg-A_bird_spreading_its_wings", "bird.png-A_bird_spreading_its_wings"]
    assert samples[0].target == "A bird spreading its wings." and samples[0].source == ""
    assert samples[0].mask is None and samples[0].picture.name == "bird.jpeg"
    assert [p.split(" has ")[0].split(" names ")[0].split(" is ")[0] for p in problems] == [
        "tedbench entry 2", "tedbench entry 3", "tedbench entry 4",
    ]  # fmt: skip


def test_keys_stay_apart_where_texts_do_not(tmp_path):
    draw(tmp_path / "originals" / "bird.png")
    texts = ["A bird, red", "A bird; red", "a BIRD, red"]
    write(tmp_path / "input_list.json", [{"img_name": "bird.png", "target_text": text} for text in texts])
    keys = [s.key.lower() for s in datasets.read(f"tedbench:{tmp_path}", tmp_path / "made")[0]]
    assert len(set(keys)) == 3


def test_manifest(tmp_path):
    draw(tmp_path / "a.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "m.png")
    good = {
        "image": "a.png", "mask": "m.png", "target_prompt": "a green circle", "object_prompt": "circle",
        "retain": False, "modify": True, "background": False,
    }  # fmt: skip
    entries = [
        good,
        good | {"retain": True, "id": "both", "source_prompt": "a red circle", "truth": "a.png"},
        good | {"modify": False, "background": True},
        good | {"modify": False},
        good | {"modify": "yes"},
        {k: v for k, v in good.items() if k != "mask"},
    ]
    write(tmp_path / "manifest.json", entries)
    samples, problems = datasets.read(f"manifest:{tmp_path}", tmp_path / "made")
    assert [(s.key, s.kind) for s in samples] == [("0", "modify"), ("both", "retain and modify"), ("2", "background")]
    assert samples[0].thing == "circle" and samples[0].mask == tmp_path / "m.png" and samples[0].truth is None
    assert samples[1].source == "a red circle" and samples[1].truth == tmp_path / "a.png"
    assert samples[0].extras == {"retain": False, "modify": True, "background": False}
    told = [(3, "none of the flags"), (4, "is not true or false"), (5, "has no mask")]
    for problem, (number, said) in zip(problems, told, strict=True):
        assert f"entry {number} " in problem and said in problem


# ---- MagicBrush --------------------------------------------------------------------------------------------------


def magicbrush(tmp_path, sessions, layout="download"):
    """A MagicBrush folder of sessions {id: number of turns}, in the layout of the download or of the hub."""
    captions, told, rows = {}, {}, []
    for name, turns in sessions.items():
        at = tmp_path / "images" / name
        names = [f"{name}-input.png", *(f"{name}-output{k}.png" for k in range(1, turns + 1))]
        captions[name] = {file: f"picture {k}" for k, file in enumerate(names)}
        for k, file in enumerate(names):
            draw(at / file, scenes.edit_thing(SCENE, 0, color=scenes.COLORS[k]))
        told[name] = []
        for k in range(1, turns + 1):
            masked = np.concatenate([pixels(at / names[k - 1]), np.full((64, 64, 1), 255, np.uint8)], -1)
            masked[10:20, 30:50] = 0 if layout == "download" else 255
            Image.fromarray(masked if layout == "download" else masked[..., :3]).save(at / f"{name}-mask{k}.png")
            files = {"input": names[k - 1], "mask": f"{name}-mask{k}.png", "output": names[k]}
            told[name].append(files | {"instruction": f"do {k}"})
            hub = {"img_id": name, "turn_index": k, "instruction": f"do {k}"}
            theirs = {"source_img": "input", "mask_img": "mask", "target_img": "output"}
            rows.append(hub | {column: f"images/{name}/{files[part]}" for column, part in theirs.items()})
    write(tmp_path / "global_descriptions.json", captions)
    if layout == "download":
        write(tmp_path / "edit_sessions.json", told)
    else:
        (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in reversed(rows)), encoding="utf-8")
    return told, captions


@pytest.mark.parametrize("layout", ["download", "hub"])
def test_magicbrush(tmp_path, layout):
    magicbrush(tmp_path, {"139": 3, "30": 1}, layout)
    samples, problems = datasets.read(f"magicbrush:{tmp_path}", tmp_path / "made")
    assert problems == []
    found = by_key(samples)
    single = {key for key, s in found.items() if s.kind == "single turn"}
    multi = {key for key, s in found.items() if s.kind == "multi turn"}
    assert single == {"139_1", "139_inde_2", "139_inde_3", "30_1"}
    assert multi == {"139_iter_1", "139_iter_2", "139_iter_3", "30_iter_1"}
    third = found["139_iter_3"]
    assert (third.previous, third.turn, third.extras["final"]) == ("139_iter_2", 3, True)
    assert third.source == "picture 2" and third.target == "picture 3" and third.extras["instruction"] == "do 3"
    assert third.picture.name == "139-output2.png" and third.truth.name == "139-output3.png"
    assert found["139_iter_1"].previous == "" and not found["139_iter_2"].extras["final"]
    assert found["139_inde_2"].picture.name == "139-output1.png" and found["139_inde_2"].previous == ""
    mask = np.zeros((64, 64))
    mask[10:20, 30:50] = 255
    assert all(np.array_equal(pixels(s.mask), mask) for s in samples)
    few, _ = datasets.read(f"magicbrush:{tmp_path}", tmp_path / "made", 2)
    assert [s.previous in {"", *(t.key for t in few)} for s in few] == [True] * 4


def test_magicbrush_without_a_turn(tmp_path):
    told, captions = magicbrush(tmp_path, {"139": 3, "30": 1, "7": 1})
    (tmp_path / "images" / "139" / "139-mask2.png").unlink()
    del captions["30"]["30-output1.png"]
    write(tmp_path / "global_descriptions.json", captions)
    write(tmp_path / "edit_sessions.json", told | {"8": "nothing"})
    write(tmp_path / "local_descriptions.json", {"7": {"7-output1.png": "near"}})
    samples, problems = datasets.read(f"magicbrush:{tmp_path}", tmp_path / "made")
    found = by_key(samples)
    assert set(found) == {"139_1", "139_iter_1", "139_inde_3", "7_1", "7_iter_1"}
    assert found["7_1"].extras["local caption"] == "near" and "local caption" not in found["139_1"].extras
    said = ["139 turn 2 names", "139 turn 3 is used as a single turn only", "30 turn 1 has no description", "8 has as"]
    for problem, start in zip(problems, said, strict=True):
        assert problem.startswith(f"magicbrush entry {start}")


def test_a_hub_line_that_is_no_row_is_told(tmp_path):
    magicbrush(tmp_path, {"30": 1}, "hub")
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write('\n{"img_id": "31"}\nno json\n')
    samples, problems = datasets.read(f"magicbrush:{tmp_path}", tmp_path / "made")
    assert {s.key for s in samples} == {"30_1", "30_iter_1"}
    assert ["line 2" in problems[0], "line 3" in problems[1], len(problems)] == [True, True, 2]


# ---- Wild-TI2I and ImageNet-R-TI2I -------------------------------------------------------------------------------

YAML = """
- init_img: /Elsewhere/ImageNetR-TI2I/Panda/cartoon_30.png
  source_prompt: a cartoon of a panda
  target_prompts:
  - a sketch of an owl
  - a photo of a panda
- source_prompt: a sketch of a cat
  target_prompts: [a sketch of a dog]
- init_img: /any/place/flat.png
  target_prompts: [a dog]
- init_img: /any/place/gone.png
  target_prompts: [a dog]
- init_img: flat.png
  target_prompts: a dog
"""


def test_real_pictures_are_found_wherever_they_were(tmp_path):
    root = tmp_path / "imagenetr-ti2i"
    draw(root / "panda" / "cartoon_30.png")
    draw(root / "data" / "flat.png")
    (root / "imnetr-ti2i.yaml").write_text(YAML)
    for data in (root, root / "imnetr-ti2i.yaml"):
        samples, problems = datasets.read(f"ti2i:{data}", tmp_path / "made")
        assert [s.key for s in samples] == ["imnetr-ti2i-00-0", "imnetr-ti2i-00-1", "imnetr-ti2i-02-0"]
        first, second, third = samples
        assert first.picture == root / "panda" / "cartoon_30.png" and third.picture == root / "data" / "flat.png"
        assert first.words == (("cartoon", "sketch"), ("panda", "owl")) and second.words == (("cartoon", "photo"),)
        assert first.kind == "imnetr-ti2i" and third.source == ""
        said = ["1 has no init_img", "3 names the picture", "4 has as target_prompts"]
        for problem, start in zip(problems, said, strict=True):
            assert problem.startswith(f"ti2i entry imnetr-ti2i {start}")


def test_generated_pictures_bring_their_settings(tmp_path):
    text = "- {source_prompt: a cat, seed: 7, scale: 5.0, ddim_steps: 50, target_prompts: [a dog]}\n"
    (tmp_path / "wild-ti2i-fake.yaml").write_text(text)
    (one,), problems = datasets.read(f"ti2i:{tmp_path}", tmp_path / "made")
    assert one.picture is None and one.extras["seed"] == 7 and problems == []  # the model is to draw it
    draw(tmp_path / "imgs" / "a cat.png")
    (one,), problems = datasets.read(f"ti2i:{tmp_path}", tmp_path / "made")
    assert one.extras == {"seed": 7, "scale": 5.0, "steps": 50} and one.words == (("cat", "dog"),) and problems == []
    assert one.picture == tmp_path / "imgs" / "a cat.png"


# ---- Free-Prompt-Editing's ---------------------------------------------------------------------------------------


def test_free_prompt_editings_lists_are_read_as_they_are_spelt(tmp_path):
    """Real pictures beside the list, in images/ or in a folder called like it; the generated ones bring none."""
    pair = {"soure_prompt": "a red car", "edit_prompt": "a teal car"}
    write(tmp_path / "Car_fake_edit.json", [pair, {"source_prompt": "a cat", "edit_prompt": "a big dog"}])
    names = ["1.jpg", "n02/2.png", "n03/3.png", "gone.jpg"]
    write(tmp_path / "ImageNet_real_edit.json", [pair | {"image_name": name} for name in names] + [{"edit_prompt": ""}])
    there = [draw(tmp_path / way) for way in ("1.jpg", "images/n02/2.png", "ImageNet_real_edit/3.png")]
    samples, problems = datasets.read(f"fpe:{tmp_path}", tmp_path / "made")
    assert [s.picture for s in samples] == [None, None, *there]
    assert [s.kind for s in samples] == ["Car_fake_edit"] * 2 + ["ImageNet_real_edit"] * 3
    assert samples[0].words == (("red", "teal"),) and samples[1].source == "a cat" and samples[1].words == ()
    assert samples[0].key == "Car_fake_edit-0000" and samples[0].target == "a teal car"
    assert "gone.jpg, which is not there" in problems[0] and "has no soure_prompt" in problems[1]
    one = datasets.read(f"fpe:{tmp_path / 'Car_fake_edit.json'}", tmp_path / "made", count=1)[0]
    assert [s.key for s in one] == ["Car_fake_edit-0000"]


# ---- no such data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["pie-bench", "demo:here", "nothing", "coco:here"])
def test_unknown_data_is_refused(tmp_path, data):
    with pytest.raises(ValueError, match="give one of demo, pie-bench:FOLDER"):
        datasets.read(data, tmp_path)


@pytest.mark.parametrize("name", ["pie-bench", "tedbench", "manifest", "magicbrush", "ti2i", "fpe"])
def test_a_folder_that_is_none_is_refused_in_one_sentence(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"^[^\n]* is no [^\n]*; name [^\n.]*\.$"):
        datasets.read(f"{name}:{tmp_path / 'empty'}", tmp_path / "made")
    files = {"pie-bench": "mapping_file.json", "tedbench": "input_list.json", "manifest": "manifest.json"}
    if name in files:
        for text, said in (("{", "cannot be read as JSON"), ("3", "holds no JSON")):
            (tmp_path / "empty" / files[name]).write_text(text)
            with pytest.raises(ValueError, match=said):
                datasets.read(f"{name}:{tmp_path / 'empty'}", tmp_path / "made")


@pytest.mark.parametrize("source, target, pairs", [
    ("a photo of a cat", "a photo of a dog", (("cat", "dog"),)),
    ("an orange t-shirt", "a red t-shirt", (("orange", "red"),)),
    ("a red circle on a gray wall", "a circle on a dark gray wall", ()),
    ("a cat", "a big cat", ()),
    ("a cat " * 60, "a dog " * 60, (("cat", "dog"),) * 60),
])  # fmt: skip
def test_words_that_differ_are_pairs_where_none_is_shifted(source, target, pairs):
    assert datasets.changed_words(source, target) == pairs
