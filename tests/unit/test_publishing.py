"""What the registry and ComfyUI-Manager make of the repository: the archive, its description, and the nodes' ids."""

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

from attune import dev
from attune.benchmark import emblem
from attune.tests import host
from attune.tests.archive import packed, tracked

ROOT = host.ROOT
toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
PROJECT = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETTINGS = PROJECT["tool"]["comfy"]
# What a ComfyUI consists of besides the packages that its requirements name.
HOST = {"comfy", "comfy_api", "comfy_execution", "comfyui_version", "folder_paths", "latent_preview", "nodes"}
LARGEST = 40e6  # bytes: the demo model, its adapter and a few megabytes of pictures


@pytest.fixture(scope="module")
def archive():
    return packed()


def syntax(path):
    return ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))


def imports(path):
    """(module, its names, how many folders up) of each import in a file."""
    for node in syntax(path):
        if isinstance(node, ast.Import):
            yield from ((alias.name, (), 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", [alias.name for alias in node.names], node.level


def reached(path="__init__.py", known=None):
    """The pack's files that ComfyUI runs, from the first on."""
    known = {} if known is None else known
    if path in known or not (ROOT / path).is_file():
        return known
    known[path] = None
    for module, names, level in imports(path):
        if level:
            folder = (Path(path).parents[level - 1] / module.replace(".", "/")).as_posix()
            reached(f"{folder}.py", known)
            for inside in ("__init__", *names):
                reached(f"{folder}/{inside}.py", known)
    return known


def test_the_archive_has_the_modules_that_run_and_no_others(archive):
    assert {path for path in archive if path.endswith(".py")} == set(reached())


def test_what_is_shown_and_loaded_is_in_the_archive(archive):
    folders = ("locales/", "subgraphs/", "web/", "workflows/")
    assert {path for path in tracked() if path.startswith(folders)} <= archive
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "demo/MODEL_CARD.md"} <= archive
    loaded = {value for node in syntax("demo/model.py") if isinstance(node, ast.Constant) and (value := node.value)}
    weights = {path for path in archive if path.endswith(".safetensors")}
    assert len(weights) == 2 and {Path(path).name for path in weights} <= loaded


def test_the_font_is_in_the_archive_with_its_licence(archive):
    fonts = {path for path in archive if path.endswith((".ttf", ".ttc", ".otf", ".woff2"))}
    loaded = {node.value for node in syntax("nodes/sheet.py") if isinstance(node, ast.Constant)}
    assert fonts and {Path(path).name for path in fonts} <= loaded
    for path in fonts:
        licence = Path(path).with_name("LICENSE.txt").as_posix()
        assert licence in archive and Path(path).name in (ROOT / licence).read_text(encoding="utf-8")


def test_nothing_of_the_workshop_is_in_the_archive(archive):
    known = {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "__init__.py", "attention_patches", "demo"}
    known |= {"inversion", "locales", "messages.py", "nodes", "subgraphs", "web", "workflows"}
    assert {path.split("/")[0] for path in archive} <= known
    assert sum((ROOT / path).stat().st_size for path in archive) < LARGEST


def test_every_line_of_comfyignore_names_one_thing_at_the_top(archive):
    """A name without its first slash would leave out its namesakes in subfolders too, as docs/ does to web/docs/."""
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    for line in lines:
        if not line.startswith("#"):
            assert line.startswith("/") and not set("*?[!") & set(line), line
            assert any(f"/{path}".startswith(line) for path in tracked()), f"{line} is of nothing any more"


def test_names_in_the_archive_survive_every_system(archive):
    """Windows has no others, and git quotes letters beyond ASCII, so that `comfy node pack` does not find the file."""
    assert not [path for path in archive if not re.fullmatch(r"[\w .,'()/-]+", path, re.ASCII)]
    assert len({path.lower() for path in archive}) == len(archive)


def test_comfyui_brings_every_package_that_is_imported():
    assert PROJECT["project"]["dependencies"] == [] and not (ROOT / "requirements.txt").exists()
    used = {module.split(".")[0] for path in reached() for module, _, level in imports(path) if not level}
    used = {"pillow" if name == "PIL" else name for name in used - HOST - sys.stdlib_module_names}
    for release in host.Host.every():
        text = (release.path / "requirements.txt").read_text(encoding="utf-8")
        assert used <= {re.match(r"[\w-]*", line)[0].lower() for line in text.splitlines()}, release


# ---- the registry's fields ---------------------------------------------------------------------------------------


def test_the_registry_reads_what_is_meant():
    """The limits are those of its specification and of comfy-cli, which drops what it does not understand."""
    project = PROJECT["project"]
    name = project["name"]
    assert re.fullmatch(r"[a-z]+([._-][a-z0-9]+)*", name) and len(name) < 100 and "comfy" not in name
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["description"].isascii() and len(project["description"]) < 200
    assert SETTINGS["requires-comfyui"] == f">={dev.OLDEST}"
    assert set(SETTINGS) == {"PublisherId", "DisplayName", "Icon", "Banner", "requires-comfyui"}
    systems = {"OS Independent"}
    devices = {"GPU :: NVIDIA CUDA", "GPU :: AMD ROCm", "GPU :: Intel Arc", "GPU :: Apple Metal"}
    known = {f"Operating System :: {one}" for one in systems} | {f"Environment :: {one}" for one in devices}
    assert set(project["classifiers"]) == known
    assert set(project["urls"]) == {"Homepage", "Repository", "Documentation", "Issues"}
    assert all(url.startswith(project["urls"]["Repository"]) for url in project["urls"].values())


def test_licence_and_version_are_the_same_everywhere():
    assert PROJECT["project"]["license"] == "GPL-3.0-or-later"
    assert "GNU GENERAL PUBLIC LICENSE\n                       Version 3" in (ROOT / "LICENSE").read_text(
        encoding="utf-8"
    )
    version = PROJECT["project"]["version"]
    (ours,) = re.findall(r'^VERSION = "(.*?)"', (ROOT / "inversion" / "host.py").read_text(encoding="utf-8"), re.M)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[1]
    assert ours == version == newest


@pytest.mark.parametrize("key, fits", [
    ("Icon", lambda width, height: width == height <= 400),
    ("Banner", lambda width, height: width * 9 == height * 21),
])  # fmt: skip
def test_the_picture_that_the_registry_shows_is_in_the_repository(key, fits):
    base = PROJECT["project"]["urls"]["Repository"].replace("github.com", "raw.githubusercontent.com") + "/main/"
    assert SETTINGS[key].startswith(base)
    with Image.open(ROOT / SETTINGS[key].removeprefix(base)) as picture:
        picture.load()
        assert picture.format == "PNG" and fits(*picture.size)


def test_the_icon_is_what_the_script_draws():
    with Image.open(emblem.FOLDER / "icon.png") as picture:
        assert picture.tobytes() == emblem.icon(emblem.ICON).tobytes()


# ---- ComfyUI-Manager ---------------------------------------------------------------------------------------------


def named(node):
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)


def ids_as_manager_finds_them(path):
    """ComfyUI-Manager's scanner.py, in short: a class with ComfyNode among its own bases is a node, under the literal
    node_id of a Schema in its define_schema, else under the class's name; so is each key of a mapping of classes."""
    for node in syntax(path):
        if isinstance(node, ast.ClassDef) and "ComfyNode" in map(named, node.bases):
            inside = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "define_schema"]
            calls = [c for f in inside for c in ast.walk(f) if isinstance(c, ast.Call) and named(c.func) == "Schema"]
            words = [w.value for c in calls for w in c.keywords if w.arg == "node_id"]
            yield next((w.value for w in words if isinstance(w, ast.Constant)), node.name)
    text = (ROOT / path).read_text(encoding="utf-8")
    for inside in re.findall(r"_CLASS_MAPPINGS\s*(?::\s*\w+\s*)?=\s*{([^}]*)}", text):
        yield from re.findall(r"""["']([^"']*)["']\s*:""", inside)
    yield from re.findall(r"""^[^=#]*_CLASS_MAPPINGS\[["'](.*?)["']\]""", text, re.M)
    yield from re.findall(r"""@register_node\(["'](.+?)["']""", text)
    yield from re.findall(r'"(\w+)"\s*:\s*{"class":\s*\w', text)


def test_manager_finds_every_node_and_no_other():
    """What "install missing nodes" goes by: every file of the repository, those of the tests too."""
    found = [name for path in sorted(tracked("*.py")) for name in ids_as_manager_finds_them(path)]
    # The nodes that the pack gives to ComfyUI, counted in another way: what the lists of nodes/ hold.
    ours = [
        named(entry)
        for path in reached()
        if path.startswith("nodes/")
        for node in syntax(path)
        if isinstance(node, ast.Assign) and named(node.targets[0]) == "NODES" and isinstance(node.value, ast.List)
        for entry in node.value.elts
    ]
    assert sorted(found) == sorted(ours) and len(ours) > 30
