"""What the registry hands out works by itself: unpacked beside nothing else, in each ComfyUI at hand."""

import re
import shutil

import pytest

from attune.tests import host, schemas
from attune.tests.archive import packed
from attune.tests.server import workflow


def state(folder):
    """Every file with its time and size, but for what Python compiles."""
    files = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size) for p in files}


@pytest.mark.hosts
@pytest.mark.parametrize("release", host.Host.every(), ids=str)
def test_the_archive_is_the_whole_pack(release, tmp_path, monkeypatch):
    checkout, pack = host.ROOT, tmp_path / "pack"
    for path in packed():
        (pack / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(host.ROOT / path, pack / path)
    before = state(pack)
    monkeypatch.setattr(host, "ROOT", pack)  # what a server gets as its only custom node
    with host.Server(release, base=tmp_path / "base") as running:
        assert schemas.of_pack(running.object_info()).keys() == {key.split(":")[0] for key in schemas.load()}
        prompt = workflow.load(workflow.DEMO)
        prompt[workflow.find(prompt, "AttuneDDIMInversion")]["inputs"]["steps"] = 4
        assert len(workflow.saved(prompt, running.run(prompt))) == 6
        said = running.log_path.read_text(encoding="utf-8")
    assert state(pack) == before
    for folder in (checkout, tmp_path):  # whatever they are called
        said = said.replace(str(folder), "")
    # Of the pack the log says how long it took to load, and no more.
    (line,) = (line for line in said.splitlines() if re.search("attune|warning|error|exception", line, re.IGNORECASE))
    assert re.fullmatch(r" *\d+\.\d seconds: .*attune", line)
