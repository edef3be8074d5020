"""The pack's blocks, as ComfyUI's interface lists them and puts them on the canvas."""

import json

import pytest

from attune.tests import host

FILES = sorted((host.ROOT / "subgraphs").glob("*.json"))
STORE = """document.querySelector("#vue-app").__vue_app__.config.globalProperties.$pinia._s.get("subgraph")"""
# What a click on the block in the node library does.
ADD = f"""name => {{
    const store = {STORE}, block = store.getBlueprint(store.subgraphBlueprints.find(b => b.display_name === name).name);
    const items = {{nodes: block.nodes, subgraphs: block.definitions.subgraphs}};
    const node = app.canvas._deserializeItems(items, {{position: [0, 0]}}).nodes.values().next().value;
    return {{inputs: node.inputs.map(i => i.name), widgets: node.widgets.map(w => w.name),
             outputs: node.outputs.map(o => o.name)}};
}}"""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_block_is_listed_and_added_whole(path, comfy):
    (block,) = json.loads(path.read_text(encoding="utf-8"))["definitions"]["subgraphs"]
    comfy.command("Comfy.NewBlankWorkflow")
    listed = comfy.page.evaluate(f"{STORE}.subgraphBlueprints.map(b => b.display_name)")
    assert path.stem in listed
    shown = comfy.page.evaluate(ADD, path.stem)
    comfy.drawn()
    comfy.command("Comfy.Canvas.FitView")
    comfy.shot(f"block {path.stem}")
    assert {*shown["inputs"], *shown["widgets"]} == {one["name"] for one in block["inputs"]}
    assert shown["outputs"] == [one["name"] for one in block["outputs"]]
    assert not comfy.complaints()
    sent = comfy.prompt()
    inside = sorted(node["type"] for node in block["nodes"] if node["type"] != "MarkdownNote")
    assert sorted(node["class_type"] for node in sent.values()) == inside
    # What the block does not show has the values that it was made with; none has slipped into another widget.
    saved = comfy.saved()
    comfy.reload(saved)
    assert comfy.prompt() == sent and not comfy.complaints()
