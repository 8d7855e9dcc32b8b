"""Pages are plain Markdown that every front end of Jupyter shows; here they become the MyST that the book is made of.

| in the notebook | in the book |
| --- | --- |
| `[figure](#fig-x)` | the figure by its number |
| `$$ … \\tag{x} $$`, `[(x)](#x)` | a numbered equation, and its number |
| a quotation that begins with bold words | a box with that title |
| a cell `prose("…")` | what the cell displays, as text of the page |
| a cell that ends in `figure(name, caption, alt)` | a numbered figure with caption and alt text |
| a folded cell (`jupyter.source_hidden`) | a folded cell that says what it holds |
"""
import ast
import json
import re

EQUATION = re.compile(r"\$\$((?:(?!\$\$).)*?)\s*\\tag\{([\w-]+)\}\s*\$\$", re.S)
TO_EQUATION = re.compile(r"\[\(([\w-]+)\)\]\(#\1\)")
TO_FIGURE = re.compile(r"\[[Ff]igure\]\(#(fig-[\w-]+)\)")
BOX = re.compile(r"^> \*\*([^*\n]+?)\.?\*\*[ \n]?(.*(?:\n>.*)*)", re.M)


def text_to_myst(text: str) -> str:
    """Markdown of a page with the book's numbers and boxes in it."""
    text = EQUATION.sub(r"$$\1\n$$ (\2)", text)
    text = TO_EQUATION.sub(r"{eq}`\1`", text)
    text = TO_FIGURE.sub(r"{numref}`\1`", text)
    return BOX.sub(lambda box: f"````{{admonition}} {box[1]}\n:class: warning\n" + re.sub(
        r"^> ?", "", box[2], flags=re.M) + "\n````", text)


def call_of(source: str, name: str) -> dict | None:
    """The last call of a function in a cell: its arguments by name or position. None where there is none."""
    if f"{name}(" not in source:
        return None
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)
             and isinstance(node.func, ast.Name) and node.func.id == name]
    if not calls:
        return None
    call = max(calls, key=lambda node: node.lineno)
    given = {**dict(enumerate(call.args)), **{word.arg: word.value for word in call.keywords}}
    return {key: ast.literal_eval(value) for key, value in given.items()}


def figure_of(source: str) -> dict | None:
    """name, caption and alt of the figure that a cell shows; None where it shows none."""
    call = call_of(source, "figure")
    if call is None:
        return None
    keys = dict(enumerate(("name", "caption", "alt", "later")))
    return {keys.get(key, key): value for key, value in call.items()}


def is_prose(source: str) -> bool:
    """Whether a cell is prose, and nothing else."""
    return source.startswith("prose(")


def prose_of(cell: dict) -> str:
    """What a prose cell displays; before it was run, its text with an ellipsis for each number."""
    for output in cell["outputs"]:
        if "text/markdown" in output.get("data", {}):
            return "".join(output["data"]["text/markdown"])
    pieces = re.split(r"(\$\$.+?\$\$|\$[^$]+\$|`[^`]*`)", call_of("".join(cell["source"]), "prose")[0], flags=re.S)
    pieces[::2] = (re.sub(r"\{[\w-]+(:[^{}\s]+)?\}", "…", piece) for piece in pieces[::2])
    return "".join(pieces)


def is_caption(output: dict) -> bool:
    """Whether an output is the caption that `figure` shows."""
    return "".join(output.get("data", {}).get("text/markdown", "")).startswith('<a id="fig-')


def cell_to_myst(cell: dict) -> dict:
    """A cell as the book renders it."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return cell | {"source": text_to_myst(source)}
    if cell["cell_type"] != "code":
        return cell
    if is_prose(source):
        return {"cell_type": "markdown", "id": cell["id"], "metadata": {}, "source": text_to_myst(prose_of(cell))}
    meta = json.loads(json.dumps(cell["metadata"]))
    about, tags = meta.setdefault("mystnb", {}), meta.setdefault("tags", [])
    if meta.get("jupyter", {}).get("source_hidden") and not any(t.startswith(("hide-", "remove-")) for t in tags):
        lines = [line for line in source.strip().splitlines() if not re.match(r"\s*#\s*\|", line)]
        name = re.search(r"^(?:class|def) (\w+)", source, re.M)
        what = f"{name[1] if name else 'code'} ({len(lines)} lines)"
        about |= {"code_prompt_show": f"Show {what}", "code_prompt_hide": f"Hide {what}"}
        tags.append("hide-input")
    if shown := figure_of(source):
        about["figure"] = {"name": shown["name"], "caption": text_to_myst(shown["caption"])}
        about["image"] = {"alt": shown["alt"]}
    return cell | {"metadata": meta, "outputs": [o for o in cell["outputs"] if not is_caption(o)]}


def notebook_to_myst(notebook: dict) -> dict:
    """A notebook as the book renders it."""
    return notebook | {"cells": [cell_to_myst(cell) for cell in notebook["cells"]]}


def heading_anchor(title: str) -> str:
    """The anchor of a heading, as JupyterLab makes it."""
    return title.replace(" ", "-")


def read_source(app, docname, source):
    """Sphinx has read a page."""
    if str(app.env.doc2path(docname)).endswith(".ipynb"):
        source[0] = json.dumps(notebook_to_myst(json.loads(source[0])))
    else:
        source[0] = text_to_myst(source[0])


def setup(app):
    app.connect("source-read", read_source)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
