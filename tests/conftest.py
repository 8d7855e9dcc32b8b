"""What tests share: where things are, and optional data."""
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("FACEBOOK_NB_PROGRESS", "0")
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):     # two workers on two cores
    os.environ.setdefault(name, "1")


@pytest.hookimpl(tryfirst=True)         # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """Tests that share what a fixture of their file makes stay in one worker, so that it is made once."""
    for item in items:
        fixtures = [d for known in item._fixtureinfo.name2fixturedefs.values() for d in known]
        if any(d.scope == "module" for d in fixtures) and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem + "-" + item.path.parent.name))


def data_folder(name: str) -> Path:
    """A folder of real data for development; the test is skipped where there is none."""
    for root in (os.environ.get("FACEBOOK_NB_DATA"), ROOT.parent / "shared" / "data"):
        if root and (Path(root) / name).is_dir():
            return Path(root) / name
    pytest.skip(f"no {name} in FACEBOOK_NB_DATA or in ../shared/data")


@pytest.fixture
def root() -> Path:
    return ROOT


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return torch.device(request.param)
