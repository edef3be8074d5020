"""Seeing, on the demo model: maps, masks and clusters against what is truly in the picture."""

import functools
import re
from dataclasses import replace

import comfy.model_management
import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch
from comfy.model_management import InterruptProcessingException
from comfy_execution.graph_utils import ExecutionBlocker

import nodes as stock
from attune.attention_patches import maps
from attune.nodes import sheet, view
from attune.nodes.demo import AttuneDemoScene
from attune.nodes.invert import GRIDS, LEVELS, AttuneDDIMInversion

from .bench import Bench, outputs, prompt_swap

CAPTION = "a red circle and a blue square on a gray background"


class Seen:
    """A demo scene, its true masks (circle, square), its latent and its trajectory."""

    def __init__(self, bench, seed=3, caption=CAPTION):
        self.bench = bench
        self.image, self.masks, self.caption = outputs(AttuneDemoScene, caption, seed, 128)
        self.latent = outputs(stock.VAEEncode, bench.vae, self.image)[0]
        settings = bench.text(caption), 20, GRIDS[0], LEVELS[0]
        self.trajectory = outputs(AttuneDDIMInversion, bench.model, self.latent, *settings)[0]

    def maps(self, words="", tokens=256, every=4, trajectory=None, prompt=None, **kwargs):
        if "latent" not in kwargs:
            trajectory = trajectory or self.trajectory
        prompt = self.caption if prompt is None else prompt
        return outputs(
            view.AttuneAttentionMaps, self.bench.model, self.bench.clip, trajectory, prompt, words, tokens, every,
            **kwargs,
        )  # fmt: skip

    def parts(self, tokens=256, every=4, method="PCA", count=3, clusters=3, seed=0, trajectory=None, **kwargs):
        return outputs(
            view.AttuneSelfAttentionView, self.bench.model, trajectory or self.trajectory, tokens, every, method, count,
            clusters, seed, **kwargs,
        )  # fmt: skip


@pytest.fixture(scope="module")
def seen(bench):
    with torch.inference_mode():
        return Seen(bench)


def iou(one, other):
    one, other = one > 0.5, other > 0.5
    return float((one & other).sum() / (one | other).sum())


def one_sentence(error, *parts):
    text = str(error.value)
    for part in parts:
        assert re.search(part, text), text
    assert "\n" not in text and text.endswith(".")


# ---- cross-attention ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_a_words_mask_covers_its_object(bench, seed):
    scene = Seen(bench, seed)
    for number, word in enumerate(("circle", "square")):
        _, _, mask = scene.maps(mask_word=word, threshold=0.4)
        assert mask.shape == (1, 128, 128) and set(mask.unique().tolist()) == {0.0, 1.0}
        assert iou(mask[0], scene.masks[number]) > 0.5, word
        assert iou(mask[0], scene.masks[1 - number]) < 0.15, word


def test_a_finished_latent_takes_the_place_of_a_trajectory(seen):
    found = [seen.maps(latent=seen.latent, every=10, mask_word="circle", threshold=0.4) for _ in range(2)]
    assert iou(found[0][2][0], seen.masks[0]) > 0.5
    assert torch.equal(found[0][0], found[1][0])  # the noise is always the same
    assert found[0][1].total == view.LATENT_STEPS


def test_a_sampled_latent_as_the_host_gives_it(seen, bench):
    euler = outputs(custom.KSamplerSelect, "euler")[0]
    negative, positive = bench.text(""), bench.text(CAPTION)
    drawn = outputs(
        custom.SamplerCustom, bench.model, True, 1, 3.0, positive, negative, euler, bench.sigmas, bench.noise
    )
    assert seen.maps(latent=drawn[0], every=25)[0].isfinite().all()


def test_layers_and_numbers(seen):
    each = seen.maps(words="circle, square", layers=maps.EACH)[1]
    assert len(each.layers) == 16 and each.layers[0] == "0 down 16x16" and each.layers[6] == "6 middle 2x2"
    assert [m.shape[-1] for m in each.maps] == [16, 16, 8, 8, 4, 4, 2, 4, 4, 4, 8, 8, 8, 16, 16, 16]
    single = seen.maps(words="circle, square", layer=14)[1]
    assert single.layers == (each.layers[14],) and torch.allclose(single.maps[0], each.maps[14], atol=1e-6)
    groups = {"down": (0, 1), "middle": (6,), "up": (13, 14, 15), maps.NEAREST: (0, 1, 13, 14, 15)}
    for layers, numbers in groups.items():
        found = seen.maps(words="circle, square", layers=layers)[1]
        mean = sum(each.maps[n] for n in numbers) / len(numbers)
        assert torch.allclose(found.maps[0], mean, atol=1e-5), layers
    assert seen.maps(words="circle", layers="up", tokens=64)[1].maps[0].shape[-2:] == (8, 8)


def test_steps_apart_and_together(seen):
    apart, together = (seen.maps(words="circle", steps=s)[1] for s in ("each", "average"))
    assert apart.steps == ((0,), (4,), (8,), (12,), (16,)) and apart.total == 20
    assert torch.allclose(apart.maps[0].mean(1, keepdim=True), together.maps[0], atol=1e-6)
    assert (apart.maps[0][:, 0] - apart.maps[0][:, -1]).abs().max() > 0.01


def test_a_word_of_two_pieces_is_their_sum(seen, bench):
    prompt = "a red circle and a chiaroscuro blue square"
    positions = view.host.read_words(bench.clip, prompt).find("chiaroscuro")[0]
    assert len(positions) > 1
    word = seen.maps(words="chiaroscuro", prompt=prompt)[1].maps[0][0, 0]
    gathered = maps.MapSum([(p,) for p in positions])

    def receive(place, own, heads):
        if place.kind == "cross":
            gathered.add(place, own, heads)

    view.look(bench.model, bench.text(prompt), seen.trajectory, 4, receive, lambda *_: None)
    assert torch.allclose(gathered.level(256).sum(0), word, atol=1e-6)


def test_words_beyond_the_first_chunk(seen):
    prompt = ", ".join([CAPTION] + ["fine grain"] * 30 + ["green heart"])
    _, found, mask = seen.maps(words="heart, circle", prompt=prompt, every=20, mask_word="heart")
    assert found.words == ("heart", "circle") and found.maps[0].isfinite().all()
    assert 0 < float(found.maps[0][0].mean()) < 0.1


def by_hand(seen, prompt):
    """Every text token's map (T, h, w) at 16x16, summed up without the pack's own gathering."""
    total = []

    def receive(place, own, heads):
        if place.kind == "cross" and place.tokens == 256:
            q, k = (x[0].unflatten(-1, (heads, -1)).transpose(0, 1).float() for x in (own.q, own.k))
            total.append((q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1).mean(0))

    view.look(seen.bench.model, seen.bench.text(prompt), seen.trajectory, 10, receive, lambda *_: None)
    return (sum(total) / len(total)).T.unflatten(1, (16, 16)).cpu()


@pytest.mark.parametrize("chunks", [1, 2])
def test_start_end_and_padding_are_shown_like_words(seen, chunks):
    prompt = ", ".join([CAPTION] + ["fine grain"] * 30 * (chunks - 1))
    every = by_hand(seen, prompt)
    ends = [len(CAPTION.split()) + 1] if chunks == 1 else [76, 77 + 1 + len(CAPTION.split()) + 30 * 3 - 75]
    _, found, mask = seen.maps(words="<start>, circle, <end>, <padding>", prompt=prompt, every=10, mask_word="<end>")
    assert found.words == ("<start>", "circle", "<end>", "<padding>")
    start, _, end, padding = found.maps[0][:, 0, 0]
    assert torch.allclose(start, every[::77].sum(0), atol=1e-5)
    assert torch.allclose(end, every[ends].sum(0), atol=1e-5)
    empty = [p for p in range(77 * chunks) if p % 77 and p > ends[p // 77]]
    assert torch.allclose(padding, every[empty].sum(0), atol=1e-5)
    assert 0 < mask.mean() < 1


def test_the_mask_word_may_be_one_that_is_not_shown(seen):
    found, mask = seen.maps(words="red", mask_word="blue square", threshold=0.4)[1:]
    assert found.words == ("red", "blue square") and iou(mask[0], seen.masks[1]) > 0.5
    both = seen.maps(words="red, a", mask_word="a")[1]  # all three of them
    assert both.words == ("red", "a", "a", "a", "a")
    assert torch.allclose(both.maps[0][4], both.maps[0][1:4].sum(0), atol=1e-6)


def test_mask_options_reach_the_mask(seen):
    get = functools.partial(seen.maps, words="circle", every=20)
    hard, grown, shrunk, soft = (get(**k)[2] for k in ({}, {"grow": 6}, {"grow": -3}, {"threshold": 0.0}))
    assert grown.sum() > hard.sum() > shrunk.sum() > 0
    assert len(soft.unique()) > 100 and soft.min() == 0 and soft.max() == 1
    edge = get(feather=8)[2]
    assert len(edge.unique()) > 100 and abs(float(edge.mean() / hard.mean()) - 1) < 0.05


def test_a_batch_of_an_odd_size(bench):
    torch.manual_seed(0)
    latent = {"samples": torch.randn(2, 4, 12, 17) * 4}
    scene = Seen.__new__(Seen)
    scene.bench, scene.caption = bench, CAPTION
    pictures, found, mask = scene.maps(latent=latent, every=25, threshold=0.0)
    assert pictures.shape[0] == 2 and mask.shape == (2, 96, 136) and found.maps[0].shape[2:] == (2, 12, 17)
    alone = scene.maps(latent={"samples": latent["samples"][:1]}, every=25, threshold=0.0)
    assert (alone[2] - mask[:1]).abs().max() < 1e-3 < 0.2 < (mask[0] - mask[1]).abs().max()


def test_a_trajectory_or_a_latent(seen):
    with pytest.raises(ValueError) as error:
        seen.maps(latent=None)
    one_sentence(error, "no trajectory or latent", "connect one")
    with pytest.raises(ValueError) as error:
        seen.maps(trajectory=seen.trajectory, latent=seen.latent)
    one_sentence(error, "both a trajectory and a latent")
    with pytest.raises(ValueError) as error:
        seen.maps(latent={"samples": torch.zeros(1, 16, 16, 16)})
    one_sentence(error, "needs .pictures, 4,")


def test_layers_steps_and_words_that_are_none(seen):
    for wrong, part in (({"layers": "zzz"}, "level nearest"), ({"steps": "zzz"}, "average, each")):
        with pytest.raises(ValueError) as error:
            seen.maps(**wrong)
        one_sentence(error, "zzz", part)
    with pytest.raises(ValueError) as error:
        seen.maps(layer=16, every=20)
    one_sentence(error, "16 layers", "0 to 15")
    with pytest.raises(ValueError) as error:
        seen.maps(mask_word="zebra")
    one_sentence(error, '"zebra" is not in the prompt')
    with pytest.raises(ValueError) as error:
        seen.maps(layers=maps.EACH, steps="each", every=1)
    one_sentence(error, "3520 maps", "name fewer words")


# ---- self-attention ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_clusters_are_the_background_and_the_objects(bench, seed):
    scene = Seen(bench, seed)
    components, parts, masks = scene.parts()
    assert masks.shape == (3, 128, 128) and torch.equal(masks.sum(0), torch.ones(128, 128))
    background = 1 - scene.masks.amax(0)
    assert iou(masks[0], background) > 0.8
    for truth in scene.masks:
        assert max(iou(m, truth) for m in masks[1:]) > 0.5
    assert components.shape[0] == parts.shape[0] == 1 and components.std() > 0.1 and parts.std() > 0.1


def test_the_view_repeats_and_its_level_can_be_chosen(seen):
    first, again = seen.parts(clusters=4, seed=7), seen.parts(clusters=4, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    coarse = seen.parts(tokens=60, clusters=2)[2]
    assert torch.equal(coarse, coarse[:, ::16, ::16].repeat_interleave(16, 1).repeat_interleave(16, 2))


def test_it_looks_under_the_trajectorys_caption_or_anothers(seen, bench):
    own, same, other = (
        seen.parts(method="SVD", **k)[0]
        for k in ({}, {"clip": bench.clip, "prompt": CAPTION}, {"clip": bench.clip, "prompt": "a green heart"})
    )
    assert torch.equal(own, same) and (own - other).abs().max() > 0.05


def test_a_batch_is_looked_at_picture_by_picture(bench):
    batch = Bench(batch=2)
    trajectory = replace(batch.trajectory, conditioning=batch.text(CAPTION))
    scene = Seen.__new__(Seen)
    scene.bench = bench
    components, parts, masks = scene.parts(trajectory=trajectory, clusters=4)
    assert components.shape[0] == parts.shape[0] == 2 and masks.shape[0] == 8
    second = replace(trajectory, latents=trajectory.latents[:, 1:])
    alone = scene.parts(trajectory=second, clusters=4)[2]
    assert (alone != masks[4:]).float().mean() < 0.02 < (masks[:4] != masks[4:]).float().mean()


def centre(mask):
    ys, xs = mask.nonzero().float().T
    return {"x": float(xs.mean() + 0.5) / mask.shape[1], "y": float(ys.mean() + 0.5) / mask.shape[0]}


@pytest.mark.parametrize("number", [0, 1])
def test_a_place_looks_at_its_own_object(seen, number):
    mask = seen.masks[number : number + 1]
    for place in ({"mask": mask}, centre(mask[0])):
        drawn, blocked, look = seen.parts(method="one place", every=10, **place)
        assert isinstance(blocked, ExecutionBlocker) and look.shape == (1, 128, 128)
        assert (look.min(), look.max()) == (0, 1)
        inside, outside = ((look[0] * m).sum() / m.sum() for m in (mask[0], 1 - seen.masks.amax(0)))
        assert inside > 2 * outside
    over = seen.parts(method="one place", every=10, image=seen.image, **place)
    assert over[0].shape[2] > drawn.shape[2] and torch.equal(over[2], look)


def test_a_place_is_a_row_of_the_whole_matrix(seen, bench):
    gathered = view.self_maps.SelfSum(1)

    def receive(place, own, heads):
        if place.kind == "self":
            gathered.add(place, own, heads)

    view.look(bench.model, seen.trajectory.conditioning, seen.trajectory, 20, receive, lambda *_: None)
    gathered.choose(256)
    view.look(bench.model, seen.trajectory.conditioning, seen.trajectory, 10, receive, lambda *_: None)
    row = gathered.average()[0, 16 * 3 + 12].view(1, 16, 16)
    found = seen.parts(method="one place", every=10, x=12.5 / 16, y=3.5 / 16)[2]
    assert torch.allclose(found, maps.stretch(maps.resize(row, (128, 128))), atol=1e-4)


@pytest.mark.parametrize("of", ["queries", "keys", "values"])
def test_queries_keys_and_values_have_components_and_clusters(seen, of):
    components, parts, masks = seen.parts(every=10, clusters=4, of=of)
    plain = seen.parts(every=10, clusters=4)
    assert components.shape == plain[0].shape and not torch.equal(components, plain[0])
    assert torch.equal(masks.sum(0), torch.ones(128, 128)) and parts.std() > 0.1
    assert not torch.equal(masks, plain[2])


def test_what_a_place_cannot_be(seen):
    with pytest.raises(ValueError) as error:
        seen.parts(method="one place", mask=torch.zeros(1, 128, 128))
    one_sentence(error, "mask of Attune Self-Attention View is black")
    with pytest.raises(ValueError) as error:
        seen.parts(method="one place", mask=torch.ones(2, 128, 128))
    one_sentence(error, "holds 2 masks where the TRAJECTORY holds 1 picture")
    with pytest.raises(ValueError) as error:
        seen.parts(method="one place", image=torch.ones(2, 128, 128, 3))
    one_sentence(error, "holds 2 pictures where the TRAJECTORY holds 1")
    for method in ("one place", "SVD"):
        with pytest.raises(ValueError) as error:
            seen.parts(method=method, of="keys")
        one_sentence(error, "show the keys by the method " + method, "set of to self-attention maps")


def test_what_the_view_cannot_do(seen, bench):
    bare = replace(seen.trajectory, conditioning=[])
    with pytest.raises(ValueError) as error:
        seen.parts(trajectory=bare)
    one_sentence(error, "holds no conditioning", "connect clip")
    with pytest.raises(ValueError) as error:
        seen.parts(prompt="a cat")
    one_sentence(error, "no CLIP")
    with pytest.raises(ValueError) as error:
        seen.parts(method="zzz")
    one_sentence(error, "zzz", "PCA, SVD, one place")
    with pytest.raises(ValueError) as error:
        seen.parts(tokens=1, count=5)
    one_sentence(error, "4 picture tokens")
    edited = prompt_swap(bench, 1)[0]
    with pytest.raises(ValueError) as error:
        outputs(view.AttuneSelfAttentionView, edited, seen.trajectory, 256, 4, "PCA", 3, 3, 0)
    one_sentence(error, "MODEL from before the edit")


# ---- comparing ---------------------------------------------------------------------------------------------------


def compare(*images, kind=sheet.FIRST_AND_LAST, gain=2.0):
    more = {f"image_{i}": image for i, image in enumerate(images[2:], 3)}
    return outputs(view.AttuneCompare, *images[:2], "one\ntwo", kind, gain, 128, **more)


def test_compare_batches(seen):
    two = torch.cat([seen.image, seen.image.flip(2)])
    pictures, apart = compare(seen.image, two)
    assert apart.shape == (2, 128, 128, 3) and apart[0].max() == 0 and apart[1].max() == 1
    assert pictures.shape[1] > 2 * 128
    assert compare(two, two, seen.image, kind=sheet.EACH_TO_FIRST)[1].shape[0] == 4
    assert isinstance(compare(two, seen.image, kind=sheet.NO_DIFFERENCE)[1], ExecutionBlocker)


def test_pictures_of_one_channel_or_with_alpha_are_shown_as_they_look(seen):
    """Gray is all three colours, and alpha is dropped, as VAE Encode drops it."""
    image, gray = seen.image, seen.image[..., :1]
    alpha = torch.rand(*gray.shape, generator=torch.Generator().manual_seed(0))
    pairs = ((torch.cat([image, alpha], -1), image), (gray, gray.expand_as(image)))
    pairs += ((torch.cat([gray, alpha], -1), gray.expand_as(image)),)
    for given, same in pairs:
        for one, other in zip(compare(given, image, given), compare(same, image, same), strict=True):
            assert torch.equal(one, other)
        for one, other in zip(compare(image, given), compare(image, same), strict=True):
            assert torch.equal(one, other)
        shown, wanted = (
            outputs(view.AttuneContactSheet, p, "one\ntwo", 128, image_2=image, wide=p)[0] for p in (given, same)
        )
        assert torch.equal(shown, wanted)


def test_a_sheet_of_many_pictures_hears_cancel(seen, server_progress):
    comfy.model_management.interrupt_current_processing()
    try:
        with pytest.raises(InterruptProcessingException):
            outputs(view.AttuneContactSheet, seen.image.expand(3, -1, -1, -1), "one", 128)
        comfy.model_management.interrupt_current_processing()
        with pytest.raises(InterruptProcessingException):
            compare(seen.image, seen.image)
    finally:
        comfy.model_management.interrupt_current_processing(False)
    assert outputs(view.AttuneContactSheet, seen.image, "one", 128)[0].isfinite().all()


def test_labels_in_any_script_differ_where_they_are_read(seen):
    """Under pictures, and under the maps of a prompt's words."""

    def labelled(text):
        return outputs(view.AttuneContactSheet, seen.image, text, 128)[0]

    for one, other in (("\u539f\u56fe", "\u7f16\u8f91"), ("caf\u00e9", "caf\u00e8"), ("\U0001f34e", "\U0001f34c")):
        assert not torch.equal(labelled(one), labelled(other))
    words = ["\u82f9\u679c", "\u9999\u8549"]
    sheets = [seen.maps(every=20, prompt=f"a {word} circle", words=word)[0] for word in words]
    assert not torch.equal(*(s[:, -24:] for s in sheets))  # the line below the map


def test_compare_says_what_does_not_fit(seen):
    with pytest.raises(ValueError) as error:
        compare(seen.image.expand(3, -1, -1, -1), seen.image.expand(2, -1, -1, -1))
    one_sentence(error, "image_2 holds 2 pictures where another input holds 3", "Attune Compare")
    with pytest.raises(ValueError) as error:
        compare(seen.image, seen.image[:0])
    one_sentence(error, "image_2 of Attune Compare is a tensor .* at least one picture")
    with pytest.raises(ValueError) as error:
        compare(seen.image, seen.image, kind="zzz")
    one_sentence(error, "zzz", "first and last")
