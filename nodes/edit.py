"""Edits: a MODEL that draws the target while reading the source."""

import functools
import logging
from dataclasses import replace

import torch
from comfy_api.latest import io, ui

from ..attention_patches import host
from ..attention_patches.alignment import align, refine_map, same_count, shifted_words, swap_map
from ..attention_patches.embedding_control import control
from ..attention_patches.local_blend import LocalBlend, changed
from ..attention_patches.prompt_to_prompt import PromptToPrompt
from ..attention_patches.reference import Reference
from ..attention_patches.reweight import Reweight
from ..attention_patches.values import Window
from ..attention_patches.watch import WatchedWords
from ..attention_patches.words import read_factors, read_layers, read_list, read_stretches
from ..inversion import host as runs
from ..inversion.trajectory import ANOTHER_FP8_TEXT, ANOTHER_TEXT, check_same_model, negative_of, text_distance
from ..messages import legible
from . import schema

log = logging.getLogger("attune")
CROSS, SELF = "cross_start to cross_end", "self_start to self_end"
LAYERS = "cross_layers", "self_layers"


# ---- what the edits share ----------------------------------------------------------------------------------------


def share(name, default, tooltip):
    """A place in the sampling, as a share of its steps."""
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.05, round=0.001, tooltip=tooltip)


def source_inputs():
    return [
        io.Model.Input("model", tooltip="The model that the trajectory was made with; other edits may be on it."),
        io.Clip.Input("clip", tooltip="The checkpoint's text encoder; it reads the prompts."),
        schema.Trajectory.Input("trajectory", tooltip="The source picture, from an Attune inversion."),
    ]


def prompt_inputs(source, target, tooltip):
    return [
        io.String.Input(
            "source_prompt",
            multiline=True,
            default=source,
            tooltip="The picture's caption as it is. It should name what you want to change.",
        ),
        io.String.Input("target_prompt", multiline=True, default=target, tooltip=tooltip),
    ]


def window_inputs():
    return [
        share(
            "cross_start",
            0.0,
            "Share of the trajectory's steps after which words look where the source's words looked. Start and "
            "end equal switch this part off.",
        ),
        share(
            "cross_end",
            0.8,
            "Share of the steps until which they do. Higher keeps the old layout more strictly; lower lets the "
            "new words change the shape of things.",
        ),
        share("self_start", 0.0, "Share of the steps after which the picture is put together as the source is."),
        share(
            "self_end",
            0.4,
            "Share of the steps until which it is. Higher keeps outlines and background; lower gives the edit "
            "room. Lower this first when an edit does not show.",
        ),
        io.Int.Input(
            "token_limit",
            default=1024,
            min=0,
            max=1 << 20,
            tooltip=(
                "The structure is kept only in layers with at most this many picture tokens: 256 is 16x16, "
                "1024 is 32x32 (the papers' code uses either). Lower leaves finer detail to the edit."
            ),
        ),
    ]


def word_inputs():
    return [
        io.String.Input(
            "word_windows",
            default="",
            tooltip=(
                'A stretch of the steps of its own for single words of the target, such as "star: 0.4" (until 0.4) or '
                '"red: 0.1-0.6", with commas between. A shorter stretch lets just this word change its shape.'
            ),
        ),
        io.String.Input(
            "preserve",
            default="",
            tooltip=(
                "Keeps only these words of the target where they are, with commas between, and leaves the rest of the "
                "picture to the prompt. Lower self_end, too, to give the rest room. Empty keeps all words."
            ),
        ),
    ]


def layer_inputs():
    return [
        io.String.Input(
            "cross_layers",
            default="",
            optional=True,
            tooltip=(
                "The cross-attention layers in which words look where the source's words looked, counted from 1, such "
                'as "4-14" or "1-6, 8"; Stable Diffusion 1.x has 16. Fewer keep less of the layout. Empty is all, as '
                "in the paper."
            ),
        ),
        io.String.Input(
            "self_layers",
            default="",
            optional=True,
            tooltip=(
                "The self-attention layers in which the picture is put together as the source is, in place of "
                'token_limit. At 512 pixels "3-13" is what a token_limit of 1024 takes. Empty goes by token_limit.'
            ),
        ),
    ]


def edit_outputs():
    return [
        # An output may not share its id with an input.
        io.Model.Output(
            "edited", display_name="model", tooltip="Draws the edit. The model that came in is not changed."
        ),
        io.Conditioning.Output(
            "positive", display_name="positive", tooltip="The target prompt: connect it to the sampler's positive."
        ),
    ]


def warn(node_id, text):
    """Tells the user of what can be meant but rarely is."""
    log.warning(legible(text))
    runs.say(node_id, text)


def check_painted(painted, name, node, where):
    """Raises ValueError unless the mask ``name`` of a node is ``painted`` white somewhere, as Load Image's is not where
    its picture has no alpha; ``where`` says what is to be painted."""
    if not painted:
        raise ValueError(
            f"The {name} of {node} is black, so it marks no place; paint white {where} (right-click Load Image > "
            "Open in MaskEditor)."
        )


def check_model(model, trajectory, node_id):
    """Raises ValueError for a MODEL that is not the trajectory's, and tells the user where it is only nearly that."""
    if nearly := check_same_model(trajectory, runs.describe_model(model)):
        warn(node_id, nearly)


def warn_of_another_clip(clip, trajectory, node_id, read=()):
    """Tells the user where the CLIP reads the trajectory's own caption unlike the one that it was made with, as under
    CLIP skip. ``read`` is a CONDITIONING that the CLIP gave already, for where it is that caption's."""
    caption, method = (trajectory.header.get(key) for key in ("prompt", "method"))
    # A finished turn, and what has learned words, are made under more than their caption says.
    if caption is None or method == "turn" or trajectory.learned is not None:
        return
    if not read or read[0][1].get(host.PROMPT) != caption:
        read = host.encode(clip, caption, trajectory.conditioning)
    apart = text_distance(trajectory, read)
    # Of the inversion only the MODEL's precision is known, and where that is fp8 its CLIP's may be, too.
    fp8 = host.is_in_fp8(clip) or "float8" in trajectory.header.get("dtype", "float8")
    if apart > (ANOTHER_FP8_TEXT if fp8 else ANOTHER_TEXT):
        warn(
            node_id,
            f"The CLIP is not the one that the TRAJECTORY was made with: its text of the same caption is {apart:.0%} "
            "off, as under another CLIP skip (CLIP Set Last Layer), LoRA or checkpoint; connect the same CLIP to this "
            "node and to the CLIP Text Encode of the inversion.",
        )


def warn_of_another_caption(trajectory, prompt, node_id):
    """Tells the user where a trajectory was inverted with another caption than the edit's source prompt."""
    made_under = trajectory.header.get("prompt")
    if made_under and made_under.strip() != prompt.strip():
        warn(node_id, f'The TRAJECTORY was inverted with "{made_under}", but the source prompt is "{prompt}".')


def warn_of_no_layer(model, trajectory, token_limit, node_id):
    """Tells the user where no layer is as coarse as a token limit that is not 0, as in SDXL none has 16x16."""
    fewest = host.fewest_tokens(model, trajectory.latents.shape[-2:])
    if 0 < token_limit < fewest:
        warn(
            node_id,
            f"No layer has {token_limit} picture tokens or fewer, so nothing of the source's structure is kept: at "
            f"this size the MODEL's coarsest layers have {fewest}; raise token_limit to that.",
        )


def warn_of_early_layer(model, layer, name, node_id):
    """Tells the user where the source is read on the UNet's way down, from which little but the source comes."""
    parts = host.parts_of_layers(model)
    if parts[layer] == "input":
        warn(
            node_id,
            f"Layer {layer} lies on the UNet's way down, and a source that is read from there leaves the prompt little "
            f"to say; the papers read it on the way up, which begins at layer {parts.index('output')} of this MODEL, "
            f"so raise {name}.",
        )


def warn_of_shifted_words(source, target, node_id):
    """Tells the user where words of both prompts stand at other places, so that a swap mixes them up."""
    if shifted := shifted_words(source, target):
        told = ", ".join(f'"{theirs.text}" where "{ours.text}" was' for theirs, ours in shifted[:5])
        warn(
            node_id,
            f"Words of the source prompt stand at other places in the target prompt, so the swap puts {told}"
            f"{', ...' if len(shifted) > 5 else ''}; write each word at the place of the one that it replaces, or take "
            "Attune Prompt Refine, in which words that stay keep their place in the image.",
        )


def source_of(model, clip, trajectory, prompt, node_id):
    """The trajectory as the reference that edits read, under its prompt."""
    host.check_unet(model)
    check_model(model, trajectory, node_id)
    warn_of_another_caption(trajectory, prompt, node_id)
    conditioning, tell = text_of(clip, trajectory, prompt), functools.partial(warn, node_id)
    warn_of_another_clip(clip, trajectory, node_id, conditioning)
    return Reference("source", trajectory.sigmas, trajectory.latents, conditioning, trajectory.steps, tell)


def kept_vectors(clip, trajectory, prompt):
    """What the trajectory has learned for words that the prompt holds too: text encoder's name -> position in this
    prompt -> (S, B, width); {} where there is nothing."""
    learned = trajectory.learned
    if learned is None:
        return {}
    ours, theirs = host.read_words(clip, learned.prompt), host.read_words(clip, prompt)
    found, words = align(ours, theirs).tolist(), {word.positions for word in ours.words}
    # Other words may share a token, such as the end of "squirrelfish" and "fish".
    same = [p for word in theirs.words if tuple(found[p] for p in word.positions) in words for p in word.positions]
    kept = {
        name: {at: own[found[at]] for at in same if found[at] in own} for name, own in learned.by_position().items()
    }
    return kept if any(kept.values()) else {}


def text_of(clip, trajectory, prompt):
    """A prompt's CONDITIONING in which the words that the trajectory has learned keep what was learned."""
    vectors, like = kept_vectors(clip, trajectory, prompt), trajectory.conditioning
    if vectors:
        return host.encode_steps(clip, prompt, vectors, trajectory.windows, like)
    return host.encode(clip, prompt, like)


def own_windows(text, read, prompt, node):
    """Pairs of token positions and their window, of what the user wrote into word_windows about the words of the prompt
    that was ``read``."""
    change = f"word_windows or {prompt} on {node}"
    stretches = read_stretches(text, f"word_windows on {node}")
    return tuple((read.positions([word], change), Window(*w, f'"{word}"')) for word, w in stretches)


def edit_words(cls, model, clip, trajectory, prompts, mapping, windows, token_limit, word_windows, preserve, *layers):
    """A MODEL with the words of ``prompts`` (source, target) exchanged by ``mapping``'s map, and the positive."""
    node_id, node = schema.node_id(cls), schema.title(cls)
    reference = source_of(model, clip, trajectory, prompts[0], node_id)
    source, target = (host.read_words(clip, prompt) for prompt in prompts)
    host.check_length(source, reference.conditioning)
    mapper = mapping(source, target)
    injected = mapper.any(0)
    own = own_windows(word_windows, target, "the target prompt", node)
    if kept := read_list(preserve):
        positions = list(target.positions(kept, f"preserve or the target prompt on {node}"))
        if not injected[positions].all():
            raise ValueError(
                f'Of the words to preserve, "{", ".join(kept)}", not all are in the source prompt "{prompts[0]}"; '
                f"name only words that both prompts hold in preserve on {node}."
            )
        only = torch.zeros_like(injected)
        only[positions] = True
        injected = injected & only
    cross_layers, self_layers = (
        read_layers(text, f"{name} on {node}") for name, text in zip(LAYERS, layers, strict=True)
    )
    host.check_layers(model, cross_layers, LAYERS[0], node, first=1)
    host.check_layers(model, self_layers, LAYERS[1], node, first=1)
    if windows[2] < windows[3] and self_layers is None:
        warn_of_no_layer(model, trajectory, token_limit, node_id)
    controller = PromptToPrompt(
        prompt=prompts[1],
        tokens=target.length,
        mapper=mapper,
        injected=injected,
        cross=Window(*windows[:2], CROSS),
        self_=Window(*windows[2:], SELF),
        word_windows=own,
        token_limit=token_limit,
        cross_layers=cross_layers,
        self_layers=self_layers,
    )
    return io.NodeOutput(host.install(model, [reference], [controller]), text_of(clip, trajectory, prompts[1]))


# ---- nodes -------------------------------------------------------------------------------------------------------


class AttunePromptSwap(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttunePromptSwap",
            display_name="Attune Prompt Swap",
            category="Attune/edit",
            description=(
                "Exchanges words of a picture's caption, one for one, and keeps the picture's layout: the new word is "
                "drawn where the old one was (Prompt-to-Prompt, word swap)."
            ),
            inputs=[
                *source_inputs(),
                *prompt_inputs(
                    "a red circle on a gray background",
                    "a blue circle on a gray background",
                    "The same caption with words exchanged, as many words as before.",
                ),
                *window_inputs(),
                *word_inputs(),
                *layer_inputs(),
            ],
            outputs=edit_outputs(),
            hidden=[io.Hidden.unique_id],
        )
        schema.folded(node, "word_windows", "preserve", *LAYERS)
        return schema.searchable(node, "prompt-to-prompt", "p2p", "word swap", "replace word", "attention replace")

    @classmethod
    def execute(
        cls, model, clip, trajectory, source_prompt, target_prompt,
        cross_start, cross_end, self_start, self_end, token_limit, word_windows="", preserve="", cross_layers="",
        self_layers="",
    ):  # fmt: skip
        windows = cross_start, cross_end, self_start, self_end
        prompts = source_prompt, target_prompt

        def mapping(source, target):
            source, target = same_count(source, target)
            warn_of_shifted_words(source, target, schema.node_id(cls))
            return swap_map(source, target)

        return edit_words(
            cls, model, clip, trajectory, prompts, mapping, windows, token_limit, word_windows, preserve, cross_layers,
            self_layers,
        )  # fmt: skip


class AttunePromptRefine(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttunePromptRefine",
            display_name="Attune Prompt Refine",
            category="Attune/edit",
            description=(
                "Adds words to a picture's caption, or takes some away, and keeps what the other words drew where it "
                "is (Prompt-to-Prompt, prompt refinement)."
            ),
            inputs=[
                *source_inputs(),
                *prompt_inputs(
                    "a red circle on a gray background",
                    "a striped red circle on a gray background",
                    "The caption with words added or taken away. Words that stay keep their place in the picture; new "
                    "words find their own.",
                ),
                *window_inputs(),
                *word_inputs(),
                *layer_inputs(),
            ],
            outputs=edit_outputs(),
            hidden=[io.Hidden.unique_id],
        )
        schema.folded(node, "word_windows", "preserve", *LAYERS)
        return schema.searchable(
            node, "prompt-to-prompt", "p2p", "prompt refinement", "add word", "attention refine", "style"
        )

    @classmethod
    def execute(
        cls, model, clip, trajectory, source_prompt, target_prompt,
        cross_start, cross_end, self_start, self_end, token_limit, word_windows="", preserve="", cross_layers="",
        self_layers="",
    ):  # fmt: skip
        windows = cross_start, cross_end, self_start, self_end
        prompts = source_prompt, target_prompt
        return edit_words(
            cls, model, clip, trajectory, prompts, refine_map, windows, token_limit, word_windows, preserve,
            cross_layers, self_layers,
        )  # fmt: skip


class AttunePromptReweight(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttunePromptReweight",
            display_name="Attune Prompt Reweight",
            category="Attune/edit",
            description=(
                "Makes words of the prompt count for more or for less in the picture (Prompt-to-Prompt, attention "
                "re-weighting). It works on a picture's own caption, or behind Attune Prompt Swap or Refine on their "
                "target prompt."
            ),
            inputs=[
                *source_inputs(),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="a striped red circle on a gray background",
                    tooltip=(
                        "What the sampler draws: the picture's own caption, or the target prompt of the Attune edit "
                        "before this node."
                    ),
                ),
                io.String.Input(
                    "weights",
                    multiline=True,
                    default="striped: 2",
                    tooltip=(
                        "Words and their factors, with commas or line ends between. Above 1 the word shows more, below "
                        "1 less, 0 takes it out, below 0 it shows its opposite. The paper goes from -2 to 2."
                    ),
                ),
                *window_inputs(),
                io.String.Input(
                    "word_windows",
                    default="",
                    optional=True,
                    tooltip=(
                        'A stretch of the steps of its own for the factor of single words, such as "star: 0.4" or '
                        '"red: 0.1-0.6". Behind a swap with word_windows give the same here for what the authors\' '
                        "code does, which bounds both."
                    ),
                ),
            ],
            outputs=edit_outputs(),
            hidden=[io.Hidden.unique_id],
        )
        schema.folded(node, "word_windows")
        return schema.searchable(
            node, "prompt-to-prompt", "p2p", "attention weight", "equalizer", "emphasis", "fader", "attention reweight"
        )

    @classmethod
    def execute(
        cls, model, clip, trajectory, prompt, weights, cross_start, cross_end, self_start, self_end, token_limit,
        word_windows="",
    ):  # fmt: skip
        cross = Window(cross_start, cross_end, CROSS)
        read = host.read_words(clip, prompt)
        factors = torch.ones(read.length)
        node = schema.title(cls)
        for word, factor in read_factors(weights, f"weights on {node}"):
            factors[list(read.positions([word], f"weights or the prompt on {node}"))] = factor
        own = own_windows(word_windows, read, "the prompt", node)
        controllers = [Reweight(prompt=prompt, tokens=read.length, factors=factors, cross=cross, word_windows=own)]
        text, node_id = text_of(clip, trajectory, prompt), schema.node_id(cls)
        host.check_length(read, text)
        if carried := host.source_of_words(model, prompt):
            check_model(model, trajectory, node_id)
            warn_of_another_clip(clip, trajectory, node_id, text)
            source = replace(carried, sigmas=trajectory.sigmas, latents=trajectory.latents)
        else:
            source = source_of(model, clip, trajectory, prompt, node_id)
            if self_start < self_end:
                warn_of_no_layer(model, trajectory, token_limit, node_id)
            same = refine_map(read, read)
            layout = PromptToPrompt(
                prompt=prompt,
                tokens=read.length,
                mapper=same,
                injected=same.any(0),
                cross=cross,
                self_=Window(self_start, self_end, SELF),
                token_limit=token_limit,
            )
            controllers.insert(0, layout)
        return io.NodeOutput(host.install(model, [source], controllers), text)


class AttuneLocalBlend(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneLocalBlend",
            display_name="Attune Local Blend",
            category="Attune/edit",
            description=(
                "Lets an edit show only where its words look, or inside a mask, and keeps everything else the source "
                "picture exactly (Prompt-to-Prompt, local blending). Put it before or behind any Attune edit, or on a "
                "plain model."
            ),
            inputs=[
                *source_inputs(),
                *prompt_inputs(
                    "a red circle on a gray background",
                    "a blue circle on a gray background",
                    "What the sampler draws; the same as in the Attune edit.",
                ),
                io.String.Input(
                    "inside",
                    default="circle",
                    tooltip=(
                        "Words whose place in the picture may change, with commas between; each is looked for in both "
                        "prompts. Name the thing, not only its colour."
                    ),
                ),
                io.String.Input(
                    "outside",
                    default="",
                    tooltip=(
                        "Words whose place must not change, with commas between; they win over the words inside. To "
                        "change a background, leave inside empty and name the things that stand before it here."
                    ),
                ),
                io.Float.Input(
                    "threshold",
                    default=0.3,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip=(
                        "How strongly a place must belong to the words, as a share of the strongest. Higher makes the "
                        "changed region smaller; raise it when too much changes."
                    ),
                ),
                share(
                    "start",
                    0.2,
                    "Share of the steps after which the source is put back. Lower keeps the rest more strictly but "
                    "knows the words' place less well; 1 switches the blend off.",
                ),
                io.Int.Input(
                    "tokens",
                    default=256,
                    min=1,
                    max=1 << 20,
                    tooltip=(
                        "Which level of the model says where words look: the one whose picture tokens come nearest. "
                        "256 is 16x16, as in the paper; for larger pictures 1024 draws a finer outline."
                    ),
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "White where the picture may change. Leave the words empty to use it alone; with words, only "
                        "what both allow changes."
                    ),
                ),
                *(
                    io.String.Input(
                        f"source_{name}",
                        default="",
                        optional=True,
                        tooltip=(
                            f"Words of the source prompt alone, with commas between; {name} then names words of the "
                            "target prompt alone, as the authors' code pairs them. For prompts that both hold a word "
                            "which only one of them means. Empty looks for the words in both."
                        ),
                    )
                    for name in ("inside", "outside")
                ),
                io.Float.Input(
                    "outside_threshold",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    optional=True,
                    tooltip=(
                        "A threshold of its own for the words outside. Higher protects less around them; 0 takes "
                        "threshold for both."
                    ),
                ),
            ],
            outputs=edit_outputs(),
            hidden=[io.Hidden.unique_id],
        )
        schema.folded(node, "tokens", "source_inside", "source_outside", "outside_threshold")
        return schema.searchable(node, "prompt-to-prompt", "p2p", "local edit", "keep background", "blend words")

    @classmethod
    def execute(
        cls, model, clip, trajectory, source_prompt, target_prompt, inside, outside, threshold, start, tokens,
        mask=None, source_inside="", source_outside="", outside_threshold=0.0,
    ):  # fmt: skip
        reference = source_of(model, clip, trajectory, source_prompt, schema.node_id(cls))
        source, target = host.read_words(clip, source_prompt), host.read_words(clip, target_prompt)
        words = [
            _where(read_list(text), read_list(theirs), source, target, name, "Attune Local Blend")
            for name, text, theirs in (("inside", inside, source_inside), ("outside", outside, source_outside))
        ]
        named = any(at for pair in words for at in pair)
        if not named and mask is None:
            raise ValueError(
                "Neither words nor a mask say where the picture may change; fill in inside on Attune Local Blend, or "
                "connect a mask to it."
            )
        if mask is not None:
            check_painted(mask.any(), "mask", "Attune Local Blend", "where the picture may change")
        if named:
            host.check_length(source, reference.conditioning)
        one = LocalBlend(
            prompt=target_prompt,
            tokens=target.length,
            words=WatchedWords(*words[0], *words[1]) if named else None,
            mask=mask,
            threshold=threshold,
            start=start,
            level=tokens,
            outside_threshold=outside_threshold or None,
        )
        return io.NodeOutput(host.install(model, [reference], blends=[one]), text_of(clip, trajectory, target_prompt))


def _where(words, of_source, source, target, name, node):
    """The positions of words in the source and in the target prompt: of ``words`` in both, each of which has to be in
    one of them; or, where there are words ``of_source``, of those in the source and of ``words`` in the target."""
    if of_source:
        read = ((of_source, source, f"source_{name} or the source"), (words, target, f"{name} or the target"))
        return tuple(tokens.positions(some, f"{told} prompt on {node}") for some, tokens, told in read)
    change = f"{name} or the prompts on {node}"
    for word in words:
        if not source.holds(word):
            target.positions([word], change)  # says what is missing
    return tuple(tokens.positions([w for w in words if tokens.holds(w)]) for tokens in (source, target))


class AttuneBlendMask(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneBlendMask",
            display_name="Attune Blend Mask",
            category="Attune/edit",
            description=(
                "Shows the mask that Attune Local Blend used: where the edited latent is not the source's any more. "
                "The blend makes the two equal everywhere else, so the mask can be read off the result."
            ),
            inputs=[
                schema.Trajectory.Input("trajectory", tooltip="The source picture that the edit was made from."),
                io.Latent.Input("latent", tooltip="The edit, as it comes out of the sampler."),
            ],
            outputs=[
                io.Mask.Output(
                    "mask", display_name="mask", tooltip="White where the picture was allowed to change, in its size."
                )
            ],
        )
        return schema.searchable(node, "local blend mask", "difference mask", "what changed")

    @classmethod
    def execute(cls, trajectory, latent):
        source, edited = runs.host_latent(trajectory, -1), latent["samples"]
        if not len(edited) or source.shape[1:] != edited.shape[1:] or len(source) not in (1, len(edited)):
            raise ValueError(
                f"The LATENT has shape {tuple(edited.shape)}, but the TRAJECTORY holds {tuple(source.shape)}; connect "
                "the sampler that drew this TRAJECTORY's edit to Attune Blend Mask."
            )
        mask = runs.to_pixels(changed(edited.float().cpu(), source))
        return io.NodeOutput(mask, ui=ui.PreviewMask(mask))


class AttuneEmbeddingControl(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneEmbeddingControl",
            display_name="Attune Embedding Control",
            category="Attune/edit",
            description=(
                "The target prompt's text at the words that changed, and the source's everywhere else (EmbCtrl). Draw "
                "it with the plain model from the trajectory's noise: a change of colour, material or background with "
                "no attention control at all, or together with it."
            ),
            inputs=[
                *source_inputs()[1:],
                *prompt_inputs(
                    "a red circle on a gray background",
                    "a blue circle on a gray background",
                    "The caption with words exchanged, added or taken away. Exchanged words work best.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "positive", display_name="positive", tooltip="The mixed text: connect it to the sampler's positive."
                ),
                io.Conditioning.Output(
                    "negative",
                    display_name="negative",
                    tooltip="The trajectory's null embeddings, one a step, or its negative, or the empty text.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )
        return schema.searchable(node, "embctrl", "masafusion", "embedding swap", "token embedding", "mixed prompt")

    @classmethod
    def execute(cls, clip, trajectory, source_prompt, target_prompt):
        node_id = schema.node_id(cls)
        warn_of_another_caption(trajectory, source_prompt, node_id)
        texts = [host.read_words(clip, prompt) for prompt in (source_prompt, target_prompt)]
        alignment = align(*texts)
        like = trajectory.conditioning
        sources, targets = (host.encode(clip, prompt, like) for prompt in (source_prompt, target_prompt))
        warn_of_another_clip(clip, trajectory, node_id, sources)
        host.check_length(texts[0], sources)
        # A hook that is scheduled on the CLIP gives one text for each of its stretches, the same ones for every prompt.
        mixed = [
            # The tag says which prompt's rows these are; all else describes the source.
            [control(source, target, alignment), {**extras, host.PROMPT: tagged[host.PROMPT]}]
            for (source, extras), (target, tagged) in zip(sources, targets, strict=True)
        ]
        new = [w.text for w in texts[1].words if (alignment[list(w.positions)] < 0).any()]
        runs.say(node_id, f"From the target prompt: {', '.join(new) or 'nothing'}. Everything else is the source's.")
        return io.NodeOutput(mixed, negative_of(trajectory) or host.encode(clip, "", like))


NODES = [
    AttunePromptSwap,
    AttunePromptRefine,
    AttunePromptReweight,
    AttuneLocalBlend,
    AttuneBlendMask,
    AttuneEmbeddingControl,
]
