"""Edit a notebook as plain text.

    python tools/nbtext.py text nbs/foundations/files.ipynb [FILE]   notebook -> text (default: stdout)
    python tools/nbtext.py book FILE nbs/foundations/files.ipynb     text -> notebook

In the text a cell starts with a line `%%%% md ID`, `%%%% code ID {"tags": [...]}` or `%%%% raw ID` (the metadata is
optional, JSON, on that line; a raw cell is a draft: kept, but neither run nor rendered); what follows, up to the next
such line, is its source as it is. Going back to a notebook, a code cell whose id and source are unchanged keeps its
outputs, the notebook keeps its metadata, and what the book folds is folded in Jupyter (`folds`).
"""
import json
import os
import re
import sys
from pathlib import Path

KINDS = {"md": "markdown", "code": "code", "raw": "raw"}
HEAD = re.compile(r"^%%%% (md|code|raw) ([A-Za-z0-9_-]{1,64})(?: (\{.*\}))?$")
KERNEL = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"},
          "language_info": {"name": "python"}}
FOLD = 30           # lines; a longer cell is folded whatever its tags
DIRECTIVE = re.compile(r"\s*#\s*\|")       # nbdev's, which a reader does not see


def folds(cell: dict) -> dict:
    """What Jupyter is told of a code cell, by its tags and its length: the metadata `jupyter`."""
    tags = set(cell["metadata"].get("tags", []))
    lines = [line for line in "".join(cell["source"]).strip().splitlines() if not DIRECTIVE.match(line)]
    hidden = {}
    if tags & {"hide-input", "hide-cell", "remove-input", "remove-cell"} or len(lines) > FOLD:
        hidden["source_hidden"] = True
    if tags & {"hide-output", "hide-cell", "remove-output"}:
        hidden["outputs_hidden"] = True
    return hidden


def to_text(nb: dict) -> str:
    """The cells of a notebook as text."""
    parts = []
    for cell in nb["cells"]:
        kind = next(k for k, v in KINDS.items() if v == cell["cell_type"])
        meta = {k: v for k, v in cell["metadata"].items() if k in ("tags", "mystnb")}
        head = f"%%%% {kind} {cell['id']}" + (f" {json.dumps(meta, ensure_ascii=False)}" if meta else "")
        parts.append(head + "\n" + "".join(cell["source"]).strip("\n") + "\n")
    return "\n".join(parts)


def to_notebook(text: str, old: dict | None = None) -> dict:
    """A notebook from text; outputs and notebook metadata come from `old` where they still fit."""
    known = {c["id"]: c for c in (old or {"cells": []})["cells"]}
    cells, current = [], None
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("%%%%"):
            match = HEAD.match(line)
            if not match:
                raise SystemExit(f"line {number}: not a cell head: {line!r}")
            current = (match[1], match[2], json.loads(match[3] or "{}"), [])
            cells.append(current)
        elif current is None:
            if line.strip():
                raise SystemExit(f"line {number}: text before the first cell head")
        else:
            current[3].append(line)
    ids = [c[1] for c in cells]
    if twice := sorted({i for i in ids if ids.count(i) > 1}):
        raise SystemExit(f"cell id used twice: {', '.join(twice)}")
    out = []
    for kind, name, meta, lines in cells:
        source = "\n".join(lines).strip("\n").splitlines(keepends=True)
        cell = {"cell_type": KINDS[kind], "id": name, "metadata": meta, "source": source}
        if kind == "code":
            before = known.get(name, {})
            same = "".join(before.get("source", [])) == "".join(source)
            cell |= {"execution_count": None, "outputs": before.get("outputs", []) if same else []}
            cell["metadata"] |= {"jupyter": hidden} if (hidden := folds(cell)) else {}
        out.append(cell)
    meta = (old or {}).get("metadata") or KERNEL
    return {"cells": out, "metadata": meta, "nbformat": 4, "nbformat_minor": 5}


def main(command: str, source: str, target: str = "") -> None:
    if command == "text":
        text = to_text(json.loads(Path(source).read_text()))
        Path(target).write_text(text) if target else print(text, end="")
    elif command == "book" and target:
        path = Path(target)
        nb = to_notebook(Path(source).read_text(), json.loads(path.read_text()) if path.exists() else None)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n")
        os.replace(part, path)
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 2 else sys.exit(__doc__)
