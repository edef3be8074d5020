"""The authors' own code, as it lies in the user's clones, on the demo model. Nothing of theirs is kept in this pack.

Their code is written for older libraries and for a GPU. What stands between is here: the modules that are imported for
show alone are empty, diffusers' attention answers to its older name as well, tokenizer, text encoder and autoencoder
are the host's, and a definition is read out of a notebook without running the notebook.
"""

import ast
import contextlib
import copy
import importlib
import inspect
import io
import json
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import Attention

from ..inversion import host
from . import reference

# Imported at the top of their files, and used to load, show and save pictures, for clusters that are not compared, and
# as the name of a kind, only.
FOR_SHOW = ("cv2", "IPython", "IPython.display", "pytorch_lightning", "matplotlib", "matplotlib.pyplot",
            "matplotlib.backends", "matplotlib.backends.backend_agg", "tqdm.notebook", "sklearn", "sklearn.cluster",
            "sklearn.decomposition", "sklearn.metrics", "sklearn.metrics.cluster",
            "diffusers.models.cross_attention")  # fmt: skip
SAME = 1e-4  # of the latents' size; rounding leaves a tenth of it
LEARNED = 2e-2  # what Adam learns: its first steps are the gradient's sign, which rounding turns where it is nearly 0
SCALE = 0.18215  # what they have latents times, in their autoencoder's own scale
REPOSITORIES = {
    "prompt-to-prompt": "https://github.com/google/prompt-to-prompt",
    "MasaCtrl": "https://github.com/TencentARC/MasaCtrl",
    "EasyNLP": "https://github.com/alibaba/EasyNLP",
    "PnPInversion": "https://github.com/cure-lab/PnPInversion",
    "DPL": "https://github.com/wangkai930418/DPL",
    "T2I-Adapter": "https://github.com/TencentARC/T2I-Adapter",
}
BRANCHES = {"T2I-Adapter": "SD"}  # where it is not the one that a clone starts on


@dataclass(frozen=True)
class Check:
    """One row. ``measure(number)`` gives, for the held-out scene ``number``, the pack's latents, theirs, and what
    theirs are without the method or None, each (1, 4, h, w) or other tensors of one shape, and the trajectory to
    decode them by, or None. ``departs``: why they must not be the same."""

    method: str
    compared: str
    measure: object
    departs: str = ""
    bound: float = SAME


def find(folder):
    """Name -> folder of every clone of :data:`REPOSITORIES` in ``folder``, whose name is the repository's."""
    return {name: Path(folder) / name for name in REPOSITORIES if (Path(folder) / name).is_dir()}


def commit(folder):
    """The commit of a clone, or of the branch of it that is read, ten digits; "unknown commit" where there is no git
    or no history."""
    branch = BRANCHES.get(Path(folder).name)
    asked = ("HEAD",) if branch is None else (branch, f"origin/{branch}", "HEAD")
    found = (_git(folder, "rev-parse", "--short=10", "--verify", "--quiet", name) for name in asked)
    return next((number.strip() for number in found if number), "unknown commit")


def _git(folder, *command):
    """What git says in a clone; "" where it fails or is not there."""
    try:
        return subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def file_of(folder, path):
    """The text of a file of a clone, of the branch of :data:`BRANCHES` whatever branch is checked out, else as it lies
    there; "" if there is none."""
    branch = BRANCHES.get(Path(folder).name)
    shown = (_git(folder, "show", f"{name}:{path}") for name in (branch, f"origin/{branch}"))
    lying = Path(folder) / path
    return next(filter(None, shown), "") or (lying.read_text(encoding="utf-8") if lying.is_file() else "")


def read_classes(text, name, **names):
    """The functions and classes of a file's ``text``, and what it imports as far as that is there; ``names`` are there
    too. Nothing else in it is run."""
    space = dict(names)
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.ClassDef | ast.FunctionDef):
            # What cannot be imported here is of their training, and whoever asks for it fails then.
            with contextlib.suppress(ImportError):
                exec(compile(ast.Module([node], []), name, "exec"), space)  # noqa: S102 - the user's own clone
    return SimpleNamespace(**{key: value for key, value in space.items() if key.isidentifier()})


class _Anything(types.ModuleType):
    """A module of which every name can be imported."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: args[0] if args else None


@contextlib.contextmanager
def opened(folder):
    """Inside, modules come from ``folder`` first, whatever the host calls by the same name, and theirs are forgotten
    afterwards: several repositories have a ``utils``, as the host has."""
    own = {path.stem for path in Path(folder).iterdir() if path.is_dir() or path.suffix == ".py"}
    hidden = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in own}
    before, shown = set(sys.modules), [name for name in FOR_SHOW if not _importable(name)]
    for name in hidden:
        del sys.modules[name]
    sys.modules.update((name, _Anything(name)) for name in shown)
    # A folder without __init__.py would give way to a module of that name anywhere else.
    for place in Path(folder).iterdir():
        if place.is_dir() and place.name.isidentifier() and not (place / "__init__.py").is_file():
            sys.modules[place.name] = types.ModuleType(place.name)
            sys.modules[place.name].__path__ = [str(place)]
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before | set(shown) | set(hidden):
            if name.partition(".")[0] in own or name in shown:
                sys.modules.pop(name, None)
        sys.modules.update(hidden)


def _importable(name):
    try:
        return name in sys.modules or importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def read(folder, *names):
    """Their modules of these names."""
    with opened(folder), quiet():
        return [importlib.import_module(name) for name in names]


def read_notebook(path, folder, **names):
    """What a notebook defines, as a namespace: its imports, functions and classes, and ``names`` in place of whatever
    else its cells would set. Nothing else in it is run."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    space = dict(names)
    with opened(folder), quiet():
        for cell in cells:
            source = "".join(cell["source"]) if cell["cell_type"] == "code" else ""
            try:
                kept = [
                    node
                    for node in ast.parse(source).body
                    if isinstance(node, ast.Import | ast.ImportFrom | ast.ClassDef | ast.FunctionDef)
                ]
            except SyntaxError:  # a line for the notebook itself, not Python
                continue
            exec(compile(ast.Module(kept, []), str(path), "exec"), space)  # noqa: S102 - the user's own clone
    space.update(names)
    return SimpleNamespace(**{name: value for name, value in space.items() if name.isidentifier()}, space=space)


@contextlib.contextmanager
def older(*names):
    """Inside, libraries have what they had once: ``names`` are (module, name, what it is). What they have by that name
    stays."""
    lent = [(module, name) for module, name, _ in names if not hasattr(module, name)]
    for module, name, thing in names:
        if (module, name) in lent:
            setattr(module, name, thing)
    try:
        yield
    finally:
        for module, name in lent:
            delattr(module, name)


@contextlib.contextmanager
def on_the_cpu():
    """Inside, a tensor that is sent to the GPU stays where it is."""
    kept = torch.Tensor.cuda
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor
    try:
        yield
    finally:
        torch.Tensor.cuda = kept


@contextlib.contextmanager
def quiet():
    """Inside, what they print and their progress bars are dropped."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def fit(function, *args, **settings):
    """Call with those of the ``settings`` that it takes: copies of one class differ in what they ask for."""
    taken = inspect.signature(function).parameters
    return function(*args, **{name: value for name, value in settings.items() if name in taken})


# ---- the model, as they expect it ------------------------------------------------------------------------------------


class CrossAttention(Attention):
    """diffusers' attention under its older name, with the older names of two methods and of two arguments."""

    def __call__(self, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        return self.forward(hidden_states, context=encoder_hidden_states, mask=attention_mask)

    def forward(self, x, context=None, mask=None):
        return super().forward(x, encoder_hidden_states=context, attention_mask=mask)

    def reshape_heads_to_batch_dim(self, tensor):
        return self.head_to_batch_dim(tensor)

    def reshape_batch_dim_to_heads(self, tensor):
        return self.batch_to_head_dim(tensor)


def name_attention(unet, kind):
    """The same UNet as before any of their code, its attention of the class ``kind``."""
    for module in unet.modules():
        if isinstance(module, Attention):
            module.__dict__.pop("forward", None)
            module.__class__ = kind
    return unet


class Scheduler(DDIMScheduler):
    """Takes the offset that an older version asked for at this place, and has its own from the start."""

    def set_timesteps(self, num_inference_steps, device=None, offset=None):
        super().set_timesteps(num_inference_steps, device)


class Autoencoder:
    """Keeps the last latents (B, 4, h, w) that were to be decoded, and decodes nothing."""

    last = None

    def decode(self, latents):
        self.last = latents * SCALE
        height, width = (host.PIXELS * size for size in latents.shape[-2:])
        return {"sample": torch.zeros(len(latents), 3, height, width)}


def model(bench, unet, kind, grid, steps):
    """What their functions call ``model`` or ``pipe``: UNet (attention of the class ``kind``), scheduler on
    ``grid`` (:data:`reference.OFFSET_0` or OFFSET_1), and the host's tokenizer and text encoder."""
    scheduler = Scheduler.from_config(reference.scheduler(grid, steps).config)
    scheduler.set_timesteps(steps)
    tokenizer = bench.clip.tokenizer
    words = copy.deepcopy(getattr(tokenizer, tokenizer.clip).tokenizer)
    words.model_max_length = 77  # what they pad to; the host's does not say
    key = next(iter(bench.clip.tokenize("")))

    def encode(ids):
        with torch.no_grad():
            rows = [bench.clip.encode_from_tokens({key: [[(int(i), 1.0) for i in row]]}) for row in ids]
        return (torch.cat(rows).float(),)

    return SimpleNamespace(
        unet=name_attention(unet, kind),
        scheduler=scheduler,
        vae=Autoencoder(),
        vqvae=None,
        tokenizer=words,
        text_encoder=encode,
        device=torch.device("cpu"),
    )


def init_latent(latent, model, height, width, generator, batch_size):
    """Their function of this name, for latents of any size: theirs is told 512 pixels."""
    return latent, latent.expand(batch_size, -1, -1, -1)
