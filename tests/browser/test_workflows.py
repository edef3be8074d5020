"""Every shipped workflow opens in ComfyUI's own interface, says what its API form says, and is saved as it was."""

import pytest

from attune.tests.server import workflow

NOTES = {"Note", "MarkdownNote"}


def sent(prompt: dict) -> dict:
    """What the interface sends, less the text box in which it shows the result of Preview Any: no input of the node."""
    shown = {"PreviewAny": {"preview"}}
    return {
        number: {
            **node,
            "inputs": {k: v for k, v in node["inputs"].items() if k not in shown.get(node["class_type"], ())},
        }
        for number, node in prompt.items()
    }


def unmoved(graph: dict) -> dict:
    """Without places and sizes, which the Vue renderer measures anew each time."""
    return {**graph, "nodes": [{k: v for k, v in node.items() if k not in ("pos", "size")} for node in graph["nodes"]]}


def overlapping(graph: dict) -> list[tuple[str, str]]:
    """The nodes that lie over another one, with their title bars."""
    boxes = [(n.get("title") or n["type"], *n["pos"], *n["size"]) for n in graph["nodes"]]
    return [
        (one, other)
        for k, (one, x, y, w, h) in enumerate(boxes)
        for other, x2, y2, w2, h2 in boxes[:k]
        if x < x2 + w2 and x2 < x + w and y - 30 < y2 + h2 and y2 - 30 < y + h
    ]


@pytest.mark.parametrize("name", workflow.NAMES)
def test_it_opens_whole_and_is_saved_the_same(name, comfy):
    file = comfy.template(name)
    comfy.load(file, name)
    comfy.command("Comfy.Canvas.FitView")
    comfy.shot(name)
    assert not comfy.complaints()
    assert sent(comfy.prompt()) == workflow.load(name)
    saved = comfy.saved()
    values = {node["id"]: node.get("widgets_values") for node in file["nodes"]}
    assert {node["id"]: node.get("widgets_values") for node in saved["nodes"]} == values
    comfy.reload(saved)
    again = comfy.saved()
    assert not comfy.complaints()
    if comfy.vue:
        assert unmoved(again) == unmoved(saved)
    else:
        assert again == saved
        assert {n["id"]: n["pos"] for n in saved["nodes"]} == {n["id"]: n["pos"] for n in file["nodes"]}
        assert not overlapping(saved)
