"""Every notebook runs from top to bottom: chapters at preset smoke, the others as they are."""
import pytest

from facebook_nb.cli import execute, has_code, is_written
from facebook_nb.files import read_json
from tests.conftest import ROOT

CHAPTERS = [n for n in sorted(ROOT.glob("nbs/chapters/*.ipynb")) if is_written(n)]
# foundations, and chapters of which only the method is written
OTHERS = [n for n in sorted(ROOT.glob("nbs/*/*.ipynb")) if has_code(n) and n not in CHAPTERS]


@pytest.mark.parametrize("notebook", CHAPTERS, ids=lambda p: p.stem)
def test_chapter_at_smoke(notebook, tmp_path):
    outcome = execute(notebook, tmp_path / notebook.name, {"preset": "smoke", "out_dir": str(tmp_path)}, threads=1)
    assert not outcome.error, f"{outcome.error}\n{outcome.cell}"
    metrics = read_json(tmp_path / "metrics.json")
    assert metrics["chapter"] == notebook.stem and metrics["preset"] == "smoke"
    for columns in metrics["metrics"].values():
        for cell in columns.values():
            assert set(cell) == {"mean", "std", "values"} and 1 <= len(cell["values"]) <= len(metrics["seeds"])
    assert metrics["claim"]["verdict"] in ("shown", "refuted", "undecided")
    assert {"text", "effect", "interval", "smallest_effect"} <= set(metrics["claim"])
    assert metrics["mechanism"] and metrics["steps"]
    assert {"config.json", "environment.json"} <= {p.name for p in tmp_path.iterdir()}


@pytest.mark.parametrize("notebook", OTHERS, ids=lambda p: p.stem)
def test_notebook(notebook, tmp_path):
    values = {"quick": True} if notebook.stem == "benchmarks" else {}
    outcome = execute(notebook, tmp_path / notebook.name, values, threads=1)
    assert not outcome.error, f"{outcome.error}\n{outcome.cell}"
