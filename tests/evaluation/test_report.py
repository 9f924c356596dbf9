from __future__ import annotations

import io

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from falcon_fast.evaluation.report import plot_curves, result_tables
from falcon_fast.training.records.metrics_file import MetricsFile

CHECK = {"value": 1.25, "threshold": 0.5, "ok": True, "backbone_value": None, "explanation": ""}
BAD = {"value": 0.1, "threshold": 0.5, "ok": False, "backbone_value": 0.25, "explanation": ""}


def result(probe):
    scores = {"probe": probe, "knn": probe, "nmi_kmeans": probe}
    checks = {"representation": CHECK, "dimensional": BAD, "cluster": CHECK, "intracluster": CHECK}
    trained = scores | {"nmi_codes": probe, "codes_used": 21, "collapse": checks}
    return {"raw_pixels": scores, "random_init": scores, "trained": trained}


def text(tables) -> str:
    out = io.StringIO()
    console = Console(file=out, width=80, markup=False)  # as the command line's, which prints paths
    for table in tables:
        console.print(table)
    return out.getvalue()


def test_tables_hold_three_rows_and_a_verdict_each():
    tables = result_tables(result(0.875))
    assert len(tables) == 2
    shown = text(tables)
    for piece in ("raw pixels", "random weights", "trained by FALCON", "0.875", "21"):
        assert piece in shown
    assert shown.count("COLLAPSED") == 1 and shown.count(" ok ") == 3
    assert "green" not in shown and max(map(len, shown.splitlines())) <= 80
    assert len(shown.splitlines()) == 18  # nothing wrapped


def test_without_labels_only_the_collapse_checks():
    assert len(result_tables(result(None))) == 1


def test_the_picture_shows_curves(tmp_path):
    def draw(name: str, rows: int) -> np.ndarray:
        with MetricsFile(tmp_path / f"{name}.csv") as file:
            for step in range(1, rows + 1):
                row = {
                    "step": step,
                    "epoch": step / 2,
                    "loss": 9.0 / step,
                    "prior": 1.0,
                    "invariance": 2.0,
                    "codes_used": step,
                }
                file.write(row | {"probe_accuracy": step / 10 if step % 2 else None})
        plot_curves(tmp_path / f"{name}.csv", tmp_path / f"{name}.png")
        return np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"))

    empty, full = draw("empty", 0), draw("full", 8)
    assert full.shape == empty.shape and full.shape[1] > 800
    assert (full != empty).mean() > 0.005
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.csv", "empty.png", "full.csv", "full.png"]


def test_what_could_not_be_measured_is_not_called_collapsed():
    unmeasured = result(0.875)
    reason = "not measurable: too few images (11; at least 20)"
    unmeasured["trained"]["collapse"]["dimensional"] = BAD | {"value": float("nan"), "explanation": reason}
    shown = text(result_tables(unmeasured))
    assert "COLLAPSED" not in shown and shown.count("not measured") == 1 and reason in shown


def test_what_was_not_measured_is_a_gap_and_qualities_share_an_axis(tmp_path, monkeypatch):
    """What matplotlib drew is read back."""
    drawn: list[Figure] = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), savefig(self, *a, **k)))
    with MetricsFile(tmp_path / "metrics.csv") as file:
        for step, accuracy, nmi in ((10, None, None), (20, 0.5, 0.25), (30, None, 0.375), (40, 0.75, None)):
            file.write({"step": step, "epoch": step / 16, "probe_accuracy": accuracy, "nmi_codes": nmi})
    plot_curves(tmp_path / "metrics.csv", tmp_path / "curves.png")
    losses, codes, quality = drawn[0].axes
    assert not losses.lines and not codes.lines and codes.get_ylim()[0] == 0
    points = {line.get_label(): [tuple(point) for point in line.get_xydata()] for line in quality.lines}
    assert points == {
        "online probe, test split": [(1.25, 0.5), (2.5, 0.75)],
        "NMI of the codes, test split": [(1.25, 0.25), (1.875, 0.375)],
    }
    assert quality.get_ylim() == (0, 1)
