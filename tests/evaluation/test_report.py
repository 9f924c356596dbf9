"""The tables and the picture of a run: every figure in the place that its heading says."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from falcon_fast.evaluation.report import plot_curves, result_tables
from falcon_fast.training.records.metrics_file import COLUMNS, MetricsFile

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


def cells(table) -> list[list[str]]:
    """The rows of a table, headings first."""
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    return [list(row) for row in zip(*columns, strict=True)]


def test_every_figure_stands_in_its_column():
    def row(k: int) -> dict[str, float]:
        return {"probe": k + 0.1, "knn": k + 0.2, "nmi_kmeans": k + 0.3}

    def check(k: int) -> dict[str, object]:
        return {"value": k + 0.5, "backbone_value": k + 0.6, "threshold": k + 0.7, "ok": k % 2 == 0, "explanation": ""}

    names = ("representation", "dimensional", "cluster", "intracluster")
    trained = row(3) | {
        "nmi_codes": 3.4,
        "codes_used": 17,
        "collapse": {name: check(k) for k, name in enumerate(names)},
    }
    comparison, collapse = result_tables({"raw_pixels": row(1), "random_init": row(2), "trained": trained})
    assert cells(comparison) == [
        ["", "probe", "kNN", "NMI k-means", "NMI codes", "codes"],
        ["raw pixels", "1.100", "1.200", "1.300", "", ""],
        ["random weights", "2.100", "2.200", "2.300", "", ""],
        ["trained by FALCON", "3.100", "3.200", "3.300", "3.400", "17"],
    ]
    assert cells(collapse) == [
        ["", "embeddings", "backbone", "must exceed", "verdict"],
        ["representation (energy)", "0.500", "0.600", "0.700", "ok"],
        ["dimensional (effective rank)", "1.500", "1.600", "1.700", "COLLAPSED"],
        ["cluster (code perplexity)", "2.500", "2.600", "2.700", "ok"],
        ["intra-cluster (log spread)", "3.500", "3.600", "3.700", "COLLAPSED"],
    ]


def test_every_curve_is_its_own_column(tmp_path, monkeypatch: pytest.MonkeyPatch):
    from matplotlib.figure import Figure

    shown: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (shown.append(self), save(self, *a, **k))[1])
    with MetricsFile(tmp_path / "metrics.csv") as file:
        for step in (1, 2, 3):  # every column has values of its own
            file.write({name: 10.0 * k + step for k, name in enumerate(COLUMNS)} | {"step": step, "epoch": step / 2})
    plot_curves(tmp_path / "metrics.csv", tmp_path / "curves.png")
    (figure,) = shown
    expected = {
        "loss (nats)": {"loss": "loss", "prior": "prior", "invariance": "invariance"},
        "codes in use": {"in a batch": "codes_used", "on the test split": "test_codes_used"},
        "against labels": {"online probe, test split": "probe_accuracy", "NMI of the codes, test split": "nmi_codes"},
    }
    assert [axes.get_title() for axes in figure.axes] == list(expected)
    for axes in figure.axes:
        columns = expected[axes.get_title()]
        assert [line.get_label() for line in axes.lines] == list(columns)
        assert {text.get_text() for text in axes.get_legend().get_texts()} == set(columns)
        assert axes.get_xlabel() == "epoch"
        for line in axes.lines:
            base = 10.0 * COLUMNS.index(columns[line.get_label()])
            assert list(line.get_xdata()) == [0.5, 1.0, 1.5] and list(line.get_ydata()) == [
                base + 1,
                base + 2,
                base + 3,
            ]


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
