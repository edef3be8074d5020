"""The tables and the page of a benchmark, from its lines. It measures nothing itself."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from urllib.parse import quote

import jinja2
from PIL import Image, ImageDraw, ImageFont

SUCCESS, SECONDS, RANK = "success %", "seconds", "rank"
# What the rank is made of: beside true edits MaSaFusion's own five figures (table 1), elsewhere PIE-Bench's seven.
RANKED_BESIDE_TRUTH = "L1", "L2", "CLIP-I", "DINO", "CLIP-T"
RANKED_ELSEWHERE = "structure distance", "PSNR", "LPIPS", "MSE", "SSIM", "CLIP score", "CLIP score edited"
NOT_RANKED = "autoencoder", "truth", "generated_source"  # methods that edit nothing
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Results:
    """What was asked for and what came of it; keys are (sample's key, method's key).

    ``about`` is what to tell of the run, name -> text; ``samples`` and ``methods`` are those of datasets.py and
    prompts.py; ``pictures`` says where a picture lies, ``figures`` what was measured on it, name -> number or None
    where that does not apply; ``failed`` and ``not_applicable`` say why there is none. ``columns`` are all figures,
    name -> what it says, and ``why_not`` those that cannot be had, with the reason. ``seconds`` is how long each
    picture took, ``sets`` what was measured on all pictures of a method together: method's key -> name -> number.
    """

    about: dict
    samples: list
    methods: list
    columns: dict
    why_not: dict = field(default_factory=dict)
    problems: list = field(default_factory=list)
    pictures: dict = field(default_factory=dict)
    figures: dict = field(default_factory=dict)
    failed: dict = field(default_factory=dict)
    not_applicable: dict = field(default_factory=dict)
    seconds: dict = field(default_factory=dict)
    sets: dict = field(default_factory=dict)

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(sample.kind for sample in self.samples))

    @property
    def names(self) -> list[str]:
        """The columns that at least one picture has."""
        had = {name for row in self.figures.values() for name, value in row.items() if value is not None}
        return [name for name in self.columns if name in had]

    @property
    def ranked(self) -> list[str]:
        """The figures that the rank is made of: those of one paper's table that were had here."""
        beside = any(name in self.names for name in ("L1", "L2"))
        return [name for name in (RANKED_BESIDE_TRUTH if beside else RANKED_ELSEWHERE) if name in self.names]

    def shown(self, kind: str | None = None) -> list[str]:
        """The columns of a table: the figures of single pictures, of a method's whole set, the rank and the seconds."""
        whole = {name for row in self.sets.values() for name in row} if kind is None else set()
        names = self.names + [name for name in self.columns if name in whole]
        names += [RANK] * bool(self.ranked and len(self.methods) > 1) + [SECONDS] * bool(self.seconds)
        return names

    def table(self, kind: str | None = None) -> list[dict]:
        """For each method its name and paper, the means of its figures over the samples, or those of a kind of edit,
        and how many pictures there are, failed, do not apply or are still missing."""
        keys = [sample.key for sample in self.samples if kind in (None, sample.kind)]
        rows = []
        for method in self.methods:
            tasks = [(key, method.key) for key in keys]
            mine = [self.figures.get(task, {}) for task in tasks if task in self.pictures]
            means = {}
            for name in self.names:
                values = [row[name] for row in mine if row.get(name) is not None]
                means[name] = fmean(values) if values else None
            whole = self.sets.get(method.key, {})
            means |= {name: whole.get(name) for name in self.shown(kind) if name not in means}
            if took := [self.seconds[task] for task in tasks if task in self.seconds and task in self.pictures]:
                means[SECONDS] = median(took)
            counts = {
                "pictures": len(mine),
                "failed": sum(task in self.failed for task in tasks),
                "not applicable": sum(task in self.not_applicable for task in tasks),
            }
            tried = [row[SUCCESS] for row in mine if row.get(SUCCESS) is not None]
            row = {"method": method, "means": means, "tried": len(tried), "shown": sum(value > 50 for value in tried)}
            rows.append({**row, **counts, "missing": len(keys) - sum(counts.values())})
        rivals = [row for row in rows if row["method"].key not in NOT_RANKED]
        for name, ranks in average_ranks([{n: row["means"][n] for n in self.ranked} for row in rivals], self.columns):
            rivals[name]["means"][RANK] = ranks
        return [row for row in rows if row["not applicable"] < len(keys)]

    def reasons(self, found: dict) -> list[tuple[str, str, int]]:
        """(method's name, reason, how many) of ``failed`` or ``not_applicable``."""
        names = {method.key: method.name for method in self.methods}
        counted = Counter((names[method], why) for (_, method), why in found.items() if method in names)
        return [(name, why, count) for (name, why), count in counted.items()]


def average_ranks(rows: list[dict], columns: dict) -> list[tuple[int, float | None]]:
    """(place in ``rows``, averaged rank) of methods, as MaSaFusion's table 1 has it.

    ``rows`` are name -> mean or None. By each figure the best method has rank 1; what a figure is good for is read in
    ``columns``: its text says "lower is better" or "higher is better". Equal means share the mean of their ranks. A
    method is not ranked by a figure that it lacks, nor does it take a place there; without any its rank is None.
    """
    found = [[] for _ in rows]
    for name in rows[0] if rows else ():
        sign = 1 if "lower is better" in columns[name] else -1
        values = [(place, sign * row[name]) for place, row in enumerate(rows) if row[name] is not None]
        for place, value in values:
            better = sum(other < value for _, other in values)
            equal = sum(other == value for _, other in values)
            found[place].append(better + (equal + 1) / 2)
    return [(place, fmean(ranks) if ranks else None) for place, ranks in enumerate(found)]


def wilson(successes: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share of ``count`` > 0 tries, (low, high) in 0..1 (Wilson 1927)."""
    share, spread = successes / count, z * z / count
    middle, half = share + spread / 2, z * (share * (1 - share) / count + spread / (4 * count)) ** 0.5
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def interval(row: dict) -> str:
    """How many of how many pictures of a row of the table show the edit, and the interval of that in %."""
    if not row["tried"]:
        return ""
    low, high = wilson(row["shown"], row["tried"])
    return f"{row['shown']} of {row['tried']}, {100 * low:.0f} to {100 * high:.0f}"


COUNTS = "pictures", "failed", "not applicable", "missing"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def _lines(head, rows):
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in cells)


def _markdown_table(results, kind):
    rows = results.table(kind)
    counts = [name for name in COUNTS if name == "pictures" or any(row[name] for row in rows)]
    return _lines(
        ["method", *results.shown(kind), *counts],
        [[row["method"].name, *_cells(row, results.shown(kind)), *(row[name] for name in counts)] for row in rows],
    )


def _cells(row, names):
    cells = {name: number(row["means"].get(name)) for name in names}
    if cells.get(SUCCESS):
        cells[SUCCESS] += f" ({interval(row)})"
    return cells.values()


def _says(results):
    """What each column says, by its name."""
    says = {name: results.columns[name] for name in results.shown() if name in results.columns}
    if SUCCESS in says:
        says[SUCCESS] += "; in brackets how many pictures, and the 95 % interval (Wilson's)"
    if RANK in results.shown():
        says[RANK] = (
            f"mean of a method's ranks by {', '.join(results.ranked)}, 1 is the best; equal means share their ranks, "
            "and by a figure that it lacks a method is not ranked; each is judged by its own pictures, of which some "
            "methods have fewer; what edits nothing is not ranked"
        )
    if SECONDS in results.shown():
        says[SECONDS] = (
            "median on the server for a picture; a method that begins as the one drawn before it does not compute that "
            "again, so compare speeds by bench time"
        )
    return says


def markdown(results: Results, sheet: str) -> str:
    """The results as a page of Markdown, beside which lies the :func:`sheet` of this name."""
    parts = ["# Results", "\n".join(f"- {name}: {text}" for name, text in results.about.items())]
    parts += ["## All kinds of edits", _markdown_table(results, None)]
    if len(results.kinds) > 1 and results.names:
        first, found = results.names[0], {kind: results.table(kind) for kind in results.kinds}
        means = {(r["method"].key, kind): r["means"][first] for kind, rows in found.items() for r in rows}
        lines = [[m.name, *(number(means.get((m.key, k))) for k in results.kinds)] for m in results.methods]
        parts += [f"## {first}, by kind of edit", _lines(["method", *results.kinds], lines)]
        for kind in results.kinds:
            parts += [f"## Kind: {kind}", _markdown_table(results, kind)]
    parts += ["## The first sample of each kind", f"![sources, true edits and what each method made of them]({sheet})"]
    about = [[method.name, method.paper, method.note] for method in results.methods]
    parts += ["## The methods", _lines(["method", "paper", "note"], about)]
    for head, sentences in _remarks(results):
        parts += [f"## {head}", "\n".join(f"- {sentence}" for sentence in sentences)]
    return "\n\n".join(parts) + "\n"


def _remarks(results):
    """(heading, sentences) of what the columns say, and of what is not there and why."""
    remarks = [
        ("Columns", [f"{name}: {text}" for name, text in _says(results).items()]),
        ("Columns that could not be had", [f"{name}: {why}" for name, why in results.why_not.items()]),
        ("Data that was left out", results.problems),
        ("Pictures that failed", [f"{n} x {name}: {why}" for name, why, n in results.reasons(results.failed)]),
        ("Not applicable", [f"{n} x {name}: {why}" for name, why, n in results.reasons(results.not_applicable)]),
    ]
    return [(head, sentences) for head, sentences in remarks if sentences]


def sheet(results: Results, side: int = 96) -> Image.Image:
    """The first sample of each kind of edit, a column each: its source, its true edit and every method's."""
    firsts = [next(sample for sample in results.samples if sample.kind == kind) for kind in results.kinds]
    rows = {"source": [s.picture for s in firsts], "true edit": [s.truth for s in firsts]}
    rows |= {m.name: [results.pictures.get((s.key, m.key)) for s in firsts] for m in results.methods}
    font, left, top = ImageFont.load_default(13), 230, 24
    out = Image.new("RGB", (left + side * len(firsts), top + side * len(rows)), "white")
    pen = ImageDraw.Draw(out)
    for column, kind in enumerate(results.kinds):
        pen.text((left + side * column + 4, 4), kind, "black", font)
    for row, (name, paths) in enumerate(rows.items()):
        pen.text((6, top + side * row + side // 2 - 8), name, "black", font)
        for column, path in enumerate(paths):
            if path:
                with Image.open(path) as picture:
                    tile = picture.convert("RGB").resize((side - 2, side - 2), Image.Resampling.LANCZOS)
                out.paste(tile, (left + side * column, top + side * row))
    return out


def html(results: Results, folder: Path) -> str:
    """The results as one page that lies in ``folder``. It loads the pictures by their way from there, and no more."""

    def way(path):
        return quote(Path(os.path.relpath(path, folder)).as_posix())

    loader = jinja2.FileSystemLoader(HERE)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"number": number, "way": way, "interval": interval}
    return environment.get_template("results.html.jinja").render(
        results=results, kinds=[None, *results.kinds], remarks=_remarks(results), counts=COUNTS, says=_says(results)
    )
