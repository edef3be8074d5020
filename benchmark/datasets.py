"""The pictures that edits are measured on: the demo world's own, and the public benchmarks in a folder of the user's.

    demo                   held-out scenes in eight kinds of edit, with the true edited picture (demo_edits.py)
    pie-bench:FOLDER       PIE-Bench (Ju et al. 2024, Direct Inversion): mapping_file.json, annotation_images/
    tedbench:FOLDER        TEdBench (Kawar et al. 2023, Imagic): input_list.json, originals/
    manifest:FOLDER        any pictures with masks: manifest.json (see _manifest); CPAM's IMBA has no public format
    magicbrush:FOLDER      MagicBrush (Zhang et al. 2023): edit_sessions.json and images/, or the hub's metadata.jsonl
    ti2i:FOLDER-or-YAML    Wild-TI2I and ImageNet-R-TI2I (Tumanyan et al. 2023, Plug-and-Play): *.yaml
    fpe:FOLDER-or-JSON     Free-Prompt-Editing's four (Liu et al. 2024): Car_fake_edit.json and so on, see _fpe

Where a picture is to be generated, as in the "fake" ones of the last two, methods on recorded trajectories draw it.

An entry that cannot be used is told in one sentence and left out; it never ends a run.
"""

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ..attention_patches.alignment import shifted_words
from ..demo import scenes
from . import demo_edits
from .prompts import grouped

PIE_KINDS = (
    "random", "change object", "add object", "delete object", "change content",
    "change pose", "change colour", "change material", "change background", "change style",
)  # fmt: skip
PIE_SIDE, PIE_SEED = 512, 1234
DEMO_COUNT = 48  # samples of each kind of the demo world where all are asked for
SINGLE, MULTI = "single turn", "multi turn"


@dataclass(frozen=True)
class Sample:
    """One edit of one picture.

    ``key`` is unique in its data and serves as a file name. ``picture`` is None where the model itself is to draw it
    from ``source``; ``extras["seed"]`` may say from which noise. ``source`` and ``target`` are captions; data without a
    source caption have "". White in ``mask`` means edit here. ``truth`` is the true edited picture. ``words`` are pairs
    (source word, target word) that the edit is about, a side "" where its caption has none. ``thing`` names the object.
    In several turns, turn 1 and up, ``previous`` is the key of the sample whose result is edited on; ``picture`` is
    then the true one in its place. ``extras`` holds what only some data have, as JSON can.
    """

    key: str
    kind: str
    source: str
    target: str
    picture: Path | None
    mask: Path | None = None
    truth: Path | None = None
    words: tuple = ()
    thing: str = ""
    turn: int = 0
    previous: str = ""
    extras: dict = field(default_factory=dict)


class Malformed(ValueError):
    """What is wrong with one entry."""


def read(data, folder, count=0, seed=0):
    """The samples of some data, and the sentences about entries that were left out.

    ``data`` is written as in this file's head; ``folder`` is where pictures and masks that have to be made are written
    as PNG; of each kind of edit the first ``count`` are read, or all for 0; ``seed`` draws the demo world's scenes.
    Returns (list of :class:`Sample`, list of str). Raises ValueError where there is no such data.
    """
    name, _, where = data.partition(":")
    if name not in READERS or bool(where) == (name == "demo"):
        names = ", ".join(n if n == "demo" else f"{n}:FOLDER" for n in READERS)
        raise ValueError(f'There is no data "{data}"; give one of {names}.')
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    entries = _demo(count or DEMO_COUNT, seed) if name == "demo" else READERS[name](Path(where).expanduser())
    samples, problems, keys, kinds = [], [], set(), Counter()
    for number, (entry, make) in enumerate(entries):
        try:
            for one in make():
                kind, key = one["kind"], _key(one["key"])
                if count and kinds[kind] >= count:
                    continue
                if key.lower() in keys:  # some file systems do not tell Bird from bird
                    key = f"{key}-{number}"
                files = {part: _file(one.get(part), folder / f"{key}.{part}.png") for part in PARTS}
                samples.append(Sample(**one | files | {"key": key}))
                keys.add(key.lower())
                kinds[kind] += 1
        except Malformed as problem:
            problems.append(f"{name} entry {entry} {problem}; it is left out.")
    return samples, problems


PARTS = "picture", "mask", "truth"


def _file(value, path):
    """A path as it is; an array, (H, W, 3) in 0..1 or (H, W) bool, as the PNG that it is written to."""
    if not isinstance(value, np.ndarray):
        return value
    Image.fromarray((value * np.float32(255)).round().astype(np.uint8)).save(path)
    return path


def _key(text):
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text)[:120]


# ---- what entries are made of ------------------------------------------------------------------------------------

NAMES = {str: "a text", list: "a list", bool: "true or false", int: "a whole number", float: "a number"}


def _get(entry, name, *kinds):
    """A field of an entry, of one of these types; a text where none is given."""
    kinds = kinds or (str,)
    if not isinstance(entry, dict):
        raise Malformed("is not a set of named fields")
    if name not in entry:
        raise Malformed(f"has no {name}")
    if not isinstance(entry[name], kinds) or (isinstance(entry[name], bool) and bool not in kinds):
        wanted = " or ".join(NAMES[kind] for kind in kinds)
        raise Malformed(f"has as {name} {str(entry[name])[:40]!r}, which is not {wanted}")
    return entry[name]


def _picture(path):
    """A path at which there is a picture."""
    if not path.is_file():
        raise Malformed(f"names the picture {path}, which is not there")
    try:
        with Image.open(path) as picture:
            picture.verify()
    except Exception as problem:  # Pillow raises many kinds for a broken file
        raise Malformed(f"names {path}, which is no picture that can be read ({problem})") from None
    return path


def _size(path):
    with Image.open(path) as picture:
        return picture.size


def _json(path, kind, what):
    """A JSON file whose top is of this type. Raises ValueError, as all of the data depends on it."""
    if not path.is_file():
        raise ValueError(f"{path.parent} is no {what}: it holds no {path.name}; name the folder that does.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ValueError(f"{path} cannot be read as JSON ({problem}); get it again.") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path} holds no JSON {kind.__name__}, so it is no {what}; name another folder.")
    return value


def changed_words(source, target):
    """The pairs of words in which two captions of equally many words differ, articles apart; else none, and none where
    a word was added and another taken away, which shifts those between them.

    Wild-TI2I and ImageNet-R-TI2I are read so for Prompt-to-Prompt.
    """
    pairs = list(zip(source.split(), target.split(), strict=False))
    if len(source.split()) != len(target.split()):
        return ()
    ours, theirs = (grouped(text, [word + "</w>" for word in text.split()]) for text in (source, target))
    if shifted_words(ours, theirs):
        return ()
    return tuple((a, b) for a, b in pairs if a != b and {a, b} != {"a", "an"})


# ---- the demo world ----------------------------------------------------------------------------------------------


def _demo(count, seed):
    """Kind by kind in turn, so that a run that is stopped has seen all of them. The two scenes, as
    ``dataclasses.asdict`` takes them apart, are in the extras; :func:`demo_edits.scene_of` puts them together again."""
    for number in range(count):
        for kind in demo_edits.KINDS:
            yield f"{kind} {number}", lambda kind=kind, number=number: [_demo_sample(kind, seed, number)]


def _demo_sample(kind, seed, number):
    edit = demo_edits.draw_edit(kind, seed, number)
    return {
        "key": f"{kind}-{number:03d}",
        "kind": kind,
        "source": edit.source,
        "target": edit.target,
        "picture": scenes.render(edit.before)[0],
        "mask": demo_edits.changed(edit),
        "truth": scenes.render(edit.after)[0],
        "words": edit.words,
        "thing": edit.thing,
        "extras": {
            "instruction": edit.instruction,
            "seed": number,
            "kept words": list(edit.kept),
            "before": asdict(edit.before),
            "after": asdict(edit.after),
        },
    }


# ---- PIE-Bench ---------------------------------------------------------------------------------------------------


def _pie_bench(root):
    """``root`` holds mapping_file.json and annotation_images/, or a folder data/ that does. The pictures of a second
    file, mapping_file_ti2i_benchmark.json, are read as well where it lies there."""
    root = root if (root / "mapping_file.json").is_file() or not (root / "data").is_dir() else root / "data"
    for name, prefix in (("mapping_file.json", ""), ("mapping_file_ti2i_benchmark.json", "ti2i-")):
        if prefix and not (root / name).is_file():
            continue
        for entry, value in _json(root / name, dict, "PIE-Bench").items():
            yield prefix + entry, lambda value=value, key=prefix + entry: [_pie_sample(root, key, value)]


def _pie_sample(root, key, entry):
    kind = _get(entry, "editing_type_id")
    if kind not in map(str, range(len(PIE_KINDS))):
        raise Malformed(f'is of the editing type "{kind}", but there are 0 to {len(PIE_KINDS) - 1}')
    picture = _picture(root / "annotation_images" / _get(entry, "image_path"))
    if _size(picture) != (PIE_SIDE, PIE_SIDE):
        width, height = _size(picture)
        raise Malformed(f"has a picture of {width}x{height}, but its mask is for {PIE_SIDE}x{PIE_SIDE}")
    blended = _get(entry, "blended_word").split()
    if len(blended) == 1:
        raise Malformed(f'has the one blended word "{blended[0]}", but needs one of either prompt, or none')
    # The reference reads two words, whatever follows.
    words = (tuple(blended[:2]),) if blended else ()
    return {
        "key": key,
        "kind": PIE_KINDS[int(kind)],
        "source": _unbracketed(_get(entry, "original_prompt")),
        "target": _unbracketed(_get(entry, "editing_prompt")),
        "picture": picture,
        "mask": pie_mask(_get(entry, "mask", list, str)),
        "words": words,
        "thing": words[0][0] if words else "",
        "extras": {"instruction": entry.get("editing_instruction", ""), "seed": PIE_SEED},
    }


def _unbracketed(prompt):
    """Brackets mark the words that change."""
    return prompt.replace("[", "").replace("]", "")


def pie_mask(runs, side=PIE_SIDE, border=True):
    """PIE-Bench's mask, (side, side) bool, of [start, length, start, length, ...], row by row; True is to be edited.

    ``runs`` may also be a text of numbers with spaces between, as some copies of the data have it. A length that runs
    over the end is cut there. ``border`` sets the outermost pixels, as the reference does against slips at the edge;
    published numbers have it. Raises :class:`Malformed`.
    """
    if isinstance(runs, str):
        runs = [int(run) if run.isdecimal() else run for run in runs.split()]
    if len(runs) % 2 or not all(type(run) is int and run >= 0 for run in runs):
        raise Malformed("has a mask that is not made of pairs of a start and a length, whole numbers of 0 and up")
    mask = np.zeros(side * side, bool)
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        if start >= len(mask):
            raise Malformed(f"has a mask with a run that starts at {start}, past the last pixel of {side}x{side}")
        mask[start : start + length] = True
    mask = mask.reshape(side, side)
    if border:
        mask[[0, -1]] = mask[:, [0, -1]] = True
    return mask


# ---- TEdBench and the neutral manifest ---------------------------------------------------------------------------


def _tedbench(root):
    """No source captions and no masks. Stems are not unique (bird.jpeg and bird.png), so keys keep the extension."""
    for number, entry in enumerate(_json(root / "input_list.json", list, "TEdBench")):
        yield number, lambda entry=entry: [_tedbench_sample(root, entry)]


def _tedbench_sample(root, entry):
    name, text = _get(entry, "img_name"), _get(entry, "target_text")
    return {
        "key": f"{name}-{text.rstrip('.').replace(' ', '_')}",
        "kind": "text",
        "source": "",
        "target": text,
        "picture": _picture(root / "originals" / name),
    }


FLAGS = "retain", "modify", "background"


def _manifest(root):
    """manifest.json: a list of objects with ``image`` and ``mask`` (paths below the folder; white = edit),
    ``target_prompt``, ``object_prompt`` and three flags, true or false: ``retain`` (the object stays as it is),
    ``modify`` (it changes) and ``background`` (its surroundings change). ``source_prompt``, ``truth`` and ``id`` may be
    added. A kind is made of the flags that are set, several where they overlap.
    """
    for number, entry in enumerate(_json(root / "manifest.json", list, "folder with a manifest")):
        name = entry.get("id", number) if isinstance(entry, dict) else number
        yield name, lambda entry=entry, name=name: [_manifest_sample(root, str(name), entry)]


def _manifest_sample(root, key, entry):
    flags = {flag: _get(entry, flag, bool) for flag in FLAGS}
    if not any(flags.values()):
        raise Malformed(f"has none of the flags {', '.join(FLAGS)} set, but needs one")
    return {
        "key": key,
        "kind": " and ".join(flag for flag, there in flags.items() if there),
        "source": _get(entry, "source_prompt") if "source_prompt" in entry else "",
        "target": _get(entry, "target_prompt"),
        "picture": _picture(root / _get(entry, "image")),
        "mask": _picture(root / _get(entry, "mask")),
        "truth": _picture(root / _get(entry, "truth")) if "truth" in entry else None,
        "thing": _get(entry, "object_prompt"),
        "extras": flags,
    }


# ---- MagicBrush --------------------------------------------------------------------------------------------------


def _magicbrush(root):
    """``root`` holds global_descriptions.json and either edit_sessions.json and images/ID/, as the download has it, or
    metadata.jsonl with the hub's columns and paths below the folder.

    Each turn makes two samples. In a single turn the picture is the true one of the turn before (the reference's
    names: ID_1, ID_inde_2, ...). In several turns it is the result of the turn before (ID_iter_1, ID_iter_2, ...), and
    ``extras["final"]`` marks the last turn, the one that the paper's multi-turn numbers are made of. Captions are the
    global descriptions of the true pictures; the local one of the target, where there is such a file, is in the extras.
    """
    if (root / "metadata.jsonl").is_file():
        sessions = list(_hub_sessions(root))
    else:
        told = _json(root / "edit_sessions.json", dict, "MagicBrush")
        sessions = [(name, turns, root / "images") for name, turns in told.items()]
    captions = _json(root / "global_descriptions.json", dict, "MagicBrush with captions")
    local = root / "local_descriptions.json"
    nearer = _json(local, dict, "MagicBrush") if local.is_file() else {}
    for name, turns, images in sessions:
        if not isinstance(turns, list):
            yield name, lambda turns=turns: _get({"session": turns}, "session", list)
            continue
        broken = []
        for turn, entry in enumerate(turns, 1):
            given = root, name, turn, entry, images, captions, nearer, turn == len(turns), broken
            yield f"{name} turn {turn}", lambda given=given: _magicbrush_samples(*given)


def _hub_sessions(root):
    """(id, turns, None) of the hub's rows; a line that is no row is a session of its own, which tells so."""
    sessions = {}
    for number, line in enumerate((root / "metadata.jsonl").read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            name, turn = str(_get(row, "img_id", str, int)), _get(row, "turn_index", int)
        except ValueError:
            yield f"line {number}", "no JSON object with img_id and turn_index", None
            continue
        names = {"source_img": "input", "mask_img": "mask", "target_img": "output", "instruction": "instruction"}
        sessions.setdefault(name, {})[turn] = {names[k]: v for k, v in row.items() if k in names}
    for name, turns in sessions.items():
        yield name, [turns.get(turn) for turn in range(1, max(turns) + 1)], None


def _magicbrush_samples(root, name, turn, entry, images, captions, nearer, final, broken):
    try:
        paths = {part: _get(entry, part) for part in ("input", "mask", "output")}
        # The reference finds a picture's folder by its name: 139306-input.png lies in 139306/.
        at = {part: (images / path.split("-")[0] if images else root) / path for part, path in paths.items()}
        picture, truth = _picture(at["input"]), _picture(at["output"])
        before = f"{name}-output{turn - 1}.png" if turn > 1 else f"{name}-input.png"
        source, target = (
            _caption(captions, name, Path(paths[part]).name if images else own)
            for part, own in (("input", before), ("output", f"{name}-output{turn}.png"))
        )
        known = nearer.get(name, {})
        near = known.get(Path(paths["output"]).name if images else f"{name}-output{turn}.png")
        one = {
            "source": source,
            "target": target,
            "picture": picture,
            "mask": magicbrush_mask(_picture(at["mask"]), _size(picture)),
            "truth": truth,
            "turn": turn,
            "extras": {"instruction": _get(entry, "instruction"), "final": final}
            | ({"local caption": near} if near else {}),
        }
    except Malformed:
        broken.append(turn)
        raise
    yield one | {"key": f"{name}_{turn}" if turn == 1 else f"{name}_inde_{turn}", "kind": SINGLE}
    if broken:
        raise Malformed("is used as a single turn only, since an earlier turn of its session is left out")
    previous = _key(f"{name}_iter_{turn - 1}") if turn > 1 else ""
    yield one | {"key": f"{name}_iter_{turn}", "kind": MULTI, "previous": previous}


def _caption(captions, name, file):
    found = captions.get(name)
    if not isinstance(found, dict) or not isinstance(found.get(file), str):
        raise Malformed(f"has no description of {file} in global_descriptions.json, which is its caption")
    return found[file]


def magicbrush_mask(path, size):
    """MagicBrush's mask, (H, W) bool, at ``size`` (width, height): where its picture is transparent or, if none of it
    is, pure white, which is how the downloads and the hub have it."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGBA").resize(size, Image.Resampling.NEAREST))
    clear = pixels[..., 3] == 0
    return clear if clear.any() else (pixels[..., :3] == 255).all(-1)


# ---- Wild-TI2I and ImageNet-R-TI2I -------------------------------------------------------------------------------


def _ti2i(root):
    """``root`` is one of the YAML files or a folder of them. Each target prompt is a sample, each file a kind."""
    import yaml

    files = [root] if root.suffix in (".yaml", ".yml") else sorted(root.glob("*.yaml"))
    if not files or not files[0].is_file():
        raise ValueError(f"{root} is no Wild-TI2I or ImageNet-R-TI2I: there is no YAML file; name one or its folder.")
    for file in files:
        try:
            entries = yaml.safe_load(file.read_text(encoding="utf-8"))
        except yaml.YAMLError as problem:
            why = " ".join(str(problem).split())
            raise ValueError(f"{file} cannot be read as YAML ({why}); get it again.") from None
        if not isinstance(entries, list):
            raise ValueError(f"{file} holds no list, so it is no Wild-TI2I or ImageNet-R-TI2I; name another.")
        for number, entry in enumerate(entries):
            yield f"{file.stem} {number}", lambda entry=entry, file=file, n=number: _ti2i_samples(file, n, entry)


SETTINGS = {"seed": "seed", "scale": "scale", "ddim_steps": "steps"}


def _ti2i_samples(file, number, entry):
    targets = _get(entry, "target_prompts", list)
    if not targets or not all(isinstance(target, str) for target in targets):
        raise Malformed("has target_prompts that are not texts")
    source = _get(entry, "source_prompt") if "source_prompt" in entry else ""
    if "init_img" in entry:
        picture = _picture(_rebased(file.parent, _get(entry, "init_img")))
    elif source and "seed" in entry:
        picture = file.parent / "imgs" / f"{source}.png"
        picture = _picture(picture) if picture.is_file() else None
    else:
        raise Malformed("has no init_img")
    extras = {ours: _get(entry, theirs, int, float) for theirs, ours in SETTINGS.items() if theirs in entry}
    return [
        {
            "key": f"{file.stem}-{number:02d}-{place}",
            "kind": file.stem,
            "source": source,
            "target": target,
            "picture": picture,
            "words": changed_words(source, target),
            "extras": extras,
        }
        for place, target in enumerate(targets)
    ]


def _rebased(root, given):
    """Where a picture lies whose path was absolute on its author's machine: the longest end of it that is found below
    the folder, as it is written or in lower case, or else its name in data/."""
    parts = [part for part in given.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    if not parts:
        raise Malformed("has an empty init_img")
    ends = [parts[start:] for start in range(len(parts))] + [["data", parts[-1]]]
    tried = [root.joinpath(*(p if same else p.lower() for p in end)) for end in ends for same in (True, False)]
    return next((path for path in tried if path.is_file()), tried[-2])


# ---- Free-Prompt-Editing's ---------------------------------------------------------------------------------------


def _fpe(root):
    """``root`` is one of the authors' lists or a folder of them (Car_fake_edit.json, Car_real_edit.json,
    ImageNet_fake_edit.json, ImageNet_real_edit.json), each a kind. An entry has ``soure_prompt`` (they write it so; the
    other spelling is read as well) and ``edit_prompt``, and in a real list ``image_name``, which is looked for beside
    the list, in images/ and in a folder called like the list without its ending, by its whole way and by its name.
    """
    names = [f"{what}_{how}_edit.json" for what in ("Car", "ImageNet") for how in ("fake", "real")]
    files = [root] if root.suffix == ".json" else [root / name for name in names if (root / name).is_file()]
    if not files:
        raise ValueError(f"{root} is no folder of Free-Prompt-Editing's lists ({', '.join(names)}); name one.")
    for file in files:
        for number, entry in enumerate(_json(file, list, "list of Free-Prompt-Editing")):
            yield f"{file.stem} {number}", lambda entry=entry, file=file, n=number: [_fpe_sample(file, n, entry)]


def _fpe_sample(file, number, entry):
    spelt = "source_prompt" if isinstance(entry, dict) and "source_prompt" in entry else "soure_prompt"
    source, target, picture = _get(entry, spelt), _get(entry, "edit_prompt"), None
    if "image_name" in entry:
        name = Path(_get(entry, "image_name"))
        folders = file.parent, file.parent / "images", file.with_suffix("")
        tried = [folder / way for folder in folders for way in (name, name.name)]
        picture = _picture(next((path for path in tried if path.is_file()), tried[0]))
    return {
        "key": f"{file.stem}-{number:04d}",
        "kind": file.stem,
        "source": source,
        "target": target,
        "picture": picture,
        "words": changed_words(source, target),
    }


READERS = {
    "demo": _demo,
    "pie-bench": _pie_bench,
    "tedbench": _tedbench,
    "manifest": _manifest,
    "magicbrush": _magicbrush,
    "ti2i": _ti2i,
    "fpe": _fpe,
}
