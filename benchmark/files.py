"""Spoiled, forged and foreign trajectory files: what Attune Load Trajectory says of them, and what they come to.

Files of the demo model are changed by what hypothesis draws; where the change is to be accepted if at all possible, the
file gets a digest that fits, as a forger would write it. A file may be refused in one sentence, or be accepted: then an
edit, and a drawing under the file's own texts, must end in a picture, or in one sentence of the pack. What may not be:
a bare error of Python's, a picture of NaN, memory beyond what the file itself takes.
"""

import argparse
import collections
import gzip
import io
import json
import logging
import pickle
import shutil
import sys
import traceback
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import comfy.latent_formats
import folder_paths
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as some
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from ..attention_patches import host as patches
from ..inversion import file, host
from ..inversion.trajectory import LearnedWords
from ..nodes import edit
from ..nodes import trajectory as nodes
from ..tests.engine.bench import SOURCE, TARGET, Bench, outputs
from .cost import table

REFUSED, HARMLESS, LATER = "clear sentence", "accepted, a picture", "accepted, clear sentence later"
NAN, BARE, BARE_LATER = "accepted, NaN picture", "bare error at load", "bare error later"
OUTCOMES = REFUSED, HARMLESS, LATER, NAN, BARE, BARE_LATER
BAD = NAN, BARE, BARE_LATER
LONGEST = 1300  # letters of a message
log = logging.getLogger("attune.bench")


# ---- the files that are spoiled ----------------------------------------------------------------------------------


def originals(bench):
    """Bytes of whole files: of a plain recording, with null embeddings and learned words, and under a masked text."""
    text, empty = bench.text(SOURCE), bench.text("")
    mask = torch.zeros(1, *bench.trajectory.latents.shape[-2:])
    mask[..., 3:] = 1
    plain = replace(bench.trajectory, conditioning=text, negative=empty)
    plain.header.update(method="recorded", prompt=SOURCE, seed=3)
    moves = len(plain.sigmas) - 1
    positions = tuple(w.positions for w in patches.read_words(bench.clip, SOURCE).words if w.text == "circle")
    vectors = patches.token_vectors(bench.clip, SOURCE, positions[0])
    words = {name: rows.expand(moves, 1, -1, -1) for name, rows in vectors.items()}
    learned = replace(
        plain, nulls=empty[0][0].expand(moves, 1, -1, -1), windows=host.windows(bench.model, plain.sigmas),
        learned=LearnedWords(SOURCE, ("circle",), positions, words),
    )  # fmt: skip
    parts = {"mask": mask, "mask_strength": 1.0, "set_area_to_bounds": False, "start_percent": 0.0, "end_percent": 0.5}
    masked = replace(plain, conditioning=[[text[0][0], {**text[0][1], **parts}], *text])
    return [file.packed(one, host.versions()) for one in (plain, learned, masked)]


def parted(content):
    """A file's table as a dictionary, and the bytes behind it."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def joined(text, data):
    """A file of a table, as text, and bytes."""
    text = text.encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data


def opened(content):
    """What a forger starts from: tensors, and the JSON without its digest."""
    about = json.loads(parted(content)[0]["__metadata__"]["attune"])
    about.pop("digest")
    return load_tensors(content), about


def forged(tensors, about):
    """A file whose digest fits."""
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    parts = (part for name in sorted(tensors) for part in (name, tensors[name]))
    about = {**about, "digest": file.fingerprint(about, *parts)}
    return save_tensors(tensors, {"attune": json.dumps(about)})


# ---- changes -----------------------------------------------------------------------------------------------------

BIG = 10**400
VALUES = some.one_of(
    some.none(), some.booleans(), some.integers(-3, 3), some.floats(), some.text(max_size=8),
    some.sampled_from([BIG, -BIG, 2**63, 1e300, -1e300, "x" * 100_000, "a\x00b", "\ud83d", [], {}, [[]], [1, "x"]]),
    some.recursive(some.integers() | some.text(max_size=3), lambda inner: some.lists(inner) | some.dictionaries(
        some.text(max_size=5), inner), max_leaves=6),
)  # fmt: skip
FORMATS = [name for name, kind in vars(comfy.latent_formats).items() if isinstance(kind, type)]
KINDS = [
    torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip
EXTREMES = [
    (float("nan"), torch.float32), (float("inf"), torch.float32), (-float("inf"), torch.float16),
    (1e300, torch.float64), (3e38, torch.float32), (-3e38, torch.float32), (70000.0, torch.float32),
    (65000.0, torch.float16), (0.0, torch.float32), (-1.0, torch.float32), (1e-45, torch.float32),
]  # fmt: skip
# What ComfyUI knows in a conditioning, and a few names that it does not.
KEYS = [
    "control", "hooks", "mask", "area", "gligen", "model_conds", "start_percent", "end_percent", "strength", "default",
    "mask_strength", "set_area_to_bounds", "pooled_output", "concat_latent_image", "concat_mask", "reference_latents",
    "unclip_conditioning", "timestep_start", "uuid", "cross_attn", "noise_concat", "guidance", "width", "height",
    "attune_prompt", "attune_text", "attune_seed", "x", "",
]  # fmt: skip
ODD_NAMES = [
    "conditioning.0.control", "conditioning.99", "conditioning.-1", "conditioning.00", "learned.", "learned.x", "x",
    "learned.l.l", "negative", "attune", "nulls.0", "conditioning.0.pooled_output", "learned.\u00e9",
]  # fmt: skip


def changes(wholes):
    """Class of change -> strategy of what to write: bytes, or a function that writes to a path."""
    whole = some.sampled_from(wholes)

    def drawn(build):
        return some.composite(build)()

    def cut(draw):
        content = draw(whole)
        return content[: draw(some.integers(0, len(content) - 1))]

    def flip(inside):
        def build(draw):
            content = bytearray(draw(whole))
            end = 8 + int.from_bytes(content[:8], "little")
            at = draw(some.integers(8, end - 1) if inside == "table" else some.integers(end, len(content) - 1))
            content[at] ^= draw(some.integers(1, 255))
            return bytes(content)

        return build

    def length(draw):
        lengths = [0, 1, 7, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
        number = draw(some.sampled_from(lengths) | some.integers(0, 2**64 - 1))
        return number.to_bytes(8, "little") + draw(whole)[8:]

    def deep(draw):
        tables, data = parted(draw(whole))
        depth = draw(some.sampled_from([5, 9, 100, 900, 960, 980, 990, 1000, 5000, 100_000]))
        nest = draw(some.sampled_from(["[%s]", '{"a":%s}'])).split("%s")
        inner = nest[0] * depth + "1" + nest[1] * depth
        if draw(some.booleans()):
            return joined(json.dumps({**tables, "deep": 0}).replace('"deep": 0', f'"deep": {inner}'), data)
        place = draw(some.sampled_from(["header", "versions", "windows", "learned", "else"]))
        about = {**json.loads(tables["__metadata__"]["attune"]), place: "DEEP"}
        text = json.dumps(about).replace('"DEEP"', inner)
        try:
            tensors, about = load_tensors(draw(whole)), json.loads(text)
            about.pop("digest")
            return forged(tensors, about)
        except (RecursionError, ValueError):
            return joined(json.dumps({**tables, "__metadata__": {"attune": text}}), data)

    def twice(draw):
        tables, data = parted(draw(whole))
        name = draw(some.sampled_from(sorted(tables)))
        other = draw(some.sampled_from([{}, tables[name], {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}]))
        return joined(json.dumps(tables)[:-1] + f", {json.dumps(name)}: {json.dumps(other)}}}", data)

    def kind(draw):
        tensors, about = opened(draw(whole))
        name = draw(some.sampled_from(sorted(tensors)))
        return forged({**tensors, name: tensors[name].to(draw(some.sampled_from(KINDS)))}, about)

    def shape(draw):
        tensors, about = opened(draw(whole))
        name = draw(some.sampled_from(sorted(tensors)))
        tensor = tensors[name]
        axis, count = draw(some.integers(0, tensor.ndim - 1)), draw(some.sampled_from([0, 1, 2, 3, 7, 40]))
        how = draw(some.sampled_from(["resize", "drop", "add", "flat", "none"]))
        if how == "resize":
            index = torch.arange(count) % tensor.shape[axis]
            tensor = tensor.index_select(axis, index)
        tensor = {"drop": tensor.select(axis, 0) if tensor.shape[axis] else tensor, "add": tensor.unsqueeze(axis),
                  "flat": tensor.flatten(), "none": torch.zeros(()), "resize": tensor}[how]  # fmt: skip
        return forged({**tensors, name: tensor}, about)

    def extreme(draw):
        tensors, about = opened(draw(whole))
        name = draw(some.sampled_from(sorted(tensors)))
        value, kind = draw(some.sampled_from(EXTREMES))
        tensor = tensors[name].to(kind).flatten().clone()
        tensor[slice(None) if draw(some.booleans()) else draw(some.integers(0, len(tensor) - 1))] = value
        return forged({**tensors, name: tensor.reshape(tensors[name].shape)}, about)

    def bomb(draw):
        tables, data = parted(draw(whole))
        how = draw(some.sampled_from(["shape", "offset", "tensors", "json", "attune"]))
        if how == "shape":
            shapes = [[10**9, 1, 4, 8, 8], [2**63, 2], [2**64, 1], [10**30]]
            tables["latents"]["shape"] = draw(some.sampled_from(shapes))
        if how == "offset":
            tables["latents"]["data_offsets"] = draw(some.sampled_from([[0, 2**63], [2**64, 2**65], [-1, 4]]))
        if how == "tensors":
            end = len(data)
            tables |= {f"{n}": {"dtype": "F32", "shape": [0], "data_offsets": [end, end]} for n in range(100_000)}
        if how == "json":
            return joined(json.dumps(tables) + " " * (40 << 20), data)
        if how == "attune":
            tables["__metadata__"]["attune"] = "[" + "1," * (10 << 20) + "1]"
        return joined(json.dumps(tables), data)

    def sparse(draw):
        """A large file of zeros without its bytes on the disk, whose table fits them and whose trajectory does not."""
        tables, data = parted(draw(whole))
        count = draw(some.integers(1, 3)) * (1 << 28)  # 1 to 3 GB
        name = draw(some.sampled_from(["latents", "sigmas", "x", "conditioning.0"]))
        old = tables.pop(name, None)
        tables = {k: v for k, v in tables.items() if k == "__metadata__"}
        shape = [count // 256, 1, 4, 8, 8] if name == "latents" else [count]
        tables[name] = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * count]}
        if name == "latents" and old:
            tables["sigmas"] = {"dtype": "F32", "shape": [3], "data_offsets": [4 * count, 4 * count + 12]}
        start = joined(json.dumps(tables), b"")

        def write(path):
            with path.open("wb") as opened_file:
                opened_file.write(start)
                opened_file.truncate(len(start) + 4 * count + 12 * ("sigmas" in tables and name != "sigmas"))

        return write

    def odd_name(draw):
        tensors, about = opened(draw(whole))
        name = draw(some.sampled_from(ODD_NAMES) | some.text(max_size=6))
        if draw(some.booleans()):
            old = draw(some.sampled_from(sorted(tensors)))
            tensors[name] = tensors.pop(old)
        else:
            tensors[name] = torch.zeros(draw(some.sampled_from([(1,), (1, 4), (1, 77, 128), (2, 1, 1, 128)])))
        return forged(tensors, about)

    def foreign(draw):
        how = draw(some.sampled_from(["pickle", "torch", "zip", "gzip", "text", "empty", "folder", "random"]))
        if how == "pickle":
            return pickle.dumps({"sigmas": [1, 2]})
        if how == "torch":
            torch.save({"sigmas": torch.zeros(2)}, kept := io.BytesIO())
            return kept.getvalue()
        if how == "zip":
            with zipfile.ZipFile(kept := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("sigmas", bytes(50 << 20))
            return kept.getvalue()
        if how == "gzip":
            return gzip.compress(bytes(50 << 20))
        if how == "folder":
            return lambda path: path.mkdir()
        return {"text": b"{}", "empty": b"", "random": draw(some.binary(max_size=300))}[how]

    def values(inside):
        """One value somewhere inside the JSON, or of one of its parts, is another."""

        def build(draw):
            tensors, about = opened(draw(whole))
            at, key = about, None
            for step in inside:
                at = at.get(step) if isinstance(at, dict) else None
            if not isinstance(at, dict):
                at = about
            while isinstance(at, dict | list) and at:
                key = draw(some.sampled_from(sorted(at) if isinstance(at, dict) else list(range(len(at)))))
                if not isinstance(at[key], dict | list) or not at[key] or draw(some.booleans()):
                    break
                at = at[key]
            if key == "latent_format" and draw(some.booleans()):
                at[key] = draw(some.sampled_from(FORMATS))
            elif isinstance(at, dict) and draw(some.integers(0, 5)) == 0:
                at.pop(key)
            else:
                at[key] = draw(VALUES)
            return forged(tensors, about)

        return build

    def extra(draw):
        tensors, about = opened(draw(whole))
        name, key = draw(some.sampled_from(file.LISTS)), draw(some.sampled_from(KEYS))
        if draw(some.booleans()):
            shapes = [(1,), (1, 1), (1, 128), (1, 8, 8), (2, 8, 8), (1, 4, 8, 8), (1, 1, 64, 64), (3, 3)]
            tensors[f"{name}.0.{key}"] = torch.ones(draw(some.sampled_from(shapes)))
        else:
            about[name][0][key] = draw(VALUES)
        return forged(tensors, about)

    return {
        name: drawn(build)
        for name, build in {
            "truncated": cut, "bit flip, table": flip("table"), "bit flip, data": flip("data"),
            "length of the table": length, "deep JSON": deep, "keys that stand twice": twice,
            "another kind of number": kind, "another shape": shape, "NaN, infinite, extreme": extreme,
            "memory bomb in the table": bomb, "memory bomb, 1 to 3 GB of zeros": sparse, "odd tensor names": odd_name,
            "foreign file": foreign, "forged JSON": values(()), "forged header": values(("header",)),
            "forged words": values(("learned",)), "forged conditioning": extra,
        }.items()
    }  # fmt: skip


# What takes seconds each is tried less often than the rest.
SHARES = {"memory bomb in the table": 0.4, "memory bomb, 1 to 3 GB of zeros": 0.2}


# ---- what comes of them ------------------------------------------------------------------------------------------


def is_clear(problem):
    said = str(problem)
    raised = traceback.extract_tb(problem.__traceback__)[-1].filename
    ours = Path(raised).resolve().is_relative_to(Path(__file__).resolve().parents[1])
    sentence = said.endswith(".") and "\n" not in said and ". " not in said.replace("...", "") and len(said) <= LONGEST
    return isinstance(problem, ValueError) and ours and sentence


def tried(bench, name):
    """What comes of a file: one of OUTCOMES, and what was said."""
    node = nodes.AttuneLoadTrajectory
    try:
        accepted = node.validate_inputs(name)
        if accepted is not True:
            return (REFUSED if accepted.endswith(".") else BARE), accepted
        node.fingerprint_inputs(name)
        made, _ = outputs(node, name)
    except Exception as problem:
        return (REFUSED if is_clear(problem) else BARE), f"{type(problem).__name__}: {problem}"
    try:
        finite = used(bench, made)
    except Exception as problem:
        return (LATER if is_clear(problem) else BARE_LATER), f"{type(problem).__name__}: {problem}"
    return (HARMLESS if finite else NAN), ""


def used(bench, made):
    """Whether an edit, and a drawing under the trajectory's own texts, are finite."""
    latent, sigmas = outputs(nodes.AttuneTrajectoryLatent, made, 1.0, -1)
    own, negative = outputs(nodes.AttuneTrajectoryConditioning, made)
    negative = negative if isinstance(negative, list) else bench.text("")
    edited, positive = outputs(
        edit.AttunePromptSwap, bench.model, bench.clip, made, SOURCE, TARGET, 0.0, 0.8, 0.0, 0.4, 1024
    )
    drawn = [
        bench.sample(model, text, latent, negative=negative, sigmas=sigmas)
        for model, text in ((edited, positive), (bench.model, own))
    ]
    outputs(nodes.AttuneSaveTrajectory, made, "again")
    return all(bool(one.isfinite().all()) for one in drawn)


class Peak:
    """The most memory that the process held while it is entered, in MB above what it held before; Linux only."""

    def __enter__(self):
        self.most, self.before = 0, self._status("VmRSS")
        if self.before:
            Path("/proc/self/clear_refs").write_text("5")
        return self

    def __exit__(self, *_):
        self.most = max(0, self._status("VmHWM") - self.before) >> 10

    @staticmethod
    def _status(key):
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.exists() else []
        return next((int(line.split()[1]) for line in lines if line.startswith(key + ":")), 0)


def check(bench, count, number=0):
    """Tries some ``count`` files, spread over all classes of changes. Yields the class, one of OUTCOMES, what was said
    and the MB that it took to load and use."""
    found, base = [], Path(folder_paths.get_input_directory())
    base.mkdir(parents=True, exist_ok=True)
    classes = changes(originals(bench))
    share = count / sum(SHARES.get(name, 1) for name in classes)

    def one(content):
        path = base / f"spoiled{host.SUFFIX}"
        path.write_bytes(content) if isinstance(content, bytes) else content(path)
        try:
            with Peak() as peak:
                outcome, said = tried(bench, path.name)
        finally:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        found.append((outcome, said, peak.most))

    for name, strategy in classes.items():
        examples = max(1, round(share * SHARES.get(name, 1)))
        few = settings(
            max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        few(seed(number)(given(strategy)(one)))()
        yield from ((name, *rest) for rest in found)
        found.clear()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=560, help="how many files, about")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.ERROR, format="%(message)s", force=True)
    log.setLevel(logging.INFO)
    warnings.simplefilter("ignore")
    rows, faults = {}, 0
    with torch.inference_mode():
        bench = Bench(height=8, width=8, steps=2)
        for name, outcome, said, peak in check(bench, args.count, args.seed):
            for row in (rows.setdefault(name, collections.Counter()), rows.setdefault("all", collections.Counter())):
                row.update({"files": 1, outcome: 1})
                row["peak MB"] = max(row["peak MB"], peak)
            if outcome in BAD:
                faults += 1
                log.info("%s: %s: %s", name, outcome, said[:300])
    rows["all"] = rows.pop("all")
    log.info(table({name: {one: row[one] for one in ("files", *OUTCOMES, "peak MB")} for name, row in rows.items()}))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
