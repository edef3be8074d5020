"""The door of every node: what its schema promises of an input is checked here, before the node sees it.

ComfyUI checks values that are typed on a node, but lets NaN through, and what is on no list of choices, and all that
comes by a link. What one input has to do with another stays with the node.
"""

import functools
import inspect
import math
import numbers
import reprlib
from typing import NamedTuple

import torch

from ..attention_patches.refinement import Refinement
from ..inversion.trajectory import Trajectory
from ..inversion.turns import Turns
from ..messages import legible_errors


def guarded(node):
    """The node class, whose ``execute`` is reached by what its schema promises only; for all else it raises ValueError.

    Numbers arrive as the kind that is promised, masks of any rank as (B, H, W), fp32 in 0..1. What is raised is
    legible. Inputs that the node's own ``validate_inputs`` names are its own to check, as ComfyUI has it, too.
    """
    # No base class does this, since ComfyUI derives classes from the node for each run and would have it done again.
    node.execute = classmethod(_checked(node, node.execute.__func__))
    if "fingerprint_inputs" in vars(node):
        node.fingerprint_inputs = classmethod(_told(node.fingerprint_inputs.__func__))
    return node


def _checked(node, execute):
    signature = inspect.signature(execute)

    @functools.wraps(execute)
    def checked(cls, *args, **kwargs):
        given = signature.bind(cls, *args, **kwargs)
        name, promised = _promises(node)
        for key, value in list(given.arguments.items()):
            if key in promised and value is None and promised[key].optional:
                del given.arguments[key]  # as if nothing had come
            elif key in promised:
                given.arguments[key] = _admitted(value, promised[key], name)
        return execute(*given.args, **given.kwargs)

    return _told(checked)


def _told(method):
    @functools.wraps(method)
    def told(*args, **kwargs):
        with legible_errors():
            return method(*args, **kwargs)

    return told


@functools.cache
def _promises(node):
    """A node's display name, and its inputs by id."""
    schema = node.define_schema()
    own = inspect.signature(node.validate_inputs).parameters if "validate_inputs" in vars(node) else ()
    return schema.display_name, {one.id: one for one in schema.inputs if one.id not in own}


def _admitted(value, wanted, node):
    """``value`` as the input ``wanted`` of ``node`` promises it. Raises ValueError."""
    kind = str(wanted.get_io_type())
    if kind in WIDGETS:
        read, remedy = functools.partial(WIDGETS[kind], wanted=wanted), "change it there, or in the node linked to it"
    else:
        socket = SOCKETS[kind]
        if value is None or socket.hollow(value):
            kind = kind.removeprefix("ATTUNE_")
            raise ValueError(f"The {kind} is empty{socket.why}; connect {socket.source} to {wanted.id} of {node}.")
        read, remedy = socket.read, f"connect {socket.source} there"
    try:
        return read(value)
    except _Unfit as needed:
        text = f"The input {wanted.id} of {node} is {_shown(value)}, but needs {needed}; {remedy}."
    raise ValueError(text)


def _shown(value):
    if torch.is_tensor(value):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, numbers.Number | list | tuple | dict):
        return reprlib.repr(value)
    return "empty" if value is None else f"a {type(value).__name__}"


class _Unfit(Exception):
    """What is needed in the place of a value."""


# ---- widgets -----------------------------------------------------------------------------------------------------


def _number(value, wanted, kind):
    # NaN is in no range.
    if not isinstance(value, numbers.Real) or not wanted.min <= value <= wanted.max or kind(value) != value:
        least, most = (f"{n:g}" if isinstance(n, float) else n for n in (wanted.min, wanted.max))
        raise _Unfit(f"a {'whole ' * (kind is int)}number from {least} to {most}")
    return kind(value)


def _boolean(value, wanted):
    if not isinstance(value, numbers.Real) or value not in (0, 1):
        raise _Unfit("true or false")
    return bool(value)


def _text(value, wanted):
    if not isinstance(value, str):
        raise _Unfit("a text")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise _Unfit("a text in which every letter and emoji is whole")
    return value


def _choice(value, wanted):
    if value not in wanted.options:
        raise _Unfit(f"one of: {', '.join(wanted.options)}")
    return value


WIDGETS = {
    "INT": functools.partial(_number, kind=int),
    "FLOAT": functools.partial(_number, kind=float),
    "BOOLEAN": _boolean,
    "STRING": _text,
    "COMBO": _choice,
}


# ---- sockets -----------------------------------------------------------------------------------------------------


def _read(what, test):
    def read(value):
        if not test(value):
            raise _Unfit(what)
        return value

    return read


def _can(*abilities):
    """A test for what other packs may have a class of their own for: it is known by what it can do."""
    return lambda value: all(hasattr(value, one) for one in abilities)


def _is_latent(value):
    return isinstance(value, dict) and torch.is_tensor(value.get("samples")) and not value["samples"].is_nested


def _is_conditioning(value):
    pairs = value if isinstance(value, list) else []
    return bool(pairs) and all(
        isinstance(pair, list | tuple) and [type(one) for one in pair[1:]] == [dict] and _is_text(pair[0])
        for pair in pairs
    )


def _is_text(value):
    return torch.is_tensor(value) and value.ndim == 3 and value.numel() and bool(value.isfinite().all())


def _are_sigmas(value):
    return torch.is_tensor(value) and value.ndim == 1 and bool(value.isfinite().all())


def _image(value):
    if not torch.is_tensor(value) or value.ndim != 4 or not 1 <= value.shape[3] <= 4:
        raise _Unfit("an IMAGE of (count, height, width, 1 to 4) values")
    if not value.numel():
        raise _Unfit("an IMAGE of at least one picture")
    _bounds(value, "an IMAGE")
    return value


def _mask(value):
    if not torch.is_tensor(value) or value.ndim < 2 or not value.numel():
        raise _Unfit("a MASK of (count, height, width) values")
    value = value.reshape(-1, *value.shape[-2:]).float()
    low, high = _bounds(value, "a MASK")
    return value if low >= 0 and high <= 1 else value.clamp(0, 1)


def _bounds(value, what):
    """The least and the greatest value of a tensor."""
    bounds = [float(bound) for bound in value.aminmax()]  # which is NaN where any is
    if not all(map(math.isfinite, bounds)):
        raise _Unfit(f"{what} without NaN and infinities")
    return bounds


class Socket(NamedTuple):
    """``read`` gives what came or raises _Unfit; ``source`` is what to connect, ``why`` it may be empty, and ``hollow``
    tells what is as good as nothing."""

    read: callable
    source: str
    why: str = ""
    hollow: callable = lambda value: False


SOCKETS = {
    "MODEL": Socket(_read("a MODEL", _can("model", "model_options", "clone")), "a checkpoint's model"),
    "CLIP": Socket(
        _read("a CLIP", _can("tokenize", "encode_from_tokens_scheduled")),
        "Load CLIP or a checkpoint that has one",
        ", since the checkpoint has no text encoder",
    ),
    "VAE": Socket(
        _read("a VAE", _can("encode", "decode")),
        "Load VAE or a checkpoint that has one",
        ", since the checkpoint has none",
        lambda value: getattr(value, "first_stage_model", value) is None,
    ),
    "CONTROL_NET": Socket(_read("a CONTROL_NET", _can("copy", "set_cond_hint")), "Load ControlNet Model"),
    "SAMPLER": Socket(_read("a SAMPLER", _can("sample")), "KSamplerSelect"),
    "SIGMAS": Socket(_read("SIGMAS that are finite numbers", _are_sigmas), "a scheduler"),
    "LATENT": Socket(_read("a LATENT of pictures", _is_latent), "VAE Encode or a sampler"),
    "CONDITIONING": Socket(_read("a CONDITIONING of texts without NaN", _is_conditioning), "CLIP Text Encode"),
    "MASK": Socket(_mask, "a mask"),
    "IMAGE": Socket(_image, "an image"),
    "ATTUNE_TRAJECTORY": Socket(
        _read("a TRAJECTORY", lambda value: isinstance(value, Trajectory)), "an Attune inversion"
    ),
    "ATTUNE_TURNS": Socket(_read("TURNS", lambda value: isinstance(value, Turns)), "Attune Next Turn"),
    "ATTUNE_REFINEMENT": Socket(
        _read("a REFINEMENT", lambda value: isinstance(value, Refinement)), "Attune Mask Refinement"
    ),
}
