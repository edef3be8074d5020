"""The nodes as people's workflows and scripts rely on them: ``dev.py schemas`` writes server/object_info.json anew and
says what changes.

It is the pack's part of the host's /object_info, a line for each input, without what may be reworded freely. A workflow
holds its widgets' values in order and its links by the outputs' places, so both are written down.
"""

import json

from .host import ROOT

SNAPSHOT = ROOT / "tests" / "server" / "object_info.json"
# What an input promises, by the host's words for it; control_after_generate puts a second value into workflows.
SETTINGS = ("default", "min", "max", "step", "round", "control_after_generate", "multiline", "options")
FLAGS = ("category", "output_node", "deprecated", "experimental")
FILES = {"AttuneLoadTrajectory: file"}  # whose choices are what lies in a folder


def described(info: dict) -> dict:
    """What is promised of the nodes in an /object_info, as "node: input" or "node: a word" -> value."""
    found = {}
    for name, node in sorted(info.items()):
        found[f"{name}: node"] = {flag: node[flag] for flag in FLAGS}
        order = [(group, key) for group in ("required", "optional") for key in node["input_order"].get(group, ())]
        found[f"{name}: inputs"] = [key for _, key in order]
        for group, key in order:
            kind, settings = node["input"][group][key]
            kept = [k for k in SETTINGS if k in settings and not (k == "options" and f"{name}: {key}" in FILES)]
            found[f"{name}: {key}"] = [group, kind, {k: settings[k] for k in kept}]
        found[f"{name}: outputs"] = [*zip(node["output"], node["output_name"], node["output_is_list"], strict=True)]
    return json.loads(json.dumps(found))


def of_pack(info: dict) -> dict:
    """The pack's own nodes in a server's /object_info."""
    return {name: node for name, node in info.items() if node["python_module"] == "custom_nodes.attune"}


def load() -> dict:
    return json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def changes(before: dict, after: dict) -> list[str]:
    """What is another, a sentence each."""
    said = [f"{key} is gone; it was {before[key]}" for key in before.keys() - after.keys()]
    said += [f"{key} is new: {after[key]}" for key in after.keys() - before.keys()]
    both = before.keys() & after.keys()
    said += [f"{key} was {before[key]} and is {after[key]}" for key in both if before[key] != after[key]]
    return sorted(said)


def main() -> None:
    from ..nodes import NODES

    now = described({node.GET_SCHEMA().node_id: node.GET_NODE_INFO_V1() for node in NODES})
    for line in changes(load(), now):
        print(line)
    lines = (f"{json.dumps(key)}: {json.dumps(value, sort_keys=True)}" for key, value in now.items())
    SNAPSHOT.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
