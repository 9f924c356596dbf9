"""`falcon-fast replay` from outside."""

from __future__ import annotations

import csv
import json


def test_tables_and_the_verdict(finished, falcon_fast):
    directory, _ = finished
    with (directory / "metrics.csv").open() as file:
        row = next(csv.DictReader(file))
    code, out, err = falcon_fast("replay", directory, "--step", row["step"])
    assert code == 0 and not err
    assert f"loss {row['loss']} (" in out and f"metrics.csv has the loss {row['loss']} for it, the same" in out
    for piece in ("backbone.stem.0", "Conv2d", "projector.norm", "grad rms", "largest gradients", "are finite"):
        assert piece in out
    assert max(map(len, out.splitlines())) <= 200


def test_json_and_nothing_else(finished, falcon_fast):
    directory, _ = finished
    code, out, _ = falcon_fast("replay", directory, "--step", 5, "--json")
    found = json.loads(out)
    assert code == 0 and found["step"] == 5 and found["weights_of_step"] == 4 and found["bad"] is False
    assert found["culprit"] is None and len(found["images"]) == 64
    assert found["layers"][1]["forward"].keys() == {"minimum", "maximum", "rms", "non_finite", "entries"}


def test_mistakes_are_one_line(finished, falcon_fast, tmp_path):
    directory, _ = finished
    for arguments, piece in (
        ((tmp_path / "none", "--step", 1), "no such run"),
        ((directory, "--step", 10_000), "the run has the steps 1 to"),
        ((directory, "--step", 1, "--device", "tpu"), "tpu"),
        ((directory,), "--step"),
    ):
        code, _, err = falcon_fast("replay", *arguments)
        assert code == 2 and piece in err and "Traceback" not in err
