"""SIGKILL at random moments of a chapter's run; it must go on to the very weights of an undisturbed run.

    python -m tests.kill_and_resume [--kills 100] [--seed 0] [CHAPTER …]

`make test` does a few of these kills (test_robustness.py).
"""
import argparse
import importlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from facebook_nb.files import progress, read_weights

CHAPTERS = ("sdd_fiqa", "dmf", "cmr")


def smoke(chapter: str, folder: Path) -> None:
    """Entry point of a child: the chapter's run at preset smoke, begun or gone on with."""
    import torch

    torch.set_num_threads(1)
    os.environ["FACEBOOK_NB_PROGRESS"] = "0"
    sys.stdout = open(os.devnull, "w")
    module = importlib.import_module(f"facebook_nb.{chapter}")
    module.run(module.Config.preset("smoke", out_dir=folder, data_root=None))


def finish(context, chapter: str, folder: Path, after: float | None = None) -> bool:
    """Run in a child, killed `after` seconds; whether it finished. RuntimeError when it failed by itself."""
    process = context.Process(target=smoke, args=(chapter, folder))
    process.start()
    process.join(after)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{chapter}: the resumed run ended with exit code {process.exitcode}; kept in {folder}")
    return process.exitcode == 0


def same(one: Path, other: Path) -> None:
    """AssertionError unless two files of weights hold the same tensors, bit for bit."""
    a, b = read_weights(one / "weights.safetensors"), read_weights(other / "weights.safetensors")
    assert a.keys() == b.keys(), f"{other}: other tensors than {one}"
    for name in a:
        assert a[name].numpy().tobytes() == b[name].numpy().tobytes(), f"{other}: {name} differs from {one}"


def survive(chapter: str, kills: int, moments: random.Random, place: Path) -> int:
    """Kill a chapter's runs `kills` times in all, each run gone on with until it ends; returns the number of runs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"facebook_nb.{chapter}", "accelerate", "tensorboard"])
    undisturbed, runs, done = place / f"{chapter}-undisturbed", 0, 0
    begun = time.perf_counter()
    finish(context, chapter, undisturbed)
    length = time.perf_counter() - begun
    bar = progress(total=kills, label=chapter)
    while done < kills:
        folder = place / f"{chapter}-{runs}"
        while not finish(context, chapter, folder, moments.uniform(0, length) if done < kills else None):
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
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        for index, chapter in enumerate(options.chapters):
            kills = (options.kills + index) // len(options.chapters)
            runs = survive(chapter, kills, moments, Path(place))
            print(f"{chapter}: {kills} kills, {runs} runs ended with the weights of an undisturbed one", flush=True)


if __name__ == "__main__":
    main()
