"""Every notebook runs from top to bottom: chapters at preset smoke, the others as they are."""
from importlib.util import find_spec

import pytest

from facebook_nb.cli import execute, has_code, is_written
from facebook_nb.files import read_json
from tests import warm
from tests.conftest import ROOT
from tests.test_book import CHROMIUM
from tests.test_portable import portable, waiting

CHAPTERS = [n for n in sorted(ROOT.glob("nbs/chapters/*.ipynb")) if is_written(n)]
LAB = ("cmr", "sdd_fiqa")       # test_lab.py runs these as a reader does, where there is a browser
HERE = [n for n in CHAPTERS if n.stem not in LAB or not CHROMIUM or not find_spec("jupyterlab")]
# foundations, and chapters of which only the method is written
OTHERS = [n for n in sorted(ROOT.glob("nbs/*/*.ipynb")) if has_code(n) and n not in CHAPTERS]


@pytest.fixture(autouse=True)
def kernels_start_warm(monkeypatch):
    monkeypatch.setattr("jupyter_client.provisioning.local_provisioner.launch_kernel", warm.Kernel)


@pytest.mark.parametrize("notebook", HERE, ids=lambda p: p.stem)
def test_chapter_at_smoke(notebook, tmp_path):
    outcome = execute(notebook, tmp_path / notebook.name, {"preset": "smoke", "out_dir": str(tmp_path)}, threads=1)
    assert not outcome.error, f"{outcome.error}\n{outcome.cell}"
    assert_ran(tmp_path / notebook.name, tmp_path)


def assert_ran(notebook, folder):
    """The run that `notebook` did in `folder` left all it should, and the notebook shows it; returns its metrics."""
    metrics = read_json(folder / "metrics.json")
    assert metrics["chapter"] == notebook.stem and metrics["preset"] == "smoke"
    for columns in metrics["metrics"].values():
        for cell in columns.values():
            assert set(cell) == {"mean", "std", "values"} and 1 <= len(cell["values"]) <= len(metrics["seeds"])
    assert metrics["claim"]["verdict"] in ("shown", "refuted", "undecided")
    assert {"text", "effect", "interval", "smallest_effect"} <= set(metrics["claim"])
    assert metrics["mechanism"] and metrics["steps"]
    assert {"config.json", "environment.json"} <= {p.name for p in folder.iterdir()}
    assert_shows_this_run(notebook, metrics)
    return metrics


def assert_shows_this_run(notebook, metrics):
    """The prose has the run's numbers, also that above the cell which hands them over; figures have their captions."""
    cells = [c for c in read_json(notebook)["cells"] if c["cell_type"] == "code"]
    prose = [c for c in cells if portable.is_prose("".join(c["source"]))]
    assert not [c["id"] for c in prose if waiting(c)]
    assert metrics["claim"]["verdict"] in portable.prose_of(prose[0])
    for cell in cells:
        if (figure := portable.figure_of("".join(cell["source"]))) and "def figure(" not in "".join(cell["source"]):
            kinds = [kind for output in cell["outputs"] for kind in output.get("data", {})]
            drawn = any(kind.startswith("image/") for kind in kinds)
            assert drawn == any(map(portable.is_caption, cell["outputs"])), figure["name"]


@pytest.mark.parametrize("notebook", OTHERS, ids=lambda p: p.stem)
def test_notebook(notebook, tmp_path):
    values = {"quick": True} if notebook.stem == "benchmarks" else {}
    outcome = execute(notebook, tmp_path / notebook.name, values, threads=1)
    assert not outcome.error, f"{outcome.error}\n{outcome.cell}"
