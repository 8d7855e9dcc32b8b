"""A chapter in several gloo processes on this machine: no hang, no crash, the same report in each.

    python -m tests.together [--repeats 10] [--processes 2] [--seed 0] [--full | --smoke] [CHAPTER …]

`make test` does a few of these (test_processes.py). Processes start up to two seconds apart, so that one that looks for
what another writes sees it now, and now not. `--full` runs preset `full` on made data in the real formats.
"""
import argparse
import faulthandler
import importlib
import inspect
import json
import multiprocessing
import os
import random
import socket
import sys
import tempfile
import time
from pathlib import Path

CHAPTERS = ("fpr", "sdd_fiqa", "adv_makeup", "substitute", "local_relation", "d2am", "lap", "dmf", "afsd", "cmr")


def tiny(chapter: str, root: Path) -> dict:
    """Make data for `full` of a chapter below `root`, by its own tests; returns the settings. KeyError: there is none.

    A chapter's test file may say so itself, by a function `tiny_full(root) -> settings`.
    """
    tests = importlib.import_module(f"tests.test_{chapter}")
    if hasattr(tests, "tiny_full"):
        return tests.tiny_full(root)
    fixture, settings = {
        "fpr": ("stored", dict(network="tiny", batch_size=6, epochs=1, workers=0, precision="no")),
        "sdd_fiqa": ("stored", dict(batch_size=11, epochs=1, workers=0, m=5, precision="no")),
        "local_relation": ("release", dict(encoder="small", size=64, epochs=1, batch_size=6, workers=0, video_frames=2,
                                           precision="no", held_out="FaceSwap")),
        "d2am": ("data_sets", dict(protocols=("O&C&I->M",), side=24, width=0.5, network="small", epochs=1,
                                   epoch_steps=1, batch=1, K=1, rows=("D2AM",), workers=0,
                                   precision="no")),
        "afsd": ("write_thumos", dict(start=None, steps=1, workers=0)),
        "cmr": ("something", dict(rows=("CMR",), steps=1, batch_size=2, side=32, workers=0, precision="no")),
    }[chapter]
    maker = getattr(tests, fixture)
    maker = getattr(maker, "_fixture_function", None) or getattr(maker, "__wrapped__", maker)     # a fixture's function
    wanted, root = inspect.signature(maker).parameters, Path(root)
    factory = type("Factory", (), {"mktemp": lambda self, name: (root / name).mkdir() or root / name})()
    arguments = {"tmp_path": root, "tmp_path_factory": factory, "root": root, "form": "json", "kind": "json"}
    made = maker(*(arguments.get(name, root) for name, p in wanted.items() if p.default is p.empty))
    root = made if isinstance(made, Path) else root
    if chapter == "cmr":
        import torch

        from facebook_nb import cmr
        torch.save(cmr.resnet(50, 1000, cmr.Parts("none")).state_dict(), root / "resnet50-19c8e357.pth")
    return {**settings, "data_root": root}


def stand_ins(chapter: str) -> None:
    """In the process that runs `full`: small in place of what would take minutes."""
    tests = importlib.import_module(f"tests.test_{chapter}")
    module = importlib.import_module(f"facebook_nb.{chapter}")
    if hasattr(tests, "stand_ins"):
        tests.stand_ins()
    elif chapter == "fpr":
        module.NETWORKS["tiny"] = lambda: tests.SmallResNet(512, 2, 112)
    elif chapter == "local_relation":
        importlib.import_module("facebook_nb.models.recognisers").detect_faces = tests.Detector()
    elif chapter == "afsd":
        module.AFSD = tests.Tiny


def run_chapter(chapter: str, preset: str, folder: Path, settings: dict) -> dict:
    """The job of one process: a chapter's metrics."""
    if preset == "full":
        stand_ins(chapter)
    module = importlib.import_module(f"facebook_nb.{chapter}")
    return module.run(module.Config.preset(preset, out_dir=folder, **settings)).metrics


def _member(rank: int, ranks: int, port: int, late: float, limit: float, place: Path, job, args) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1",
                      FACEBOOK_NB_PROGRESS="0")
    log = open(place / f"rank-{rank}.txt", "w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.dump_traceback_later(limit, exit=True, file=log)
    import torch

    torch.set_num_threads(1)
    time.sleep(late)
    found = job(*args)
    (place / f"rank-{rank}.json").write_text(json.dumps(found, sort_keys=True, default=str))


def start(job, *args, place: Path, ranks: int = 2, late=(0, 0, 0), limit: float = 120, context=None) -> list:
    """Start `job(*args)` in several processes; each leaves what it says in rank-R.txt, its result in rank-R.json."""
    context = context or multiprocessing.get_context("forkserver")
    place.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    members = [context.Process(target=_member, args=(r, ranks, port, late[r], limit, place, job, args))
               for r in range(ranks)]
    for member in members:
        member.start()
    return members


def finish(members: list, place: Path, limit: float = 130) -> list:
    """Wait, as a launcher does: the first to fail ends all. Returns the results. AssertionError if one failed."""
    end = time.monotonic() + limit
    while any(m.is_alive() for m in members) and not any(m.exitcode for m in members) and time.monotonic() < end:
        time.sleep(0.02)
    failed = [r for r, m in enumerate(members) if m.exitcode or m.is_alive()]
    for member in members:
        member.join(1)          # it may have more to say
        member.kill()
        member.join()
    texts = [f"process {r}, exit code {members[r].exitcode}:\n" + (place / f"rank-{r}.txt").read_text()[-3000:]
             for r in failed]
    assert not texts, "\n".join(texts)
    return [json.loads((place / f"rank-{r}.json").read_text()) for r in range(len(members))]


def together(job, *args, place: Path, limit: float = 120, **how) -> list:
    """`job(*args)` in several processes, see `start`: what each returned, through JSON."""
    return finish(start(job, *args, place=place, limit=limit, **how), place, limit + 10)


def repeat(chapter, preset, repeats: int, ranks: int, moments: random.Random, place: Path, context=None) -> None:
    """A chapter's run, `repeats` times in fresh folders, the processes starting apart. AssertionError if one fails."""
    data = place / "data"
    data.mkdir(parents=True)
    settings = tiny(chapter, data) if preset == "full" else {}
    reports = []
    for k in range(repeats):
        late = [moments.uniform(0, 2) * (k > 0) for _ in range(ranks)]
        out = place / f"try{k}"
        reports += together(run_chapter, chapter, preset, out / "run", settings, place=out, ranks=ranks, late=late,
                            context=context)
    assert all(report == reports[0] for report in reports), f"{chapter}: reports differ; kept in {place}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chapters", nargs="*", default=CHAPTERS, metavar="CHAPTER")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2, dest="ranks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full", action="store_true", help="only preset full")
    parser.add_argument("--smoke", action="store_true", help="only preset smoke")
    options, bad = parser.parse_args(), []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "torch._dynamo", "facebook_nb.training", "pytest"])
    for chapter in options.chapters:
        for preset in ("smoke",) * (not options.full) + ("full",) * (not options.smoke):
            with tempfile.TemporaryDirectory() as place:
                begun = time.monotonic()
                try:
                    repeat(chapter, preset, options.repeats, options.ranks, random.Random(options.seed), Path(place),
                           context)
                    text = f"{options.repeats} times in {options.ranks} processes"
                except KeyError:
                    text = "no made data for this preset"
                except AssertionError as error:
                    bad.append(f"{chapter}, {preset}:\n{error}\n")
                    text = "FAILED"
            print(f"{chapter:16} {preset:6} {time.monotonic() - begun:6.1f} s  {text}", flush=True)
    sys.exit("\n".join(bad) or 0)


if __name__ == "__main__":
    main()
