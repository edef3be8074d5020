"""Words that are learned anew for one picture, so that they look at their objects: Dynamic Prompt Learning."""

import re
from dataclasses import asdict, replace

import torch
from comfy_api.latest import io

from ..attention_patches import background as find_background
from ..attention_patches import host, maps, masks, self_maps
from ..inversion import dynamic_prompt, unfinished
from ..inversion import host as runs
from ..inversion.ddim import as_asked
from ..inversion.dynamic_prompt import DynamicPrompt
from ..inversion.null_text import NullText
from ..inversion.trajectory import LearnedWords, negative_of, one_text
from . import schema, sheet
from .edit import check_model, warn_of_another_clip
from .view import as_drawn, look

AS_DRAWN, AS_INVERTED = "at each latent's own level", "while inverting (papers' code)"
STATISTICS = {AS_DRAWN: as_drawn, AS_INVERTED: as_asked}
EACH, SHARED = "one for each step (paper)", "one for all steps"
NOUNS = 'The picture\'s caption with each noun that matters in braces, such as "a {cat} and a {dog}".'
EXAMPLE = "a red {circle} and a blue {square} on a gray background"


class AttuneBackgroundMask(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneBackgroundMask",
            display_name="Attune Background Mask",
            category="Attune/tokens",
            description=(
                "Finds the background of a picture with nothing but its caption: cuts it into parts by self-attention "
                "and takes as background the parts that none of the nouns looks at (Dynamic Prompt Learning)."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that the trajectory was made with."),
                io.Clip.Input("clip", tooltip="The checkpoint's text encoder."),
                schema.Trajectory.Input("trajectory", tooltip="The picture, from an Attune inversion or recorder."),
                io.String.Input("source_prompt", multiline=True, default=EXAMPLE, tooltip=NOUNS),
                io.Float.Input(
                    "threshold",
                    default=0.2,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip=(
                        "How much a noun must agree with a part to own it. Higher makes more of the picture background."
                    ),
                ),
                io.Int.Input(
                    "clusters",
                    default=5,
                    min=2,
                    max=16,
                    tooltip="Into how many parts to cut the picture. More tells smaller things apart.",
                ),
                io.Int.Input(
                    "self_tokens",
                    default=1024,
                    min=1,
                    max=self_maps.LIMIT,
                    tooltip=(
                        "Which level cuts the picture into parts: the one whose picture tokens come nearest to this. "
                        "1024 is 32x32, as in the paper."
                    ),
                ),
                io.Int.Input(
                    "cross_tokens",
                    default=256,
                    min=1,
                    max=1 << 20,
                    tooltip="Which level says where nouns look. 256 is 16x16, as in the paper.",
                ),
                io.Int.Input(
                    "every",
                    default=1,
                    min=1,
                    max=1000,
                    tooltip=(
                        "Looks at every n-th step only. Higher is faster and finds the mask a little less well: of 48 "
                        "demo scenes the worst matched its true background by 0.90 with every step, by 0.78 with "
                        "every fifth."
                    ),
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**53 - 1,
                    control_after_generate=False,
                    tooltip="Where the clustering starts; the best of ten starts is kept, so this changes little.",
                ),
                io.Combo.Input(
                    "statistics",
                    options=list(STATISTICS),
                    default=AS_DRAWN,
                    optional=True,
                    tooltip=(
                        "Where attention is read. The papers' code adds it up while it inverts, which asks each "
                        "latent with the next noise level's timestep, at every step (every 1); the other reads each "
                        "latent at its own level."
                    ),
                ),
            ],
            outputs=[
                io.Mask.Output("background", display_name="background", tooltip="White where no noun looks."),
                io.Mask.Output(
                    "objects",
                    display_name="objects",
                    tooltip="One mask a noun, in the order of the prompt; picture after picture.",
                ),
                io.Image.Output(
                    "parts", display_name="parts", tooltip="The parts, whose they are and why, and the masks."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )
        schema.folded(node, "self_tokens", "cross_tokens", "seed", "statistics")
        return schema.searchable(node, "dpl", "segmentation", "k-means", "self-attention", "foreground", "object mask")

    @classmethod
    def execute(
        cls, model, clip, trajectory, source_prompt, threshold, clusters, self_tokens, cross_tokens, every, seed,
        statistics=AS_DRAWN,
    ):  # fmt: skip
        host.check_plain(model)
        check_model(model, trajectory, schema.node_id(cls))
        prompt, nouns = host.read_nouns(clip, source_prompt, "source_prompt of Attune Background Mask")
        names, positions = zip(*nouns, strict=True)
        parts, words = self_maps.SelfSum(trajectory.latents.shape[1]), maps.MapSum(positions)

        def receive(place, own, heads):
            (parts if place.kind == "self" else words).add(place, own, heads)

        def before(step, evaluate):
            if parts.grid is None:
                evaluate()  # shows which levels there are, so that only one of them has to be kept
                parts.choose(self_tokens)

        text = host.encode(clip, prompt, trajectory.conditioning)
        host.check_length(host.read_words(clip, prompt), text)
        warn_of_another_clip(clip, trajectory, schema.node_id(cls), text)
        look(model, text, trajectory, every, receive, before, STATISTICS[statistics])
        size = [runs.PIXELS * side for side in trajectory.latents.shape[-2:]]
        outside, objects, sheets, said = [], [], [], []
        seen = words.level(cross_tokens).transpose(0, 1)
        for matrix, maps_ in zip(runs.each(parts.average()), seen, strict=True):
            labels = self_maps.clusters(matrix, clusters, seed)
            scores = find_background.agreement(maps_, labels, parts.grid, clusters)
            owners, unusual = find_background.owners(scores, threshold)
            found = find_background.masks(labels, owners, len(nouns), parts.grid, size)
            outside.append(found[:1])
            objects.append(found[1:])
            sheets.append(sheet.background_sheet(labels, owners, scores, names, parts.grid, found))
            said.append(unusual)
        if unusual := " ".join(dict.fromkeys(filter(None, said))):
            runs.say(schema.node_id(cls), unusual)
        return io.NodeOutput(torch.cat(outside), torch.cat(objects), torch.cat(sheets))


def _loss_inputs(name, what, weight, beta, alpha):
    """A loss's weight, and its threshold's start and length."""
    return [
        io.Float.Input(
            f"{name}_weight",
            default=weight,
            min=0.0,
            max=100.0,
            step=0.05,
            round=0.0001,
            tooltip=f"How much it counts that {what}. 0 leaves this loss out.",
        ),
        io.Float.Input(
            f"{name}_threshold",
            default=beta,
            min=0.0,
            max=10.0,
            step=0.05,
            round=0.0001,
            tooltip=(
                "Learning stops at a step where every loss is below its threshold; this is it at the first step. Lower "
                "learns more and takes longer; too low overfits."
            ),
        ),
        io.Float.Input(
            f"{name}_length",
            default=alpha,
            min=0.1,
            max=10000.0,
            step=1.0,
            round=0.01,
            tooltip=(
                "Over how many of 50 steps the threshold falls to 37 %. Lower tightens it sooner. With another number "
                "of steps it falls over the same share of them."
            ),
        ),
    ]


class AttuneDynamicPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneDynamicPrompt",
            display_name="Attune Dynamic Prompt",
            category="Attune/tokens",
            description=(
                "Learns, for every step, vectors for the nouns of the caption that make each look at its own object "
                "and at nothing else, and null embeddings with which the picture comes back (Dynamic Prompt Learning). "
                "Edits behind it change the object and spare what resembles it. Cancel loses nothing: the next run "
                "with the same settings goes on where it stopped."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that the trajectory was made with."),
                io.Clip.Input("clip", tooltip="The checkpoint's text encoder."),
                schema.Trajectory.Input("trajectory", tooltip="The picture's way, from Attune DDIM Inversion."),
                io.String.Input("source_prompt", multiline=True, default=EXAMPLE, tooltip=NOUNS),
                io.Float.Input(
                    "guidance",
                    default=7.5,
                    min=0.0,
                    max=30.0,
                    step=0.5,
                    round=0.01,
                    tooltip=(
                        "The guidance (cfg) that you will draw with. The null embeddings fit this one only; at 1 there "
                        "are none to learn."
                    ),
                ),
                io.Mask.Input(
                    "background",
                    optional=True,
                    tooltip=(
                        "White where no noun may look, from Attune Background Mask or painted. Without it the nouns "
                        "are only kept apart from each other; a single noun needs it."
                    ),
                ),
                io.Mask.Input(
                    "noun_masks",
                    optional=True,
                    tooltip=(
                        "One mask a noun, in the order of the prompt: each noun may then look nowhere but there. Tells "
                        "two nouns that are the same word apart; raise background_weight to 1 or more for it. A black "
                        "one leaves its noun to the background."
                    ),
                ),
                *_loss_inputs("balance", "every noun fills a place of its own", 1.0, 0.3, 25.0),
                *_loss_inputs("disjoint", "no two nouns look at the same place", 0.05, 0.9, 25.0),
                *_loss_inputs("background", "no noun looks at the background", 0.05, 0.7, 50.0),
                io.Int.Input(
                    "inner_steps",
                    default=21,
                    min=1,
                    max=500,
                    tooltip=(
                        "Most looks at the words' maps at each step, with an update after each; 21 is the papers'. "
                        "With 5, words found their places as well in the demo world, at less than half the time."
                    ),
                ),
                io.Float.Input(
                    "learning_rate",
                    default=1e-3,
                    min=1e-5,
                    max=10.0,
                    step=1e-3,
                    round=1e-5,
                    tooltip=(
                        "Size of the words' updates. Too high, and words lose their meaning and edits fail. The "
                        "papers' value suits CLIP's vectors; the demo checkpoint's are larger and want 0.01."
                    ),
                ),
                io.Combo.Input(
                    "optimizer",
                    options=list(dynamic_prompt.OPTIMIZERS),
                    default=dynamic_prompt.ADAMW,
                    tooltip=(
                        "What makes an update of a gradient. The paper prints gradient descent, which needs a far "
                        "higher learning rate; its code uses AdamW."
                    ),
                ),
                io.Int.Input(
                    "tokens",
                    default=256,
                    min=1,
                    max=1 << 20,
                    tooltip="In which level the words' maps are looked at. 256 is 16x16, as in the paper.",
                ),
                io.Int.Input(
                    "null_steps",
                    default=10,
                    min=1,
                    max=500,
                    tooltip=(
                        "Most updates of the null embedding at each step; 10 is null-text inversion's, 51 without an "
                        "early stop Dynamic Prompt Learning's code."
                    ),
                ),
                io.Float.Input(
                    "null_learning_rate",
                    default=0.01,
                    min=0.0001,
                    max=1.0,
                    step=0.001,
                    round=0.0001,
                    tooltip="Size of the null embedding's updates; it falls to half over the run.",
                ),
                io.Float.Input(
                    "null_early_stop",
                    default=1e-5,
                    min=0.0,
                    max=1.0,
                    step=1e-6,
                    round=False,
                    tooltip=(
                        "A step is good enough at this loss, plus up to 0.001 that grows over the run, as in null-text "
                        "inversion; 0 never stops early, as the papers' code."
                    ),
                ),
                io.Boolean.Input(
                    "null_warm_start",
                    default=True,
                    tooltip=(
                        "On, each step's null embedding starts from the one before it, as the paper's algorithm has "
                        "it; off, from the empty text, as in its code."
                    ),
                ),
                io.Combo.Input(
                    "vectors",
                    options=[EACH, SHARED],
                    default=EACH,
                    optional=True,
                    tooltip=(
                        "How many vectors a word learns. One for all steps is what the paper compares its own with; "
                        "Attune Save Learned Word then saves just that one."
                    ),
                ),
            ],
            outputs=[
                schema.Trajectory.Output(
                    "learned",
                    display_name="trajectory",
                    tooltip="The same way, with the learned words and null embeddings: give it to an Attune edit.",
                ),
                io.Conditioning.Output(
                    "positive",
                    display_name="positive",
                    tooltip="The source prompt with its learned words, one text a step, to draw the picture again.",
                ),
                io.Conditioning.Output(
                    "null",
                    display_name="negative",
                    tooltip="For the sampler's negative, when the picture is drawn again or edited at this guidance.",
                ),
                io.Image.Output(
                    "report",
                    display_name="report",
                    tooltip="Where the nouns looked before and after, and the losses step by step.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )
        folded = [f"{loss}_{part}" for loss in dynamic_prompt.LOSSES for part in ("threshold", "length")]
        null = ("null_steps", "null_learning_rate", "null_early_stop", "null_warm_start")
        schema.folded(node, *folded, "optimizer", "tokens", *null, "vectors")
        return schema.searchable(
            node, "dpl", "dynamic prompt learning", "token optimization", "attention leakage", "textual inversion"
        )

    @classmethod
    def execute(
        cls, model, clip, trajectory, source_prompt, guidance, balance_weight, balance_threshold, balance_length,
        disjoint_weight, disjoint_threshold, disjoint_length, background_weight, background_threshold,
        background_length, inner_steps, learning_rate, optimizer, tokens, null_steps, null_learning_rate,
        null_early_stop, null_warm_start, vectors=EACH, background=None, noun_masks=None,
    ):  # fmt: skip
        host.check_plain(model)
        check_model(model, trajectory, schema.node_id(cls))
        settings = DynamicPrompt(
            balance_weight, disjoint_weight, background_weight,
            (balance_threshold, disjoint_threshold, background_threshold),
            (balance_length, disjoint_length, background_length), inner_steps, learning_rate, optimizer,
            vectors == SHARED,
        )  # fmt: skip
        nulls = NullText(guidance, null_steps, null_learning_rate, null_early_stop, null_warm_start)
        prompt, nouns = host.read_nouns(clip, source_prompt, "source_prompt of Attune Dynamic Prompt")
        names, positions = zip(*nouns, strict=True)
        pictures, *_, height, width = trajectory.latents.shape[1:]
        level = host.LevelMaps(model, tokens, (height, width))
        size = (runs.PIXELS * height, runs.PIXELS * width)
        outside = _outside(background, noun_masks, len(nouns), pictures, level.grid, size)
        _check_losses(settings, len(nouns), outside)
        like = trajectory.conditioning
        texts = host.encode(clip, prompt, like), host.encode(clip, "", like)
        host.check_texts(model, *texts)
        one_text(texts[0], "source prompt's", "connect one CLIP to Attune Dynamic Prompt")
        host.check_length(host.read_words(clip, prompt), texts[0])
        warn_of_another_clip(clip, trajectory, schema.node_id(cls), texts[0])
        learned = [p for at in positions for p in at]
        start = {
            name: rows[None].expand(pictures, -1, -1)
            for name, rows in host.token_vectors(clip, prompt, learned).items()
        }

        def encode(_, vectors):
            rows = {name: dict(zip(learned, own, strict=True)) for name, own in vectors.items()}
            return host.encode_tokens(clip, host.with_vectors(clip, prompt, rows))

        task = dynamic_prompt.Task([positions] * pictures, outside, level.grid)
        done = unfinished.learn_words(
            level.model, clip, trajectory, texts, start, task, encode, level.read, settings,
            None if guidance == 1 else nulls, schema.node_id(cls),
        )  # fmt: skip
        kept = {name: torch.stack([v[name] for v in done.vectors]).float().cpu() for name in start}
        words = LearnedWords(prompt, names, positions, kept)
        windows = runs.windows(model, trajectory.sigmas)
        positive = host.encode_steps(clip, prompt, words.by_position(), windows, like)
        header = {
            **trajectory.header, "method": "dynamic prompt", "prompt": prompt, "words": asdict(settings),
            "null_text": asdict(nulls), "null_text_guidance": guidance,
        }  # fmt: skip
        trajectory = replace(
            trajectory, header=header, conditioning=positive, negative=texts[1], windows=windows, learned=words,
            nulls=torch.stack(done.nulls).float().cpu() if done.nulls else None,
        )  # fmt: skip
        shown = sheet.learning_sheet(done.seen.unflatten(-1, level.grid).cpu(), names, done.losses, settings)
        return io.NodeOutput(trajectory, positive, negative_of(trajectory), shown)


def _outside(background, noun_masks, words, pictures, grid, size):
    """What each noun of each picture must not look at, (W, N) or None; ``size`` is the pictures'."""
    needed = ("background", background, (1, pictures)), ("noun_masks", noun_masks, (words, words * pictures))
    for name, mask, counts in needed:
        if mask is None:
            continue
        if len(mask) not in counts:
            raise ValueError(
                f"The {name} hold {len(mask)} masks where {' or '.join(map(str, dict.fromkeys(counts)))} are needed, "
                f"for {pictures} picture{'s' * (pictures > 1)} and {words} noun{'s' * (words > 1)}; connect the "
                "outputs of Attune Background Mask with the same source prompt to Attune Dynamic Prompt."
            )
        height, width = mask.shape[1:]
        if abs(height * size[1] - width * size[0]) > max(size) * max(height, width) / 16:
            raise ValueError(
                f"The {name} of Attune Dynamic Prompt measure {width}x{height}, but the TRAJECTORY's picture "
                f"{size[1]}x{size[0]}; connect masks of that picture's proportions."
            )
    given = (None if m is None else masks.touched(masks.fitted(m, size), grid) for m in (background, noun_masks))
    return find_background.forbidden(*given, words, pictures)


def _check_losses(settings, words, outside):
    """Raises ValueError where no loss is left to learn by."""
    several = words > 1 and (settings.balance or settings.disjoint)
    if not several and (outside[0] is None or not settings.background):
        raise ValueError(
            f"With {words} noun{'s' * (words > 1)} and these weights no loss is active; mark a second noun, "
            "connect a background mask to Attune Dynamic Prompt, or raise the weight of a loss there."
        )


class AttuneSaveLearnedWord(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneSaveLearnedWord",
            display_name="Attune Save Learned Word",
            category="Attune/tokens",
            description=(
                "Writes a learned word to ComfyUI's embeddings folder, so that any prompt can use it as "
                '"embedding:name". All steps of all words are kept by Attune Save Trajectory.'
            ),
            inputs=[
                schema.Trajectory.Input("trajectory", tooltip="With learned words, from Attune Dynamic Prompt."),
                io.String.Input(
                    "word", default="", tooltip="Which word to save; empty saves the first. Of two alike, the first."
                ),
                io.Int.Input(
                    "step",
                    default=-1,
                    min=-1,
                    max=1000,
                    tooltip="The step whose vectors to save, counted from 0 at the noise; -1 saves their mean.",
                ),
                io.Int.Input("picture", default=0, min=0, max=4096, tooltip="Which picture of a batch, from 0."),
                io.String.Input(
                    "filename_prefix",
                    default="attune/word",
                    tooltip="Folder and beginning of the name; a number follows, so nothing is overwritten.",
                ),
            ],
            outputs=[
                io.String.Output("text", display_name="text", tooltip='What to write in a prompt: "embedding:name".')
            ],
            is_output_node=True,
        )
        return schema.searchable(node, "dpl", "textual inversion", "export embedding", "save token")

    @classmethod
    def execute(cls, trajectory, word, step, picture, filename_prefix):
        if trajectory.learned is None:
            raise ValueError(
                "The TRAJECTORY holds no learned words; connect Attune Dynamic Prompt to Attune Save Learned Word."
            )
        if re.search(r"[\s,:()]", filename_prefix):
            raise ValueError(
                f'The filename_prefix "{filename_prefix}" holds a space, a bracket, a comma or a colon, at which a '
                "prompt would end the word's name; leave them out in Attune Save Learned Word."
            )
        word = host.same_word(word, trajectory.learned.words)
        vectors = trajectory.learned.word(word, None if step < 0 else step, picture)
        text = runs.save_embedding(filename_prefix, vectors)
        return io.NodeOutput(text, ui={"text": (f"saved; write {text} in a prompt",)})


NODES = [AttuneBackgroundMask, AttuneDynamicPrompt, AttuneSaveLearnedWord]
