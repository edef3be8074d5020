"""The blueprints, one block each for a whole edit: ComfyUI lists them, they fit the nodes, and they edit.

ComfyUI serves them from 0.3.67 on and leaves them alone before. The browser tests put them into a graph.
"""

import copy
import json

import pytest

from attune.tests import host
from attune.tests.server import test_workflows as checks
from attune.tests.server import workflow

FOLDER = host.ROOT / "subgraphs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
ENTRY, EXIT = -10, -20  # the ids of a subgraph's own ends
BLOCK = "9:"  # how the canvas numbers what is in a block: after the block
SWAP, LAYOUT, MASK = (
    f"Attune - Invert, {edit}, decode"
    for edit in ("swap words", "edit in the source's layout", "replace in a mask")
)  # fmt: skip
HEART = "a yellow heart and a blue square on a gray background"


def read(name: str) -> tuple[dict, dict]:
    """The block as it stands on the canvas, and what is in it."""
    whole = json.loads(
        (FOLDER / f"{name}.json").read_text(encoding="ascii")
    )  # ComfyUI reads it in the system's encoding
    (block,), (inner,) = whole["nodes"], whole["definitions"]["subgraphs"]
    assert block["type"] == inner["id"] and whole["links"] == [] and whole["extra"]["BlueprintDescription"]
    return block, inner


def cut_open(inner: dict) -> tuple[dict, dict, list]:
    """The inside as a workflow of its own, where each of the block's inputs goes, and where its picture comes from."""
    inner = copy.deepcopy(inner)
    nodes, links, goals, result = {node["id"]: node for node in inner["nodes"]}, [], {}, None
    for link in inner["links"]:
        start, end = (link["origin_id"], link["origin_slot"]), (link["target_id"], link["target_slot"])
        if start[0] == ENTRY:
            entry, socket = inner["inputs"][start[1]], nodes[end[0]]["inputs"][end[1]]
            assert link["id"] in entry["linkIds"] and socket["link"] == link["id"]
            assert entry["type"] == link["type"] == socket["type"]
            socket["link"] = None
            goals.setdefault(entry["name"], []).append((str(end[0]), socket["name"]))
        elif end[0] == EXIT:
            assert inner["outputs"][end[1]]["linkIds"] == [link["id"]] and result is None
            result = [str(start[0]), start[1]]
        else:
            links.append([link["id"], *start, *end, link["type"]])
    assert sum(map(len, goals.values())) == sum(len(entry["linkIds"]) for entry in inner["inputs"])
    return {"nodes": inner["nodes"], "links": links}, goals, result


def expanded(name: str, info: dict, inputs: dict) -> tuple[dict, list]:
    """What the canvas makes of a block with these inputs, in API form, and where its picture comes from."""
    block, inner = read(name)
    plain, goals, (last, slot) = cut_open(inner)
    prompt = {}
    for number, node in checks.exported(plain, info).items():
        linked = {key: [BLOCK + value[0], value[1]] for key, value in node["inputs"].items() if isinstance(value, list)}
        prompt[BLOCK + number] = {**node, "inputs": {**node["inputs"], **linked}}
    shown = [entry for _, entry in block["properties"]["proxyWidgets"]]
    for entry, value in {**dict(zip(shown, block["widgets_values"], strict=True)), **inputs}.items():
        for number, socket in goals[entry]:
            prompt[BLOCK + number]["inputs"][socket] = value
    return prompt, [BLOCK + last, slot]


def test_comfyui_lists_them(server):
    listed = server.get("/global_subgraphs")
    assert sorted(entry["name"] for entry in listed.values()) == NAMES == sorted((SWAP, LAYOUT, MASK))
    for number, entry in listed.items():
        assert entry["info"]["node_pack"] == "custom_nodes.attune"
        served = server.get(f"/global_subgraphs/{number}")["data"]
        assert served == (FOLDER / f"{entry['name']}.json").read_text(encoding="ascii")


@pytest.mark.hosts
@pytest.mark.parametrize("name", NAMES)
def test_the_inside_fits_the_nodes(name, every_server):
    info = every_server.object_info()
    block, inner = read(name)
    prompt, _ = expanded(name, info, {entry["name"]: "given" for entry in inner["inputs"] if entry["linkIds"]})
    for number, node in prompt.items():
        needed = set(info[node["class_type"]]["input"]["required"])
        assert needed <= set(node["inputs"]), f"{node['class_type']} {number} lacks {needed - set(node['inputs'])}"
    for node in inner["nodes"]:
        if node["type"] in checks.NOTES:
            continue
        # The canvas finds a block's widgets by the number of the socket, and puts sockets before widgets.
        order = sorted(checks.slots(info[node["type"]]), key=lambda slot: slot[1] in checks.WIDGETS)
        assert [socket["name"] for socket in node["inputs"]] == [name for name, *_ in order], node["type"]
    assert [entry["name"] for entry in block["inputs"]] == [entry["name"] for entry in inner["inputs"]]
    with_widget = [entry["name"] for entry in inner["inputs"] if entry["type"] in checks.WIDGETS]
    assert [["-1", name] for name in with_widget] == block["properties"]["proxyWidgets"]


@pytest.mark.parametrize("name", NAMES)
def test_it_edits_in_the_demo_world(name, server):
    typed = {
        SWAP: {"source_prompt": workflow.SOURCE, "target_prompt": workflow.TARGET, "self_end": 0.8},
        LAYOUT: {"target_prompt": workflow.TARGET},
        MASK: {"target_prompt": "a yellow heart on a gray background", "grow": 12},
    }[name]
    around = {}
    picture = {"caption": workflow.SOURCE, "seed": workflow.SEED, "size": workflow.SIDE}
    scene, model = workflow.add(around, "AttuneDemoScene", **picture), workflow.add(around, "AttuneDemoCheckpoint")[0]
    given = {"model": [model, 0], "clip": [model, 1], "vae": [model, 2], "image": scene, "guidance": 2.0}
    if name == MASK:
        place = workflow.add(around, "AttuneDemoEdit", **picture, edited_caption=HEART, grow=0)[0]
        given["mask"] = [place, 1]
    inside, result = expanded(name, server.object_info(), {**given, **typed})
    saved = workflow.add(around, "SaveImage", images=result, filename_prefix="blueprint")[0]
    prompt = {**around, **inside}
    image = workflow.saved(prompt, server.run(prompt))[prompt[saved]["_meta"]["title"]]
    edited, source = workflow.pixels(server, image).astype(float), workflow.scene()
    if name == MASK:
        assert checks.sees(edited, "yellow heart") and not checks.is_red(edited).any()
        assert checks.overlap(checks.is_blue(edited), checks.is_blue(source)) > 0.85
    else:
        checks.swapped(edited, source)
