"""Blind rating of a benchmark's pictures by people. Run through ``python3 dev.py bench rate``.

    dev.py bench rate FOLDER                    FOLDER/rating.html, from the folder of a bench run: 1 to 6 on 4 scales
    dev.py bench rate FOLDER --choice           the one best picture of each sample instead
    dev.py bench rate FOLDER --read A.csv ...   the answers that came back: means or shares for each method

The page is one file with all its pictures, to be sent to raters. It names no method, shows them in an order of its own
for each sample, and keeps answers in the browser until they are saved as CSV. Which picture is whose is in
FOLDER/rating.key.json, which raters must not get. The scales are CPAM's user study's (object kept, background kept,
realism, satisfaction), the choice is Dynamic Prompt Learning's.
"""

import argparse
import base64
import csv
import hashlib
import json
import random
import sys
from pathlib import Path
from statistics import fmean, stdev

import jinja2

from .results import wilson

HERE = Path(__file__).parent
ABOUT, PAGE, KEY = "rating.json", "rating.html", "rating.key.json"
SCALES = {
    "object": "What should stay of the object has stayed",
    "background": "The background has stayed",
    "realism": "The picture looks real",
    "satisfaction": "The picture is what the text asks for",
}
SOURCE = "generated_source"  # draws no edit
CHOICE, POINTS = "best", 6
FIELDS = "rater", "sample", "picture", "question", "answer"


def about(samples, methods, pictures, folder: Path) -> dict:
    """What a rating page needs of a run, as JSON: captions and the ways to pictures below ``folder``. ``pictures`` is
    {(sample's key, method's key): path}; samples without a source picture or any edit are left out."""
    told = []
    for sample in samples:
        there = [m.key for m in methods if (sample.key, m.key) in pictures and m.key != SOURCE]
        edits = {key: str(pictures[sample.key, key]) for key in there}
        if sample.picture and edits:
            told.append({"key": sample.key, "source": sample.source, "target": sample.target,
                         "picture": str(sample.picture), "edits": edits})  # fmt: skip
    below = {str(path) for one in told for path in (one["picture"], *one["edits"].values())}
    ways = {path: Path(path).relative_to(folder).as_posix() if folder in Path(path).parents else path for path in below}
    for one in told:
        one["picture"] = ways[one["picture"]]
        one["edits"] = {key: ways[path] for key, path in one["edits"].items()}
    return {"methods": {method.key: method.name for method in methods}, "samples": told}


def shuffled(run: dict, seed: int, without: tuple = ()) -> tuple[list, dict]:
    """The samples in an order, each with its pictures in one of its own, and the key: picture's name -> [sample's key,
    method's key]. Names and orders depend on the seed and tell nothing of the method."""
    items, key = [], {}
    for number, sample in enumerate(run["samples"]):
        draw = random.Random(f"{seed} {sample['key']}")
        edits = [method for method in sample["edits"] if method not in without]
        draw.shuffle(edits)
        names = {}
        for method in edits:
            names[method] = hashlib.sha256(f"{draw.random()}".encode()).hexdigest()[:12]
            key[names[method]] = [sample["key"], method]
        if edits:
            pictures = [(names[method], sample["edits"][method]) for method in edits]
            items.append({"number": number, "sample": sample, "pictures": pictures})
    random.Random(seed).shuffle(items)
    return items, key


def page(folder: Path, items: list, choice: bool) -> str:
    """The rating page as HTML with all pictures inside."""

    def inside(way):
        return "data:image/png;base64," + base64.b64encode((folder / way).read_bytes()).decode()

    questions = {CHOICE: "The best edit"} if choice else SCALES
    loader = jinja2.FileSystemLoader(HERE)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["inside"] = inside
    name = hashlib.sha256(json.dumps([[n for n, _ in item["pictures"]] for item in items]).encode()).hexdigest()[:12]
    return environment.get_template("rating.html.jinja").render(
        items=items, questions=questions, choice=choice, points=range(1, POINTS + 1), name=name
    )


def read_answers(paths: list, key: dict) -> dict:
    """{question: {method's key: [answers]}} of CSV files. A rater's last answer to a question counts; of a choice each
    picture of the sample that was not chosen gets 0. Raises ValueError where a file is none of this key's."""
    found = {}
    for path in paths:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if not set(FIELDS) <= set(rows.fieldnames or ()):
                raise ValueError(f"{path} has not the columns {', '.join(FIELDS)}; give a file that the page saved.")
            for line, row in enumerate(rows, 2):
                if row["picture"] not in key:
                    raise ValueError(f"{path} line {line} names a picture of another page; give that one's folder.")
                top = 1 if row["question"] == CHOICE else POINTS
                known = row["question"] == CHOICE or row["question"] in SCALES
                if not known or row["answer"] not in map(str, range(1, top + 1)):
                    raise ValueError(
                        f"{path} line {line} answers {row['question']!r} by {row['answer']!r}; 1 to {top} is needed."
                    )
                sample, method = key[row["picture"]]
                one = sample if row["question"] == CHOICE else (sample, method)
                found[row["rater"], row["question"], one] = (sample, method, int(row["answer"]))
    answers = {}
    for (_, question, _), (sample, method, answer) in found.items():
        to = answers.setdefault(question, {})
        if question != CHOICE:
            to.setdefault(method, []).append(answer)
            continue
        for other in dict.fromkeys(m for s, m in key.values() if s == sample):
            to.setdefault(other, []).append(int(other == method))
    return answers


def mean_interval(values: list) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % interval by the normal distribution; those of a single value are the value."""
    mean = fmean(values)
    half = 1.96 * stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return mean, mean - half, mean + half


def table(answers: dict, names: dict) -> str:
    """Answers as Markdown, a row a method: scales as mean (95 % interval, count), choices as share."""
    lines = ["| method | " + " | ".join(answers) + " |", "|---" * (len(answers) + 1) + "|"]
    for method in dict.fromkeys(m for row in answers.values() for m in row):
        cells = []
        for question, row in answers.items():
            values = row.get(method)
            if not values:
                cells.append("")
            elif question == CHOICE:
                low, high = wilson(sum(values), len(values))
                share = 100 * sum(values) / len(values)
                cells.append(f"{share:.0f} % ({sum(values)} of {len(values)}, {100 * low:.0f} to {100 * high:.0f})")
            else:
                mean, low, high = mean_interval(values)
                cells.append(f"{mean:.2f} ({low:.2f} to {high:.2f}, {len(values)})")
        lines.append(f"| {names.get(method, method)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def load(path: Path, how: str) -> dict:
    if not path.is_file():
        raise ValueError(f"{path.parent} holds no {path.name}; {how}.")
    return json.loads(path.read_text(encoding="utf-8"))


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a bench run (its --out)")
    parser.add_argument("--choice", action="store_true", help="ask for the best picture instead of scales")
    parser.add_argument("--seed", type=int, default=0, help="of the orders and names")
    parser.add_argument("--without", nargs="+", default=[], metavar="METHOD", help="methods that are not shown")
    parser.add_argument("--read", nargs="+", type=Path, default=[], metavar="CSV", help="answers to gather")
    args = parser.parse_args(argv)
    try:
        run = load(args.folder / ABOUT, "run bench run with it as --out once more, which draws nothing again")
        if args.read:
            key = load(args.folder / KEY, "make the page first, by bench rate without --read")
            sys.stdout.write(table(read_answers(args.read, key), run["methods"]) + "\n")
            return
        items, key = shuffled(run, args.seed, tuple(args.without))
        (args.folder / PAGE).write_text(page(args.folder, items, args.choice), encoding="utf-8")
        (args.folder / KEY).write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")
        sys.stdout.write(f"Send {args.folder / PAGE} to raters, and keep {KEY} to yourself.\n")
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
