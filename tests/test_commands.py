"""Every command that stands in the pages works as it is written; what a user types first is run."""
import ast
import importlib
import itertools
import json
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

from facebook_nb import cli
from facebook_nb.cli import CHAPTERS
from facebook_nb.files import UserError
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("nbs/**/*.md")),
         *sorted(ROOT.glob("nbs/**/*.ipynb")), ROOT / "facebook_nb/cli.py"]       # the last: help texts
MISTYPED = typer.BadParameter.__mro__[2]         # what the parser raises
FIRST = r"(?:\.venv/bin/)?(?:facebook-nb|torchrun|accelerate launch|make|python)(?= |$)"


def commands(path):
    """The commands of a page: lines of its blocks, and code in its text that begins with one of ours."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        text = "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    text = re.sub(r"\\\n\s*", " ", text)
    if path.suffix != ".py":
        for line in re.findall(rf"^\s*({FIRST}.*)$", text, re.M):
            if " `" not in line:
                yield re.split(r"\s+# ", line)[0].strip()
    for part in text.split("\n\n"):
        for code in re.findall(r"`([^`]+)`", part.replace("```", "")):
            if re.match(FIRST + " ", code):
                yield " ".join(code.split())


def parsed(words):
    """(path of the command, its parameters), as typed after `facebook-nb`."""
    command, context, names = typer.main.get_command(cli.app), None, []
    try:
        while True:
            context = command.make_context(names[-1] if names else "facebook-nb", list(words), parent=context)
            if not hasattr(command, "resolve_command"):
                return names, context.params
            name, command, words = command.resolve_command(context, context._protected_args + context.args)
            names.append(name)
    except typer.Exit:                               # --help, --version
        return names, {}


def of_facebook_nb(words):
    names, given = parsed(words)
    if not given:
        return
    chapters = given.get("chapters") or ([given["chapter"]] if "chapter" in given else [])
    for chapter in chapters:
        module = cli.chapter_module(chapter)
        where = {k: given[k] for k in ("data_root", "seed", "devices", "out_dir") if given.get(k) is not None}
        config = module.Config.preset(given["preset"], **where, **cli._overrides(given.get("set_")))
        if any(s.startswith("rows=") for s in given.get("set_") or []):
            known = set().union(*(getattr(module, n, ()) for n in ("ROWS", "ABLATIONS", "FULL_ROWS")))
            assert set(config.rows) <= known, f"rows {set(config.rows) - known}"
    if names == ["reproduce"]:
        assert cli._notebooks(given.get("names") or given.get("notebooks") or [], ROOT)


def of_launcher(words, valued, flags):
    """What stands behind `-m facebook_nb.cli` is a command of ours, before it only options of the launcher."""
    module = next(k for k, w in enumerate(words) if w in ("-m", "--module"))
    assert words[module + 1] == "facebook_nb.cli"
    before = iter(words[:module])
    for word in before:
        assert word in valued | flags, f"no option {word}"
        if word in valued:
            next(before)
    of_facebook_nb([w for w in words[module + 2:] if w != "…"])


def check(command):
    words = shlex.split(command)
    first, *rest = words[0].removeprefix(".venv/bin/"), *words[1:]
    if first == "facebook-nb":
        of_facebook_nb([w for w in rest if w != "…"])
    elif first == "torchrun":
        of_launcher(rest, {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port"},
                    {"--standalone"})
    elif first == "accelerate":
        of_launcher(rest[1:], {"--num_processes", "--num_machines", "--machine_rank", "--main_process_ip",
                               "--main_process_port"}, set())
    elif first == "make":
        assert set(rest) <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)), "no such target"
    elif rest[0] == "-m":
        tool = importlib.import_module(rest[1])
        options = [w for w in rest[2:] if w.startswith("--")]
        assert rest[1] == "pytest" or all(f'"{w}"' in Path(tool.__file__).read_text() for w in options)
    else:
        assert (ROOT / rest[0]).is_file(), f"no {rest[0]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_are_known(page):
    wrong = []
    for command in dict.fromkeys(commands(page)):
        chapters = CHAPTERS if re.search(r"\bCHAPTER\b", command) else [""]
        for chapter in chapters:
            typed = re.sub(r"\bCHAPTER\b", chapter, command).replace("run …", "run cmr")
            if page.name == "CONTRIBUTING.md":
                typed = re.sub(r"(run|reproduce) x\b", r"\1 sdd_fiqa", typed)
            try:
                check(typed)
            except (UserError, AssertionError, MISTYPED, ImportError, StopIteration) as error:
                wrong.append(f"{typed}: {getattr(error, 'message', error)}")
    assert not wrong, f"{page.name}:\n" + "\n".join(wrong)


def test_the_commands_of_the_pages_are_found():
    found = {str(p.relative_to(ROOT)): [*commands(p)] for p in PAGES}
    assert len(found["README.md"]) >= 12 and len(found["nbs/appendix/full_scale.md"]) >= 9
    for chapter in CHAPTERS:
        page = " ".join(found[f"nbs/chapters/{chapter}.ipynb"])
        assert f"facebook-nb data check {chapter}" in page and f" {chapter} --preset full" in page, chapter


# --- commands that are run -----------------------------------------------------------------------------------------

@pytest.fixture
def typed(capsys, monkeypatch):
    """Run `facebook-nb …` in this process: (exit code, stdout, stderr)."""
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["facebook-nb", *map(str, words)])
        capsys.readouterr()
        try:
            code = cli.main()
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code or 0, out, err
    return run


def test_a_command_of_its_own():
    """Outside this process, as installed."""
    for words, text in ((["--version"], "facebook-nb "), (["list"], "sdd_fiqa"), (["results"], "cmr")):
        done = subprocess.run([Path(sys.executable).parent / "facebook-nb", *words], capture_output=True, text=True)
        assert done.returncode == 0 and text in done.stdout and not done.stderr


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_help_of_apply(typed, chapter):
    code, out, _ = typed("apply", chapter, "--help")
    assert code == 0 and cli.TAKES[chapter][0] in out and "--weights" in out


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    from matplotlib import cbook

    root, rng = tmp_path_factory.mktemp("inputs"), np.random.default_rng(0)
    photo = Image.open(cbook.get_sample_data("grace_hopper.jpg")).convert("RGB")
    for folder in ("photos", "labelled/x", "labelled/y"):
        (root / folder).mkdir(parents=True)
    photo.save(root / "photos/a.jpg")
    noise = Image.fromarray(rng.integers(0, 255, (200, 200, 3), np.uint8))
    for name in ("photos/noise.png", "labelled/x/1.png", "labelled/y/1.png"):
        noise.save(root / name)
    (root / "photos/z.jpg").write_bytes(b"no picture")
    np.save(root / "clip.npy", rng.integers(0, 255, (48, 64, 64, 3), np.uint8))
    (root / "bad.npy").write_bytes(b"no film")
    (root / "pairs.csv").write_text("score,same,group\n" + "".join(
        f"{rng.normal(0.6 if i % 2 else 0.1, 0.15):.3f},{i % 2},{g}\n" for g in "AB" for i in range(200)))
    (root / "bad.csv").write_text("nothing\n")
    (root / "own_models.py").write_text(
        "import numpy as np\ndef predict(x):\n    return (10 * np.asarray(x).mean((1, 2, 3))).astype(int)\n"
        "predict.budget = 300\n")
    return root


APPLIED = {         # chapter → inputs, fields of the first row, errors
    "fpr": (["pairs.csv", "bad.csv"], {"groups", "std_fmr"}),
    "sdd_fiqa": (["photos/"], {"quality", "face"}),
    "adv_makeup": (["photos/a.jpg", "photos/noise.png", "photos/z.jpg", "photos/a.jpg"],
                   {"similarity_before", "similarity_after", "threshold", "output", "face"}),
    "substitute": (["own_models:predict", "own_models:gone"], {"agreement", "attack_success", "queries"}),
    "local_relation": (["photos"], {"forgery_probability", "heat_map", "face"}),
    "d2am": (["photos"], {"liveness", "face"}),
    "lap": (["photos/a.jpg", "photos/noise.png", "photos/z.jpg"], {"mesh", "turntable", "face"}),
    "dmf": (["labelled", "photos"], {"label", "scores"}),
    "afsd": (["clip.npy", "bad.npy"], {"detections", "timeline"}),
    "cmr": (["clip.npy", "bad.npy"], {"label", "scores"})}


FILES = {"mesh", "ply", "turntable", "maps", "output", "heat_map", "picture", "timeline", "substitute", "questions"}


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_apply_leaves_what_the_contract_says(typed, inputs, chapter, monkeypatch, tmp_path):
    pytest.importorskip("dlib")
    monkeypatch.chdir(inputs)
    monkeypatch.syspath_prepend(str(inputs))
    given, wanted = APPLIED[chapter]
    if chapter == "adv_makeup":         # a few steps leave the same files as sixty
        monkeypatch.setattr(cli.chapter_module(chapter).apply, "__defaults__", (None, None, 3))
    code, out, err = typed("apply", chapter, *given, "--out-dir", tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())
    assert code == 0 and (tmp_path / "results.csv").exists()
    assert all(next(iter(row)) == "input" and row["weights"] for row in rows)
    assert wanted <= set(rows[0]) and "error" not in rows[0]
    written = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*")}
    named = {row[k] for row in rows for k in FILES & set(row)}
    assert named <= written and (named or chapter == "sdd_fiqa")    # names in the folder, whoever moves it
    [bad] = [row for row in rows if "error" in row]
    assert bad["error"] in err and not wanted - {"face"} & set(bad)
    if "face" in wanted:
        assert rows[0]["face"] == "found"
        [lost] = [row for row in rows if row.get("face") == "not found"]
        assert lost["reason"] and not wanted - {"face"} & set(lost)


def lean(notebook, parameters):
    """A chapter's cells in order, down to its run: what is exported, imports and settings; no figures, no kernel."""
    space = types.ModuleType("lean")
    vars(space).update(parameters)
    sys.modules["lean"] = space                 # where dataclasses look for it
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] != "code" or "parameters" in cell["metadata"].get("tags", []):
            continue
        source = "".join(cell["source"])
        tree = ast.parse(source)
        if not re.search(r"\A#\| export|^(config = Config\.|report = run\()", source, re.M):
            tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(tree, cell["id"], "exec"), vars(space))
        if "report" in vars(space):
            return


def lean_execute(notebook, done, parameters, **_):
    try:
        lean(notebook, parameters)
    except UserError as error:
        return cli.Outcome(notebook.stem, 0.0, str(error), user=True)
    return cli.Outcome(notebook.stem, 0.0)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_check_and_a_run_agree_on_an_empty_folder(typed, chapter, tmp_path, monkeypatch):
    """Also that the notebook runs its experiment after what `full` needs is defined."""
    monkeypatch.setattr(cli, "execute", lean_execute)
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("FACEBOOK_NB_DATA", "")
    code, out, err = typed("data", "check", chapter, "--data-root", tmp_path / "data")
    assert code == 2 and (out + err).strip()
    code, out, err = typed("run", chapter, "--preset", "full", "--data-root", tmp_path / "data",
                           "--out-dir", tmp_path / "run")
    assert code == 2 and len(err.strip().splitlines()) == 1 and err.startswith("error: ")
    assert not list(tmp_path.glob("run/steps/*"))


def test_a_check_asks_all_that_a_run_asks(typed, tmp_path):
    """Seven people are data for adv_makeup's `book`; `full` needs more, and says so."""
    for k in range(7):
        Image.new("RGB", (40, 40), (9 * k, 90, 90)).save(tmp_path / f"{k}.png")
    code, out, err = typed("data", "check", "adv_makeup", "--data-root", tmp_path)
    assert code == 2 and "7 people" in out and "Datasets_Makeup" in err
    assert typed("data", "check", "adv_makeup", "--preset", "book", "--data-root", tmp_path)[0] == 0


@pytest.mark.parametrize("chapter, field, wanted", [
    ("d2am", "protocols=mixture", ("mixture",)), ("local_relation", "tests=A,B", (Path("A"), Path("B"))),
    ("cmr", "start=null", None), ("afsd", "start=null", None)])
def test_set_without_quotes(chapter, field, wanted):
    config = cli.chapter_module(chapter).Config.preset("full", **cli._overrides([field]))
    assert getattr(config, field.split("=")[0]) == wanted


def test_run_on_a_folder_of_photos(typed, tmp_path, monkeypatch):
    """`run lap --data-root` on two people, all of the command but the kernel."""
    rng = np.random.default_rng(0)
    for person, k in itertools.product("ab", range(4)):
        place = tmp_path / "people" / person
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(place / f"{k}.png")
    settings = [w for s in ("photos=4", "n_max=2") for w in ("--set", s)]
    monkeypatch.setattr(cli, "execute", lean_execute)
    code, out, err = typed("run", "lap", "--preset", "smoke", "--data-root", tmp_path / "people", *settings,
                           "--out-dir", tmp_path / "run")
    assert code == 0, err
    assert "undecided" in out and (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize("chapter", ["cmr", "afsd"])
def test_one_picture_is_no_film(inputs, chapter):
    photo = Image.open(inputs / "photos/a.jpg")
    rows = cli.chapter_module(chapter).apply([photo, np.asarray(photo), np.load(inputs / "clip.npy")])
    assert ["one picture" in row.get("error", "") for row in rows] == [True, True, False]
