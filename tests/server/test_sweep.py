"""A sweep on a real server: a workflow as it is, and a method that is measured."""

import csv
import io

import numpy as np
from PIL import Image

from attune.benchmark import sweep


def swept(server, out, *words):
    args = sweep.parser_of().parse_args([*words, "--servers", server.url, "--out", str(out)])
    return sweep.sweep(args)


def test_a_word_fades_with_its_weight(server, tmp_path):
    fader = str(sweep.ROOT / "benchmark" / "fader.workflow.json")
    told = "--set", "Attune Prompt Reweight/weights", "--as", "red: {}", "--values", "1", "-2", "nonsense"
    found = swept(server, tmp_path, fader, *told, "--with", "Attune DDIM Inversion/steps=6")
    (row,) = found.rows
    first, other = (np.asarray(Image.open(path).convert("RGB"), float) for _, path in row[:2])
    change = found.figures[sweep.CHANGE]
    assert change[0] == [0.0] and abs(change[1][0] - 100 * np.abs(first - other).mean() / 255) < 1e-3
    assert change[1][0] > 0.5
    assert row[2][1] is None and change[2] == [] and "nonsense" in found.failed[0]
    assert sweep.draw_sheet(found, 64).width > 3 * 64


def test_a_method_is_measured_at_every_value_and_goes_on_where_it_was(server, tmp_path):
    told = "p2p_ddim", "--set", "Attune Prompt Swap/cross_end", "--values", "0", "1"
    told += "--data", "demo", "--count", "1", "--kinds", "colour", "--steps", "2"
    found = swept(server, tmp_path, *told)
    lines = list(csv.DictReader(io.StringIO(sweep.as_csv(found))))
    assert {(line["value"], line["n"]) for line in lines} == {("0", "1"), ("1", "1")}
    kept = {line["value"]: float(line["mean"]) for line in lines if line["figure"] == "PSNR kept"}
    assert len(kept) == 2 and kept["0"] != kept["1"]
    assert [label for label, _ in found.rows[0]] == ["source", "true edit", "0", "1"]
    drawn = (tmp_path / "drawn.jsonl").read_bytes()
    again = swept(server, tmp_path, *told)
    assert again.figures == found.figures and (tmp_path / "drawn.jsonl").read_bytes() == drawn
