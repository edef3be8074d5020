"""Every shipped workflow is the same in both of its forms, and runs on the real server as it is."""

import itertools
import json

import pytest

from attune.tests import host
from attune.tests.server import workflow

NOTES = {"Note", "MarkdownNote"}  # of the canvas; the server does not know them
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
SIDES = {workflow.DEMO: 128, "Attune - Word swap on a real image": 512}
SHEETS = {"contact sheet", "attention maps"}


def slots(definition: dict):
    """(name, type, settings, choices) of every input of a node, in the order that the canvas uses."""
    for group in ("required", "optional"):
        for name in definition["input_order"].get(group, []):
            kind, *rest = definition["input"][group][name]
            settings = rest[0] if rest else {}
            choices = kind if isinstance(kind, list) else settings.get("options")
            yield name, "COMBO" if isinstance(kind, list) else kind, settings, choices


def exported(ui: dict, info: dict) -> dict:
    """What the canvas exports as API form. Written for plain workflows: no subgraph, no node switched off."""
    links = {link[0]: link for link in ui["links"]}
    nodes = {node["id"]: node for node in ui["nodes"] if node["type"] not in NOTES}
    prompt, used = {}, []
    for number, node in nodes.items():
        definition, values, inputs, kinds = info[node["type"]], iter(node["widgets_values"]), {}, {}
        for name, kind, settings, choices in slots(definition):
            kinds[name] = kind
            if kind in WIDGETS:
                inputs[name] = next(values)
                assert choices is None or inputs[name] in choices, (node["type"], name, inputs[name])
                if settings.get("control_after_generate"):
                    assert next(values) == "fixed", f"{node['type']} would change its seed after every run"
                if settings.get("image_upload"):
                    assert next(values) == "image"
        assert not list(values), f"{node['type']} {number} has more values than widgets"
        for slot, socket in enumerate(node["inputs"]):
            if socket["link"] is not None:
                used.append(socket["link"])
                _, source, output, *target, kind = links[socket["link"]]
                assert target == [number, slot]
                assert kind == kinds[socket["name"]] == info[nodes[source]["type"]]["output"][output]
                assert socket["link"] in nodes[source]["outputs"][output]["links"]
                inputs[socket["name"]] = [str(source), output]
        assert [socket["name"] for socket in node["outputs"]] == definition["output_name"]
        assert node["mode"] == 0
        title = node.get("title") or definition["display_name"] or node["type"]
        prompt[str(number)] = {"inputs": inputs, "class_type": node["type"], "_meta": {"title": title}}
    assert sorted(used) == sorted(links)
    return prompt


def test_every_workflow_is_there_in_both_forms():
    assert workflow.NAMES
    assert {path.stem for path in (workflow.FOLDER / "api").glob("*.json")} == set(workflow.NAMES)
    assert all(name.startswith("Attune - ") for name in workflow.NAMES)


@pytest.mark.hosts
@pytest.mark.parametrize("name", workflow.NAMES)
def test_both_forms_say_the_same(name, every_server):
    info = every_server.object_info()
    ui, api = json.loads((workflow.FOLDER / f"{name}.json").read_text(encoding="utf-8")), workflow.load(name)
    unknown = {node["type"] for node in ui["nodes"]} - NOTES - set(info)
    assert not unknown, f"ComfyUI with this pack has no {', '.join(unknown)}"
    assert exported(ui, info) == api


@pytest.mark.parametrize("name", workflow.NAMES)
def test_a_missing_pack_can_be_looked_up(name, server):
    info = server.object_info()
    nodes = json.loads((workflow.FOLDER / f"{name}.json").read_text(encoding="utf-8"))["nodes"]
    ours = [n for n in nodes if n["type"] in info and info[n["type"]]["python_module"] == "custom_nodes.attune"]
    project = (host.ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    assert ours
    assert all(f'name = "{node["properties"]["cnr_id"]}"' in project for node in ours)


def run_and_look(name: str, server: host.Server):
    prompt = workflow.load(name)
    images = workflow.saved(prompt, server.run(prompt))
    pictures = {title: workflow.pixels(server, image) for title, image in images.items()}
    assert {"reconstruction", "word swap"} <= set(pictures)
    for title, picture in pictures.items():
        assert picture.std() > 2, f"{title} is one flat colour"
        assert title in SHEETS or picture.shape == (SIDES[name], SIDES[name], 3), title
    for one, other in itertools.combinations(set(pictures) - SHEETS, 2):
        assert abs(pictures[one].astype(int) - pictures[other]).mean() > 1, f"{one} and {other} are the same picture"


@pytest.mark.hosts
def test_the_demo_runs_as_it_is_shipped(every_server):
    run_and_look(workflow.DEMO, every_server)


@pytest.mark.parametrize("name", sorted(set(workflow.NAMES) - {workflow.DEMO}))
def test_it_runs_as_it_is_shipped(name, server):
    run_and_look(name, server)
