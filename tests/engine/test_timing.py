"""The benchmark of time and memory measures what it says, and says no where a target is missed."""

import json
import sys
import time
from dataclasses import replace

import pytest
import torch

pytest.importorskip(
    "diffusers", reason="diffusers for Python 3.10 wants an older huggingface-hub than transformers does"
)

from attune.attention_patches.free_prompt_editing import FreePromptEditing
from attune.benchmark import timing

TINY = replace(timing.SIZES["demo"], steps=2, updates=2, graph=2, eight=1)
FPE = "free prompt editing"


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The command's files, in a folder of their own."""
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "timing.json")
    monkeypatch.setattr(timing, "PAGE", tmp_path / "TIMING.md")
    monkeypatch.setattr(timing, "SIZES", {"demo": TINY})
    return tmp_path


def verdicts(found, part, size="demo"):
    """Of what -> whether its target holds."""
    known = {size: {part: {"settings": {}, "found": found}}}
    return {what: holds for _, _, what, _, _, holds in timing.targets(known)}


def test_the_command_writes_what_it_measured(written, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["time", "--size", "demo", "--part", "files", "overhead", "--repeats", "1"])
    timing.main()
    known = json.loads((written / "timing.json").read_text())
    assert set(known["demo"]) == {"files", "overhead"}
    assert {row["steps"] for row in known["demo"]["overhead"]["found"].values()} == {2}
    page = (written / "TIMING.md").read_text()
    (line,) = (line for line in page.splitlines() if line.startswith("| outside the UNet, % | demo | swap |"))
    value = known["demo"]["overhead"]["found"]["swap"]["outside the UNet %"]
    assert f"{value:.3g}" in line and ("**no**" in line) == (value > 3)
    for part in known["demo"].values():
        assert part["settings"]["turns"] == 1 and part["settings"]["torch"] == torch.__version__
    found = known["demo"]["files"]["found"]
    # 50 steps of null embeddings are 50 x 77 numbers, as wide as the demo's texts, beside the latents.
    more = found["saving, with null embeddings"]["MB"] - found["saving, without embeddings"]["MB"]
    assert more == pytest.approx(50 * 77 * 128 * 4 / 1e6, rel=0.2)


def test_both_sides_draw_the_same():
    """What is timed as the plain implementation is the same edit on the same weights. Prompt-to-Prompt's source row is
    pinned here and free there, so that these two differ on a path that nothing ever drew."""
    it = timing.made(TINY.make, 2, 16)
    ours, plain = timing.our_runs(it), timing.plain_runs(it, timing.made(timing.plain_network, it))
    for name in (FPE, "mutual, masked"):
        mine, (_, theirs) = ours[name][1]()["samples"], plain[timing.PLAIN + name][1]()
        last = it.trajectory.sigmas[-1]
        mine = timing.host.to_model_scale(it.model, mine) / (1 + last**2).sqrt()
        assert timing.inversion.relative(mine, theirs) < 1e-4


def test_a_slow_controller_is_a_no(monkeypatch):
    found = timing.edits(TINY, 1, only=(FPE,))
    assert found[FPE]["rows a step"] == 3 and found[timing.PLAIN + FPE]["rows a step"] == 4

    def slow(self, place, own, references, edited=FreePromptEditing.self_attention):
        until = time.process_time() + 0.02
        while time.process_time() < until:
            pass
        return edited(self, place, own, references)

    monkeypatch.setattr(FreePromptEditing, "self_attention", slow)
    after = timing.edits(TINY, 1, only=(FPE,))
    assert after[FPE]["a row, best clock"] > found[FPE]["a row, best clock"] + 1
    assert verdicts(after, "edits") == {FPE: False}
    shares = timing.where(TINY, 1, only=(FPE,))[FPE]
    assert max(shares, key=shares.get) == f"{timing.RULES} %"
