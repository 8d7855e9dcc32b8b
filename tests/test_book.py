"""The rendered book: built without a warning, and read in a browser with the network off."""
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.xdist_group("book")
SIZES = [{"width": 1280, "height": 900}, {"width": 390, "height": 844}]       # a desktop, a phone
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    out = tmp_path_factory.mktemp("book")
    command = [Path(sys.executable).parent / "jupyter-book", "build", ROOT, "-W", "--keep-going", "--all",
               "--path-output", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, "\n".join(
        line for line in (done.stdout + done.stderr).splitlines() if "WARNING" in line or "ERROR" in line)
    return out / "_build" / "html"


@pytest.fixture(scope="module")
def address(html):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=html)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=[
            "--no-sandbox", "--disable-background-networking", "--disable-component-update", "--no-first-run"])
        yield browser
        browser.close()


def test_no_page_shows_directives_or_needs_another_host(html):
    pages = [p for p in html.rglob("*.html") if "_static" not in p.parts]
    assert len(pages) > 20
    for page in pages:
        text = page.read_text()
        assert "#| export" not in text and "#| default_exp" not in text, page.name
        read = re.sub(r"(?s)<(pre|code)\b.*?</\1>", "", text)
        assert not re.search(r"\]\(#|\\tag\{|\{(numref|eq|glue:\w+|cite:\w|term|doc|ref)\}|\*\*Figure", read), page.name
        for tag in ("script", "link", "img"):
            assert f'<{tag} src="http' not in text and f'<{tag} href="http' not in text, page.name


def test_a_page_gives_its_notebook(html):
    for notebook in ROOT.glob("nbs/*/*.ipynb"):
        name = notebook.relative_to(ROOT).as_posix()
        assert (html / "_sources" / name).read_text() == notebook.read_text()
        assert f'href="../../_sources/{name}"' in (html / name).with_suffix(".html").read_text()


def test_ten_chapters_have_a_page_and_the_unwritten_say_so(html):
    from facebook_nb.cli import CHAPTERS, is_written
    for chapter in CHAPTERS:
        text = (html / "nbs" / "chapters" / f"{chapter}.html").read_text()
        assert ("not written yet" in text) != is_written(ROOT / "nbs" / "chapters" / f"{chapter}.ipynb")


def test_every_public_name_can_be_linked_to_and_its_source_found(html):
    from sphinx.util.inventory import InventoryFile
    sys.path.insert(0, str(ROOT / "_ext"))
    from front import modules
    with (html / "objects.inv").open("rb") as file:
        known = InventoryFile.load(file, "", lambda a, b: b)
    known = {name for kind, names in known.items() if kind.startswith("py:") for name in names}
    assert known == {f"{module[0]}.{name}" for module in modules(ROOT) for name in module[1]}
    pages = {}
    for page in ("api", "api_names"):
        text = (html / "nbs" / "appendix" / f"{page}.html").read_text()
        links = re.findall(r'href="\.\./(\w+/\w+\.html)#(code-[\w-]+)"', text)
        assert len(links) > 80
        for path, anchor in links:
            if path not in pages:
                pages[path] = (html / "nbs" / path).read_text()
            assert f'id="{anchor}"' in pages[path], f"{path}#{anchor}"


# equations that are cut, and on a wide screen tables of results
CUT = """[...document.querySelectorAll('mjx-container[display]'
              + (innerWidth > 1000 ? ', div:has(> table.results)' : ''))]
         .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent.slice(0, 60))"""


def test_every_page_reads_well_with_the_network_off(html, address, browser):
    """At both sizes: it is loaded at that at which the last page was left, then brought to the other."""
    from playwright.sync_api import TimeoutError
    page, sizes, complaints = browser.new_page(viewport=SIZES[0]), SIZES, []
    page.on("console", lambda m: m.type == "error" and complaints.append(m.text))
    page.on("pageerror", lambda e: complaints.append(str(e)))
    page.on("request", lambda r: r.url.startswith((address, "data:")) or complaints.append(r.url))
    paths = [str(p.relative_to(html)) for p in sorted((html / "nbs").rglob("*.html"))]
    for path in [*paths, "genindex.html"]:
        assert page.goto(address + path, wait_until="load").ok, path
        page.wait_for_function("!document.querySelector('.math:not(:has(mjx-container))')", timeout=15_000, polling=50)
        assert page.locator("mjx-merror").count() == 0, path
        for size in sizes:
            page.set_viewport_size(size)
            wide = page.evaluate("document.scrollingElement.scrollWidth - innerWidth")
            assert wide <= 0, f"{path} scrolls sideways by {wide} px at {size['width']} px"
            try:                            # they are fitted to the new width
                page.wait_for_function(f"!{CUT}.length", timeout=5_000, polling=20)
            except TimeoutError:
                raise AssertionError(f"{path}: cut at {size['width']} px: {page.evaluate(CUT)}") from None
        sizes = sizes[::-1]
        # pictures load lazily: bring each into view
        page.evaluate("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
        page.wait_for_function("[...document.images].every(i => i.complete)", timeout=15_000, polling=50)
        bad = page.evaluate("""[...document.images].filter(i => !i.naturalWidth || !i.alt || i.alt.includes('_images/'))
                               .map(i => i.src)""")
        assert not bad, f"{path}: {bad}"
        assert not complaints, f"{path}: {complaints}"
    page.goto(address + "search.html?q=quality", wait_until="load")
    page.wait_for_selector("#search-results li", timeout=15_000)
    assert not complaints, complaints
    page.close()
