"""A trajectory as one safetensors file. Nothing in it is ever executed, and every value of it is checked: whoever can
write a file can write its digest too.

Tensors: sigmas (S+1,), latents (S+1, B, C, h, w), nulls (S, B, T, C) if learned, and the conditionings' tensors as
"conditioning.0", "conditioning.0.pooled_output", ... and "negative.0"; "learned.l" (S, B, R, width) and the like are
the vectors of learned words, one a text encoder. The metadata holds one JSON text, "attune".
"""

import hashlib
import json
import math
import re

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .trajectory import LearnedWords, Trajectory

FORMAT = 2  # 1 knows no learned words
AGAIN = "save the trajectory again and choose that file in Attune Load Trajectory"
ANEW = "make it anew with an Attune inversion and connect that to Attune Save Trajectory."
PLAIN = "take the node that sets it out from between CLIP Text Encode and the inversion."
REMEDIES = {  # by how it was made
    "intermediate": "save the source's, and draw the intermediate again with Attune Intermediate.",
    "recorded": "save that of Attune Next Turn where it is an edit, or take the node that sets it out.",
}
HEADER = {"family": str, "latent_format": str, "prediction": str, "weights": list, "method": str}
MAY_BE_UNKNOWN = {"prompt": str, "seed": int}  # what the nodes read of a header beside that
DEPTH = 8  # of lists and dictionaries; Python reads JSON that nests deeper than it can write again
LISTS = ("conditioning", "negative")
LEARNED = "learned."
LONGEST = 16 << 20  # bytes of a file's table and JSON; a thousand steps of long prompts take 3 MB
HIGHEST_SIGMA = 1e6  # ComfyUI's own tables end below 5000
LARGEST = 65504  # in fp16; what is larger ends as NaN in a model of half precision
KINDS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


class _Unfit(Exception):
    """What is wrong with a trajectory, as the middle of a sentence, and for a file its end, what to do."""

    def __init__(self, problem, remedy=AGAIN):
        super().__init__(problem)
        self.remedy = remedy


def packed(trajectory, versions):
    """The bytes of ``trajectory``'s file; ``versions`` (name to text) says with what it is written.

    Raises ValueError for what :func:`load` would refuse, and for a conditioning that holds more than a file can:
    ControlNets, hooks and the like.
    """
    tensors = {"sigmas": trajectory.sigmas, "latents": trajectory.latents}
    if trajectory.nulls is not None:
        tensors["nulls"] = trajectory.nulls
    about = {
        "format": FORMAT if trajectory.learned else 1,
        "versions": versions,
        "steps": trajectory.steps,
        "header": trajectory.header,
        "windows": list(trajectory.windows),
    }
    if words := trajectory.learned:
        tensors |= {LEARNED + name: vectors for name, vectors in words.vectors.items()}
        about["learned"] = {"prompt": words.prompt, "words": words.words, "positions": words.positions}
    for name in LISTS:
        about[name] = []
        for i, (text, extras) in enumerate(getattr(trajectory, name)):
            tensors[f"{name}.{i}"] = text
            plain = {}
            for key, value in extras.items():
                if torch.is_tensor(value) and key in TENSORS:
                    tensors[f"{name}.{i}.{key}"] = value
                elif key in VALUES and VALUES[key](value):
                    plain[key] = value
                else:
                    raise ValueError(
                        f'The TRAJECTORY was made under a conditioning with "{key}" on it, which no file can hold; '
                        + REMEDIES.get(trajectory.header.get("method"), PLAIN)
                    )
            about[name].append(plain)
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    about = json.loads(json.dumps(about))  # tuples become the lists that will be read
    kinds = {kind: name for name, kind in KINDS.items()}
    try:
        _check({k: (kinds.get(v.dtype, str(v.dtype)), tuple(v.shape)) for k, v in tensors.items()}, about)
        _check_values(tensors)
    except _Unfit as problem:
        raise ValueError(f"The TRAJECTORY {problem}; {ANEW}") from problem
    about["digest"] = fingerprint(about, *(part for name in sorted(tensors) for part in (name, tensors[name])))
    content = save(tensors, {"attune": json.dumps(about)})
    if _table(content) > LONGEST:
        raise ValueError(f"The TRAJECTORY has prompts too long for a file; {ANEW}")
    return content


def _table(content):
    """How long a file says that its table and JSON are."""
    return int.from_bytes(content[:8], "little")


def load(path):
    """The :class:`Trajectory` in a file, in fp32. Raises ValueError, in one sentence, for whatever is wrong with it.

    What the file says of itself is checked before any tensor is read.
    """
    try:
        try:
            return _read(path)
        except (OSError, SafetensorError, ValueError, RuntimeError) as problem:
            raise _Unfit("is cut short or no safetensors file") from problem
    except _Unfit as problem:
        raise ValueError(f"The trajectory file {path.name} {problem}; {problem.remedy}.") from problem


def _read(path):
    with path.open("rb") as file:
        if _table(file.read(8)) > LONGEST:
            raise _Unfit("is cut short or no safetensors file")
    with safe_open(path, "pt") as file:
        about = _told((file.metadata() or {}).get("attune"))
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
        _check({name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}, about)
        told, tensors = about.pop("digest", None), {}
        digest = hashlib.sha256()
        _add(digest, about)
        for name in sorted(slices):
            tensor = file.get_tensor(name)
            _add(digest, name)
            _add(digest, tensor)
            # A copy, since what safetensors gives changes with the file.
            tensors[name] = tensor.to(torch.float32, copy=True)
    if told != digest.hexdigest():
        raise _Unfit("was changed after it was saved")
    _check_values(tensors)
    return _build(tensors, about)


def _told(text):
    """The JSON of a file as a dictionary."""
    if text is None:
        raise _Unfit("holds no trajectory")
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise _Unfit("has an unreadable header") from problem
    if not _is_plain(about, DEPTH) or not isinstance(about, dict) or type(about.get("format")) is not int:
        raise _Unfit("has an unreadable header")
    if about["format"] > FORMAT:
        raise _Unfit(
            f"was written by a newer Attune, in format {about['format']:.6g} where this one reads {FORMAT}",
            "update the Attune pack to load it in Attune Load Trajectory",
        )
    return about


def fingerprint(*values):
    """sha256 over tensors and values that JSON holds."""
    digest = hashlib.sha256()
    for value in values:
        _add(digest, value)
    return digest.hexdigest()


def _add(digest, value):
    if torch.is_tensor(value):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        value = value.detach().cpu().contiguous()
        value = value.as_strided((value.numel(),), (1,))  # a single number may have any stride
        # The array is read where it lies; bytes of it would be a copy.
        digest.update(value.view(torch.uint8).numpy())
    else:
        digest.update(json.dumps(value, sort_keys=True).encode())


# ---- checks ------------------------------------------------------------------------------------------------------


def _is_number(value, low=-math.inf, high=math.inf):
    if type(value) not in (int, float) or not low <= value <= high:
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def _is_share(value):
    return _is_number(value, 0, 1)


def _is_text(value):
    return value is None or isinstance(value, str)


def _is_strength(value):
    return _is_number(value, 0, 1000)


# What a text may carry: what ComfyUI's nodes for Stable Diffusion and this pack's put on it, and nothing that is more
# to ComfyUI than a number, such as a ControlNet.
VALUES = {
    "pooled_output": lambda value: value is None,
    **dict.fromkeys(("attune_prompt", "attune_text"), _is_text),
    "attune_seed": lambda value: value is None or type(value) is int,
    **dict.fromkeys(
        ("width", "height", "crop_w", "crop_h", "target_width", "target_height", "aesthetic_score"),
        lambda value: _is_number(value, 0, 1 << 20),
    ),
    **dict.fromkeys(("start_percent", "end_percent"), _is_share),
    **dict.fromkeys(("strength", "mask_strength"), _is_strength),
    "attune_null_cfg": lambda value: _is_number(value, 0, 1000),
    **dict.fromkeys(("set_area_to_bounds", "default"), lambda value: isinstance(value, bool)),
}
# The same of tensors, with a shape each: B pictures, C channels, any number n of texts, and what is None is any.
TENSORS = {
    "pooled_output": ("n", None),
    "mask": ("B", None, None),
    "concat_latent_image": ("B", "C", None, None),
    "concat_mask": ("B", 1, None, None),
}


def _check(parts, about):
    """Raises :class:`_Unfit` where what a file says contradicts itself, or says what :func:`packed` never writes.

    ``parts``: each tensor's name -> (its kind as safetensors calls it, its shape).
    """
    for name, (kind, shape) in parts.items():
        if kind not in KINDS:
            raise _Unfit(f'has values of the kind {kind} in "{name}", where {", ".join(KINDS)} are read')
        if 0 in shape:
            raise _Unfit(f'holds nothing in "{name}"')
    shapes = {name: shape for name, (_, shape) in parts.items()}
    if not _is_header(about.get("header")):
        raise _Unfit("does not say what it was made with")
    sigmas, latents, nulls = (shapes.pop(name, None) for name in ("sigmas", "latents", "nulls"))
    if sigmas is None or len(sigmas) != 1 or sigmas[0] < 2:
        raise _Unfit("holds no noise levels that fall from noise to picture")
    (levels,) = sigmas
    if latents is None or len(latents) != 5 or latents[0] != levels:
        raise _Unfit(f"does not hold one latent for each of its {levels} noise levels")
    if type(about.get("steps")) is not int or about["steps"] not in (levels - 1, levels):
        raise _Unfit("counts its steps wrongly")
    windows, moves, (pictures, channels) = about.get("windows"), levels - 1, latents[1:3]
    rising = isinstance(windows, list) and all(map(_is_share, windows)) and windows == sorted(windows)
    widths = {name: _check_list(name, shapes, about, {"B": pictures, "C": channels}) for name in LISTS}
    whole = rising and len(windows) == levels
    if nulls is not None:
        fits = len(nulls) == 4 and nulls[0] == moves and nulls[1] in (1, pictures)
        if not fits or not whole or len(about["negative"]) != 1 or widths["negative"] != {nulls[3]}:
            raise _Unfit("does not hold one null embedding for each of its steps")
    if len(widths["conditioning"] | widths["negative"]) > 1:
        raise _Unfit("holds texts for several models")
    vectors = [shapes.pop(name) for name in list(shapes) if re.fullmatch(re.escape(LEARNED) + r"\w+", name)]
    if vectors or about.get("learned") is not None:
        if not _are_words(about.get("learned"), vectors, (moves, pictures)):
            raise _Unfit("does not hold one vector for each token of its learned words")
        if not whole or not about["conditioning"]:
            raise _Unfit("does not say at which steps its learned words hold")
    if not rising:
        raise _Unfit("does not say at which steps what was learned holds")
    if shapes:
        raise _Unfit(f'holds "{next(iter(shapes))}", which no trajectory has')


def _is_header(header):
    if not isinstance(header, dict):
        return False
    wanted = HEADER | {key: kind for key, kind in MAY_BE_UNKNOWN.items() if header.get(key) is not None}
    fits = all(type(header.get(key)) is kind for key, kind in wanted.items())
    return fits and _tells_of_model(header) and _is_number(header.get("null_text_guidance", 1))


def _tells_of_model(header):
    """Whether what a header says of weights and sampling are values that two models can be compared by; files of older
    versions say less of them."""
    weights, probes, timesteps = header["weights"], header.get("probes", []), header.get("timesteps", [])
    kind = getattr(torch, str(header.get("dtype", "float32")), None)
    return (
        all(isinstance(one, list) for one in (probes, timesteps))
        and all(v is None or _is_number(v, -1e30, 1e30) for v in [*weights, *probes])
        and all(_is_number(v, -1e30, 1e30) for v in timesteps)
        and ("sampling" in header) == ("timesteps" in header)
        and isinstance(kind, torch.dtype)
        and kind.is_floating_point
    )


def _is_plain(value, depth):
    """Whether JSON holds a value, no deeper than ``depth``, with finite numbers."""
    if isinstance(value, list | dict):
        inside = value if isinstance(value, list) else value.values()
        return depth > 0 and all(_is_plain(one, depth - 1) for one in inside)
    return value is None or isinstance(value, str | bool) or _is_number(value)


def _check_list(name, shapes, about, sizes):
    """Takes a conditioning's tensors out of ``shapes``, and returns how wide its texts are."""
    entries, widths = about.get(name), set()
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise _Unfit(f"holds no readable {name}")
    for i, values in enumerate(entries):
        text = shapes.pop(f"{name}.{i}", ())
        if len(text) != 3:
            raise _Unfit(f"holds no readable {name}")
        widths.add(text[2])
        for key, value in values.items():
            if key not in VALUES or not VALUES[key](value):
                raise _Unfit(f'holds a {name} with a "{key}" that no trajectory has')
        for key, wanted in TENSORS.items():
            shape = shapes.pop(f"{name}.{i}.{key}", None)
            if shape is not None and (key in values or not _fits(shape, wanted, sizes)):
                raise _Unfit(f'holds a {name} with a "{key}" that no trajectory has')
    return widths


def _fits(shape, wanted, sizes):
    def fit(ours, theirs):
        # What holds for all pictures has one row.
        return theirs in (None, "n") or ours == sizes.get(theirs, theirs) or (theirs == "B" and ours == 1)

    return len(shape) == len(wanted) and all(map(fit, shape, wanted))


def _are_words(told, vectors, shape):
    """Whether a file holds one vector for each token, step and picture of the learned words that it tells of."""
    try:
        words, positions = told["words"], told["positions"]
        numbers = [p for at in positions for p in at]
        fits = isinstance(told["prompt"], str) and len(words) == len(positions) and vectors and all(positions)
        fits = fits and all(isinstance(w, str) for w in words) and all(type(p) is int and p > 0 for p in numbers)
        return fits and all(len(v) == 4 and v[:3] == (*shape, len(numbers)) for v in vectors)
    except (TypeError, KeyError):
        return False


def _check_values(tensors):
    """The same for the tensors themselves."""
    sigmas = tensors["sigmas"].float()
    for name, tensor in tensors.items():
        tensor = tensor.float()
        if not tensor.isfinite().all():
            raise _Unfit(f'has values in "{name}" that are no finite numbers (NaN or infinite)')
        if name == "latents":  # a model reads x / sqrt(sigma^2 + 1)
            tensor = tensor.flatten(1).abs().amax(1) / (sigmas.square() + 1).sqrt()
        if name == "sigmas":
            fits = sigmas[0] <= HIGHEST_SIGMA
        elif name.endswith(".mask"):
            fits = tensor.min() >= 0 and tensor.max() <= 1
        else:
            fits = tensor.abs().max() <= LARGEST
        if not fits:
            raise _Unfit(f'has values in "{name}" that are too large for a model')
    if sigmas[-1] < 0 or (sigmas.diff() >= 0).any():
        raise _Unfit("holds no noise levels that fall from noise to picture")


def _build(tensors, about):
    """The Trajectory of tensors and values that were checked."""
    lists = {
        name: [
            [
                tensors[f"{name}.{i}"],
                {**values, **{key: t for key in TENSORS if (t := tensors.get(f"{name}.{i}.{key}")) is not None}},
            ]
            for i, values in enumerate(about[name])
        ]
        for name in LISTS
    }
    learned, vectors = about.get("learned"), {k: t for k, t in tensors.items() if k.startswith(LEARNED)}
    if learned:
        vectors = {name.removeprefix(LEARNED): rows for name, rows in vectors.items()}
        positions = tuple(map(tuple, learned["positions"]))
        learned = LearnedWords(learned["prompt"], tuple(learned["words"]), positions, vectors)
    return Trajectory(
        tensors["sigmas"], tensors["latents"], about["steps"], about["header"], **lists, nulls=tensors.get("nulls"),
        windows=tuple(about["windows"]), learned=learned,
    )  # fmt: skip
