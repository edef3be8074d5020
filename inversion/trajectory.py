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


def one_text(conditioning, what):
    """The only (tensor, dictionary) of a CONDITIONING. Raises ValueError for several or none."""
    if len(conditioning) != 1:
        raise ValueError(
            f"The {what} conditioning holds {len(conditioning)} texts, but null embeddings stand in for exactly one; "
            f"connect one CLIP Text Encode to {what}, without Conditioning (Combine)."
        )
    return conditioning[0]


def check_same_model(trajectory, header):
    """Raises ValueError when a trajectory was made with another model than ``header`` describes."""
    for key, what in (
        ("family", "model family"),
        ("latent_format", "latent format"),
        ("prediction", "prediction type"),
    ):
        if trajectory.header[key] != header[key]:
            raise ValueError(
                f"The TRAJECTORY was made with {what} {trajectory.header[key]}, but the MODEL is {header[key]}; "
                "invert the picture again with the MODEL that is connected here, or connect the one it was made with."
            )
    ours, theirs = torch.tensor(trajectory.header["weights"]), torch.tensor(header["weights"])
    # Loose enough for one checkpoint in two precisions, tight enough to tell two checkpoints apart.
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=0.02, atol=1e-3):
        raise ValueError(
            "The TRAJECTORY was made with another checkpoint than the MODEL's; invert the picture again with the MODEL "
            "that is connected here, or connect the one it was made with."
        )


def check_whole(trajectory, node):
    """Raises ValueError for a trajectory without the conditioning it was made under, which ``node`` needs."""
    if not trajectory.conditioning:
        raise ValueError(f"The TRAJECTORY holds no conditioning, but {node} needs the one it was made under.")
