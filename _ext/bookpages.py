"""What the book adds to Jupyter Book: tidy cells, a results table from the ledger, mathematics without a network."""
import importlib.util
import json
import re
import shutil
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive

DIRECTIVE = re.compile(r"\s*#\s*\|")
FOLD = 30           # a longer cell folds by itself


def tidy_cells(app, doctree):
    """Take nbdev's directives out of code cells; fold those that are long."""
    for cell in list(doctree.findall(nodes.container)):
        if cell.get("nb_element") != "cell_code" or not cell.children:
            continue
        source = cell.children[0]
        if source.get("nb_element") != "cell_code_source":
            continue
        block = next(source.findall(nodes.literal_block))
        lines = [line for line in block.astext().split("\n") if not DIRECTIVE.match(line)]
        text = "\n".join(lines).strip("\n")
        block.rawsource, block.children = text, [nodes.Text(text)]
        if not text:                                    # there were only directives
            cell.remove(source)
            if not cell.children:
                cell.parent.remove(cell)
            continue
        count = text.count("\n") + 1
        if count > FOLD and not cell.get("hide_mode"):
            name = re.search(r"^(?:class|def) (\w+)", text, re.M)
            what = f"{name[1] if name else 'code'} ({count} lines)"
            cell["hide_mode"] = "input"
            cell["prompt_show"], cell["prompt_hide"] = f"Show {what}", f"Hide {what}"


class Ledger(Directive):
    """A table of the ledger: chapter, claim, whether it holds, effect, cost."""

    def run(self):
        env = self.state.document.settings.env
        folder = Path(env.srcdir) / "nbs" / "results"
        entries = []
        for path in sorted(folder.glob("*.json")):
            env.note_dependency(str(path))
            entries.append(json.loads(path.read_text()))
        head = ("Chapter", "Claim", "Holds", "Effect measured", "Seeds", "Cost", "Device")
        rows = [(e["chapter"], e["claim"]["text"], "yes" if e["claim"]["holds"] else "no", e["claim"]["effect"],
                 str(len(e["seeds"])), f"{e['seconds'] / 60:.1f} min", e["device"]) for e in entries]
        if not rows:
            return [nodes.paragraph(text="No run has been recorded yet.")]
        return [_table(head, rows)]


def _table(head, rows):
    table, group = nodes.table(classes=["results"]), nodes.tgroup(cols=len(head))
    table += group
    group += [nodes.colspec(colwidth=1) for _ in head]

    def line(texts):
        row = nodes.row()
        for text in texts:
            entry = nodes.entry()
            entry += nodes.paragraph(text=text)
            row += entry
        return row

    top, body = nodes.thead(), nodes.tbody()
    top += line(head)
    body += [line(texts) for texts in rows]
    group += [top, body]
    return table


def local_mathjax(app, exc):
    """Copy the parts of MathJax that the book uses beside it."""
    if exc or app.builder.format != "html":
        return
    package = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent
    source, target = package / "static" / "mathjax", Path(app.outdir) / "_static" / "mathjax"
    for part in ("input/tex/extensions", "output/chtml/fonts/woff-v2"):
        shutil.copytree(source / part, target / part, dirs_exist_ok=True)
    shutil.copy2(source / "tex-chtml.js", target)


def setup(app):
    app.add_directive("ledger", Ledger)
    app.connect("doctree-read", tidy_cells)
    app.connect("build-finished", local_mathjax)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
