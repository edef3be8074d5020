"""Which picture a row of the UNet's draws: windows of frames, batches in parts, tiles. Each reads its own part of the
source and of the masks, or is refused in one sentence.
"""

from dataclasses import replace

import pytest
import torch

import nodes as stock
from attune.inversion import host as runs
from attune.nodes.cache import AttuneFeatureCache
from attune.nodes.edit import AttunePromptSwap
from attune.nodes.invert import GRIDS, LEVELS, AttuneDDIMInversion
from attune.nodes.self_attention import AttuneRegionPrompts

from .bench import METHODS, SOURCE, TARGET, Bench, half, local_blend, outputs, prompt_swap

windows = pytest.importorskip("comfy_extras.nodes_context_windows")  # 0.3.52 has none yet
FRAMES = 4
# Every method, and one of each kind where windows overlap and move.
CUT = [
    *((method, (0, "standard_static")) for method in METHODS),
    *((m, (1, s)) for m in ("prompt swap", "mutual self-attention") for s in ("standard_uniform", "looped_uniform")),
    ("refine, reweight and local blend", (1, "looped_uniform")),
]


@pytest.fixture(scope="module")
def frames():
    with torch.inference_mode():
        return Bench(height=8, width=8, steps=3, batch=FRAMES)


def windowed(model, overlap=0, schedule="standard_static", dim=0, length=2):
    node = windows.ContextWindowsManualNode
    return outputs(node, model, length, overlap, schedule, 1, False, "flat", dim)[0]


def apart(a, b):
    return float((a - b).abs().max() / b.std())


@pytest.mark.parametrize(("method", "schedule"), CUT)
def test_each_window_reads_its_own_frames(method, schedule, frames):
    """Frames of SD do not see each other, so windows must give what no windows give. Windows overlap and move, too."""
    made = METHODS[method](frames, 1)
    whole = frames.sample(*made)
    assert apart(frames.sample(windowed(made[0], *schedule), made[1]), whole) < 2e-3
    assert apart(whole[2:], whole[:2]) > 0.1  # frames that differ, or the test shows nothing


@pytest.mark.parametrize("schedule", [(0, "standard_static"), (1, "looped_uniform")])
def test_a_mask_for_each_frame(schedule, frames):
    masks = torch.zeros(FRAMES, 64, 64)
    for frame in range(FRAMES):
        masks[frame, :, 16 * frame : 16 * frame + 16] = 1
    model, positive = outputs(AttuneRegionPrompts, frames.model, frames.clip, TARGET, "a green star", mask_1=masks)
    whole = frames.sample(model, positive)
    assert apart(frames.sample(windowed(model, *schedule), positive), whole) < 2e-3
    same = outputs(AttuneRegionPrompts, frames.model, frames.clip, TARGET, "a green star", mask_1=masks[:1])
    assert apart(frames.sample(*same)[1:], whole[1:]) > 0.05


def test_windows_and_one_source_for_all_frames(frames):
    one = frames.but(trajectory=replace(frames.trajectory, latents=frames.trajectory.latents[:, :1]))
    made = prompt_swap(one, 1)
    assert apart(one.sample(windowed(made[0], 1), made[1]), one.sample(*made)) < 2e-3


def test_a_text_for_each_frame(frames):
    """As learned words give: ComfyUI's windows hand every window the first frames' texts."""
    texts = torch.cat([frames.text(f"a {word} circle")[0][0] for word in ("red", "green", "blue", "white")])
    model, positive = prompt_swap(frames, 1)
    positive = [[texts, positive[0][1]]]
    whole = frames.sample(model, positive)
    assert apart(frames.sample(windowed(model), positive), whole) < 2e-3


def test_windows_and_kept_features(frames):
    """What the first window's frames left in the cache is not read for the second's."""
    (model,) = outputs(AttuneFeatureCache, frames.model, 1000)
    for schedule in ((0, "standard_static"), (1, "standard_static"), (1, "standard_static")):
        cached, positive = prompt_swap(frames, 1, model)
        plain, _ = prompt_swap(frames, 1)
        wanted = frames.sample(windowed(plain, *schedule), positive)
        assert apart(frames.sample(windowed(cached, *schedule), positive), wanted) < 2e-3


def test_frames_are_inverted_without_windows(frames):
    picture = {"samples": runs.host_latent(frames.trajectory, -1)}
    rest = picture, frames.text(SOURCE), 3, GRIDS[0], LEVELS[0]
    plain, cut = (outputs(AttuneDDIMInversion, m, *rest)[0] for m in (frames.model, windowed(frames.model)))
    assert torch.equal(plain.latents, cut.latents)


def test_windows_of_the_picture_itself_are_refused(frames):
    model, positive = prompt_swap(frames, 1)
    with pytest.raises(ValueError, match="64x64 image in pieces of 64x32 pixels.*take that node"):
        frames.sample(windowed(model, dim=2, length=4), positive)


# ---- other packs' ways around a call of the UNet -----------------------------------------------------------------


def wrapped(model, wrapper):
    model = model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    return model


def doubled(conds, keys=None):
    """As tiled samplers repeat what goes with their tiles."""
    return {k: torch.cat([v, v]) if torch.is_tensor(v) and keys in (None, k) else v for k, v in conds.items()}


def tile_after_tile(apply, args):
    tiles = args["input"].chunk(2, -1)
    return torch.cat([apply(one, args["timestep"], **args["c"]) for one in tiles], -1)


def tiles_stacked(apply, args):
    x, t = torch.cat(args["input"].chunk(2, -1)), torch.cat([args["timestep"]] * 2)
    return torch.cat(apply(x, t, **doubled(args["c"])).chunk(2), -1)


def tiles_stacked_with_texts(apply, args):
    x, t = torch.cat(args["input"].chunk(2, -1)), torch.cat([args["timestep"]] * 2)
    return torch.cat(apply(x, t, **doubled(args["c"], "c_crossattn")).chunk(2), -1)


# Proximal guidance reads no place of a source, so tiles do not lead it astray.
PLACED = {name: method for name, method in METHODS.items() if name != "proximal guidance"}


@pytest.mark.parametrize("wrapper", [tile_after_tile, tiles_stacked, tiles_stacked_with_texts])
@pytest.mark.parametrize("method", PLACED.values(), ids=PLACED)
def test_tiles_are_refused(method, wrapper, frames):
    model, positive = method(frames, 1)
    with pytest.raises(ValueError, match="another|Another node") as told:
        frames.sample(wrapped(model, wrapper), positive)
    assert "64x64 image in pieces of 32x64 pixels" in str(told.value) and "the Attune node" in str(told.value)


def row_by_row(apply, args):
    """As packs do on little memory, or for several GPUs."""
    rows = range(len(args["input"]))
    cut = [{k: v[i : i + 1] if torch.is_tensor(v) else v for k, v in args["c"].items()} for i in rows]
    return torch.cat([apply(args["input"][i : i + 1], args["timestep"][i : i + 1], **cut[i]) for i in rows])


def test_rows_one_by_one_read_their_own_mask(frames):
    masks = torch.stack([half()[0] if frame % 2 else half()[0].flip(-1) for frame in range(FRAMES)])
    model, positive = outputs(AttuneRegionPrompts, frames.model, frames.clip, TARGET, "a green star", mask_1=masks)
    assert apart(frames.sample(wrapped(model, row_by_row), positive), frames.sample(model, positive)) < 2e-3


def test_rows_one_by_one_read_the_one_source(frames):
    one = frames.but(trajectory=replace(frames.trajectory, latents=frames.trajectory.latents[:, :1]))
    model, positive = local_blend(one, 1, prompt_swap(one, 1)[0], inside="circle")
    assert apart(one.sample(wrapped(model, row_by_row), positive), one.sample(model, positive)) < 2e-3


def test_sources_one_by_one_are_refused(frames):
    model, positive = prompt_swap(frames, 1)
    with pytest.raises(ValueError, match="batch of 4 images in parts of 1"):
        frames.sample(wrapped(model, row_by_row), positive)


def test_a_call_that_forgets_what_its_rows_are_is_refused(frames):
    def forget(apply, args):
        known = {k: v for k, v in args["c"].items() if k in ("c_crossattn", "transformer_options")}
        return apply(args["input"], args["timestep"], **known)

    model, positive = prompt_swap(frames, 1)
    with pytest.raises(ValueError, match="the Attune edit would be lost"):
        frames.sample(wrapped(model, forget), positive)


# ---- several targets of one source -------------------------------------------------------------------------------


def test_a_target_for_each_picture(frames):
    """The authors' code draws several targets of one source in one batch. Here edits in a row, each with its positive
    set to a mask that is white for its own picture, draw what a sampling for each target draws."""
    noise = {"samples": frames.noise["samples"][:1].repeat(FRAMES, 1, 1, 1)}
    one = frames.but(trajectory=replace(frames.trajectory, latents=frames.trajectory.latents[:, :1]), noise=noise)
    targets = [SOURCE.replace("red", color) for color in ("yellow", "green", "white", "black")]
    model, positive, alone = one.model, [], []
    for picture, target in enumerate(targets):
        swap = one.trajectory, SOURCE, target, 0.0, 0.8, 0.0, 0.4, 1024
        alone.append(one.sample(*outputs(AttunePromptSwap, one.model, one.clip, *swap))[picture])
        model, text = outputs(AttunePromptSwap, model, one.clip, *swap)
        mask = torch.zeros(FRAMES, 64, 64)
        mask[picture] = 1
        positive += outputs(stock.ConditioningSetMask, text, mask, "default", 1.0)[0]
    alone = torch.stack(alone)
    assert apart(alone[1:], alone[:1]) > 0.1  # targets that differ, or the test shows nothing
    assert apart(one.sample(model, positive), alone) < 1e-4
