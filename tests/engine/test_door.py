"""What each node's schema promises of its inputs is held at its door, and what the pack says can be shown anywhere."""

import math
import time

import numpy as np
import pytest
import torch
from comfy_api.latest import io
from comfy_extras.nodes_custom_sampler import KSamplerSelect

import attune.nodes
from attune.attention_patches import host as patches
from attune.attention_patches.refinement import Refinement
from attune.attention_patches.region_prompts import RegionPrompts
from attune.inversion.turns import Turns
from attune.messages import WHOLE
from attune.nodes.door import guarded

from .bench import SOURCE, adapter, half, outputs, prompt_swap

HALF_EMOJI = "\ud83d"
OWN = {"AttuneLoadTrajectory"}  # checks its file by itself, since the list of them grows
BIG = 1 << 62


def wrong_values(one):
    """What an input must not take, by the input's kind."""
    kind = one.get_io_type()
    if kind in ("INT", "FLOAT"):
        between = [one.min + 0.5] if kind == "INT" else []
        return [one.min - 1, one.max + 1, -BIG, 10**400, math.nan, -math.inf, math.inf, "5", [5], {}, *between]
    if kind == "BOOLEAN":
        return ["true", 2, math.nan, [], {}]
    if kind == "STRING":
        return [5, [], {}, f"a red {HALF_EMOJI}", torch.zeros(1)]
    if kind == "COMBO":
        return ["none of these", f"none {HALF_EMOJI}", 5, [], {}]
    tensors = [torch.tensor(1.0), torch.full((1, 64, 64), math.inf), torch.zeros(0, 64, 64)]
    if kind != "MASK":
        tensors += [torch.zeros(1, 64, 64, 5), torch.full((1, 64, 64, 3), math.nan), torch.zeros(64, 64)]
    if kind == "CONDITIONING":
        texts = torch.full((1, 77, 128), math.nan), torch.zeros(77, 128), torch.zeros(1, 0, 128), None
        tensors += [[], *([[text, {}]] for text in texts), [[torch.zeros(1, 77, 128)]]]
    return ["-5", 5, 1.5, [5], [[5, 5]], {}, {"samples": 5}, SOURCE, object(), *tensors]


def cases():
    for node in attune.nodes.NODES:
        schema = node.define_schema()
        for one in schema.inputs if schema.node_id not in OWN else ():
            yield pytest.param(node, schema, one, id=f"{schema.node_id}-{one.id}")


@pytest.fixture(scope="module")
def values(bench):
    """Something right for every socket."""
    text = bench.text(SOURCE)
    return {
        "MODEL": bench.model, "CLIP": bench.clip, "VAE": bench.vae, "CONDITIONING": text, "LATENT": bench.noise,
        "CONTROL_NET": adapter(), "SIGMAS": bench.sigmas, "MASK": half(), "IMAGE": torch.zeros(1, 128, 128, 3),
        "SAMPLER": outputs(KSamplerSelect, "euler")[0],
        "ATTUNE_TRAJECTORY": bench.trajectory, "ATTUNE_TURNS": Turns((), torch.zeros(1, 8, 8)),
        "ATTUNE_REFINEMENT": Refinement(("circle",)),
    }  # fmt: skip


@pytest.mark.parametrize("node, schema, one", list(cases()))
def test_what_no_schema_promises_gets_one_sentence(values, node, schema, one):
    right = {i.id: getattr(i, "default", None) for i in schema.inputs}
    right |= {i.id: values[str(i.get_io_type())] for i in schema.inputs if str(i.get_io_type()) in values}
    wrong = wrong_values(one) + [None] * (not one.optional)
    for value in wrong:
        with pytest.raises(ValueError) as error:
            node.execute(**{**right, one.id: value})
        said = str(error.value)
        assert said.endswith(".") and "\n" not in said and len(said) < 600, said
        assert schema.display_name in said and one.id in said and ("needs" in said or "is empty" in said), said
        said.encode("utf-8")
        assert (error.value.__cause__, error.value.__context__) == (None, None), "the log would hold it too"


def test_every_number_has_a_range_and_every_kind_a_check():
    from attune.nodes.door import SOCKETS, WIDGETS

    for node in attune.nodes.NODES:
        for one in node.define_schema().inputs:
            kind = str(one.get_io_type())
            assert kind in {**SOCKETS, **WIDGETS}, kind
            if kind in ("INT", "FLOAT"):
                assert math.isfinite(one.min) and one.min <= one.default <= one.max, (node, one.id)


ANY = io.ComfyNode  # under another name, since ComfyUI-Manager lists what it takes for the pack's nodes


class Given(ANY):
    """Hands out what came through its door."""

    @classmethod
    def define_schema(cls):
        inputs = [
            io.Int.Input("whole", min=0, max=9), io.Float.Input("real", min=0.0, max=1.0), io.Boolean.Input("yes"),
            io.Mask.Input("mask", optional=True), io.Image.Input("image", optional=True),
            io.Int.Input("count", min=1, max=9, default=3, optional=True),
        ]  # fmt: skip
        return io.Schema(node_id="Given", display_name="Given", category="", inputs=inputs, outputs=[])

    @classmethod
    def execute(cls, whole, real, yes, mask=None, image=None, count=3):
        return whole, real, yes, mask, image, count


@pytest.fixture(scope="module")
def given():
    return guarded(type("Guarded", (Given,), {"execute": vars(Given)["execute"]})).execute


def test_numbers_arrive_as_the_kind_that_is_promised(given):
    for whole, real, yes in ((2.0, 1, 1), (np.int64(2), np.float32(1), True), (np.float64(2), True, 1.0)):
        got = given(whole, real, yes)
        assert got == (2, 1.0, True, None, None, 3) and [type(one) for one in got[:3]] == [int, float, bool]
    assert given(whole=9, real=0.25, yes=False)[:3] == (9, 0.25, False)


@pytest.mark.parametrize("shape", [(6, 9), (1, 6, 9), (3, 6, 9), (3, 1, 6, 9), (1, 3, 6, 9)])
def test_masks_of_every_rank_arrive_alike(given, shape):
    torch.manual_seed(0)
    mask = torch.rand(shape)
    got = given(1, 0, True, mask)[3]
    assert torch.equal(got, mask.reshape(-1, 6, 9))
    assert torch.equal(given(1, 0, True, mask * 255)[3], (mask * 255).clamp(0, 1).reshape(-1, 6, 9))
    assert torch.equal(given(1, 0, True, mask > 0.5)[3], (mask > 0.5).float().reshape(-1, 6, 9))
    assert torch.equal(given(1, 0, True, mask.half() - 0.5)[3], (mask.half() - 0.5).float().clamp(0, 1).view(got.shape))


def test_what_is_right_goes_through_untouched(given):
    mask, image = torch.rand(2, 64, 64), torch.rand(1, 64, 64, 4)
    got = given(1, 0, True, mask, image)
    assert torch.equal(got[3], mask) and got[3].data_ptr() == mask.data_ptr() and got[4] is image


def test_nothing_for_what_is_optional_is_as_if_it_were_not_there(given):
    assert given(1, 0, True, None, image=None, count=None)[3:] == (None, None, 3)


def test_the_door_costs_no_time(given):
    """Against what a node does; a picture of 1024 pixels and its mask are a few milliseconds."""
    mask, image = torch.rand(1, 1024, 1024), torch.rand(1, 1024, 1024, 3)
    given(1, 0, True, mask, image)
    start = time.perf_counter()
    for _ in range(20):
        given(1, 0, True, mask, image)
    assert (time.perf_counter() - start) / 20 < 0.05


def test_a_vae_that_the_checkpoint_does_not_hold_is_as_good_as_none(bench, values):
    import comfy.sd

    empty = comfy.sd.VAE(sd={})  # what a loader makes of a checkpoint without one
    report = next(n for n in attune.nodes.NODES if n.__name__ == "AttuneInversionReport")
    with pytest.raises(ValueError, match="The VAE is empty, since the checkpoint has none; connect Load VAE"):
        report.execute(bench.trajectory, bench.model, empty, values["IMAGE"], 1.0)


def test_what_sampling_quotes_is_legible_too(bench):
    """A prompt with half an emoji, however it came onto the MODEL, is quoted by an error that the sampler raises."""
    prompt = f"{HALF_EMOJI} " + "a very long prompt " * 5000
    model = patches.install(bench.model, [], [RegionPrompts(prompt=prompt, tokens=77, lengths=(77,), regions=())])
    with pytest.raises(ValueError, match="No positive conditioning") as error:
        bench.sample(model, bench.text(SOURCE))
    said = str(error.value)
    assert said.encode("utf-8") and r'"\ud83d a very long prompt' in said and len(said) < 800 and said.endswith(".")


def test_a_prompt_of_100_kilobytes_gives_a_short_message_soon(bench):
    start = time.perf_counter()
    with pytest.raises(ValueError, match="Attune Prompt Swap") as error:
        prompt_swap(bench, 1, target='a "red" circle' + " and a red circle" * 6000)
    assert len(str(error.value)) <= WHOLE and str(error.value).endswith(".")
    assert time.perf_counter() - start < 20
