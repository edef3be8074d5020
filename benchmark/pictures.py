"""The pictures of the help pages, drawn by the shipped workflows in the demo world: ``dev.py bench pictures``.

``--only AttuneSketch ...`` draws those of some pages. A file holds pictures of one workflow, or of several, or of
several runs of one with other values; only what the picture needs is run.
"""

import argparse
import io
import logging
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ..nodes import sheet
from ..tests import host
from ..tests.server import workflow

FOLDER = host.ROOT / "web" / "docs"
HEIGHT, QUALITY = 256, 85
log = logging.getLogger("attune.bench")


@dataclass(frozen=True)
class Part:
    """Pictures of one run of the workflow "Attune - <name>".

    ``shown`` says under which caption, whose first line is drawn larger, which picture stands: the title that the
    workflow saves it under, (node, input) for what is connected there, or (node, output, number of the picture), where
    a node is named by its title or class and is the first such. ``values`` are what this run has in the place of the
    workflow's own, {(title or class of nodes, input): value}; None takes a connection away. A ``sheet`` has its own
    lettering and goes below the others. ``behind`` is (class of a node, class of another, its inputs): the other is set
    between the first and all that read its MODEL.
    """

    name: str
    shown: dict
    values: dict = field(default_factory=dict)
    sheet: bool = False
    behind: tuple = ()


PICTURE = {"picture": ("ImageScale", "IMAGE", 0)}
LOW = {("SamplerCustom", "cfg"): 3.0}  # guidance that does not saturate the demo model's colours
SCENE, SAVE, LOAD = "Demo word swap", "Save and reuse a trajectory", "Edit a saved trajectory"
START, WEIGHTS = "Start an edit part of the way", "Re-weight a word"
SEEN, FUSION = "Seeing attention", "Redraw from a sketch"
SIX_WORDS = {("AttuneAttentionMaps", "words"): "red, circle, striped, blue, square, background"}


def titled(*titles):
    """Pictures under the titles that the workflow has for them."""
    return {title: title for title in titles}


PLAIN = titled("without attention control")


def generated(caption, rest, seed=0):
    """A picture that the demo model draws by itself."""
    values = {("Source prompt", "value"): f"{caption} {rest}", ("AttuneRecordTrajectory", "cfg"): 3.0}
    values["AttuneRecordTrajectory", "noise_seed"] = seed
    return Part("Record and edit a generated picture", {f"{caption}\n{rest}": "source"}, values)


def word_mask(word):
    where = {f'mask of "{word}"': ("AttuneAttentionMaps", "mask", 0)}
    return Part(SCENE, where, {("AttuneAttentionMaps", "mask_word"): word})


def mask_and_edit(name, mask, done):
    """What Attune Context Preserving does in a mask of Attune Mask Strategy."""
    return [Part(name, {**PICTURE, mask: ("AttuneMaskStrategy", mask.replace(" ", "_"), 0), **titled(done), **PLAIN})]


PAGES = {
    "AttuneAttentionMaps": [
        Part(SCENE, {"picture": "source"}),
        word_mask("circle"),
        word_mask("square"),
        Part(SCENE, {"where each word looks": "attention maps"}, SIX_WORDS, sheet=True),
    ],
    "AttuneBackgroundMask": [Part("Dynamic prompt learning", {"": "parts of the picture"}, sheet=True)],
    "AttuneBlendMask": [
        Part(
            "Local blend",
            {**PICTURE, "edit with local blend": "with local blend", "its mask": ("AttuneBlendMask", "mask", 0)},
        ),
        Part(
            "Local blend",
            {"mask at threshold 0.7": ("AttuneBlendMask", "mask", 0)},
            {("AttuneLocalBlend", "threshold"): 0.7},
        ),
    ],
    "AttuneCompare": [Part(SEEN, {"": "compare"}, sheet=True)],
    "AttuneContactSheet": [Part(SCENE, {"": "contact sheet"}, SIX_WORDS, sheet=True)],
    "AttuneContextPreserving": mask_and_edit("Replace an object", "target mask", "object replaced"),
    "AttuneContextPreserving-remove": mask_and_edit("Remove an object", "source mask", "object removed"),
    "AttuneDDIMInversion": [
        Part(
            SCENE,
            {
                "picture": "source", "its noise": ("AttuneDDIMInversion", "noise", 0),
                "drawn again": "reconstruction", "edited": "word swap",
            },
        )
    ],
    "AttuneDemoCheckpoint": [
        generated("a yellow star", "on a blue background", 2),
        generated("a red circle and a green square", "on a white background"),
        generated("a striped purple heart", "on a gray background"),
        generated("a dotted blue triangle and a red ring", "on a yellow background"),
    ],
    "AttuneDemoEdit": [
        Part(
            FUSION,
            {
                "scene": ("ImageScale", "IMAGE", 0), "perfect edit": ("AttuneDemoEdit", "image", 0),
                "mask": ("AttuneDemoEdit", "mask", 0), "sketch": ("AttuneDemoEdit", "sketch", 0),
            },
        )
    ],
    "AttuneDemoScene": [
        Part(
            SCENE,
            {
                "scene": "source", "mask of the circle": ("AttuneDemoScene", "masks", 0),
                "mask of the square": ("AttuneDemoScene", "masks", 1),
            },
        ),
        Part(SCENE, {"another seed": "source"}, {("AttuneDemoScene", "seed"): 8}),
    ],
    "AttuneDirectInversion": [
        Part("Direct inversion", {**PICTURE, "pinned at every step": "pinned source"}),
        Part("Direct inversion", {"at every fifth step": "pinned source"}, {("AttuneDirectInversion", "every"): 5}),
        Part("Direct inversion", {"never": "without pins"}),
    ],
    "AttuneDynamicPrompt": [
        Part(
            "Dynamic prompt learning",
            {**PICTURE, **titled("drawn again", "with learned words", "with the words as they were")},
        )
    ],
    "AttuneDynamicPrompt-maps": [
        Part("Learned and original words", {"": "learned and original words"}, sheet=True)
    ],
    "AttuneEmbeddingControl": [
        Part(
            "Embedding control",
            {
                **PICTURE, "drawn again": "reconstruction", **titled("embedding control"),
                "the whole new prompt": "without embedding control",
            },
        )
    ],
    "AttuneFeatureCache": [
        Part(
            "Several edits of one picture",
            {**PICTURE, **titled("another colour", "another background", "a third one")},
        )
    ],
    "AttuneFreePromptEditing": [
        Part("Free prompt editing", {**PICTURE, **titled("pinned source", "free prompt editing"), **PLAIN})
    ],
    "AttuneIntermediate": [
        Part(
            FUSION,
            {**PICTURE, **titled("sketch"), "place": ("AttuneIntermediate", "mask"), **titled("intermediate")},
        )
    ],
    "AttuneInversionReport": [Part("Direct inversion", {"": "inversion report"}, sheet=True)],
    "AttuneLoadTrajectory": [
        Part(SAVE, PICTURE),
        Part(LOAD, {"drawn again from the file": "reconstruction", "edited from the file": "word swap"}),
    ],
    "AttuneLocalBlend": [
        Part(
            "Local blend",
            {
                **PICTURE, **titled("word swap", "with local blend"),
                "where it may show": ("AttuneBlendMask", "mask", 0),
            },
        )
    ],
    "AttuneMaskRefinement": [
        Part(
            "Refine a mask while sampling",
            {
                "target mask": ("AttuneMaskStrategy", "target_mask", 0), **titled("mask as given"),
                "refined mask": ("AttuneRefinedMask", "mask", 0), **titled("mask refined"),
            },
        )
    ],
    "AttuneMaskStrategy": mask_and_edit("Change the background", "target mask", "background changed"),
    "AttuneMaskedFusion": [Part(FUSION, {**PICTURE, **titled("sketch", "intermediate", "redrawn")})],
    "AttuneMutualSelfAttention": [
        Part("Mutual self-attention", {**PICTURE, **titled("mutual self-attention", "with masks"), **PLAIN})
    ],
    "AttuneNegativePromptInversion": [
        Part(
            "Negative-prompt inversion",
            {**PICTURE, "drawn again": "reconstruction", **titled("with an empty negative"), "edited": "word swap"},
        )
    ],
    "AttuneNextTurn": [
        Part("Edit in three turns", {**PICTURE, **titled("after turn 1", "after turn 2", "after turn 3")})
    ],
    "AttuneNullTextInversion": [
        Part(
            "Null-text inversion",
            {
                **PICTURE, "drawn again": "reconstruction", "with an empty negative": "without null-text",
                "edited": "word swap",
            },
        )
    ],
    "AttunePromptRefine": [
        Part(
            "Refine a prompt",
            {**PICTURE, '"striped" added': "refined", **PLAIN},
            {
                ("SamplerCustom", "cfg"): 5.0,
                ("AttunePromptRefine", "target_prompt"): "a red circle and a striped blue square on a gray background",
            },
        )
    ],
    "AttunePromptReweight": [
        Part(WEIGHTS, PICTURE),
        *(
            Part(
                WEIGHTS,
                {f"red: {weight}": "a word of the caption raised"},
                {**LOW, ("AttunePromptReweight", "weights"): f"red: {weight}"},
            )
            for weight in (-1, 0, 2)
        ),
    ],
    "AttunePromptSwap": [Part(SCENE, {"picture": "source", "red to yellow": "word swap", **PLAIN})],
    "AttuneProximalGuidance": [
        Part("Negative-prompt inversion", {**PICTURE, "without": "word swap"}),
        *(
            Part(
                "Negative-prompt inversion",
                {f"quantile {quantile}": "word swap"},
                behind=("AttunePromptSwap", "AttuneProximalGuidance", {"quantile": quantile, "rule": "soft (l1)"}),
            )
            for quantile in (0.5, 0.8)
        ),
    ],
    "AttuneRecordTrajectory": [
        Part(
            "Record and edit a generated picture",
            {"drawn and recorded": "source", "red to yellow": "word swap", **PLAIN},
        )
    ],
    "AttuneRefinedMask": [Part("Refine a mask while sampling", {"": ("AttuneRefinedMask", "strip", 0)}, sheet=True)],
    "AttuneRegionPrompts": [
        Part(
            "Prompts by region",
            {
                "region 1": ("The box on the left", "MASK", 0), "region 2": ("The box on the right", "MASK", 0),
                **titled("prompts by region", "one prompt"),
            },
        )
    ],
    "AttuneSaveLearnedWord": [
        Part(
            "Learned and original words",
            {
                **PICTURE, "with the saved word": "new picture with the saved word",
                "with the word as it was": "new picture with the word as it was",
            },
        )
    ],
    "AttuneSaveTrajectory": [
        Part(SAVE, PICTURE),
        *(
            Part(
                LOAD,
                {f"latent {step} of its file": ("AttuneTrajectoryLatent", "latent", 0)},
                {("AttuneTrajectoryLatent", "step"): step},
            )
            for step in (0, 10, 15)
        ),
    ],
    "AttuneSelfAttentionView": [
        Part(
            SEEN, {**PICTURE, **{f"cluster {n + 1}": ("AttuneSelfAttentionView", "masks", n) for n in (0, 2, 4)}}
        ),
        Part(SEEN, {"main components": "self-attention"}, sheet=True),
    ],
    "AttuneSketch": [
        Part(FUSION, PICTURE),
        Part(FUSION, {"its outlines": "sketch"}, {("AttuneSketch", "erase"): None, ("AttuneSketch", "draw"): None}),
        Part(FUSION, {"place wiped out": "sketch"}, {("AttuneSketch", "draw"): None}),
        Part(FUSION, {"new outline drawn": "sketch"}),
    ],
    "AttuneSourceFusion": [
        Part(
            "Redraw without a sketch", {**PICTURE, **titled("redrawn in the mask", "redrawn everywhere"), **PLAIN}
        )
    ],
    "AttuneTrajectoryConditioning": [
        Part(SAVE, PICTURE),
        Part(LOAD, {"with its null embeddings": "reconstruction"}),
        Part("Null-text inversion", {"with an empty negative": "without null-text"}),
    ],
    "AttuneTrajectoryLatent": [
        Part(
            START,
            {**PICTURE, "at strength 0.7": ("AttuneTrajectoryLatent", "latent", 0), "drawn from there": "edit"},
        ),
        Part(START, {"drawn from strength 1": "edit"}, {("AttuneTrajectoryLatent", "strength"): 1.0}),
    ],
}  # fmt: skip


def matching(prompt: dict, key: str) -> list[str]:
    """The ids of the nodes with this title or class."""
    found = [i for i, node in prompt.items() if key in (node["class_type"], node["_meta"]["title"])]
    if not found:
        raise ValueError(f"The workflow has no node {key!r}; name one of its titles or classes in PAGES.")
    return found


def socket(prompt: dict, place, info: dict) -> tuple[list, int]:
    """A place of ``Part.shown`` as [node, output] and the number of its picture."""
    if isinstance(place, str):
        return prompt[workflow.find(prompt, place)]["inputs"]["images"], 0
    key, name, *number = place
    node = matching(prompt, key)[0]
    if not number:
        return prompt[node]["inputs"][name], 0
    return [node, info[prompt[node]["class_type"]]["output_name"].index(name)], number[0]


def preview(prompt: dict, link: list, info: dict) -> str:
    """Adds what shows an output; returns its title."""
    kind = info[prompt[link[0]]["class_type"]]["output"][link[1]]
    if kind == "MASK":
        link = workflow.add(prompt, "MaskToImage", mask=link)
    elif kind == "LATENT":
        vae = [workflow.find(prompt, "AttuneDemoCheckpoint"), 2]
        link = workflow.add(prompt, "VAEDecode", samples=link, vae=vae)
    node = workflow.add(prompt, "PreviewImage", images=link)[0]
    return prompt[node]["_meta"]["title"]


def draw(server: host.Server, info: dict, part: Part) -> list[Image.Image]:
    prompt = workflow.load(f"Attune - {part.name}")
    if part.name != SCENE:
        prompt = workflow.in_the_demo_world(prompt)
    for (key, name), value in part.values.items():
        for node in matching(prompt, key):
            if value is None:
                del prompt[node]["inputs"][name]
            else:
                prompt[node]["inputs"][name] = value
    if part.behind:
        key, kind, inputs = part.behind
        edited = [matching(prompt, key)[0], 0]
        readers = [(node, name) for node in prompt.values() for name, link in node["inputs"].items() if link == edited]
        new = workflow.add(prompt, kind, model=edited, **inputs)
        for node, name in readers:
            node["inputs"][name] = new
    links, numbers = zip(*(socket(prompt, place, info) for place in part.shown.values()), strict=True)
    titles = [preview(prompt, link, info) for link in links]
    # What a file is read from later has to be written.
    written = {"AttuneSaveTrajectory"} & {node["class_type"] for node in prompt.values()}
    prompt = workflow.cut(prompt, *titles, *written)
    outputs = server.run(prompt)["outputs"]
    pictures = []
    for title, number in zip(titles, numbers, strict=True):
        image = outputs[workflow.find(prompt, title)]["images"][number]
        pictures.append(Image.open(io.BytesIO(server.view(image))).convert("RGB"))
    return pictures


def lay_out(parts: list[Part], pictures: list[list[Image.Image]]) -> Image.Image:
    """The row of a page, and its sheet below; or the sheet alone."""
    drawn = sorted(zip(parts, pictures, strict=True), key=lambda pair: pair[0].sheet)
    row = [picture for part, some in drawn if not part.sheet for picture in some]
    below = [picture for part, some in drawn if part.sheet for picture in some]
    if not row:
        return below[0]
    captions = [caption for part, _ in drawn for caption in part.shown]
    wide = sheet.from_pil(below[0]) if below else None
    return sheet.to_pil(sheet.contact_sheet([sheet.from_pil(p)[0] for p in row], captions, HEIGHT, wide)[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=PAGES, metavar="ID", choices=PAGES, help="files to draw")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the pictures")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    with host.Server(host.Host.current(), cpu=True) as server:
        info = server.object_info()
        for page in args.only:
            file = args.out / f"{page}.jpg"
            lay_out(PAGES[page], [draw(server, info, part) for part in PAGES[page]]).save(file, quality=QUALITY)
            log.info("%s, %d KB", file.name, file.stat().st_size >> 10)


if __name__ == "__main__":
    main()
