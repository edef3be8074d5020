"""Trajectories on the server: learning that can be watched and stopped, and files that can be chosen."""

import re
import shutil
import time

import numpy as np
import pytest

from attune.tests import host
from attune.tests.server import workflow

NULL_TEXT, SAVE, LOAD = "AttuneNullTextInversion", "AttuneSaveTrajectory", "AttuneLoadTrajectory"
SUFFIX = ".trajectory.safetensors"
STEPS, INNER = 8, 4


def learning():
    """Null-text inversion in the demo world, in which no step is ever good enough to stop early."""
    prompt = workflow.in_the_demo_world(workflow.load("Attune - Null-text inversion"))
    prompt = workflow.cut(prompt, "reconstruction")
    prompt[workflow.find(prompt, "AttuneDDIMInversion")]["inputs"]["steps"] = STEPS
    prompt[workflow.find(prompt, NULL_TEXT)]["inputs"].update(inner_steps=INNER, learning_rate=0.001)
    return prompt


def watch(server, prompt, at=lambda step: None):
    """Run ``prompt``; what the null-text node reports: numbers of updates, and sentences."""
    node, updates, said = workflow.find(prompt, NULL_TEXT), [], []

    def progress(where, step, steps):
        if where == node and steps:
            assert steps == STEPS * INNER
            updates.append(step)
            at(step)

    def text(where, words):
        assert where == node
        said.append(words)

    try:
        entry = server.run(prompt, progress, on_text=text)
    except host.HostError as stopped:
        assert "was interrupted" in str(stopped)
        return None, updates, said
    return workflow.pixels(server, workflow.saved(prompt, entry)["reconstruction"]), updates, said


def test_null_text_can_be_watched_stopped_and_gone_on_with(server):
    prompt = learning()
    whole, updates, said = watch(server, prompt)
    assert updates == sorted(updates)
    assert set(updates) >= {1, STEPS * INNER // 2, STEPS * INNER}
    assert re.fullmatch(rf"step 1 of {STEPS}, update 1: loss \d\.\d\de-\d\d", said[0])
    assert said[-1].startswith(f"{STEPS * INNER} updates in {STEPS} steps, last loss ")

    workflow.forget(server)
    pressed = []

    def cancel(step):
        if step == 3 * INNER + 2:
            pressed.append(time.monotonic())
            server.interrupt()

    picture, updates, said = watch(server, prompt, cancel)
    assert picture is None
    # An update that was under way is finished, and one or two more may pass while the request travels.
    assert max(updates) <= 3 * INNER + 5
    assert time.monotonic() - pressed[0] < 5

    picture, updates, said = watch(server, prompt)
    assert re.fullmatch(rf"going on from step [45] of {STEPS}, where an earlier run was stopped", said[0])
    assert min(updates) > 3 * INNER
    assert np.array_equal(picture, whole)


def test_a_killed_server_goes_on_to_the_same_picture(server, tmp_path):
    """Killed at once, in the middle of a step, and started again in the same folder."""
    prompt = learning()
    whole, _, _ = watch(server, prompt)
    (tmp_path / "input").mkdir()
    shutil.copyfile(server.base / "input" / "example.png", tmp_path / "input" / "example.png")
    shutil.copytree(server.base / "custom_nodes" / "attune_standin", tmp_path / "custom_nodes" / "attune_standin")
    with host.Server(host.Host.current(), base=tmp_path) as first:

        def kill(step):
            if step == 5 * INNER + 2:
                first.process.kill()

        with pytest.raises((host.HostError, OSError)):
            first.run(prompt, lambda node, step, steps: kill(step) if steps == STEPS * INNER else None)
    with host.Server(host.Host.current(), base=tmp_path) as second:
        picture, updates, said = watch(second, prompt)
        assert re.fullmatch(rf"going on from step [56] of {STEPS}, where an earlier run was stopped", said[0])
        assert min(updates) > 3 * INNER
        assert np.array_equal(picture, whole)
        kept = [path for path in (tmp_path / "user").rglob("*") if "unfinished" in str(path) and path.is_file()]
        assert not [path for path in kept if path.suffix == ".safetensors"]


# -- files ------------------------------------------------------------------------------------------------------------


def keeping(steps):
    """A small inversion, saved."""
    prompt = workflow.in_the_demo_world(workflow.load("Attune - Save and reuse a trajectory"))
    prompt[workflow.find(prompt, "AttuneDDIMInversion")]["inputs"]["steps"] = steps
    prompt[workflow.find(prompt, SAVE)]["inputs"].update(
        trajectory=[workflow.find(prompt, "AttuneDDIMInversion"), 0], filename_prefix="attune/kept"
    )
    return workflow.cut(prompt, "file")


def loading(name):
    return {
        "1": {"class_type": LOAD, "inputs": {"file": name}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 1]}},
    }


def choices(server):
    return server.get(f"/object_info/{LOAD}")[LOAD]["input"]["required"]["file"][1]["options"]


def test_a_saved_trajectory_is_listed_and_read_again_only_when_it_changed(server):
    before = choices(server)
    names = []
    for steps in (3, 4):
        prompt = keeping(steps)
        names += server.run(prompt)["outputs"][workflow.find(prompt, "file")]["text"]
        assert set(choices(server)) == {*before, *names}
    assert not set(names) & set(before)
    assert all(name.startswith("attune/kept_") and name.endswith(".trajectory.safetensors [output]") for name in names)

    entry = server.run(loading(names[0]))
    assert entry["outputs"]["2"]["text"] == [workflow.SOURCE]
    assert "1" in workflow.was_cached(server.run(loading(names[0])))
    first, second = (server.base / "output" / name.removesuffix(" [output]") for name in names)
    shutil.copyfile(second, first)
    assert "1" not in workflow.was_cached(server.run(loading(names[0])))
    assert "1" in workflow.was_cached(server.run(loading(names[0])))


@pytest.mark.parametrize("kind, inputs, caption", [
    ("PrimitiveStringMultiline", {"value": "plain"}, workflow.SOURCE),
    ("StringReplace", {"string": workflow.SOURCE, "find": "red", "replace": "green"}, ""),
    ("RegexReplace", {"string": workflow.SOURCE, "regex_pattern": "red", "replace": "green"}, ""),
    ("StringTrim", {"string": "plain", "mode": "Both"}, ""),
    ("CaseConverter", {"string": workflow.SOURCE, "mode": "UPPERCASE"}, ""),
])  # fmt: skip
def test_a_caption_is_recorded_only_where_the_graph_says_it(server, kind, inputs, caption):
    """Behind a node that works on the text it is not known, and a wrong one is worse than none."""
    prompt = keeping(2)
    encoder = prompt[workflow.find(prompt, "AttuneDDIMInversion")]["inputs"]["conditioning"][0]
    plain = workflow.add(prompt, "PrimitiveString", value=workflow.SOURCE)
    inputs = {name: plain if value == "plain" else value for name, value in inputs.items()}
    prompt[encoder]["inputs"]["text"] = workflow.add(prompt, kind, **inputs)
    (name,) = server.run(prompt)["outputs"][workflow.find(prompt, "file")]["text"]
    assert server.run(loading(name))["outputs"]["2"]["text"] == [caption]


def test_a_name_may_come_by_a_link(server):
    prompt = keeping(3)
    saved = workflow.find(prompt, SAVE)
    prompt["load"] = {"class_type": LOAD, "inputs": {"file": [saved, 0]}}
    prompt["shown"] = {"class_type": "PreviewAny", "inputs": {"source": ["load", 1]}}
    entry = server.run(prompt)
    assert entry["outputs"]["shown"]["text"] == [workflow.SOURCE]
    typed = {"class_type": "PrimitiveString", "inputs": {"value": f"nothing{SUFFIX}"}}
    other = {"class_type": "PrimitiveInt", "inputs": {"value": 3}}
    for source, said in ((typed, f'There is no trajectory file "nothing{SUFFIX}" inside'), (other, "comes from a INT")):
        with pytest.raises(host.HostError) as refused:
            server.run({**loading(["0", 0]), "0": source})
        assert said in str(refused.value)


@pytest.mark.parametrize(
    ("prefix", "said"),
    [("x" * 190 + "/" + "y" * 240, "File name too long"), ("a\0b", "null byte")], ids=["too long", "NUL"],
)  # fmt: skip
def test_a_prefix_that_no_file_can_have(server, prefix, said):
    prompt = keeping(3)
    prompt[workflow.find(prompt, SAVE)]["inputs"]["filename_prefix"] = prefix
    with pytest.raises(host.HostError) as refused:
        server.run(prompt)
    sentence = str(refused.value).splitlines()[0]
    assert "can be written to ComfyUI's output folder (" in sentence and said in sentence
    assert sentence.endswith("still has what was to be saved.")


@pytest.mark.parametrize(
    "name",
    [
        "../x.trajectory.safetensors",
        "a/../../x.trajectory.safetensors [output]",
        "/etc/passwd",
        "/etc/passwd [output]",
        "example.png",
        "nothing.trajectory.safetensors",
        "x" * 150 + ".trajectory.safetensors",
        "",
    ],
)
def test_other_files_are_refused_before_anything_runs(name, server):
    (server.base / "x.trajectory.safetensors").touch()
    with pytest.raises(host.HostError) as refused:
        server.queue(loading(name))
    # ComfyUI says it once for each argument that the check takes.
    (sentence,) = {line.split(" - ", 1)[1] for line in str(refused.value).splitlines() if LOAD in line}
    assert name in sentence
    assert sentence.endswith("Attune Load Trajectory.")
    assert ". " not in sentence, "more than one sentence"
