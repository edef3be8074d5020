"""The rules of the house that a reader relies on: who imports whom, and what the source is written in."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACK = [
    "__init__.py",
    "messages.py",
    *(
        str(p.relative_to(ROOT))
        for d in ("nodes", "attention_patches", "inversion", "demo", "benchmark")
        for p in (ROOT / d).glob("*.py")
    ),
]
# Which of the host's modules a file may import, and which of the pack's folders a folder may.
HOST_FILES = {
    "attention_patches/host.py",
    "inversion/host.py",
    "demo/model.py",
    "demo/measure.py",
    *(p for p in PACK if p.startswith("benchmark")),  # it stands outside the pack and runs it through the host
}
HOST_MODULES = {"comfy", "comfy_extras", "nodes", "folder_paths", "latent_preview", "server", "execution"}
# messages.py is everyone's, since errors, logs and node texts leave the pack from each of these rooms.
ALLOWED = {
    "nodes": {"nodes", "attention_patches", "inversion", "demo", "messages"},
    "attention_patches": {"attention_patches", "messages"},
    "inversion": {"inversion", "messages"},
    "demo": {"demo"},
    "benchmark": {"benchmark", "demo", "inversion", "attention_patches", "nodes", "tests"},
}


def imports(path):
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((a.name, 0) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


@pytest.mark.parametrize("path", PACK)
def test_only_the_host_files_import_the_host(path):
    used = {name.split(".")[0] for name, level in imports(path) if level == 0} & HOST_MODULES
    assert not used or path.replace("\\", "/") in HOST_FILES


@pytest.mark.parametrize("path", [p for p in PACK if "/" in p and not p.endswith(("measure.py", "train.py"))])
def test_no_arrow_points_upward(path):
    folder = path.split("/")[0]
    for name, level in imports(path):
        if level == 2:
            assert name.split(".")[0] in ALLOWED[folder], f"{path} imports ..{name}"


@pytest.mark.parametrize(
    "path",
    sorted(str(p.relative_to(ROOT)) for p in ROOT.rglob("*.py") if not {".host", "venv", ".venv"} & set(p.parts)),
)
def test_source_is_ascii(path):
    (ROOT / path).read_text(encoding="ascii")
