"""Dynamic Prompt Learning (Wang et al. 2023): for each step, vectors with which the nouns look at their objects.

Where a word looks is its cross-attention map. Three losses on the maps of the nouns are brought below thresholds that
tighten step by step; what is updated are the vectors that the text encoder reads for the nouns, and nothing else.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from . import null_text
from .ddim import step_down

ADAMW, ADAM, DESCENT = "AdamW (papers' code)", "Adam", "gradient descent (paper's algorithm)"
OPTIMIZERS = {ADAMW: torch.optim.AdamW, ADAM: torch.optim.Adam, DESCENT: torch.optim.SGD}
BALANCE, DISJOINT, BACKGROUND = "balance", "disjoint", "background"
LOSSES = (BALANCE, DISJOINT, BACKGROUND)
CHUNK = 77  # text tokens that CLIP reads at a time
SHARPNESS = 100.0  # what maps are multiplied by before they compete for a place


@dataclass(frozen=True)
class DynamicPrompt:
    """The weights of the three losses (paper, eq. 9), and for each the start ``beta`` and the length ``alpha`` of its
    threshold beta * exp(-i / alpha) at step i of 50 from the noisy end on (eq. 10; in other schedules i is scaled).

    At each step at most ``inner`` updates are made at ``rate``; none once every loss that counts is below its
    threshold. The values are the supplement's. With ``shared`` the nouns have one vector for all steps, which is what
    the paper compares its own with (section 3.1).
    """

    balance: float = 1.0
    disjoint: float = 0.05
    background: float = 0.05
    beta: tuple = (0.3, 0.9, 0.7)
    alpha: tuple = (25.0, 25.0, 50.0)
    inner: int = 21
    rate: float = 1e-3
    optimizer: str = ADAMW
    shared: bool = False

    @property
    def weights(self):
        return self.balance, self.disjoint, self.background

    def thresholds(self, step, steps):
        """Of the three losses at the 0-based ``step`` of ``steps``, counted from the noisy end."""
        i = step * null_text.PAPERS_STEPS / steps
        return tuple(beta * math.exp(-i / alpha) for beta, alpha in zip(self.beta, self.alpha, strict=True))


# ---- losses ------------------------------------------------------------------------------------------------------


def noun_maps(probabilities, nouns):
    """One picture's maps (W, N) of its nouns, each the sum of its tokens': ``probabilities`` (N, T), ``nouns`` W tuples
    of token positions."""
    return torch.stack([probabilities[:, list(at)].sum(-1) for at in nouns])


def balance_loss(probabilities, nouns, grid):
    """L_at (eq. 8): how far the noun that is seen least is from filling its best place, 0..1.

    As the papers' code has it, all text tokens but each chunk's first and last compete for a place (their shares,
    ``probabilities`` (N, T), times 100 in a softmax), and the maps are smoothed by a 3x3 Gaussian before their
    greatest value is taken. ``grid`` is (h, w) with h * w = N.
    """
    inside = [p for p in range(probabilities.shape[1]) if p % CHUNK not in (0, CHUNK - 1)]
    column = {p: i for i, p in enumerate(inside)}
    shares = (probabilities[:, inside] * SHARPNESS).softmax(-1)
    maps = noun_maps(shares, [[column[p] for p in at] for at in nouns]).unflatten(1, grid)
    return (1 - smoothed(maps).amax((1, 2))).clamp(min=0).amax()


def smoothed(maps):
    """Maps (W, h, w) under the 3x3 Gaussian of Attend-and-Excite's code, whose "sigma 0.5" is one of 0.71."""
    side = torch.exp(-torch.tensor([1.0, 0.0, 1.0])).to(maps)
    kernel = side[:, None] * side
    # A grid of one row or column has nothing to reflect.
    mode = "reflect" if min(maps.shape[1:]) > 1 else "replicate"
    padded = F.pad(maps[:, None], (1, 1, 1, 1), mode=mode)
    return F.conv2d(padded, (kernel / kernel.sum())[None, None])[:, 0]


def disjoint_loss(maps):
    """L_dj (eq. 6): the mean cosine of the maps (W, N) of two nouns, over all pairs, 0..1."""
    cosines = F.cosine_similarity(maps[:, None], maps[None], -1)
    first, second = torch.tril_indices(len(maps), len(maps), -1)
    return cosines[first, second].mean()


def background_loss(maps, outside):
    """L_bg (eq. 7): the mean cosine of each noun's map (W, N) with what it must not look at, ``outside`` (W, N)."""
    return F.cosine_similarity(maps, outside, -1).mean()


def losses(settings, probabilities, nouns, outside, grid):
    """The losses of one picture that count, by name.

    ``outside`` (W, N) in 0..1 is what each noun must not look at, or None. As in the paper a single noun has the
    background loss alone; a loss of weight 0 does not count.
    """
    maps, found = noun_maps(probabilities, nouns), {}
    if len(nouns) > 1 and settings.balance:
        found[BALANCE] = balance_loss(probabilities, nouns, grid)
    if len(nouns) > 1 and settings.disjoint:
        found[DISJOINT] = disjoint_loss(maps)
    if outside is not None and settings.background:
        found[BACKGROUND] = background_loss(maps, outside)
    return found


# ---- learning ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Task:
    """What is learned for each of B pictures: ``nouns``, W tuples of token positions a picture; ``outside``, (W, N) or
    None a picture; on the attention grid ``grid`` (h, w), N = h * w.
    """

    nouns: list
    outside: list
    grid: tuple


@dataclass(frozen=True, eq=False)
class Network:
    """The model, as four functions.

    ``text(picture, vectors)`` encodes a picture's prompt, (1, T, C), with its nouns' ``vectors`` (text encoder's name
    -> (R, width)) in place. Of the pictures numbered ``rows``, under ``texts`` (b, T, C), ``look(x, sigma, texts,
    rows)`` gives the cross-attention (b, N, T), ``clean`` the clean latent, and ``empty`` the same with the texts in
    the negative's place. All carry gradients where grad mode is on.
    """

    text: object
    look: object
    clean: object
    empty: object


@dataclass(frozen=True, eq=False)
class Progress:
    """What is learned so far: ``vectors``, for each step a dictionary (name -> (B, R, width)); ``nulls``, for each step
    (B, T, C), or empty where none are learned; ``x`` (B, C, h, w), where the drawing stands; ``seen`` (2, B, W, N), the
    nouns' maps under the words as they were and as learned, summed over steps; ``losses``, for each step and picture
    one dictionary an evaluation of losses by name, with those of null-text inversion behind them as "null-text".
    """

    vectors: list
    nulls: list
    x: torch.Tensor
    seen: torch.Tensor
    losses: list

    def __len__(self):
        return len(self.vectors)

    def tensors(self):
        """What a file keeps of it, beside the losses."""
        names = {f"vectors.{n}": torch.stack([v[n] for v in self.vectors]) for n in self.vectors[0]}
        nulls = {"nulls": torch.stack(self.nulls)} if self.nulls else {}
        return {**names, **nulls, "x": self.x, "seen": self.seen}

    @classmethod
    def restored(cls, tensors, losses):
        names = [name.removeprefix("vectors.") for name in tensors if name.startswith("vectors.")]
        steps = len(tensors["vectors." + names[0]])
        vectors = [{n: tensors["vectors." + n][i] for n in names} for i in range(steps)]
        return cls(vectors, list(tensors.get("nulls", ())), tensors["x"], tensors["seen"], losses)


def begin(latents, task):
    """The :class:`Progress` of a run that has not learned anything yet."""
    words, tokens = len(task.nouns[0]), task.grid[0] * task.grid[1]
    seen = torch.zeros(2, latents.shape[1], words, tokens)
    return Progress([], [], latents[0].float().clone(), seen, [])


def learn(settings, nulls, task, network, sigmas, latents, start, null, progress, report):
    """Yields the :class:`Progress` after each step that it still lacks (paper, algorithm 1).

    ``nulls`` are :class:`null_text.NullText` settings, or None to learn no null embeddings and draw without guidance;
    ``start`` (name -> (B, R, width)) the vectors that the text encoder has for the nouns; ``null`` (B or 1, T, C) the
    empty text's embedding. ``report(step, update, losses, clean, x)`` is called after every evaluation and update, with
    a dictionary of losses by name. Each picture of a batch has its own vectors and stops on its own.

    Raises FloatingPointError when a loss is not finite.
    """
    levels, pictures = [float(s) for s in sigmas], latents.shape[1]
    papers_steps = null_text.papers_count(levels)
    everyone = torch.arange(pictures, device=latents.device)
    null = null.float().expand(pictures, -1, -1)
    original = [{n: v[i].float() for n, v in start.items()} for i in range(pictures)]
    with torch.no_grad():
        unlearned = torch.cat([network.text(i, v) for i, v in enumerate(original)])
    if settings.shared:
        one, looks = _learn_shared(settings, task, network, levels, papers_steps, latents, original, report)
    for step in range(len(progress), len(levels) - 1):
        high, low, x = levels[step], levels[step + 1], progress.x
        if settings.shared:
            vectors, found = one, looks[step]
        else:
            given = [{n: v[i] for n, v in progress.vectors[-1].items()} for i in range(pictures)] if step else original
            vectors, found = _learn_vectors(settings, task, network, step, papers_steps, high, x, given, report)
        with torch.no_grad():
            texts = torch.cat([network.text(i, v) for i, v in enumerate(vectors)])
            seen = progress.seen + torch.stack(
                [_nouns_of(network.look(x, high, t, everyone), task) for t in (unlearned, texts)]
            ).to(progress.seen)
            clean = network.clean(x, high, texts, everyone)
        if nulls is None:
            learned, x = [], step_down(x, clean, high, low)
        else:
            first = progress.nulls[-1] if nulls.warm and step else null

            def tell(step, update, loss, clean, x):
                report(step, update, {"null-text": loss}, clean, x)

            null_now, x, null_losses = null_text.learn_step(
                nulls, network.empty, step, papers_steps, high, low, x, latents[step + 1], clean, first, tell
            )
            learned = [null_now]
            found = [a + [{"null-text": loss} for loss in b] for a, b in zip(found, null_losses, strict=True)]
        kept = {name: torch.stack([v[name] for v in vectors]) for name in original[0]}
        null_text.check_learned(step, x, *kept.values())
        progress = Progress(
            [*progress.vectors, kept], [*progress.nulls, *learned], x, seen, [*progress.losses, found]
        )  # fmt: skip
        yield progress


def _learn_shared(settings, task, network, levels, steps, latents, original, report):
    """The vectors that are right for all steps at once, a dictionary a picture, and the losses of each step. They are
    brought below each step's thresholds in turn, at the trajectory's own latents, since where the drawing stands
    depends on them."""
    vectors, looks = original, []
    for step, high in enumerate(levels[:-1]):
        vectors, found = _learn_vectors(settings, task, network, step, steps, high, latents[step], vectors, report)
        looks.append(found)
    return vectors, looks


def _nouns_of(probabilities, task):
    return torch.stack([noun_maps(p, at) for p, at in zip(probabilities, task.nouns, strict=True)])


def _learn_vectors(settings, task, network, step, steps, sigma, x, given, report):
    """One step's vectors, one dictionary a picture, and the losses at every evaluation."""
    leaves = [{n: v.detach().clone().requires_grad_() for n, v in mine.items()} for mine in given]
    parameters = [v for mine in leaves for v in mine.values()]
    optimizer = OPTIMIZERS[settings.optimizer](parameters, lr=settings.rate)
    limits = dict(zip(LOSSES, settings.thresholds(step, steps), strict=True))
    weights = dict(zip(LOSSES, settings.weights, strict=True))
    found = [[] for _ in leaves]
    active = list(range(len(leaves)))
    for update in range(settings.inner):
        rows = torch.tensor(active, device=x.device)
        with torch.enable_grad():
            texts = torch.cat([network.text(i, leaves[i]) for i in active])
            seen = network.look(x[rows], sigma, texts, rows)
            total, going_on = 0.0, []
            for i, probabilities in zip(active, seen, strict=True):
                parts = losses(settings, probabilities, task.nouns[i], task.outside[i], task.grid)
                values = {name: float(loss.detach()) for name, loss in parts.items()}
                if not all(map(math.isfinite, values.values())):
                    raise FloatingPointError(f"a loss of step {step + 1} is not a finite number")
                found[i].append(values)
                # The papers' code stops before the update that would follow.
                if any(value >= limits[name] for name, value in values.items()):
                    going_on.append(i)
                    total = total + sum(weights[name] * loss for name, loss in parts.items())
            active = going_on
            if not active:
                break
            optimizer.zero_grad()
            total.backward()
        for i in set(range(len(leaves))) - set(active):
            for leaf in leaves[i].values():
                leaf.grad = None  # nothing at all, or decay and momentum would move what has stopped
        optimizer.step()
        names = {name for i in active for name in found[i][-1]}
        shown = {name: sum(found[i][-1][name] for i in active) / len(active) for name in LOSSES if name in names}
        report(step, update, shown, None, x)
    return [{n: v.detach() for n, v in mine.items()} for mine in leaves], found
