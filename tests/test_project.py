"""The project holds together: exports, stored outputs, imports, size."""
import ast
import base64
import importlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageSequence

from facebook_nb.cli import CHAPTERS, has_code
from facebook_nb.digests import source_digest
from facebook_nb.experiment import read_ledger, step_is_current
from tests.conftest import ROOT

sys.path[:0] = [str(ROOT / "_ext"), str(ROOT / "tools")]
import front  # noqa: E402
import nbtext  # noqa: E402
import portable  # noqa: E402

NOTEBOOKS = sorted(ROOT.glob("nbs/*/*.ipynb"))
RUN = [n for n in NOTEBOOKS if has_code(n)]
MODULES = [p for p in sorted((ROOT / "facebook_nb").rglob("*.py")) if p.name not in ("__init__.py", "_modidx.py")]
named = {"ids": lambda p: p.stem}


def cells(notebook):
    return json.loads(notebook.read_text())["cells"]


def test_modules_are_what_the_notebooks_export(tmp_path):
    from nbdev.export import nb_export
    for notebook in NOTEBOOKS:
        nb_export(notebook, lib_path=tmp_path / "facebook_nb")
    made = {p.relative_to(tmp_path): p.read_text() for p in tmp_path.rglob("*.py")}
    kept = {p.relative_to(ROOT): p.read_text() for p in MODULES}
    # headers name the notebook relative to the module, which differs in another folder
    plain = lambda text: re.sub(r"[\w./-]*/nbs/", "nbs/", text)
    made = {k: v for k, v in made.items() if k.name not in ("__init__.py", "_modidx.py")}
    assert set(made) == set(kept), "run nbdev_export; remove modules whose notebook is gone"
    for name, text in kept.items():
        assert plain(made[name]) == plain(text), f"{name}: run nbdev_export"


@pytest.mark.parametrize("notebook", RUN, **named)
def test_stored_outputs_are_of_this_code(notebook):
    stamp = json.loads(notebook.read_text())["metadata"].get("facebook_nb")
    assert stamp, f"{notebook.stem}: facebook-nb reproduce {notebook.stem}"
    assert stamp["versions"]["torch"] and stamp["device"]
    assert stamp["digest"] == source_digest(notebook), f"stale: facebook-nb reproduce {notebook.stem}"
    entry = read_ledger(notebook.stem, ROOT) if notebook.stem in CHAPTERS else {"digest": stamp["digest"]}
    assert entry["digest"] == stamp["digest"]
    # of a chapter whose experiment is still to be run its page says that these are outputs of smoke
    assert stamp["preset"] == ("smoke" if "due" in entry else "book")


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_recorded_steps_are_of_this_code(chapter):
    entry = read_ledger(chapter, ROOT)
    if "due" in entry:
        assert len(entry["due"]) > 20
        return
    config = importlib.import_module(f"facebook_nb.{chapter}").Config.preset("book")
    stale = [name for name, about in entry["steps"].items() if not step_is_current(about, config)]
    assert entry["steps"] and not stale, f"facebook-nb reproduce {chapter}"
    assert entry["claim"]["verdict"] in ("shown", "refuted", "undecided") and entry["mechanism"]


@pytest.mark.parametrize("notebook", RUN, **named)
def test_stored_outputs_are_fit_to_be_read(notebook):
    for cell in cells(notebook):
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error" and output.get("name") != "stderr", cell["id"]
            data = output.get("data", {})
            text = "".join(output.get("text", "")) + "".join(data.get("text/plain", ""))
            assert not re.search(r"/(home|tmp|root|work|Users)/| at 0x[0-9a-f]{6}", text), cell["id"]
            assert "application/vnd.jupyter.widget-view+json" not in data, cell["id"]
            for kind in ("image/png", "image/jpeg", "image/svg+xml", "image/gif"):
                if kind in data:
                    figure = portable.figure_of("".join(cell["source"])) or {}
                    assert figure.get("caption") and figure.get("alt"), f"{cell['id']}: no figure(name, caption, alt)"
                    assert len("".join(data[kind])) < 220_000, f"{cell['id']}: figure over 150 KB"
                    if kind == "image/gif":
                        moving = Image.open(io.BytesIO(base64.b64decode("".join(data[kind]))))
                        loop = sum(f.info["duration"] for f in ImageSequence.Iterator(moving))
                        assert loop <= 12_000, f"{cell['id']}: a film of {loop} ms"
    assert notebook.stat().st_size < 2_700_000


def first_half(notebook):
    """The cells of a chapter up to its next part after what came out; the whole page where there is no such part."""
    came_out, half = False, []
    for cell in cells(notebook):
        heads = re.findall(r"^## (.*)", "".join(cell["source"]), re.M) if cell["cell_type"] == "markdown" else []
        if came_out and heads:
            break
        came_out |= "What came out" in "".join(cell["source"]) or any(h.startswith("The experiment:") for h in heads)
        half.append(cell)
    return half


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_says_what_it_asks_and_its_first_half_is_short(chapter):
    """A reader reads Markdown, prose and captions; not equations, addresses and what is folded."""
    notebook = ROOT / f"nbs/chapters/{chapter}.ipynb"
    words = lines = 0
    for cell in first_half(notebook):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown" or portable.is_prose(source):
            text = source if cell["cell_type"] == "markdown" else portable.call_of(source, "prose")[0]
            text = re.sub(r"\$\$.*?\$\$|<[^>]*>|\]\([^)]*\)", "", text, flags=re.S)
            words += len(re.findall(r"\S*[A-Za-z]\S*", text))
        elif cell["cell_type"] == "code":
            words += len(((portable.figure_of(source) or {}).get("caption") or "").split())
            if not nbtext.folds(cell).get("source_hidden"):
                lines += len([line for line in source.splitlines()
                              if line.strip() and not nbtext.DIRECTIVE.match(line)])
    assert lines <= 400 and words <= 3_500, f"{lines} visible lines of code, {words} words"
    glance = next(portable.call_of(s, "prose")[0] for c in cells(notebook)
                  if portable.is_prose(s := "".join(c["source"])) and "| Task |" in s)
    assert re.search(r"\d+ minutes", glance) and re.search("to know before|should know", glance, re.I)
    if chapter != "substitute":         # its page is of a recorded run, and gets both lines with the next one
        assert "| Afterwards you can |" in glance
        assert f"| {len(front.cases(ROOT)[chapter])} reference cases: " in glance
    page = "".join("".join(c["source"]) for c in cells(notebook))
    asked, solved = (set(re.findall(rf"{what} (\d)", page, re.I)) for what in (r"\*\*exercise", "solution of exercise"))
    assert len(asked) >= 3 and asked <= solved, f"exercises {asked}, solutions {solved}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, **named)
def test_cells_are_named_after_what_they_define(notebook):
    ids = [c["id"] for c in cells(notebook)]
    assert len(ids) == len(set(ids))
    for cell in cells(notebook):
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and source.startswith("#| export\n"):
            defined = re.findall(r"^(?:class|def) (\w+)|^(\w+)(?::[^=\n]+)? = ", source, re.M)
            public = [a or b for a, b in defined if not (a or b).startswith("_")]
            if public and not source.startswith("#| export\nimport"):
                assert cell["id"] in public or cell["id"] in source, cell["id"]


def test_headings_do_not_jump_and_titles_are_single():
    for notebook in NOTEBOOKS:
        levels = []
        for cell in cells(notebook):
            if cell["cell_type"] == "markdown":
                text = re.sub(r"```.*?```", "", "".join(cell["source"]), flags=re.S)
                levels += [len(m) for m in re.findall(r"^(#+) ", text, re.M)]
        assert levels[0] == 1 and levels.count(1) == 1, notebook.stem
        assert all(b - a <= 1 for a, b in zip(levels, levels[1:])), notebook.stem


def test_a_light_import(tmp_path):
    heavy = ("matplotlib", "dlib", "cv2", "sklearn", "accelerate", "tensorboard", "papermill", "nbdev")
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in MODULES if p.stem != "cli"]
    code = ("import sys, importlib\nimport facebook_nb\nassert 'torch' not in sys.modules\n"
            f"for name in {names}:\n importlib.import_module(name)\n"
            f"bad = [m for m in {heavy} if m in sys.modules]\nassert not bad, bad")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_repository_stays_small():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    sizes = {p: (ROOT / p).stat().st_size for p in listed.stdout.split("\0") if p and (ROOT / p).exists()}
    assert sum(sizes.values()) < 30e6
    assert max(sizes.values()) < 3e6, max(sizes, key=sizes.get)


def test_the_project_names_no_machine():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in (".py", ".md", ".ipynb", ".yml", ".ini", ".toml", ".txt") and path != Path(__file__):
            found = re.search(r"(?<![\w./-])/(?:work|home/\w+|root)/", path.read_text())
            assert not found, f"{name}: {found[0]}"


def test_readme_quotes_the_ledger():
    done = subprocess.run([sys.executable, "tools/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_pages_about_the_whole_say_what_is_there():
    """Cases are counted where a test reads them; what ships has a card, what is shown whole an example."""
    tests = "".join(p.read_text() for p in (ROOT / "tests" / "parity").glob("*.py"))
    for chapter, cases in front.cases(ROOT).items():
        unread = [c for c in cases if re.sub(r"\d+$", "", c.split("_")[0].split(".")[-1]) not in tests]
        assert not unread, f"{chapter}: {unread}"
    assert list(front.ASKS) == list(CHAPTERS) == list(front.entries(ROOT))
    known = {module[0]: module for module in front.modules(ROOT)}
    for chapter in CHAPTERS:
        full, public, _, notebook = known[f"facebook_nb.{chapter}"]
        main = front.HEADLINES[chapter]
        assert 5 <= len(main) <= 10 and not set(main) - set(public), chapter
        assert sum(bool(front.example(ROOT, notebook, name)) for name in main) >= 5, chapter
    cards = (ROOT / "nbs/appendix/weights.md").read_text()
    assert re.findall(r"^(\w+):$", cards, re.M) == list(CHAPTERS)
    assert all(len(re.findall(rf"^  {key}: .{{10}}", cards, re.M)) == len(CHAPTERS) for key in front.Cards.WORDS)
    assert all(front.facts(ROOT, chapter) for chapter in CHAPTERS)


def test_every_public_definition_has_a_docstring():
    for module in MODULES:
        for node in ast.parse(module.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{module.stem}.{node.name}"


def public_calls(body, prefix=""):
    """(name, definition) of public functions, and of methods of public classes, constructors and operators included."""
    for node in body:
        if isinstance(node, ast.FunctionDef) and (node.name[0] != "_" or node.name.endswith("__")):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef) and node.name[0] != "_":
            yield from public_calls(node.body, f"{node.name}.")


def test_every_public_call_says_its_types():
    for module in MODULES:
        for name, node in public_calls(ast.parse(module.read_text()).body):
            a = node.args
            given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
            bound = "." in name and not any(ast.unparse(d) == "staticmethod" for d in node.decorator_list)
            lacking = [x.arg for x in given[bound:] if x.annotation is None]
            returns = node.returns is not None or node.name == "__init__"
            assert not lacking and returns, f"{module.stem}.{name}: {', '.join(lacking) or 'what it returns'}"
