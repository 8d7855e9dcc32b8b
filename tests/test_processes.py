"""Several processes: they agree, share, end together, and chapters run in them (the long form: tests/together.py)."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from facebook_nb import processes
from facebook_nb.cli import on_all_cores
from facebook_nb.files import UserError
from tests import processes_child as child
from tests import warm
from tests.together import finish, repeat, start, together


@pytest.fixture(scope="module")
def context():
    return warm.context()


# --- they agree ---

def test_three_processes_agree_and_share(context, tmp_path):
    found = together(child.agree, place=tmp_path, ranks=3, context=context)
    big = [[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]
    for rank, it in enumerate(found):
        assert it["first"] == {"rank": 0, "big": big, "empty": []} and it["everyone"] == ["a", "b", "c"]
        assert it["gathered"] == [[k, k + 1] for k in range(0, 20, 2)] and it["none"] == [0, 4]
        assert it["uneven"] == [[1, 1], [2, 2], [2, 2]] and it["kinds"].startswith("gather_rows: rows of several kinds")
        assert it["parts"] == [0, 0, 1, 1, 2, 2, 0]
        assert it["asked"] and it["error"] == ["list.csv: no such file; look again", rank > 0]
        assert (it["rank"], it["count"], it["main"]) == (rank, 3, rank == 0)
    assert [it["share"] for it in found] == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]


def test_one_process_needs_nobody():
    assert processes.first("x") == "x" and processes.everyone(1) == [1] and processes.share(3) == range(3)
    processes.join()
    processes.wait_for_all()
    with pytest.raises(UserError, match="gone"):
        processes.ask_first(lambda: (_ for _ in ()).throw(UserError("gone")))


def test_finished_parts_are_not_made_again(tmp_path):
    asked = []

    def work(rows):
        asked.append(rows)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return np.array(rows)

    with pytest.raises(KeyboardInterrupt):
        processes.in_parts(5, work, tmp_path, 2)
    assert processes.in_parts(5, work, tmp_path, 2).tolist() == [0, 1, 2, 3, 4]
    assert asked == [range(0, 2), range(2, 4), range(2, 4), range(4, 5)]


def damaged(item):
    raise UserError(f"{item}: damaged; copy it again")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_worker_is_one_line(workers):
    with pytest.raises(UserError, match="^a.png: damaged; copy it again$"):
        next(iter(processes.in_workers(damaged, ["a.png"], workers)))


def test_an_environment_that_names_nobody_to_join(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="WORLD_SIZE=2, but no MASTER_ADDR; start with torchrun or accelerate launch"):
        processes.first(1)


# torchrun as a command of ours: test_readme.py
LAUNCHERS = {"torchrun": "torch.distributed.run --standalone --nproc_per_node 2",
             "accelerate": "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 "
                           "--mixed_precision no --dynamo_backend no"}


def test_started_by_accelerate(tmp_path):
    pytest.importorskip("accelerate")
    subprocess.run([sys.executable, "-m", *LAUNCHERS["accelerate"].split(), child.__file__, str(tmp_path), "agree"],
                   check=True, timeout=120, capture_output=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in (0, 1)]
    assert [(it["rank"], it["count"], it["everyone"]) for it in found] == [(0, 2, ["a", "b"]), (1, 2, ["a", "b"])]


# --- they end together ---

def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# a shell's background jobs start with SIGINT ignored
LAUNCH = ("import signal, sys; from facebook_nb.processes import launch; "
          "signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(launch(2, *sys.argv[1:]))")


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc who is alive")
@pytest.mark.parametrize("by, how", [("launch", signal.SIGKILL), ("launch", signal.SIGINT),
                                     ("torchrun", signal.SIGKILL)])
def test_copies_end_with_the_command_that_started_them(by, how, tmp_path):
    command = [sys.executable, *(["-c", LAUNCH] if by == "launch" else ["-m", *LAUNCHERS[by].split()])]
    command = subprocess.Popen([*command, child.__file__, str(tmp_path), "wait"], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 100
    while len(pids := [int(p.read_text() or 0) for p in tmp_path.iterdir()]) < 2 or not all(pids):
        assert time.monotonic() < end and command.poll() is None
        time.sleep(0.05)
    launcher = {int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]) for pid in pids}
    command.send_signal(how)
    command.wait(5)
    end = time.monotonic() + 5
    while left := [pid for pid in [*pids, *launcher] if pid != command.pid and alive(pid)]:
        assert time.monotonic() < end, f"{left} go on"
        time.sleep(0.05)


def test_a_command_ends_as_its_copies_do(tmp_path):
    assert processes.launch(2, child.__file__, str(tmp_path), "fail") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1"]


def test_a_worker_that_dies_costs_its_own_job(tmp_path):
    said = []
    found = on_all_cores(child.outcome, {name: (name,) for name in ("a", "dies", "b", "c")}, said.append)
    assert [*found] == ["a", "dies", "b", "c"] and len(said) == 4
    assert [bool(o.error) for o in found.values()] == [False, True, False, False]
    assert "the worker died" in found["dies"].error and "\n" not in found["dies"].error


# --- killed and resumed ---

def test_sigkill_of_one_of_two(context, tmp_path):
    """Whichever it is and whenever: started again, both go on to the weights and losses of a calm run."""
    run = lambda name: dict(place=tmp_path / name, context=context)
    calm = together(child.sharded, tmp_path / "calm" / "run", **run("calm"))
    moments, kills = random.Random(), 0
    for _ in range(3):
        members = start(child.sharded, tmp_path / "run", **run("killed"))
        steps = set((tmp_path / "run").rglob("step-*"))
        end = time.monotonic() + 60
        while set((tmp_path / "run").rglob("step-*")) <= steps and all(m.exitcode is None for m in members):
            assert time.monotonic() < end
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.1))
        os.kill(moments.choice(members).pid, signal.SIGKILL)
        try:
            finish(members, tmp_path / "killed")
        except AssertionError:          # it was killed, not done already
            kills += 1
    assert kills
    assert together(child.sharded, tmp_path / "run", **run("killed")) == calm


# --- chapters ---

def test_full_in_three_processes(context, tmp_path):
    """Faces are cut in parts, by all. Others: test_readme.py (sdd_fiqa, two), test_fpr.py (a sharded head, three)."""
    repeat("local_relation", "full", 1, 3, random.Random(), tmp_path, context)
