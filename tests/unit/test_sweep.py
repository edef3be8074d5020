"""One input at several values: what is asked of the server, what is counted, and what is shown. No ComfyUI."""

import csv
import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from attune.benchmark import datasets, prompts, results, sweep


def arguments(*words):
    return sweep.parser_of().parse_args(list(words))


def workflow(path=sweep.ROOT / "benchmark" / "fader.workflow.json"):
    return sweep.read_workflow(path)


def test_values_are_read_as_json_or_put_into_a_text():
    assert sweep.values_of(arguments("x", "--values", "0", "0.5", "yes", "true")) == [0, 0.5, "yes", True]
    assert sweep.values_of(arguments("x", "--as", "red: {}", "--values", "-2", "1")) == ["red: -2", "red: 1"]
    with pytest.raises(ValueError, match="has no {}"):
        sweep.values_of(arguments("x", "--as", "red", "--values", "1"))


def test_a_job_is_the_workflow_with_the_input_set_and_only_what_leads_to_the_picture():
    nodes = workflow()
    result = sweep.result_of(nodes, "")
    place = "Attune Prompt Reweight/weights"
    one, other = (sweep.job_of(nodes, result, {place: value, "SamplerCustom/cfg": 5}) for value in ("red: 2", "red: 0"))
    apart = [n for n in one.prompt if one.prompt[n] != other.prompt[n]]
    assert [one.prompt[n]["class_type"] for n in apart] == ["AttunePromptReweight"]
    assert one.prompt[apart[0]]["inputs"]["weights"] == "red: 2" and one.prompt[result]["class_type"] == "PreviewImage"
    assert [n["inputs"]["cfg"] for n in one.prompt.values() if n["class_type"] == "SamplerCustom"] == [5]
    assert nodes == workflow()  # it is left as it was


def test_a_picture_of_this_machine_goes_along(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png")
    nodes = sweep.read_workflow(prompts.WORKFLOWS / "Attune - Re-weight a word.json")
    result = sweep.result_of(nodes, "new word raised")
    job = sweep.job_of(nodes, result, {"Load Image/image": f"@{tmp_path / 'cat.png'}"})
    (name,) = job.files
    assert job.files[name] == (tmp_path / "cat.png").read_bytes()
    assert [n["inputs"]["image"] for n in job.prompt.values() if n["class_type"] == "LoadImage"] == [name]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"No Such Node/x": 1}, "No node 'No Such Node' leads to the picture .* Attune Prompt Reweight"),
        ({"Attune Prompt Reweight/no_such": 1}, "has no input no_such, only weights"),
    ],
)
def test_what_a_workflow_has_not_is_named(change, says):
    nodes = workflow()
    with pytest.raises(ValueError, match=says):
        sweep.job_of(nodes, sweep.result_of(nodes, ""), change)


def test_which_picture_counts(tmp_path):
    nodes = sweep.read_workflow(prompts.WORKFLOWS / "Attune - Re-weight a word.json")
    assert nodes[sweep.result_of(nodes, "new word raised")]["_meta"]["title"] == "new word raised"
    with pytest.raises(ValueError, match="new word raised, new word lowered, contact sheet do; choose one"):
        sweep.result_of(nodes, "")
    (tmp_path / "other.json").write_text('{"nodes": [], "links": []}')
    with pytest.raises(ValueError, match=r"no workflow in the API format; export it by"):
        sweep.read_workflow(tmp_path / "other.json")


@pytest.mark.parametrize("words", [(), ("x",), ("x", "--set", "a/b"), ("x", "--values", "1")])
def test_what_is_lacking_is_said(words):
    with pytest.raises(ValueError, match="needs a workflow or a method, --set and --values"):
        sweep.sweep(arguments(*words))
    for more, says in (
        (("--values", "1", "1"), "a value twice"), (("--values", "1", "--checkpoint", "x"), "--checkpoint needs"),
        (("--values", "1"), '"b" is not "title of nodes/input"'),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            sweep.sweep(arguments("x", "--set", "b", *more))


def test_a_method_once_for_each_value_beats_its_own_demo_settings(tmp_path):
    samples, _ = datasets.read("demo", tmp_path, 1)
    sample = prompts.prepare(next(s for s in samples if s.kind == "colour"), 128, tmp_path)
    method = prompts.read_method("p2p_ddim")
    place = "Attune Prompt Swap/cross_end"
    assert place in method.demo
    made = sweep.variants(method, place, [0, 0.5, 1], {"SamplerCustom/cfg": 5})
    built = [prompts.build(m, sample, prompts.Setup()) for m in made]
    for prompt, value in zip(built, (0, 0.5, 1), strict=True):
        (swap,) = (n for n in prompt.nodes.values() if n["class_type"].startswith("AttunePrompt"))
        assert swap["inputs"]["cross_end"] == value
        assert {n["inputs"]["cfg"] for n in prompt.nodes.values() if n["class_type"] == "SamplerCustom"} == {5}
    assert len({prompt.digest for prompt in built}) == len({m.key for m in made}) == 3
    names = Counter(letter for m in made for letter in m.key)
    assert not set(names) & set('/\\:*?"<>| ')  # it is a folder's name


def test_intervals():
    low, high = sweep.interval([0.0] * 5 + [100.0] * 5)  # Wilson's of 5 of 10
    assert (round(low, 2), round(high, 2)) == (23.66, 76.34)
    assert sweep.interval([100.0] * 4)[1] == pytest.approx(100) and sweep.interval([100.0] * 4)[0] < 60
    values = np.random.default_rng(0).normal(20, 3, 400)
    low, high = sweep.interval(list(values))
    half = 1.96 * values.std() / 20
    assert abs(low - (values.mean() - half)) < 0.05 and abs(high - (values.mean() + half)) < 0.05
    assert sweep.interval(list(values)) == (low, high)


def found(tmp_path, missing=False):
    rows = []
    for colour in ("red", "blue"):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{colour}.png")
        rows.append((colour, tmp_path / f"{colour}.png"))
    rows.append(("2", None)) if missing else None
    figures = {results.SUCCESS: [[0.0, 100.0], [100.0]], "PSNR kept": [[20.0, 22.0], []]}
    return sweep.Sweep("a title", ["0", "1"], figures, [rows])


def test_the_table_is_written_as_it_is(tmp_path):
    lines = list(csv.DictReader(io.StringIO(sweep.as_csv(found(tmp_path)))))
    assert len(lines) == 4 and lines[0]["mean"] == "50.0" and lines[0]["n"] == "2"
    assert lines[1]["low"] == "" and lines[3]["mean"] == "" and lines[3]["n"] == "0"
    text = sweep.as_text(found(tmp_path)).splitlines()
    assert text[0].split()[:3] == ["value", "success", "%"] and "21.0 (20.0 to 22.0)" in text[1]


def test_the_sheet_shows_every_value_and_what_is_missing(tmp_path):
    two, three = (np.asarray(sweep.draw_sheet(found(tmp_path, m), 64)) for m in (False, True))
    for colour in ((255, 0, 0), (0, 0, 255)):
        assert (np.abs(two.astype(int) - colour).max(-1) < 8).sum() > 60 * 60
    assert three.shape[1] > two.shape[1]
    black = (three.max(-1) < 3).sum()
    assert 60 * 60 < black < 70 * 70


def test_what_is_kept_is_of_the_commands_there_are():
    kept = json.loads(sweep.KEPT.read_text(encoding="utf-8"))
    wanted = {title: f"python3 dev.py bench sweep {command}" for title, command in sweep.COMMANDS.items()}
    assert {title: one["command"] for title, one in kept.items()} == wanted
    assert all(one["figures"] for one in kept.values())
    assert sweep.KEPT.with_suffix(".jpg").stat().st_size < 200_000
