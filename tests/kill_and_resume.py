"""SIGKILL at random moments of a chapter's run; it must go on to the very weights of an undisturbed run.

    python -m tests.kill_and_resume [--kills 100] [--devices 1] [--seed 0] [CHAPTER …]

`make test` does a few of these kills (test_robustness.py). With several devices one of the processes is killed,
whichever, and the others end as their launcher would end them.
"""
import argparse
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from facebook_nb.files import progress, read_weights
from tests import warm
from tests.together import start

CHAPTERS = ("sdd_fiqa", "dmf", "cmr", "fpr", "afsd", "lap")


def smoke(chapter: str, folder: Path) -> None:
    """Entry point of a child: the chapter's run at preset smoke, begun or gone on with."""
    import torch

    torch.set_num_threads(1)
    os.environ["FACEBOOK_NB_PROGRESS"] = "0"
    sys.stdout = open(os.devnull, "w")
    module = importlib.import_module(f"facebook_nb.{chapter}")
    module.run(module.Config.preset("smoke", out_dir=folder, data_root=None))


def finish(context, chapter: str, folder: Path, after: float | None, moments: random.Random, devices: int) -> bool:
    """Run in a child, killed `after` seconds; whether it finished. RuntimeError when it failed by itself."""
    if devices == 1:
        processes = [context.Process(target=smoke, args=(chapter, folder))]
        processes[0].start()
    else:
        processes = start(smoke, chapter, folder, place=folder.parent / "said", ranks=devices, late=[0] * devices,
                          limit=600, context=context)
    end, killed = time.monotonic() + (after or 1e9), None
    while any(p.exitcode is None for p in processes) and not any(p.exitcode for p in processes):
        time.sleep(0.01)
        if time.monotonic() > end:
            killed = moments.choice([p for p in processes if p.exitcode is None])
            os.kill(killed.pid, signal.SIGKILL)
            break
    for process in processes:
        if killed:
            process.kill()
        process.join()
    bad = [p.exitcode for p in processes if p.exitcode not in (0, -signal.SIGKILL)]
    if bad and not killed:
        raise RuntimeError(f"{chapter}: the resumed run ended with exit code {bad[0]}; kept in {folder}")
    return all(p.exitcode == 0 for p in processes)


def same(one: Path, other: Path) -> None:
    """AssertionError unless two files of weights hold the same tensors, bit for bit."""
    a, b = read_weights(one / "weights.safetensors"), read_weights(other / "weights.safetensors")
    assert a.keys() == b.keys(), f"{other}: other tensors than {one}"
    for name in a:
        assert a[name].numpy().tobytes() == b[name].numpy().tobytes(), f"{other}: {name} differs from {one}"


def survive(chapter: str, kills: int, moments: random.Random, place: Path, devices: int = 1) -> int:
    """Kill a chapter's runs `kills` times in all, each run gone on with until it ends; returns the number of runs."""
    context = warm.context(f"facebook_nb.{chapter}")
    run = lambda folder, after=None: finish(context, chapter, folder, after, moments, devices)
    undisturbed, runs, done = place / f"{chapter}-undisturbed", 0, 0
    begun = time.perf_counter()
    run(undisturbed)
    length = time.perf_counter() - begun
    bar = progress(total=kills, label=chapter)
    while done < kills:
        folder = place / f"{chapter}-{runs}"
        while not run(folder, moments.uniform(0, length) if done < kills else None):
            done += 1
            bar.update()
        same(undisturbed, folder)
        shutil.rmtree(folder)
        runs += 1
    bar.close()
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chapters", nargs="*", default=CHAPTERS, metavar="CHAPTER")
    parser.add_argument("--kills", type=int, default=100, help="of all chapters together")
    parser.add_argument("--devices", type=int, default=1, help="processes of a run")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        for index, chapter in enumerate(options.chapters):
            kills = (options.kills + index) // len(options.chapters)
            runs = survive(chapter, kills, moments, Path(place), options.devices)
            print(f"{chapter}: {kills} kills, {runs} runs ended with the weights of an undisturbed one", flush=True)


if __name__ == "__main__":
    main()
