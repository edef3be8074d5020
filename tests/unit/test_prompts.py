"""What the benchmark's methods become for a sample: API prompts with nothing in them that the edit does not need."""

import json
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from attune.benchmark import datasets, demo_edits, prompts
from attune.benchmark.prompts import NotApplicable, Setup, build, every_method, read_method

REAL = Setup(checkpoint="real.safetensors", size=512, steps=50, guidance=7.5)
ALONE = {
    "cpam_background": {"background"},
    "cpam_removal": {"remove"},
    "cpam": set(demo_edits.KINDS) - {"background", "remove"},
    "cpam_refined": set(demo_edits.KINDS) - {"background", "remove"},
}
# What the first sample of a kind has nothing for.
LACKS = {
    "p2p_preserve": dict.fromkeys(set(demo_edits.KINDS) - {"background"}, "no words for what stays"),
    "p2p_reweight": {"remove": "no word that is new"},
    "cpam_refined": {"shape": "no object that the caption of the target names"},
}


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return {sample.kind: sample for sample in datasets.read("demo", tmp_path_factory.mktemp("data"), count=1)[0]}


def nodes_of(prompt, kind):
    return [node["inputs"] for node in prompt.nodes.values() if node["class_type"] == kind]


@pytest.mark.parametrize("name", every_method())
@pytest.mark.parametrize("setup", [Setup(), REAL], ids=["demo", "real"])
def test_every_method_becomes_one_picture_and_nothing_else(samples, name, setup):
    method = read_method(name)
    for kind, sample in samples.items():
        if lacks := LACKS.get(name, {}).get(kind):
            with pytest.raises(NotApplicable, match=lacks):
                build(method, sample, setup)
            continue
        if kind not in ALONE.get(name, samples):
            with pytest.raises(NotApplicable, match="another kind"):
                build(method, sample, setup)
            continue
        if "$source_seed" in method.inputs.values():
            with pytest.raises(NotApplicable, match="this edits generated ones"):
                build(method, sample, setup)
            sample = replace(sample, picture=None)
        prompt = build(method, sample, setup)
        links = {v[0] for node in prompt.nodes.values() for v in node["inputs"].values() if isinstance(v, list)}
        assert set(prompt.nodes) - links == {prompt.result}  # all the rest is read by something
        assert [node["class_type"] for node in prompt.nodes.values() if "images" in node["inputs"]] == ["PreviewImage"]
        text = json.dumps(prompt.nodes)
        assert "$" not in text and "example.png" not in text and "drawing of a girl" not in text
        read = {node["inputs"]["image"] for node in prompt.nodes.values() if node["class_type"].startswith("LoadImage")}
        assert read == {file.name for file in prompt.files}
        loaders = {node["class_type"] for node in prompt.nodes.values() if "Checkpoint" in node["class_type"]}
        assert loaders == {"CheckpointLoaderSimple" if setup.checkpoint else "AttuneDemoCheckpoint"}
        assert not setup.checkpoint or "real.safetensors" in text


def test_captions_of_as_many_words_are_exchanged_and_others_refined(samples):
    method = read_method("p2p_ddim")
    for kind, node in (
        ("colour", "AttunePromptSwap"),
        ("pattern", "AttunePromptRefine"),
        ("remove", "AttunePromptRefine"),
    ):
        (found,) = nodes_of(build(method, samples[kind], Setup()), node)
        assert found["target_prompt"] == samples[kind].target


@pytest.mark.parametrize("source, target, node", [
    ("a red circle", "a blue circle", "Swap"),
    ("a woman in a t-shirt", "a woman in a sweater", "Refine"),
    ("a dog's bowl", "a cats bowl", "Refine"),
    ("2 cats", "10 dogs", "Refine"),
    ("2 cats", "3 dogs", "Swap"),
    ("a red door.", "a red door now", "Swap"),
    ("a cat, sitting", "a dog, sleeping", "Swap"),
    ("a red circle on a gray wall", "a circle on a dark gray wall", "Refine"),  # as many words, but shifted
    ("a (red) car", "a (blue) car", "Swap"),
    ("red car " * 60, "blue car " * 60, "Swap"),  # in two chunks
])  # fmt: skip
def test_a_swap_is_told_from_a_refinement_by_the_words_of_clip(samples, source, target, node):
    sample = replace(samples["colour"], source=source, target=target)
    assert prompts.value_of("$exchange", sample, Setup()) == f"AttunePrompt{node}"


def test_captions_are_given_to_the_host_as_they_read(samples):
    """Bare brackets are weights in the host's prompts; those of a data set are none."""
    sample = replace(
        samples["colour"], source="a (red:2) car :-)", target="a (blue) car", extras={"kept words": ["(old", "wheel)"]},
        words=(("(red:2)", "(blue)"), ("car", "")),
    )  # fmt: skip
    given = {name: prompts.value_of(name, sample, Setup()) for name in ("$source", "$target", "$words", "$outside")}
    assert given == {
        "$source": r"a \(red:2\) car :-\)", "$target": r"a \(blue\) car", "$words": r"\(red:2\), \(blue\), car",
        "$outside": r"\(old, wheel\)",
    }  # fmt: skip
    assert prompts.value_of("$braced", sample, Setup()) == r"a {\(red:2\)} {car} :-\)"
    built = json.dumps(build(read_method("p2p_ddim"), sample, Setup()).nodes)
    assert json.dumps(given["$source"]) in built and json.dumps(given["$target"]) in built
    with pytest.raises(NotApplicable, match="no thing"):
        prompts.value_of("$braced", replace(sample, source="a {red} car"), Setup())


@pytest.mark.parametrize("name, change, lack", [
    ("cpam", {"mask": None}, "no mask"),
    ("p2p_ddim", {"source": ""}, "no caption of the source"),
    ("p2p_blend", {"words": ()}, "no words that say where"),
    ("masafusion", {"extras": {}, "truth": None}, "no outlines"),
    ("truth", {"truth": None}, "no true result"),
])  # fmt: skip
def test_a_sample_that_lacks_something_is_told(samples, name, change, lack):
    with pytest.raises(NotApplicable, match=lack):
        build(read_method(name), replace(samples["colour"], **change), Setup())


def test_pictures_are_made_when_they_are_read(samples):
    files = {kind: build(read_method("inpainting"), samples[kind], Setup()).files for kind in ("colour", "background")}
    grown = {kind: _white(files[kind][1].make()) for kind in files}
    true = {kind: _white(samples[kind].mask.read_bytes()) for kind in files}
    assert grown["colour"] > true["colour"] and grown["background"] == true["background"]
    kept = build(read_method("cpam_background"), samples["background"], Setup()).files[1]
    assert _white(kept.make()) == 128 * 128 - true["background"]
    sketch = build(read_method("masafusion"), samples["move"], Setup()).files[1]
    assert 0 < _white(sketch.make()) < 2000


def test_a_sketch_of_a_true_picture_is_its_outlines(samples):
    """Where no scene is known, as in MagicBrush, the lines come from the picture, and only where its colours step."""
    sample = replace(samples["shape"], extras={})
    files = [build(read_method("masafusion"), one, Setup()).files[1] for one in (samples["shape"], sample)]
    drawn, traced = (np.asarray(Image.open(BytesIO(file.make())).convert("L")) > 127 for file in files)
    truth = np.asarray(Image.open(sample.truth).convert("RGB")).astype(float)
    step = np.maximum(*(np.abs(np.diff(truth, axis=a, append=0)).max(-1) for a in (0, 1))) > 50
    near = ndimage.binary_dilation(step, iterations=3)
    assert traced.shape == drawn.shape == (128, 128) and traced.any() and not (traced & ~near).any()
    assert (drawn & ndimage.binary_dilation(traced, iterations=3)).sum() > 0.9 * drawn.sum()
    assert files[0].name != files[1].name, "the host would keep one picture for both"


def _white(content):
    return sum(v > 127 for v in Image.open(BytesIO(content)).convert("L").tobytes())


def test_a_seed_is_the_samples_own(samples):
    one, other = (
        nodes_of(build(read_method("sdedit_0_5"), samples[k], Setup()), "KSampler")[0]["seed"]
        for k in ("colour", "add")
    )
    again = nodes_of(build(read_method("inpainting"), samples["colour"], Setup()), "KSampler")[0]["seed"]
    assert one == again != other
    assert nodes_of(build(read_method("sdedit_0_5"), samples["colour"], Setup(seed=1)), "KSampler")[0]["seed"] != one


def test_settings_of_a_run_come_last(samples):
    changes = {"*": {"SamplerCustom/cfg": 9.0, "KSampler/cfg": 8.0}, "fpe": {"Attune Free Prompt Editing/end": 0.25}}
    prompt = build(read_method("fpe"), samples["colour"], Setup(changes=changes))
    assert nodes_of(prompt, "SamplerCustom")[0]["cfg"] == 9.0
    assert nodes_of(prompt, "AttuneFreePromptEditing")[0]["end"] == 0.25
    assert prompt.digest != build(read_method("fpe"), samples["colour"], Setup()).digest
    for place in ("Attune Free Prompt Editing/ends", "No such node/end"):
        with pytest.raises(ValueError, match="no such node|has no input ends"):
            build(read_method("fpe"), samples["colour"], Setup(changes={"fpe": {place: 0.25}}))


def test_dynamic_prompt_learning_is_the_papers_unless_its_name_says_more(samples):
    names = "p2p_dynamic_prompt", "p2p_dynamic_prompt_noun_masks"
    papers, ours = (build(read_method(name), samples["colour"], Setup()) for name in names)
    learned = [nodes_of(one, "AttuneDynamicPrompt")[0] for one in (papers, ours)]
    assert "background" in learned[0] and "noun_masks" not in learned[0] and "noun_masks" in learned[1]
    assert nodes_of(papers, "AttuneBackgroundMask")[0]["every"] == 1
    with pytest.raises(ValueError, match="has no input noun_mask"):
        changes = {names[0]: {"Attune Dynamic Prompt/noun_mask": None}}
        build(read_method(names[0]), samples["colour"], Setup(changes=changes))


@pytest.mark.parametrize("told, why", [
    ({"name": "x", "workflow": "Attune - Refine a prompt.json", "result": "refined", "input": {}}, "has input, which"),
    ({"name": "x", "result": "refined"}, "lacks workflow"),
    ({"name": "x", "workflow": "none.json", "result": "refined"}, "neither beside it"),
])  # fmt: skip
def test_a_method_that_is_wrong_says_how(tmp_path, told, why):
    (tmp_path / "mine.json").write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(ValueError, match=why):
        read_method(str(tmp_path / "mine.json"))
    with pytest.raises(ValueError, match="no method 'p2p_dim'; there are .*p2p_ddim"):
        read_method("p2p_dim")


@pytest.mark.parametrize("size, mode", [((300, 200), "RGB"), ((64, 64), "L"), ((512, 512), "RGBA")])
def test_pictures_become_the_middle_square(tmp_path, size, mode):
    picture = Image.new("RGB", size, "red")
    picture.paste("blue", (size[0] // 2 - min(size) // 2, 0, size[0] // 2 + min(size) // 2, size[1]))
    picture.convert(mode).save(tmp_path / "one.png")
    made = prompts.square(tmp_path / "one.png", 128, tmp_path / "samples")
    assert made.parent == tmp_path / "samples"
    with Image.open(made) as found:
        assert found.size == (128, 128) and found.mode == ("L" if mode == "L" else "RGB")
        assert mode != "RGB" or found.getpixel((1, 64)) == found.getpixel((126, 64)) == (0, 0, 255)
    assert prompts.square(made, 128, tmp_path / "samples") == made


def test_a_grey_picture_of_16_bits_keeps_its_values(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).round().astype(np.uint16)
    for name, values in (("big.png", ramp), ("small.tiff", ramp), ("wide.tiff", ramp.astype(np.int32))):
        Image.fromarray(values).save(tmp_path / name)
        with Image.open(prompts.square(tmp_path / name, 64, tmp_path / "samples" / name)) as found:
            assert found.mode == "RGB" or found.mode == "L"
            assert np.abs(np.asarray(found.convert("L")) - ramp / 257).max() <= 1


def test_what_is_set_for_the_demo_model_is_told():
    windows = {"by kind": {"shape": 0.4, "add": 0.4}, "otherwise": 0.8}
    method = prompts.Method("x", "X", "r", {}, demo={"Node/cross_end": windows, "Node/grow": 8})
    assert prompts.tuned(method) == "Set for the demo model: cross_end 0.4 for shape, add, else 0.8; grow 8."
    assert prompts.tuned(replace(method, demo={})) == ""


def test_generated_sources_come_from_the_data_seed_or_the_samples_own(samples):
    """One noise for source and edit; what inverts a picture is not for them."""
    sample = replace(samples["colour"], picture=None, extras={})
    for name in ("generated_source", "plain_generated", "p2p_generated", "fpe_generated"):
        for extras, seed in (({}, prompts.seed_of(sample, 0)), ({"seed": 7}, 7)):
            prompt = build(read_method(name), replace(sample, extras=extras), Setup())
            (recorded,) = nodes_of(prompt, "AttuneRecordTrajectory")
            assert recorded["noise_seed"] == seed and prompt.files == ()
    (edit,) = nodes_of(build(read_method("fpe_generated"), sample, Setup()), "AttuneFreePromptEditing")
    assert edit["target_prompt"] == sample.target and edit["source_prompt"][1] == 0
    with pytest.raises(NotApplicable, match="this inverts one"):
        build(read_method("p2p_ddim"), sample, Setup())


def test_new_words_are_raised(samples):
    for kind, words in (("colour", 1), ("pattern", 1)):
        sample = samples[kind]
        (found,) = nodes_of(build(read_method("p2p_reweight"), sample, Setup()), "AttunePromptReweight")
        lines = found["weights"].splitlines()
        assert len(lines) == words and all(line.endswith(": 2") for line in lines)
        assert all(line[:-3] in sample.target and line[:-3] not in sample.source for line in lines)
    with pytest.raises(NotApplicable, match="no word that is new"):
        build(read_method("p2p_reweight"), replace(samples["colour"], source="an", target="a an"), Setup())


@pytest.mark.parametrize("flags", range(1, 8))
def test_cpam_has_a_goal_for_every_kind_made_of_flags(samples, flags):
    there = [flag for bit, flag in enumerate(datasets.FLAGS) if flags >> bit & 1]
    sample = replace(samples["shape"], kind=" and ".join(there))
    here, other = ("cpam_background", "cpam") if "background" in there else ("cpam", "cpam_background")
    with pytest.raises(NotApplicable, match="another kind"):
        build(read_method(other), sample, REAL)
    (strategy,) = nodes_of(build(read_method(here), sample, REAL), "AttuneMaskStrategy")
    if "background" in there:
        assert strategy["goal"] == "change background"
    else:
        assert strategy["goal"] == ("change pose or view" if "retain" in there else "replace object")


def test_an_objects_name_is_given_where_the_target_names_it(samples):
    sample = replace(samples["colour"], thing="Circle", target="a yellow circle")
    (refined,) = nodes_of(build(read_method("cpam_refined"), sample, Setup()), "AttuneMaskRefinement")
    assert refined["words"] == "Circle"
    for thing in ("circ", "", "square"):
        with pytest.raises(NotApplicable, match="no object that the caption of the target names"):
            build(read_method("cpam_refined"), replace(sample, thing=thing), Setup())
