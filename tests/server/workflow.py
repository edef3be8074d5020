"""The shipped workflows in API form, and the pictures that running one saves."""

import io
import json

import numpy as np
from PIL import Image

from attune.demo import scenes
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


def cut(prompt: dict, *keys: str) -> dict:
    """The nodes with these titles or classes, and what they need."""
    keep, todo = set(), [find(prompt, key) for key in keys]
    while todo:
        node = todo.pop()
        keep.add(node)
        todo += [value[0] for value in prompt[node]["inputs"].values() if isinstance(value, list)]
    return {node: entry for node, entry in prompt.items() if node in keep}


def saved(prompt: dict, entry: dict) -> dict[str, dict]:
    """What each node that saves pictures tells about its only one, under the node's title."""
    assert entry["status"]["status_str"] == "success", entry["status"]
    shown = {prompt[node]["_meta"]["title"]: result for node, result in entry["outputs"].items()}
    outputs = {title: result["images"] for title, result in shown.items() if "images" in result}
    assert all(len(images) == 1 for images in outputs.values()), outputs
    return {title: images[0] for title, images in outputs.items()}


def pixels(server: host.Server, image: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(server.view(image))))


# What has places, sides or margins in pixels.
SIZED = {"ImageScale", "EmptyLatentImage", "SolidMask", "MaskComposite", "AttuneMaskStrategy", "AttuneAttentionMaps"}
UPDATES = ("inner_steps", "null_steps")


def resized(prompt: dict, side: int, steps: int, updates: int) -> dict:
    """The same workflow at another side of its picture, with at most so many steps, and updates to embeddings."""
    sized = [node["inputs"] for node in prompt.values() if node["class_type"] in SIZED]
    shipped = max((inputs["width"] for inputs in sized if "width" in inputs), default=side)
    for inputs in sized:
        for key in {"width", "height", "x", "y", "grow"} & set(inputs):
            inputs[key] = inputs[key] * side // shipped
    for inputs in (node["inputs"] for node in prompt.values()):
        for key, most in {"steps": steps, **dict.fromkeys(UPDATES, updates)}.items():
            if isinstance(inputs.get(key), int):
                inputs[key] = min(inputs[key], most)
    return prompt


def forget(server):
    """Makes ComfyUI drop its models and cached results. It does so between two prompts, so one must follow."""
    server.post("/free", {"unload_models": True, "free_memory": True})
    server.run({
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    })  # fmt: skip


def was_cached(entry):
    return {node for kind, data in entry["status"]["messages"] if kind == "execution_cached" for node in data["nodes"]}


# -- the demo world in Stable Diffusion's place -----------------------------------------------------------------------

SOURCE = "a red circle and a blue square on a gray background"
TARGET = "a yellow circle and a blue square on a gray background"
ALIKE = "a red circle and a red square on a gray background"  # either word looks at both things
SEED, SIDE = 3, 128
IN_THE_DEMO = {  # what the workflows say, and what is said in its place
    "a drawing of a girl in a pink dress on a green hill": SOURCE,
    "a drawing of a girl in a red dress on a green hill": TARGET,
    "a drawing of a girl in a pink dress on a snowy hill": TARGET,
    "a drawing of a girl in a striped pink dress on a green hill": (
        "a striped red circle and a blue square on a gray background"
    ),
    "a drawing of a girl in a pink dress on a snowy green hill": "a red circle and a blue square on a green background",
    "a drawing of a girl in a pink dress on a sandy beach": "a red circle and a blue square on a green background",
    "a drawing of a girl in a pink dress on a white hill": "a red circle and a blue square on a white background",
    "a photograph of a red car in front of a house": SOURCE,
    "a photograph of a blue car in front of a house": TARGET,
    "a drawing of a jumping girl in a pink dress on a green hill": (
        "a purple star and a blue square on a gray background"
    ),
    "a drawing of a brown dog on a green hill": "a yellow star on a gray background",
    "a drawing of a boy in a blue coat on a green hill": "a yellow heart and a blue square on a gray background",
    "a drawing of a boy in a blue coat": "a yellow heart on a gray background",
    "a drawing of a sandy beach": "a blue square on a green background",
    "a drawing of a green hill": "a blue square on a gray background",
    "a photograph of a wooden table": "a gray background",
    "a photograph of a red apple": "a red circle",
    "a photograph of a green pear": "a yellow star",
    "a photograph of a red apple and a green pear on a wooden table": (
        "a red circle and a yellow star on a gray background"
    ),
    "a girl in a pink dress on a green hill": ALIKE,
    "a girl in a {pink dress} on a {green hill}": "a {red circle} and a {red square} on a gray background",
    "a girl in a red dress on a snowy hill": "a yellow circle and a green square on a gray background",
    "pink dress, green hill": "red circle, red square",
    "pink dress": "red circle",
    "pink dress on a wooden table": "red circle on a white background",
    "on a wooden table": "on a white background",
    "a drawing of a girl in a wide pink dress on a green hill": "a red star and a blue square on a gray background",
    "a drawing of a girl in a wide pink dress beside a tree on a green hill": (
        "a red star and a blue heart on a gray background"
    ),
    "a red dress on a green hill": "a yellow circle on a gray background",
    "a yellow dress on a green hill": "a yellow star on a gray background",
    "dress": "circle",
    "girl": "circle",
    "girl, boy": "circle, heart",
    "jumping girl": "star",
    "dog": "star",
    "girl, dress, hill": "circle, square, background",
    "girl, pink dress": "red circle",
    "pink: 2": "red: 2",
    "snowy: 2": "green: 1.5",
    "snowy: 0": "green: 0",
    "": "",
}
STAR, HEART = "a red star and a blue square on a gray background", "a red circle and a blue heart on a gray background"
PAINTED = {  # what the user paints into Load Image, by its title: the place of this edit, or its lines there
    "Picture, the place painted": (STAR, False),
    "New outline, painted": (STAR, True),
    "Second place, painted": (HEART, False),
    "Second outline, painted": (HEART, True),
}
GROW = 6  # how far such a place reaches around the things, in pixels
LEARNING = "AttuneDynamicPrompt"
FUSION = {"AttuneMaskedFusion", "AttuneSourceFusion"}
ADAPTER = "attune_demo_sketch_adapter.safetensors"
AT_GUIDANCE_2 = {"AttuneFreePromptEditing", "AttuneMutualSelfAttention", "AttuneContextPreserving", LEARNING}
WRITTEN = {
    "value", "text", "source_prompt", "target_prompt", "prompt", "words", "mask_word", "inside", "outside", "preserve",
    "weights", "word_windows", "source_words", "target_words", "prompt_1", "prompt_2", "prompt_3", "prompt_4", "word",
    "string_b",
}  # fmt: skip


def in_the_demo_world(prompt: dict) -> dict:
    """The same workflow on the demo model and a picture with a known answer."""
    edits, caption = {node["class_type"] for node in prompt.values()}, caption_of(prompt)
    paint(prompt)
    for node in prompt.values():
        kind, inputs = node["class_type"], node["inputs"]
        if kind == "CheckpointLoaderSimple":
            node.update(class_type="AttuneDemoCheckpoint", inputs={})
        elif kind == "LoadImage":
            node.update(class_type="AttuneDemoScene", inputs={"caption": caption, "seed": SEED, "size": SIDE})
        elif kind in ("ImageScale", "EmptyLatentImage"):
            inputs.update(width=SIDE, height=SIDE)
        elif kind == "AttunePromptSwap" and inputs["self_end"]:
            inputs["self_end"] = 0.8
        elif kind == "SamplerCustom" and edits & AT_GUIDANCE_2:
            inputs["cfg"] = 2.0  # what suits the demo model's edits
        elif kind == "AttuneDDIMInversion" and {LEARNING, *FUSION} & edits:
            inputs["steps"] = 8
        elif kind == "ControlNetLoader":
            inputs["control_net_name"] = ADAPTER
        elif FUSION & edits and {"cfg", "guidance"} & set(inputs):
            inputs.update({name: 3.0 for name in ("cfg", "guidance") if name in inputs})
        elif kind == "AttuneNullTextInversion":  # comes out alike in half the time
            inputs.update(inner_steps=5, learning_rate=0.02)
        elif kind == LEARNING:  # few updates, and large ones
            inputs.update(guidance=2.0, inner_steps=3, learning_rate=0.01, background_weight=4.0, null_steps=1)
        elif kind == "AttuneMaskStrategy":
            inputs["grow"] = inputs["grow"] * SIDE // 512
        elif kind == "AttuneLoadTrajectory":
            inputs["file"] = "demo_" + inputs["file"]
        for name in WRITTEN & set(inputs):
            if isinstance(inputs[name], str):
                inputs[name] = IN_THE_DEMO[inputs[name]]
        if "filename_prefix" in inputs:
            inputs["filename_prefix"] = "demo_" + inputs["filename_prefix"]
    return prompt


def paint(prompt: dict):
    """Puts the true places and lines where the workflow reads what a user painted."""
    sockets = {}
    for node, entry in list(prompt.items()):
        if entry["class_type"] != "LoadImage" or entry["_meta"]["title"] not in PAINTED:
            continue
        text, lines = PAINTED[entry["_meta"]["title"]]
        edit = {"caption": SOURCE, "seed": SEED, "size": SIDE, "edited_caption": text, "grow": GROW}
        true = add(prompt, "AttuneDemoEdit", **edit)[0]
        place = sockets[node] = [true, 1]
        if lines:
            drawn = add(prompt, "ImageToMask", image=[true, 2], channel="red")
            inside = {"x": 0, "y": 0, "operation": "multiply"}
            sockets[node] = add(prompt, "MaskComposite", destination=drawn, source=place, **inside)
    for entry in prompt.values():
        for name, value in entry["inputs"].items():
            if isinstance(value, list) and value[0] in sockets and value[1] == 1:
                entry["inputs"][name] = sockets[value[0]]


def add(prompt: dict, kind: str, **inputs) -> list:
    """A socket of a node more."""
    number = str(1 + max(map(int, prompt), default=0))
    prompt[number] = {"class_type": kind, "inputs": inputs, "_meta": {"title": f"{kind} {number}"}}
    return [number, 0]


def caption_of(prompt: dict) -> str:
    """Of the picture that a workflow works on there."""
    return ALIKE if any(node["class_type"] == LEARNING for node in prompt.values()) else SOURCE


def scene(caption: str = SOURCE) -> np.ndarray:
    """The picture that such a workflow works on, as floats in 0..255."""
    picture = scenes.render(scenes.scene_from_caption(caption, np.random.default_rng(SEED)), SIDE)[0]
    return 255.0 * picture
