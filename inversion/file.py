"""A trajectory as one safetensors file. Nothing in it is ever executed, and every value of it is checked.

Tensors: sigmas (S+1,), latents (S+1, B, C, h, w), nulls (S, B, T, C) if learned, and the conditionings' tensors as
"conditioning.0", "conditioning.0.pooled_output", ... and "negative.0"; "learned.l" (S, B, R, width) and the like are
the vectors of learned words, one a text encoder. The metadata holds one JSON text, "attune".
"""

import hashlib
import json
import math

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .trajectory import LearnedWords, Trajectory

FORMAT = 2  # 1 knows no learned words
AGAIN = "save the trajectory again and choose that file in Attune Load Trajectory"
PLAIN = "take the node that sets it out from between CLIP Text Encode and the inversion."
REMEDIES = {  # by how it was made
    "intermediate": "save the source's, and draw the intermediate again with Attune Intermediate.",
    "recorded": "save that of Attune Next Turn where it is an edit, or take the node that sets it out.",
}
HEADER = {"family": str, "latent_format": str, "prediction": str, "weights": list, "method": str}
LISTS = ("conditioning", "negative")
LEARNED = "learned."


class _Unfit(Exception):
    """What is wrong with a file, as the middle of a sentence, and its end, what to do."""

    def __init__(self, problem, remedy=AGAIN):
        super().__init__(f"{problem}; {remedy}")


def save(trajectory, path, versions):
    """Writes ``trajectory``; ``versions`` (name to text) says with what. Raises ValueError for a conditioning that
    holds more than a file can: ControlNets, hooks, masks and the like."""
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
                if torch.is_tensor(value):
                    tensors[f"{name}.{i}.{key}"] = value
                elif value is None or isinstance(value, str | int | float | bool):
                    plain[key] = value
                else:
                    raise ValueError(
                        f'The TRAJECTORY was made under a conditioning with "{key}" on it, which no file can hold; '
                        + REMEDIES.get(trajectory.header.get("method"), PLAIN)
                    )
            about[name].append(plain)
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    about = json.loads(json.dumps(about))  # tuples become the lists that will be read
    about["digest"] = _digest(about, tensors)
    save_file(tensors, path, {"attune": json.dumps(about)})


def load(path):
    """The :class:`Trajectory` in a file. Raises ValueError, in one sentence, for whatever is wrong with it."""
    try:
        tensors, about = _read(path)
        return _build(tensors, about)
    except _Unfit as problem:
        raise ValueError(f"The trajectory file {path.name} {problem}.") from problem


def _read(path):
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dictionary
            text = (file.metadata() or {}).get("attune")
    except (OSError, SafetensorError, ValueError, RuntimeError) as problem:
        raise _Unfit("is cut short or no safetensors file") from problem
    if text is None:
        raise _Unfit("holds no trajectory")
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise _Unfit("has an unreadable header") from problem
    if not isinstance(about, dict) or not isinstance(about.get("format"), int):
        raise _Unfit("has an unreadable header")
    if about["format"] > FORMAT:
        raise _Unfit(
            f"was written by a newer Attune, in format {about['format']} where this one reads {FORMAT}",
            "update the Attune pack to load it in Attune Load Trajectory",
        )
    if about.pop("digest", None) != _digest(about, tensors):
        raise _Unfit("was changed after it was saved")
    return tensors, about


def _digest(about, tensors):
    """One fingerprint of all that is in the file."""
    return fingerprint(about, *(part for name in sorted(tensors) for part in (name, tensors[name])))


def fingerprint(*values):
    """sha256 over tensors and values that JSON holds."""
    digest = hashlib.sha256()
    for value in values:
        if torch.is_tensor(value):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(json.dumps(value, sort_keys=True).encode())
    return digest.hexdigest()


def _build(tensors, about):
    """Checks what a file says against itself: whoever can write the file can write its digest too."""
    header, steps, windows = about.get("header"), about.get("steps"), about.get("windows")
    if not isinstance(header, dict) or not all(isinstance(header.get(k), kind) for k, kind in HEADER.items()):
        raise _Unfit("does not say what it was made with")
    if not _tells_of_model(header):
        raise _Unfit("does not say what it was made with")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise _Unfit(f'has values in "{name}" that are no finite numbers')
    sigmas, latents, nulls = (tensors.get(k) for k in ("sigmas", "latents", "nulls"))
    if sigmas is None or sigmas.ndim != 1 or len(sigmas) < 2 or sigmas[-1] < 0 or (sigmas.diff() >= 0).any():
        raise _Unfit("holds no noise levels that fall from noise to picture")
    if latents is None or latents.ndim != 5 or len(latents) != len(sigmas) or latents.numel() == 0:
        raise _Unfit(f"does not hold one latent for each of its {len(sigmas)} noise levels")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps not in (len(sigmas) - 1, len(sigmas)):
        raise _Unfit("counts its steps wrongly")
    lists = {name: _conditioning(name, tensors, about) for name in LISTS}
    moves, pictures = len(sigmas) - 1, latents.shape[1]
    rising = isinstance(windows, list) and len(windows) == moves + 1 and all(map(_is_share, windows))
    rising = rising and windows == sorted(windows)
    if nulls is not None:
        fits = nulls.ndim == 4 and len(nulls) == moves and nulls.shape[1] in (1, pictures)
        if not fits or not rising or len(lists["negative"]) != 1:
            raise _Unfit("does not hold one null embedding for each of its steps")
    vectors = {name.removeprefix(LEARNED): t for name, t in tensors.items() if name.startswith(LEARNED)}
    learned = _learned(about.get("learned"), vectors, (moves, pictures))
    if learned and not (rising and lists["conditioning"]):
        raise _Unfit("does not say at which steps its learned words hold")
    return Trajectory(
        sigmas.float(), latents.float(), steps, header, **lists, nulls=nulls, windows=tuple(windows or ()),
        learned=learned,
    )  # fmt: skip


def _tells_of_model(header):
    """Whether what a header says of weights and sampling are values that two models can be compared by; files of older
    versions say less of them."""
    lists = header["weights"], header.get("probes", []), header.get("timesteps", [])
    kind = getattr(torch, str(header.get("dtype", "float32")), None)
    return (
        all(isinstance(one, list) for one in lists)
        and all(v is None or isinstance(v, int | float) and abs(v) < 1e30 for v in [*lists[0], *lists[1]])
        and all(isinstance(v, int | float) and abs(v) < 1e30 for v in lists[2])
        and ("sampling" in header) == ("timesteps" in header)
        and isinstance(kind, torch.dtype)
        and kind.is_floating_point
    )


def _learned(told, vectors, shape):
    """The learned words that a file tells of, or None where it tells of none."""
    if told is None and not vectors:
        return None
    try:
        words, positions = tuple(told["words"]), tuple(map(tuple, told["positions"]))
        numbers = [p for at in positions for p in at]
        fits = isinstance(told["prompt"], str) and len(words) == len(positions) and vectors and all(positions)
        fits = fits and all(isinstance(w, str) for w in words) and all(type(p) is int and p > 0 for p in numbers)
        fits = fits and all(v.ndim == 4 and v.shape[:3] == (*shape, len(numbers)) for v in vectors.values())
    except (TypeError, KeyError):
        fits = False
    if not fits:
        raise _Unfit("does not hold one vector for each token of its learned words")
    return LearnedWords(told["prompt"], words, positions, vectors)


def _is_share(value):
    return isinstance(value, int | float) and math.isfinite(value) and 0 <= value <= 1


def _conditioning(name, tensors, about):
    entries = about.get(name)
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise _Unfit(f"holds no readable {name}")
    out = []
    for i, plain in enumerate(entries):
        text = tensors.get(f"{name}.{i}")
        if text is None or text.ndim != 3:
            raise _Unfit(f"holds no readable {name}")
        prefix = f"{name}.{i}."
        out.append([text, {**plain, **{k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}}])
    return out
