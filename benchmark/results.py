"""The tables and the page of a benchmark, from its lines. It measures nothing itself."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from urllib.parse import quote

import jinja2
from PIL import Image, ImageDraw, ImageFont

SUCCESS = "success %"
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Results:
    """What was asked for and what came of it; keys are (sample's key, method's key).

    ``about`` is what to tell of the run, name -> text; ``samples`` and ``methods`` are those of datasets.py and
    prompts.py; ``pictures`` says where a picture lies, ``figures`` what was measured on it, name -> number or None
    where that does not apply; ``failed`` and ``not_applicable`` say why there is none. ``columns`` are all figures,
    name -> what it says, and ``why_not`` those that cannot be had, with the reason.
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

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(sample.kind for sample in self.samples))

    @property
    def names(self) -> list[str]:
        """The columns that at least one picture has."""
        had = {name for row in self.figures.values() for name, value in row.items() if value is not None}
        return [name for name in self.columns if name in had]

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
            counts = {
                "pictures": len(mine),
                "failed": sum(task in self.failed for task in tasks),
                "not applicable": sum(task in self.not_applicable for task in tasks),
            }
            rows.append({"method": method, "means": means, **counts, "missing": len(keys) - sum(counts.values())})
        return [row for row in rows if row["not applicable"] < len(keys)]

    def reasons(self, found: dict) -> list[tuple[str, str, int]]:
        """(method's name, reason, how many) of ``failed`` or ``not_applicable``."""
        names = {method.key: method.name for method in self.methods}
        counted = Counter((names[method], why) for (_, method), why in found.items() if method in names)
        return [(name, why, count) for (name, why), count in counted.items()]


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
        ["method", *results.names, *counts],
        [[row["method"].name, *map(number, row["means"].values()), *(row[name] for name in counts)] for row in rows],
    )


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
        ("Columns", [f"{name}: {results.columns[name]}" for name in results.names]),
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
    environment.filters |= {"number": number, "way": way}
    return environment.get_template("results.html.jinja").render(
        results=results, kinds=[None, *results.kinds], remarks=_remarks(results), counts=COUNTS
    )
