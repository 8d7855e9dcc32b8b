"""Two chapters in JupyterLab, in a browser: opened, run from top to bottom at smoke, read and saved."""
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from facebook_nb.experiment import Claim
from tests.conftest import ROOT
from tests.test_book import browser  # noqa: F401
from tests.test_notebooks import LAB, assert_ran

pytestmark = pytest.mark.xdist_group("book")
RAW = re.compile(r"\{(numref|eq|glue|cite|term|doc|ref|math)\b|:::|```|\$\$|\\tag|\]\(|\*\*\w")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """(folder of copies without outputs, set to smoke; address of a JupyterLab that shows them)."""
    pytest.importorskip("jupyterlab")
    place = tmp_path_factory.mktemp("lab")
    for chapter in LAB:
        book = json.loads((ROOT / "nbs" / "chapters" / f"{chapter}.ipynb").read_text())
        for cell in book["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"] = []
            if cell["id"] == "parameters":
                text = "".join(cell["source"]).replace('preset = "book" ', 'preset = "smoke"')
                cell["source"] = text.replace("out_dir = None", f'out_dir = "{place / chapter}"')
        (place / f"{chapter}.ipynb").write_text(json.dumps(book))
    settings = place / "settings" / "@jupyterlab"
    for name, values in {"notebook-extension/tracker": {"windowingMode": "none"},
                         "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}}.items():
        path = settings / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(values))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [Path(sys.executable).parent / "jupyter", "lab", "--no-browser", "--allow-root", "--expose-app-in-browser",
         f"--port={port}", "--IdentityProvider.token=", f"--ServerApp.root_dir={place}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"JUPYTERLAB_SETTINGS_DIR": str(settings.parent), "JUPYTER_CONFIG_DIR": str(place / "config"),
                          "JUPYTERLAB_WORKSPACES_DIR": str(place / "spaces"), "PYTHONPATH": str(ROOT)})
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(address + "/api/status").close()
                break
            except OSError:
                time.sleep(0.5)
        yield place, address
    finally:
        server.terminate()
        server.wait()


@pytest.mark.parametrize("chapter", LAB)
def test_a_chapter_reads_well_where_it_is_run(lab, browser, chapter):  # noqa: F811
    place, address = lab
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(240_000)
    page.goto(f"{address}/doc/tree/{chapter}.ipynb")
    page.wait_for_selector(".jp-Notebook .jp-MarkdownOutput")
    page.wait_for_function("window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'",
                           polling=200)
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_function("""() => {
        const widget = window.jupyterapp.shell.currentWidget;
        return widget.content.widgets.every(c => c.model.type !== 'code' || c.model.executionCount
            || !c.model.sharedModel.getSource().trim()) && widget.sessionContext.session.kernel.status === 'idle'; }""",
                           polling=500)         # not at every frame
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    metrics = assert_ran(place / f"{chapter}.ipynb", place / chapter)

    # what a reader sees: no markup, but the numbers of this run
    text = "\n".join(page.locator(".jp-MarkdownOutput, .jp-RenderedMarkdown").evaluate_all(
        """all => all.map(e => { const c = e.cloneNode(true);
            c.querySelectorAll('code, mjx-container').forEach(n => n.remove()); return c.textContent; })"""))
    assert not (raw := RAW.search(text)), text[raw.start() - 50:raw.end() + 50]
    assert str(Claim.of(metrics["claim"])) in text
    assert page.locator("mjx-merror").count() == 0 and page.locator("mjx-container").count() > 20
    assert page.locator('.jp-RenderedText[data-mime-type="application/vnd.jupyter.stderr"]').count() == 0

    # figures with captions that links find; code folded as in the book
    source = json.loads((place / f"{chapter}.ipynb").read_text())["cells"]
    anchors = page.locator("[data-jupyter-id^=fig-], [id^=fig-]").count()
    calls = [c for c in source if re.search(r"^ *figure\(\n", "".join(c["source"]), re.M)]
    assert anchors == len(calls) > 5 and page.locator(".jp-RenderedSVG, .jp-RenderedImage").count() >= len(calls)
    folded = [c for c in source if c["metadata"].get("jupyter", {}).get("source_hidden")]
    assert page.locator(".jp-InputPlaceholder, .jp-Cell-inputArea .jp-Placeholder").count() >= len(folded) > 20
    page.close()
