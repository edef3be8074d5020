"""What a user reads on the edit's node where the sampler behind it does not start on the trajectory."""

import pytest

from attune.tests.server import workflow

EDIT = "AttunePromptSwap"


def told(server, **changes):
    """The warnings that the demo's edit is given on its node, with these inputs of its sampler changed."""
    prompt = workflow.cut(workflow.load(workflow.DEMO), "word swap")
    workflow.forget(server)
    prompt[workflow.find(prompt, "AttuneDDIMInversion")]["inputs"]["steps"] = 4
    prompt[workflow.find(prompt, "SamplerCustom")]["inputs"] |= changes
    edit = workflow.find(prompt, EDIT)
    said = []
    entry = server.run(prompt, on_text=lambda node, text: said.append(text) if node == edit else None)
    assert entry["status"]["status_str"] == "success"
    return said


def test_the_shipped_way_says_nothing(server):
    assert told(server) == []


@pytest.mark.parametrize(("changes", "words"), [({"add_noise": True}, "switch add_noise off")])
def test_added_noise_is_told_on_the_edits_node(changes, words, server):
    (text,) = told(server, **changes)
    assert words in text and text.endswith(".")
