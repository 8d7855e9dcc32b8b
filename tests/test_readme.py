"""README as a newcomer types it: a fresh copy of the tree, and nothing set but PATH and a HOME of its own.

Three things stand for what a test should not do: `git clone` copies the tree (its notebooks cut to a line or two),
`python3 -m venv` copies an environment whose packages are this one's, and its pip only notes what it was asked for.
"""
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import textwrap
import time
import urllib.error
import urllib.request
import venv
from pathlib import Path

import numpy as np
import pytest
from matplotlib import cbook

from facebook_nb import sdd_fiqa
from facebook_nb.files import read_json
from tests import together
from tests.conftest import ROOT
from tests.test_commands import FIRST, commands

pytestmark = [pytest.mark.xdist_group("readme"),
              pytest.mark.skipif(not shutil.which("make") or sys.platform == "win32", reason="needs make and bash")]
TREE = ("README.md", "LICENSE", "Makefile", "settings.ini", "constraints.txt", "setup.py", "pyproject.toml",
        "_config.yml", "references.bib", "_ext", "_static", "facebook_nb")
README = (ROOT / "README.md").read_text()
BLOCKS = [textwrap.dedent(block) for _, block in re.findall(r"^( *)```\w*\n(.*?)^\1```", README, re.M | re.S)
          if re.match(rf"\s*(git |{FIRST})", block)]
SERVE = "facebook-nb book --serve"
NOT_RUN = {"make lab", "make test", "make reproduce", "make check-numbers", SERVE}     # the last has a test of its own
NOTEBOOK = """
if preset == "full":
    from facebook_nb.{0} import Config, run
    run(Config.preset(preset, data_root=data_root, seed=seed, devices=devices, out_dir=out_dir, **overrides))
else:
    from facebook_nb.experiment import Report, RunFolder, Settings, decide
    config = Settings.preset("book", out_dir=out_dir)
    Report("{0}", preset, (0,), {{"a": {{"x": [1.0]}}}}, decide("a", [1.0]), 1.0).save(RunFolder(config))
"""
PARAMETERS = 'preset = "book"\ndata_root = None\nseed = 0\ndevices = 1\nout_dir = None\noverrides = {}'


def notebook(chapter: str) -> str:
    cells = [("markdown", "title", {}, f"# {chapter}"), ("code", "parameters", {"tags": ["parameters"]}, PARAMETERS),
             ("code", "run", {}, NOTEBOOK.format(chapter))]
    run = {"outputs": [], "execution_count": None}
    cells = [{"cell_type": kind, "id": name, "metadata": about, "source": source} | (run if kind == "code" else {})
             for kind, name, about, source in cells]
    return json.dumps({"nbformat": 4, "nbformat_minor": 5, "cells": cells, "metadata": {
        "kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}})


def repository(place: Path) -> None:
    """What `git clone` gives: the tree, its book shortened to the chapters that README runs."""
    for name in TREE:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, place / name)
    chapters = sorted({c for b in BLOCKS for c in re.findall(r"facebook-nb run (\w+)", b)})
    (place / "nbs/chapters").mkdir(parents=True)
    (place / "nbs/index.md").write_text("# A short book\n")
    for chapter in chapters:
        (place / f"nbs/chapters/{chapter}.ipynb").write_text(notebook(chapter))
    (place / "_toc.yml").write_text("format: jb-book\nroot: nbs/index\nchapters:\n" + "".join(
        f"  - file: nbs/chapters/{c}\n" for c in chapters))
    (place / "photos").mkdir()
    shutil.copy(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False), place / "photos")


def environment(place: Path) -> None:
    """An environment at `place` with this one's packages, its own facebook_nb, and a pip that installs nothing."""
    venv.create(place, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": place}))
    (site / "packages.pth").write_text("\n".join([str(place.parent), *map(sysconfig.get_path, ("purelib", "platlib"))]))
    (site / "pip.py").write_text("import sys\nopen('.venv/pip.txt', 'a').write(' '.join(sys.argv[1:]))\n")
    for name in ("facebook-nb", "jupyter-book", "torchrun"):
        text = (Path(sys.executable).parent / name).read_text()
        (place / "bin" / name).write_text(re.sub(r"\A#!.*", f"#!{place}/bin/python", text))
        (place / "bin" / name).chmod(0o755)


class Newcomer:
    """Somebody with a HOME, make, git and Python, who has typed the blocks of README."""

    def __init__(self, place: Path):
        self.home, self.tree, tools = place / "home", place / "home/facebook_nb", place / "tools"
        for folder in (self.home, tools, place / "tree", place / "data"):
            folder.mkdir()
        repository(place / "tree")
        environment(self.tree / ".venv")
        (self.tree / ".venv").rename(place / "environment")
        self.tree.rmdir()
        scripts = {"git": f'[ "$1" = clone ] && exec cp -R {place}/tree "$3"',
                   "python3": f'[ "$2" = venv ] && exec cp -R {place}/environment "$3"\nexec {sys.executable} "$@"'}
        for name, text in scripts.items():
            (tools / name).write_text(f"#!/bin/sh\n{text}\n")
            (tools / name).chmod(0o755)
        self.environment = {"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(self.home)}
        self.settings = together.tiny("sdd_fiqa", place / "data")

    def sized(self, line: str) -> str:
        """The line, on tiny data in the real format and two processes."""
        if "--data-root DATA" not in line:
            return line
        settings = dict(self.settings)
        line = line.replace("--data-root DATA", f"--data-root {settings.pop('data_root')}")
        line = re.sub(r"(--devices|--nproc_per_node) \d+", r"\1 2", line)
        settings = " ".join(f"--set {k}={v}" for k, v in settings.items())
        return re.sub(r"( (?:run|train) .*--preset full)", rf"\1 {settings}", line)

    def types(self, lines: str, where: Path) -> subprocess.CompletedProcess:
        return subprocess.run(["bash", "-euc", lines], cwd=where, env=self.environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    newcomer = Newcomer(tmp_path_factory.mktemp("readme"))
    lines = [line for line in "\n".join(BLOCKS).splitlines() if line.partition("#")[0].strip() not in NOT_RUN]
    newcomer.done = newcomer.types("\n".join(map(newcomer.sized, lines)), newcomer.home)
    assert newcomer.done.returncode == 0, newcomer.done.stdout + newcomer.done.stderr
    return newcomer


def test_the_blocks_of_the_readme_run_as_they_stand(newcomer):
    out, tree = newcomer.done.stdout, newcomer.tree
    assert "Traceback" not in out + newcomer.done.stderr
    asked = (tree / ".venv/pip.txt").read_text()
    assert "--constraint constraints.txt" in asked and "--editable .[faces,ode,book,dev]" in asked
    assert re.search(r"cmr[ │]+\d+\.\d[ │]+ok", out)                               # the tour
    assert f"the book: {(tree / '_build/html/index.html').as_uri()}" in out
    for folder in re.findall(r"--out-dir (\S+)", "\n".join(BLOCKS)):
        assert (tree / folder / "metrics.json").exists(), folder
    full = read_json(tree / "runs/sdd_fiqa-full/metrics.json")
    assert full["preset"] == "full" and (tree / "runs/sdd_fiqa-full/sdd_fiqa.ipynb").exists()
    with np.load(tree / "runs/sdd_fiqa-full/steps/labels.npz") as kept:     # not who computed them, but what
        [embedded] = (tree / "runs/sdd_fiqa-full").glob("embeddings-*.npy")
        config = sdd_fiqa.Config.preset("full", **newcomer.settings)
        people = sdd_fiqa.read_faces(config.data_root / "train.rec").labels
        alone = sdd_fiqa.label_faces(config, np.load(embedded), people)
        np.testing.assert_allclose(kept["quality"], alone["quality"], atol=1e-3)
    for name in TREE:                   # a command changes no tracked file
        for path in (p for p in (ROOT / name).rglob("*") if p.is_file() and "__pycache__" not in p.parts):
            assert (tree / path.relative_to(ROOT)).read_bytes() == path.read_bytes()


def test_the_commands_in_the_text_of_the_readme_run_too(newcomer):
    typed = [c for c in dict.fromkeys(commands(ROOT / "README.md")) if c not in "\n".join(BLOCKS) and c not in NOT_RUN]
    assert typed and "facebook-nb apply" in "\n".join(BLOCKS)
    done = newcomer.types("\n".join(["source .venv/bin/activate", *map(newcomer.sized, typed)]), newcomer.tree)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr


def test_the_book_is_served_until_it_is_stopped(newcomer):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.listen()
        command = [newcomer.tree / ".venv/bin/facebook-nb", *SERVE.split()[1:], "--port", str(port)]
        taken = subprocess.run(command, cwd=newcomer.tree, env=newcomer.environment, capture_output=True, text=True)
        assert taken.returncode == 2 and taken.stderr == f"error: port {port} is taken; choose another with --port\n"
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
    server = subprocess.Popen(command, cwd=newcomer.tree, env=newcomer.environment, stdout=subprocess.PIPE, text=True,
                              stderr=subprocess.DEVNULL)
    try:
        assert server.stdout.readline() == f"{address} (Ctrl-C ends it)\n"
        while time.monotonic() < end:
            try:
                with urllib.request.urlopen(f"{address}/nbs/chapters/cmr.html", timeout=10) as page:
                    assert page.status == 200 and b"<h1>cmr" in page.read()
                break
            except urllib.error.URLError:
                time.sleep(0.2)
        server.send_signal(signal.SIGINT)
        assert server.wait(10) == 0
    finally:
        server.kill()


def test_train_by_torchrun(newcomer):
    """As the page on full scale says; it does what the run of README still lacks."""
    run = newcomer.tree / "runs/sdd_fiqa-full"
    (run / "steps/test/lfw.npz").unlink()
    before, metrics = (run / "steps/test/cfp_fp.npz").stat().st_mtime_ns, read_json(run / "metrics.json")["metrics"]
    [line] = [c for c in commands(ROOT / "nbs/appendix/full_scale.md") if c.startswith("torchrun --standalone")]
    line = newcomer.sized(line.replace("CHAPTER", "sdd_fiqa").replace("RUN", str(run))) + " --resume"
    done = newcomer.types("source .venv/bin/activate\n" + line, newcomer.tree)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert done.stdout == "sdd_fiqa: undecided: not measured; in runs/sdd_fiqa-full\n"      # said once
    assert (run / "steps/test/lfw.npz").exists() and read_json(run / "metrics.json")["metrics"] == metrics
    assert (run / "steps/test/cfp_fp.npz").stat().st_mtime_ns == before
