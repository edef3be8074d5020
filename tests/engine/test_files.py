"""Files on a disk that others use too: names, full disks, kills, and what is listed; and files that were spoiled."""

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import folder_paths
import pytest
import torch

import attune.benchmark.files as spoiled
from attune.inversion import disk
from attune.inversion import host as runs
from attune.nodes import trajectory as nodes

from .bench import Bench, outputs
from .test_nodes import one_sentence

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks, limits and links of other systems")
SUFFIX = runs.SUFFIX


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    for name in ("input", "output", "user"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    (tmp_path / "embeddings").mkdir()
    table = {**folder_paths.folder_names_and_paths, "embeddings": ([str(tmp_path / "embeddings")], {".safetensors"})}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", table)
    return tmp_path


@pytest.fixture(scope="module")
def small():
    with torch.inference_mode():
        bench = Bench(height=8, width=8, steps=2)
        header = {**bench.trajectory.header, "method": "recorded"}
        return bench.but(trajectory=replace(bench.trajectory, header=header))


def process(work, *args):
    """``work`` in a process of its own."""
    one = multiprocessing.get_context("fork").Process(target=work, args=args)
    one.start()
    return one


# ---- names -------------------------------------------------------------------------------------------------------


def many(trajectory, begin, count=60):
    begin.wait()
    with torch.inference_mode():
        for _ in range(count):
            outputs(nodes.AttuneSaveTrajectory, trajectory, "a/b")


def test_two_processes_that_save_under_one_prefix_overwrite_nothing(small, folders):
    begin = multiprocessing.get_context("fork").Barrier(2)
    both = [process(many, small.trajectory, begin) for _ in range(2)]
    for one in both:
        one.join(300)
        assert one.exitcode == 0
    assert len(os.listdir(folders / "output" / "a")) == len(runs.trajectory_files()) == 120
    assert all(outputs(nodes.AttuneLoadTrajectory, name) for name in runs.trajectory_files()[::20])


@pytest.mark.parametrize("linking", [True, False], ids=["links", "a disk without links"])
def test_a_name_is_taken_by_one_alone(tmp_path, linking, monkeypatch):
    if not linking:
        monkeypatch.setattr(os, "link", lambda *_: os.stat("/nowhere/at/all"))
    names = [f"{number}" for number in range(5)]
    (tmp_path / "1").write_bytes(b"theirs")
    written = [disk.write_new(tmp_path, names, bytes([number])).name for number in range(4)]
    assert written == ["0", "2", "3", "4"]
    assert [(tmp_path / name).read_bytes() for name in names] == [b"\0", b"theirs", b"\1", b"\2", b"\3"]
    with pytest.raises(FileExistsError):
        disk.write_new(tmp_path, names, b"")
    assert sorted(os.listdir(tmp_path)) == sorted([*names, *(["embeddings", "input", "output", "user"])])


def test_the_name_that_saving_gives_is_the_one_that_is_listed(small, folders):
    for prefix in ("t", "a/b", "./a//c", "../output/d", "%year%/e"):
        (name,) = outputs(nodes.AttuneSaveTrajectory, small.trajectory, prefix)
        assert name in runs.trajectory_files(), prefix


# ---- disks that refuse -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_disk():
    """In it, files may not grow beyond some bytes, which the system tells as it tells of a full disk: in the middle.

    No fixture, since pytest writes to its report before a fixture ends.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def trees(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_disk_that_is_full_leaves_nothing_behind(small, folders):
    with pytest.raises(ValueError) as error, full_disk():
        outputs(nodes.AttuneSaveTrajectory, small.trajectory, "t")
    one_sentence(error, 'No file "t" can be written to ComfyUI\'s output folder .File too large.', "make room")
    one_sentence(error, "filename_prefix in Attune Save Trajectory", "until then it still has what was to be saved")
    with pytest.raises(ValueError) as error, full_disk():
        runs.save_embedding("w", {"l": torch.zeros(1, 768)})
    one_sentence(error, "embeddings folder .File too large.", "filename_prefix in Attune Save Learned Word")
    assert not trees(folders)


@pytest.mark.parametrize(
    ("prefix", "said"),
    [("x" * 240, "File name too long"), ("x" * 300 + "/y", "File name too long"), ("a\0b", "null byte"),
     ("file/y", "Not a directory|File exists")],
    ids=["240 letters", "a folder of 300", "NUL", "a file for a folder"],
)  # fmt: skip
def test_a_name_that_no_file_can_have(small, folders, prefix, said):
    (folders / "output" / "file").touch()
    with pytest.raises(ValueError) as error:
        outputs(nodes.AttuneSaveTrajectory, small.trajectory, prefix)
    one_sentence(error, said, "filename_prefix in Attune Save Trajectory")
    assert trees(folders) == [folders / "output" / "file"]


# ---- kills -------------------------------------------------------------------------------------------------------


def endless(folder):
    content = os.urandom(1 << 20) * 32
    for _ in range(1000):
        disk.write_new(folder, (f"{n}{SUFFIX}" for n in range(1000)), content)


def test_a_kill_leaves_nothing_that_is_listed_and_its_part_goes(small, folders):
    folder, whole = folders / "output", 32 << 20
    for wait in (0.11, 0.23, 0.37):
        one = process(endless, folder)
        deadline = time.monotonic() + 60
        while not list(folder.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(wait)
        os.kill(one.pid, signal.SIGKILL)
        one.join()
    assert all((folder / name.removesuffix(runs.OUTPUT)).stat().st_size == whole for name in runs.trajectory_files())
    parts = [path for path in folder.iterdir() if path.name.startswith(disk.PART)]
    fresh = folder / (disk.PART + "of a run that is still at work")
    fresh.touch()
    for part in parts:
        os.utime(part, (time.time() - disk.DEAD - 1,) * 2)
    (name,) = outputs(nodes.AttuneSaveTrajectory, small.trajectory, "t")
    assert name in runs.trajectory_files() and fresh.exists() and not any(part.exists() for part in parts)


def test_a_part_is_no_embedding_that_a_prompt_can_name():
    assert re.search(r"[\s()]", disk.PART) and not Path(disk.PART + "0").suffix.startswith(".safe")


# ---- what is listed ----------------------------------------------------------------------------------------------


def test_what_is_listed_can_be_loaded(small, folders):
    (good,) = outputs(nodes.AttuneSaveTrajectory, small.trajectory, "good")
    base, elsewhere = folders / "output", folders / f"away{SUFFIX}"
    elsewhere.write_bytes((base / good.removesuffix(runs.OUTPUT)).read_bytes())
    (base / f"out{SUFFIX}").symlink_to(elsewhere)
    (base / f"loop{SUFFIX}").symlink_to(base / f"loop{SUFFIX}")
    (base / f"gone{SUFFIX}").symlink_to(base / "nothing")
    (base / f"in{SUFFIX}").symlink_to(base / good.removesuffix(runs.OUTPUT))
    (base / f"folder{SUFFIX}").mkdir()
    (base / f"empty{SUFFIX}").touch()
    Path(os.fsdecode(os.fsencode(base) + b"/\xff" + SUFFIX.encode())).write_bytes(elsewhere.read_bytes())
    assert runs.trajectory_files() == [good, f"in{SUFFIX}{runs.OUTPUT}"]
    assert all(outputs(nodes.AttuneLoadTrajectory, name) for name in runs.trajectory_files())


NAMES = {
    "NUL": f"a\0b{SUFFIX}", "300 letters": "x" * 300 + SUFFIX, "a loop": f"loop{SUFFIX}", "a number": 5, "a list": [],
    "a stray byte": f"\udcff{SUFFIX}", "half an emoji": f"\ud83d{SUFFIX}", "true": True, "a link out": f"out{SUFFIX}",
}  # fmt: skip


@pytest.mark.parametrize("kind", NAMES)
def test_other_names_get_one_sentence(folders, kind):
    (folders / "input" / f"loop{SUFFIX}").symlink_to(folders / "input" / f"loop{SUFFIX}")
    (folders / f"x{SUFFIX}").write_bytes(b"x")
    (folders / "input" / f"out{SUFFIX}").symlink_to(folders / f"x{SUFFIX}")
    said = nodes.AttuneLoadTrajectory.validate_inputs(NAMES[kind])
    assert said.endswith("Attune Load Trajectory.") and len(said) < 500 and said.encode()
    with pytest.raises(ValueError) as error:
        outputs(nodes.AttuneLoadTrajectory, NAMES[kind])
    one_sentence(error, "choose one from the list of Attune Load Trajectory")


def test_a_linked_name_is_not_known_before_it_runs():
    node = nodes.AttuneLoadTrajectory
    assert node.validate_inputs(None) is True
    assert node.fingerprint_inputs(None) != node.fingerprint_inputs(None)


# ---- spoiled files -----------------------------------------------------------------------------------------------


def test_a_spoiled_file_is_refused_in_one_sentence_or_draws_a_picture(small, folders):
    """A file or two of each class; `python3 dev.py bench files` tries hundreds."""
    found = list(spoiled.check(small, 25, number=7))
    assert len({name for name, *_ in found}) == 17
    assert not [one for one in found if one[1] in spoiled.BAD]
    assert {spoiled.REFUSED, spoiled.HARMLESS} <= {outcome for _, outcome, *_ in found}
    assert max(peak for *_, peak in found) < 300
