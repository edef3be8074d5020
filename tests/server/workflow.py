"""The shipped workflows in API form, and the pictures that running one saves."""

import io
import json

import numpy as np
from PIL import Image

from attune.tests import host

FOLDER = host.ROOT / "workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
DEMO = "Attune - Demo word swap"


def load(name: str) -> dict:
    return json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


def find(prompt: dict, key: str) -> str:
    """The id of the only node with this title or class."""
    (found,) = (i for i, node in prompt.items() if key in (node["class_type"], node["_meta"]["title"]))
    return found


def saved(prompt: dict, entry: dict) -> dict[str, dict]:
    """What each node that saves pictures tells about its only one, under the node's title."""
    assert entry["status"]["status_str"] == "success", entry["status"]
    outputs = {prompt[node]["_meta"]["title"]: result["images"] for node, result in entry["outputs"].items()}
    assert all(len(images) == 1 for images in outputs.values()), outputs
    return {title: images[0] for title, images in outputs.items()}


def pixels(server: host.Server, image: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(server.view(image))))
