"""A trajectory's file: the same again, or one sentence."""

import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from attune.inversion import file
from attune.inversion.trajectory import Trajectory, negative_of, one_text, step_conditioning

HEADER = {"family": "SD15", "latent_format": "SD15", "prediction": "EPS", "weights": [0.5, 1.0], "method": "ddim"}


def made(nulls=True):
    torch.manual_seed(0)
    text = [[torch.randn(1, 7, 5), {"pooled_output": torch.randn(1, 5), "attune_prompt": "a cat"}]]
    return Trajectory(
        torch.tensor([10.0, 3.0, 1.0, 0.0]), torch.randn(4, 2, 4, 3, 5), 3, HEADER, text, text,
        torch.randn(3, 2, 7, 5) if nulls else None, (0.0, 0.25, 0.5, 1.0) if nulls else (),
    )  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "t.trajectory.safetensors"
    file.save(made(), path, {"attune": "1"})
    return path


def refused(path, *parts):
    with pytest.raises(ValueError) as error:
        file.load(path)
    text = str(error.value)
    assert text.startswith("The trajectory file t.trajectory.safetensors ") and text.endswith(".") and "\n" not in text
    for part in parts:
        assert re.search(part, text), text


@pytest.mark.parametrize("nulls", [True, False])
def test_the_same_again(tmp_path, nulls):
    path = tmp_path / "t.trajectory.safetensors"
    file.save(made(nulls), path, {})
    ours, back = made(nulls), file.load(path)
    assert torch.equal(ours.sigmas, back.sigmas) and torch.equal(ours.latents, back.latents)
    assert (ours.nulls is None and back.nulls is None) or torch.equal(ours.nulls, back.nulls)
    assert (ours.steps, ours.header, ours.windows) == (back.steps, back.header, back.windows)
    for name in ("conditioning", "negative"):
        ((a, with_a),), ((b, with_b),) = getattr(ours, name), getattr(back, name)
        assert torch.equal(a, b) and torch.equal(with_a["pooled_output"], with_b["pooled_output"])
        assert with_b["attune_prompt"] == "a cat"


def test_one_plain_safetensors_file(saved):
    assert set(load_file(saved)) >= {"sigmas", "latents", "nulls", "conditioning.0"}
    with safe_open(saved, "pt") as opened:
        about = json.loads(opened.metadata()["attune"])
    assert about["versions"] == {"attune": "1"} and about["header"] == HEADER


@settings(max_examples=60, deadline=None)
@given(at=some.integers(0, 10**6), value=some.integers(1, 255))
def test_any_changed_byte_is_seen(at, value):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "t.trajectory.safetensors")
        file.save(made(), path, {})
        content = bytearray(path.read_bytes())
        content[at % len(content)] ^= value
        path.write_bytes(content)
        refused(path)


@settings(max_examples=40, deadline=None)
@given(some.integers(0, 10**6))
def test_any_cut_is_seen(length):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "t.trajectory.safetensors")
        file.save(made(), path, {})
        content = path.read_bytes()
        path.write_bytes(content[: length % len(content)])
        refused(path)


@settings(max_examples=40, deadline=None)
@given(some.binary(max_size=400))
def test_any_other_file_is_seen(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "t.trajectory.safetensors")
        path.write_bytes(content)
        refused(path)


def rewritten(path, change):
    """The file with its insides changed by ``change(tensors, about)`` and a digest that fits, as a forger would."""
    tensors = load_file(path)
    with safe_open(path, "pt") as opened:
        about = json.loads(opened.metadata()["attune"])
    about.pop("digest")
    change(tensors, about)
    about["digest"] = file._digest(about, tensors)
    save_file(tensors, path, {"attune": json.dumps(about)})


def setting(kind, name, value):
    def change(tensors, about):
        (tensors if kind == "tensor" else about)[name] = value

    return change


FORGED = {
    "newer": (setting("about", "format", 2), "written by a newer Attune.*update the Attune pack"),
    "no format": (setting("about", "format", "x"), "unreadable header"),
    "nan": (setting("tensor", "latents", torch.full((4, 2, 4, 3, 5), float("nan"))), 'in "latents" that are no finite'),
    "infinite null": (setting("tensor", "nulls", torch.full((3, 2, 7, 5), float("inf"))), "no finite"),
    "rising sigmas": (setting("tensor", "sigmas", torch.tensor([1.0, 2.0, 3.0, 4.0])), "fall from noise to picture"),
    "few latents": (setting("tensor", "latents", torch.zeros(3, 2, 4, 3, 5)), "one latent for each of its 4"),
    "few nulls": (setting("tensor", "nulls", torch.zeros(2, 2, 7, 5)), "one null embedding for each"),
    "whole numbers": (setting("tensor", "sigmas", torch.tensor([3, 2, 1, 0])), "no finite numbers"),
    "steps": (setting("about", "steps", 7), "counts its steps"),
    "header": (setting("about", "header", {"family": "SD15"}), "what it was made with"),
    "weights": (setting("about", "header", {**HEADER, "weights": ["x"]}), "what it was made with"),
    "conditioning": (setting("about", "conditioning", [{}, {}]), "no readable conditioning"),
    "windows": (setting("about", "windows", [0.0, 0.9, 0.5, 1.0]), "one null embedding"),
    "text": (setting("about", "negative", "x"), "no readable negative"),
}


@pytest.mark.parametrize("forged", FORGED)
def test_what_contradicts_itself_is_refused(saved, forged):
    change, said = FORGED[forged]
    rewritten(saved, change)
    refused(saved, said)


def test_other_peoples_files_are_refused(saved, tmp_path):
    save_file({"x": torch.zeros(1)}, saved)
    refused(saved, "holds no trajectory")
    torch.save({"x": torch.zeros(1)}, saved)
    refused(saved, "no safetensors file")
    refused(tmp_path / "away" / "t.trajectory.safetensors")


def test_steps_have_their_own_text():
    trajectory = made()
    entries = negative_of(trajectory)
    assert [e[1]["start_percent"] for e in entries] == [0.0, 0.25, 0.5] and entries[-1][1]["end_percent"] == 1.0
    assert all(torch.equal(e[0], n) for e, n in zip(entries, trajectory.nulls, strict=True))
    assert negative_of(made(nulls=False)) is not None and negative_of(replace(made(False), negative=[])) == []
    assert step_conditioning(trajectory.nulls, trajectory.windows, {"a": 1})[0][1]["a"] == 1
    with pytest.raises(ValueError, match="holds 2 texts"):
        one_text(trajectory.conditioning * 2, "negative")
