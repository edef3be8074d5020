"""Learning words on real MODELs and CLIPs: what is learned, what stays as it was, and what edits make of it."""

import contextlib
import functools
import shutil
import types
from dataclasses import replace

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sdxl_clip
import comfy.supported_models
import comfy.text_encoders.sd2_clip
import comfy.utils
import folder_paths
import pytest
import torch
from comfy.model_management import InterruptProcessingException
from comfy.supported_models_base import ClipTarget

import nodes as stock
from attune.attention_patches import background as find_background
from attune.attention_patches import host
from attune.attention_patches.maps import MapSum
from attune.benchmark.families import SD2, SDXL
from attune.demo.model import _initialise
from attune.inversion import dynamic_prompt, gradient
from attune.inversion import host as runs
from attune.inversion.trajectory import LearnedWords, Trajectory
from attune.nodes import edit, invert, tokens, trajectory
from attune.nodes.demo import AttuneDemoScene
from attune.nodes.self_attention import AttuneFreePromptEditing

from .bench import SOURCE, TARGET, Bench, outputs, overflowing
from .test_inversion import distance, fail_at, model_in, state
from .test_nodes import one_sentence

BRACES = "a red {circle} and a blue {square} on a gray background"
NOUNS = ("circle", "square")
CIRCLE, SQUARE = 3, 7  # where their tokens stand
STEPS, GUIDANCE = 5, 3.0


@pytest.fixture(scope="module", autouse=True)
def folders(tmp_path_factory):
    """The host's folders, away from the ones in use."""
    base = tmp_path_factory.mktemp("host")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("input", "output", "user"):
            (base / name).mkdir()
            patch.setattr(folder_paths, f"{name}_directory", str(base / name))
        (base / "embeddings").mkdir()
        table = {**folder_paths.folder_names_and_paths, "embeddings": ([str(base / "embeddings")], {".safetensors"})}
        patch.setattr(folder_paths, "folder_names_and_paths", table)
        yield base


@pytest.fixture(scope="module")
def scene():
    with torch.inference_mode():
        return outputs(AttuneDemoScene, SOURCE, 3, 128)


@pytest.fixture(scope="module")
def latent(bench, scene):
    with torch.inference_mode():
        return outputs(stock.VAEEncode, bench.vae, scene[0])[0]


def ddim(bench, latent, steps=STEPS, prompt=SOURCE, model=None):
    settings = steps, invert.GRIDS[0], invert.LEVELS[0]
    return outputs(invert.AttuneDDIMInversion, model or bench.model, latent, bench.text(prompt), *settings)[0]


@pytest.fixture(scope="module")
def inverted(bench, latent):
    with torch.inference_mode():
        return ddim(bench, latent)


@pytest.fixture(scope="module")
def short(bench, latent):
    """Two steps, for what goes on from one to the next."""
    with torch.inference_mode():
        return ddim(bench, latent, steps=2)


@pytest.fixture(scope="module")
def once(short):
    """One step, for what shows in any."""
    return replace(short, sigmas=short.sigmas[:2], latents=short.latents[:2])


@pytest.fixture(autouse=True)
def nothing_unfinished(folders):
    """What a test leaves to go on from is not for the next."""
    yield
    shutil.rmtree(folders / "user" / "__attune", ignore_errors=True)


@pytest.fixture(scope="module")
def background(scene):
    """What no object of the scene covers."""
    return (scene[1].amax(0, keepdim=True) < 0.5).float()


def learn(bench, made, prompt=BRACES, guidance=GUIDANCE, inner=2, nulls=2, model=None, clip=None, **kwargs):
    """The node's outputs; learning goes on however small the losses are, at a rate that shows in few updates."""
    settings = {
        "balance_weight": 1.0, "balance_threshold": 0.0, "balance_length": 25.0,
        "disjoint_weight": 0.05, "disjoint_threshold": 0.0, "disjoint_length": 25.0,
        "background_weight": 0.05, "background_threshold": 0.0, "background_length": 50.0,
        "inner_steps": inner, "learning_rate": 0.01, "optimizer": dynamic_prompt.ADAMW, "tokens": 256,
        "null_steps": nulls, "null_learning_rate": 0.03, "null_early_stop": 0.0, "null_warm_start": True,
    } | kwargs  # fmt: skip
    node = tokens.AttuneDynamicPrompt
    return outputs(node, model or bench.model, clip or bench.clip, made, prompt, guidance, **settings)


@pytest.fixture(scope="module")
def learned(bench, inverted, background):
    """(trajectory, positive, negative, report) of five steps with both nouns and the background, at a rate that shows
    in a picture."""
    with torch.inference_mode():
        return learn(bench, inverted, background=background, learning_rate=0.05, nulls=5)


@pytest.fixture(scope="module")
def twice(bench, short, background):
    """As ``learned``, of two steps of eight runs of the network each: two to learn the words, two to compare them with
    what they were, one for the clean latent, three for the null embedding."""
    with torch.inference_mode():
        return learn(bench, short, background=background)


def start(made):
    return {"samples": runs.host_latent(made, 0)}


def drawn(bench, made, positive, negative, guidance=GUIDANCE, model=None):
    return bench.sample(
        model or bench.model, positive, start(made), guidance=guidance, negative=negative, sigmas=made.sigmas
    )


def encoded(clip, prompt, vectors, weight=None):
    """A prompt with (text encoder's name -> position -> vector) in it, by the host's own tokens and encoder."""
    found = clip.tokenize(prompt)
    for name, own in vectors.items():
        flat = [pair for chunk in found[name] for pair in chunk]
        for position, vector in own.items():
            flat[position] = (vector, flat[position][1] if weight is None else weight)
        found[name] = [flat[i : i + 77] for i in range(0, len(flat), 77)]
    return clip.encode_from_tokens(found)


def vectors_at(made, step, picture=0):
    """What a trajectory has learned for a step: text encoder's name -> position -> vector."""
    at = [p for own in made.learned.positions for p in own]
    return {n: dict(zip(at, v[step, picture], strict=True)) for n, v in made.learned.vectors.items()}


# ---- gradients ---------------------------------------------------------------------------------------------------


def maps_under(bench, made, body):
    """Runs ``body(maps, vectors)`` where gradients flow: ``maps(vectors)`` is where words look at the third step."""
    level = host.LevelMaps(bench.model, 256, made.latents.shape[-2:])
    vectors = host.token_vectors(bench.clip, SOURCE, [CIRCLE, SQUARE])["l"]

    def run(network, latent, report):
        x, rows = made.latents[2].clone(), torch.arange(1)

        def maps(vectors):
            own = {"l": dict(zip((CIRCLE, SQUARE), vectors, strict=True))}
            text = host.encode_tokens(bench.clip, host.with_vectors(bench.clip, SOURCE, own))
            return level.read(lambda: network.denoise(x, made.sigmas[2], text, rows, "positive"))

        return body(maps, vectors.clone())

    texts = bench.text(SOURCE), bench.text("")
    return runs.learn(level.model, *texts, runs.host_latent(made, -1), 1, run, bench.clip)


def test_the_maps_are_those_that_sampling_shows(bench, inverted):
    seen = MapSum([(CIRCLE,), (SQUARE,)])

    def receive(place, own, heads):
        if place.kind == "cross":
            seen.add(place, own, heads)

    def look(denoise, latent, report):
        denoise(inverted.latents[2], inverted.sigmas[2])

    picture = runs.host_latent(inverted, -1)
    runs.walk(host.recording(bench.model, receive), bench.text(SOURCE), picture, inverted.sigmas[:2], look)
    ours = maps_under(bench, inverted, lambda maps, vectors: maps(vectors))
    assert ours.shape == (1, 256, 77) and torch.allclose(ours.sum(-1), torch.ones(1, 256), atol=1e-5)
    theirs = seen.level(256).flatten(2)[:, 0]
    assert torch.allclose(ours[0, :, [CIRCLE, SQUARE]].T, theirs, atol=1e-5)
    assert theirs.std() > 1e-3


@pytest.fixture(scope="module")
def slopes(bench, inverted):
    """The gradient of a sum of maps: computed again block by block, in part, and kept whole; and by differences."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(1, 256, 77, generator=generator)
    kept = []

    def body(maps, vectors):
        def slope():
            leaf = vectors.clone().requires_grad_()
            with torch.enable_grad():
                (maps(leaf) * weights).sum().backward()
            return leaf.grad

        found = [slope(), slope()]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gradient, "checkpoint", lambda forward, x, *args, use_reentrant, preserve_rng_state, **kwargs:
                          kept.append(1) or forward(x, *args, **kwargs))  # fmt: skip
            found.append(slope())
        way = found[0] / found[0].norm()
        up, down = ((maps(vectors + h * way) * weights).sum() for h in (0.02, -0.02))
        return found, float((up - down) / 0.04)

    with torch.inference_mode():
        yield *maps_under(bench, inverted, body), kept


def test_gradients_do_not_depend_on_what_is_kept(slopes):
    (again, partly, whole), _, kept = slopes
    assert kept and again.abs().max() > 1e-3
    assert torch.allclose(again, whole, rtol=1e-4, atol=1e-6 * float(whole.abs().max()))
    assert torch.allclose(partly, whole, rtol=1e-4, atol=1e-6 * float(whole.abs().max()))


def test_the_gradient_is_the_slope_of_the_maps(slopes):
    (again, *_), along, _ = slopes
    assert along == pytest.approx(float(again.norm()), rel=0.02)


def test_a_pass_ends_behind_the_last_layer_that_is_read(bench, inverted):
    """For the levels of fewer tokens that is earlier."""
    reached = []
    unet = bench.model.model.diffusion_model
    with contextlib.ExitStack() as stack:
        for i, (first, *_) in enumerate(unet.output_blocks):  # the host calls a block's layers one by one
            stack.callback(first.register_forward_pre_hook(lambda *_, i=i: reached.append(i)).remove)
        stack.callback(unet.out.register_forward_pre_hook(lambda *_: reached.append("out")).remove)
        for size, last in ((256, 11), (64, 8), (16, 5)):
            level = host.LevelMaps(bench.model, size, (16, 16))
            reached.clear()

            def look(denoise, latent, report, level=level):
                return level.read(lambda: denoise(inverted.latents[2], inverted.sigmas[2]))

            maps = runs.walk(level.model, bench.text(SOURCE), start(inverted)["samples"], inverted.sigmas[:2], look)
            assert maps.shape == (1, size, 77) and level.grid == (size**0.5, size**0.5)
            assert reached == list(range(last + 1))


# ---- what is learned ---------------------------------------------------------------------------------------------


def test_what_comes_out(bench, inverted, learned):
    made, positive, negative, report = learned
    assert made.learned.words == NOUNS and made.learned.positions == ((CIRCLE,), (SQUARE,))
    assert made.learned.prompt == SOURCE == made.header["prompt"] and made.header["method"] == "dynamic prompt"
    (rows,) = made.learned.vectors.values()
    table = bench.clip.cond_stage_model.clip_l.transformer.get_input_embeddings().weight
    assert rows.shape == (STEPS, 1, 2, table.shape[1]) and rows.dtype == torch.float32
    ids = [bench.clip.tokenize(SOURCE)["l"][0][p][0] for p in (CIRCLE, SQUARE)]
    moved = (rows[:, 0] - table[ids].float()).abs().amax((1, 2))
    # AdamW's updates are about as large as its rate; from step to step they go on.
    assert 0.05 < moved[0] < 0.15 and (moved.diff() > 0).all()
    assert made.nulls.shape == (STEPS, 1, 77, positive[0][0].shape[-1]) and len(positive) == len(negative) == STEPS
    assert torch.equal(made.latents, inverted.latents) and report.shape[0] == 1 and report.shape[3] == 3
    for i, (text, extras) in enumerate(positive):
        expected = encoded(bench.clip, SOURCE, vectors_at(made, i))
        assert torch.allclose(text, expected, atol=1e-5)
        assert (text - bench.text(SOURCE)[0][0]).abs().max() > 0.01
        assert extras[host.PROMPT] == SOURCE
        assert (extras["start_percent"], extras["end_percent"]) == made.windows[i : i + 2]
    assert [n[1]["start_percent"] for n in negative] == list(made.windows[:-1])
    for name in ("conditioning", "negative"):
        assert getattr(made, name)


def test_the_words_look_where_they_should(bench, once, scene):
    """Told to look at each other's objects, they turn to them."""

    def losses(vectors):
        level, own = (
            host.LevelMaps(bench.model, 256, (16, 16)),
            {"l": dict(zip((CIRCLE, SQUARE), vectors, strict=True))},
        )

        def look(denoise, latent, report):
            return level.read(lambda: denoise(once.latents[0], once.sigmas[0]))

        text = [[encoded(bench.clip, SOURCE, own), {}]]
        seen = runs.walk(level.model, text, start(once)["samples"], once.sigmas, look)[0]
        outside = tokens._outside(None, scene[1].flip(0), 2, 1, (16, 16), (128, 128))[0]
        found = dynamic_prompt.noun_maps(seen, [(CIRCLE,), (SQUARE,)])
        return [float(dynamic_prompt.background_loss(m[None], o[None])) for m, o in zip(found, outside, strict=True)]

    only = {"balance_weight": 0.0, "disjoint_weight": 0.0, "background_weight": 1.0}
    made = learn(bench, once, inner=6, guidance=1.0, noun_masks=scene[1].flip(0), learning_rate=0.05, **only)[0]
    before = losses(host.token_vectors(bench.clip, SOURCE, [CIRCLE, SQUARE])["l"])
    after = losses(made.learned.vectors["l"][0, 0])
    assert all(b < a for a, b in zip(before, after, strict=True)) and sum(after) < 0.8 * sum(before)


def test_it_brings_the_picture_back_under_guidance(bench, inverted, learned):
    made, positive, negative, _ = learned
    true = runs.host_latent(inverted, -1)
    back = drawn(bench, made, positive, negative)
    plain = drawn(bench, made, positive, bench.text(""))
    assert distance(back, true) < 0.8 * distance(plain, true)
    # What the stock sampler draws is what was learned, to rounding.
    ours = runs.draw_again(bench.model, made, negative, GUIDANCE)
    assert distance(runs.to_model_scale(bench.model, back), ours[-1]) < 0.02


def test_without_guidance_there_are_no_nulls(bench, once):
    made, positive, negative, _ = learn(bench, once, guidance=1.0, inner=1)
    assert made.nulls is None and len(positive) == 1 and len(negative) == 1
    assert torch.equal(negative[0][0], bench.text("")[0][0])
    assert drawn(bench, made, positive, negative, guidance=1.0).isfinite().all()


def test_each_picture_of_a_batch_learns_its_own(bench, latent, background):
    other = outputs(stock.VAEEncode, bench.vae, outputs(AttuneDemoScene, SOURCE, 5, 128)[0])[0]["samples"]
    both = torch.cat([latent["samples"], other])
    masks = torch.cat([background, background.flip(-1)])
    pair = ddim(bench, {"samples": both}, 2)
    pair = replace(pair, sigmas=pair.sigmas[:2], latents=pair.latents[:2])
    together, positive, negative, report = learn(bench, pair, background=masks)
    assert report.shape[0] == 2 and positive[0][0].shape[0] == negative[0][0].shape[0] == 2
    made = []
    for i in range(2):
        alone = learn(bench, replace(pair, latents=pair.latents[:, i : i + 1]), background=masks[i : i + 1])[0]
        made.append(alone.learned.vectors["l"][:, 0])
        assert (made[i] - together.learned.vectors["l"][:, i]).abs().max() < 2e-3
        assert (alone.nulls[:, 0] - together.nulls[:, i]).abs().max() < 0.02
        expected = encoded(bench.clip, SOURCE, vectors_at(together, 0, i))
        assert torch.allclose(positive[0][0][i : i + 1], expected, atol=1e-5)
    assert (made[0] - made[1]).abs().max() > 0.01


def test_progress_is_told(bench, once, monkeypatch):
    said, shown = [], []
    monkeypatch.setattr(runs, "say", lambda node, text: said.append(text))
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: shown.append((value, total)))
    learn(bench, once, inner=3, nulls=2)
    assert shown == [(i + 1, 5) for i in range(5)]
    assert said[0].startswith("step 1 of 1, update 1: balance ") and ", disjoint " in said[0]
    assert said[3].startswith("step 1 of 1, update 1: null-text ")
    assert said[-1] == "3 looks at the maps of the words in 1 steps"


# ---- prompts -----------------------------------------------------------------------------------------------------


def by_hand(clip, made, positive, prompt):
    for i, (text, _) in enumerate(positive):
        assert torch.allclose(text, encoded(clip, prompt, vectors_at(made, i)), atol=1e-5)
    return made.learned.vectors["l"][:, 0]


def test_a_noun_of_several_tokens(bench, once):
    prompt = "a red squirrelfish and a blue square"
    made, positive, *_ = learn(bench, once, "a red {squirrelfish} and a blue {square}", inner=1, nulls=1)
    pieces = made.learned.positions[0]
    assert len(pieces) > 1 and pieces == tuple(range(3, 3 + len(pieces))) and len(made.learned.positions[1]) == 1
    rows = by_hand(bench.clip, made, positive, prompt)
    before = host.token_vectors(bench.clip, prompt, [p for own in made.learned.positions for p in own])["l"]
    assert ((rows - before).abs().amax(-1) > 5e-3).all()  # every piece is learned


def test_two_nouns_that_are_the_same_word(bench, once, scene):
    made, positive, *_ = learn(
        bench, once, "a red {circle} and a blue {circle}", inner=1, nulls=1, noun_masks=scene[1]
    )  # fmt: skip
    assert made.learned.words == ("circle", "circle") and made.learned.positions == ((3,), (7,))
    rows = by_hand(bench.clip, made, positive, "a red circle and a blue circle")
    assert (rows[:, 0] - rows[:, 1]).abs().max() > 5e-3
    assert host.read_nouns(bench.clip, "a red circle and a blue {circle}")[1] == [("circle", (7,))]
    assert host.read_nouns(bench.clip, "(a circle, a {circle}:1.2) {circle}")[1] == [("circle", (5,)), ("circle", (6,))]


@pytest.mark.parametrize("text, nouns", [
    ("a {(red:1.3) cat} and ({cat}:1.2)", [(2, 3), (5,)]),
    ("(a (1:1.5) and {1}:1.2)", [(4,)]),  # brackets that only close behind the noun
    ("a {cat}-fish, {don}'t, 1{0}", [(2,), (6,), (10,)]),  # the tokenizer cuts there
    ("a {\\(red\\)} x {x}", [(2, 3, 4), (6,)]),
    ("a {cafe\u0301}, a {caf\u00e9}", [(2,), (5,)]),
    ("a {  cat } \uff5bdog\uff5d", [(2,), (3,)]),
    ("a {, red}... {...}", [(2, 3), (5,)]),
])  # fmt: skip
def test_nouns_are_whole_words_of_the_tokenizer(bench, text, nouns):
    assert [at for _, at in host.read_nouns(bench.clip, text)[1]] == nouns


@pytest.mark.parametrize("text", [
    "the cat and the {cat}s", "a cat and tom{cat}", "cat s{cat}ter", "e caf{e}\u0301", "a , {,}, b", "{(a} ) (a",
])  # fmt: skip
def test_nouns_that_are_pieces_of_a_word(bench, text):
    with pytest.raises(ValueError, match="cut a word of the prompt .* in source_prompt of Attune Dynamic Prompt"):
        host.read_nouns(bench.clip, text, "source_prompt of Attune Dynamic Prompt")


@pytest.mark.parametrize("layer", [None, -2, -1])
def test_texts_are_encoded_as_the_host_does(bench, layer):
    """Where gradients flow, too: weights, two chunks and clip skip."""
    clip = bench.clip.clone()
    clip.clip_layer(layer)
    for prompt in (SOURCE, "a (red:1.4) [circle] (and a:0.5) square", "a red circle" + ", bright" * 40):
        tokens_ = clip.tokenize(prompt)
        assert torch.equal(host.encode_tokens(clip, tokens_), clip.encode_from_tokens(tokens_))
    both = [host.encode_tokens(c, bench.clip.tokenize(SOURCE)) for c in (bench.clip, clip)]
    assert ((both[0] - both[1]).abs().max() > 0.05) == (layer == -2)


def test_weights_around_braces(bench, once):
    prompt = "a (red {circle} and a:1.4) {square}"
    made, positive, *_ = learn(bench, once, prompt, inner=1, nulls=1)
    plain = prompt.replace("{", "").replace("}", "")
    assert made.learned.words == NOUNS and made.learned.positions[0] == (3,)
    by_hand(bench.clip, made, positive, plain)
    unweighted = encoded(bench.clip, plain, vectors_at(made, 0), weight=1.0)
    assert (positive[0][0] - unweighted).abs().max() > 0.01


def test_clip_skip(bench, once):
    skipped = bench.clip.clone()
    skipped.clip_layer(-2)
    made, positive, *_ = learn(bench, once, inner=1, nulls=1, clip=skipped)
    by_hand(skipped, made, positive, SOURCE)
    assert (positive[0][0] - encoded(bench.clip, SOURCE, vectors_at(made, 0))).abs().max() > 0.05


def test_a_prompt_of_two_chunks(bench, once):
    long = "a red circle" + ", bright" * 40 + " and a blue square"
    made, positive, negative, _ = learn(
        bench, once, long.replace("circle", "{circle}").replace("square", "{square}"), inner=1, nulls=1
    )
    (first,), (second,) = made.learned.positions
    assert first == 3 and 77 < second < 154
    assert host.read_words(bench.clip, long).find("square") == [(second,)]
    rows = by_hand(bench.clip, made, positive, long)
    before = host.token_vectors(bench.clip, long, [first, second])["l"]
    assert ((rows - before).abs().amax(-1) > 5e-3).all()
    assert positive[0][0].shape[1] == 154 and drawn(bench, made, positive, negative).isfinite().all()


def test_a_single_noun_needs_a_background(bench, once, background):
    with pytest.raises(ValueError) as error:
        learn(bench, once, "a red {circle} and a blue square")
    one_sentence(error, "With 1 noun and these weights", "connect a background mask")
    made = learn(bench, once, "a red {circle} and a blue square", background=background, inner=1, nulls=1)[0]
    assert made.learned.vectors["l"].shape[2] == 1


@pytest.mark.parametrize(
    ("braces", "said"),
    [
        ("a red circle", "marks no noun"),
        ("a red {circle", "do not match"),
        ("a red {star} and a {square}s", 'The word "square" is not in the prompt'),
        ("a circle and two {circle}s", 'The braces around "circle" cut a word'),
    ],
)
def test_prompts_that_are_refused(bench, once, braces, said):
    with pytest.raises(ValueError) as error:
        learn(bench, once, braces)
    one_sentence(error, said)


def test_masks_that_do_not_fit(bench, once):
    for name, mask, said in (
        ("background", torch.ones(2, 64, 64), "hold 2 masks where 1 are needed"),
        ("noun_masks", torch.ones(3, 64, 64), "hold 3 masks where 2 are needed"),
        ("background", torch.ones(1, 64, 96), "measure 96x64, but the TRAJECTORY's picture 128x128"),
    ):
        with pytest.raises(ValueError) as error:
            learn(bench, once, **{name: mask})
        one_sentence(error, said, "Attune Dynamic Prompt")


# ---- sizes, precisions and families ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 24), (11, 17)], ids=str)
def test_other_sizes(bench, size):
    torch.manual_seed(0)
    made = ddim(bench, {"samples": torch.randn(1, 4, *size) * 4}, 2)
    made = replace(made, sigmas=made.sigmas[:2], latents=made.latents[:2])
    mask = torch.zeros(1, 8 * size[0], 8 * size[1])
    mask[:, :32] = 1
    out, positive, negative, _ = learn(bench, made, inner=1, nulls=1, background=mask)
    assert out.learned.vectors["l"].isfinite().all() and out.nulls.isfinite().all()
    assert drawn(bench, out, positive, negative).isfinite().all()


def test_half_precision_models(bench, once):
    """They learn in fp32: near to the full-precision result."""
    model = model_in(torch.float16, torch.float32)
    full, made = (learn(bench, once, inner=2, guidance=1.0, model=m)[0] for m in (None, model))
    given = host.token_vectors(bench.clip, SOURCE, [CIRCLE, SQUARE])["l"]
    moved = (full.learned.vectors["l"] - given).abs().mean()
    assert made.learned.vectors["l"].isfinite().all()
    assert (made.learned.vectors["l"] - full.learned.vectors["l"]).abs().mean() < 0.3 * moved


def test_half_precision_that_computes_in_half(bench, once):
    model = model_in(torch.bfloat16)
    made = learn(bench, once, model=model, inner=1, nulls=1)[0]
    assert made.learned.vectors["l"].isfinite().all() and made.nulls.isfinite().all()
    sampled = (
        drawn(bench, once, bench.text(SOURCE), bench.text(""), model=m) for m in (model, model_in(torch.bfloat16))
    )
    assert torch.equal(*sampled)


def small(width):
    """The settings of a text encoder of three layers."""
    return {
        "hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 2, "num_hidden_layers": 3,
    }  # fmt: skip


TEXT = {
    "SDXL": (comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel, {"l": 16, "g": 32}),
    "SD2": (comfy.text_encoders.sd2_clip.SD2Tokenizer, comfy.text_encoders.sd2_clip.SD2ClipModel, {"h": 48}),
}
UNETS = {
    # The pooled text is as wide as the small encoder's; SDXL's six sizes are 256 each.
    "SDXL": (comfy.supported_models.SDXL, SDXL | {"adm_in_channels": 32 + 6 * 256}),
    "SD2": (comfy.supported_models.SD20, SD2),
}


@pytest.fixture(params=TEXT, scope="module")
def family(request, folders):
    """A small random MODEL and CLIP of the family, and the widths of its text encoders."""
    tokenizer, encoder, widths = TEXT[request.param]
    kind, settings = UNETS[request.param]
    with torch.inference_mode():
        torch.manual_seed(0)
        config = kind({})
        config.unet_config = dict(settings)
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({"some": torch.zeros(1)}, device=torch.device("cpu"))
        model.diffusion_model.apply(_initialise)
        torch.nn.init.normal_(model.diffusion_model.out[2].weight, std=0.01)
        clip = comfy.sd.CLIP(
            ClipTarget(tokenizer, encoder),
            embedding_directory=[str(folders / "embeddings")],
            # One in the precision that needs no cast, the other as the host chooses.
            model_options={f"clip_{name}_model_config": small(width) for name, width in widths.items()}
            | ({"dtype": torch.float32} if request.param == "SDXL" else {}),
        )
        for parameter in clip.cond_stage_model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
        clip.cond_stage_model.apply(lambda m: _initialise(m) if isinstance(m, torch.nn.LayerNorm) else None)
        for name, parameter in clip.cond_stage_model.named_parameters():
            if name.endswith("bias") or name.endswith("logit_scale"):
                torch.nn.init.zeros_(parameter)
        patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
        return patcher, clip, widths


def test_other_families_learn_in_all_of_their_text_encoders(family):
    model, clip, widths = family
    sigmas = runs.schedule(model, 3, runs.HOST_GRID)
    torch.manual_seed(1)
    latents = torch.randn(1, 4, 16, 12) * (1 + sigmas.view(-1, 1, 1, 1, 1) ** 2).sqrt()
    made = Trajectory(sigmas, latents, 3, runs.describe_model(model))
    room = types.SimpleNamespace(model=model, clip=clip)
    out, positive, negative, _ = learn(
        room, made, "a red {squirrelfish} and a blue {square}", inner=2, nulls=1, tokens=48
    )
    prompt = "a red squirrelfish and a blue square"
    assert {n: v.shape[-1] for n, v in out.learned.vectors.items()} == widths
    at = [p for own in out.learned.positions for p in own]
    for name, rows in out.learned.vectors.items():
        table = getattr(clip.cond_stage_model, "clip_" + name).transformer.get_input_embeddings().weight
        ids = [clip.tokenize(prompt)[name][0][p][0] for p in at]
        assert ((rows[:, 0] - table[ids]).abs().amax(-1) > 5e-3).all()
    whole = clip.encode_from_tokens(clip.tokenize(prompt), return_dict=True)
    for i, (text, extras) in enumerate(positive):
        assert text.shape == (1, 77, 48)
        assert torch.allclose(text, encoded(clip, prompt, vectors_at(out, i)), atol=1e-5)
        assert torch.equal(extras["pooled_output"], whole["pooled_output"])
    again = types.SimpleNamespace(model=model, guidance=GUIDANCE)
    assert Bench.sample(again, model, positive, start(out), negative=negative, sigmas=sigmas).isfinite().all()
    # Saved, the word is the same for every text encoder.
    (text,) = outputs(tokens.AttuneSaveLearnedWord, out, "squirrelfish", 1, 0, "family")
    read = clip.tokenize(f"a {text}")
    for name, rows in out.learned.vectors.items():
        pieces = len(out.learned.positions[0])
        assert torch.equal(torch.stack([t for t, _ in read[name][0][2 : 2 + pieces]]), rows[1, 0, :pieces])
        assert not torch.is_tensor(read[name][0][2 + pieces][0])


def test_a_text_goes_along_with_what_else_its_half_says(family):
    """SDXL's pooled text, which is not learned."""
    model, clip, widths = family
    texts = [host.encode(clip, prompt) for prompt in ("a cat", "")]
    x = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(0))

    def body(network, latent, report):
        plain = network.denoise(x.clone(), 1.0)
        text, rows = texts[0][0][0].clone(), torch.arange(1)
        return plain, *(network.denoise(x.clone(), 1.0, text, rows, half) for half in ("positive", "negative"))

    plain, positive, negative = runs.learn(model, *texts, x, 1, body, clip)
    assert torch.equal(plain, positive) and torch.equal(positive, negative) == ("g" not in widths)


def test_text_encoders_of_another_kind_are_refused():
    encoder = types.SimpleNamespace(cond_stage_model=object(), tokenize=lambda prompt: {"t5xxl": [[(1, 1.0)]]})
    with pytest.raises(ValueError) as error:
        host.token_vectors(encoder, "a cat", [1])
    one_sentence(error, '"t5xxl"', "connect the CLIP of an SD 1.x, SD 2.x or SDXL checkpoint")


# ---- afterwards everything is as it was --------------------------------------------------------------------------


def everything(bench):
    """What must not change: weights by identity, value and flags, hooks, replaced forwards, options."""
    text = bench.clip.cond_stage_model
    unet = bench.model.model
    weights = {
        (which, n): (id(p), p.is_inference(), p.requires_grad, p.grad, hash(bytes(p.detach().cpu().numpy())))
        for which, module in (("unet", unet), ("text", text))
        for n, p in [*module.named_parameters(), *module.named_buffers()]
    }
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._backward_hooks)
             for module in (unet, text) for m in module.modules()]  # fmt: skip
    forwards = [n for n, m in text.named_modules() if "forward" in m.__dict__]
    return weights, hooks, forwards, state(bench)[1:], bench.clip.layer_idx


ENDS = {
    "to the end": (0, None),
    "in the words": (2, RuntimeError("out of memory")),
    "in the nulls": (6, InterruptProcessingException()),
}


@pytest.mark.parametrize("end", ENDS)
def test_model_and_clip_are_as_they_were(bench, once, end):
    number, problem = ENDS[end]
    picture, read = bench.sample(bench.model, bench.text(TARGET)), bench.text(SOURCE)[0][0]
    before = everything(bench)
    handle, calls = fail_at(bench, number, problem)
    try:
        with pytest.raises(type(problem)) if problem else contextlib.nullcontext():
            learn(bench, once)
        assert len(calls) == (number or 8)
    finally:
        handle.remove()
    assert everything(bench) == before
    assert torch.equal(bench.text(SOURCE)[0][0], read)
    assert torch.equal(bench.sample(bench.model, bench.text(TARGET)), picture)
    assert torch.is_inference_mode_enabled()


def test_an_exception_in_the_text_encoder_leaves_nothing_behind(bench, once):
    before = everything(bench)
    layer = bench.clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers[1]
    calls = []

    def fail(*_):
        calls.append(torch.is_grad_enabled())
        if calls.count(True) == 2:
            raise RuntimeError("out of memory")

    handle = layer.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            learn(bench, once)
    finally:
        handle.remove()
    assert everything(bench) == before


def test_only_the_learned_vectors_are_updated(bench, once, monkeypatch):
    """All that an optimizer is given are the vectors of the nouns, and the null embedding."""
    given, original = [], torch.optim.Optimizer.__init__

    def watch(self, params, *args, **kwargs):
        params = list(params)
        given.append([tuple(p.shape) for p in params])
        original(self, params, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Optimizer, "__init__", watch)
    learn(bench, once, inner=1, nulls=1)
    width = bench.clip.cond_stage_model.clip_l.transformer.get_input_embeddings().weight.shape[1]
    assert given == [[(2, width)], [(1, 77, bench.text("")[0][0].shape[-1])]]


# ---- Cancel ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [10, 14], ids=["in the words", "in the nulls"])
def test_an_interrupted_run_goes_on_to_the_same_bits(bench, short, background, twice, folders, number):
    """Which are also the bits of another run: between the two, each step is learned anew."""
    handle, calls = fail_at(bench, number, InterruptProcessingException())
    with pytest.raises(InterruptProcessingException):
        learn(bench, short, background=background)
    handle.remove()
    (kept,) = (folders / "user").rglob("*.safetensors")
    handle, calls = fail_at(bench, 0, None)
    again = learn(bench, short, background=background)
    handle.remove()
    assert len(calls) == 8 and not kept.exists()  # the second step alone
    assert torch.equal(again[0].nulls, twice[0].nulls) and torch.equal(again[3], twice[3])
    assert torch.equal(again[0].learned.vectors["l"], twice[0].learned.vectors["l"])


class Begun(Exception):
    """The run would begin."""


def test_what_was_learned_for_other_settings_is_not_used(bench, short, background, monkeypatch):
    keys = []

    def path(key):
        keys.append(key)
        raise Begun

    monkeypatch.setattr(runs, "unfinished_path", path)
    skipped, lora = bench.clip.clone(), bench.model.clone()
    skipped.clip_layer(-2)
    name = next(n for n, _ in bench.model.model.named_parameters() if n.endswith("attn2.to_k.weight"))
    lora.add_patches({name: (torch.ones(()),)}, 0.5)
    usual = {"made": short, "background": background}
    changes = [
        {}, {"guidance": 2.0}, {"guidance": 1.0}, {"background": background.flip(-1)}, {"background": None},
        {"noun_masks": background.expand(2, -1, -1)}, {"prompt": "a {red} circle"},
        {"prompt": BRACES + "s"}, {"learning_rate": 0.02}, {"inner": 3}, {"nulls": 3}, {"tokens": 64},
        {"optimizer": dynamic_prompt.ADAM}, {"balance_threshold": 0.1}, {"disjoint_length": 9.0},
        {"background_weight": 0.06}, {"null_early_stop": 1e-5}, {"null_warm_start": False}, {"clip": skipped},
        {"model": lora}, {"made": replace(short, latents=short.latents + 1e-3)},
    ]  # fmt: skip
    for change in [*changes, {}]:
        with pytest.raises(Begun):
            learn(bench, **(usual | change))
    assert keys.pop() == keys[0] and len(set(keys)) == len(changes)
    # What no text, vector or mask tells: which of two words that are alike, and on which level they are looked at.
    keys.clear()
    for prompt, size in (("{red} {circle} circle", 256), ("{red} circle {circle}", 256), ("{red} {circle} circle", 64)):
        with pytest.raises(Begun):
            learn(bench, short, prompt, tokens=size)
    assert len(set(keys)) == 3


def test_cancel_is_seen_in_the_inner_loop(bench, once):
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == 3:
            comfy.model_management.interrupt_current_processing()

    handle = bench.model.model.diffusion_model.register_forward_pre_hook(hook)
    with pytest.raises(InterruptProcessingException):
        learn(bench, once, inner=10)
    handle.remove()
    assert len(calls) == 3


@pytest.mark.parametrize("optimizer", dynamic_prompt.OPTIMIZERS)
def test_a_loss_that_is_not_finite(bench, once, optimizer):
    with overflowing(bench.model), pytest.raises(ValueError) as error:
        learn(bench, once, inner=4, optimizer=optimizer)
    one_sentence(error, "not a finite number", "lower learning_rate or null_learning_rate in Attune Dynamic Prompt")


# ---- the background ----------------------------------------------------------------------------------------------


def find(bench, made, prompt=BRACES, threshold=0.2, clusters=5, self_tokens=256, every=1, seed=0):
    return outputs(
        tokens.AttuneBackgroundMask, bench.model, bench.clip, made, prompt, threshold, clusters, self_tokens, 256,
        every, seed,
    )  # fmt: skip


def overlap(a, b):
    return float((a * b).sum() / (a + b).clamp(max=1).sum())


def test_the_background_of_a_picture(bench, inverted, background, scene):
    found, objects, sheet = find(bench, inverted)
    assert found.shape == (1, 128, 128) and objects.shape == (2, 128, 128) and sheet.shape[0] == 1
    assert torch.equal(found + objects.sum(0), torch.ones(1, 128, 128))  # every place is exactly one's
    assert set(found.unique().tolist()) == {0.0, 1.0}
    again = find(bench, inverted)
    assert all(torch.equal(a, b) for a, b in zip((found, objects, sheet), again, strict=True))
    assert overlap(found, background) > 0.7
    for ours, own, other in zip(objects, scene[1], scene[1].flip(0), strict=True):
        assert overlap(ours, own) > 2 * overlap(ours, other)


def test_the_seed_is_that_of_the_clusters(bench, inverted, monkeypatch):
    seeds, original = [], tokens.self_maps.clusters
    monkeypatch.setattr(
        tokens.self_maps, "clusters", lambda m, count, seed: seeds.append((count, seed)) or original(m, count, seed)
    )
    find(bench, inverted, seed=7, clusters=4, every=5)
    assert seeds == [(4, 7)]


def test_backgrounds_of_a_batch(bench, latent):
    other = outputs(stock.VAEEncode, bench.vae, outputs(AttuneDemoScene, SOURCE, 5, 128)[0])[0]["samples"]
    both = torch.cat([latent["samples"], other])
    together = find(bench, ddim(bench, {"samples": both}, 2))
    alone = [find(bench, ddim(bench, {"samples": one[None]}, 2)) for one in both]
    assert together[0].shape[0] == 2 and together[1].shape[0] == 4
    for k in range(2):
        apart = torch.cat([one[k] for one in alone])
        assert (together[k] != apart).float().mean() < 0.02
    assert not torch.equal(alone[0][0], alone[1][0])


@pytest.mark.parametrize(("threshold", "said"), [(0.0, "raise the threshold"), (1.0, "lower the threshold")])
def test_unusual_backgrounds_are_told(bench, short, monkeypatch, threshold, said):
    told = []
    monkeypatch.setattr(runs, "say", lambda node, text: told.append(text))
    found, objects, _ = find(bench, short, threshold=threshold, clusters=3)
    assert any(said in text for text in told)
    assert objects.amax((1, 2)).max() == 1 and found.isfinite().all()


def test_the_masks_fit_the_learning_node(bench, short):
    found, objects, _ = find(bench, short)
    made = learn(bench, short, background=found, noun_masks=objects, inner=1, guidance=1.0)[0]
    assert made.learned.vectors["l"].isfinite().all()
    outside = tokens._outside(found, objects, 2, 1, (16, 16), (128, 128))
    assert len(outside) == 1 and outside[0].shape == (2, 256)
    own = tokens.masks.touched(objects, (16, 16))
    assert torch.equal(outside[0], find_background.forbidden(None, own, 2, 1)[0])


# ---- edits -------------------------------------------------------------------------------------------------------

SWAPPED = "a red star and a blue square on a gray background"
REFINED = "a big striped red circle and a blue square on a gray background"


def test_a_target_prompt_keeps_the_words_it_shares(bench, learned):
    made = learned[0]
    for prompt, kept in (
        (SOURCE, {CIRCLE: CIRCLE, SQUARE: SQUARE}),
        (SWAPPED, {SQUARE: SQUARE}),
        (REFINED, {CIRCLE + 2: CIRCLE, SQUARE + 2: SQUARE}),
        ("a blue square", {3: SQUARE}),
        ("a square circle", {2: SQUARE}),  # one of them, since their order is another
    ):
        texts = edit.text_of(bench.clip, made, prompt)
        assert len(texts) == STEPS
        for i, (text, extras) in enumerate(texts):
            own = vectors_at(made, i)["l"]
            expected = encoded(bench.clip, prompt, {"l": {at: own[source] for at, source in kept.items()}})
            other = encoded(bench.clip, prompt, {})
            assert extras[host.PROMPT] == prompt
            assert (extras["start_percent"], extras["end_percent"]) == made.windows[i : i + 2]
            apart = (text - other).abs().max()
            assert (text - expected).abs().max() < 1e-2 * apart and apart > 5e-3, prompt
    for prompt in ("a red star on a gray background", ""):
        (only,) = edit.text_of(bench.clip, made, prompt)
        assert torch.equal(only[0], bench.text(prompt)[0][0])
    assert torch.equal(edit.text_of(bench.clip, replace(made, learned=None), SOURCE)[0][0], bench.text(SOURCE)[0][0])


def test_a_word_is_kept_whole_or_not_at_all(bench):
    """Words may share a token: "squirrelfish" ends as "fish" does."""
    noun, other = (host.read_words(bench.clip, word).words[0].keys for word in ("squirrelfish", "fish"))
    assert len(noun) > 1 and noun[-1:] == other, "the words share no token here"

    def kept(source, target):
        words = [w for w in host.read_words(bench.clip, source).words if w.text in ("squirrelfish", "fish")]
        at = [p for w in words for p in w.positions]
        learned = LearnedWords(source, tuple(w.text for w in words), tuple(w.positions for w in words),
                               {"l": torch.randn(1, 1, len(at), 4)})  # fmt: skip
        return edit.kept_vectors(bench.clip, types.SimpleNamespace(learned=learned), target)

    assert kept("a red squirrelfish on grass", "a red fish on grass") == {}
    assert kept("a red fish on grass", "a red squirrelfish on grass") == {}
    assert list(kept("a red squirrelfish", "a big red squirrelfish")["l"]) == [4, 5, 6]
    assert list(kept("a fish and a squirrelfish", "a fish and a star")["l"]) == [2]


def swap(bench, made, model=None, prompts=(SOURCE, SWAPPED)):
    settings = 0.0, 0.8, 0.0, 0.4, 1024
    return outputs(edit.AttunePromptSwap, model or bench.model, bench.clip, made, *prompts, *settings)


def refine(bench, made):
    return outputs(edit.AttunePromptRefine, bench.model, bench.clip, made, SOURCE, REFINED, 0.0, 0.8, 0.0, 0.4, 1024)


def reweight(bench, made, model=None, prompt=SOURCE, weights="red: -1, square: 2"):
    return outputs(
        edit.AttunePromptReweight, model or bench.model, bench.clip, made, prompt, weights, 0.0, 0.8, 0.0, 0.4, 1024
    )


def blend(bench, made, model, target):
    return outputs(edit.AttuneLocalBlend, model, bench.clip, made, SOURCE, target, "circle", "square", 0.3, 0.2, 256)


def all_of_them(bench, made):
    model, _ = refine(bench, made)
    model, _ = reweight(bench, made, model, REFINED, "striped: 2")
    return blend(bench, made, model, REFINED)


EDITS = {
    "swap": swap,
    "reweight": reweight,
    "swap and blend": lambda bench, made: blend(bench, made, swap(bench, made)[0], SWAPPED),
    "refine, reweight and blend": all_of_them,
}


@pytest.mark.parametrize("method", EDITS.values(), ids=EDITS)
def test_edits_read_the_learned_words(bench, learned, method):
    """The source as rows of the target's call, and in a call of its own, as it is beside any other pack's patch."""
    made, _, negative, _ = learned
    model, positive = method(bench, made)
    beside = model.clone()
    beside.set_model_input_block_patch(lambda h, options: h)
    plain, unlearned = method(bench, replace(made, learned=None))
    rows = []
    handle = bench.model.model.diffusion_model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    together = drawn(bench, made, positive, negative, model=model)
    assert max(rows) == 3 and len(rows) == STEPS
    apart = drawn(bench, made, positive, negative, model=beside)
    handle.remove()
    assert rows.count(1) in (STEPS - 1, STEPS)
    assert len(positive) == STEPS and len(unlearned) == 1
    effect = distance(together, drawn(bench, made, unlearned, negative, model=plain))
    assert together.isfinite().all() and effect > 0.01
    assert distance(together, apart) < min(1e-3, 0.05 * effect)


def test_the_source_is_read_under_its_learned_words(bench, learned):
    """A swap of nothing, at every step and layer, draws what the source's words draw: they are in both."""
    made, positive, negative, _ = learned
    whole = 0.0, 1.0, 0.0, 1.0, 1 << 20
    model, text = outputs(edit.AttunePromptSwap, bench.model, bench.clip, made, SOURCE, SOURCE, *whole)
    references = model.model_options["transformer_options"][host.KEY].references
    for (ours, _), (theirs, _), (mine, _) in zip(references[0].conditioning, positive, text, strict=True):
        assert torch.equal(ours, theirs) and torch.equal(mine, theirs)


def test_the_other_edits_keep_learned_words(bench, learned):
    made, _, negative, _ = learned
    model, positive = outputs(
        AttuneFreePromptEditing, bench.model, bench.clip, made, SOURCE, SWAPPED, 0.0, 0.8, 1024, ""
    )
    assert len(positive) == STEPS and drawn(bench, made, positive, negative, model=model).isfinite().all()
    expected = encoded(bench.clip, SWAPPED, {"l": {SQUARE: vectors_at(made, 2)["l"][SQUARE]}})
    assert torch.allclose(positive[2][0], expected, atol=1e-5)


def test_learned_words_in_a_saved_trajectory(bench, learned, folders):
    (name,) = outputs(trajectory.AttuneSaveTrajectory, learned[0], "words")
    back, _ = outputs(trajectory.AttuneLoadTrajectory, name)
    for ours, theirs in zip(back.conditioning + back.negative, learned[1] + learned[0].negative, strict=True):
        assert torch.equal(ours[0], theirs[0]) and ours[1].keys() == theirs[1].keys()
    a, b = (edit.text_of(bench.clip, made, SWAPPED) for made in (back, learned[0]))
    assert len(a) == STEPS and all(torch.equal(x[0], y[0]) for x, y in zip(a, b, strict=True))


# ---- embeddings --------------------------------------------------------------------------------------------------


@pytest.fixture
def reader(bench, folders):
    """The checkpoint's CLIP, reading embeddings where they are written here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.clip.tokenizer.clip_l, "embedding_directory", [str(folders / "embeddings")])
        yield bench.clip


save = functools.partial(outputs, tokens.AttuneSaveLearnedWord)


def test_a_saved_word_is_an_embedding(reader, learned):
    made = learned[0]
    rows = made.learned.vectors["l"][:, 0]
    for asked, step, expected in (
        ("square", 3, rows[3, 1:]),
        ("circle", 0, rows[0, :1]),
        ("", 1, rows[1, :1]),
        ("square", -1, rows[:, 1:].mean(0)),
    ):
        (text,) = save(made, asked, step, 0, "some/word")
        assert text.startswith("embedding:some/word_")
        read = reader.tokenize(f"a blue {text} on a table")["l"][0]
        (vector,) = [t for t, _ in read if torch.is_tensor(t)]
        assert torch.equal(vector, expected[0]) and torch.is_tensor(read[3][0])
        plain = reader.tokenize("a blue circle on a table")["l"][0]
        assert [p for p in read if not torch.is_tensor(p[0])] == plain[:3] + plain[4:]
    vectors = [
        reader.tokenize(save(made, word, 0, 0, "some/word")[0])["l"][0][1][0]
        for word in ("square", "SQUARE ", "(square:1.2)")
    ]
    assert all(torch.equal(vector, rows[0, 1]) for vector in vectors)
    names = {save(made, "circle", 0, 0, "some/word")[0] for _ in range(3)}
    assert len(names) == 3  # nothing is overwritten


def test_a_saved_word_of_several_tokens(bench, once, reader):
    made = learn(bench, once, "a red {squirrelfish} and a blue {square}", inner=1, nulls=1)[0]
    pieces = len(made.learned.positions[0])
    (text,) = save(made, "squirrelfish", 0, 0, "fish")
    read = [t for t, _ in reader.tokenize(f"a {text}, red")["l"][0][2 : 2 + pieces + 1]]
    assert torch.equal(torch.stack(read[:pieces]), made.learned.vectors["l"][0, 0, :pieces]) and pieces > 1
    assert not torch.is_tensor(read[-1])
    # In a prompt it stands for the word as it was learned.
    expected = encoded(bench.clip, "a red squirrelfish and a blue square", vectors_at(made, 0))
    other = vectors_at(made, 0)["l"]
    at = {7 + pieces - 1: other[7 + pieces - 1]}
    ours = encoded(reader, f"a red {text} and a blue square", {"l": at})
    assert torch.allclose(ours, expected, atol=1e-5)


def test_words_that_cannot_be_saved(inverted, learned, folders):
    with pytest.raises(ValueError) as error:
        save(inverted, "", -1, 0, "word")
    one_sentence(error, "holds no learned words", "Attune Save Learned Word")
    for asked, said in (
        (("star", -1, 0), 'The word "star" is none of those'),
        (("circle", STEPS, 0), f"The step is {STEPS}, but the TRAJECTORY has {STEPS}"),
        (("circle", 0, 1), "The picture is 1, but the TRAJECTORY has 1"),
    ):
        with pytest.raises(ValueError) as error:
            save(learned[0], *asked, "word")
        one_sentence(error, said, "Attune Save Learned Word")
    for prefix in ("../out", "a/../../out"):
        with pytest.raises(ValueError) as error:
            save(learned[0], "circle", 0, 0, prefix)
        one_sentence(error, "leads out of ComfyUI's embeddings folder", "Attune Save Learned Word")
    for prefix in ("a word", "a,word", "a:word", "a(word"):
        with pytest.raises(ValueError) as error:
            save(learned[0], "circle", 0, 0, prefix)
        one_sentence(error, "would end the word's name", "Attune Save Learned Word")
    assert not list(folders.glob("*.safetensors"))
