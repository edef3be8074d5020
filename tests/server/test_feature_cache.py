"""The feature cache over HTTP: it lives as long as the host keeps its node's output, and no longer."""

import re

import numpy as np

from attune.tests.server import workflow

EDIT, CACHE = "AttuneFreePromptEditing", "AttuneFeatureCache"
STEPS = 4
READ = 3  # steps with a source pass: the edit ends at 0.8


def editing(target, cached=True):
    prompt = workflow.in_the_demo_world(workflow.load("Attune - Free prompt editing"))
    title = next(t for t in workflow_titles(prompt) if "edit" in t.lower())
    prompt = workflow.cut(prompt, title)
    prompt[workflow.find(prompt, "AttuneDDIMInversion")]["inputs"]["steps"] = STEPS
    edit = prompt[workflow.find(prompt, EDIT)]["inputs"]
    edit["target_prompt"] = target
    if cached:
        edit["model"] = workflow.add(prompt, CACHE, model=edit["model"], limit_mb=500)
    return prompt


def workflow_titles(prompt):
    return [node["_meta"]["title"] for node in prompt.values() if node["class_type"] == "SaveImage"]


def draw(server, prompt):
    """The picture, and how many source passes were not run and how many there were, None where nothing was said."""
    said = []
    entry = server.run(prompt, on_text=lambda node, text: said.append(text) if "MB kept" in text else None)
    (image,) = workflow.saved(prompt, entry).values()
    found = re.search(r"; (\d+) of (\d+) source passes were not run", said[-1]) if said else None
    return workflow.pixels(server, image), found and tuple(map(int, found.groups()))


def test_a_second_edit_reads_what_the_first_one_kept(server):
    first, second = "a yellow circle and a blue square on a gray background", "a red circle on a white background"
    workflow.forget(server)
    plain, said = draw(server, editing(second, cached=False))
    assert said is None
    _, said = draw(server, editing(first))
    assert said == (0, READ)
    again, said = draw(server, editing(second))
    assert said == (READ, READ)
    assert np.abs(again.astype(int) - plain.astype(int)).max() <= 1
    workflow.forget(server)
    _, said = draw(server, editing(second))
    assert said == (0, READ)
