"""The package without the repository: its wheel, beside the core requirements and nothing else."""
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from tests.conftest import ROOT


def closure(requirements):
    """The installed distributions that the requirements need, without extras."""
    found, todo = {}, [Requirement(r) for r in requirements]
    while todo:
        need = todo.pop()
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        name = need.name.lower().replace("_", "-")
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(need.name)
        except metadata.PackageNotFoundError:
            continue                    # another platform's
        todo += [Requirement(r) for r in found[name].requires or []]
    return found


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A Python with the wheel and the core requirements, linked from this environment instead of downloaded."""
    place = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", place, ROOT], check=True,
                   capture_output=True)
    [wheel] = place.glob("*.whl")
    venv.create(place / "env", with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": place / "env", "platbase": place / "env"}))
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel],
                   check=True, capture_output=True)
    [info] = site.glob("facebook_nb-*.dist-info")
    needs = metadata.PathDistribution(info).requires
    for distribution in closure(needs).values():
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    return place / "env" / "bin" / "python"


pytestmark = pytest.mark.xdist_group("wheel")


def run(python, *args, cwd):
    return subprocess.run([python, *args], capture_output=True, text=True, cwd=cwd)


def test_the_wheel_holds_modules_and_weights_only(python):
    package = next(python.parent.parent.rglob("facebook_nb"))
    assert (package / "weights").is_dir() and (package / "py.typed").is_file()
    assert not list(package.rglob("*.ipynb"))


def test_the_wheel_says_what_it_is(python):
    about = metadata.PathDistribution(next(python.parent.parent.rglob("facebook_nb-*.dist-info"))).metadata
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == about["Version"]
    assert cited["license"] == (about["License-Expression"] or about["License"])
    assert f"## {about['Version']}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"Source, {cited['repository-code']}" in about.get_all("Project-URL")
    assert f"git clone {cited['repository-code']} " in (ROOT / "README.md").read_text()


def test_every_module_imports_with_the_core_requirements(python, tmp_path):
    code = ("import importlib, pkgutil, facebook_nb\n"
            "names = [m.name for m in pkgutil.walk_packages(facebook_nb.__path__, 'facebook_nb.')]\n"
            "[importlib.import_module(n) for n in names]\nprint(len(names), facebook_nb.__file__)")
    done = run(python, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= 12 and str(ROOT) not in done.stdout


def test_apply_works_with_the_core_requirements(python, tmp_path):
    import numpy as np

    from facebook_nb.files import read_json, write_image
    write_image(tmp_path / "photo.png", np.random.default_rng(0).integers(0, 255, (120, 120, 3), dtype=np.uint8))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    done = run(python, "-m", "facebook_nb.cli", "apply", "sdd_fiqa", "photo.png", "broken.png", "--out-dir", "out",
               cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    photo, broken = read_json(tmp_path / "out" / "results.json")
    assert 0 <= photo["quality"] <= 100 and "error" in broken


def test_running_notebooks_asks_for_the_repository(python, tmp_path):
    for words in (("run", "sdd_fiqa"), ("book",)):
        done = run(python, "-m", "facebook_nb.cli", *words, cwd=tmp_path)
        assert done.returncode == 2 and "clone" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    for command in ("list", "results"):             # these need the ledger only, which the wheel holds
        done = run(python, "-m", "facebook_nb.cli", command, cwd=tmp_path)
        assert done.returncode == 0 and "cmr" in done.stdout, done.stderr
