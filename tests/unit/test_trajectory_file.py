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
from attune.inversion.trajectory import LearnedWords, Trajectory, negative_of, one_text, step_conditioning

HEADER = {"family": "SD15", "latent_format": "SD15", "prediction": "EPS", "weights": [0.5, 1.0], "method": "ddim"}


def made(nulls=True):
    torch.manual_seed(0)
    text = [[torch.randn(1, 7, 5), {"pooled_output": torch.randn(1, 5), "attune_prompt": "a cat"}]]
    return Trajectory(
        torch.tensor([10.0, 3.0, 1.0, 0.0]), torch.randn(4, 2, 4, 3, 5), 3, HEADER, text, text,
        torch.randn(3, 2, 7, 5) if nulls else None, (0.0, 0.25, 0.5, 1.0) if nulls else (),
    )  # fmt: skip


WORDS = ("cat", "dog")
POSITIONS = ((2,), (5, 6))


def with_words(nulls=True):
    """With two words, one of two tokens, learned in two text encoders for two pictures at three steps."""
    vectors = {"l": torch.randn(3, 2, 3, 4), "g": torch.randn(3, 2, 3, 5)}
    windows = (0.0, 0.25, 0.5, 1.0)
    return replace(made(nulls), learned=LearnedWords("a cat and a dog", WORDS, POSITIONS, vectors), windows=windows)


def save(trajectory, path):
    path.write_bytes(file.packed(trajectory, {"attune": "1"}))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "t.trajectory.safetensors"
    save(made(), path)
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
    save(made(nulls), path)
    ours, back = made(nulls), file.load(path)
    assert torch.equal(ours.sigmas, back.sigmas) and torch.equal(ours.latents, back.latents)
    assert (ours.nulls is None and back.nulls is None) or torch.equal(ours.nulls, back.nulls)
    assert (ours.steps, ours.header, ours.windows) == (back.steps, back.header, back.windows)
    for name in ("conditioning", "negative"):
        ((a, with_a),), ((b, with_b),) = getattr(ours, name), getattr(back, name)
        assert torch.equal(a, b) and torch.equal(with_a["pooled_output"], with_b["pooled_output"])
        assert with_b["attune_prompt"] == "a cat"


@pytest.mark.parametrize("nulls", [True, False])
def test_learned_words_survive_a_file(tmp_path, nulls):
    path = tmp_path / "t.trajectory.safetensors"
    ours = with_words(nulls)
    save(ours, path)
    back = file.load(path)
    a, b = ours.learned, back.learned
    assert (a.prompt, a.words, a.positions) == (b.prompt, b.words, b.positions) and a.vectors.keys() == b.vectors.keys()
    assert all(torch.equal(a.vectors[n], b.vectors[n]) for n in a.vectors)
    assert back.windows == ours.windows and (back.nulls is None) != nulls


def test_a_file_without_learned_words_is_as_old_packs_wrote_it(tmp_path):
    """So that these packs still read it; one with learned words they must refuse, since they would lose them."""
    for trajectory, number in ((made(), 1), (with_words(), 2)):
        path = tmp_path / "t.trajectory.safetensors"
        save(trajectory, path)
        with safe_open(path, "pt") as opened:
            about = json.loads(opened.metadata()["attune"])
        assert about["format"] == number and ("learned" in about) == (number == 2)


def test_the_vectors_of_a_word():
    learned = with_words().learned
    rows = learned.by_position()
    assert rows.keys() == {"l", "g"} and list(rows["l"]) == [2, 5, 6]
    for name, vectors in learned.vectors.items():
        for row, position in enumerate((2, 5, 6)):
            assert torch.equal(rows[name][position], vectors[:, :, row])
        assert torch.equal(learned.word("dog", 2, 1)[name], vectors[2, 1, 1:])
        assert torch.equal(learned.word("cat", 0, 0)[name], vectors[0, 0, :1])
        assert torch.allclose(learned.word("dog", None, 1)[name], vectors[:, 1, 1:].sum(0) / 3)
        assert torch.equal(learned.word(" ", 1, 0)[name], vectors[1, 0, :1])  # the first


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("bird", 0, 0), 'The word "bird" is none of those that were learned: cat, dog;'),
        (("cat", 3, 0), "The step is 3, but the TRAJECTORY has 3, counted from 0;"),
        (("cat", None, 2), "The picture is 2, but the TRAJECTORY has 2, counted from 0;"),
    ],
)
def test_a_word_that_was_not_learned(asked, said):
    with pytest.raises(ValueError) as error:
        with_words().learned.word(*asked)
    assert str(error.value).startswith(said) and str(error.value).endswith("in Attune Save Learned Word.")


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
        save(made(), path)
        content = bytearray(path.read_bytes())
        content[at % len(content)] ^= value
        path.write_bytes(content)
        refused(path)


@settings(max_examples=40, deadline=None)
@given(some.integers(0, 10**6))
def test_any_cut_is_seen(length):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "t.trajectory.safetensors")
        save(made(), path)
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
    about["digest"] = file.fingerprint(about, *(part for name in sorted(tensors) for part in (name, tensors[name])))
    save_file(tensors, path, {"attune": json.dumps(about)})


def setting(kind, name, value):
    def change(tensors, about):
        (tensors if kind == "tensor" else about)[name] = value

    return change


def carrying(key, value):
    """Puts a value on the first text."""

    def change(tensors, about):
        about["conditioning"][0][key] = value

    return change


FORGED = {
    "newer": (setting("about", "format", file.FORMAT + 1), "written by a newer Attune.*update the Attune pack"),
    "no format": (setting("about", "format", "x"), "unreadable header"),
    "nan": (setting("tensor", "latents", torch.full((4, 2, 4, 3, 5), float("nan"))), 'in "latents" that are no finite'),
    "infinite null": (setting("tensor", "nulls", torch.full((3, 2, 7, 5), float("inf"))), "no finite"),
    "rising sigmas": (setting("tensor", "sigmas", torch.tensor([1.0, 2.0, 3.0, 4.0])), "fall from noise to picture"),
    "few latents": (setting("tensor", "latents", torch.zeros(3, 2, 4, 3, 5)), "one latent for each of its 4"),
    "few nulls": (setting("tensor", "nulls", torch.zeros(2, 2, 7, 5)), "one null embedding for each"),
    "whole numbers": (setting("tensor", "sigmas", torch.tensor([3, 2, 1, 0])), "of the kind I64"),
    "steps": (setting("about", "steps", 7), "counts its steps"),
    "header": (setting("about", "header", {"family": "SD15"}), "what it was made with"),
    "weights": (setting("about", "header", {**HEADER, "weights": ["x"]}), "what it was made with"),
    "probes": (setting("about", "header", {**HEADER, "probes": [1e40]}), "what it was made with"),
    "dtype": (setting("about", "header", {**HEADER, "dtype": "int8"}), "what it was made with"),
    "timesteps": (setting("about", "header", {**HEADER, "sampling": "EPS", "timesteps": [None]}), "what it was made"),
    "sampling": (setting("about", "header", {**HEADER, "sampling": "EPS"}), "what it was made with"),
    "conditioning": (setting("about", "conditioning", [{}, {}]), "no readable conditioning"),
    "windows": (setting("about", "windows", [0.0, 0.9, 0.5, 1.0]), "one null embedding"),
    "text": (setting("about", "negative", "x"), "no readable negative"),
    "beyond fp32": (
        setting("tensor", "nulls", torch.full((3, 2, 7, 5), 1e300, dtype=torch.float64)), "no finite numbers"
    ),
    "beyond a model": (setting("tensor", "negative.0", torch.full((1, 7, 5), 1e38)), "too large"),
    "latents beyond a model": (setting("tensor", "latents", torch.full((4, 2, 4, 3, 5), 1e38)), "too large"),
    "sigmas beyond a model": (setting("tensor", "sigmas", torch.tensor([1e30, 3.0, 1.0, 0.0])), "too large"),
    "eight bits": (
        setting("tensor", "latents", torch.zeros(4, 2, 4, 3, 5, dtype=torch.float8_e4m3fn)),
        'of the kind F8_E4M3 in "latents", where F16, BF16, F32, F64 are read',
    ),
    "a number for windows": (setting("about", "windows", 5), "one null embedding"),
    "a number that no float holds": (setting("about", "windows", [0.0, 0.5, 10**400, 1.0]), "unreadable header"),
    "such a weight": (setting("about", "header", {**HEADER, "weights": [10**400]}), "unreadable header"),
    "NaN in the header": (setting("about", "header", {**HEADER, "cfg": float("nan")}), "unreadable header"),
    "a prompt that is no text": (setting("about", "header", {**HEADER, "prompt": True}), "what it was made with"),
    "a seed that is a text": (setting("about", "header", {**HEADER, "seed": "1"}), "what it was made with"),
    "no tokens": (setting("tensor", "conditioning.0", torch.zeros(1, 0, 5)), 'nothing in "conditioning.0"'),
    "no text": (setting("tensor", "negative.0", torch.zeros(0, 7, 5)), 'nothing in "negative.0"'),
    "texts of two widths": (setting("tensor", "conditioning.0", torch.zeros(1, 7, 6)), "texts for several models"),
    "nulls of another width": (setting("tensor", "nulls", torch.zeros(3, 2, 7, 6)), "one null embedding"),
    "a tensor of nobody's": (setting("tensor", "x", torch.zeros(1)), 'holds "x", which no trajectory has'),
    "a text too many": (setting("tensor", "conditioning.1", torch.zeros(1, 7, 5)), 'holds "conditioning.1"'),
    "a control": (carrying("control", "x"), 'a conditioning with a "control" that no trajectory has'),
    "hooks": (carrying("hooks", None), '"hooks" that no trajectory has'),
    "a start that is a text": (carrying("start_percent", "0"), '"start_percent" that no trajectory has'),
    "an end beyond the schedule": (carrying("end_percent", 1.5), '"end_percent" that no trajectory has'),
    "a pooled text that is no tensor": (carrying("pooled_output", 1.0), '"pooled_output" that no trajectory has'),
    "a control that is a tensor": (
        setting("tensor", "conditioning.0.control", torch.zeros(1)), 'holds "conditioning.0.control", which no'
    ),
    "a pooled text of no shape": (setting("tensor", "conditioning.0.pooled_output", torch.zeros(5)), '"pooled_output"'),
    "a mask for other pictures": (setting("tensor", "conditioning.0.mask", torch.zeros(3, 8, 8)), '"mask" that no'),
    "a mask beyond white": (
        setting("tensor", "conditioning.0.mask", torch.full((1, 8, 8), 2.0)), '"conditioning.0.mask" that are too large'
    ),
}


def telling(**changes):
    """Forges what is said about learned words."""

    def change(tensors, about):
        about["learned"] = {**about["learned"], **changes}

    return change


def without(kind, name):
    return lambda tensors, about: (tensors if kind == "tensor" else about).pop(name)


def no_vectors(tensors, about):
    for name in ("learned.l", "learned.g"):
        tensors.pop(name)


ONE_EACH = "one vector for each token of its learned words"
FORGED_WORDS = {
    "newer": (setting("about", "format", file.FORMAT + 1), "written by a newer Attune"),
    "nothing said": (without("about", "learned"), ONE_EACH),
    "something else said": (setting("about", "learned", "x"), ONE_EACH),
    "a list said": (setting("about", "learned", []), ONE_EACH),
    "no vectors": (no_vectors, ONE_EACH),
    "no prompt": (telling(prompt=None), ONE_EACH),
    "words and positions": (telling(words=["cat"]), ONE_EACH),
    "a word that is a number": (telling(words=["cat", 3]), ONE_EACH),
    "words in no list": (telling(words=None), ONE_EACH),
    "a word without tokens": (telling(positions=[[2, 5, 6], []]), ONE_EACH),
    "fewer tokens": (telling(positions=[[2], [5]]), ONE_EACH),
    "the start token": (telling(positions=[[0], [5, 6]]), ONE_EACH),
    "half a token": (telling(positions=[[2.5], [5, 6]]), ONE_EACH),
    "true for a token": (telling(positions=[[True], [5, 6]]), ONE_EACH),
    "a text for tokens": (telling(positions=["2", "56"]), ONE_EACH),
    "too few steps": (setting("tensor", "learned.l", torch.zeros(2, 2, 3, 4)), ONE_EACH),
    "other pictures": (setting("tensor", "learned.g", torch.zeros(3, 1, 3, 5)), ONE_EACH),
    "other tokens": (setting("tensor", "learned.g", torch.zeros(3, 2, 4, 5)), ONE_EACH),
    "no width": (setting("tensor", "learned.l", torch.zeros(3, 2, 3)), ONE_EACH),
    "infinite": (setting("tensor", "learned.l", torch.full((3, 2, 3, 4), float("inf"))), 'in "learned.l" that are no'),
    "no windows": (setting("about", "windows", []), "at which steps its learned words hold"),
    "falling windows": (setting("about", "windows", [0.0, 0.9, 0.5, 1.0]), "at which steps its learned words hold"),
    "no conditioning": (setting("about", "conditioning", []), "at which steps its learned words hold"),
}


@pytest.mark.parametrize("forged", FORGED_WORDS)
def test_learned_words_that_contradict_themselves_are_refused(tmp_path, forged):
    path = tmp_path / "t.trajectory.safetensors"
    save(with_words(nulls=False), path)
    change, said = FORGED_WORDS[forged]
    rewritten(path, change)
    refused(path, said)


@pytest.mark.parametrize("forged", FORGED)
def test_what_contradicts_itself_is_refused(saved, forged):
    change, said = FORGED[forged]
    rewritten(saved, change)
    refused(saved, said)


@pytest.mark.parametrize("place", ["header", "versions", "windows", "learned", "else"])
@pytest.mark.parametrize("depth", [20, 500])
def test_what_nests_too_deep_is_refused(saved, place, depth):
    def nest(tensors, about):
        about[place] = []
        for _ in range(depth):
            about[place] = [about[place]]

    rewritten(saved, nest)
    refused(saved, "unreadable header")


def with_extras(**extras):
    text, own = made().conditioning[0]
    return replace(made(), conditioning=[[text, {**own, **extras}]])


def test_what_a_text_may_carry_survives_a_file(tmp_path):
    extras = {
        "start_percent": 0.25, "end_percent": 1.0, "strength": 1.5, "mask_strength": 1, "set_area_to_bounds": False,
        "width": 1024, "aesthetic_score": 6.0, "attune_seed": 2**64 - 1, "attune_text": None,
        "mask": torch.rand(2, 6, 10), "concat_latent_image": torch.randn(1, 4, 3, 5),
        "concat_mask": torch.ones(2, 1, 6, 10),
    }  # fmt: skip
    path = tmp_path / "t.trajectory.safetensors"
    save(with_extras(**extras), path)
    back = file.load(path).conditioning[0][1]
    assert back.keys() == {*extras, "pooled_output", "attune_prompt"}
    for key, value in extras.items():
        assert torch.equal(back[key], value) if torch.is_tensor(value) else back[key] == value


BROKEN = {
    "NaN": (lambda: replace(made(), latents=made().latents * float("nan")), "no finite numbers"),
    "null embeddings": (lambda: replace(made(), nulls=made().nulls / 0), 'in "nulls" that are no finite numbers'),
    "a text": (lambda: replace(made(), negative=[[torch.full((1, 7, 5), float("inf")), {}]]), "no finite numbers"),
    "windows": (lambda: replace(made(), windows=()), "one null embedding for each of its steps"),
    "levels": (lambda: replace(made(), sigmas=made().sigmas.flip(0)), "fall from noise to picture"),
    "whole numbers": (lambda: replace(made(), sigmas=torch.tensor([9, 3, 1, 0])), "of the kind torch.int64"),
    "a hook": (lambda: with_extras(hooks=object()), '"hooks" on it, which no file can hold'),
    "a list": (lambda: with_extras(area=[1, 2]), '"area" on it, which no file can hold'),
    "a text that is too long": (
        lambda: replace(made(), header={**HEADER, "prompt": "x" * (file.LONGEST + 1)}), "prompts too long for a file"
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_what_loading_would_refuse_is_not_saved(broken):
    make, said = BROKEN[broken]
    with pytest.raises(ValueError) as error:
        file.packed(make(), {})
    text = str(error.value)
    assert text.startswith("The TRAJECTORY ") and re.search(said, text) and text.endswith(".") and "\n" not in text


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells what was the most")
def test_three_gigabytes_whose_shapes_do_not_fit_are_not_read(saved):
    """The table fits the file, which takes no room on the disk, and not the trajectory."""
    content = saved.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    about, count = json.loads(content[8:end])["__metadata__"], 3 << 28
    table = {"__metadata__": about, "latents": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}
    table = json.dumps(table).encode()
    with saved.open("wb") as opened:
        opened.write(len(table).to_bytes(8, "little") + table)
        opened.truncate(8 + len(table) + 4 * count)

    def held(key):
        return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    before = held("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    refused(saved, "no noise levels")
    assert held("VmHWM") - before < 30  # MB


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
    with pytest.raises(ValueError, match="negative conditioning holds 2 texts, .* for exactly one; connect one there"):
        one_text(trajectory.conditioning * 2, "negative", "connect one there")
