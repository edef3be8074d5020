"""The texts of the nodes in the languages of ComfyUI's interface. ``dev.py locales`` writes the English ones anew from
the nodes and lists what the other languages lack.

``locales/<language>/nodeDefs.json`` holds, for each node, its name, its description, the name and the tooltip of each
input by id and of each output by its place; ``main.json`` the menu's words and the names of the pack's own types.
"""

import json
import re

from .host import ROOT

FOLDER = ROOT / "locales"
LANGUAGES = ("en", "zh", "ja", "fr", "de", "es", "ko")
# The words of the menu that ComfyUI's own interface does not translate already.
MAIN = {
    "nodeCategories": {
        "Attune": "Attune", "edit": "edit", "invert": "invert", "tokens": "tokens", "view": "view", "demo": "demo",
    },
    "dataTypes": {
        "ATTUNE_TRAJECTORY": "trajectory", "ATTUNE_MAPS": "attention maps", "ATTUNE_TURNS": "turns",
        "ATTUNE_REFINEMENT": "mask refinement",
    },
}  # fmt: skip


def key(name: str) -> str:
    """As the host's frontend looks a name up: a dot would lead into another object."""
    return name.replace(".", "_")


def escaped(text: str) -> str:
    """As the frontend's translations want it: bare braces would be a place to fill in, and come out empty."""
    return re.sub(r"[{}@|]", lambda found: "{'" + found[0] + "'}", text)


def shown(text: str) -> str:
    """What a user reads of an escaped text."""
    return re.sub(r"\{'([{}@|])'\}", r"\1", text)


def english(nodes) -> dict:
    """The contents of nodeDefs.json for a list of V3 nodes, as they say it themselves."""
    texts = {}
    for schema in (node.GET_SCHEMA() for node in nodes):
        texts[schema.node_id] = {
            "display_name": schema.display_name,
            "description": escaped(schema.description),
            "inputs": {key(i.id): texts_of(i) for i in schema.inputs},
            "outputs": {str(place): texts_of(o) for place, o in enumerate(schema.outputs)},
        }
    return texts


def texts_of(socket) -> dict:
    return {"name": socket.display_name or socket.id, "tooltip": escaped(socket.tooltip)}


def load(language: str, name: str) -> dict:
    path = FOLDER / language / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write(language: str, name: str, texts: dict) -> None:
    path = FOLDER / language / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(texts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def paths(texts: dict, prefix: tuple = ()) -> dict:
    """Path -> text for every text in nested dicts."""
    found = {}
    for name, value in texts.items():
        found |= paths(value, (*prefix, name)) if isinstance(value, dict) else {(*prefix, name): value}
    return found


def main() -> int:
    from ..nodes import NODES

    files = {"nodeDefs": english(NODES), "main": MAIN}
    lacking = 0
    for name, texts in files.items():
        write("en", name, texts)
        for language in LANGUAGES[1:]:
            ours, theirs = paths(texts), paths(load(language, name))
            for path in sorted(ours.keys() ^ theirs.keys()):
                lacking += 1
                print(language, name, ".".join(path), "is missing" if path in ours else "is of nothing any more")
    return 1 if lacking else 0


if __name__ == "__main__":
    raise SystemExit(main())
