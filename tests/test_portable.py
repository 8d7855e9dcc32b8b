"""Pages read well in every front end of Jupyter, and the book makes numbered figures and equations of the same text."""
import ast
import json
import re
import sys

import pytest

from facebook_nb import experiment
from facebook_nb.experiment import Report, decide, numbers, prose
from facebook_nb.files import UserError
from tests.conftest import ROOT

sys.path[:0] = [str(ROOT / "_ext"), str(ROOT / "tools")]
import nbtext  # noqa: E402
import portable  # noqa: E402

NOTEBOOKS = sorted(ROOT.glob("nbs/*/*.ipynb"))
PAGES = [*NOTEBOOKS, *sorted(ROOT.glob("nbs/**/*.md"))]
named = {"ids": lambda p: p.stem}
MARKUP = re.compile(r"\{[a-z:-]+\}`|^[`:]{3,}\{|^:::|^\([\w-]+\)=$", re.M)
NAME = re.compile(r"\{[\w-]+(?::[^{}\s]+)?\}")


def cells(notebook):
    return json.loads(notebook.read_text())["cells"]


def source(cell):
    return "".join(cell["source"])


def texts(page):
    """What a reader reads: Markdown, prose and captions."""
    if page.suffix == ".md":
        yield page.read_text()
        return
    for cell in cells(page):
        if cell["cell_type"] == "markdown":
            yield source(cell)
        elif cell["cell_type"] == "code" and portable.is_prose(source(cell)):
            yield portable.call_of(source(cell), "prose")[0]
        elif cell["cell_type"] == "code" and (figure := portable.figure_of(source(cell))):
            yield figure["caption"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, **named)
def test_no_role_and_no_directive_is_left(notebook):
    for text in texts(notebook):
        assert not MARKUP.search(text), text[:100]
        assert "\\label" not in text and not re.search(r"\$\$ \(", text), text[:100]


@pytest.mark.parametrize("notebook", NOTEBOOKS, **named)
def test_prose_below_the_report_quotes_what_it_has_by_then(notebook):
    """At smoke an unknown name is no error, so only a long run would tell."""
    reported, later, quoted = False, set(), []
    for cell in cells(notebook):
        code = cell["cell_type"] == "code" and source(cell)
        if code and portable.is_prose(code):
            text = portable.call_of(code, "prose")[0] if reported else ""
            quoted.append((cell["id"], {n[1:-1].split(":")[0] for n in NAME.findall(text)}))
        elif code and "numbers(" in code:
            calls = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call)
                     and isinstance(n.func, ast.Name) and n.func.id == "numbers"]
            given = {k.arg.replace("_", "-") for call in calls for k in call.keywords if k.arg}
            if reported:
                for where, names in quoted:
                    assert not names & given - later, f"{where} quotes {names & given} before they are handed over"
            later |= given
            reported |= any(call.args for call in calls)


@pytest.mark.parametrize("notebook", NOTEBOOKS, **named)
def test_what_the_book_folds_is_folded_in_jupyter(notebook):
    fix = f"python tools/nbtext.py text {notebook.name} FILE, then book FILE {notebook.name}"
    for cell in cells(notebook):
        if cell["cell_type"] == "code":
            assert cell["metadata"].get("jupyter", {}) == nbtext.folds(cell), f"{cell['id']}: {fix}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, **named)
def test_pages_with_code_say_first_what_to_install(notebook):
    code = [cell for cell in cells(notebook) if cell["cell_type"] == "code"]
    assert not code or (code[0]["id"] == "installed" and "not installed: run `make lab`" in source(code[0]))


def waiting(cell):
    """Names of a prose cell for which its output shows no number."""
    text = portable.call_of(source(cell), "prose")[0].strip()
    kept = re.split(r"(\$\$.+?\$\$|\$[^$]+\$|`[^`]+`)", text, flags=re.S)
    pattern = "".join(re.escape(piece) if k % 2 else "(.+?)".join(map(re.escape, NAME.split(piece)))
                      for k, piece in enumerate(kept))
    names = [name for piece in kept[::2] for name in NAME.findall(piece)]
    found = re.fullmatch(pattern, portable.prose_of(cell), re.S)
    assert found, f"{cell['id']}: its output is not of its text"
    return [name for name, shown in zip(names, found.groups(), strict=True) if shown == "…"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, **named)
def test_stored_prose_has_its_numbers(notebook):
    for cell in cells(notebook):
        if cell["cell_type"] == "code" and portable.is_prose(source(cell)) and notebook.stem != "experiment":
            assert cell["outputs"] and not waiting(cell), cell["id"]


def addresses():
    """citation as it is written → addresses that it may have, from references.bib."""
    from pybtex.database import parse_file
    found = {}
    for key, entry in parse_file(str(ROOT / "references.bib")).entries.items():
        names = [" ".join(map(str, person.rich_last_names)) for person in entry.persons["author"]]
        who = names[0] if len(names) == 1 else f"{names[0]} and {names[1]}" if (
            len(names) == 2 and names[1] != "others") else f"{names[0]} et al."
        for text in (f"{who}, {entry.fields['year']}", f"{who} ({entry.fields['year']})"):
            found.setdefault(text, {})[entry.fields.get("url", "references.md")] = key
    return found


def test_citations_are_in_the_bibliography_and_all_of_it_is_cited():
    known, cited = addresses(), set()
    for page in PAGES:
        for text in texts(page):
            for name, address in re.findall(r"\[([^\[\]]+(?:, (?:19|20)\d\d| \((?:19|20)\d\d\)))\]\(([^)\s]+)\)", text):
                address = address if address.startswith("http") else address.rsplit("/", 1)[-1]
                assert address in known.get(name, {}), f"{page.stem}: [{name}]({address}) is not in references.bib"
                cited.add(known[name][address])
    never = {key for by in known.values() for key in by.values()} - cited
    assert not never, f"references.bib: never cited: {never}"


@pytest.fixture
def shown(monkeypatch):
    """What `prose` displays, by display id."""
    import IPython.display as ipython
    kept = {}
    keep = lambda what, display_id: kept.update({display_id: what.data})
    monkeypatch.setattr(ipython, "display", keep)
    monkeypatch.setattr(ipython, "update_display", keep)
    monkeypatch.setattr(experiment, "_KNOWN", {})
    monkeypatch.setattr(experiment, "_SHOWN", {})
    return lambda: list(kept.values())


def report(preset="book"):
    values = {"ours": {"auc": [0.8, 0.9]}, "rival": {"auc": [0.5, 0.7]}}
    return Report("toy", preset, [0, 1], values, decide("better", [0.3, 0.29]), 1.0)


def test_prose_waits_for_its_numbers(shown):
    prose("AUC {ours-auc:.2f}, {seeds} seeds; {claim-verdict}; {least:,}")
    assert shown() == ["AUC …, … seeds; …; …"]
    numbers(least=1000)
    assert shown() == ["AUC …, … seeds; …; 1,000"]
    numbers(report())
    assert shown() == ["AUC 0.85, 2 seeds; shown; 1,000"]
    numbers(least=2)                        # a cell further up was run again
    assert shown() == ["AUC 0.85, 2 seeds; shown; 2"]


def test_braces_of_mathematics_and_code_stay(shown):
    numbers(report(), x=3)
    prose(r"$\mathbf{x}_{x}$ and `{x}` and {x}; $$\frac{x}{x}$$ {a b} {}")
    assert shown() == [r"$\mathbf{x}_{x}$ and `{x}` and 3; $$\frac{x}{x}$$ {a b} {}"]


def test_an_unknown_number_is_an_error_that_names_the_nearest(shown):
    numbers(report())
    with pytest.raises(UserError, match="ours-auk.*nearest: ours-auc"):
        prose("{ours-auk}")
    numbers(report("smoke"))                # where a row may be missing
    prose("{ours-auk}, {claim-verdict:.2f}")
    assert shown() == ["(not at this preset), shown"]


def test_the_book_numbers_what_jupyter_names():
    text = portable.text_to_myst(
        "[Figure](#fig-a) and [(m-b)](#m-b):\n\n$$\nx = \\begin{cases} 1 \\end{cases} \\tag{m-b}\n$$\n\n"
        "$$y$$\n\n> **Beware.** Of this,\n>\n> and that.\n\n> one sentence")
    assert text == ("{numref}`fig-a` and {eq}`m-b`:\n\n$$\nx = \\begin{cases} 1 \\end{cases}\n$$ (m-b)\n\n$$y$$\n\n"
                    "````{admonition} Beware\n:class: warning\nOf this,\n\nand that.\n````\n\n> one sentence")


def test_a_figure_of_the_book_has_the_caption_of_the_call():
    caption = {"output_type": "display_data", "data": {"text/markdown": ['<a id="fig-a"></a>**Figure.** Few $x$.']}}
    picture = {"output_type": "display_data", "data": {"image/png": "…"}}
    cell = {"cell_type": "code", "id": "a", "metadata": {"tags": ["hide-input"]}, "outputs": [picture, caption],
            "source": ["if True:\n", "    plot()\n",
                       "figure('fig-a', 'Few '\n", "       '$x$, [(e)](#e).', alt='dots')"]}
    made = portable.cell_to_myst(cell)
    assert made["outputs"] == [picture]
    assert made["metadata"]["mystnb"] == {"figure": {"name": "fig-a", "caption": "Few $x$, {eq}`e`."},
                                          "image": {"alt": "dots"}}


def test_prose_of_the_book_is_text_run_or_not():
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "outputs": [],
            "source": ['prose("""\n', '{a} of $x_{b}$, `{c}`\n', '""")']}
    made = portable.cell_to_myst(cell)
    assert made["cell_type"] == "markdown" and made["source"].strip() == "… of $x_{b}$, `{c}`"
    cell["outputs"] = [{"output_type": "display_data", "data": {"text/markdown": ["3 of ", "[figure](#fig-x)"]}}]
    assert portable.cell_to_myst(cell)["source"] == "3 of {numref}`fig-x`"


def test_long_cells_fold_and_say_what_they_hold():
    lines = ["#| export\n", "def f():\n", *["    x = 1\n"] * 30]
    cell = {"cell_type": "code", "id": "f", "metadata": {}, "source": lines, "outputs": []}
    cell["metadata"]["jupyter"] = nbtext.folds(cell)
    assert cell["metadata"]["jupyter"] == {"source_hidden": True}
    made = portable.cell_to_myst(cell)["metadata"]
    assert made["tags"] == ["hide-input"] and made["mystnb"]["code_prompt_show"] == "Show f (31 lines)"
    assert nbtext.folds(cell | {"metadata": {}, "source": lines[:20]}) == {}
    assert nbtext.folds(cell | {"metadata": {"tags": ["hide-cell"]}}) == {"source_hidden": True, "outputs_hidden": True}


def test_text_form_derives_the_folds():
    book = nbtext.to_notebook('%%%% code a {"tags": ["hide-input"]}\nx = 1\n\n%%%% code b\ny = 2\n')
    assert [c["metadata"] for c in book["cells"]] == [{"tags": ["hide-input"], "jupyter": {"source_hidden": True}}, {}]
    assert nbtext.to_notebook(nbtext.to_text(book)) == book
