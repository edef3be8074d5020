"""A trajectory: a finished deterministic run, kept as a plain value. Knows nothing of attention. torch only."""

from dataclasses import dataclass, field

import torch

NULL_CFG = "attune_null_cfg"  # in a conditioning's dictionary: the cfg that null-text embeddings were learned for


@dataclass(frozen=True, eq=False)
class LearnedWords:
    """Words of ``prompt`` whose vectors were learned anew at each step: their ``words`` and the ``positions`` of their
    tokens in the text embedding, a tuple each; ``vectors``, text encoder's name -> (S, B, R, width), fp32, what it
    reads for the R tokens of all words in order.
    """

    prompt: str
    words: tuple
    positions: tuple
    vectors: dict

    def by_position(self):
        """The vectors as text encoder's name -> token position -> (S, B, width)."""
        tokens = [p for at in self.positions for p in at]
        return {name: dict(zip(tokens, rows.unbind(2), strict=True)) for name, rows in self.vectors.items()}

    def word(self, text, step, picture):
        """The vectors of one word, text encoder's name -> (pieces, width), of a 0-based ``step`` or, where it is None,
        their mean over steps. ``text`` "" means the first. Raises ValueError for what is not there."""
        text = text.strip() or self.words[0]
        if text not in self.words:
            raise ValueError(
                f'The word "{text}" is none of those that were learned: {", ".join(self.words)}; choose one of them in '
                "Attune Save Learned Word."
            )
        steps, pictures = next(iter(self.vectors.values())).shape[:2]
        for name, value, count in (("step", step or 0, steps), ("picture", picture, pictures)):
            if value >= count:
                raise ValueError(
                    f"The {name} is {value}, but the TRAJECTORY has {count}, counted from 0; choose another in Attune "
                    "Save Learned Word."
                )
        at, found = self.words.index(text), {}
        for name, rows in self.by_position().items():
            pieces = torch.stack([rows[p][:, picture] for p in self.positions[at]], 1)
            found[name] = pieces.mean(0) if step is None else pieces[step]
        return found


@dataclass(frozen=True, eq=False)
class Trajectory:
    """``sigmas`` (S+1,) run from noise to picture; ``latents`` (S+1, B, C, h, w) are fp32 on the CPU, in the model's
    own scale (the host's latent times the format's factor), where x = x0 + sigma * eps.

    ``steps`` is the number of steps as the method's paper counts them: S, or S + 1 on a grid that ends in a step onto
    itself. ``header`` says what made it, in values that JSON holds: model (see :func:`host.describe_model`), method,
    options, prompt. ``conditioning`` is the stock list that it was made under, ``negative`` the one of the empty or
    negative text where one took part. ``nulls`` (S, B or 1, T, C), fp32, hold what stands in the negative's place at
    each step, if that was learned, and ``learned`` the vectors of words, if they were; ``windows`` (S+1,) are then the
    shares of the model's schedule between which each holds.
    """

    sigmas: torch.Tensor
    latents: torch.Tensor
    steps: int
    header: dict = field(default_factory=dict)
    conditioning: list = field(default_factory=list)
    negative: list = field(default_factory=list)
    nulls: torch.Tensor | None = None
    windows: tuple = ()
    learned: LearnedWords | None = None

    @property
    def noise(self):
        return self.latents[0]


def step_conditioning(embeddings, windows, extras):
    """A stock CONDITIONING list in which each step has its own text.

    ``embeddings`` (S, B or 1, T, C); ``windows`` (S+1,) rise from 0 to 1, edges lie between the sampled noise levels
    (both ends of a window count, so on a level two would hold at once); ``extras`` goes into every entry.
    """
    edges = zip(windows[:-1], windows[1:], strict=True)
    return [
        [embedding, {**extras, "start_percent": start, "end_percent": end}]
        for embedding, (start, end) in zip(embeddings, edges, strict=True)
    ]


def negative_of(trajectory):
    """What belongs into a sampler's negative when this trajectory is drawn again, or [] where it holds none."""
    if trajectory.nulls is None:
        return trajectory.negative
    extras = trajectory.negative[0][1]
    if (cfg := trajectory.header.get("null_text_guidance")) is not None:
        extras = {**extras, NULL_CFG: cfg}
    return step_conditioning(trajectory.nulls, trajectory.windows, extras)


def one_text(conditioning, what, remedy):
    """The only (tensor, dictionary) of a CONDITIONING. Raises ValueError for several or none; ``remedy`` says where to
    connect another."""
    if len(conditioning) != 1:
        raise ValueError(
            f"The {what} conditioning holds {len(conditioning)} texts, but null embeddings and learned words stand in "
            f"for exactly one; {remedy}, without Conditioning (Combine) and without a scheduled hook on its CLIP."
        )
    return conditioning[0]


# How far apart the weights of two models may be, as :func:`weight_distance` says, before it is told, and refused.
# Measured on the demo model, by how far the picture is off that is sampled from an inversion with another's weights: at
# 0.002 (a merge with 0.1 % of another checkpoint) by 1 %, as with its own; at 0.016 (1 %) by 10 %; at 0.029 (2 %) by
# 21 %; at 0.06 (5 %) by 63 %. The same weights in fp16, bf16 and fp8 are 0 apart.
TOLD, REFUSED = 0.005, 0.03
# How far apart the timesteps of two models may be at one noise level, as a share of their range: a table of 50 levels
# rounds by half a level, 0.01, and at the lowest by a whole one.
SAME_STEPS = 0.025
# How far apart two texts of one caption may be, as :func:`text_distance` says, before it is told. Measured on the demo
# model's CLIP: 0.003 where one is in bf16, 0.05 in fp8 (e4m3), 0.09 in fp8 (e5m2), 0.02 to 0.16 with LoRAs that move
# each weight by 5 to 20 %; 0.31 to 0.41 under CLIP skip 2, 1.7 with another CLIP. So a LoRA is only told where nothing
# is in fp8.
ANOTHER_TEXT, ANOTHER_FP8_TEXT = 0.03, 0.2


def check_same_model(trajectory, header):
    """What to tell of a model that ``header`` describes and that is nearly the one a trajectory was made with, or "".
    Raises ValueError when it is another model.

    Of a LoRA on either nothing is said: editing with one that the inversion did not have is common.
    """
    made = trajectory.header
    for key, what in (
        ("family", "model family"),
        ("latent_format", "latent format"),
        ("prediction", "prediction type"),
    ):
        if made[key] != header[key]:
            raise ValueError(
                f"The TRAJECTORY was made with {what} {made[key]}, but the MODEL is {header[key]}; "
                "invert the picture again with the MODEL that is connected here, or connect the one it was made with."
            )
    apart = weight_distance(made, header)
    if apart > REFUSED:
        raise ValueError(
            "The TRAJECTORY was made with another checkpoint or merge than the MODEL's; invert the picture again with "
            "the MODEL that is connected here, or connect the one it was made with."
        )
    if apart > TOLD:
        return (
            "The MODEL's weights are a little off those that the TRAJECTORY was made with, as after a merge, so the "
            "source is reconstructed less exactly; invert the image again with the MODEL that is connected here."
        )
    # Headers of older versions do not tell how their models sample.
    ours, theirs = made.get("sampling"), header.get("sampling")
    if None not in (ours, theirs) and (ours != theirs or not _same_timesteps(made, header)):
        now = "other noise levels" if ours == theirs else f"{theirs} sampling in the place of {ours}"
        return (
            f"The MODEL has {now} since the TRAJECTORY was made, so the source is reconstructed less exactly; "
            "invert the image again with the MODEL that is connected here, or take the Model Sampling node before it "
            "out."
        )
    return ""


def coarsest(dtypes):
    """Of the names of torch's floating dtypes, the one with the fewest digits."""
    return max(sorted(dtypes), key=lambda name: torch.finfo(getattr(torch, name)).eps)


def weight_distance(one, other):
    """How far apart the weights are that two headers tell of, from 0 to 1: the mean of |a - b| / (|a| + |b|), without
    what the rounding to each one's dtype explains; 1 where they are not as many."""
    key = "probes" if "probes" in one and "probes" in other else "weights"
    if len(one[key]) != len(other[key]):
        return 1.0
    both = [pair for pair in zip(one[key], other[key], strict=True) if None not in pair]
    if not both:
        return 0.0  # quantised beyond reading: nothing says that it is another
    a, b = torch.tensor(both, dtype=torch.float64).T
    rounding = 0.0
    for numbers, header in ((a, one), (b, other)):
        # Older headers do not say their dtype; it was seldom coarser than this.
        kind = torch.finfo(getattr(torch, header.get("dtype", "bfloat16")))
        # A number that is exact in neither may lie half a step of each away from it.
        rounding = rounding + kind.eps / 2 * numbers.abs().clamp(min=kind.tiny)
    apart = ((a - b).abs() - 1.01 * rounding).clamp(min=0)
    return float((apart / (a.abs() + b.abs()).clamp(min=1e-12)).mean())


def _same_timesteps(one, other):
    ours, theirs = torch.tensor(one["timesteps"]), torch.tensor(other["timesteps"])
    if ours.shape != theirs.shape:
        return False
    return float((ours - theirs).abs().max()) <= SAME_STEPS * float(theirs.max() - theirs.min())


def text_distance(trajectory, conditioning):
    """How far the CONDITIONING of a trajectory's own caption is from the one that it was made under: the mean
    difference of their numbers over the mean of their sizes; 0 where they cannot be compared one to one."""
    ours, theirs = ([text for text, _ in one] for one in (trajectory.conditioning, conditioning))
    if [text.shape for text in ours] != [text.shape for text in theirs]:
        return 0.0
    pairs = ((a.float().cpu(), b.float().cpu()) for a, b in zip(ours, theirs, strict=True))
    return max((float((a - b).abs().mean() / a.abs().mean().clamp(min=1e-6)) for a, b in pairs), default=0.0)


def check_whole(trajectory, node):
    """Raises ValueError for a trajectory without the conditioning it was made under, which ``node`` needs."""
    if not trajectory.conditioning:
        raise ValueError(f"The TRAJECTORY holds no conditioning, but {node} needs the one it was made under.")
