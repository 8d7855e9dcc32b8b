// An equation wider than its column gets each part on a line of its own, then smaller letters, down to 55 % of the text's; beyond that
// it scrolls. Done anew when the column's width changes.
function fitEquations() {
  const wide = box => box.scrollWidth > box.clientWidth + 1;
  for (const item of MathJax.startup.document.math) {
    if (!item.display) continue;
    item.whole ??= {tex: item.math, size: parseFloat(item.typesetRoot.style.fontSize || "100")};
    if (item.math !== item.whole.tex) remake(item, item.whole.tex);
    item.typesetRoot.style.fontSize = `${item.whole.size}%`;
    const parts = wide(item.typesetRoot) ? topLevelParts(item.whole.tex) : [];
    if (parts.length > 1) remake(item, `\\begin{gathered}${parts.join("\\\\[.6em] ")}\\end{gathered}`);
    const box = item.typesetRoot, share = box.clientWidth / box.scrollWidth;
    if (wide(box)) box.style.fontSize = `${Math.max(55, (share - .01) * item.whole.size)}%`;
  }
}

// A table of results that is wider than its column gets smaller letters, down to 75 %; beyond that it scrolls.
function fitTables() {
  for (const table of document.querySelectorAll("table.results")) {
    table.style.fontSize = "";
    const size = parseFloat(getComputedStyle(table).fontSize), share = table.parentElement.clientWidth / table.scrollWidth;
    if (share < 1) table.style.fontSize = `${Math.max(.75, share - .01) * size}px`;
  }
}

function remake(item, tex) {
  item.math = tex;
  item.rerender(MathJax.startup.document, 20);      // 20: from reading the TeX on
}

// The parts between \quad or \qquad, unless that stands inside braces or an environment.
function topLevelParts(tex) {
  const tokens = /\\begin\{\w+\*?\}|\\end\{\w+\*?\}|\\(?:q?quad|left|right)(?![a-z])|\\[{}]|[{}]|[^]/g;
  let depth = 0, parts = [""];
  for (const [token] of tex.matchAll(tokens)) {
    if (/^(\{|\\begin|\\left)/.test(token)) depth++;
    if (/^(\}|\\end|\\right)/.test(token)) depth--;
    if (/^\\q?quad/.test(token) && !depth) parts.push("");
    else parts[parts.length - 1] += token;
  }
  return parts.filter(part => part.trim());
}

// The column's width: the sidebars come and go with a transition.
addEventListener("load", () => Promise.all([window.MathJax?.startup?.promise, document.fonts.ready]).then(() => {
  let width = 0;
  new ResizeObserver(([{contentRect}]) => {
    if (contentRect.width === width) return;
    width = contentRect.width;
    fitTables();
    if (window.MathJax?.startup) fitEquations();
  }).observe(document.querySelector("article") ?? document.body);      // the page of the search has none
}));
