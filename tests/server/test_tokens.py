"""Learning words over HTTP: what does not fit is one sentence and does no harm, and prompts can hold a saved word."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from attune.tests import host
from attune.tests.server import workflow

MASK, LEARN, SAVE = "AttuneBackgroundMask", "AttuneDynamicPrompt", "AttuneSaveLearnedWord"
STEPS = 3
BRACES = "a {red circle} and a {red square} on a gray background"
EDIT, REPORT, WORD = "with learned words", "learning report", "word"


def inputs(prompt, key):
    return prompt[workflow.find(prompt, key)]["inputs"]


def add(prompt, kind, **values):
    """A socket of a node more."""
    number = str(900 + len(prompt))
    prompt[number] = {"class_type": kind, "inputs": values, "_meta": {"title": f"{kind} {number}"}}
    return [number, 0]


def learning(*titles):
    """The shipped workflow in the demo world, cut down to some of its pictures, few steps and two updates in each."""
    prompt = workflow.in_the_demo_world(workflow.load("Attune - Dynamic prompt learning"))
    inputs(prompt, "AttuneDDIMInversion")["steps"] = STEPS
    inputs(prompt, LEARN)["inner_steps"] = 2
    return workflow.cut(prompt, *titles)


def saving(**values):
    """Learning, and a word of it saved."""
    prompt = learning(REPORT)
    given = {"word": "", "step": -1, "picture": 0, "filename_prefix": "attune/word", **values}
    add(prompt, SAVE, trajectory=[workflow.find(prompt, LEARN), 0], **given)
    return prompt


def ran(server, prompt):
    entry = server.wait_for_history(server.queue(prompt))
    assert entry["status"]["status_str"] == "success", entry["status"]
    return entry


def refused(server, prompt, culprit):
    """The sentence with which a node of a class refuses a prompt."""
    entry = server.wait_for_history(server.queue(prompt))
    (error,) = (data for kind, data in entry["status"]["messages"] if kind == "execution_error")
    assert (error["node_type"], error["exception_type"]) == (culprit, "ValueError"), error
    message = error["exception_message"].strip()
    assert message.endswith(".") and "\n" not in message and ". " not in message
    return message


def draw(server, prompt, title=EDIT):
    return workflow.pixels(server, workflow.saved(prompt, ran(server, prompt))[title])


@pytest.fixture(scope="module")
def undisturbed(server):
    workflow.forget(server)
    return draw(server, learning(EDIT))


# -- what is refused ---------------------------------------------------------------------------------------------------


def change(**values):
    return lambda prompt: inputs(prompt, LEARN).update(values)


def alone(prompt):
    """One noun and no masks."""
    inputs(prompt, LEARN)["source_prompt"] = BRACES.replace("{red square}", "red square")
    for name in ("background", "noun_masks"):
        inputs(prompt, LEARN).pop(name)


def one_mask_for_two_nouns(prompt):
    inputs(prompt, LEARN)["noun_masks"] = [workflow.find(prompt, MASK), 0]


def two_backgrounds(prompt):
    inputs(prompt, LEARN)["background"] = [workflow.find(prompt, MASK), 1]


def wide(prompt):
    inputs(prompt, LEARN)["background"] = add(prompt, "SolidMask", value=1.0, width=128, height=64)


def another_model(prompt):
    found = add(prompt, "CheckpointLoaderSimple", ckpt_name="v1-5-pruned-emaonly-fp16.safetensors")
    inputs(prompt, LEARN).update(model=found, clip=[found[0], 1])


def nothing_counts(prompt):
    inputs(prompt, LEARN).update(balance_weight=0.0, disjoint_weight=0.0, background_weight=0.0)


CASES = {
    "braces that do not close": (change(source_prompt="a {red circle and a square"), 'in the prompt "a {red circle a'),
    "braces that do not open": (change(source_prompt="a red circle} and a square"), "put each noun in a pair of its"),
    "braces in braces": (change(source_prompt="a {red {circle}} and a square"), "put each noun in a pair of its own"),
    "empty braces": (change(source_prompt="a {} and a {square}"), "put each noun in a pair of its own"),
    "no braces": (change(source_prompt="a red circle"), 'The prompt "a red circle" marks no noun, but at least one is'),
    "an empty prompt": (change(source_prompt=""), 'The prompt "" marks no noun'),
    "a piece of a word": (change(source_prompt="a {cir}cle and a {square}"), 'The word "cir" is not in the prompt'),
    "a word in a longer one": (
        change(source_prompt="a {circle}s and a {square} and a circle"), 'The braces around "circle" cut a word of the'
    ),
    "the end of a longer word": (
        change(source_prompt="a circle and a semi{circle}"), 'The braces around "circle" cut a word of the prompt "a'
    ),
    "one mask for two nouns": (one_mask_for_two_nouns, "masks where 2 are needed, for 1 picture and 2 nouns; connect"),
    "two backgrounds": (two_backgrounds, "background hold 2 masks where 1 are needed, for 1 picture"),
    "a mask of another picture": (wide, "measure 128x64, but the TRAJECTORY's picture 128x128; connect masks of that"),
    "one noun and no background": (alone, "With 1 noun and these weights no loss is active"),
    "no weights": (nothing_counts, "With 2 nouns and these weights no loss is active"),
    "an unknown optimizer": (change(optimizer="RMSprop"), 'The input optimizer of Attune Dynamic Prompt is "RMSprop"'),
    "another model": (another_model, "The TRAJECTORY was made with model family SD15 (UNetModel), but the MODEL is"),
}  # fmt: skip


@pytest.mark.parametrize("spoil, words", CASES.values(), ids=CASES)
def test_what_does_not_fit_is_one_sentence(server, undisturbed, spoil, words):
    prompt = learning(REPORT)
    spoil(prompt)
    assert words in refused(server, prompt, LEARN)


def test_the_background_mask_reads_braces_as_strictly(server, undisturbed):
    prompt = learning("parts of the picture")
    inputs(prompt, MASK)["source_prompt"] = "a {red circle and a {red square} on a gray background"
    assert "do not match; put each noun in a pair of its own" in refused(server, prompt, MASK)


UNSAVED = {
    "a word that was not learned": ({"word": "star"}, '"star" is none of those that were learned: red circle, red'),
    "a step that is not there": ({"step": STEPS}, f"The step is {STEPS}, but the TRAJECTORY has {STEPS}, counted from"),
    "a picture that is not there": ({"picture": 1}, "The picture is 1, but the TRAJECTORY has 1, counted from 0;"),
    "a file elsewhere": ({"filename_prefix": "../word"}, "\"../word\" leads out of ComfyUI's embeddings folder; give"),
    "a file in the root": ({"filename_prefix": "/word"}, "\"/word\" leads out of ComfyUI's embeddings folder; give"),
    "a name that no prompt can hold": ({"filename_prefix": "my word"}, '"my word" holds a space, a bracket, a comma'),
}  # fmt: skip


@pytest.mark.parametrize("values, words", UNSAVED.values(), ids=UNSAVED)
def test_what_cannot_be_saved_is_one_sentence(server, undisturbed, values, words):
    before = set(server.base.rglob("*.safetensors"))
    assert words in refused(server, saving(**values), SAVE)
    assert set(server.base.rglob("*.safetensors")) == before


def test_a_trajectory_without_learned_words_has_none_to_save(server):
    prompt = saving()
    inputs(prompt, SAVE)["trajectory"] = [workflow.find(prompt, "AttuneDDIMInversion"), 0]
    prompt = workflow.cut(prompt, SAVE)
    assert "holds no learned words; connect Attune Dynamic Prompt" in refused(server, prompt, SAVE)


@pytest.mark.parametrize("values, name", [({"step": -2}, "step"), ({"picture": -1}, "picture")])
def test_numbers_below_the_range_are_refused_before_anything_runs(server, values, name):
    with pytest.raises(host.HostError, match=rf"{SAVE} \(node \d+\): Value .* smaller than min .*{name}"):
        server.queue(saving(**values))


def test_afterwards_the_picture_is_the_same(server, undisturbed):
    assert np.array_equal(draw(server, learning(EDIT)), undisturbed)


# -- what is odd and works --------------------------------------------------------------------------------------------


def test_at_guidance_1_there_are_no_null_embeddings(server):
    """The negative is the empty text then, and the picture is drawn again without guidance."""
    title = "drawn again"
    prompt = learning(title, "file")
    inputs(prompt, LEARN)["guidance"] = inputs(prompt, "SamplerCustom")["cfg"] = 1.0
    entry = ran(server, prompt)
    (name,) = (text for result in entry["outputs"].values() for text in result.get("text", ()))
    kept = load_file(server.base / "output" / name.removeprefix("saved as "))
    assert "nulls" not in kept and "negative.0" in kept
    assert kept["learned.l"].shape[:2] == (STEPS, 1)
    picture, source = workflow.pixels(server, workflow.saved(prompt, entry)[title]), workflow.scene(workflow.ALIKE)
    red, wanted = (p[..., 0] - p[..., 1:].max(-1) > 80 for p in (picture.astype(float), source))
    assert (red & wanted).sum() > 0.8 * (red | wanted).sum(), "the picture does not come back"


# -- words in files ---------------------------------------------------------------------------------------------------


def from_noise(text):
    """A new picture of a prompt, in four steps, and the node that shows it."""
    prompt = {}
    loaded = add(prompt, "AttuneDemoCheckpoint")[0]
    clip, vae = [loaded, 1], [loaded, 2]
    positive, negative = (add(prompt, "CLIPTextEncode", text=said, clip=clip) for said in (text, ""))
    noise = add(prompt, "EmptyLatentImage", width=128, height=128, batch_size=1)
    latent = add(
        prompt, "KSampler", model=[loaded, 0], positive=positive, negative=negative, latent_image=noise, seed=1,
        steps=4, cfg=5.0, sampler_name="euler", scheduler="normal", denoise=1.0,
    )  # fmt: skip
    add(prompt, "PreviewImage", images=add(prompt, "VAEDecode", samples=latent, vae=vae))
    return prompt, list(prompt)[-1]


def test_a_saved_word_is_written_in_any_prompt(server):
    """The file's vectors are what stock nodes read, so pictures follow them and not only the word they began as."""
    names = []
    for step in (-1, 0):
        prompt = saving(word="red square", step=step, filename_prefix="attune/mine")
        shown = add(prompt, "PreviewAny", source=[workflow.find(prompt, SAVE), 0])[0]
        names += ran(server, prompt)["outputs"][shown]["text"]
    assert names == ["embedding:attune/mine_00001_", "embedding:attune/mine_00002_"]
    folder = server.base / "models" / "embeddings"
    mean, first = (load_file(folder / f"{name.removeprefix('embedding:')}.safetensors") for name in names)
    assert set(mean) == set(first) == {"clip_l"}
    assert mean["clip_l"].shape == first["clip_l"].shape == (2, 128)
    assert abs(mean["clip_l"] - first["clip_l"]).max() > 1e-3

    drawn = []
    for word in ("red square", *names, "embedding:attune/nothing"):
        prompt, last = from_noise(f"a {word} on a white background")
        (image,) = ran(server, prompt)["outputs"][last]["images"]
        drawn.append(workflow.pixels(server, image).astype(float))
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert abs(one - other).mean() > 0.1
    word, mean, _, nothing = drawn
    assert abs(mean - word).mean() < abs(nothing - word).mean() / 2, "the saved word means something else"
