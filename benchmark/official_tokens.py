"""Dynamic Prompt Learning and T2I-Adapter beside their authors' own code: rows of :mod:`official`.

Of Dynamic Prompt Learning their whole pipeline runs, over 50 steps, for which its thresholds and rates are written;
only what it would decode is kept as latents. T2I-Adapter's network is read from their branch of Stable Diffusion.
"""

import contextlib
import functools
from types import SimpleNamespace

import comfy.utils
import diffusers.utils
import torch
import transformers
from diffusers.models.attention_processor import Attention
from diffusers.utils import torch_utils

import nodes as stock

from ..attention_patches import background as find_background
from ..attention_patches import self_maps
from ..attention_patches.sketch import sketch_of
from ..demo import model as demo_model
from ..demo import scenes
from ..demo.measure import Bench, call
from ..inversion import dynamic_prompt, host
from ..nodes import tokens
from . import dynamic_prompt as words
from . import official_code
from . import reference_tokens as dpl
from .official_code import LEARNED, Check

GRID = host.PAPERS_GRID
STEPS = 50
LOOKS, NULLS = 3, 2  # the most looks a step at the words, and updates a step of the empty text's embedding
# Thresholds' starts, between what the demo model's words begin and end at, so that some steps stop early.
BETA, ALPHA = (0.9, 0.95, 0.95), (25.0, 25.0, 50.0)
CLUSTERS = 5
NOT_NONE = "they leave a picture without a background; here the part that the nouns agree with least becomes it"
ADAPTER = "ldm/modules/encoders/adapter.py"


# ---- wangkai930418/DPL -----------------------------------------------------------------------------------------------


class Words:
    """Their pipeline, told the demo model, and Attune Dynamic Prompt."""

    def __init__(self, sides, clones):
        self.given = sides
        lent = (
            (transformers, "CLIPFeatureExtractor", transformers.CLIPImageProcessor),
            (diffusers.utils, "randn_tensor", torch_utils.randn_tensor),
        )
        with official_code.older(*lent):
            self.code, self.study = official_code.read(
                clones["DPL"], "pipelines.null_attend_textinv_pipeline", "tools.sd_study_utils"
            )
        self.weights = demo_model.read_weights()["text"]
        self.learned, self.theirs = functools.cache(self.learned), functools.cache(self.theirs)

    @functools.cached_property
    def sides(self):
        """The bench at :data:`STEPS` steps."""
        bench = self.given.bench
        if bench.steps == STEPS:
            return self.given
        return type(self.given)(Bench(bench.count, bench.seed, STEPS, bench.guidance))

    # -- what both are told

    def told(self, number):
        """(the trajectory, the caption as raw tokens, the columns of its nouns, (256,) where none of them may look)."""
        scene = self.sides.scenes[number]
        prompt = self.sides.prompt(scenes.caption(scene))
        pairs = zip(prompt.text.split(" "), prompt.words, strict=True)
        nouns = [column for word, (column, *_) in pairs if word in scenes.SHAPES]
        objects = torch.from_numpy(scenes.render(scene)[1])
        empty = torch.nn.functional.adaptive_max_pool2d(1 - objects.amax(0)[None], (16, 16)).flatten()
        return self.sides.invert(number, prompt.text, GRID, False), prompt, nouns, (empty >= 0.5).float()

    # -- theirs

    def theirs(self, number, looks=LOOKS, nulls=NULLS):
        """Their run: ``losses``, for each step a list of (L_at, L_dj, L_bg), one a look; ``vectors`` (S, W, width) and
        ``nulls`` (S, T, width) of every step; ``start`` (W, width); ``latents`` after each step."""
        trajectory, prompt, nouns, outside = self.told(number)
        encoder = dpl.Encoder(self.weights, [prompt.ids[column] for column in nouns])
        rows = [encoder.row(token) for token in prompt.ids]
        for column, row in zip(nouns, encoder.placeholders, strict=True):
            rows[column] = row
        texts = {prompt.text: rows, "": [encoder.row(token) for token in self.sides.prompt("").ids]}
        encoder.table.requires_grad_()
        start = encoder.table[list(encoder.placeholders)].detach().clone()
        others = torch.ones(len(encoder.table), dtype=bool)
        others[list(encoder.placeholders)] = False
        pipe, found = self.pipeline(encoder.clip, texts)
        path = self.sides.path(trajectory)
        height, width = (host.PIXELS * size for size in path[0].shape[-2:])
        settings = {f"{name}_{short}": values[at] for name, values in (("alpha", ALPHA), ("beta", BETA))
                    for at, short in enumerate(("max", "cos", "ent"))}  # fmt: skip
        weights = dynamic_prompt.DynamicPrompt().weights
        settings |= dict(zip(("lam_maxattn", "lam_cosine", "lam_entropy"), weights, strict=True))
        with official_code.quiet(), official_code.on_the_cpu(), self.as_theirs():
            *_, uncond, vectors = pipe(
                prompt.text, num_inference_steps=STEPS, latents=path[0], guidance_scale=self.sides.bench.guidance,
                all_latents=path[::-1], null_inner_steps=nulls, attn_inner_steps=looks, output_type="latent",
                placeholder_token_id=list(encoder.placeholders), index_no_updates=others, token_indices=nouns,
                max_iter_to_alter=0, BG_maps=outside.view(1, 16, 16).expand(len(nouns), -1, -1), height=height,
                width=width, **settings,
            )  # fmt: skip
        count = len(trajectory.sigmas) - 1  # their last step on these timesteps is onto itself
        return SimpleNamespace(
            losses=[step for step in found.losses if step][:count], vectors=torch.stack(vectors[:count]),
            nulls=torch.cat(uncond[:count]), latents=found.latents[:count], start=start,
        )  # fmt: skip

    def pipeline(self, encoder, texts):
        """Their pipeline, which reads ``texts`` (text -> rows) by ``encoder``, and the namespace that its losses and
        latents will be in."""
        told, found = self.sides.model(Attention), SimpleNamespace(losses=[[]], latents=[])

        class Told(self.code.StableDiffusion_MyPipeline):
            _execution_device = device = torch.device("cpu")
            vae_scale_factor = host.PIXELS
            config = SimpleNamespace()

            def __init__(self):
                pass

            def decode_latents(self, latents):
                return latents

            def run_safety_checker(self, image, *_):
                return image, None

            @contextlib.contextmanager
            def progress_bar(self, **_):
                yield SimpleNamespace(update=self.next)

            def next(self):
                found.latents.append(self.stepped)
                found.losses.append([])

            def _compute_loss(self, *args, **more):
                found.losses[-1].append([float((loss := super()._compute_loss(*args, **more)).detach())])
                return loss

            def _compute_BG(self, *args, **more):
                found.losses[-1][-1].append(float((loss := super()._compute_BG(*args, **more)).detach()))
                return loss

            def _compute_cosine(self, *args, **more):
                # They take L_at, L_bg and L_dj in this order.
                found.losses[-1][-1].insert(1, float((loss := super()._compute_cosine(*args, **more)).detach()))
                return loss

        class Kept(official_code.Scheduler):
            def step(self, *args, **more):
                made = super().step(*args, **more)
                pipe.stepped = made.prev_sample.detach()
                return made

        def tokenize(text, **_):
            return SimpleNamespace(
                input_ids=torch.tensor([texts[one] for one in ([text] if isinstance(text, str) else text)])
            )

        tokenize.model_max_length = 77
        told.scheduler.__class__ = Kept
        told.unet.in_channels = 4
        pipe = Told()
        parts = {"unet": told.unet, "scheduler": told.scheduler, "text_encoder": encoder, "tokenizer": tokenize}
        for name, thing in parts.items():
            object.__setattr__(pipe, name, thing)
        return pipe, found

    @contextlib.contextmanager
    def as_theirs(self):
        """Inside, the UNet's weights take gradients, by which their store knows a look; its attention is as before
        afterwards."""
        unet = self.sides.network
        processors = unet.attn_processors
        unet.requires_grad_(True)
        try:
            yield
        finally:
            unet.requires_grad_(False)
            unet.zero_grad(set_to_none=True)
            unet.set_attn_processor(processors)

    # -- ours

    def learned(self, number):
        """What Attune Dynamic Prompt learns, its TRAJECTORY and the run's :class:`dynamic_prompt.Progress`."""
        trajectory, prompt, nouns, outside = self.told(number)
        pieces = prompt.text.split(" ")
        braced = " ".join(f"{{{word}}}" if word in scenes.SHAPES else word for word in pieces)
        weights = dynamic_prompt.DynamicPrompt().weights
        losses = [value for three in zip(weights, BETA, ALPHA, strict=True) for value in three]
        mask = outside.view(1, 16, 16).repeat_interleave(host.PIXELS, 1).repeat_interleave(host.PIXELS, 2)
        bench, kept, learn = self.sides.bench, [], tokens.unfinished.learn_words
        tokens.unfinished.learn_words = lambda *given: kept.append(learn(*given)) or kept[-1]
        try:
            made = call(
                tokens.AttuneDynamicPrompt, bench.model, bench.clip, trajectory, braced, bench.guidance, *losses,
                LOOKS, 1e-3, dynamic_prompt.ADAMW, 256, NULLS, 0.01, 0.0, False, background=mask,
            )[0]  # fmt: skip
        finally:
            tokens.unfinished.learn_words = learn
        return made, kept[0]

    # -- rows

    def looks(self, number):
        _, ours = self.learned(number)
        mine = [sum("null-text" not in look for look in step[0]) for step in ours.losses]
        theirs = [len(step) for step in self.theirs(number).losses]
        every = torch.full((len(theirs),), float(LOOKS))
        return torch.tensor(mine).float(), torch.tensor(theirs).float(), every, None

    def losses(self, which, number):
        _, ours = self.learned(number)
        name = dynamic_prompt.LOSSES[which]
        mine = torch.tensor([look[name] for step in ours.losses for look in step[0] if name in look])
        theirs = torch.tensor([look[which] for step in self.theirs(number).losses for look in step])
        if len(mine) != len(theirs):  # one of them stopped at another look
            mine = torch.full_like(theirs, float("nan"))
        return mine, theirs, theirs[:1].expand_as(theirs), None

    def vectors(self, number):
        _, ours = self.learned(number)
        theirs = self.theirs(number)
        mine = torch.stack([next(iter(step.values()))[0] for step in ours.vectors])
        moved = theirs.vectors - theirs.start
        return mine - theirs.start, moved, torch.zeros_like(moved), None

    def nulls(self, number):
        _, ours = self.learned(number)
        theirs, empty = self.theirs(number), self.sides.empty[0][0].float()
        moved = theirs.nulls - empty
        return torch.cat(ours.nulls) - empty, moved, torch.zeros_like(moved), None

    def latents(self, number):
        trajectory, ours = self.learned(number)
        scale = (1 + trajectory.sigmas[-1] ** 2).sqrt()
        # Without a look or an update nothing is learned.
        plain = self.theirs(number, 0, 0).latents[-1]
        return ours.x / scale, self.theirs(number).latents[-1], plain, trajectory

    def random(self, number):
        """The three losses of maps that nobody drew, of two and of three nouns."""
        rng = torch.Generator().manual_seed(number)
        mine, theirs = [], []
        for nouns in ([2, 9], [3, 5, 76 - 1]):
            seen = (2 * torch.randn(256, 77, generator=rng)).softmax(-1)
            outside = torch.rand(len(nouns), 256, generator=rng)
            given = dynamic_prompt.DynamicPrompt(), seen, [(column,) for column in nouns], outside, (16, 16)
            ours = dynamic_prompt.losses(*given)
            mine += [ours[name] for name in dynamic_prompt.LOSSES]
            code, maps = self.code.StableDiffusion_MyPipeline, seen.view(16, 16, 77)
            with official_code.on_the_cpu():
                theirs += [
                    code._compute_loss(code._compute_max_attention_per_index(maps, nouns)).flatten()[0],
                    code._compute_cosine(maps, nouns),
                    code._compute_BG(maps, nouns, outside.view(-1, 16, 16)),
                ]
        return torch.stack(mine), torch.stack(theirs), None, None

    def owners(self, threshold, number):
        """Whose each cluster of a picture is, in numbers from 1 on, 0 for the background's; both of the same maps and
        clusters."""
        trajectory, prompt, nouns, _ = self.told(number)
        given = trajectory.conditioning, trajectory.latents, trajectory.sigmas, 77
        seen, parts = words.token_maps(self.sides.bench, *given)
        labels = self_maps.clusters(parts.average()[0], CLUSTERS)
        return self.owned(seen[:, 0].float(), labels, parts.grid, nouns, threshold)

    def owned(self, seen, labels, grid, nouns, threshold):
        scores = find_background.agreement(seen[nouns], labels, grid, CLUSTERS)
        ours, _ = find_background.owners(scores, threshold)
        named = [(column - 1, str(at)) for at, column in enumerate(nouns)]
        found, _ = self.study.cluster2noun_(
            labels.view(grid).numpy(), threshold, CLUSTERS, named, seen.permute(1, 2, 0)
        )
        theirs = [0.0 if found[part] == "BG" else 1.0 + int(found[part][1]) for part in range(CLUSTERS)]
        theirs = torch.tensor(theirs)
        return 1.0 + ours.float(), theirs, torch.zeros_like(theirs), None

    def random_owners(self, number):
        """The same of random maps of 16x16 and clusters of 32x32, at the middle of what the clusters score."""
        rng = torch.Generator().manual_seed(number)
        labels = torch.randint(CLUSTERS, (32, 32), generator=rng).sort()[0].flatten()
        seen, nouns = torch.rand(77, 16, 16, generator=rng), [2, 9]
        scores = find_background.agreement(seen[nouns], labels, (32, 32), CLUSTERS).amax(0)
        return self.owned(seen, labels, (32, 32), nouns, float(scores.median()) + 1e-4)

    def checks(self):
        method, order = "Dynamic Prompt Learning", ("L_at", "L_dj", "L_bg")
        yield Check(method, "L_at, L_dj and L_bg of random maps", self.random)
        yield Check(method, "whose each part is, of random maps", self.random_owners)
        yield Check(method, "whose each part is, of an inversion's maps", functools.partial(self.owners, 0.2))
        none = functools.partial(self.owners, 0.0)
        yield Check(method, "whose each part is, none below the threshold", none, NOT_NONE)
        yield Check(method, "looks of every step", self.looks)
        for which, name in enumerate(order):
            yield Check(method, f"{name} of every look", functools.partial(self.losses, which))
        yield Check(method, "what every step's vectors learned", self.vectors, bound=LEARNED)
        yield Check(method, "what every step's null embedding learned", self.nulls, bound=LEARNED)
        yield Check(method, "guided run under what was learned", self.latents, bound=LEARNED)


# ---- TencentARC/T2I-Adapter ------------------------------------------------------------------------------------------


class Adapter:
    """Their network with the tensors of the demo's sketch adapter, and the host's as Load ControlNet Model gives it."""

    def __init__(self, sides, clones):
        self.sides = sides
        code = official_code.read_classes(official_code.file_of(clones["T2I-Adapter"], ADAPTER), ADAPTER)
        self.net = code.Adapter(demo_model.ADAPTER_CHANNELS, nums_rb=2, cin=64, ksize=1, sk=True, use_conv=False)
        weights = comfy.utils.load_torch_file(str(demo_model.ADAPTER))
        self.net.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        self.net.eval().requires_grad_(False)

    def features(self, number):
        objects = torch.from_numpy(scenes.render(self.sides.scenes[number])[1])
        hint = sketch_of(objects)[..., 0][None]
        host_net = call(stock.ControlNetLoader, demo_model.ADAPTER.name)[0].t2i_model.float()
        ours = [one for one in host_net(hint)["input"][::-1] if one is not None]
        theirs, plain = (torch.cat([one.flatten() for one in self.net(shown)]) for shown in (hint, 0 * hint))
        return torch.cat([one.flatten() for one in ours]), theirs, plain, None

    def checks(self):
        yield Check("T2I-Adapter", "features of every level, of a sketch", self.features)
