"""The editing methods of benchmark/methods, and the API prompts that they are for a sample.

A method is a workflow with values of its own, one JSON file each:

    row         its place in the tables; methods that begin alike stand together, since ComfyUI then computes that once
    name        as people read it; ``paper`` says where it is from, ``note`` what to know about its results
    workflow    a file of workflows/api, run as it is shipped, or NAME.workflow.json beside the method
    result      the title of the node whose picture is the edit; only what it needs is run
    inputs      "title or class of nodes/input" -> a value; the input "class_type" is the kind of node itself
    demo        the same, for the demo model alone
    kinds       the only kinds of edits that it is for; ``except`` names those that it is not for

A value may be {"by kind": {kind: value}, "otherwise": value}; null, which leaves an optional input out; or stand for
something of the sample, which not every sample has; a method is not for those that have it not:

    $source $target             the captions, with brackets escaped: ComfyUI would read them as weights
    $thing                      the object's name, where the target's caption holds it
    $words $outside             the words whose places may change, and those of what stays, separated by commas
    $braced                     the source's caption with its things in braces
    $exchange                   AttunePromptSwap where words that both captions hold stand at equal places, by CLIP's
                                words, else AttunePromptRefine
    $raised                     the words that are new, each with the weight 2
    $picture $truth             the picture, and the true result
    $mask $kept                 where the picture changes, and where it stays; $mask+6 is grown by 6/128 of the side
    $sketch                     the outlines of the true result, where a data set has that
    $seed $steps $guidance $size    of the run; a sample's seed is its own
    $source_seed                the noise that a sample's picture is generated from, where that is not given

A picture that is given to a socket comes from a node that loads it.
"""

import functools
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFilter, ImageOps

from ..attention_patches.alignment import shifted_words
from ..attention_patches.words import CHUNK, group_words
from ..demo import scenes
from ..tests import host
from .demo_edits import scene_of

DEMO, ADAPTER = "AttuneDemoCheckpoint", "attune_demo_sketch_adapter.safetensors"
FOLDER = Path(__file__).parent / "methods"
WORKFLOWS = Path(__file__).parents[1] / "workflows" / "api"
SMALL = "a", "an", "the", "and"
KEYS = "row", "name", "paper", "note", "workflow", "result", "inputs", "demo", "kinds", "except"


class NotApplicable(ValueError):
    """What a sample lacks for a method."""


@dataclass(frozen=True)
class Method:
    """See the module. ``key`` is the file's name; ``graph`` the workflow's nodes by number."""

    key: str
    name: str
    result: str
    graph: dict
    row: float = 1000
    paper: str = ""
    note: str = ""
    inputs: dict = field(default_factory=dict)
    demo: dict = field(default_factory=dict)
    kinds: tuple = ()
    excepted: tuple = ()


def read_method(name: str) -> Method:
    """A method of benchmark/methods by its name, or of another folder by its file; raises ValueError."""
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"There is no method {name!r}; there are {', '.join(every_method())}, and files of your own.")
    told = json.loads(path.read_text(encoding="utf-8"))
    if strange := set(told) - set(KEYS):
        raise ValueError(f"{path} has {', '.join(sorted(strange))}, which a method has not; it has {', '.join(KEYS)}.")
    if lacking := {"name", "workflow", "result"} - set(told):
        raise ValueError(f"{path} lacks {', '.join(sorted(lacking))}, which every method needs.")
    file = told.pop("workflow")
    beside, shipped = path.parent / file, WORKFLOWS / file
    if not beside.is_file() and not shipped.is_file():
        raise ValueError(f"{path} names the workflow {file}, which is neither beside it nor in workflows/api.")
    graph = json.loads((beside if beside.is_file() else shipped).read_text(encoding="utf-8"))
    told["kinds"], told["excepted"] = tuple(told.get("kinds", ())), tuple(told.pop("except", ()))
    return Method(path.stem, graph=graph, **told)


def every_method() -> list[str]:
    """The names of the methods in benchmark/methods."""
    return sorted(path.stem for path in FOLDER.glob("*.json") if not path.stem.endswith(".workflow"))


def tuned(method: Method) -> str:
    """In words, what a method is given for the demo model in place of its workflow's settings; "" for nothing."""
    parts = []
    for place, value in method.demo.items():
        name = place.rpartition("/")[2]
        if isinstance(value, dict):
            kinds = {}
            for kind, one in value["by kind"].items():
                kinds.setdefault(one, []).append(kind)
            told = [f"{one} for {', '.join(names)}" for one, names in kinds.items()]
            value = ", ".join([*told, f"else {value['otherwise']}"])
        parts.append(f"{name} {value}")
    return f"Set for the demo model: {'; '.join(parts)}." if parts else ""


@dataclass(frozen=True)
class Setup:
    """What is the same for every picture of a run. Without a ``checkpoint`` it is the demo model; ``changes`` are
    further inputs by the method's name, "*" for all methods."""

    checkpoint: str = ""
    size: int = 128
    steps: int = 20
    guidance: float = 3.0
    seed: int = 0
    changes: dict = field(default_factory=dict)


# ---- pictures ----------------------------------------------------------------------------------------------------


def square(path: Path, size: int, folder: Path) -> Path:
    """A picture as the models take it: the middle square, size x size; in ``folder``, unless it is that already."""
    with Image.open(path) as picture:
        if picture.size == (size, size) and folder in path.parents:
            return path
        picture = _eight_bits(ImageOps.exif_transpose(picture))
        picture = picture.convert("L" if picture.mode in ("1", "L") else "RGB")
        made = folder / f"{path.stem} {digest(path)}.png"
        if not made.exists():
            folder.mkdir(parents=True, exist_ok=True)
            part = made.with_suffix(".part")
            ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS).save(part, "png")
            part.rename(made)
    return made


def _eight_bits(picture):
    """A grey picture of 16 bits as one of 8: Pillow itself would make all but its darkest 256 values white."""
    if not picture.mode.startswith("I"):
        return picture
    return Image.fromarray((np.asarray(picture).clip(0, 65535) / 257).round().astype(np.uint8))


def prepare(sample, size: int, folder: Path):
    """A sample whose pictures are all size x size and lie in ``folder``."""
    paths = {name: getattr(sample, name) for name in ("picture", "mask", "truth")}
    return replace(sample, **{name: path and square(path, size, folder) for name, path in paths.items()})


def digest(path: Path) -> str:
    return _digest(path, path.stat().st_mtime_ns)


@functools.cache
def _digest(path, changed):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def as_png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()


def _grown(path, pixels):
    with Image.open(path) as mask:
        return as_png(mask.convert("L").filter(ImageFilter.MaxFilter(2 * pixels + 1)))


def _inverted(path):
    with Image.open(path) as mask:
        return as_png(ImageChops.invert(mask.convert("L")))


def _sketch(sample, size):
    import torch

    from ..attention_patches.sketch import sketch_of

    masks = torch.from_numpy(scenes.render(scene_of(sample.extras["after"]), size)[1])
    return as_png(Image.fromarray((255 * sketch_of(masks)[0, ..., 0].numpy()).astype(np.uint8)))


def _traced(path):
    """The outlines of a picture, as Attune Sketch finds them unless told otherwise."""
    import torch

    from ..attention_patches.sketch import outlines

    with Image.open(path) as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).float() / 255
    return as_png(Image.fromarray((255 * outlines(pixels[None], 0.2, 1.0, 2)[0].numpy()).astype(np.uint8)))


# ---- values ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """A picture that a prompt reads, by a name that tells its content; ``make`` gives that, a PNG file."""

    name: str
    make: Callable[[], bytes]


def _file(path, how="", make=None):
    return File(f"attune-benchmark-{digest(path)}{how}.png", make or path.read_bytes)


def value_of(value, sample, setup: Setup):
    """What a value of a method is for a sample; pictures as :class:`File`. Raises NotApplicable."""
    if isinstance(value, dict):
        value = value["by kind"].get(sample.kind, value["otherwise"])
    if not isinstance(value, str) or not value.startswith("$"):
        return value
    name, _, grow = value[1:].partition("+")
    run = {"steps": setup.steps, "guidance": setup.guidance, "size": setup.size}
    if name in run:
        return run[name]
    if name not in _VALUES:
        raise ValueError(f"There is no value {value}, only {', '.join('$' + n for n in (*_VALUES, *run))}.")
    found = _VALUES[name](sample, setup, round(int(grow or 0) * setup.size / 128))
    if found is None or found == "":
        raise NotApplicable(_LACKS[name])
    return found


def _named_in_target(sample):
    """The object's name where a mask can be found from it while the target is sampled: its caption has to hold it."""
    return _literal(sample.thing) if f" {sample.thing} ".lower() in f" {sample.target} ".lower() else None


def _mask(sample, setup, pixels):
    path = sample.mask
    return path and (_file(path, f"-{pixels}", lambda: _grown(path, pixels)) if pixels else _file(path))


def _kept(sample, setup, _):
    """Nothing where the mask is white all over."""
    path = sample.mask
    if not path:
        return None
    with Image.open(path) as mask:
        stays = mask.convert("L").getextrema()[0] < 128
    return _file(path, "-kept", lambda: _inverted(path)) if stays else None


def _sketched(sample, setup, _):
    """Of a demo scene its things' outlines; of another true result, those that are found in the picture."""
    path = sample.truth
    if "after" in sample.extras:
        return _file(path, "-sketch", lambda: _sketch(sample, setup.size))
    return path and _file(path, "-traced", lambda: _traced(path))


def _words(sample):
    return list(dict.fromkeys(word for pair in sample.words for word in pair if word))


def _braced(sample, setup, _):
    """All things of a demo scene with their colours; of another picture, the words that the edit is about."""
    if "before" in sample.extras:
        things = [f"{thing.color} {thing.shape}" for thing in scene_of(sample.extras["before"]).things]
    else:
        things = [word for word, _ in sample.words if word]
    braced = sample.source
    for thing in dict.fromkeys(things):
        braced = re.sub(rf"(?<!\w){re.escape(thing)}(?!\w)", lambda found: "{" + found[0] + "}", braced, count=1)
    # Braces of its own would be taken for those, and nothing escapes them.
    return _literal(braced) if braced != sample.source and not set("{}") & set(sample.source) else None


def _literal(text):
    """A text of a data set for ComfyUI, in whose prompts bare brackets mark weights."""
    return re.sub(r"[()]", r"\\\g<0>", text)


@functools.cache
def _tokenizer():
    """CLIP's, as ComfyUI has it, without the seconds and the memory that ComfyUI's own modules take."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(host.Host.current().path / "comfy" / "sd1_tokenizer")


def words_of(caption: str):
    """A caption's :class:`words.Tokens`; brackets are read as they stand."""
    return grouped(caption, _tokenizer().tokenize(caption))


def grouped(caption: str, pieces: list[str]):
    """A caption's :class:`words.Tokens` of pieces of which each that ends a word ends in "</w>"."""
    room = CHUNK - 2
    return group_words(caption, [pieces[i : i + room] for i in range(0, len(pieces), room)])


def is_swap(source: str, target: str) -> bool:
    """Whether the words of a caption are exchanged for others one by one, with none added or taken away."""
    ours, theirs = words_of(source), words_of(target)
    return len(ours.words) == len(theirs.words) and not shifted_words(ours, theirs)


def _exchange(sample, setup, _):
    if not sample.source or sample.source == sample.target:
        return None
    return "AttunePromptSwap" if is_swap(sample.source, sample.target) else "AttunePromptRefine"


def seed_of(sample, seed: int) -> int:
    """A sample's own, the same whatever else is drawn."""
    return zlib.crc32(f"{seed} {sample.key}".encode()) % 2**31


def _raised(sample, setup, _):
    """The words that only the target's caption has; small ones are none."""
    ours, theirs = (dict.fromkeys(re.findall(r"\w[\w'-]*", text)) for text in (sample.source, sample.target))
    return "\n".join(f"{word}: 2" for word in theirs if word not in ours and word.lower() not in SMALL)


def source_seed_of(sample, seed: int) -> int:
    """What a sample's picture is generated from: its data's own seed, else the sample's."""
    return int(sample.extras.get("seed", seed_of(sample, seed)))


_VALUES = {
    "source": lambda sample, setup, _: _literal(sample.source),
    "target": lambda sample, setup, _: _literal(sample.target),
    "words": lambda sample, setup, _: _literal(", ".join(_words(sample))),
    "outside": lambda sample, setup, _: _literal(", ".join(sample.extras.get("kept words", ()))),
    "thing": lambda sample, setup, _: _named_in_target(sample),
    "braced": _braced,
    "raised": _raised,
    "exchange": _exchange,
    "picture": lambda sample, setup, _: sample.picture and _file(sample.picture),
    "truth": lambda sample, setup, _: sample.truth and _file(sample.truth),
    "mask": _mask,
    "kept": _kept,
    "sketch": _sketched,
    "seed": lambda sample, setup, _: seed_of(sample, setup.seed),
    "source_seed": lambda sample, setup, _: None if sample.picture else source_seed_of(sample, setup.seed),
}
_LACKS = {
    "source": "no caption of the source",
    "target": "no caption of the target",
    "words": "no words that say where the edit is",
    "outside": "no words for what stays",
    "thing": "no object that the caption of the target names",
    "braced": "no thing in the caption of the source",
    "raised": "no word that is new",
    "exchange": "no two captions that differ",
    "picture": "no picture that is given: it is generated, and this inverts one",
    "source_seed": "a picture that is given: this edits generated ones",
    "mask": "no mask",
    "kept": "no mask that leaves anything out",
    "truth": "no true result",
    "sketch": "no outlines of the true result",
}


# ---- prompts -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """An API prompt, the number of the node whose picture counts, and the :class:`File`s that it reads."""

    nodes: dict
    result: str
    files: tuple

    @property
    def digest(self) -> str:
        """The same for the same picture: method, settings, captions and the contents of the pictures are in it."""
        told = json.dumps([self.nodes, self.result], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:16]


def build(method: Method, sample, setup: Setup, picture: File | None = None) -> Prompt:
    """The prompt that draws a method's edit of a sample, or of another picture in its place.

    Raises NotApplicable where the sample is not of the kind that the method is for or lacks what it needs, and
    ValueError where an input of the method is not in its workflow.
    """
    if sample.kind in method.excepted or (method.kinds and sample.kind not in method.kinds):
        raise NotApplicable("another kind of edit")
    nodes = {number: {**node, "inputs": dict(node["inputs"])} for number, node in method.graph.items()}
    result = one(nodes, method.result, method.key)
    nodes, files = needed(nodes, result), {}
    load(nodes, setup.checkpoint)
    inputs = {**method.inputs, **({} if setup.checkpoint else method.demo)}
    for owner in ("*", method.key):
        inputs |= setup.changes.get(owner, {})
    for place, value in inputs.items():
        title, _, name = place.rpartition("/")
        found = [node for node in nodes.values() if title in (node["_meta"]["title"], node["class_type"])]
        if not found and place not in setup.changes.get("*", {}):
            raise ValueError(f"The method {method.key} sets {place}, but its workflow has no such node.")
        value = picture if picture and value == "$picture" else value_of(value, sample, setup)
        if isinstance(value, File):
            files[value.name] = value
        for node in found:
            put(nodes, node, name, value)
    # What is only previewed does not fill the server's output folder.
    shown = {"images": nodes[result]["inputs"]["images"]}
    nodes[result] = {**nodes[result], "class_type": "PreviewImage", "inputs": shown}
    nodes = needed(nodes, result)
    named = {value for node in nodes.values() for value in node["inputs"].values() if isinstance(value, str)}
    return Prompt(nodes, result, tuple(file for name, file in files.items() if name in named))


def one(nodes, title, method):
    found = [number for number, node in nodes.items() if title in (node["_meta"]["title"], node["class_type"])]
    if len(found) != 1:
        raise ValueError(f"The method {method} needs one node {title!r} in its workflow; there are {len(found)}.")
    return found[0]


def needed(nodes, result):
    """Those that lead to the result."""
    keep, todo = set(), [result]
    while todo:
        number = todo.pop()
        if number not in keep:
            keep.add(number)
            todo += [value[0] for value in nodes[number]["inputs"].values() if isinstance(value, list)]
    return {number: node for number, node in nodes.items() if number in keep}


def load(nodes, checkpoint):
    """Has the workflow load this checkpoint, or the demo model and its sketch adapter."""
    for node in nodes.values():
        if node["class_type"] == "CheckpointLoaderSimple":
            node.update({"inputs": {"ckpt_name": checkpoint}} if checkpoint else {"class_type": DEMO, "inputs": {}})
        elif node["class_type"] == "ControlNetLoader" and not checkpoint:
            node["inputs"] = {"control_net_name": ADAPTER}


def put(nodes, node, name, value):
    """Gives a node an input, or takes it away; a picture that takes a socket's place gets a node that loads it."""
    if name == "class_type":
        node["class_type"] = value
        return
    if name not in node["inputs"] and not isinstance(value, File):
        raise ValueError(f"{node['_meta']['title']} has no input {name}, only {', '.join(node['inputs'])}.")
    if value is None:
        del node["inputs"][name]
        return
    if isinstance(value, File):
        is_mask = "mask" in name
        value = value.name
        if name != "image" or isinstance(node["inputs"].get(name), list):
            kind, more = ("LoadImageMask", {"channel": "red"}) if is_mask else ("LoadImage", {})
            number = str(1 + max(map(int, nodes)))
            title = {"title": f"{name} of the sample"}
            nodes[number] = {"class_type": kind, "inputs": {"image": value, **more}, "_meta": title}
            value = [number, 0]
    node["inputs"][name] = value
