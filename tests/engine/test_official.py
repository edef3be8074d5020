"""The command that sets the nodes beside the authors' own code: what it says without that code, how it reads theirs,
and its table. Their code is not here; small files of the same shape stand for it."""

import json
import subprocess
import sys
import types

import pytest
import torch
from diffusers.models.attention_processor import Attention

from attune.benchmark import official, official_code, official_tokens


def test_no_code_is_one_sentence_and_no_error(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(official.logging, "basicConfig", lambda **_: None)  # it would take caplog's handler away
    with caplog.at_level("INFO", "attune.bench"):
        assert official.main(["--code", str(tmp_path)]) == 0
    said = [record.message for record in caplog.records if record.name == "attune.bench"]
    assert len(said) == 1 and all(name in said[0] for name in official_code.REPOSITORIES)


def test_a_part_whose_repository_is_not_there_says_so(tmp_path):
    (tmp_path / "prompt-to-prompt").mkdir()
    clones = official_code.find(tmp_path)
    assert list(clones) == ["prompt-to-prompt"]
    assert official.lacking("MasaCtrl", clones) == (
        "MasaCtrl is skipped: there is no clone of MasaCtrl (https://github.com/TencentARC/MasaCtrl)."
    )
    assert official.NOTEBOOK in official.lacking("Prompt-to-Prompt", clones)
    (tmp_path / "prompt-to-prompt" / official.NOTEBOOK).write_text("{}", encoding="utf-8")
    assert official.lacking("Prompt-to-Prompt", clones) == ""
    assert official.lacking("MasaCtrl", clones | {"MasaCtrl": tmp_path}) == ""


def test_their_modules_win_over_the_hosts_and_are_forgotten(tmp_path):
    hosts = sys.modules.get("utils")
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "utils.py").write_text("import cv2\nanswer = 42\n", encoding="utf-8")
    (module,) = official_code.read(tmp_path, "utils.utils")
    assert module.answer == 42
    assert sys.modules.get("utils") is hosts and "utils.utils" not in sys.modules and str(tmp_path) not in sys.path
    if not official_code._importable("cv2"):
        assert "cv2" not in sys.modules


def test_of_a_notebook_only_definitions_are_read(tmp_path):
    (tmp_path / "helper_of_theirs.py").write_text("base = 40\n", encoding="utf-8")
    cells = [
        {"cell_type": "markdown", "source": ["class NotCode: pass"]},
        {"cell_type": "code", "source": ["%matplotlib inline\n"]},
        {"cell_type": "code", "source": ["import helper_of_theirs\n", "STEPS = 1 / 0\n", "download()\n"]},
        {"cell_type": "code", "source": ["def answer():\n", "    return helper_of_theirs.base + STEPS\n"]},
    ]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    code = official_code.read_notebook(tmp_path / "a.ipynb", tmp_path, STEPS=2)
    assert code.answer() == 42 and not hasattr(code, "NotCode")


def git(folder, *command):
    given = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(folder), *command]
    subprocess.run(given, check=True, capture_output=True)


def test_a_file_is_read_from_its_branch_whatever_is_checked_out(tmp_path):
    clone = tmp_path / "T2I-Adapter"
    place = clone / official_tokens.ADAPTER
    place.parent.mkdir(parents=True)
    text = "import not.there\nfrom not_there import zero\nSTEPS = 1 / 0\nclass Adapter:\n    answer = 42\n"
    place.write_text(text.replace("import not.there\n", ""), encoding="utf-8")
    git(clone, "init", "-q", "-b", "SD")
    git(clone, "add", ".")
    git(clone, "commit", "-q", "-m", "a")
    branch = official_code.commit(clone)
    git(clone, "checkout", "-q", "--orphan", "main")
    git(clone, "rm", "-qrf", ".")
    git(clone, "commit", "-q", "--allow-empty", "-m", "b")
    assert not place.exists() and official_code.commit(clone) == branch != "unknown commit"
    found = official_code.file_of(clone, official_tokens.ADAPTER)
    assert official_code.read_classes(found, "a").Adapter.answer == 42
    clones = {"T2I-Adapter": clone}
    assert official.lacking("T2I-Adapter", clones) == ""
    git(clone, "branch", "-D", "SD")
    assert "no branch SD" in official.lacking("T2I-Adapter", clones)


def test_older_names_are_lent_and_taken_back():
    library = types.SimpleNamespace(kept=1)
    with official_code.older((library, "kept", 2), (library, "lent", 3)):
        assert (library.kept, library.lent) == (1, 3)
    assert vars(library) == {"kept": 1}
    tensor = torch.ones(1)
    with official_code.on_the_cpu():
        assert tensor.cuda() is tensor


def test_attention_answers_to_its_older_name_and_back():
    rng = torch.Generator().manual_seed(0)
    layer = Attention(8, cross_attention_dim=6, heads=2, dim_head=4)
    x, text = torch.randn(1, 5, 8, generator=rng), torch.randn(1, 3, 6, generator=rng)
    before = layer(x, encoder_hidden_states=text)
    official_code.name_attention(layer, official_code.CrossAttention)
    assert type(layer).__name__ == "CrossAttention"
    assert torch.equal(layer(x, encoder_hidden_states=text), before)
    layer.forward = lambda x, context=None, mask=None: context
    assert layer(x, encoder_hidden_states=text) is text
    official_code.name_attention(layer, Attention)
    assert type(layer) is Attention and torch.equal(layer(x, encoder_hidden_states=text), before)


def row(apart, departs="", **more):
    return official.Row(official.Check("Method", "case", None, departs), apart, **more)


@pytest.mark.parametrize(
    ("found", "holds", "verdict"),
    [
        (row(1e-6), True, "the same"),
        (row(1e-3), False, "DIFFERENT"),
        (row(float("nan")), False, "DIFFERENT"),
        (row(0.3, "their reason"), True, "departs: their reason"),
        (row(1e-6, "their reason"), False, "NO LONGER A DEPARTURE"),
    ],
)
def test_a_verdict(found, holds, verdict):
    assert found.holds is holds and found.verdict == verdict


def test_the_table_has_a_line_a_row():
    rows = [row(1.2e-6, decibels=120.04, effect=0.5), row(0.3, "why")]
    assert official.table(rows).splitlines()[2:] == [
        "| Method | case | 1.2e-06 | 120.0 | 0.5 | the same |",
        "| Method | case | 0.3 |  |  | departs: why |",
    ]


def test_what_is_measured_is_the_worst_of_the_scenes():
    def measure(number):
        theirs = torch.ones(1, 4, 2, 2)
        return theirs * (1 + (0.5, 0.25)[number]), theirs, theirs * (2.0, 3.0)[number], None

    found = official.measured(official.Check("Method", "case", measure), 2, None)
    assert found.apart == pytest.approx(0.5) and found.effect == pytest.approx(1.0) and found.decibels is None
