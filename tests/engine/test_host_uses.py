"""tests/host_uses.md lists all that the pack uses of ComfyUI, and the ComfyUI at hand has it."""

import ast
import collections
import contextlib
import hashlib
import importlib.util
import inspect
import os
import pathlib
import re

import pytest
import safetensors
import torch

from attune.tests import host

TABLE = host.ROOT / "tests" / "host_uses.md"
# What is called by name there, and where attributes and keys are the host's as well.
NODES = ["__init__.py", *(f"nodes/{path.name}" for path in sorted((host.ROOT / "nodes").glob("*.py")))]
SPEAKERS = ["attention_patches/host.py", "inversion/host.py", "demo/model.py"]
MODULES = {
    "comfy", "comfy_api", "comfy_execution", "comfy_extras", "comfyui_version", "execution", "folder_paths",
    "latent_preview", "nodes", "server",
}  # fmt: skip
# Keys that stay inside the pack or go into its files, one of sys.modules, and an attribute that the pack gives a UNet.
OURS = {"server", "adapter_channels", "attune", "comfyui", "torch", "family", "latent_format", "prediction", "weights"}
OURS |= {"sampling", "timesteps", "dtype", "probes"}
KINDS = (
    str, list, dict, set, pathlib.Path, collections.Counter, contextlib.ExitStack, safetensors.safe_open, torch.Tensor,
    torch.dtype, torch.nn.Linear(1, 1), torch.nn.GroupNorm, type, inspect.Parameter, hashlib.sha256(), os.stat_result,
)  # fmt: skip


def rows():
    """(what is used, the files, the releases) of each line of the table."""
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            use, where, _, checked = (cell.strip() for cell in line.strip("|").split("|"))
            yield use.strip("`"), re.findall(r"`(.+?)`", where), checked.split(", ")


ROWS = list(rows())


def syntax(path):
    return list(ast.walk(ast.parse((host.ROOT / path).read_text(encoding="utf-8"))))


def imported(tree):
    """Name in the file -> the module or what is imported from it."""
    names = {}
    for node in tree:
        if isinstance(node, ast.Import):
            names |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names
            }
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def dotted(node, names):
    """An expression such as comfy.samplers.KSampler in full, None for one that does not begin with an import."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    start = dotted(node.value, names) if isinstance(node, ast.Attribute) else None
    return start and f"{start}.{node.attr}"


def names_used(path):
    """The host's functions, classes and constants that a file names, each as long as it is written."""
    tree = syntax(path)
    names = imported(tree)
    full = {dotted(node, names): node for node in tree if isinstance(node, ast.Attribute | ast.Name)}
    inner = {dotted(node.value, names) for node in full.values() if isinstance(node, ast.Attribute)}
    return {name for name in full.keys() - inner - {None} if name.split(".")[0] in MODULES}


def own_names():
    """Every function, class, field and attribute that the pack makes itself."""
    for folder in ("attention_patches", "inversion", "demo"):
        for path in (host.ROOT / folder).glob("*.py"):
            for node in syntax(path):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    yield node.name
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    yield node.target.id
                elif isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "self":
                    yield node.attr


def attributes_used(path):
    """Attributes in a file that are neither Python's, nor PyTorch's, nor the pack's own: so they are the host's."""
    tree = syntax(path)
    names = imported(tree)
    found = {node.attr for node in tree if isinstance(node, ast.Attribute) and not dotted(node, names)}
    return found - {name for kind in KINDS for name in dir(kind)} - set(own_names()) - OURS


def keys_used(path):
    """The keys that a file reads or writes in dictionaries."""
    for node in syntax(path):
        if isinstance(node, ast.Subscript):
            keys = [node.slice]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) in ("get", "pop"):
            keys = node.args[:1]
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
            keys = [node.left]
        else:
            keys = node.keys if isinstance(node, ast.Dict) else []
        yield from (key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str))


def written(path):
    """Every name and text that stands in a file."""
    tree = syntax(path)
    found = {getattr(node, "attr", None) or getattr(node, "id", None) for node in tree}
    found |= {node.value for node in tree if isinstance(node, ast.Constant)}
    return found | {part for name in imported(tree).values() for part in name.split(".")}


def last(use):
    return use.split('"')[1] if '"' in use else use.rsplit(".", 1)[-1]


@pytest.mark.parametrize("path", NODES + SPEAKERS)
def test_what_a_file_uses_is_listed(path):
    listed = {use for use, files, _ in ROWS if path in files or ("nodes/" in files and path in NODES)}
    assert names_used(path) <= listed
    if path in SPEAKERS:
        assert attributes_used(path) <= set(map(last, listed))
    if path in SPEAKERS[:2]:
        assert set(keys_used(path)) - OURS <= {last(use) for use in listed if '"' in use}


@pytest.mark.parametrize("path", SPEAKERS)
def test_what_is_listed_is_still_used(path):
    assert {last(use) for use, files, _ in ROWS if path in files} <= written(path)


def test_what_is_listed_of_the_nodes_is_still_used():
    assert {last(use) for use, files, _ in ROWS if "nodes/" in files} <= set().union(*map(written, NODES))


def place(use):
    """The module that a use begins with, and the rest of it."""
    parts = use.split(".")
    for count in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(".".join(parts[:count])), parts[count:]
    raise AssertionError(f"this ComfyUI has no module {parts[0]}")


def has(use):
    if '"' in use:  # not imported, since the server's module alone would make the pack take it for a server
        module, key = re.fullmatch(r'([\w.]+): "(.+)"', use).groups()
        source = pathlib.Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
        return re.search(rf"""["']{key}["']|\b{key} ?[=(]""", source)
    found, rest = place(use)
    for count, name in enumerate(rest, 1):
        if not hasattr(found, name):
            # What an object gets when it is made, and is so at the end.
            made = inspect.isclass(found) and count == len(rest)
            sources = (inspect.getsource(c) for c in inspect.getmro(found) if c.__module__.split(".")[0] in MODULES)
            own = rf"""\b(self|{found.__name__})\.{name}\b|["']{name}["']"""
            return made and any(re.search(own, source) for source in sources)
        found = getattr(found, name)
    return True


def test_this_comfyui_has_all_that_is_listed():
    """On a release that is not named in the table everything is looked for."""
    release = str(host.Host.current())
    known = {version for _, _, checked in ROWS for version in checked}
    wanted = [use for use, _, checked in ROWS if release in checked or release not in known]
    assert len(wanted) > 100 and not [use for use in wanted if not has(use)]
