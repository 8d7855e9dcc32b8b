"""What a number depends on: code that is reached, whatever module it lies in, and nothing else."""
import json
import os
import subprocess
import sys
import textwrap

import pytest

from facebook_nb import digests
from facebook_nb.digests import code_digest, source_digest


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
    monkeypatch.setattr(digests, "PACKAGE", "facebook_nb_toy")
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


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose module `high` uses what stands in `low`; write(module, text) changes it."""
    place = tmp_path / "facebook_nb_two"
    place.mkdir()
    monkeypatch.setattr(digests, "PACKAGE", place.name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, place.name, raising=False)
    clock = iter(range(1, 99))

    def write(module, text):
        path = place / f"{module}.py"
        path.write_text(textwrap.dedent(text))
        os.utime(path, ns=(next(clock) * 10**9,) * 2)

    write("__init__", "")
    return write


def key():
    return code_digest([("facebook_nb_two.high", "step")])


def test_a_step_reaches_code_but_neither_plumbing_nor_its_module(package):
    low = """
        def plumbing(x): return x
        def scaled(x): return 2 * x
        @plumbing
        def tell(x): print("at", x)
        def unused(): return 1
        """
    high = "from .low import scaled, tell\ndef step(x: int) -> int:\n    tell(x)\n    return scaled(x)\n"
    package("low", low)
    package("high", high)
    first = key()
    package("low", low.replace('"at"', '"now at"').replace("return 1", "return 2"))
    package("high", high.replace("x: int", "x: float").replace("    tell", '    """Says."""\n    tell'))
    assert key() == first
    package("other", "def scaled(x): return 2 * x\n")          # moved, unchanged
    package("low", low.replace("def scaled(x): return 2 * x", ""))
    package("high", high.replace("scaled, tell", "tell\nfrom .other import scaled"))
    assert key() == first
    package("other", "def scaled(x): return 3 * x\n")
    assert key() != first


def test_names_that_are_local_reach_nothing(package):
    code = "x = {}\ndef step(y):\n    x = y + 1\n    return [x for x in range(x)]\n"
    package("high", code.format(1))
    first = key()
    package("high", code.format(2))
    assert key() == first


def test_a_part_of_a_module_is_not_all_of_it(package):
    package("low", "def a(): return 1\ndef b(): return 1\n")
    package("high", "from . import low\ndef step(): return low.a()\n")
    first = key()
    package("low", "def a(): return 1\ndef b(): return 2\n")
    assert key() == first
    package("low", "def a(): return 2\ndef b(): return 2\n")
    assert key() != first


def test_a_script_and_a_module_have_the_same_key(package, tmp_path):
    """As the cells of a notebook and the module exported from them."""
    code = "from facebook_nb_two.low import scaled\ndef step(x): return scaled(x) + ONE\nONE = 1\n"
    package("low", "def scaled(x): return 2 * x\n")
    package("high", code.replace("facebook_nb_two.low", ".low"))
    script = tmp_path / "script.py"
    script.write_text(code + (
        "from facebook_nb import digests\ndigests.PACKAGE = 'facebook_nb_two'\n"
        "print(digests.code_digest(digests.code_roots(step)))\n"))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.stdout.strip() == key(), done.stderr
