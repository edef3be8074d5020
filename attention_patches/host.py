"""The one file here that speaks ComfyUI's conventions: prompts, patches, rows, steps, and the reference passes.

What rides on MODEL is a frozen :class:`Spec`. When sampling starts, a :class:`_Run` is made from it; in each step it
runs the UNet once on every reference's latent, keeps q, k, v of the places that a controller acts at, and lets the
host run the target, whose patched layers call the controllers. When sampling ends, however it ends, it is dropped.

Host facts used (checked on 0.3.52 and 0.3.75): wrappers OUTER_SAMPLE, PREDICT_NOISE, CALC_COND_BATCH, APPLY_MODEL;
`patches_replace` for attn1 and attn2; extra `model_conds` travel with their rows; `transformer_options` keys block,
block_index, activations_shape, n_heads, sample_sigmas; `sampler_helpers.convert_cond`; `samplers.process_conds`.
"""

import functools
import inspect
from dataclasses import dataclass, replace

import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.conds import CONDRegular
from comfy.ldm.modules import attention
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.patcher_extension import WrappersMP

from .reference import Spec
from .values import QKV, Place, apply_map, attention_map
from .words import group_words

KEY = "attune"  # of the spec in transformer_options and of our wrappers
RUN = "attune_run"  # in transformer_options while sampling: what this run has gathered
PROMPT = "attune_prompt"  # in a conditioning's dictionary: the prompt it was encoded from
ROLE = "attune_role"  # among a conditioning's model_conds: which edit its rows belong to, 0 for none


# ---- prompts -----------------------------------------------------------------------------------------------------


def read_words(clip, prompt):
    """The prompt's :class:`words.Tokens`, by the CLIP's own tokenizer (weights, escapes and embeddings included)."""
    chunks = next(iter(clip.tokenize(prompt).values()))
    pieces = []
    for chunk in chunks:
        ids = [token for token, *_ in chunk[1:]]
        end = next((i for i, t in enumerate(ids) if not torch.is_tensor(t) and t == 49407), len(ids))
        # A learned embedding is a vector in the token's place; it counts as a word of its own.
        pieces.append(
            [
                "<embedding></w>" if torch.is_tensor(t) else clip.tokenizer.untokenize([(t, 1.0)])[0][1]
                for t in ids[:end]
            ]
        )
    return group_words(prompt, pieces)


def encode(clip, prompt):
    """The prompt as CONDITIONING, tagged so that an edit knows its rows."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt), add_dict={PROMPT: prompt})


# ---- what rides on MODEL -----------------------------------------------------------------------------------------


def check_unet(model):
    """Raises ValueError for a MODEL without the attention layers that this pack steers."""
    unet = model.model.diffusion_model
    if not isinstance(unet, UNetModel) or not any(isinstance(m, BasicTransformerBlock) for m in unet.modules()):
        raise ValueError(
            f"The MODEL is a {type(unet).__name__}, but Attune steers the attention of Stable Diffusion UNets "
            "(SD 1.x, SD 2.x, SDXL); load such a checkpoint in the loader that feeds this node."
        )


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


def install(model, references, controllers):
    """A clone of MODEL with these references and controllers added to those it may carry already.

    Raises ValueError for a model without a UNet, or when it carries another reference of the same name.
    """
    check_unet(model)
    model = model.clone()
    options = model.model_options["transformer_options"]
    spec = options.get(KEY, Spec())
    known = {r.name: r for r in spec.references}
    for reference in references:
        other = known.setdefault(reference.name, reference)
        if not torch.equal(other.latents, reference.latents) or _prompt(other) != _prompt(reference):
            raise ValueError(
                f'The MODEL already carries an edit whose "{reference.name}" is another TRAJECTORY or prompt; chained '
                "edits share both, so give the same TRAJECTORY and source prompt to each Attune edit node."
            )
    if not spec.controllers:
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _outer_sample)
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, _predict_noise)
        model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, _calc_cond_batch)
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _apply_model)
    options[KEY] = replace(spec, references=tuple(known.values()), controllers=spec.controllers + tuple(controllers))
    return model


# ---- wrappers around one sampling --------------------------------------------------------------------------------


def _outer_sample(executor, *args, **kwargs):
    options = executor.class_obj.model_options["transformer_options"]
    run = options[RUN] = _Run(options[KEY])
    try:
        return executor(*args, **kwargs)
    finally:
        del options[RUN]
        run.close()


def _predict_noise(executor, x, timestep, model_options, seed):
    run = model_options["transformer_options"].get(RUN)
    if run is not None and not run.ready:
        run.prepare(executor.class_obj, x, model_options["transformer_options"]["sample_sigmas"])
    return executor(x, timestep, model_options, seed)


def _calc_cond_batch(executor, model, conds, x, timestep, model_options):
    run = model_options["transformer_options"].get(RUN)
    if run is None or not run.enter(float(timestep[0])):
        return executor(model, conds, x, timestep, model_options)
    run.read_references(model, x, timestep, model_options)
    return executor(model, conds, x, timestep, _patched(run.layers, model_options, _EditPatch(run, len(x))))


def _apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **conds):
    tags = conds.pop(ROLE, None)
    if tags is not None:
        # Read once a call, since every look at a tensor's values makes a GPU wait.
        tags = tags[:, 0].tolist()
        rows = {role: torch.tensor([i for i, t in enumerate(tags) if t == role], device=x.device) for role in set(tags)}
        transformer_options = {**transformer_options, ROLE: rows}
    return executor(x, t, c_concat, c_crossattn, control, transformer_options, **conds)


class _Run:
    """What one sampling gathers: the references' prepared conditionings, and this step's q, k, v."""

    def __init__(self, spec):
        self.spec = spec
        self.ready = False
        self.conds = {}
        self.layers = []
        self.sigma = self.step = self.steps = None
        self.features = {}  # reference name -> layer -> QKV

    def close(self):
        self.conds.clear()
        self.features.clear()

    def enter(self, sigma):
        """Sets the step; False where no controller acts anywhere in it, so that nothing is run or patched."""
        clock = self.spec.references[0]
        self.step, self.steps = clock.step(sigma), clock.steps
        active = any(c.active(self.step, self.steps) for c in self.spec.controllers)
        if not active:
            self.features.clear()
            self.sigma = None
        return active

    def prepare(self, guider, x, sample_sigmas):
        """Tags the guider's conditionings and converts the references'; raises ValueError for what does not fit."""
        for reference in self.spec.references:
            _check_fit(reference, x, float(sample_sigmas[0]))
        found = set()
        for name, conds in guider.conds.items():
            for cond in conds:
                # A negative made from the edit's positive (zeroed out, say) carries its tag but is not the edit.
                role = 0 if "negative" in name else self._role(cond)
                found.add(role)
                _refuse_area(cond)
                tag = CONDRegular(torch.tensor([[role]], device=x.device))
                cond["model_conds"] = {**cond["model_conds"], ROLE: tag}
        for role, prompt in enumerate(self.spec.prompts, 1):
            if role not in found:
                raise ValueError(
                    f'No positive conditioning of this sampling is the prompt "{prompt}" that the MODEL was edited '
                    "for; connect the positive output of the Attune edit node to the sampler's positive input."
                )
        for reference in self.spec.references:
            conds = {"positive": comfy.sampler_helpers.convert_cond(reference.conditioning)}
            picture = reference.latents[-1].to(x)  # models with an inpainting input want to see one
            conds = comfy.samplers.process_conds(guider.inner_model, x, conds, x.device, latent_image=picture)
            self.conds[reference.name] = conds["positive"]
        self.layers = _layers(guider.inner_model.diffusion_model)
        self.ready = True

    def _role(self, cond):
        if cond.get(PROMPT) not in self.spec.prompts:
            return 0
        prompt = cond[PROMPT]
        wanted = next(c.tokens for c in self.spec.controllers if c.prompt == prompt)
        length = cond["model_conds"]["c_crossattn"].cond.shape[1]
        if length != wanted:
            raise ValueError(
                f'The conditioning of "{prompt}" has {length} text tokens at the sampler but had {wanted} at the edit '
                "node; take nodes that lengthen it, such as Conditioning (Concat), out from between them."
            )
        return 1 + self.spec.prompts.index(prompt)

    def read_references(self, model, x, timestep, model_options):
        """Runs the UNet on each reference's latent at this sigma, one row a picture; keeps what controllers want."""
        sigma = float(timestep[0])
        if sigma == self.sigma:  # a second pass at one step, such as perturbed attention's, reads the same
            return
        self.features.clear()
        # Caching packs skip passes from these two wrappers; a reference must never be skipped.
        skipping = (WrappersMP.CALC_COND_BATCH, WrappersMP.DIFFUSION_MODEL)
        options = dict(model_options["transformer_options"])
        options["wrappers"] = {k: v for k, v in options["wrappers"].items() if k not in skipping}
        model_options = {**model_options, "transformer_options": options}
        for reference in self.spec.references:
            store = self.features.setdefault(reference.name, {})
            latent = reference.latent(sigma).to(x)
            patched = _patched(self.layers, model_options, _CapturePatch(self, store))
            conds = [self.conds[reference.name]]
            comfy.samplers.calc_cond_batch(model, conds, latent, timestep[: len(latent)], patched)
        self.sigma = sigma


def _refuse_area(cond):
    if cond.get("area") is not None:
        raise ValueError(
            "A conditioning of this sampling is set to an area, which an edit's attention does not line up with; use "
            'Conditioning (Set Mask) with set_cond_area "default" in the place of Conditioning (Set Area).'
        )


def _check_fit(reference, x, first_sigma):
    pictures, channels, height, width = x.shape
    ours, *size = reference.latents.shape[1:]
    if size != [channels, height, width]:
        raise ValueError(
            f"The TRAJECTORY holds latents of {size[0]} channels and {size[2]}x{size[1]}, but the sampler draws "
            f"{channels} channels and {width}x{height}; connect the LATENT of the node that made the TRAJECTORY to the "
            "sampler."
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
            "SIGMAS of the node that made the TRAJECTORY, or choose its steps and the scheduler ddim_uniform in the "
            "sampler."
        )


# ---- patches -----------------------------------------------------------------------------------------------------


def recording(model, receive):
    """A clone of MODEL that calls ``receive(place, own, heads)`` in every attention layer and changes nothing.

    Steps are not counted: each place says step 0 of 1.
    """
    check_plain(model)
    model = model.clone()
    layers = _layers(model.model.diffusion_model)

    def patch(kind, own, options, attend, inner):
        place = _place(kind, own, options, 0, 1)
        if place is not None:
            receive(place, own, options["n_heads"])
        return attend(*own, options)

    def calc_cond_batch(executor, base, conds, x, timestep, model_options):
        return executor(base, conds, x, timestep, _patched(layers, model_options, patch))

    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, calc_cond_batch)
    return model


def _layers(unet):
    """A list of (block, depth) for every transformer layer, with the names that the host's patches use."""
    blocks = [(("input", i), b) for i, b in enumerate(unet.input_blocks)]
    blocks += [(("middle", 0), unet.middle_block)] if unet.middle_block is not None else []
    blocks += [(("output", i), b) for i, b in enumerate(unet.output_blocks)]
    return [
        (name, depth)
        for name, block in blocks
        for depth in range(sum(isinstance(m, BasicTransformerBlock) for m in block.modules()))
    ]


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


def _place(kind, own, options, step, steps):
    """The :class:`Place` of a call, or None when another pack changed the tokens and nothing lines up any more."""
    grid = tuple(options["activations_shape"][2:4])
    if own.q.shape[1] != grid[0] * grid[1]:
        return None
    return Place(kind, tuple(options["block"]), options["block_index"], grid, step, steps)


@dataclass(frozen=True)
class _CapturePatch:
    run: _Run
    store: dict

    def __call__(self, kind, own, options, attend, inner):
        place = _place(kind, own, options, self.run.step, self.run.steps)
        if place is not None and any(c.edits(place) for c in self.run.spec.controllers):
            self.store[place.layer] = own
        return attend(*own, options)


@dataclass(frozen=True)
class _EditPatch:
    run: _Run
    batch: int

    def __call__(self, kind, own, options, attend, inner):
        place = _place(kind, own, options, self.run.step, self.run.steps)
        rows = options.get(ROLE)
        # Where nothing lines up, or a pack's tiling kept a reference from being read, attention stays as it is.
        if place is None or rows is None or sum(map(len, rows.values())) != len(own.q):
            return attend(*own, options)
        if not all(place.layer in store for store in self.run.features.values()):
            return attend(*own, options)
        prompts = self.run.spec.prompts
        acting = [(c, rows.get(1 + prompts.index(c.prompt))) for c in self.run.spec.controllers if c.edits(place)]
        acting = [(c, mine) for c, mine in acting if mine is not None]
        if not acting:
            return attend(*own, options)
        if kind == "self":
            return self._self_attention(place, own, options, attend, acting)
        return self._cross_attention(place, own, options, attend, inner, acting)

    def _references(self, place, rows):
        """What each reference holds at this place, for these rows; a chunk's rows follow the pictures of the batch."""
        pictures = rows % self.batch
        for name, store in self.run.features.items():
            kept = store[place.layer]
            at = pictures if len(kept.q) > 1 else torch.zeros_like(pictures)
            yield name, QKV(*(t[at] for t in kept))

    def _self_attention(self, place, own, options, attend, acting):
        for controller, rows in acting:
            references = dict(self._references(place, rows))
            edited = controller.self_attention(place, QKV(*(t[rows] for t in own)), references)
            own = QKV(*(t.index_copy(0, rows, e) for t, e in zip(own, edited, strict=True)))
        return attend(*own, options)

    def _cross_attention(self, place, own, options, attend, inner, acting):
        out, heads = attend(*own, options), options["n_heads"]
        for prompt in dict.fromkeys(c.prompt for c, _ in acting):
            mine = [(c, rows) for c, rows in acting if c.prompt == prompt]
            rows, tokens = mine[0][1], mine[0][0].tokens
            # Beside a longer prompt the host repeats a shorter one; attention over copies is attention over one.
            q, k, v = own.q[rows], own.k[rows, :tokens], own.v[rows, :tokens]
            p = plain = attention_map(q, k, heads)
            references = {n: attention_map(r.q, r.k, heads) for n, r in self._references(place, rows)}
            for controller, _ in mine:
                p = controller.cross_map(place, p, references)
            edited = apply_map(p, v, heads)
            if inner is not None:  # another pack adds to this attention (IP-Adapter): keep what it added
                edited = edited + out[rows] - apply_map(plain, v, heads)
            out = out.index_copy(0, rows, edited)
        return out
