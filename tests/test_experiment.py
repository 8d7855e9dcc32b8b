"""Settings, recorded steps, verdicts and reports."""
import json
import os
import pickle
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import pytest
import torch
from pydantic import Field

from facebook_nb.experiment import (
    Check,
    Claim,
    Report,
    RunFolder,
    Settings,
    decide,
    differences,
    finished_steps,
    generator,
    result_table,
    seed_differences,
    verdict_table,
    watched,
)
from facebook_nb.files import UserError


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


CALLS = []


def count_steps(config, value=3.0):
    CALLS.append(config.steps)
    return {"x": torch.ones(config.steps), "n": 3, "s": np.float64(0.5), "v": value}


def fail(config):
    return {"x": 1 / 0}


def test_a_step_is_done_once_and_read_back_alike(tmp_path):
    CALLS.clear()
    config = Toy.preset("smoke", out_dir=tmp_path)
    one, two = (RunFolder(config).step("seed0/a", count_steps, config) for _ in range(2))
    assert len(CALLS) == 1 and one["n"] == two["n"] == 3 and two["s"] == 0.5
    assert (one["x"] == two["x"]).all()
    folder = RunFolder(config)
    folder.step("seed0/a", count_steps, config)
    assert len(CALLS) == 1 and folder.seconds >= 0
    assert finished_steps(tmp_path)["seed0/a"] == folder.steps["seed0/a"]


@pytest.mark.parametrize("setting, again", [
    ({"rate": 0.5}, False), ({"n_seeds": 9}, False), ({"devices": 2}, False), ({"steps": 2}, True)])
def test_a_step_depends_on_the_settings_it_reads(tmp_path, setting, again):
    CALLS.clear()
    for more in ({}, setting):
        config = Toy.preset("smoke", out_dir=tmp_path, **more)
        (tmp_path / "config.json").unlink(missing_ok=True)
        folder = RunFolder(config)
        folder.step("a", count_steps, config)
    assert len(CALLS) == 1 + again
    assert folder.steps["a"]["reads"] == {"steps": config.steps}


def test_a_copy_of_the_settings_reads_them_all():
    reads = {}
    copy = watched(Toy.preset("smoke"), reads)
    assert replace(copy, steps=7).steps == 7 and type(replace(copy, steps=7)) is Toy
    assert {"rate", "kind", "seed"} <= set(reads) and "steps" not in reads
    reads.clear()
    assert pickle.loads(pickle.dumps(copy)) == Toy.preset("smoke") and "rate" in reads
    reads.clear()
    assert copy.seeds == [0, 1, 2] and set(reads) == {"seed", "n_seeds"}


def test_a_step_depends_on_its_arguments_by_content(tmp_path):
    CALLS.clear()
    config = Toy.preset("smoke", out_dir=tmp_path)
    folder = RunFolder(config)
    for value in (np.arange(3), torch.arange(3).numpy(), np.arange(4), 3, 3.0):
        folder.step("a", count_steps, config, value=value)
    assert len(CALLS) == 4
    with pytest.raises(TypeError, match="top level"):
        folder.step("a", lambda: {})
    with pytest.raises(TypeError, match="list_iterator has no content"):
        folder.step("a", count_steps, config, value=iter([1]))


def test_a_step_that_fails_leaves_nothing(tmp_path):
    config = Toy.preset("smoke", out_dir=tmp_path)
    folder = RunFolder(config)
    with pytest.raises(ZeroDivisionError):
        folder.step("a", fail, config)
    assert not list(tmp_path.glob("steps/*"))
    assert folder.step("a", count_steps, config)["n"] == 3


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b.replace(b"\0\0\x80?", b"\1\0\x80?"), lambda b: b""])
def test_a_damaged_step_is_done_again(tmp_path, damage):
    CALLS.clear()
    config = Toy.preset("smoke", out_dir=tmp_path)
    first = RunFolder(config).step("a", count_steps, config)
    path = tmp_path / "steps" / "a.npz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="a.npz: damaged.*done again"):
        again = RunFolder(config).step("a", count_steps, config)
    assert len(CALLS) == 2 and (first["x"] == again["x"]).all()
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="config.json: damaged; remove it"):
        RunFolder(config)


def with_checkpoints(config, folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "x").touch()
    return {"files": len(list(folder.iterdir())), "rate": config.rate}


def test_a_training_step_gets_a_folder_that_is_its_own(tmp_path):
    for rate in (0.1, 0.2):
        config = Toy.preset("smoke", out_dir=tmp_path, rate=rate)
        (tmp_path / "config.json").unlink(missing_ok=True)
        assert RunFolder(config).step("seed0/train", with_checkpoints, config)["rate"] == rate
    assert len(list((tmp_path / "work" / "seed0").iterdir())) == 2


def test_one_command_at_a_time_owns_a_folder(tmp_path):
    config = Toy.preset("smoke", out_dir=tmp_path)
    RunFolder(config)
    code = ("import sys\nfrom facebook_nb.experiment import own_folder\n"
            "own_folder(sys.argv[1])\nprint('mine')")
    run = lambda **env: subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True,
                                       env={**os.environ, **env})
    assert run().stdout == "mine\n"                # started by the owner, so it may
    other = run(FACEBOOK_NB_OWNS="")
    assert "another command is at work here" in other.stderr and not other.stdout


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

        def number(x):
            print("at work")
            return {"x": x}

        folder = RunFolder(Settings.preset("book", out_dir=sys.argv[1]))
        print(folder.step("a", number, 1)["x"], flush=True)
        if len(sys.argv) > 2:
            os.kill(os.getpid(), signal.SIGKILL)
        print(folder.step("b", number, 2)["x"])"""))
    run = lambda *more: subprocess.run([sys.executable, script, tmp_path / "run", *more],
                                       capture_output=True, text=True)
    assert run("die").returncode == -9
    again = run()
    assert again.returncode == 0 and again.stdout.split("\n")[:3] == ["1", "at work", "2"]


def report(values=((0.8, 0.7, 0.9), (0.83, 0.74, 0.92))):
    return Report("toy", "book", [0, 1, 2], {"baseline": {"auc": list(values[0])}, "method": {"auc": list(values[1])}},
                  decide("better", np.subtract(values[1], values[0]), unit="AUC"), 12.34, {"curve": np.arange(3)},
                  mechanism=[Check("it moves", True, "0.3")], roles={"baseline": "baseline"})


def test_a_report_writes_its_contract(tmp_path):
    report().save(tmp_path)
    kept = json.loads((tmp_path / "metrics.json").read_text())
    assert kept["chapter"] == "toy" and kept["preset"] == "book" and kept["seeds"] == [0, 1, 2]
    cell = kept["metrics"]["method"]["auc"]
    assert cell["values"] == [0.83, 0.74, 0.92] and abs(cell["mean"] - 0.83) < 1e-9 and abs(cell["std"] - 0.09) < 1e-9
    claim = kept["claim"]
    assert claim["verdict"] == "shown" and abs(claim["effect"] - 0.03) < 1e-9 and kept["seconds"] == 12.3
    assert 0 < claim["interval"][0] < claim["effect"] < claim["interval"][1] and claim["smallest_effect"] == 0
    assert kept["mechanism"] == [{"text": "it moves", "holds": True, "value": "0.3"}] and kept["findings"] == []
    assert Claim.of(claim) == report().claim
    assert (np.load(tmp_path / "arrays.npz")["curve"] == np.arange(3)).all()


def test_paired_interval_agrees_with_scipy():
    from scipy.stats import ttest_rel
    mine, half = report().difference("method", "baseline", "auc")
    interval = ttest_rel([0.83, 0.74, 0.92], [0.8, 0.7, 0.9]).confidence_interval(0.95)
    assert np.allclose([mine - half, mine + half], [interval.low, interval.high])


@pytest.mark.parametrize("differences, options, verdict", [
    ([0.03, 0.04, 0.02], {}, "shown"), ([0.03, 0.04, 0.02], {"smallest_effect": 0.02}, "undecided"),
    ([0.03, 0.04, 0.02], {"smallest_effect": 0.1}, "refuted"), ([-0.03, -0.04, -0.02], {}, "refuted"),
    ([-0.03, -0.04, -0.02], {"lower": True}, "shown"), ([0.01, -0.01, 0.0], {}, "undecided"), ([9.0], {}, "undecided"),
    ([0.001, -0.001, 0.0], {"lower": True, "smallest_effect": 1}, "refuted")])
def test_a_verdict_follows_from_the_interval(differences, options, verdict):
    claim = decide("better", differences, unit="points", **options)
    assert claim.verdict == verdict and str(claim).startswith(f"{verdict}: ") and "points" in str(claim)
    assert "inf" not in str(claim) and "nan" not in str(claim)
    with pytest.raises(ValueError, match="smallest effect"):
        decide("better", [], -1)


def test_rows_of_fewer_seeds_are_compared_on_the_common_ones():
    r = report()
    r.metrics["half"] = {"auc": [0.9, 0.9]}
    assert np.allclose(r.paired("half", "baseline", "auc"), [0.1, 0.2])


def test_a_table_bolds_the_best_where_it_differs_from_the_baseline():
    clear = report()
    clear.metrics["truth"] = {"auc": [1.0, 1.0, 1.0]}
    clear.roles["truth"] = "ceiling"
    table = result_table(clear, {"auc": "AUC ↑"})
    assert table.bold == {(1, 1)} and "<strong>" in table._repr_html_()
    assert "0.8 ± 0.2" in str(table)                # the interval's half-width
    close = report(((0.8, 0.9, 0.7), (0.83, 0.74, 0.92)))
    assert not result_table(close, {"auc": "AUC ↑"}).bold
    worst = report(((0.83, 0.74, 0.92), (0.8, 0.7, 0.9)))
    assert not result_table(worst, {"auc": "AUC ↑"}).bold
    assert str(verdict_table(clear)).count("holds: 0.3") == 1
    with pytest.raises(ValueError, match="role 'best'"):
        Report("toy", "book", [0], {}, clear.claim, 1.0, roles={"x": "best"})


def test_differences_are_named():
    old = report().as_dict()
    assert differences(old, old) == []
    new = report(((0.8, 0.7, 0.9), (0.3, 0.2, 0.4))).as_dict()
    assert differences(new, old) == ["toy: method, auc: 0.83 ± 0.09 → 0.3"]
    del new["metrics"]["baseline"]
    assert any("not measured any more" in line for line in differences(new, old))
    one = Report("toy", "book", [0], {"baseline": {"auc": [0.8]}, "method": {"auc": [0.84]}}, report().claim, 1.0)
    assert seed_differences(one.as_dict(), old, exact=True) == ["toy: method, auc: seed 0: 0.83 → 0.84"]
    assert seed_differences(one.as_dict(), old, exact=False) == []
