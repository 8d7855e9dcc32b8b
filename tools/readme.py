"""Write README's table of chapters from the ledger; with --check only say whether it is up to date.

    python tools/readme.py [--check]
"""
import re
import sys
from pathlib import Path

from facebook_nb.cli import CHAPTERS
from facebook_nb.experiment import Claim, read_ledger

ROOT = Path(__file__).resolve().parent.parent
TABLE = re.compile(r"(?<=\n\n)\| chapter \|.*?(?=\n\n)", re.S)


def table() -> str:
    """The chapters in the order of the book: paper, claim, what came out."""
    lines = ["| chapter | paper | claim tested | what came out |", "| --- | --- | --- | --- |"]
    for chapter, paper in CHAPTERS.items():
        entry = read_ledger(chapter, ROOT)
        came = f"**{str(Claim.of(entry['claim'])).replace(': ', '**: ', 1)}"
        if "due" in entry:
            came += "; to be recorded anew"
        text = entry["claim"]["text"]
        lines.append(f"| `{chapter}` | {paper} | {text[0].upper()}{text[1:].rstrip('.')} | {came} |")
    return "\n".join(lines)


if __name__ == "__main__":
    path = ROOT / "README.md"
    old = path.read_text()
    new = TABLE.sub(lambda match: table(), old, count=1)
    if "--check" in sys.argv:
        sys.exit("README.md: its table is not what the ledger says; run tools/readme.py" if new != old else 0)
    path.write_text(new)
