"""The one file here that speaks ComfyUI's conventions: prompts, patches, rows, steps, and the reference passes.

What rides on MODEL is a frozen :class:`Spec`. When sampling starts, a :class:`_Run` is made from it; in each step it
runs the UNet once on every reference's latent, keeps q, k, v of the places that a controller acts at, and lets the
host run the target, whose patched layers call the controllers. When sampling ends, however it ends, it is dropped.

Host facts used (checked on 0.3.52 and 0.3.75): wrappers OUTER_SAMPLE, PREDICT_NOISE, CALC_COND_BATCH, APPLY_MODEL;
`patches_replace` for attn1 and attn2; extra `model_conds` travel with their rows; `transformer_options` keys block,
block_index, activations_shape, n_heads, sample_sigmas; `sampler_helpers.convert_cond`; `samplers.process_conds`.
"""

import inspect
from dataclasses import dataclass, replace

import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.conds import CONDRegular
from comfy.ldm.modules.attention import BasicTransformerBlock, optimized_attention
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.patcher_extension import WrappersMP

from .values import QKV, Place, apply_map, attention_map
from .words import group_words

KEY = "attune"  # of our entries in transformer_options and among the wrappers
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


@dataclass(frozen=True, eq=False)
class Reference:
    """A known run that an edit reads, under a name.

    ``sigmas`` (S+1,) from noise to picture, ``latents`` (S+1, B, C, h, w) in the model's own scale, ``conditioning``
    the stock list under which its features are read.
    """

    name: str
    sigmas: torch.Tensor
    latents: torch.Tensor
    conditioning: list

    def step(self, sigma):
        """The 0-based step that a sampler at ``sigma`` is in: the last grid point at or above it."""
        return max(0, int((self.sigmas[:-1] >= sigma * (1 - 1e-4)).sum()) - 1)

    def latent(self, sigma):
        """The latent at ``sigma``; linear in sigma between grid points, which is the path that Euler's method took."""
        i = self.step(sigma)
        high, low = float(self.sigmas[i]), float(self.sigmas[i + 1])
        share = min(1.0, max(0.0, (high - sigma) / (high - low)))
        # On a grid point it must be the stored latent to the last bit.
        return self.latents[i] if share < 1e-4 else torch.lerp(self.latents[i], self.latents[i + 1], share)


@dataclass(frozen=True, eq=False)
class Spec:
    """All references and controllers on a MODEL. `clone()` deep-copies what it finds; this is immutable, so it "
    "stays."""

    references: tuple = ()
    controllers: tuple = ()

    def __deepcopy__(self, memo):
        return self

    @property
    def prompts(self):
        return tuple(dict.fromkeys(c.prompt for c in self.controllers))


def check_unet(model):
    """Raises ValueError for a MODEL without the attention layers that this pack steers."""
    unet = model.model.diffusion_model
    if not isinstance(unet, UNetModel) or not any(isinstance(m, BasicTransformerBlock) for m in unet.modules()):
        raise ValueError(
            f"The MODEL is a {type(unet).__name__}, but Attune steers the attention of Stable Diffusion UNets "
            "(SD 1.x, SD 2.x, SDXL); load such a checkpoint in the loader that feeds this node."
        )


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
        if other.latents is not reference.latents:
            raise ValueError(
                f'The MODEL already carries an edit whose "{reference.name}" is another TRAJECTORY; chained edits must '
                "share one, so connect the same TRAJECTORY to both Attune nodes."
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
    run = options[KEY + "_run"] = _Run(options[KEY])
    try:
        return executor(*args, **kwargs)
    finally:
        del options[KEY + "_run"]
        run.close()


def _predict_noise(executor, x, timestep, model_options, seed):
    run = model_options["transformer_options"].get(KEY + "_run")
    if run is not None and not run.ready:
        run.prepare(executor.class_obj, x, model_options["transformer_options"]["sample_sigmas"])
    return executor(x, timestep, model_options, seed)


def _calc_cond_batch(executor, model, conds, x, timestep, model_options):
    run = model_options["transformer_options"].get(KEY + "_run")
    if run is None or not run.acts(float(timestep[0])):
        return executor(model, conds, x, timestep, model_options)
    run.read_references(model, x, timestep, model_options)
    return executor(model, conds, x, timestep, _patched(model, model_options, _EditPatch(run, len(x))))


def _apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **conds):
    roles = conds.pop(ROLE, None)
    if roles is not None:
        transformer_options = {**transformer_options, ROLE: roles[:, 0]}
    return executor(x, t, c_concat, c_crossattn, control, transformer_options, **conds)


class _Run:
    """What one sampling gathers: the references' prepared conditionings, and this step's q, k, v."""

    def __init__(self, spec):
        self.spec = spec
        self.ready = False
        self.conds = {}
        self.sigma = None
        self.features = {}  # reference name -> layer -> QKV

    def close(self):
        self.conds.clear()
        self.features.clear()

    @property
    def clock(self):
        """The reference whose steps are counted; a model carries controllers only with at least one reference."""
        return self.spec.references[0]

    def steps_at(self, sigma):
        return self.clock.step(sigma), len(self.clock.sigmas) - 1

    def acts(self, sigma):
        """Whether any controller acts anywhere at this sigma; where none does, nothing is run or patched."""
        return any(c.active(*self.steps_at(sigma)) for c in self.spec.controllers)

    def prepare(self, guider, x, sample_sigmas):
        """Tags the guider's conditionings and converts the references'; raises ValueError for what does not fit."""
        for reference in self.spec.references:
            _check_fit(reference, x, float(sample_sigmas[0]))
        found = set()
        for conds in guider.conds.values():
            for cond in conds:
                role = self._role(cond)
                found.add(role)
                cond["model_conds"] = {
                    **cond["model_conds"],
                    ROLE: CONDRegular(torch.tensor([[role]], device=x.device)),
                }
        for role, prompt in enumerate(self.spec.prompts, 1):
            if role not in found:
                raise ValueError(
                    f'No conditioning of this sampling is the prompt "{prompt}" that the MODEL was edited for; connect '
                    "the positive output of the Attune edit node to the sampler's positive input."
                )
        for reference in self.spec.references:
            conds = {"positive": comfy.sampler_helpers.convert_cond(reference.conditioning)}
            self.conds[reference.name] = comfy.samplers.process_conds(guider.inner_model, x, conds, x.device)[
                "positive"
            ]
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
        if cond.get("area") is not None:
            raise ValueError(
                f'The conditioning of "{prompt}" is set to an area, which the edit\'s attention does not line up with; '
                "use Conditioning (Set Mask) in place of Conditioning (Set Area)."
            )
        return 1 + self.spec.prompts.index(prompt)

    def read_references(self, model, x, timestep, model_options):
        """Runs the UNet on each reference's latent at this sigma, one row a picture, and keeps what controllers "
        "want."""
        sigma = float(timestep[0])
        if sigma == self.sigma:  # a second pass at one step, such as perturbed attention's, reads the same
            return
        self.features.clear()
        # Caching wrappers of other packs may skip a pass; a reference must never be skipped.
        options = dict(model_options["transformer_options"])
        options["wrappers"] = {k: v for k, v in options["wrappers"].items() if k != WrappersMP.CALC_COND_BATCH}
        model_options = {**model_options, "transformer_options": options}
        for reference in self.spec.references:
            store = self.features.setdefault(reference.name, {})
            latent = reference.latent(sigma).to(x)
            patched = _patched(model, model_options, _CapturePatch(self, store))
            comfy.samplers.calc_cond_batch(
                model, [self.conds[reference.name]], latent, timestep[: len(latent)], patched
            )
        self.sigma = sigma


def _check_fit(reference, x, first_sigma):
    have, need = tuple(reference.latents.shape[1:]), tuple(x.shape)
    if have[1:] != need[1:]:
        raise ValueError(
            f"The TRAJECTORY holds latents of {have[1]} channels and {have[3]}x{have[2]}, but the sampler draws "
            f"{need[1]} "
            f"channels and {need[3]}x{need[2]}; connect the LATENT of the node that made the TRAJECTORY to the sampler."
        )
    if have[0] not in (1, need[0]):
        raise ValueError(
            f"The TRAJECTORY holds {have[0]} pictures, but the sampler draws {need[0]}; it needs one picture or "
            f"as many. "
            "Change the batch of the sampler's latent or invert as many pictures."
        )
    if first_sigma > float(reference.sigmas[0]) * 1.02:
        raise ValueError(
            f"The sampler starts at sigma {first_sigma:.4g}, before the TRAJECTORY's first, "
            f"{float(reference.sigmas[0]):.4g}; "
            "connect the SIGMAS of the node that made the TRAJECTORY to the sampler."
        )


def recording(model, receive):
    """A clone of MODEL that calls ``receive(place, own, heads)`` in every attention layer and changes nothing.

    Steps are not counted: each place says step 0 of 1.
    """
    check_unet(model)
    model = model.clone()

    def patch(kind, own, options, attend, _patched):
        grid = tuple(options["activations_shape"][2:4])
        if own.q.shape[1] == grid[0] * grid[1]:
            receive(Place(kind, tuple(options["block"]), options["block_index"], grid, 0, 1), own, options["n_heads"])
        return attend(*own, options)

    def calc_cond_batch(executor, inner, conds, x, timestep, model_options):
        return executor(inner, conds, x, timestep, _patched(inner, model_options, patch))

    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY + "_recording", calc_cond_batch)
    return model


# ---- patches -----------------------------------------------------------------------------------------------------


def _layers(unet):
    """(block, depth, layers in the block) of every transformer layer, with the names that the host's patches use."""
    blocks = [(("input", i), b) for i, b in enumerate(unet.input_blocks)]
    blocks += [(("middle", 0), unet.middle_block)] + [(("output", i), b) for i, b in enumerate(unet.output_blocks)]
    for name, block in blocks:
        count = sum(isinstance(m, BasicTransformerBlock) for m in block.modules())
        for depth in range(count):
            yield name, depth, count


def _patched(model, model_options, patch):
    """Options in which every attention layer goes through ``patch``, with what other packs put there inside it."""
    options = dict(model_options["transformer_options"])
    table = dict(options.get("patches_replace", {}))
    for kind, name in (("self", "attn1"), ("cross", "attn2")):
        entries = dict(table.get(name, {}))
        for block, depth, _ in _layers(model.diffusion_model):
            # The host looks for (block, number, depth) first, then for (block, number).
            inner = entries.get((*block, depth), table.get(name, {}).get(block))
            entries[(*block, depth)] = _bind(patch, kind, inner)
        table[name] = entries
    options["patches_replace"] = table
    return {**model_options, "transformer_options": options}


# Another pack may have put its own kernel there; ComfyUI 0.3.52 does not know of that and refuses the keyword.
_KERNEL_TAKES_OPTIONS = any(
    p.kind is p.VAR_KEYWORD or p.name == "transformer_options"
    for p in inspect.signature(optimized_attention).parameters.values()
)


def _bind(patch, kind, inner):
    def attend(q, k, v, options):
        if inner is not None:
            return inner(q, k, v, options)
        settings = {"attn_precision": options.get("attn_precision")}
        if _KERNEL_TAKES_OPTIONS:
            settings["transformer_options"] = options
        return optimized_attention(q, k, v, options["n_heads"], **settings)

    return lambda q, k, v, options: patch(kind, QKV(q, k, v), options, attend, inner is not None)


def _place(run, kind, own, options):
    """The :class:`Place` of a call, or None when another pack changed the tokens and nothing lines up any more."""
    grid = tuple(options["activations_shape"][2:4])
    if own.q.shape[1] != grid[0] * grid[1]:
        return None
    return Place(
        kind, tuple(options["block"]), options["block_index"], grid, *run.steps_at(float(options["sigmas"][0]))
    )


@dataclass(frozen=True)
class _CapturePatch:
    run: _Run
    store: dict

    def __call__(self, kind, own, options, attend, patched):
        place = _place(self.run, kind, own, options)
        if place is not None and any(c.edits(place) for c in self.run.spec.controllers):
            self.store[place.layer] = own
        return attend(*own, options)


@dataclass(frozen=True)
class _EditPatch:
    run: _Run
    batch: int

    def __call__(self, kind, own, options, attend, patched):
        place = _place(self.run, kind, own, options)
        roles = options.get(ROLE)
        if place is None or roles is None or len(roles) != len(own.q):
            return attend(*own, options)
        acting = [
            (c, (roles == 1 + self.run.spec.prompts.index(c.prompt)).nonzero()[:, 0])
            for c in self.run.spec.controllers
            if c.edits(place)
        ]
        acting = [(c, rows) for c, rows in acting if len(rows)]
        edit = self._self_attention if kind == "self" else self._cross_attention
        return edit(place, own, options, attend, patched, acting) if acting else attend(*own, options)

    def _references(self, place, rows):
        """What the references hold at this place, for these rows; a chunk's rows follow the pictures of the batch."""
        pictures = rows % self.batch
        for name, store in self.run.features.items():
            if place.layer in store:
                kept = store[place.layer]
                at = pictures if len(kept.q) > 1 else torch.zeros_like(pictures)
                yield name, QKV(*(t[at] for t in kept))

    def _self_attention(self, place, own, options, attend, patched, acting):
        for controller, rows in acting:
            references = dict(self._references(place, rows))
            edited = controller.self_attention(place, QKV(*(t[rows] for t in own)), references)
            own = QKV(*(t.index_copy(0, rows, e) for t, e in zip(own, edited, strict=True)))
        return attend(*own, options)

    def _cross_attention(self, place, own, options, attend, patched, acting):
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
            if patched:  # another pack adds to this attention (IP-Adapter): keep what it added
                edited = edited + out[rows] - apply_map(plain, v, heads)
            out = out.index_copy(0, rows, edited)
        return out
