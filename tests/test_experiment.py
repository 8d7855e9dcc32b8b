"""Settings, run folders, reports and digests."""
import json
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import pytest
import torch
from pydantic import Field

from facebook_nb import experiment
from facebook_nb.experiment import (
    Claim,
    Report,
    RunFolder,
    Settings,
    differences,
    generator,
    result_table,
    source_digest,
    write_results,
)
from facebook_nb.files import UserError, read_json


@dataclass(frozen=True, kw_only=True)
class Toy(Settings):
    steps: Annotated[int, Field(gt=0)] = 10
    rate: float = 0.1
    kind: Literal["a", "b"] = "a"
    widths: tuple[int, ...] = (1, 2)
    name: str | None = None
    CHAPTER: ClassVar[str] = "toy"
    PRESETS: ClassVar[dict] = {"smoke": {"steps": 1}, "book": {}, "full": {"steps": 99}}


@pytest.mark.parametrize("given, expected", [
    ({"steps": "7"}, ("steps", 7)), ({"rate": "1e-3"}, ("rate", 1e-3)), ({"rate": 2}, ("rate", 2.0)),
    ({"widths": "3,4"}, ("widths", (3, 4))), ({"widths": "5"}, ("widths", (5,))), ({"name": "x"}, ("name", "x")),
    ({"kind": "b"}, ("kind", "b")), ({"data_root": "d"}, ("data_root", Path("d")))])
def test_overrides_are_parsed_to_the_type_of_the_field(given, expected):
    assert getattr(Toy.preset("book", **given), expected[0]) == expected[1]


@pytest.mark.parametrize("given, words", [
    ({"stpes": 1}, "no setting 'stpes'.*steps"), ({"steps": 0}, "steps=0.*greater"), ({"steps": "x"}, "steps='x'"),
    ({"kind": "c"}, "kind='c'.*'a' or 'b'"), ({"widths": "3,x"}, "widths"), ({"preset_name": "x"}, "preset_name")])
def test_wrong_overrides_name_the_field_and_the_fix(given, words):
    with pytest.raises(UserError, match=words):
        Toy.preset("book", **given)


def test_presets():
    assert Toy.preset("smoke").steps == 1 and Toy.preset("full", steps=3).steps == 3
    assert Toy.preset("book", seed=4, n_seeds=2).seeds == [4, 5]
    with pytest.raises(UserError, match="no preset 'tiny'.*smoke, book, full"):
        Toy.preset("tiny")


def test_generators_depend_on_names_alone():
    torch.rand(7)
    first = torch.rand(3, generator=generator(1, "a", 2))
    torch.rand(7)
    assert torch.equal(first, torch.rand(3, generator=generator(1, "a", 2)))
    assert not torch.equal(first, torch.rand(3, generator=generator(2, "a", 2)))


def test_a_step_is_done_once_and_read_back_alike(tmp_path):
    config, calls = Toy.preset("smoke", out_dir=tmp_path), []

    def work():
        calls.append(1)
        return {"x": torch.ones(2), "n": 3, "s": np.float64(0.5)}

    one, two = (RunFolder(config).step("seed0/a", work) for _ in range(2))
    assert len(calls) == 1 and one["n"] == two["n"] == 3 and two["s"] == 0.5
    assert (one["x"] == two["x"]).all()
    assert RunFolder(config).seconds > 0


def test_a_step_that_fails_leaves_nothing(tmp_path):
    folder = RunFolder(Toy.preset("smoke", out_dir=tmp_path))
    with pytest.raises(ZeroDivisionError):
        folder.step("a", lambda: {"x": 1 / 0})
    assert not list(tmp_path.glob("steps/*"))
    assert folder.step("a", lambda: {"x": 1})["x"] == 1


def test_a_folder_of_another_run_is_refused(tmp_path):
    RunFolder(Toy.preset("smoke", out_dir=tmp_path))
    RunFolder(Toy.preset("smoke", out_dir=tmp_path, devices=2))     # not part of the result
    with pytest.raises(UserError, match="steps=1, not 2"):
        RunFolder(Toy.preset("smoke", out_dir=tmp_path, steps=2))


def test_an_experiment_killed_between_steps_goes_on(tmp_path):
    script = tmp_path / "toy.py"
    script.write_text(textwrap.dedent("""
        import os, signal, sys
        from facebook_nb.experiment import RunFolder, Settings
        folder = RunFolder(Settings.preset("book", out_dir=sys.argv[1]))
        print(folder.step("a", lambda: {"x": 1})["x"])
        if len(sys.argv) > 2:
            os.kill(os.getpid(), signal.SIGKILL)
        print(folder.step("b", lambda: {"x": 2})["x"])"""))
    run = lambda *more: subprocess.run([sys.executable, script, tmp_path / "run", *more],
                                       capture_output=True, text=True)
    assert run("die").returncode == -9
    again = run()
    assert again.returncode == 0 and again.stdout.split() == ["1", "2"]


def report(values=((0.8, 0.7, 0.9), (0.83, 0.74, 0.92))):
    return Report("toy", "book", [0, 1, 2], {"baseline": {"auc": list(values[0])}, "method": {"auc": list(values[1])}},
                  Claim("better", True, "+0.03"), 12.34, {"curve": np.arange(3)})


def test_a_report_writes_its_contract(tmp_path):
    report().save(tmp_path)
    kept = json.loads((tmp_path / "metrics.json").read_text())
    assert kept["chapter"] == "toy" and kept["preset"] == "book" and kept["seeds"] == [0, 1, 2]
    cell = kept["metrics"]["method"]["auc"]
    assert cell["values"] == [0.83, 0.74, 0.92] and abs(cell["mean"] - 0.83) < 1e-9 and abs(cell["std"] - 0.09) < 1e-9
    assert kept["claim"] == {"text": "better", "holds": True, "effect": "+0.03"} and kept["seconds"] == 12.3
    assert (np.load(tmp_path / "arrays.npz")["curve"] == np.arange(3)).all()


def test_paired_interval_agrees_with_scipy():
    from scipy.stats import ttest_rel
    mine, half = report().difference("method", "baseline", "auc")
    interval = ttest_rel([0.83, 0.74, 0.92], [0.8, 0.7, 0.9]).confidence_interval(0.95)
    assert np.allclose([mine - half, mine + half], [interval.low, interval.high])


def test_table_bolds_what_the_seeds_cannot_tell_apart():
    clear = result_table(report(), {"auc": "AUC ↑"})
    assert clear.bold == {(1, 1)}
    close = result_table(report(((0.8, 0.9, 0.7), (0.83, 0.74, 0.92))), {"auc": "AUC ↑"})
    assert close.bold == {(0, 1), (1, 1)}
    assert "<strong>" in clear._repr_html_() and "0.83 ± 0.09" in str(clear)


def test_differences_are_named():
    old = report().as_dict()
    assert differences(old, old) == []
    new = report(((0.8, 0.7, 0.9), (0.3, 0.2, 0.4))).as_dict()
    assert differences(new, old) == ["toy: method, auc: 0.83 ± 0.09 → 0.3"]
    del new["metrics"]["baseline"]
    assert any("not measured any more" in line for line in differences(new, old))


def notebook(path, *cells):
    path.write_text(json.dumps({"cells": [
        {"cell_type": kind, "source": source, "metadata": {}} for kind, source in cells]}))
    return path


def test_digest_follows_code_and_nothing_else(tmp_path, monkeypatch):
    package = tmp_path / "facebook_nb_toy"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "low.py").write_text("SCALE = 2\n\ndef scaled(x):\n    return SCALE * x\n\n"
                                    "def unused():\n    return 1\n")
    (package / "high.py").write_text("from .low import scaled\n\ndef twice(x):\n    return scaled(scaled(x))\n")
    monkeypatch.setattr(experiment, "PACKAGE", "facebook_nb_toy")
    monkeypatch.syspath_prepend(tmp_path)
    nb = tmp_path / "a.ipynb"
    code = "from facebook_nb_toy.high import twice\ntwice(3)"
    first = source_digest(notebook(nb, ("markdown", "# A"), ("code", code)))
    assert source_digest(notebook(nb, ("markdown", "# B"), ("code", code + "  # why"))) == first
    assert source_digest(notebook(nb, ("code", code.replace("3", "4")))) != first
    notebook(nb, ("code", code))

    def after(old, new):
        path = package / "low.py"
        path.write_text(path.read_text().replace(old, new))
        return source_digest(nb)

    assert after("def unused():\n    return 1", "def unused():\n    return 2") == first
    assert after("def scaled(x):\n", 'def scaled(x):\n    """Scaled."""\n    # a comment\n') == first
    changed = after("SCALE = 2", "SCALE = 3")
    assert changed != first
    assert after("SCALE * x", "x * SCALE") not in (first, changed)


def test_results_are_json_and_csv(tmp_path):
    write_results(tmp_path, [{"input": "a.png", "quality": 61.5}, {"input": "b.png", "error": "b.png: damaged"}])
    assert read_json(tmp_path / "results.json")[1]["error"] == "b.png: damaged"
    assert (tmp_path / "results.csv").read_text().splitlines() == ["input,quality,error", "a.png,61.5,",
                                                                    "b.png,,b.png: damaged"]
