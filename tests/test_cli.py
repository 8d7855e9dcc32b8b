"""The command line as a user meets it: one line for a mistake, and the right exit code."""
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from typer import Exit

from facebook_nb.cli import CHAPTERS, TAKES, Rehearsal, _cell, _keep, dry_run, execute_all, plan_of, reproduce, store
from facebook_nb.experiment import own_folder
from facebook_nb.files import UserError, read_json, write_json
from tests import warm
from tests.conftest import ROOT

COMMAND = str(Path(sys.executable).parent / "facebook-nb")


def cli(*args, cwd=ROOT):
    return subprocess.run([COMMAND, *map(str, args)], capture_output=True, text=True, cwd=cwd)


def fails(done, code, *words):
    """The command ended with `code` and one line on stderr that holds the words."""
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def test_list_names_ten_chapters():
    done = cli("list")
    assert done.returncode == 0
    assert all(name in done.stdout for name in CHAPTERS) and "not written yet" not in done.stdout


@pytest.mark.parametrize("args, words", [
    (["run", "sdd_fika"], ["no chapter 'sdd_fika'", "sdd_fiqa"]),
    (["run", "sdd_fiqa", "--preset", "tiny"], ["no preset 'tiny'", "smoke, book, full"]),
    (["run", "sdd_fiqa", "--preset", "smoke", "--set", "nonsense=1"], ["no setting 'nonsense'"]),
    (["run", "sdd_fiqa", "--preset", "smoke", "--set", "n_seeds"], ["FIELD=VALUE"]),
    (["run", "sdd_fiqa", "--preset", "smoke", "--set", "n_seeds=many"], ["n_seeds='many'"]),
    (["apply", "sdd_fiqa", "x.png", "--weights", "none.safetensors"], ["none.safetensors"]),
    (["apply", "sdd_fika", "x.png"], ["no chapter 'sdd_fika'", "sdd_fiqa"]),
    (["data", "check", "sdd_fiqa"], ["--data-root"]),
    (["data", "check", "sdd_fiqa", "--data-root", "nowhere"], ["nowhere", "no such folder"]),
    (["reproduce", "chapter"], ["no notebook 'chapter'"])])
def test_a_users_mistake_is_one_line_and_exit_code_2(args, words, tmp_path):
    if args[0] == "run":
        args = [*args, "--out-dir", tmp_path / "run"]
    done = cli(*args)
    fails(done, 2, *words)
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.glob("run/**/*.ipynb"))


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    fails(cli("run", "sdd_fiqa", "--preset", "smoke", "--out-dir", tmp_path), 2, "--resume")


@pytest.fixture
def small_book(tmp_path):
    """A book whose chapter sdd_fiqa is a notebook of a few lines."""
    (tmp_path / "_toc.yml").write_text("")
    (tmp_path / "nbs" / "chapters").mkdir(parents=True)

    def write(*sources):
        cells = [{"cell_type": "code", "id": f"c{k}", "metadata": {"tags": ["parameters"]} if not k else {},
                  "source": source, "outputs": [], "execution_count": None} for k, source in enumerate(sources)]
        path = tmp_path / "nbs" / "chapters" / "sdd_fiqa.ipynb"
        path.write_text(json.dumps({"cells": cells, "nbformat": 4, "nbformat_minor": 5, "metadata": {
            "kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}}))
        return path

    write.root = tmp_path
    return write


PARAMETERS = 'preset = "book"\ndata_root = None\nseed = 0\ndevices = 1\nout_dir = None\noverrides = {}'


def test_a_chapter_that_is_not_written_yet_says_so(small_book):
    small_book(PARAMETERS)
    fails(cli("run", "fpr", "--preset", "smoke", cwd=small_book.root), 2, "fpr", "not written yet")


def test_a_failed_run_shows_the_cell_and_keeps_the_notebook(small_book, tmp_path):
    small_book(PARAMETERS, "print('before')", "wrong = 1 / 0  # the culprit")
    done = cli("run", "sdd_fiqa", "--preset", "smoke", "--out-dir", tmp_path / "run", cwd=small_book.root)
    fails(done, 1, "# the culprit", "ZeroDivisionError", "sdd_fiqa.ipynb")
    kept = read_json(tmp_path / "run" / "sdd_fiqa.ipynb")
    assert any("before" in "".join(o.get("text", "")) for c in kept["cells"] for o in c.get("outputs", []))


def test_a_users_mistake_inside_the_notebook_is_one_line_too(small_book, tmp_path):
    small_book(PARAMETERS, "from facebook_nb.files import UserError\nraise UserError('data: missing; get it')")
    done = cli("run", "sdd_fiqa", "--preset", "smoke", "--out-dir", tmp_path / "run", cwd=small_book.root)
    fails(done, 2, "error: data: missing; get it")
    assert len(done.stderr.strip().splitlines()) == 1


def test_store_takes_outputs_and_refuses_stderr(small_book, tmp_path):
    path = small_book(PARAMETERS, "1 + 1")
    done = tmp_path / "done" / path.name
    [outcome] = execute_all([(path, done, {"seed": 5})], say=lambda line: None)
    assert not outcome.error and outcome.name == "sdd_fiqa"
    store(done, path, {"preset": "book", "digest": "x"})
    kept = read_json(path)
    assert [c["id"] for c in kept["cells"]] == ["c0", "c1"]         # without the injected cell
    assert kept["cells"][1]["outputs"][0]["data"]["text/plain"] == ["2"]
    assert kept["metadata"]["facebook_nb"]["preset"] == "book" and "papermill" not in kept["metadata"]
    path = small_book(PARAMETERS, "import sys\nprint('x', file=sys.stderr)")
    execute_all([(path, done, {})], say=lambda line: None)
    before = path.read_bytes()
    with pytest.raises(UserError, match="c1.*stderr"):
        store(done, path, {})
    assert path.read_bytes() == before


def test_notebooks_do_not_outlive_the_command_that_runs_them(small_book):
    """Also where it is killed alone, with no chance to tell its workers."""
    path = small_book(PARAMETERS, "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(300)")
    code = (f"from facebook_nb.cli import execute_all; from pathlib import Path\n"
            f"if __name__ == '__main__': execute_all([(Path({str(path)!r}), Path({str(path)!r} + '.done'), {{}})])")
    script = small_book.root / "many.py"
    script.write_text(code)
    command = subprocess.Popen([sys.executable, str(script)])
    pid, ends = path.parent / "pid", time.monotonic() + 60
    while not (pid.exists() and pid.read_text()) and time.monotonic() < ends:
        time.sleep(0.1)
    kernel = int(pid.read_text())
    command.kill()
    command.wait()
    while psutil.pid_exists(kernel) and time.monotonic() < ends:
        time.sleep(0.1)
    assert not psutil.pid_exists(kernel)


def test_text_edited_during_a_run_is_kept_and_changed_code_is_not_stored(small_book, tmp_path):
    path = small_book(PARAMETERS, "1 + 1")
    done = tmp_path / "done" / path.name
    execute_all([(path, done, {})], say=lambda line: None)
    nb = read_json(path)
    nb["cells"].insert(1, {"cell_type": "markdown", "id": "late", "metadata": {}, "source": ["A later thought."]})
    nb["cells"].append({"cell_type": "code", "id": "new", "metadata": {}, "source": ["# only a comment"], "outputs": [],
                        "execution_count": None})
    write_json(path, nb)
    store(done, path, {})
    kept = {c["id"]: c for c in read_json(path)["cells"]}
    assert kept["late"]["source"] == ["A later thought."] and kept["new"]["outputs"] == []
    assert kept["c1"]["outputs"][0]["data"]["text/plain"] == ["2"]
    folder = small_book.root / "runs" / "book" / path.stem
    write_json(folder / "digest.json", "that of other code")
    before = path.read_bytes()
    assert "changed while it ran" in _keep(path, small_book.root, accept=True)[0]
    assert path.read_bytes() == before


def test_each_chapter_says_what_apply_takes():
    assert list(TAKES) == list(CHAPTERS)
    done = cli("apply", "lap", "--help")
    assert done.returncode == 0 and "Photos of one person" in " ".join(done.stdout.split())
    assert cli("--version").stdout.startswith("facebook-nb ")


def test_cells_of_results_are_rounded_and_never_cut():
    assert _cell(0.123456) == "0.123" and _cell(None) == "" and _cell("x" * 99) == "x" * 99
    assert _cell({"a": 0.1, "b": 0.7, "c": 0.15, "d": 0.05}) == "b 0.7, c 0.15, a 0.1, 1 more"
    assert _cell([{"start": 1.0}, 2, 3, 4]) == "start 1; 2; 3, 1 more"


def test_a_dead_kernel_is_an_outcome_and_the_others_are_kept(small_book, tmp_path):
    dead = small_book(PARAMETERS, "import os\nos._exit(137)")
    other = tmp_path / "fine.ipynb"
    other.write_text(dead.read_text().replace("os._exit(137)", "1 + 1"))
    place = tmp_path / "a{b}"
    outcomes = execute_all([(dead, place / "dead.ipynb", {}), (other, place / "fine.ipynb", {})], say=lambda line: None)
    assert "the kernel died" in outcomes[0].error and not outcomes[1].error


def test_a_second_command_changes_nothing(small_book, tmp_path):
    small_book(PARAMETERS)
    code = ("import sys, time\nfrom facebook_nb.experiment import own_folder\n"
            "own_folder(sys.argv[1])\nprint(flush=True)\ntime.sleep(60)")
    owner = subprocess.Popen([sys.executable, "-c", code, tmp_path / "run"], stdout=subprocess.PIPE)
    owner.stdout.readline()
    before = sorted(p.name for p in (tmp_path / "run").iterdir())
    try:
        for args in (["run", "sdd_fiqa", "--preset", "smoke"], ["apply", "sdd_fiqa", "x.png"]):
            done = cli(*args, "--out-dir", tmp_path / "run", cwd=small_book.root)
            fails(done, 2, "another command is at work here")
            assert len(done.stderr.strip().splitlines()) == 1
        with pytest.raises(UserError, match="another command"):
            own_folder(tmp_path / "run")
    finally:
        owner.kill()
        owner.wait()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == before
    own_folder(tmp_path / "run")        # a dead owner owns nothing


TOY = """
from facebook_nb.cli import _overrides
from facebook_nb.experiment import Report, RunFolder, Settings, decide

config = Settings.preset("book", out_dir=out_dir)
folder = RunFolder(config)
xs = [float(folder.step(f"seed{s}", _overrides, [f"x={2 * s}"])["x"]) for s in config.seeds]
Report("sdd_fiqa", "book", config.seeds, {"a": {"x": xs}}, decide("a", xs), 1.0).save(folder)
"""


def test_a_change_of_a_figure_costs_no_step(small_book, monkeypatch, capsys):
    root, again = small_book.root, []
    # in this process, and by kernels that start warm: how they are started otherwise is tested above
    monkeypatch.setattr("facebook_nb.cli.on_all_cores", lambda function, jobs, say: {
        name: function(*job) for name, job in jobs.items()})
    monkeypatch.setattr("jupyter_client.provisioning.local_provisioner.launch_kernel", warm.Kernel)
    monkeypatch.chdir(root)
    for figure in ("'one'", "'two'"):
        path = small_book(PARAMETERS, TOY, figure)
        plan = plan_of(path, root)
        assert not plan.current
        assert str(plan) == ("outputs only" if again else
                             "never recorded to its end, so its time is not known; 0 steps are done")
        folder = root / "runs" / "book" / "sdd_fiqa"
        reproduce(["sdd_fiqa"])
        again.append({p.name: p.stat().st_mtime_ns for p in folder.glob("steps/*.npz")})
        kept = read_json(path)["cells"][-1]["outputs"][0]["data"]["text/plain"]
        assert "".join(kept) == figure
        assert str(plan_of(path, root)) == "nothing to do"
    assert "nothing to do" in cli("reproduce", "sdd_fiqa", "--dry-run", cwd=root).stdout
    assert len(again[0]) == 3 and again[0] == again[1]
    small_book(PARAMETERS, TOY.replace("2 * s", "9 * s"), "'two'")
    with pytest.raises(Exit) as ended:
        reproduce(["sdd_fiqa"])
    assert ended.value.exit_code == 1 and "not stored; look why" in capsys.readouterr().out
    assert all(t != again[0][name] for name, t in {
        p.name: p.stat().st_mtime_ns for p in folder.glob("steps/*.npz")}.items() if name != "seed0.npz")


def test_results_are_json_too():
    done = cli("results", "--json")
    assert done.returncode == 0
    assert all({"chapter", "claim", "metrics", "digest"} <= set(entry) for entry in json.loads(done.stdout))


def test_a_dry_run_names_the_workers_that_loading_wants():
    plan = Rehearsal(None, SimpleNamespace(devices=4))
    row = {"what": "a row", "load": 3.0, "step": 0.5}
    plan.rows = [row | {"workers": 2, "ready": 1.5}, row | {"workers": 8, "ready": 0.375}]
    one, = plan.late()
    assert one.startswith("a row: with workers=2 a batch is loaded in 1.5 s, and a step takes 0.5 s; raise workers "
                          "(--set workers=8)")
    asked = []
    plan.work("cutting", 3, asked.append, some=8)
    assert asked == [range(1), range(1), range(3)] and plan.rows[-1]["times"] == 3
    with pytest.raises(UserError, match="add --preset full and --data-root"):
        dry_run("cmr", SimpleNamespace(preset_name="smoke"))
