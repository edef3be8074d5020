"""The one file here that speaks ComfyUI's conventions: prompts, patches, rows, steps, and the reference passes.

What rides on MODEL is a frozen :class:`Spec`. When sampling starts, a :class:`_Run` is made from it, and when it ends,
however it ends, that is dropped. In each step the UNet also sees every reference's latent at that noise level, and the
target's patched layers hand the controllers q, k, v of both. There are two ways to that, with one result:

- alone on the MODEL, the references are further rows of the target's own call, which is the quickest;
- beside a ControlNet, other packs' patches and caches, on little memory, or where only the first layers are read, each
  reference runs before the target in a call of its own, which ends at the last place that anything reads.

With a :class:`FeatureCache` on the MODEL it is always the second way, and a reference that was read before is not run.

What it uses of the host, and the releases that each use was checked on, is in tests/host_uses.md.
"""

import contextlib
import functools
import hashlib
import inspect
import itertools
import re
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, replace

import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.conds import CONDCrossAttn, CONDRegular
from comfy.ldm.modules import attention
from comfy.ldm.modules.attention import BasicTransformerBlock, SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel
from comfy.patcher_extension import WrappersMP
from comfy.sd1_clip import SD1Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

import nodes as stock

from ..messages import legible_errors
from .controller import Controller
from .feature_cache import FeatureCache
from .local_blend import blend
from .maps import nearest
from .masks import PIXELS
from .reference import Spec
from .refinement import Found
from .start import adds_noise, off_trajectory
from .values import QKV, Place, apply_map, attention_map
from .watch import Lookout
from .words import CHUNK, group_words, read_braces

KEY = "attune"  # of the spec in transformer_options and of our wrappers
RUN = "attune_run"  # in transformer_options while sampling: what this run has gathered
PROMPT = "attune_prompt"  # in a conditioning's dictionary: the prompt it was encoded from
TEXT, SEED = "attune_text", "attune_seed"  # there too: what a part is drawn from, for people to read
END = 49407  # CLIP's end token, which also pads
NULL_CFG = "attune_null_cfg"  # in a negative's dictionary: the cfg that inversion/trajectory.py says it was learned for
BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}  # what CLIP's vocabulary writes each byte as
CACHE = "attune_cache"  # in transformer_options: the FeatureCache that the user put on MODEL, if any
PREDICTED = "attune_predicted"  # of a bent prediction: what the model predicted
RIDERS = "attune_riders"  # in transformer_options: references that are to be rows of the target's call
PICTURES = "attune_pictures"  # there too: which picture of the sampler's latent each row of a call draws
# Among a conditioning's model_conds, (B, 2): which edit its rows belong to, or one of the two below; which picture.
ROLE = "attune_role"
# What SDXL is told of a picture beside its text, by the names that the stock encoders for it write.
SIZES = {"width", "height", "crop_w", "crop_h", "target_width", "target_height", "aesthetic_score"}
NONE, NEGATIVE = 0, -1  # a part's negative rows have the part's role below zero, less this one


# ---- prompts -----------------------------------------------------------------------------------------------------


def read_words(clip, prompt):
    """The prompt's :class:`words.Tokens`, by the CLIP's own tokenizer (weights, escapes and embeddings included)."""
    return _read_words(clip.tokenize, clip.tokenizer.untokenize, prompt)


def same_word(word, among):
    """The one of the words ``among`` that Stable Diffusion's tokenizer reads as ``word`` where no CLIP is at hand; else
    ``word``."""
    tokenizer = SD1Tokenizer()
    wanted, *read = (
        [one.text for one in _read_words(tokenizer.tokenize_with_weights, tokenizer.untokenize, _encodable(text)).words]
        for text in (word, *among)
    )
    return among[read.index(wanted)] if wanted in read else word


def _read_words(tokenize, untokenize, prompt):
    chunks = next(iter(tokenize(prompt, return_word_ids=True).values()))
    tokens = [[(token, group) for token, _, group in chunk[1:]] for chunk in chunks]
    tokens = [
        chunk[: next((i for i, (t, _) in enumerate(chunk) if not torch.is_tensor(t) and t == END), len(chunk))]
        for chunk in tokens
    ]
    vectors = Counter(group for chunk in tokens for token, group in chunk if torch.is_tensor(token))
    names = re.findall(r"embedding:[^\s,:()]+", prompt)
    if len(names) != len(vectors):  # the tokenizer drops embeddings that it does not find; which ones it does not say
        names = [name for name in names if _holds_vectors(tokenize(name))]
    names = names if len(names) == len(vectors) else ["<embedding>"] * len(vectors)
    names, left = dict(zip(vectors, names, strict=True)), Counter(vectors)
    pieces = [[] for _ in tokens]
    for chunk, read in zip(tokens, pieces, strict=True):
        for token, group in chunk:
            if torch.is_tensor(token):  # all vectors of a learned embedding are one word
                left[group] -= 1
                read.append(names.pop(group, "") + ("" if left[group] else "</w>"))
            else:
                read.append(untokenize([(token, 1.0)])[0][1])
    read = group_words(prompt, pieces)
    return replace(
        read,
        words=tuple(replace(word, text=_letters(word.text)) for word in read.words),
        cut=lambda text: [word.text for word in _read_words(tokenize, untokenize, _encodable(text)).words],
    )


def _holds_vectors(tokens):
    """Whether an embedding is among what a tokenizer gives."""
    return any(torch.is_tensor(token) for chunk in next(iter(tokens.values())) for token, *_ in chunk)


def _encodable(text):
    """A text with half an emoji, which a tokenizer refuses, as the letters of its code."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _letters(text):
    """A word of CLIP's vocabulary as people write it; the vocabulary is in bytes, each as one printable letter."""
    return bytes(BYTES[c] for c in text).decode("utf-8", "replace") if BYTES.keys() >= set(text) else text


def read_nouns(clip, text, where="the Attune node"):
    """A prompt whose nouns stand in braces: the prompt without them, and (noun, its token positions) in order.

    Raises ValueError for braces that do not close, for none, and for what is no word of the prompt; ``where`` says
    where to change that.
    """
    prompt, marked = read_braces(text, where)
    read, nouns = read_words(clip, prompt), []
    for noun, start in marked:
        read.find(noun, f"the braces in {where}")
        wanted, start = read.cut(noun), prompt.index(noun, start)
        # With another word in the noun's place, and apart from what is around it, what stands before it stays.
        other = "x" if wanted[:1] != ["x"] else "y"
        without = read_words(clip, f"{prompt[:start]} {other} {prompt[start + len(noun) :]}").words
        before = (a.text == b.text for a, b in zip(read.words, without, strict=False))
        first = sum(itertools.takewhile(bool, before))
        own = read.words[first : first + len(wanted)]
        if not own or [word.text for word in own] != wanted:
            raise ValueError(
                f'The braces around "{noun}" cut a word of the prompt "{prompt}", but only whole words are learned; '
                f"put them around the word in {where}."
            )
        nouns.append((noun, tuple(p for word in own for p in word.positions)))
    return prompt, nouns


def encode(clip, prompt, like=()):
    """The prompt as CONDITIONING, tagged so that an edit knows its rows, for a picture of the sizes that the
    CONDITIONING ``like`` tells, if it tells any."""
    sizes = {name: value for name, value in like[0][1].items() if name in SIZES} if like else {}
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt), add_dict={**sizes, PROMPT: prompt})


def is_in_fp8(clip):
    """Whether any of a CLIP's weights are."""
    encoder = getattr(clip, "cond_stage_model", None)
    return encoder is not None and any(weight.dtype.itemsize == 1 for weight in encoder.parameters())


def check_length(read, conditioning):
    """Raises ValueError where a CLIP did not give one text token for each of a prompt's :class:`words.Tokens`."""
    for length in (text.shape[1] for text, _ in conditioning):
        if length != read.length:
            raise ValueError(
                f"The CLIP gives {length} text tokens for a prompt of {read.length}, as with a pack's patch on it "
                "(NegPip or a longer CLIP, say), so no word's attention can be found; connect the CLIP from before "
                "that patch to this node and to CLIP Text Encode."
            )


def part_of_picture(conditioning, name, region, control=None):
    """CONDITIONING that holds for the latent pixels ``region`` (B, h, w) alone, as the part ``name`` of an edit, under
    this CONTROL_NET or none. Raises ValueError for one that is set to a mask already."""
    if any("mask" in extras for _, extras in conditioning):
        raise ValueError(
            "A conditioning is set to a mask, but the mask of the Attune node says where each text holds; take "
            "Conditioning (Set Mask) out from between CLIP Text Encode and that node."
        )
    plain = without_parts(conditioning)
    extras = {PROMPT: name, "mask": region, "mask_strength": 1.0, "set_area_to_bounds": False}
    extras |= {} if control is None else {"control": control, "control_apply_to_uncond": False}
    return [[text, {**others, **extras}] for text, others in plain]


def without_parts(conditioning):
    """A CONDITIONING without what :func:`part_of_picture`, :func:`tell` and a CONTROL_NET put on it."""
    put = {PROMPT, TEXT, SEED, "mask", "mask_strength", "set_area_to_bounds", "control", "control_apply_to_uncond"}
    return [[text, {k: v for k, v in extras.items() if k not in put}] for text, extras in conditioning]


def of_part(conditioning, name):
    """The entries of a CONDITIONING that are the part ``name`` of an edit."""
    return [one for one in conditioning if one[1].get(PROMPT) == name]


def tell(conditioning, text, seed):
    """A CONDITIONING that says what it is drawn from; None where that is not known."""
    return [[one, {**extras, TEXT: text, SEED: seed}] for one, extras in conditioning]


def told(conditioning):
    """The text and the seed that a CONDITIONING says it is drawn from, None where it does not."""
    extras = conditioning[0][1] if conditioning else {}
    return (extras[TEXT], extras[SEED]) if TEXT in extras else (extras.get(PROMPT), None)


def apply_control(positive, negative, control, hint, strength, start, end):
    """Both CONDITIONING lists with a CONTROL_NET and its ``hint`` image (B, H, W, C) on them, by the host's node."""
    return stock.ControlNetApplyAdvanced().apply_controlnet(positive, negative, control, hint, strength, start, end)


def own_controls(*conditionings):
    """CONDITIONING lists whose CONTROL_NETs are copies with nothing of another run in them; one that several entries
    share stays one, since the host runs only those together."""
    copies = {}

    def copy(control):
        if control is None:
            return None
        if control not in copies:
            copies[control] = control.copy().set_previous_controlnet(copy(control.previous_controlnet))
        return copies[control]

    return [
        [
            [text, {**extras, "control": copy(extras["control"])} if "control" in extras else extras]
            for text, extras in one
        ]
        for one in conditionings
    ]


def check_control(model, control, node):
    """Raises ValueError for a CONTROL_NET that was made for another kind of MODEL: of a T2I-Adapter the host would skip
    what does not fit, with a line in its log."""
    unet = model.model.diffusion_model
    if (adapter := getattr(control, "t2i_model", None)) is not None:
        levels = [unet.model_channels * multiple for multiple in unet.channel_mult]
        levels = getattr(unet, "adapter_channels", levels)  # the demo model takes wider ones than its own
        theirs = list(getattr(adapter, "channels", ()))
        fits = theirs[: len(levels)] == levels and adapter.xl == (len(levels) == 3)
        what, wanted = f"a T2I-Adapter of widths {theirs}", f"widths {levels}"
    else:
        theirs, ours = _text_width(getattr(control, "control_model", None)), _text_width(unet)
        fits, what, wanted = theirs in (None, ours), f"a ControlNet for texts of width {theirs}", f"width {ours}"
    if not fits:
        raise ValueError(
            f"The CONTROL_NET is {what}, but the MODEL needs {wanted}; connect one that was made for the MODEL's "
            f"family (SD 1.x, SD 2.x or SDXL) to {node}."
        )


def _text_width(net):
    """How wide the texts are that a UNet or ControlNet reads; None where it reads none."""
    blocks = (m for m in net.modules() if isinstance(m, BasicTransformerBlock)) if net is not None else ()
    return next((m.attn2.to_k.in_features for m in blocks if getattr(m, "attn2", None) is not None), None)


def token_vectors(clip, prompt, positions):
    """What each of the CLIP's text encoders reads for the tokens at ``positions``: its name -> (R, width), fp32.

    Raises ValueError for a CLIP whose encoders are not of CLIP's kind.
    """
    vectors = {}
    for name, chunks in clip.tokenize(prompt).items():
        encoder = getattr(clip.cond_stage_model, "clip_" + name, None)
        if encoder is None:
            raise ValueError(
                f'The CLIP has a text encoder "{name}" that is none of Stable Diffusion\'s, so no word can be learned '
                "in it; connect the CLIP of an SD 1.x, SD 2.x or SDXL checkpoint."
            )
        table, rows = encoder.transformer.get_input_embeddings().weight, []
        for position in positions:
            token = chunks[position // CHUNK][position % CHUNK][0]
            rows.append((token if torch.is_tensor(token) else table[int(token)]).detach().float().cpu())
        vectors[name] = torch.stack(rows)
    return vectors


def with_vectors(clip, prompt, vectors):
    """The prompt's tokens for the CLIP, with ``vectors`` in the place of some: text encoder's name -> position ->
    (width,)."""
    tokens = clip.tokenize(prompt)
    for name, own in vectors.items():
        if name not in tokens:
            raise ValueError(
                f'The TRAJECTORY has learned words for a text encoder "{name}", which the CLIP does not have; connect '
                "the CLIP of the checkpoint that the TRAJECTORY was made with."
            )
        for position, vector in own.items():
            chunk = tokens[name][position // CHUNK]
            chunk[position % CHUNK] = (vector, *chunk[position % CHUNK][1:])
    return tokens


def encode_tokens(clip, tokens):
    """The embedding (1, T, C) of tokens as the CLIP's tokenizer gives them, with a gradient to vectors among them.

    The CLIP must be loaded: here nothing is, since that could push a MODEL out that is being learned on.
    """
    encoder = clip.cond_stage_model
    encoder.reset_clip_options()
    if clip.layer_idx is not None:
        encoder.set_clip_options({"layer": clip.layer_idx})
    return encoder.encode_token_weights(tokens)[0]


def encode_steps(clip, prompt, vectors, windows, like=()):
    """As :func:`encode`, with one text a step: ``vectors``, text encoder's name -> position -> (S, B, width), take the
    place of some tokens; ``windows`` (S+1,) are shares of the schedule, as a Trajectory's.

    Whatever else a conditioning holds, such as SDXL's pooled text, is the prompt's own. Raises ValueError for a CLIP
    with a scheduled hook.
    """
    plain, entries = encode(clip, prompt, like), []
    if len(plain) > 1:
        raise ValueError(
            "The CLIP has a hook on a schedule and the TRAJECTORY has learned words with one text for each step, but a "
            "text can follow only one of them; connect the CLIP from before Set CLIP Hooks to this node."
        )
    extras = plain[0][1]
    pictures = next(iter(next(iter(vectors.values())).values())).shape[1]
    for step, (start, end) in enumerate(zip(windows[:-1], windows[1:], strict=True)):
        mine = ({n: {p: v[step, i] for p, v in own.items()} for n, own in vectors.items()} for i in range(pictures))
        texts = [clip.encode_from_tokens(with_vectors(clip, prompt, one)) for one in mine]
        entries.append([torch.cat(texts), {**extras, "start_percent": start, "end_percent": end}])
    return entries


# ---- what rides on MODEL -----------------------------------------------------------------------------------------


def check_unet(model):
    """Raises ValueError for a MODEL without the attention layers that this pack steers."""
    unet = model.model.diffusion_model
    if not isinstance(unet, UNetModel) or not any(isinstance(m, BasicTransformerBlock) for m in unet.modules()):
        raise ValueError(
            f"The MODEL is a {type(unet).__name__}, but Attune steers the attention of Stable Diffusion UNets "
            "(SD 1.x, SD 2.x, SDXL); load such a checkpoint in the loader that feeds this node."
        )
    theirs, ours = unet.in_channels, model.model.latent_format.latent_channels
    if theirs != ours and not model.model.concat_keys:
        raise ValueError(
            f"The MODEL is a {type(model.model).__name__}, image-conditioned (as InstructPix2Pix, upscalers and SVD "
            "are), but Attune edits with models that generate from text alone and with inpainting models (SD 1.x, SD "
            "2.x, SDXL); load such a checkpoint in the loader that feeds this node."
        )


def check_texts(model, *conditionings):
    """Raises ValueError for CONDITIONING of another width than the MODEL reads."""
    wanted = _text_width(model.model.diffusion_model)
    for width in (text.shape[-1] for conditioning in conditionings for text, _ in conditioning):
        if width != wanted:
            raise ValueError(
                f"The CLIP belongs to another model family (its texts are {width} wide, the MODEL needs {wanted}); "
                "connect the CLIP of the MODEL's own checkpoint to this node and to CLIP Text Encode."
            )


def check_layers(model, layers, name, node, first=0):
    """Raises ValueError for a MODEL without a UNet, and for attention layers, counted from 0, that it does not have.

    The sentence counts them from ``first``, as the input ``name`` of ``node`` does.
    """
    check_unet(model)
    count = len(_grids(model.model.diffusion_model, 1, 1))
    if layers and max(layers) >= count:
        raise ValueError(
            f"The layers of {node} go to {max(layers) + first}, but the MODEL has {count} layers of self-attention, "
            f"{first} to {count - 1 + first}; change {name} there."
        )


def fewest_tokens(model, size):
    """How many picture tokens the coarsest attention layer of a MODEL has, for latents of ``size`` (h, w)."""
    return min(h * w for h, w in _grids(model.model.diffusion_model, *size).values())


def parts_of_layers(model):
    """For each transformer layer of MODEL, in order, the part of the UNet that holds it: input, middle or output."""
    return [part for (part, _), _ in _grids(model.model.diffusion_model, 1, 1)]


def check_plain(model):
    """Raises ValueError for a MODEL that cannot be looked into: without a UNet, or with an edit on it."""
    check_unet(model)
    if KEY in model.model_options["transformer_options"]:
        raise ValueError(
            "The MODEL carries an Attune edit, but this node looks at the source; connect the MODEL from before the "
            "edit node."
        )


def _prompt(reference):
    return reference.conditioning[0][1].get(PROMPT)


def install(model, references, controllers=(), blends=()):
    """A clone of MODEL with these references, controllers and local blends added to those it may carry already.

    Raises ValueError for a model without a UNet, when it carries another reference of the same name, and when it
    carries another exchange of words to the same prompt.
    """
    check_unet(model)
    check_texts(model, *(reference.conditioning for reference in references))
    model = model.clone()
    options = model.model_options["transformer_options"]
    spec = options.get(KEY, Spec())
    known = {r.name: r for r in spec.references}
    for reference in references:
        other = known.setdefault(reference.name, reference)
        # A trajectory with learned words gives one text a step.
        same = _prompt(other) == _prompt(reference) and len(other.conditioning) == len(reference.conditioning)
        if not same or not torch.equal(other.latents, reference.latents):
            raise ValueError(
                "Chained Attune edits must share one TRAJECTORY and source prompt, but the MODEL's "
                f'"{reference.name}" has others already; give the same ones to each Attune edit node, and put Attune '
                "Prompt Reweight behind Attune Prompt Swap or Refine."
            )
    taken = {c.prompt for c in spec.controllers if c.replaces_words}
    for controller in controllers:
        if controller.replaces_words and controller.prompt in taken:
            raise ValueError(
                f'The MODEL already carries an edit of words to "{controller.prompt}", and a second would undo it; '
                "make all changes of words in one Attune Prompt Swap or Refine."
            )
    if sum(c.mixes for c in (*spec.controllers, *controllers)) > 1:
        raise ValueError(
            "The MODEL already carries an Attune Mutual Self-Attention or Attune Context Preserving, and a second "
            "would undo it; keep one of them, with all of what changes in its target mask."
        )
    if KEY not in options:
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _outer_sample)
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, _predict_noise)
        model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, _calc_cond_batch)
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _apply_model)
    options[KEY] = Spec(tuple(known.values()), (*spec.controllers, *controllers), (*spec.blends, *blends))
    return model


def bend_guidance(model, bend):
    """A clone of MODEL that is guided by ``bend(difference)`` in the place of the difference (B, C, h, w) between its
    clean predictions under the positive and under the negative. What other nodes do to guidance comes as well, each in
    its turn; at a cfg of 1 the negative is drawn, too, since it takes part."""

    def before(args):
        guided, unguided = args["conds_out"][:2]
        if unguided is None:
            return args["conds_out"]
        bent = unguided + bend(guided - unguided)
        setattr(bent, PREDICTED, getattr(guided, PREDICTED, guided))
        return [bent, *args["conds_out"][1:]]

    def behind(args):
        """What others add behind guidance goes by what the model predicted: perturbed attention takes a prediction of
        its own off it, and multiplies the rest. The host hands all of them the one tensor that was guided with."""
        guided = args["cond_denoised"]
        guided.copy_(getattr(guided, PREDICTED, guided))
        return args["denoised"]

    model = model.clone()
    model.set_model_sampler_pre_cfg_function(before, disable_cfg1_optimization=True)
    model.set_model_sampler_post_cfg_function(behind, disable_cfg1_optimization=True)
    others = model.model_options["sampler_post_cfg_function"]
    others.insert(0, others.pop())
    return model


def keep_features(model, limit, tell):
    """A clone of MODEL whose edits keep at most ``limit`` bytes of their sources' features, and read them from there;
    ``tell(text)`` says how full it is after each sampling. Raises ValueError for a MODEL that cannot be edited."""
    check_plain(model)
    model = model.clone()
    model.model_options["transformer_options"][CACHE] = FeatureCache(limit, tell)
    return model


def source_of_words(model, prompt):
    """The reference that MODEL's edit of words to ``prompt`` reads, or None where it carries no such edit."""
    spec = model.model_options["transformer_options"].get(KEY, Spec())
    names = [c.reference for c in spec.controllers if c.replaces_words and c.prompt == prompt]
    return next((r for r in spec.references if r.name in names), None)


# ---- wrappers around one sampling --------------------------------------------------------------------------------


def _outer_sample(executor, noise, latent_image, sampler, *args, **kwargs):
    options = executor.class_obj.model_options["transformer_options"]
    run = options[RUN] = _Run(options[KEY], options.get(CACHE))
    try:
        with legible_errors():
            run.noise_added = bool(noise.any())
            run.tell_of_noise(sampler)
            latent = executor(noise, latent_image, sampler, *args, **kwargs)
        run.log(latent)
        return latent
    finally:
        del options[RUN]
        run.close()


def _predict_noise(executor, x, timestep, model_options, seed):
    run = model_options["transformer_options"].get(RUN)
    if run is None:
        return executor(x, timestep, model_options, seed)
    if not run.ready:
        sigmas = model_options["transformer_options"]["sample_sigmas"]
        run.prepare(executor.class_obj, x, sigmas)
        run.tell_of_start(x, float(timestep[0]), sigmas)
        run.tell_of_cfg(executor.class_obj)
    if x.shape != run.shape:
        raise ValueError(_in_pieces(x.shape, run.shape))
    return run.blend(x, executor(x, timestep, model_options, seed), float(timestep[0]))


def _calc_cond_batch(executor, model, conds, x, timestep, model_options):
    run = model_options["transformer_options"].get(RUN)
    if run is None:
        return executor(model, conds, x, timestep, model_options)
    pictures = _pictures(x.shape, run.shape, model_options["transformer_options"].get("context_window"))
    conds = [group and [_of_pictures(c, pictures, run.shape[0]) for c in group] for group in conds]
    if not run.enter(float(timestep[0]), pictures):
        return executor(model, conds, x, timestep, model_options)
    riders = run.riders(model, conds, x, timestep, model_options)
    if not riders:
        run.read_references(model, x, timestep, model_options)
    patched = _patched(run.layers, model_options, _EditPatch(run))
    patched["transformer_options"][RIDERS] = riders
    run.calls.clear()
    # What the positive rows show is needed in the negative ones, and the host may run either first.
    ours = [any(_edit_of(c) for c in group or []) for group in conds]
    if riders or not run.finds_at_once or len(conds) < 2:
        found = executor(model, conds, x, timestep, patched)
    else:
        halves = [[g if mine == half else None for g, mine in zip(conds, ours, strict=True)] for half in (True, False)]
        first, second = (executor(model, half, x, timestep, patched) for half in halves)
        found = [a if mine else b for a, b, mine in zip(first, second, ours, strict=True)]
    if any(ours) and run.calls[None] and not run.calls[ROLE]:
        raise ValueError(FORGOTTEN)
    return found


FORGOTTEN = (
    "Another node calls the MODEL without what ComfyUI says of its rows, so the Attune edit would be lost; take that "
    "node (a tiled sampler, say) off the MODEL that goes through the Attune node."
)


def _pictures(shape, whole, window):
    """Which pictures of the ``whole`` latent's shape (B, C, h, w) a call on one of ``shape`` draws, by the host's own
    context ``window`` where it is a part. Raises ValueError for any other part."""
    if shape == whole:
        return tuple(range(whole[0]))
    if window is not None and window.dim == 0 and (len(window.index_list), *whole[1:]) == tuple(shape):
        return tuple(window.index_list)
    raise ValueError(_in_pieces(shape, whole))


def _in_pieces(shape, whole):
    """The sentence for a call of the UNet with a part of the image, or of the batch, that cannot be told."""
    (count, _, h, w), (pictures, _, height, width) = shape, whole
    what = f"{PIXELS * width}x{PIXELS * height} image in pieces of {PIXELS * w}x{PIXELS * h} pixels"
    if (h, w) == (height, width):
        what = f"batch of {pictures} images in parts of {count}"
    return (
        f"Another node samples the {what}, but an Attune edit must know which part of the source each one is; take "
        "that node (a tiled sampler or sliding windows that are not ComfyUI's own) off the MODEL that goes through the "
        "Attune node."
    )


def _of_pictures(cond, pictures, count):
    """A prepared conditioning for some of the ``count`` pictures: of what has a row for each, theirs."""
    if len(pictures) == count:
        return cond
    model_conds = {
        name: one._copy_with(one.cond[list(pictures)])
        if torch.is_tensor(one.cond) and count > 1 and len(one.cond) == count
        else one
        for name, one in cond["model_conds"].items()
    }
    return {**cond, "model_conds": model_conds}


def _apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **conds):
    tags, run = conds.pop(ROLE, None), transformer_options.get(RUN)
    if run is not None:
        run.calls[None if tags is None else ROLE] += 1
    if run is None or tags is None:
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **conds)
    if len(tags) != len(x) or x.shape[2:] != run.shape[2:]:
        raise ValueError(_in_pieces(x.shape, run.shape))
    # Read once a call, since every look at a tensor's values makes a GPU wait.
    roles, pictures = zip(*tags.tolist(), strict=True)
    rows = {role: [i for i, one in enumerate(roles) if one == role] for role in set(roles)}
    riders = transformer_options.get(RIDERS) or {}
    riders = riders if any(rows) else {}  # a call without rows of an edit takes none along
    count = len(x)
    for name, (latent, texts) in riders.items():
        rows[name] = list(range(len(x), len(x) + len(latent)))
        x, t = torch.cat([x, latent]), torch.cat([t, t[:1].expand(len(latent))])
        c_crossattn = CONDCrossAttn(c_crossattn).concat([texts["c_crossattn"]])
        conds = {key: torch.cat([value, texts[key].cond]) for key, value in conds.items()}
    run.roles |= rows.keys()
    transformer_options = {**transformer_options, ROLE: rows, PICTURES: pictures}
    return executor(x, t, c_concat, c_crossattn, control, transformer_options, **conds)[:count]


def _edit_of(cond):
    """Whether a conditioning's rows are an edit's."""
    tag = cond["model_conds"].get(ROLE)
    return tag is not None and int(tag.cond[0, 0]) > NONE


class _Run:
    """What one sampling gathers: the references' prepared conditionings, this step's q, k, v, the blends' maps."""

    def __init__(self, spec, cache=None):
        self.spec = spec
        self.cache = cache
        self.sources = {}  # reference name -> its key in the cache, None for one that has none
        self.passes, self.spared, self.full = 0, 0, False  # source passes wanted, and not run; whether the cache was
        self.ready = False
        self.noise_added = False  # whether the sampler was given noise to add
        self.shape = None  # of the sampler's latent (B, C, h, w)
        self.pictures = ()  # the pictures of it that this pass draws, by their numbers
        self.met, self.unseen = set(), set()  # those that this noise level's passes drew; those that no earlier one did
        self.calls = Counter()  # how often the UNet was called in this pass with rows that are known, and without
        self.roles = set()  # whose rows have been drawn in this sampling
        self.conds = {}
        self.layers = []
        self.levels = []  # the noise levels that the sampler was given
        self.sigma = self.step = self.steps = None
        self.features = {}  # reference name -> layer -> QKV
        self.places = {}  # layer -> its attention grid (h, w), in the order that the UNet runs them
        self.numbers = {}  # layer -> its number among those of its kind
        self.read = {}  # reference name -> the layers where it is read in this step, in order
        self.lookout = Lookout()
        self.found = {}  # controller -> step -> the mask (B, h, w) that its refinement found

    def close(self):
        if self.cache is not None and self.passes:
            held, limit = (f"{size / 1e6:.0f}" for size in (self.cache.size, self.cache.limit))
            text = f"{held} of {limit} MB kept in RAM; {self.spared} of {self.passes} source passes were not run"
            self.cache.tell(text + ("; raise limit_mb to keep more" if self.full else ""))
        self.lookout = Lookout()
        for cond in (c for conds in self.conds.values() for c in conds if "control" in c):
            cond["control"].cleanup()
        for gathered in (self.conds, self.features, self.found):
            gathered.clear()

    def enter(self, sigma, pictures):
        """Sets the step, and the pictures that this pass draws; False where nothing acts or looks on in it, so that
        nothing is run or patched."""
        self.step, self.steps = self.clock(sigma)
        self.read, acts = {}, False
        for layer, grid in self.places.items():
            readers = self.readers(self.place(layer, grid))
            acts = acts or bool(readers)
            for name in {name for one in readers for name in one.reads}:
                self.read.setdefault(name, []).append(layer)
        fresh = sigma != self.sigma
        self.sigma = sigma if acts else None
        if fresh or pictures != self.pictures or not acts:
            self.features.clear()
        self.met = set() if fresh else self.met
        self.unseen = set(pictures) - self.met
        self.met |= self.unseen
        self.pictures = pictures
        if fresh and acts:
            self.lookout.next_step()
            self.find()
        return acts

    def clock(self, sigma):
        """The step at a noise level and how many there are: the references', or without any the sampler's own."""
        for reference in self.spec.references:
            return reference.step(sigma), reference.steps
        return max(0, sum(level >= sigma * (1 - 1e-4) for level in self.levels[:-1]) - 1), len(self.levels) - 1

    def place(self, layer, grid):
        kind, *block, depth = layer
        number = self.numbers[layer]
        size = tuple(PIXELS * side for side in self.shape[2:])
        return Place(kind, tuple(block), depth, grid, self.step, self.steps, number, size=size)

    def readers(self, place):
        """The controllers and blends that do something at this place."""
        return [*(c for c in self.spec.controllers if c.edits(place)), *self.lookout.at(place)]

    def reads(self, place, name):
        """Whether anything wants this reference at this place."""
        return any(name in one.reads for one in self.readers(place))

    def find(self):
        """Notes what each refined target mask is in this step."""
        for one in (c for c in self.spec.controllers if c.refinement is not None):
            found = one.refinement.find(self.step, self.steps, self.lookout.seen(one))
            if found is not None:
                self.found.setdefault(one, {})[self.step] = found.cpu()

    def log(self, latent):
        """Leaves the masks that were found under the latent that the sampling ended with."""
        for one, found in self.found.items():
            one.refinement.log.keep(latent, Found(torch.stack([*found.values()]), tuple(found), self.steps))

    @property
    def finds_at_once(self):
        """Whether what the positive rows show is needed in the negative ones of the same step."""
        return any(c.watch is not None and c.watch.at_once for c in self.spec.controllers)

    def tell_of_noise(self, sampler):
        """Says where a sampler of the host's adds noise at its steps."""
        function = getattr(sampler, "sampler_function", None)
        if function is not None and adds_noise(function, getattr(sampler, "extra_options", {})):
            self.tell(
                f"The sampler {function.__name__.removeprefix('sample_')} adds noise at its steps, which takes the "
                "edit off the source's TRAJECTORY; choose one that adds none, such as euler, or set its eta to 0."
            )

    def tell_of_start(self, x, sigma, sigmas):
        """Says where the sampling does not start on the trajectory of an edit that is made for that."""
        for reference in self.spec.references:
            if reference.tell and (text := off_trajectory(reference, x, sigma, sigmas, self.noise_added)):
                return reference.tell(text)

    def tell_of_cfg(self, guider):
        """Says where null-text embeddings that were learned for one cfg are sampled at another."""
        cfg = getattr(guider, "cfg", None)
        learned = {cond.get(NULL_CFG) for name in guider.conds for cond in guider.conds[name] if "negative" in name}
        for goal in learned - {None}:
            if cfg is not None and abs(cfg - goal) > 1e-3:
                self.tell(
                    f"The sampler's cfg is {cfg:g}, but the null-text embeddings in its negative were learned for "
                    f"{goal:g}; set cfg to {goal:g}, or learn them again at {cfg:g}."
                )

    def tell(self, text):
        """Says what goes wrong while sampling on the first edit of those whose reference tells, if any does."""
        if tell := next((r.tell for r in self.spec.references if r.tell), None):
            tell(text)

    def prepare(self, guider, x, sample_sigmas):
        """Tags the guider's conditionings and converts the references'; raises ValueError for what does not fit."""
        self.shape = x.shape
        for reference in self.spec.references:
            _check_fit(reference, x, float(sample_sigmas[0]))
        for name, mask in (pair for one in (*self.spec.controllers, *self.spec.blends) for pair in one.masks):
            if len(mask) not in (1, len(x)):
                raise ValueError(
                    f"The {name} holds {len(mask)} masks, but the sampler draws {len(x)} pictures; connect one mask, "
                    "or one for each picture."
                )
        if len(blended := sorted({blend.prompt for blend in self.spec.blends})) > 1:
            self.tell(
                f"Attune Local Blends of {len(blended)} target prompts ({', '.join(blended)}) bound each other, so an "
                "edit shows only where all of them let it; give every Attune Local Blend the same target_prompt, or "
                "sample each target by itself."
            )
        found, negative = set(), NEGATIVE if any(c.both_halves for c in self.spec.controllers) else NONE
        for name, conds in guider.conds.items():
            for cond in conds:
                # A negative made from the edit's positive (zeroed out, say) carries its tag but is not the edit.
                role = self._negative_role(cond, negative) if "negative" in name else self._role(cond)
                found.add(role)
                _refuse_area(cond)
                tag = _tag(role, len(x), x.device)
                cond["model_conds"] = {**cond["model_conds"], ROLE: tag}
        for role, prompt in enumerate(self.spec.lengths, 1):
            halves = {role, NEGATIVE - role} if any("negative" in name for name in guider.conds) else {role}
            if prompt in self.spec.parts and not halves <= found:
                raise ValueError(
                    f"No conditioning of this sampling is the part {prompt} that the MODEL was edited for; connect the "
                    "positive and negative outputs of the same Attune fusion node to the sampler."
                )
            if role not in found:
                raise ValueError(
                    f'No positive conditioning of this sampling is the prompt "{prompt}" that the MODEL was edited '
                    "for; connect the positive output of the Attune edit node to the sampler's positive input, and "
                    "give edits that are chained the same target prompt."
                )
        for reference in self.spec.references:
            conds = {"positive": comfy.sampler_helpers.convert_cond(reference.conditioning)}
            picture = reference.latents[-1].to(x)  # models with an inpainting input want to see one
            conds = comfy.samplers.process_conds(guider.inner_model, x, conds, x.device, latent_image=picture)
            tag = {ROLE: _tag(NONE, len(picture), x.device)}
            self.conds[reference.name] = [{**c, "model_conds": c["model_conds"] | tag} for c in conds["positive"]]
        if self.cache is not None:
            self.sources = {r.name: _fingerprint(r, guider.model_patcher) for r in self.spec.references}
        unet = guider.inner_model.diffusion_model
        grids = _grids(unet, *x.shape[2:])
        self.layers = list(grids)
        self.places = {(kind, *block, depth): g for (block, depth), g in grids.items() for kind in ("self", "cross")}
        self.numbers = {layer: number // 2 for number, layer in enumerate(self.places)}
        self.lookout = Lookout({one: nearest(grids.values(), one.watch.level) for one in self.spec.watchers})
        self.levels = [float(s) for s in sample_sigmas]
        self.ready = True

    def _role(self, cond):
        lengths = self.spec.lengths
        if cond.get(PROMPT) not in lengths:
            return NONE
        prompt = cond[PROMPT]
        wanted = lengths[prompt]
        length = cond["model_conds"]["c_crossattn"].cond.shape[1]
        if wanted is not None and length != wanted:
            raise ValueError(
                f'The conditioning of "{prompt}" has {length} text tokens at the sampler but had {wanted} at the edit '
                "node; take nodes that lengthen it, such as Conditioning (Concat), out from between them."
            )
        return 1 + list(lengths).index(prompt)

    def _negative_role(self, cond, otherwise):
        name = cond.get(PROMPT)
        return NEGATIVE - self._role(cond) if name in self.spec.parts else otherwise

    def riders(self, model, conds, x, timestep, model_options):
        """The references as rows of the target's own call: name to (latent, prepared conditioning); {} where they had
        better run alone.
        """
        if not self.read:
            return {}
        sigma = self.sigma
        active = [[c for c in group if _holds(c, sigma)] for group in conds if group is not None]
        texts = {name: self.texts(name) for name in self.read}
        ours = [c for name in self.read for c in texts[name] if _holds(c, sigma)]
        every = [c for group in active for c in group] + ours
        alone = (
            self.cache is not None
            or any(layers[-1][1:3] != list(self.places)[-1][1:3] for layers in self.read.values())
            or _others_work(model_options)
            or any(set(c) & NOT_IN_ROWS for c in every)
            or any(set(c["model_conds"]) != set(ours[0]["model_conds"]) for c in every)
            or any(type(kind) not in IN_ROWS for c in every for kind in c["model_conds"].values())
            or len(ours) != len(self.read)
        )
        if alone:
            return {}
        latents = {r.name: self.latent(r).to(x) for r in self.spec.references if r.name in self.read}
        rows = len(x) * (len(every) - len(ours)) + sum(map(len, latents.values()))
        # The host's own measure of what it may run at once.
        if model.memory_required([rows, *x.shape[1:]]) * 1.5 > comfy.model_management.get_free_memory(x.device):
            return {}
        self.features.clear()
        found = (
            comfy.samplers.get_area_and_mult(c, latents[n], timestep)
            for n in latents
            for c in texts[n]
            if _holds(c, sigma)
        )
        return {name: (latents[name], one.conditioning) for name, one in zip(latents, found, strict=True)}

    def latent(self, reference):
        """A reference's latent at this sigma: one picture, or those that this pass draws."""
        found = reference.latent(self.sigma)
        return found if len(found) == 1 else found[list(self.pictures)]

    def texts(self, name):
        """A reference's prepared conditioning, for the pictures that this pass draws."""
        return [_of_pictures(c, self.pictures, self.shape[0]) for c in self.conds[name]]

    def moment(self, reference):
        """What the cache knows this pass' features of a reference by, beside their source."""
        return self.sigma if len(reference.latents[0]) == 1 else (self.sigma, self.pictures)

    def read_references(self, model, x, timestep, model_options):
        """Runs the UNet on each reference's latent at this sigma, one row a picture; keeps what controllers want."""
        if self.features:
            return  # a second pass at one step, such as perturbed attention's, reads the same
        # Caching packs skip passes from these two wrappers; a reference must never be skipped.
        skipping = (WrappersMP.CALC_COND_BATCH, WrappersMP.DIFFUSION_MODEL)
        cached = self.cache is not None and not _others_work(model_options)
        options = dict(model_options["transformer_options"])
        options["wrappers"] = {k: v for k, v in options["wrappers"].items() if k not in skipping}
        # A reference has just the pictures of this pass, with no windows of its own.
        model_options = {**model_options, "transformer_options": options, "context_handler": None}
        for reference in (r for r in self.spec.references if r.name in self.read):
            store = self.features.setdefault(reference.name, {})
            self.passes += 1
            if cached and self.recall(reference, store, x.device):
                continue
            latent = self.latent(reference).to(x)
            patched = _patched(self.layers, model_options, _CapturePatch(self, reference.name, len(latent), store))
            conds = [self.texts(reference.name)]
            with contextlib.suppress(_ReadAll):
                comfy.samplers.calc_cond_batch(model, conds, latent, timestep[: len(latent)], patched)
            if cached and self.sources[reference.name] is not None:
                others = [s for s in self.sources.values() if s is not None]
                moment = self.moment(reference)
                self.full |= not self.cache.keep(self.sources[reference.name], moment, store, others)

    def recall(self, reference, store, device):
        """Puts what the cache has of a reference at this sigma into ``store``; False where it lacks any of it."""
        source, wanted = self.sources[reference.name], self.read[reference.name]
        kept = None if source is None else self.cache.find(source, self.moment(reference), wanted)
        if kept is None:
            return False
        store.update((layer, QKV(*(t.to(device, non_blocking=True) for t in one))) for layer, one in kept.items())
        self.spared += 1
        return True

    def blend(self, x, clean, sigma):
        """The clean prediction with the source in it wherever a blend keeps the edit out."""
        below = [level for level in self.levels if level < sigma * (1 - 1e-4)]
        for one in self.spec.blends:
            if not below or not one.acts(*self.clock(sigma)):
                continue
            maps = self.lookout.seen(one).all
            if one.watch is not None and maps is None:
                if 1 + list(self.spec.lengths).index(one.prompt) not in self.roles:
                    continue  # its prompt only takes over later, so nothing is known of its words yet
                raise ValueError(
                    "Attune Local Blend found no attention map of its words, since another pack changes the picture's "
                    "tokens in that layer; choose another number of tokens there, or connect a mask in place of the "
                    "words."
                )
            weight = one.weight(maps, x.shape[2:])
            (reference,) = (r for r in self.spec.references if r.name == one.reference)
            clean = blend(x, clean, reference.latent(max(below)).to(x), weight.to(x), sigma, max(below))
        return clean


# What a conditioning may carry that cannot be one call's rows with others, and what can.
NOT_IN_ROWS = {"control", "hooks", "gligen", "default", "area"}
IN_ROWS = (CONDRegular, CONDCrossAttn)


def _others_work(model_options):
    """Whether other packs have put anything on the MODEL that works in its calls."""
    options = model_options["transformer_options"]
    return (
        "model_function_wrapper" in model_options
        or any(options.get("patches", {}).values())
        or any(options.get("patches_replace", {}).values())
        # The recorder's wrapper, too, is this pack's.
        or any(not str(key).startswith(KEY) for table in options.get("wrappers", {}).values() for key in table)
    )


def _fingerprint(reference, patcher):
    """All that a reference's features follow from, but for the noise level: its latents and texts, the MODEL's weights
    and what replaces parts of it. None for a reference under a ControlNet, hooks or the like."""
    found = hashlib.sha256()

    def take(value):
        if isinstance(value, dict):
            return all([take(key) and take(one) for key, one in sorted(value.items())])
        if isinstance(value, list | tuple):
            return all([take(one) for one in value])
        if torch.is_tensor(value):
            found.update(repr((value.shape, value.dtype)).encode())
            value = value.detach().cpu().contiguous()
            value = value.as_strided((value.numel(),), (1,))  # a single number may have any stride
            found.update(value.view(torch.uint8).numpy())
            return True
        found.update(repr(value).encode() + b";")
        return value is None or isinstance(value, str | int | float)

    known = take([reference.sigmas, reference.latents, reference.steps, reference.conditioning])
    # The objects themselves, since the number of one that is gone may be another's.
    replaced = patcher.object_patches.items()
    known = known and all(isinstance(value, Hashable) for _, value in replaced)
    return (found.hexdigest(), patcher.patches_uuid, frozenset(replaced)) if known else None


def _holds(cond, sigma):
    """Whether a conditioning with or without a stretch of the schedule takes part at this noise level."""
    return cond.get("timestep_end", 0.0) <= sigma <= cond.get("timestep_start", float("inf"))


def _tag(role, pictures, device):
    """What says, row by row, whose rows a conditioning's are and which picture each draws."""
    return CONDRegular(torch.tensor([[role, picture] for picture in range(pictures)], device=device))


def _refuse_area(cond):
    if cond.get("area") is not None:
        raise ValueError(
            "A conditioning of this sampling is set to an area, which an edit's attention does not line up with; use "
            'Conditioning (Set Mask) with set_cond_area "default" in the place of Conditioning (Set Area).'
        )


def _pixels(channels, height, width):
    """The size of a latent's image as users know it, and the latent's."""
    latent = f"a latent of {width}x{height}" + ("" if channels == 4 else f" and {channels} channels")
    return f"{PIXELS * width}x{PIXELS * height} pixels ({latent})"


def _check_fit(reference, x, first_sigma):
    pictures, channels, height, width = x.shape
    ours, *size = reference.latents.shape[1:]
    if size != [channels, height, width]:
        raise ValueError(
            f"The TRAJECTORY is of {_pixels(*size)}, but the sampler generates {_pixels(channels, height, width)}; "
            "connect the LATENT of the node that made the TRAJECTORY to the sampler."
        )
    if ours not in (1, pictures):
        raise ValueError(
            f"The TRAJECTORY holds {ours} pictures, but the sampler draws {pictures}; it needs one picture or as many, "
            "so change the batch of the sampler's latent or invert as many pictures."
        )
    start = float(reference.sigmas[0])
    if first_sigma > start * 1.02:
        raise ValueError(
            f"The sampler starts at sigma {first_sigma:.4g}, before the TRAJECTORY's first, {start:.4g}; connect the "
            "sigmas of the node that made the TRAJECTORY to SamplerCustom, or use KSampler (Advanced) with the "
            "inversion's steps and scheduler and with add_noise disabled."
        )


# ---- patches -----------------------------------------------------------------------------------------------------


def recording(model, receive):
    """A clone of MODEL that calls ``receive(place, own, heads)`` in every attention layer and changes nothing.

    Steps are not counted: each place says step 0 of 1.
    """
    return _recording(model, lambda: receive)


def _recording(model, receiver):
    """As :func:`recording`; ``receiver()`` says at each evaluation who receives, None for nobody."""
    check_plain(model)
    model = model.clone()
    layers = list(_grids(model.model.diffusion_model, 1, 1))

    def calc_cond_batch(executor, base, conds, x, timestep, model_options):
        receive = receiver()

        def patch(kind, own, options, attend, inner):
            if grid := _lines_up(own, options):
                block, depth = options["block"], options["block_index"]
                number = layers.index((tuple(block), depth))
                receive(Place(kind, tuple(block), depth, grid, 0, 1, number), own, options["n_heads"])
            return attend(*own, options)

        if receive is not None:
            model_options = _patched(layers, model_options, patch)
        return executor(base, conds, x, timestep, model_options)

    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, calc_cond_batch)
    return model


class LevelMaps:
    """Where words look in the level nearest to ``tokens`` of MODEL, for latents of ``size`` (h, w); with a gradient
    where grad mode is on.

    ``model`` is the clone to run, ``grid`` (h, w) the level's.
    """

    def __init__(self, model, tokens, size):
        grids = _grids(model.model.diffusion_model, *size)
        self.grid = nearest(grids.values(), tokens)
        self.model = _recording(model, lambda: self._receive)
        last = [layer for layer, grid in grids.items() if grid == self.grid][-1]
        self._transformer = _transformer(model.model.diffusion_model, last[0])
        self._receive = None

    def read(self, run):
        """The mean map (b, N, T), over heads and the level's layers, of the pass that ``run()`` makes; the pass ends
        behind the last of them. Raises ValueError where a pack's patch leaves nothing to see."""
        found = []

        def receive(place, own, heads):
            # Also called where this pass is computed again for a gradient, which must do the same once more.
            if place.kind == "cross" and place.grid == self.grid:
                found.append(attention_map(own.q, own.k, heads).mean(1))

        def end(*_):
            raise _ReadAll

        self._receive, handle = receive, self._transformer.register_forward_hook(end)
        try:
            with contextlib.suppress(_ReadAll):
                run()
        finally:
            handle.remove()
            self._receive = None
        if not found:
            nearest((), self.grid[0] * self.grid[1])  # says why
        return sum(found) / len(found)


def _transformer(unet, block):
    """The module that holds a block's attention layers."""
    kind, number = block
    blocks = {"input": unet.input_blocks, "middle": [unet.middle_block], "output": unet.output_blocks}[kind]
    return next(m for m in blocks[number] if isinstance(m, SpatialTransformer))


def _grids(unet, height, width):
    """The grid (h, w) of picture tokens of every transformer layer, for latents of this size.

    The keys are (block, depth), with the names that the host's patches use, in the order that the UNet runs them.
    """
    found, sizes = {}, []
    for i, block in enumerate(unet.input_blocks):
        if any(isinstance(m, Downsample) for m in block):
            height, width = (height + 1) // 2, (width + 1) // 2
        sizes.append((height, width))
        found |= _numbered(("input", i), block, sizes[-1])
    if unet.middle_block is not None:
        found |= _numbered(("middle", 0), unet.middle_block, sizes[-1])
    for i, block in enumerate(unet.output_blocks):
        found |= _numbered(("output", i), block, sizes.pop())  # each takes in what an input block put aside
    return found


def _numbered(name, block, grid):
    count = sum(isinstance(m, BasicTransformerBlock) for m in block.modules())
    return {(name, depth): grid for depth in range(count)}


def _patched(layers, model_options, patch):
    """Options in which every attention layer goes through ``patch``, with what other packs put there inside it."""
    options = dict(model_options["transformer_options"])
    table = dict(options.get("patches_replace", {}))
    for kind, name in (("self", "attn1"), ("cross", "attn2")):
        theirs = table.get(name, {})
        table[name] = dict(theirs)
        for block, depth in layers:
            # The host looks for (block, number, depth) first, then for (block, number).
            inner = theirs.get((*block, depth), theirs.get(block))
            table[name][(*block, depth)] = _bind(patch, kind, inner)
    options["patches_replace"] = table
    return {**model_options, "transformer_options": options}


def _bind(patch, kind, inner):
    def attend(q, k, v, options):
        return _kernel(q, k, v, options) if inner is None else inner(q, k, v, options)

    return lambda q, k, v, options: patch(kind, QKV(q, k, v), options, attend, inner)


def _kernel(q, k, v, options):
    """The host's attention, looked up at each call since packs replace it; 0.3.52's refuses one of the keywords."""
    kernel = attention.optimized_attention
    settings = {"attn_precision": options.get("attn_precision")}
    if _takes_options(kernel):
        settings["transformer_options"] = options
    return kernel(q, k, v, options["n_heads"], **settings)


@functools.cache
def _takes_options(kernel):
    known = inspect.signature(kernel).parameters.values()
    return any(p.kind is p.VAR_KEYWORD or p.name == "transformer_options" for p in known)


def _lines_up(own, options):
    """The grid (h, w) of a call's picture tokens, or None when another pack changed them and nothing lines up."""
    grid = tuple(options["activations_shape"][2:4])
    return grid if own.q.shape[1] == grid[0] * grid[1] else None


def _layer(kind, options):
    return kind, *options["block"], options["block_index"]


class _ReadAll(Exception):
    """Ends a reference's pass: everything that is wanted of it has been read."""


@dataclass(frozen=True)
class _CapturePatch:
    run: _Run
    name: str
    pictures: int
    store: dict

    def __call__(self, kind, own, options, attend, inner):
        grid, layer, run = _lines_up(own, options), _layer(kind, options), self.run
        if (count := len(options.get(PICTURES, ()))) != self.pictures:
            raise ValueError(_in_pieces((count, *run.shape[1:]), run.shape) if count else FORGOTTEN)
        if grid is not None and run.reads(run.place(layer, grid), self.name):
            self.store[layer] = own
            # Where another pack shrinks the picture inside the UNet, a later layer may be wanted after all.
            if layer == run.read[self.name][-1] and grid == run.places[layer]:
                raise _ReadAll
        return attend(*own, options)


@dataclass(frozen=True)
class _Task:
    """A controller at a place, and the rows of a call that it edits there."""

    controller: Controller
    place: Place
    rows: list


@dataclass(frozen=True)
class _EditPatch:
    run: _Run

    def __call__(self, kind, own, options, attend, inner):
        grid, rows = _lines_up(own, options), options.get(ROLE)
        # Where nothing lines up, or a pack's tiling kept a reference from being read, attention stays as it is.
        if grid is None or rows is None or sum(map(len, rows.values())) != len(own.q):
            return attend(*own, options)
        place = self.run.place(_layer(kind, options), grid)
        held = {name: read for name, read in self._held(place, own, options) if read is not None}
        numbers = {prompt: role for role, prompt in enumerate(self.run.spec.lengths, 1)}
        roles = {prompt: rows[role] for prompt, role in numbers.items() if role in rows}
        tasks = []
        for controller in self.run.spec.controllers:
            if not controller.edits(place) or not set(controller.reads) <= held.keys():
                continue
            positive = roles.get(controller.prompt, [])
            half = NEGATIVE - numbers[controller.prompt] if controller.is_part else NEGATIVE
            negative = rows.get(half, []) if controller.both_halves else []
            if len(set(controller.reads)) == 1:  # both halves read the same
                positive, negative = positive + negative, []
            pictures = options[PICTURES]
            tasks += [self._task(controller, place, at, at is negative, pictures) for at in (positive, negative) if at]
        if kind == "self":
            return self._self_attention(own, options, attend, inner, tasks, held)
        return self._cross_attention(place, own, options, attend, inner, tasks, roles, held)

    def _task(self, controller, place, rows, negative, pictures):
        pictures = tuple(pictures[row] for row in rows)
        return _Task(controller, replace(place, pictures=pictures, negative=negative), rows)

    def _held(self, place, own, options):
        """What each reference that is read in this step holds at this place, None where it was not read here."""
        for name, (_, texts) in options[RIDERS].items():
            if name not in options[ROLE]:
                continue  # a call that took no riders along
            at = _span(options[ROLE][name])
            length = own.k.shape[1] if place.kind == "self" else texts["c_crossattn"].cond.shape[1]
            yield name, QKV(own.q[at], own.k[at, :length], own.v[at, :length])
        for name, store in self.run.features.items():
            yield name, store.get(place.layer)

    def _new(self, pictures):
        """The pictures, with None for those whose words were seen in an earlier pass at this noise level."""
        return [picture if picture in self.run.unseen else None for picture in pictures]

    def _for_rows(self, held, names, pictures):
        """The references of these names, a row for each of the target's rows, which draw these ``pictures``."""
        at = _span([self.run.pictures.index(picture) for picture in pictures])
        return {
            name: QKV(*(t.expand(len(pictures), -1, -1) if len(t) == 1 else t[at] for t in held[name]))
            for name in names
            if name in held
        }

    def _self_attention(self, own, options, attend, inner, tasks, held):
        read = [self._for_rows(held, task.controller.reads, task.place.pictures) for task in tasks]
        for task, references in zip(tasks, read, strict=True):
            at = _span(task.rows)
            mine = QKV(*(t[at] for t in own))
            edited = task.controller.self_attention(task.place, mine, references)
            own = QKV(*(t if e is m else _with_rows(t, at, e) for t, m, e in zip(own, mine, edited, strict=True)))

        def plain(*qkv):
            return _kernel(*qkv, options)

        out, done = None, []
        for task, references in zip(tasks, read, strict=True):
            at = _span(task.rows)
            mine, seen = QKV(*(t[at] for t in own)), self.run.lookout.seen(task.controller, task.place)
            edited = task.controller.self_output(task.place, mine, references, plain, seen)
            if edited is None:
                continue
            if inner is not None:  # another pack changes this attention: keep what it did
                out = attend(*own, options).clone() if out is None else out
                edited = edited + out[at] - plain(*mine)
            out = torch.empty_like(own.q) if out is None else out
            out[at] = edited
            done += task.rows
        if out is None:
            return attend(*own, options)
        self._fill(out, own, options, attend, done if inner is None else range(len(own.q)))
        return out

    def _cross_attention(self, place, own, options, attend, inner, tasks, roles, held):
        out, heads, done = None, options["n_heads"], []
        mapping = [t for t in tasks if not t.controller.mixes_texts]
        mixing = [t for t in tasks if t.controller.mixes_texts]
        if inner is not None or not mapping and not mixing:
            out = attend(*own, options)
        for prompt, rows in roles.items():
            mine = [t for t in mapping if t.controller.prompt == prompt]
            watching = self.run.lookout.at(place, prompt) if self.run.unseen else []
            if not mine and not watching:
                continue
            at, tokens = _span(rows), self.run.spec.lengths[prompt]
            # Beside a longer prompt the host repeats a shorter one; attention over copies is attention over one.
            q, k, v = own.q[at], own.k[at, :tokens], own.v[at, :tokens]
            unread = inner is None and mine and not mine[0].controller.reads_own_map(place)
            p = plain = None if unread else attention_map(q, k, heads)
            names = {name for t in mine for name in t.controller.reads} | {w.watch.reference for w in watching}
            pictures = [options[PICTURES][row] for row in rows]
            references = self._for_rows(held, names, pictures)
            references = {name: attention_map(read.q, read.k, heads) for name, read in references.items()}
            for task in mine:
                p = task.controller.cross_map(task.place, p, references)
            for watcher in watching:
                if watcher.watch.reference in (None, *references):
                    source = references.get(watcher.watch.reference)
                    self.run.lookout.add(watcher, place, source, p, self._new(pictures), self.run.shape[0])
            if not mine:
                continue
            edited = apply_map(p, v, heads)
            if inner is not None:  # another pack adds to this attention (IP-Adapter): keep what it added
                edited = edited + out[at] - apply_map(plain, v, heads)
            out = torch.empty_like(own.q) if out is None else out
            out[at] = edited
            done += rows
        if mapping:
            self._fill(out, own, options, attend, done if inner is None else range(len(own.q)))
        whole, done = out is not None, []
        for task in mixing:
            at = _span(task.rows)
            references = self._for_rows(held, task.controller.reads, task.place.pictures)
            mine, before = QKV(*(t[at] for t in own)), out[at] if whole else None
            seen = self.run.lookout.seen(task.controller, task.place)
            edited = task.controller.cross_output(
                task.place, before, mine, references, lambda *qkv: _kernel(*qkv, options), seen
            )
            # What another pack gives back may be a tensor that it still needs.
            out = torch.empty_like(own.q) if out is None else out.clone() if inner is not None else out
            out[at] = edited
            done += task.rows
        if not whole:
            self._fill(out, own, options, attend, done)
        return out

    def _fill(self, out, own, options, attend, done):
        """Puts what the attention gives into the rows that are not ``done``."""
        done = set(done)
        if rest := [row for row in range(len(own.q)) if row not in done]:
            at = _span(rest)
            out[at] = attend(*(t[at] for t in own), options)


def _span(rows):
    """Row numbers as a slice where they follow each other, since a slice copies nothing."""
    follow = rows == list(range(rows[0], rows[0] + len(rows)))
    return slice(rows[0], rows[0] + len(rows)) if follow else rows


def _with_rows(tensor, at, rows):
    tensor = tensor.clone()
    tensor[at] = rows
    return tensor
