"""Write what README says of the ten from the ledger and the tests; with --check only say whether it is up to date.

    python tools/readme.py [--check]
"""
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "_ext"))
from front import standing, ten  # noqa: E402

PLACE = re.compile(r"(?<=<!-- ledger -->\n).*?(?=\n<!-- end -->)", re.S)


def made() -> str:
    """What is certain, and the table of the chapters in the order of the book."""
    return "\n".join(f"- {text}" for text in standing(ROOT)) + "\n\n" + ten(ROOT, "nbs/chapters/{}.ipynb")


if __name__ == "__main__":
    path = ROOT / "README.md"
    old = path.read_text()
    new, found = PLACE.subn(lambda match: made(), old, count=1)
    assert found, "README.md: no place between <!-- ledger --> and <!-- end -->"
    if "--check" in sys.argv:
        sys.exit("README.md: its numbers are not the ledger's; run tools/readme.py" if new != old else 0)
    path.write_text(new)
