"""Refinement, re-weighting, local blend and embedding control on the host, and what they do to each other."""

import contextlib
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from attune.attention_patches import host
from attune.inversion import host as runs
from attune.nodes.edit import (
    AttuneBlendMask,
    AttuneEmbeddingControl,
    AttuneLocalBlend,
    AttunePromptRefine,
    AttunePromptReweight,
    AttunePromptSwap,
)

from .bench import (
    METHODS,
    REFINED,
    SOURCE,
    STEPS,
    TARGET,
    Bench,
    local_blend,
    outputs,
    prompt_refine,
    prompt_reweight,
    prompt_swap,
)

WINDOWS = 0.0, 0.8, 0.0, 0.4, 1024


def differ(a, b):
    return float((a - b).abs().max() / b.std())


def half(side=64):
    """A mask of the right half."""
    mask = torch.zeros(1, side, side)
    mask[:, :, side // 2 :] = 1
    return mask


@contextlib.contextmanager
def rows_of(bench):
    rows = []
    handle = bench.model.model.diffusion_model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        yield rows
    finally:
        handle.remove()


# ---- words ----------------------------------------------------------------------------------------------------------


def test_refine_without_a_change_is_swap_without_a_change(bench):
    refined = bench.sample(*prompt_refine(bench, 1, target=SOURCE))
    swapped = bench.sample(*prompt_swap(bench, 1, target=SOURCE))
    assert torch.equal(refined, swapped)


def test_refine_takes_any_prompt(bench):
    """Words added and taken away, and nothing in common at all, which leaves only start, end and padding."""
    edits = [bench.sample(*prompt_refine(bench, 1, target=t)) for t in ("a circle", "two big green hearts", "")]
    assert all(e.isfinite().all() for e in edits)
    assert differ(edits[0], edits[1]) > 0.05


def test_an_exchanged_word_is_the_targets_own_in_a_refinement(bench):
    """Swap gives the new word the old one's place, refinement lets it find its own."""
    assert differ(bench.sample(*prompt_refine(bench, 1, target=TARGET)), bench.sample(*prompt_swap(bench, 1))) > 0.02


def words(bench, node, *options, target=TARGET, windows=WINDOWS):
    return outputs(node, bench.model, bench.clip, bench.trajectory, SOURCE, target, *windows, *options)


def test_a_words_own_window(bench):
    """Where all words get one, it is the common window; where one gets another, that shows."""
    early = bench.sample(*words(bench, AttunePromptSwap, windows=(0.0, 0.4, 0.0, 0.0, 0)))
    every = ", ".join(f"{w}: 0.4" for w in dict.fromkeys(TARGET.split()))
    model, positive = words(bench, AttunePromptSwap, every, windows=(0.0, 0.4, 0.0, 0.0, 0))
    assert torch.equal(bench.sample(model, positive), early)
    own = bench.sample(*words(bench, AttunePromptSwap, "circle: 0.8, yellow: 0.2-0.8", windows=(0.0, 0.4, 0.0, 0.0, 0)))
    assert differ(own, early) > 1e-3


@pytest.mark.parametrize("node", [AttunePromptSwap, AttunePromptRefine])
def test_preserving_words(bench, node):
    """Fewer columns from the source, more of the target's own; all of the prompt's words are still not the frame."""
    free = 0.0, 1.0, 0.0, 0.0, 0
    whole = bench.sample(*words(bench, node, windows=free))
    square = bench.sample(*words(bench, node, "", "blue square", windows=free))
    plain = bench.sample(bench.model, bench.text(TARGET))
    assert differ(square, whole) > 0.02 and differ(square, plain) > 0.02


def test_preserving_what_the_source_does_not_hold(bench):
    with pytest.raises(ValueError, match='Of the words to preserve, "square, striped", not all are in the source'):
        words(bench, AttunePromptRefine, "", "square, striped", target=REFINED)


@pytest.mark.parametrize(
    "options,match",
    [
        (("green: 0.4",), 'The word "green" is not in the prompt'),
        (("circle: 0.6-0.2",), '"circle" is 0.6 to 0.2, but it needs'),
        (("circle",), '"circle" is not a word and its share of the steps'),
        (("", "heart"), 'The word "heart" is not in the prompt'),
    ],
)
def test_words_that_cannot_be(bench, options, match):
    with pytest.raises(ValueError, match=match):
        words(bench, AttunePromptSwap, *options)


def test_layers_of_words_are_read_and_refused_by_name(bench):
    """1-16 are all of Stable Diffusion 1.x; none that are not there, and none that are no numbers."""
    every = words(bench, AttunePromptSwap, "", "", "1-16", "1-16")
    assert torch.equal(bench.sample(*every), bench.sample(*prompt_swap(bench, 1)))
    for layers, said in (((" 4-", ""), "cross_layers on Attune Prompt Swap"), (("", "17"), "self_layers there")):
        with pytest.raises(ValueError, match=said):
            words(bench, AttunePromptSwap, "", "", *layers)


def test_words_of_one_prompt_alone_bound_a_blend(bench):
    """What only the source means by a word is named apart; a word that is not in that prompt says so."""

    def blend(**more):
        return outputs(
            AttuneLocalBlend, bench.model, bench.clip, bench.trajectory, SOURCE, TARGET, "yellow", "", 0.3, 0.2, 256,
            **more,
        )  # fmt: skip

    model, _ = blend(source_inside="red")
    (one,) = model.model_options["transformer_options"]["attune"].blends
    assert one.words.source_inside and one.words.target_inside and one.outside_threshold is None
    with pytest.raises(ValueError, match="yellow.*source_inside or the source prompt on Attune Local Blend"):
        blend(source_inside="yellow")
    with pytest.raises(ValueError, match="zebra.*source_outside or the source prompt on Attune Local Blend"):
        blend(source_outside="zebra")


def test_blends_of_two_targets_are_told_to_bound_each_other(bench, caplog):
    first, positive = local_blend(bench, 1, inside="circle")
    bench.sample(local_blend(bench, 1, first, inside="square")[0], positive)
    assert "bound each other" not in caplog.text  # of one target that is what is meant
    both, other = local_blend(bench, 1, first, inside="circle", target=REFINED)
    bench.sample(both, positive + other)
    assert f"of 2 target prompts ({REFINED}, {TARGET}) bound each other" in caplog.text
    assert "sample each target by itself" in caplog.text


def test_a_second_edit_of_words_is_refused(bench):
    edited, _ = prompt_swap(bench, 1)
    with pytest.raises(ValueError, match="already carries an edit of words to .* a second would undo it"):
        prompt_refine(bench, 1, model=edited, target=TARGET)


def test_an_edit_of_another_source_is_refused(bench):
    edited, _ = prompt_reweight(bench, 1)  # alone, on the source's own caption
    with pytest.raises(ValueError, match="share one TRAJECTORY and source prompt, .* put Attune Prompt Reweight"):
        prompt_swap(bench, 1, model=edited, source=TARGET, target=SOURCE)
    other = replace(bench.trajectory, latents=bench.trajectory.latents + 1)
    edited, _ = prompt_swap(bench, 1)
    with pytest.raises(ValueError, match="must share one TRAJECTORY and source prompt"):
        outputs(AttunePromptReweight, edited, bench.clip, other, TARGET, "yellow: 2", *WINDOWS)


def test_edits_to_two_prompts_need_both_in_the_sampling(bench):
    edited, _ = prompt_swap(bench, 1)
    both, positive = prompt_refine(bench, 1, model=edited)
    with pytest.raises(ValueError, match="No positive conditioning of this sampling is the prompt .*yellow.* chained"):
        bench.sample(both, positive)
    assert bench.sample(both, positive + bench_text(bench, TARGET)).isfinite().all()


def bench_text(bench, prompt):
    return host.encode(bench.clip, prompt)


# ---- re-weighting ---------------------------------------------------------------------------------------------------


def test_factors_of_one_change_nothing(bench):
    edited, positive = prompt_swap(bench, 1)
    same, _ = prompt_reweight(bench, 1, edited, TARGET, "yellow: 1, circle: 1.0")
    assert torch.equal(bench.sample(same, positive), bench.sample(edited, positive))
    alone, positive = prompt_reweight(bench, 1, weights="red: 1")
    assert torch.equal(bench.sample(alone, positive), bench.sample(*prompt_swap(bench, 1, target=SOURCE)))


@pytest.mark.parametrize("behind", [True, False])
def test_two_in_a_row_are_one_with_both_factors(bench, behind):
    """Behind a swap and alone: the second is no copy of the first, and factors of the same word multiply."""
    base, positive, prompt = (*prompt_swap(bench, 1), TARGET) if behind else (bench.model, None, SOURCE)
    first, second = ("yellow: 2", "yellow: 2, circle: -1") if behind else ("red: 2", "red: 2, circle: -1")
    both = second.replace(": 2", ": 4")

    def sample(*weights):
        model, text = base, positive
        for one in weights:
            model, text = prompt_reweight(bench, 1, model, prompt, one)
        return bench.sample(model, positive or text)

    assert differ(sample(first, second), sample(both)) < 1e-5
    assert differ(sample(first, second), sample(first)) > 1e-3


def test_chained_it_scales_what_the_edit_gives(bench):
    edited, positive = prompt_swap(bench, 1)
    results = [
        bench.sample(prompt_reweight(bench, 1, edited, TARGET, f"yellow: {factor}")[0], positive)
        for factor in (-2, 0, 1, 2)
    ]
    assert all(r.isfinite().all() for r in results)
    assert all(differ(a, b) > 1e-3 for a, b in zip(results, results[1:], strict=False))
    # A step further is a larger change.
    assert (results[0] - results[2]).abs().mean() > (results[1] - results[2]).abs().mean()


def test_a_weight_for_a_word_that_is_not_there(bench):
    with pytest.raises(ValueError, match='The word "heart" is not in the prompt'):
        prompt_reweight(bench, 1, weights="heart: 2")


# ---- local blend ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_outside_a_mask_is_the_source(bench, sampler):
    edited, _ = prompt_swap(bench, 1)
    model, positive = local_blend(bench, 1, edited, half())
    drawn = runs.to_model_scale(bench.model, bench.sample(model, positive, sampler=sampler))
    source = bench.trajectory.latents[-1]
    assert (drawn - source)[..., :8].abs().max() < 1e-5
    assert differ(drawn[..., 8:], source[..., 8:]) > 0.05


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "dpm_2", "lms"])
def test_other_samplers_land_on_the_source_too(bench, sampler):
    """The last step goes to no noise at all, whichever way the others took."""
    model, positive = local_blend(bench, 1, prompt_swap(bench, 1)[0], half())
    drawn = runs.to_model_scale(bench.model, bench.sample(model, positive, sampler=sampler))
    assert differ(drawn[..., :8], bench.trajectory.latents[-1][..., :8]) < 0.02


def test_outside_words_is_the_source_at_every_step(bench):
    """Each latent on the way, not only the last, is the source's outside the mask."""
    edited, _ = prompt_swap(bench, 1)
    model, positive = local_blend(bench, 1, edited, inside="circle", outside="square", start=0.0, threshold=0.6)
    drawn = bench.sample(model, positive)
    (mask,) = outputs(AttuneBlendMask, bench.trajectory, {"samples": drawn})
    assert mask.shape == (1, 128, 128) and 0.02 < mask.mean() < 0.98
    small = mask[0, ::8, ::8]
    source = bench.trajectory.latents[-1]
    drawn = runs.to_model_scale(bench.model, drawn)
    assert (drawn - source)[0, :, small == 0].abs().max() < 1e-5
    assert (drawn - source)[0, :, small == 1].abs().amax(0).min() > 1e-4
    part = runs.to_model_scale(bench.model, bench.sample(model, positive, sigmas=bench.sigmas[:4]))
    same = ((part - bench.trajectory.latents[3]).abs().amax(1) < 1e-4 * part.std())[0]
    assert 0.02 < same.float().mean() < 0.98


def test_a_higher_threshold_changes_less(bench):
    edited, _ = prompt_swap(bench, 1)

    def share(threshold, **where):
        model, positive = local_blend(bench, 1, edited, threshold=threshold, **where)
        return float(outputs(AttuneBlendMask, bench.trajectory, {"samples": bench.sample(model, positive)})[0].mean())

    loose, tight = share(0.2, inside="circle"), share(0.8, inside="circle")
    assert tight < loose
    assert share(0.2, inside="circle", outside="circle") < loose  # kept out of all but the rim


def test_the_order_of_the_nodes_does_not_matter(bench):
    first, positive = local_blend(bench, 1, prompt_swap(bench, 1)[0], inside="circle")
    second, _ = prompt_swap(bench, 1, model=local_blend(bench, 1, inside="circle")[0])
    assert torch.equal(bench.sample(first, positive), bench.sample(second, positive))


def test_two_blends_keep_the_edit_where_both_let_it(bench):
    edited, _ = prompt_swap(bench, 1)
    top = torch.zeros(1, 64, 64)
    top[:, :32] = 1
    model, positive = local_blend(bench, 1, local_blend(bench, 1, edited, half())[0], top)
    (mask,) = outputs(AttuneBlendMask, bench.trajectory, {"samples": bench.sample(model, positive)})
    true = torch.zeros(1, 128, 128)
    true[:, :64, 64:] = 1
    assert torch.equal(mask, true)


def test_a_mask_alone_works_on_a_plain_model_and_reads_nothing(bench):
    model, _ = local_blend(bench, 1, mask=half())
    with rows_of(bench) as rows:
        drawn = bench.sample(model, bench.text(TARGET))  # a stock text, without the edit's tag
    assert sum(rows) == 2 * STEPS
    (mask,) = outputs(AttuneBlendMask, bench.trajectory, {"samples": drawn})
    assert torch.equal(mask, torch.nn.functional.interpolate(half()[None], (128, 128))[0])


def test_what_an_edit_costs_at_most(bench):
    """Mutual self-attention reads a picture with a caption twice: for the negative half under the empty text. Masked
    fusion so reads two, and draws two parts in both halves."""
    dear = {"mutual self-attention": 4, "masked fusion": 8}
    for name, method in METHODS.items():
        model, positive = method(bench, 1)
        with rows_of(bench) as rows:
            bench.sample(model, positive)
        assert sum(rows) <= dear.get(name, 3) * STEPS


def test_each_picture_has_its_own_mask(bench):
    pair = Bench(batch=2)
    model, positive = local_blend(pair, 1, prompt_swap(pair, 1)[0], inside="circle", threshold=0.6, start=0.0)
    (masks,) = outputs(AttuneBlendMask, pair.trajectory, {"samples": pair.sample(model, positive)})
    assert masks.shape[0] == 2 and 0 < masks.mean() < 1 and not torch.equal(masks[0], masks[1])
    both = torch.cat([half(), 1 - half()])
    model, positive = local_blend(pair, 1, prompt_swap(pair, 1)[0], both)
    (masks,) = outputs(AttuneBlendMask, pair.trajectory, {"samples": pair.sample(model, positive)})
    assert torch.equal(masks[0], 1 - masks[1])
    with pytest.raises(ValueError, match="holds 2 masks, but the sampler draws 1"):
        bench.sample(*local_blend(bench, 1, prompt_swap(bench, 1)[0], both))


def test_a_blend_needs_words_or_a_mask(bench):
    with pytest.raises(ValueError, match="Neither words nor a mask"):
        local_blend(bench, 1)
    with pytest.raises(ValueError, match='The word "heart" is not in the prompt'):
        local_blend(bench, 1, inside="circle, heart")


def test_a_word_of_one_prompt_alone(bench):
    """An added word has no place in the source."""
    edited, _ = prompt_refine(bench, 1)
    model, positive = local_blend(bench, 1, edited, inside="striped", target=REFINED)
    assert bench.sample(model, positive).isfinite().all()


def test_a_blend_mask_of_another_picture_is_refused(bench):
    with pytest.raises(ValueError, match="connect the sampler that drew this TRAJECTORY's edit"):
        outputs(AttuneBlendMask, bench.trajectory, {"samples": torch.zeros(1, 4, 8, 8)})


def test_a_blend_whose_words_cannot_be_seen(bench):
    """Where another pack leaves other tokens in that layer than the picture has, there is no map to find."""

    def halved(q, k, v, options):
        return q[:, ::2], k, v

    def doubled(out, options):
        return out.repeat_interleave(2, 1)

    model, positive = local_blend(bench, 1, inside="circle", start=0.0)
    model = model.clone()
    model.set_model_attn2_patch(halved)
    model.set_model_attn2_output_patch(doubled)
    with pytest.raises(ValueError, match="Local Blend found no attention map of its words"):
        bench.sample(model, positive)


# ---- embedding control ----------------------------------------------------------------------------------------------


def embedding_control(bench, source=SOURCE, target=TARGET, trajectory=None):
    return outputs(AttuneEmbeddingControl, bench.clip, trajectory or bench.trajectory, source, target)


def test_only_the_changed_token_is_the_targets(bench):
    positive, negative = embedding_control(bench)
    source, target = bench.text(SOURCE)[0][0], bench.text(TARGET)[0][0]
    assert torch.equal(positive[0][0][:, 2], target[:, 2])
    rest = [i for i in range(77) if i != 2]
    assert torch.equal(positive[0][0][:, rest], source[:, rest])
    assert torch.equal(positive[0][1]["pooled_output"], bench.text(SOURCE)[0][1]["pooled_output"])
    assert torch.equal(negative[0][0], bench.text("")[0][0])
    assert differ(bench.sample(bench.model, positive), bench.sample(bench.model, bench.text(TARGET))) > 0.02


def test_other_token_counts_are_aligned(bench):
    positive, _ = embedding_control(bench, target=REFINED)
    source, target = bench.text(SOURCE)[0][0], bench.text(REFINED)[0][0]
    mixed = positive[0][0]
    assert torch.equal(mixed[:, 2], target[:, 2]) and torch.equal(mixed[:, 3:12], source[:, 2:11])


def test_null_embeddings_of_the_trajectory_are_its_negative(bench):
    nulls = torch.randn(STEPS, 1, 77, 128)
    learned = replace(
        bench.trajectory, nulls=nulls, negative=bench.text(""), windows=runs.windows(bench.model, bench.sigmas)
    )
    _, negative = embedding_control(bench, trajectory=learned)
    assert len(negative) == STEPS and torch.equal(negative[2][0], nulls[2])


def test_it_stacks_with_attention_control(bench):
    """Its text carries the target's name, so that a swap and a blend know its rows."""
    mixed, _ = embedding_control(bench)
    swapped, positive = prompt_swap(bench, 1)
    both = bench.sample(swapped, mixed)
    assert differ(both, bench.sample(swapped, positive)) > 0.02
    assert differ(both, bench.sample(bench.model, mixed)) > 0.02
    blended, _ = local_blend(bench, 1, inside="circle")
    assert differ(bench.sample(blended, mixed), bench.sample(bench.model, mixed)) > 0.02


# ---- text -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def learned(bench, tmp_path):
    """Embeddings `lot` of three vectors and `dot` of one, where the checkpoint's CLIP looks for them."""
    for name, count in (("lot", 3), ("dot", 1)):
        save_file({"clip_l": torch.randn(count, 128)}, tmp_path / f"{name}.safetensors")
    tokenizer = getattr(bench.clip.tokenizer, bench.clip.tokenizer.clip)
    before = tokenizer.embedding_directory
    tokenizer.embedding_directory = str(tmp_path)
    yield
    tokenizer.embedding_directory = before


@pytest.mark.usefixtures("learned")
def test_learned_embeddings_are_words(bench):
    read = host.read_words(bench.clip, "a (embedding:lot:1.2) circle and a embedding:dot, square")
    assert [w.text for w in read.words] == ["a", "embedding:lot", "circle", "and", "a", "embedding:dot", ",", "square"]
    assert read.words[1].positions == (2, 3, 4) and read.words[2].positions == (5,)
    target = "a embedding:lot circle and a blue square on a gray background"
    model, positive = prompt_swap(bench, 1, target=target)
    assert bench.sample(model, positive).isfinite().all()
    model, positive = prompt_reweight(bench, 1, model, target, "embedding:lot: 0.5")
    assert bench.sample(model, positive).isfinite().all()


@pytest.mark.usefixtures("learned")
def test_an_embedding_that_is_not_there_does_not_shift_the_rest(bench):
    read = host.read_words(bench.clip, "a embedding:none circle embedding:dot square")
    assert read.find("circle") == [(2,)] and read.find("square") == [(4,)]
    assert read.find("embedding:dot") == read.find("(embedding:dot:1.2)") == [(3,)]


def test_words_in_other_scripts_and_signs(bench):
    read = host.read_words(bench.clip, "a T-shirt, a caf\u00e9 \u732b (red:1.3) \\(circle\\)")
    assert read.find("t-shirt") and read.find("caf\u00e9") and read.find("\u732b")
    assert read.find("red")[0][0] < read.find("circle")[0][0]


@pytest.mark.parametrize("prompt, word, found", [
    ("a (red:1.3) circle", "(red:1.3)", [(2,)]),
    ("a red circle", "((red))", [(2,)]),
    ("a (red:1.2) circle", "(red:1.2) circle", [(2, 3)]),
    ("a ((big) (red:1.2)) circle", "((big) (red:1.2)) circle", [(2, 3, 4)]),
    ("a \\(red\\) circle", "\\(red\\)", [(2, 3, 4)]),
    ("a cafe\u0301 circle", "caf\u00e9", [(2,)]),
    ("a caf\u00e9 circle", "CAFE\u0301", [(2,)]),
    ("\u03a3\u0399\u03a3, red", "\u03a3\u0399\u03a3", [(1, 2, 3, 4, 5, 6)]),  # of which Python ends in a final sigma
    ("a dog's bowl of 10 T-shirts", "Dog's", [(2, 3)]),
    ("a dog's bowl of 10 T-shirts", "10 t-shirts", [(6, 7, 8, 9, 10)]),
    ("a \uff08red\uff09 circle", "\uff08red\uff09", [(2, 3, 4, 5, 6, 7, 8)]),
    ("un(believ)able", "unbelievable", [(1, 2, 3, 4)]),
    ("red, red... red", "red", [(1,), (3,), (5,)]),
    ("red, red... red", "...", [(4,)]),
])  # fmt: skip
def test_a_word_is_found_however_it_is_written(bench, prompt, word, found):
    assert host.read_words(bench.clip, prompt).find(word) == found


@pytest.mark.parametrize("word", ["", "()", "(:1.2)", "embedding:none", "\ud83d", "\uff08red)"])
def test_what_is_no_word_of_a_prompt(bench, word):
    read = host.read_words(bench.clip, "a red circle")
    assert not read.holds(word) and read.count(word) == 0
    with pytest.raises(ValueError, match="is not in the prompt .*; change the word or the prompt on the Attune node"):
        read.find(word)


def test_a_phrase_is_found_over_the_border_of_two_chunks(bench):
    """Also of a word that the border cuts."""
    read = host.read_words(bench.clip, ", ".join(["star"] * 37) + " squirrelfish circle")
    assert read.chunks == 2 and read.find("(squirrelfish:1.1) circle") == [(74, 75, 78, 79)]


def test_words_are_written_as_in_the_prompt_wherever_a_node_asks_for_them(bench):
    """The same edit, whether the user copies a word with its weight or types it."""
    target = "a (yellow:1.3) circle and a blue square on a gray background"
    windows = 0.0, 0.4, 0.0, 0.2, 1024
    for node in (AttunePromptSwap, AttunePromptRefine):
        plain, copied = (
            bench.sample(*words(bench, node, f"{star}: 0.2", f"{circle}, blue square", target=target, windows=windows))
            for star, circle in (("blue", "circle"), ("(blue:1.1)", "(circle)"))
        )
        assert torch.equal(plain, copied)
    model, _ = words(bench, AttunePromptSwap, target=target)
    weighed = [
        bench.sample(*prompt_reweight(bench, 1, model, target, weights))
        for weights in ("yellow: 2, circle: 0.5", "(yellow:1.3)\uff1a2\uff0c((circle)): 0.5")
    ]
    assert torch.equal(*weighed)
    blended = [
        bench.sample(*local_blend(bench, 1, model, inside=inside, outside=outside, target=target))
        for inside, outside in (("yellow circle, red", "square"), ("(yellow:1.3) circle\u3001red", "(SQUARE)"))
    ]
    assert torch.equal(*blended)


@pytest.mark.parametrize("change, match", [
    ({"inside": "zebra"}, '"zebra" is not in .*; change inside or the prompts on Attune Local Blend'),
    ({"outside": "zebra"}, '"zebra" is not in .*; change outside or the prompts on Attune Local Blend'),
])  # fmt: skip
def test_a_word_that_is_not_there_names_the_node_and_its_input(bench, change, match):
    with pytest.raises(ValueError, match=match):
        local_blend(bench, 1, **change)
    for options, match in (
        (("zebra: 0.4",), '"zebra" is not in .*; change word_windows or the target prompt on Attune Prompt Swap'),
        (("red: 0,4",), '"4" is not .* .write 0.4 for 0,4.; correct word_windows on Attune Prompt Swap'),
        (("", "zebra"), '"zebra" is not in .*; change preserve or the target prompt on Attune Prompt Swap'),
    ):
        with pytest.raises(ValueError, match=match):
            words(bench, AttunePromptSwap, *options)
    for weights, match in (
        ("zebra: 2", '"zebra" is not in .*; change weights or the prompt on Attune Prompt Reweight'),
        ("red: 1,5", '"5" is not .* .write 1.5 for 1,5.; correct weights on Attune Prompt Reweight'),
    ):
        with pytest.raises(ValueError, match=match):
            prompt_reweight(bench, 1, weights=weights)


def test_swap_over_two_chunks_keeps_count(bench):
    """The word behind 90 others is still found in its place, with pieces and weights on the way."""
    before = "a picture of " + " and ".join(["a small white star"] * 18)
    source, target = f"{before} and a red circle", f"{before} and a (squirrelfish:1.1) circle"
    read = [host.read_words(bench.clip, p) for p in (source, target)]
    assert read[0].chunks == read[1].chunks == 2 and read[0].find("red")[0][0] > 77
    model, positive = prompt_swap(bench, 1, source=source, target=target)
    assert bench.sample(model, positive).isfinite().all()
    model, positive = local_blend_of(bench, model, source, target)
    assert bench.sample(model, positive).isfinite().all()


def local_blend_of(bench, model, source, target):
    return outputs(
        AttuneLocalBlend, model, bench.clip, bench.trajectory, source, target, "circle", "", 0.3, 0.2, 256
    )  # fmt: skip


def test_prompts_in_one_and_two_chunks(bench):
    """A refinement may push the text over 77 tokens."""
    long = SOURCE + " and" + " and".join([" a small white star"] * 20)
    model, positive = prompt_refine(bench, 1, target=long)
    assert positive[0][0].shape[1] == 154
    assert bench.sample(model, positive).isfinite().all()
    model, positive = outputs(AttunePromptRefine, bench.model, bench.clip, bench.trajectory, long, SOURCE, *WINDOWS)
    assert bench.sample(model, positive).isfinite().all()


# ---- what the source's pass is spared -----------------------------------------------------------------------------


def test_the_grids_are_the_ones_that_the_network_uses(bench):
    seen = []
    recorder = host.recording(bench.model, lambda place, own, heads: seen.append((place.layer, place.grid)))
    wide = Bench(18, 22)
    runs.walk(recorder, bench.text(SOURCE), wide.noise["samples"], bench.sigmas, lambda d, x, report: d(x, 1.0))
    known = host._grids(bench.model.model.diffusion_model, 18, 22)
    assert seen == [((kind, *block, depth), g) for (block, depth), g in known.items() for kind in ("self", "cross")]


@contextlib.contextmanager
def rows_at_the_end(bench):
    """Rows that reach the UNet's last layer, call by call."""
    reached = []
    handle = bench.model.model.diffusion_model.out[-1].register_forward_pre_hook(
        lambda _, args: reached.append(len(args[0]))
    )
    try:
        yield reached
    finally:
        handle.remove()


def test_the_source_is_read_no_further_than_needed(bench):
    """Where only the first layers are read, the source has a call of its own, which ends there."""
    with rows_at_the_end(bench) as reached:
        outputs_of(bench, (0.0, 0.0, 0.0, 1.0, 64))  # self-attention at 8x8 and below
        assert reached == [2] * STEPS
    with rows_at_the_end(bench) as reached:
        outputs_of(bench, (0.0, 1.0, 0.0, 1.0, 1024))
        assert reached == [3] * STEPS  # in one call with the target's


def outputs_of(bench, windows):
    return bench.sample(*words(bench, AttunePromptSwap, windows=windows))


def sources(model):
    return model.model_options["transformer_options"].get(host.KEY, host.Spec()).references


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_both_ways_to_the_source_agree(method, bench):
    """As rows of the target's call, and in a call of its own, as it is beside any other pack's patch."""
    model, positive = method(bench, 1)
    alone = bench.sample(model, positive)
    beside = model.clone()
    beside.set_model_input_block_patch(lambda h, options: h)
    with rows_of(bench) as rows:
        apart = bench.sample(beside, positive)
    drawn = 4 if method is METHODS["masked fusion"] else 2  # two parts of the picture
    assert max(rows) <= drawn and sum(rows) <= (drawn + len(sources(model))) * STEPS
    assert min(rows) == 1 or not sources(model)
    assert differ(alone, apart) < 1e-3


def test_a_long_text_and_a_batch_in_one_call(bench):
    """The source's text is shorter than the target's, and the call holds two pictures of each."""
    pair = Bench(batch=2)
    target = TARGET + " and" + " and".join([" a small white star"] * 20)
    model, positive = prompt_refine(pair, 1, target=target)
    with rows_of(pair) as rows:
        together = pair.sample(model, positive)
    assert max(rows) == 6
    beside = model.clone()
    beside.set_model_input_block_patch(lambda h, options: h)
    assert differ(together, pair.sample(beside, positive)) < 1e-3
