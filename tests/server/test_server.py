"""The pack in a server that goes on running: bad input, Cancel, repetition and memory."""

import copy
import os

import numpy as np
import psutil
import pytest

from attune.tests import host
from attune.tests.server import workflow

INVERSION, SWAP, SAMPLER = "AttuneDDIMInversion", "AttunePromptSwap", "SamplerCustom"
RESULT = "word swap"


def word_swap(steps=12, seed=3, size=128):
    """The demo workflow cut down to its edited picture."""
    prompt = workflow.load(workflow.DEMO)
    prompt[workflow.find(prompt, INVERSION)]["inputs"]["steps"] = steps
    prompt[workflow.find(prompt, "AttuneDemoScene")]["inputs"].update(seed=seed, size=size)
    return workflow.cut(prompt, RESULT)


def edit(server, prompt):
    return workflow.pixels(server, workflow.saved(prompt, server.run(prompt))[RESULT])


@pytest.fixture(scope="module")
def undisturbed(server):
    """The edited picture of a run with nothing before it, and where the server keeps it."""
    workflow.forget(server)
    prompt = word_swap()
    image = workflow.saved(prompt, server.run(prompt))[RESULT]
    return image, workflow.pixels(server, image)


# -- bad input --------------------------------------------------------------------------------------------------------


def another_word(prompt):
    prompt[workflow.find(prompt, SWAP)]["inputs"]["target_prompt"] += " today"


def reversed_window(prompt):
    prompt[workflow.find(prompt, SWAP)]["inputs"].update(cross_start=0.9, cross_end=0.1)


def other_size(prompt):
    prompt[workflow.find(prompt, SAMPLER)]["inputs"]["latent_image"] = ["900", 0]
    prompt["900"] = {"class_type": "EmptyLatentImage", "inputs": {"width": 192, "height": 64, "batch_size": 1}}


def unknown_positive(prompt):
    sampler = prompt[workflow.find(prompt, SAMPLER)]["inputs"]
    sampler["positive"] = sampler["negative"]


def unknown_grid(prompt):
    prompt[workflow.find(prompt, INVERSION)]["inputs"]["grid"] = "theirs"


def more_steps_than_levels(prompt):
    inversion = prompt[workflow.find(prompt, INVERSION)]["inputs"]
    inversion["model"] = workflow.add(
        prompt, "ModelSamplingDiscrete", model=inversion["model"], sampling="lcm", zsnr=False
    )
    inversion["steps"] = 60


def merged(prompt):
    swap = prompt[workflow.find(prompt, SWAP)]["inputs"]
    model = swap["model"]
    swap["model"] = workflow.add(prompt, "ModelMergeSubtract", model1=model, model2=model, multiplier=0.5)


CASES = {
    "more steps than levels": (
        more_steps_than_levels,
        INVERSION,
        "but the MODEL's table has 50 noise levels; set steps",
    ),
    "merged": (merged, SWAP, "another checkpoint or merge than the MODEL's; invert the picture again"),
    "another word": (another_word, SWAP, "has 12 words and the target prompt 13"),
    "reversed window": (reversed_window, SWAP, "cross_start to cross_end is 0.9 to 0.1, but it needs"),
    "other size": (other_size, SAMPLER, "connect the LATENT of the node that made the TRAJECTORY"),
    "unknown positive": (unknown_positive, SAMPLER, "connect the positive output of the Attune edit node"),
    "unknown grid": (unknown_grid, INVERSION, 'The input grid of Attune DDIM Inversion is "theirs"'),
}


@pytest.mark.parametrize("spoil, culprit, words", CASES.values(), ids=CASES)
def test_bad_input_is_shown_on_the_node_and_does_no_harm(server, undisturbed, spoil, culprit, words):
    image, expected = undisturbed
    prompt = word_swap()
    spoiled = copy.deepcopy(prompt)
    spoil(spoiled)
    entry = server.wait_for_history(server.queue(spoiled))
    (error,) = (data for kind, data in entry["status"]["messages"] if kind == "execution_error")
    message = error["exception_message"].strip()
    assert (error["node_type"], error["exception_type"]) == (culprit, "ValueError"), error
    assert words in message
    assert message.endswith(".") and "\n" not in message
    assert np.array_equal(workflow.pixels(server, image), expected), "an earlier result is gone"
    assert np.array_equal(edit(server, prompt), expected), "the next run draws something else"


def test_a_swap_that_shifts_words_says_so_on_its_node(server):
    prompt = word_swap()
    node = workflow.find(prompt, SWAP)
    told = []
    for target in ("a yellow circle and a striped blue", "a circle and a big striped blue"):
        prompt[node]["inputs"]["target_prompt"] = f"{target} square on a gray background"
        server.run(prompt, on_text=lambda where, text: told.append((where, text)))
        assert len(told) == ("big" in target)
    assert told[0][0] == node and 'so the swap puts "circle" where "red" was, ' in told[0][1]
    assert told[0][1].endswith("or take Attune Prompt Refine, in which words that stay keep their place in the image.")


# -- letters that UTF-8 cannot hold -----------------------------------------------------------------------------------

HALF = "\ud83d"  # of an emoji
BAD_NAME = b"\xff.trajectory.safetensors"


def half_letter(kind, name):
    def spoil(prompt):
        prompt[workflow.find(prompt, kind)]["inputs"][name] = f"a red {HALF}"

    return spoil


def linked_half_letter(prompt):
    prompt[workflow.find(prompt, SWAP)]["inputs"]["source_prompt"] = ["900", 0]
    prompt["900"] = {"class_type": "PrimitiveString", "inputs": {"value": f"{HALF} " * 50_000}}


def bad_file(prompt):
    prompt[workflow.find(prompt, SWAP)]["inputs"]["trajectory"] = ["900", 0]
    prompt["900"] = {"class_type": "AttuneLoadTrajectory", "inputs": {"file": os.fsdecode(BAD_NAME)}}


def bad_prefix(prompt):
    prompt["900"] = {
        "class_type": "AttuneSaveTrajectory",
        "inputs": {"trajectory": [workflow.find(prompt, INVERSION), 0], "filename_prefix": f"attune/{HALF}"},
    }


LETTERS = {
    "caption": half_letter("AttuneDemoScene", "caption"),
    "choice": half_letter(INVERSION, "grid"),
    "prompt": half_letter(SWAP, "target_prompt"),
    "linked prompt": linked_half_letter,
    "word": half_letter(SWAP, "preserve"),
    "prefix": bad_prefix,
    "file": bad_file,
}


@pytest.mark.parametrize("spoil", LETTERS.values(), ids=LETTERS)
def test_half_a_letter_does_not_stop_the_queue(server, undisturbed, spoil):
    """ComfyUI's log holds UTF-8 alone: an error that quoted such a letter ended the thread that runs prompts."""
    (server.base / "input" / os.fsdecode(BAD_NAME)).write_bytes(b"no trajectory")
    prompt = word_swap()
    spoiled = copy.deepcopy(prompt)
    spoil(spoiled)
    try:
        entry = server.wait_for_history(server.queue(spoiled))
        (error,) = (data for kind, data in entry["status"]["messages"] if kind == "execution_error")
        said = error["exception_message"].strip()
        assert error["exception_type"] == "ValueError" and said.endswith(".") and "\n" not in said and len(said) < 600
    except host.PromptFailed as refused:  # at once, when it was queued
        said = str(refused)
    said.encode("utf-8")
    assert np.array_equal(edit(server, prompt), undisturbed[1])
    assert "Exception in thread" not in server.log_path.read_text(encoding="utf-8", errors="replace")


def test_another_clip_skip_is_said_on_the_node(server):
    workflow.forget(server)
    prompt, said = word_swap(), []
    swap = prompt[workflow.find(prompt, SWAP)]["inputs"]
    # Only a caption that the graph says plainly is known afterwards.
    caption = prompt[prompt[workflow.find(prompt, INVERSION)]["inputs"]["conditioning"][0]]["inputs"]
    caption["text"] = swap["source_prompt"] = workflow.SOURCE
    swap["target_prompt"] = workflow.SOURCE.replace("red", "yellow")
    server.run(prompt, on_text=lambda node, text: said.append((node, text)))
    assert not said
    swap["clip"] = workflow.add(prompt, "CLIPSetLastLayer", clip=swap["clip"], stop_at_clip_layer=-2)
    server.run(prompt, on_text=lambda node, text: said.append((node, text)))
    assert [node for node, _ in said] == [workflow.find(prompt, SWAP)]
    assert said[0][1].startswith("The CLIP is not the one that the TRAJECTORY was made with: its text of the same")


# -- Cancel -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("culprit", [INVERSION, SAMPLER])
def test_cancel_stops_at_once_and_leaves_nothing_behind(server, undisturbed, culprit):
    workflow.forget(server)
    prompt = word_swap()
    node, seen = workflow.find(prompt, culprit), []

    def cancel_at_step_3(at, step, _steps):
        if at == node:
            seen.append(step)
            if step == 3:
                server.interrupt()

    with pytest.raises(host.HostError, match="was interrupted"):
        server.run(prompt, cancel_at_step_3)
    # A step that was under way is finished, and one or two more may pass while the request travels.
    assert 3 <= max(seen) <= 6
    assert np.array_equal(edit(server, prompt), undisturbed[1])


# -- repetition -------------------------------------------------------------------------------------------------------


def test_the_same_prompt_draws_the_same_pixels(server, undisturbed):
    prompt = word_swap()
    other = edit(server, word_swap(seed=4))
    assert not np.array_equal(other, undisturbed[1])
    prompt[workflow.find(prompt, RESULT)]["inputs"]["filename_prefix"] = "attune/again"
    entry = server.run(prompt)
    ran_again = {workflow.find(prompt, INVERSION), workflow.find(prompt, SWAP), workflow.find(prompt, SAMPLER)}
    assert not ran_again & workflow.was_cached(entry)
    assert np.array_equal(workflow.pixels(server, workflow.saved(prompt, entry)[RESULT]), undisturbed[1])


def test_a_changed_edit_reuses_the_inversion(server, undisturbed):
    edit(server, word_swap())
    prompt = word_swap()
    prompt[workflow.find(prompt, SWAP)]["inputs"]["self_end"] = 0.0
    entry = server.run(prompt)
    assert workflow.find(prompt, INVERSION) in workflow.was_cached(entry)
    assert not np.array_equal(workflow.pixels(server, workflow.saved(prompt, entry)[RESULT]), undisturbed[1])


# -- memory -----------------------------------------------------------------------------------------------------------


def test_twenty_runs_take_no_more_memory_than_three(server):
    process, sizes = psutil.Process(server.process.pid), []
    for run in range(20):
        # A run that is not dropped keeps 4 MB of a picture of this size, however many its steps.
        edit(server, word_swap(steps=2, seed=run, size=256))
        sizes.append(process.memory_info().rss / 1e6)
    assert sizes[-1] - sizes[2] < 40, f"MB after each run: {[round(size) for size in sizes]}"
