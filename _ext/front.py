"""Pages about the whole: what stands, what ships, what can be imported; from ledger, tests, weights and source."""
import ast
import json
import math
import re
import struct
import zipfile
from collections import Counter
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path

import yaml
from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx import addnodes

from facebook_nb.experiment import Claim

FRONT = yaml.safe_load(Path(__file__).with_suffix(".yml").read_text())
ASKS = FRONT["chapters"]
HEADLINES = {chapter: about["main"] for chapter, about in ASKS.items()} | FRONT["foundations"]
CODE = re.compile(r"^# %% \S*?(nbs/\S+)\.ipynb #(\S+)$", re.M)


# --- what stands

def cases(root: Path) -> dict[str, set[str]]:
    """chapter → its reference cases, whose outcome is stored beside the tests; a case: a name up to its first . or /"""
    found = {}
    for path in sorted((root / "tests" / "parity" / "data").rglob("*.npz")):
        names = {re.match(r"(?:anet\.)?[^./]+", name)[0] for name in zipfile.ZipFile(path).namelist()
                 if name.endswith(".npy")}
        found.setdefault(path.parent.name, set()).update(names - {"layout"})
    return found


def entries(root: Path) -> dict[str, dict]:
    """chapter, in the order of the book → its ledger entry."""
    found = re.findall(r"nbs/chapters/(\w+)", (root / "_toc.yml").read_text())
    return {chapter: json.loads((root / "nbs" / "results" / f"{chapter}.json").read_text()) for chapter in found}


def standing(root: Path) -> list[str]:
    """What is certain, a paragraph of Markdown each."""
    known, ledger = cases(root), entries(root)
    count = sum(map(len, known.values()))
    verdicts = Counter("to be recorded anew" if "due" in e else Claim.of(e["claim"]).verdict for e in ledger.values())
    came = ", ".join(f"{verdicts[word]} {word}" for word in ("shown", "refuted", "undecided", "to be recorded anew")
                     if verdicts[word])
    return [f"**The methods are the papers'.** {count} of {count} reference cases, networks, losses, gradients and "
            "whole training steps, come out as in the code that the authors released; for papers without, as in "
            "reference code of the same parts. `make test` repeats it. Where paper and code differ, the chapter says "
            "what is used.",
            f"**{len(ledger)} claims: {came}**. Tested by a rule that was fixed before the run, over several seeds, on "
            "data that needs no download. That is a finding about an experiment of an hour or two on one processor "
            "core, and no verdict on the paper."]


def came_out(chapter: str, entry: dict) -> str:
    """Verdict and number of a chapter, in plain words."""
    claim = Claim.of(entry["claim"])
    verdict, _, number = str(replace(claim, unit=ASKS[chapter]["counts"])).partition(": ")
    number = re.sub(r" \[(\S+), (\S+)\], \d+ seeds$", r", between \1 and \2", number)
    number = re.sub(r"[+-](0(?:\.0+)?)(?![\d.])", r"\1", number)           # no -0
    if "due" in entry:
        return f"**to be recorded anew**; an earlier experiment: {verdict}, {number}"
    return f"**{verdict}**: {number}"


def paper_of(root: Path, chapter: str) -> tuple[str, str]:
    """(title, address) of the paper, from the chapter's first cell."""
    notebook = json.loads((root / "nbs" / "chapters" / f"{chapter}.ipynb").read_text())
    text = "".join(notebook["cells"][0]["source"])
    return re.search(r"^\*([^*]+)\*,", text, re.M)[1], re.search(r"https://arxiv.org/abs/[\d.]+", text)[0]


def ten(root: Path, link: str) -> str:
    """The ten chapters as a table in Markdown; link: a chapter's page, with {} for its name."""
    from facebook_nb.cli import CHAPTERS
    lines = ["| chapter | asks | what came out |", "| --- | --- | --- |"]
    for chapter, entry in entries(root).items():
        title, address = paper_of(root, chapter)
        venue = re.search(r"\(([^()]+)\)$", CHAPTERS[chapter])[1]
        lines.append(f"| [{chapter}]({link.format(chapter)}) | {ASKS[chapter]['asks']} [*{title}*, {venue}]({address}) "
                     f"| {came_out(chapter, entry)} |")
    return "\n".join(lines)


class Page(Directive):
    """A directive that parses Markdown into nodes."""

    has_content = True

    @property
    def root(self) -> Path:
        return Path(self.state.document.settings.env.srcdir)

    def depend(self, path: Path) -> Path:
        self.state.document.settings.env.note_dependency(str(path))
        return path

    def parse(self, text: str) -> list:
        box = nodes.Element()
        self.state.nested_parse(StringList(text.split("\n")), 0, box)
        return box.children


class Standing(Page):
    """What is certain of the ten, for the landing page."""

    def run(self):
        return self.parse("\n".join(f"- {text}" for text in standing(self.root)))


class Ten(Page):
    """The ten chapters: what each asks, its paper, what came out."""

    def run(self):
        for chapter in entries(self.root):
            self.depend(self.root / "nbs" / "results" / f"{chapter}.json")
        found = self.parse(ten(self.root, "chapters/{}.ipynb"))
        for table in found:
            table["classes"] += ["results", "claims"]
        return found


# --- what ships

def header(path: Path) -> tuple[dict, dict]:
    """(tensors, metadata) of the header of a file of safetensors."""
    with path.open("rb") as file:
        about = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return about, about.pop("__metadata__", {})


def facts(root: Path, chapter: str) -> list[str]:
    """What a file of weights, its list and the ledger say of it, as items of Markdown."""
    path = root / "facebook_nb" / "weights" / f"{chapter}.safetensors"
    tensors, about = header(path)
    entry = json.loads((root / "nbs" / "results" / f"{chapter}.json").read_text())
    count = sum(math.prod(t["shape"]) for t in tensors.values())
    kinds = " and ".join(sorted({t["dtype"] for t in tensors.values() if t["dtype"] != "I64"}))
    digest = json.loads((path.parent / "digests.json").read_text())[path.name]
    says = json.loads(about.pop("about", "{}")) | {k: v for k, v in about.items() if k not in ("digest", "sha256")}
    texts = [f"`facebook_nb/weights/{path.name}`: {path.stat().st_size / 1e6:.2f} MB, {count:,} numbers ({kinds}) "
             f"in {len(tensors)} tensors; SHA-256 `{digest}`."]
    if says:
        words = lambda v: ", ".join(map(str, v)) if isinstance(v, list) else v
        texts.append("Its header says: " + "; ".join(f"{k}: {words(v)}" for k, v in sorted(says.items())) + ".")
    how = (f"Made by `facebook-nb reproduce {chapter}`, which runs preset `book` and stores them; a run of your own "
           "leaves its weights in its folder, and `apply --weights` takes them.")
    if "due" in entry:
        how += " These come from an experiment before the present one, which is to be recorded."
    else:
        how += f" Recorded on {entry['device']}, torch {entry['versions']['torch']}."
    return [*texts, how]


class Cards(Page):
    """A card for each file of weights. Content, in YAML: chapter → learnt, good, blind, never."""

    WORDS = {"learnt": "Learnt from", "good": "For", "blind": "Cannot judge", "never": "Not to be used for"}

    def run(self):
        shipped = self.root / "facebook_nb" / "weights"
        self.depend(shipped / "digests.json")
        sections = []
        for chapter, card in yaml.safe_load("\n".join(self.content)).items():
            self.depend(self.depend(shipped / f"{chapter}.safetensors"))
            self.depend(self.root / "nbs" / "results" / f"{chapter}.json")
            section = nodes.section(ids=[f"card-{nodes.make_id(chapter)}"], names=[f"card-{chapter}"])
            section += nodes.title(text=chapter)
            lines = [f"**{word}**: {card[key]}" for key, word in self.WORDS.items()] + facts(self.root, chapter)
            lines.append(f"More: [the chapter](../chapters/{chapter}.ipynb), its limits above all.")
            section += self.parse("\n".join(f"- {line}" for line in lines))
            sections.append(section)
        return sections


# --- what can be imported

@cache
def module_of(path: Path, changed: float) -> tuple[str, dict[str, ast.AST], dict[str, str], str]:
    """(name, public name → definition, name → cell, notebook) of a module's source."""
    text = path.read_text()
    tree = ast.parse(text)
    public, found = [], {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = getattr(node, "targets", None) or [node.target]
            for name in [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]:
                found[name] = node
                if name == "__all__":
                    public = ast.literal_eval(node.value)
    marks = [(text.count("\n", 0, m.start()) + 1, m[1], m[2]) for m in CODE.finditer(text)]
    place = {name: [m for m in marks if m[0] <= found[name].lineno][-1][2] for name in public}
    package = next(p for p in path.parents if not (p / "__init__.py").exists() and (p / "facebook_nb").is_dir())
    name = ".".join(path.relative_to(package).with_suffix("").parts)
    return name, {n: found[n] for n in public}, place, marks[0][1] if marks else ""


def modules(root: Path) -> list[tuple]:
    """`module_of` of every module that exports something."""
    paths = sorted((root / "facebook_nb").rglob("*.py"))
    found = [module_of(p, p.stat().st_mtime) for p in paths if p.stem[0] != "_" and "__all__" in p.read_text()]
    return [m for m in found if m[1]]


def call(node: ast.AST, name: str) -> tuple[str, str]:
    """(kind, call) of a definition: py:function, py:class or py:data, and how it is written."""
    if isinstance(node, ast.FunctionDef):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return "py:function", f"{name}({ast.unparse(node.args)}){returns}"
    if not isinstance(node, ast.ClassDef):
        return "py:data", name
    start = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if start:
        start.args.args = start.args.args[start.args.args[0].arg == "self":]
        return "py:class", f"{name}({ast.unparse(start.args)})"
    parts = [ast.unparse(n) for n in node.body if isinstance(n, ast.AnnAssign) and "ClassVar" not in ast.unparse(n)]
    fields = isinstance(node, ast.ClassDef) and (node.decorator_list or "NamedTuple" in map(ast.unparse, node.bases))
    return "py:class", f"{name}({', '.join(parts)})" if fields else name


def names_of(node: ast.AST) -> list[str]:
    """The arguments and fields that a docstring may speak of."""
    starts = [node]
    if isinstance(node, ast.ClassDef):
        starts = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name in ("__init__", "forward")]
    found = [a.arg for n in starts for a in (*n.args.posonlyargs, *n.args.args, *n.args.kwonlyargs,
                                             *filter(None, (n.args.vararg, n.args.kwarg)))]
    if isinstance(node, ast.ClassDef):
        found += [n.target.id for n in node.body if isinstance(n, ast.AnnAssign)]
        found += re.findall(r"self\.(\w+)(?=[\w, .]* = )", ast.unparse(node))
    return [n for n in dict.fromkeys(found) if n != "self"]


def inline(text: str) -> list:
    """Text whose words in backticks are code."""
    return [nodes.literal(text=part) if k % 2 else nodes.Text(part) for k, part in enumerate(text.split("`")) if part]


def typeset(doc: str, names: list[str]) -> list:
    """A docstring as nodes: prose, then a field for each argument, for what is returned, errors and source."""
    name = "(?:" + "|".join(map(re.escape, names or ["\0"])) + ")"
    field = rf"({name}(?:(?:,| and) {name})*(?: \([^)]*\))?): |(Returns) |(Raises) |(Source): "
    start = re.compile(rf"(?:^|(?<=[.;:)] ))(?={field})")
    prose, fields = [], nodes.field_list()
    for paragraph in doc.split("\n\n"):
        if all(line.startswith("    ") for line in paragraph.split("\n")):
            prose.append(nodes.literal_block(text=re.sub("^    ", "", paragraph, flags=re.M), language="none"))
            continue
        text = " ".join(paragraph.split())
        cuts = [0, *(m.start() for m in start.finditer(text) if m.start()), len(text)]
        for piece in (text[a:b].strip() for a, b in zip(cuts, cuts[1:])):
            head = re.match(field, piece)
            if not head:
                prose.append(nodes.paragraph("", "", *inline(piece)))
                continue
            label = nodes.literal(text=head[1]) if head[1] else nodes.Text(head[2] or head[3] or head[4])
            fields += nodes.field("", nodes.field_name("", "", label), nodes.field_body("", nodes.paragraph(
                "", "", *inline(piece[head.end():].rstrip("; ")))))
    return prose + ([fields] if len(fields) else [])


def example(root: Path, notebook: str, name: str) -> str:
    """The chapter's own use of a function, a cell that its notebook runs; empty where there is none short enough."""
    cells = [c for c in json.loads((root / f"{notebook}.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    texts = {c["id"]: "".join(c["source"]) for c in cells
             if not any(t in c["metadata"].get("tags", ()) for t in ("remove-input", "remove-cell", "parameters"))}
    used = {key: text for key, text in texts.items() if re.search(rf"(?<!def )\b{name}\(", text)
            and not re.match(r"#\|\s*export", text) and text.count("\n") < 25}
    best = min(used, key=lambda key: (key != f"{name}-use", not key.endswith("-use"), len(used[key])), default=None)
    text = re.sub(r"^(?:#\|.*|figure\((?:.|\n)*?\)\n?\Z)", "", used.get(best, ""), flags=re.M)
    return text.strip()


class Reference(Page):
    """Public names, each with its call, so that it can be found by `objects.inv`."""

    @cached_property
    def homes(self) -> Counter:
        """How many modules define a name."""
        return Counter(name for module in modules(self.root) for name in module[1])

    def entry(self, module: tuple, name: str, whole: bool) -> list:
        full, public, place, notebook = module
        node = public[name]
        kind, sign = call(node, name)
        option = "" if whole else ":single-line-parameter-list:\n" * (kind != "py:data")
        found = self.parse(f"```{{{kind}}} {sign}\n:module: {full}\n{option}```")
        for link in [x for box in found for x in box.findall(addnodes.pending_xref)]:
            link["py:module"] = full
            if link["reftarget"] not in public and self.homes[link["reftarget"]] > 1:   # whose, is not said
                link.replace_self(link.children)
        content = next(n for box in found for n in box.findall(addnodes.desc_content))
        is_code = kind != "py:data"
        doc = (ast.get_docstring(node) or "") if is_code else ""
        source = nodes.reference("", "source", refuri=f"../{notebook.removeprefix('nbs/')}.html#code-{place[name]}",
                                 internal=True, classes=["source"])
        if not whole:
            text = " ".join(doc.split("\n\n")[0].split()) if is_code else f"`{short(ast.unparse(node))}`"
            content += nodes.paragraph("", "", *inline(f"{text} "), source)
            return found
        content += typeset(doc, names_of(node))
        methods = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name[0] != "_" and ast.get_docstring(n)
                   ] if isinstance(node, ast.ClassDef) else []
        if methods:
            items = nodes.definition_list()
            for method in methods:
                term = nodes.term("", "", nodes.literal(text=call(method, method.name)[1]))
                items += nodes.definition_list_item("", term, nodes.definition("", *typeset(
                    ast.get_docstring(method), names_of(method))))
            content += items
        text = example(self.root, notebook, name)
        if text:
            content += nodes.paragraph("", "Its use in the notebook:")
            content += nodes.literal_block(text=text, language="python")
        content += nodes.paragraph("", "", source)
        return found


def short(text: str, most: int = 72) -> str:
    """The beginning of an assignment."""
    return text if len(text) <= most else text[:most].rstrip() + " …"


class Headlines(Reference):
    """The main functions of each chapter, whole."""

    def run(self):
        known = {m[0]: m for m in modules(self.root)}
        sections = []
        for module, names in HEADLINES.items():
            self.depend(self.root / "facebook_nb" / (module.replace(".", "/") + ".py"))
            full = f"facebook_nb.{module}"
            section = nodes.section(ids=[nodes.make_id(f"api-{full}")], names=[full])
            section += nodes.title(text=module)
            for name in names:
                section += self.entry(known[full], name, True)
            sections.append(section)
        return sections


class Everything(Reference):
    """Every other public name, by module, in a line."""

    def run(self):
        sections = []
        for module in modules(self.root):
            full, public, _, notebook = module
            self.depend(self.root / (full.replace(".", "/") + ".py"))
            section = nodes.section(ids=[nodes.make_id(f"all-{full}")], names=[f"all {full}"])
            section += nodes.title(text=full.removeprefix("facebook_nb."))
            main = HEADLINES.get(full.removeprefix("facebook_nb."), [])
            section += self.parse(f"[Its page](../{notebook.removeprefix('nbs/')}.ipynb)." + main_names(full, main))
            for name in public:
                if name not in main:
                    section += self.entry(module, name, False)
            sections.append(section)
        return sections


def main_names(full: str, names: list[str]) -> str:
    """Links to those that stand on the other page."""
    links = ", ".join(f"{{py:obj}}`{name} <{full}.{name}>`" for name in names)
    return f" Shown whole: {links}." if links else ""


def anchors(app, doctree):
    """An exported cell can be linked to, as #code-NAME: where the source stands."""
    path = Path(app.srcdir) / f"{app.env.docname}.ipynb"
    if not path.exists():
        return
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    names = {text.strip(): c["id"] for c in cells if re.match(r"#\|\s*export", text := "".join(c["source"]))}
    for cell in doctree.findall(nodes.container):
        if cell.get("nb_element") == "cell_code" and cell.children:
            name = names.get(cell.children[0].astext().strip())
            cell["ids"] += [f"code-{name}"] if name else []


def setup(app):
    for name, directive in (("standing", Standing), ("ten", Ten), ("cards", Cards), ("headlines", Headlines),
                            ("everything", Everything)):
        app.add_directive(name, directive)
    app.connect("doctree-read", anchors, priority=400)      # before directives are taken out of cells
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


