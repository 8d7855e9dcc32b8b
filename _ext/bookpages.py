"""What the book adds to Jupyter Book: tidy cells, pages made from ledger and package, mathematics without a network."""
import base64
import importlib.util
import json
import re
import shutil
from pathlib import Path

import yaml
from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from portable import figure_of

from facebook_nb.experiment import Claim

DIRECTIVE = re.compile(r"\s*#\s*\|")
# a hyphen that begins a number, or stands alone between two names
MINUS = re.compile(r"(?<![^\s>(\[±])-(?=\d)|(?<=\w )-(?= \w)")


def tidy_cells(app, doctree):
    """Take nbdev's directives out of code cells."""
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


def set_numbers(app, doctree, name):
    """Numbers as a printer sets them: a minus and not a hyphen (between names as well), no line break around ±."""
    tidy = lambda text: MINUS.sub("−", text).replace(" ± ", "\u00a0±\u00a0")
    verbatim = nodes.literal, nodes.literal_block, nodes.math, nodes.math_block, nodes.raw
    for text in list(doctree.findall(nodes.Text)):
        if text.parent is not None and not isinstance(text.parent, verbatim) and tidy(text) != text:
            text.parent.replace(text, nodes.Text(tidy(text)))
    for raw in doctree.findall(nodes.raw):
        if 'class="results"' in raw.astext():
            raw.children = [nodes.Text(tidy(raw.astext()))]


class Ledger(Directive):
    """What was measured, chapter by chapter, from the ledger.

    Content, a mapping in YAML: the chapters in order, each with what its paper reports (`paper`), the cell whose figure
    stands for it (`figure`) and, where it helps, the reason as far as it is known (`why`).
    """

    has_content = True

    def run(self):
        root = Path(self.state.document.settings.env.srcdir)
        found = []
        for chapter, about in (yaml.safe_load("\n".join(self.content)) or {}).items():
            path = root / "nbs" / "results" / f"{chapter}.json"
            self.state.document.settings.env.note_dependency(str(path))
            if path.exists():
                found.append((chapter, about, json.loads(path.read_text())))
        if not found:
            return [nodes.paragraph(text="No run has been recorded yet.")]
        head = ("Chapter", "Verdict", "What came out", "Cost")
        rows = [(chapter, *verdict(e), f"{e['seconds'] / 60:.0f} min") for chapter, _, e in found]
        return [_table(head, rows), *(self.section(root, *entry) for entry in found)]

    def section(self, root, chapter, about, entry):
        """A chapter's claim, its picture, paper beside measured, and on what it was run."""
        notebook = json.loads((root / "nbs" / "chapters" / f"{chapter}.ipynb").read_text())
        name = re.search(r"^# (.+)", "".join(notebook["cells"][0]["source"]), re.M)[1]
        section = nodes.section(ids=[f"result-{chapter}"], names=[f"result-{chapter}"])
        section += nodes.title(text=name)
        claim = entry["claim"]
        verdicts = [(claim["text"], Claim.of(claim))] + [(f["text"], Claim.of(f)) for f in entry["findings"]]
        lines = {}
        for number, (text, result) in enumerate(verdicts):
            lines["Finding" + f" {number}" * (len(verdicts) > 2) if number else "Claim"] = (
                f"{text[0].upper()}{text[1:]}. {str(result)[0].upper()}{str(result)[1:]}.")
        for check in entry["mechanism"]:
            lines.setdefault("Mechanism", "")
            lines["Mechanism"] += (f"{check['text']}: {check['value']} "
                                   f"({'holds' if check['holds'] else 'does not hold'}). ")
        lines |= {"Why": about["why"]} if about.get("why") else {}
        lines |= {"Due": f"To be recorded anew: {entry['due']}."} if "due" in entry else {}
        lines["The paper"] = about["paper"]
        fields = nodes.definition_list()
        for term, text in lines.items():
            item, body = nodes.definition_list_item(), nodes.definition()
            body += self.parse(text) if term in ("The paper", "Why") else nodes.paragraph(text=text)
            item += [nodes.term(text=term), body]
            fields += item
        section += fields
        if about.get("figure"):
            section += picture(root, notebook, chapter, about["figure"])
        versions = ", ".join(f"{k} {entry['versions'][k]}" for k in ("python", "torch", "numpy"))
        seeds = ", ".join(map(str, entry["seeds"]))
        section += self.parse(f"{{doc}}`The chapter <../chapters/{chapter}>`. Recorded at preset "
                              f"`{entry['preset']}`, seeds {seeds}, in {entry['seconds'] / 60:.1f} min on "
                              f"{entry['device']}; {versions}.")
        return section

    def parse(self, text):
        box = nodes.Element()
        self.state.nested_parse(StringList([text]), 0, box)
        return box.children


def verdict(entry):
    """(verdict, effect with interval and seeds) of a ledger entry, for a table."""
    word, _, rest = str(Claim.of(entry["claim"])).partition(": ")
    return word + " (to be recorded anew)" * ("due" in entry), rest


def banner(app, doctree):
    """A chapter whose experiment is not yet recorded with the present code says so under its title."""
    chapter = re.fullmatch(r"nbs/chapters/(\w+)", app.env.docname)
    path = Path(app.srcdir) / "nbs" / "results" / f"{chapter[1]}.json" if chapter else None
    if path and path.exists() and "due" in (entry := json.loads(path.read_text())):
        app.env.note_dependency(str(path))
        text = (f"The experiment of this page is to be recorded: {entry['due']}. Until then its numbers and figures "
                "are those of the smallest preset, smoke: every line runs, and nothing is said about the claim.")
        title = next(doctree.findall(nodes.title))
        title.parent.insert(title.parent.index(title) + 1, nodes.note("", nodes.paragraph(text=text)))


def picture(root, notebook, chapter, name):
    """The figure of the notebook's cell `name`, as an image node."""
    cell = next(c for c in notebook["cells"] if c["id"] == name)
    kinds = {"image/svg+xml": "svg", "image/png": "png", "image/jpeg": "jpg"}
    found = [(k, o["data"][k]) for o in cell["outputs"] for k in kinds if k in o.get("data", {})]
    if not found:                                       # the cell was edited, and not yet run
        return nodes.paragraph(text=f"No figure is stored yet in {chapter}, {name}.")
    kind, data = found[0]
    folder = root / "_build" / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{chapter}-{name}.{kinds[kind]}"
    data = "".join(data)
    path.write_bytes(data.encode() if kind == "image/svg+xml" else base64.b64decode(data))
    return nodes.image(uri=f"/_build/pictures/{path.name}", alt=figure_of("".join(cell["source"]))["alt"])


def _table(head, rows):
    """A table of texts."""
    table, group = nodes.table(classes=["results"]), nodes.tgroup(cols=len(head))
    table += group
    group += [nodes.colspec(colwidth=1) for _ in head]

    def line(texts):
        row = nodes.row()
        for text in texts:
            row += nodes.entry("", nodes.paragraph(text=text))
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
    app.connect("doctree-read", banner)
    app.connect("doctree-resolved", set_numbers)
    app.connect("build-finished", local_mathjax)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
