"""Pages in a browser: nothing that axe finds inaccessible, nothing beside the screen.

Needs chromium, and the folder of npm's axe-core as AXE_CORE or among the global packages.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
import test_report
import test_tune_page

from cifake_ray.report.tune_page import render_tune_page

AXE = Path(os.environ.get("AXE_CORE", "/usr/local/lib/node_modules/axe-core")) / "axe.min.js"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is missing"),
    pytest.mark.skipif(not AXE.is_file(), reason="axe-core is missing: npm install -g axe-core"),
]
# What the page's policy forbids, so the policy is taken out.
CHECK = """
<script>%s</script><script>
axe.run(document).then(found => {
  const texts = [...document.querySelectorAll("svg text")].filter(text => {
    const box = text.getBoundingClientRect(), svg = text.closest("svg").getBoundingClientRect();
    return box.left < svg.left - 1 || box.right > svg.right + 1 || box.height < 7.5;
  });
  const output = document.createElement("output");
  output.textContent = JSON.stringify({
    violations: found.violations.map(rule => [rule.id, rule.nodes.map(node => node.html)]),
    beside: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    texts: texts.map(text => text.textContent),
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
  });
  document.body.append(output);
});
</script>
"""

metrics, drawn, page = test_report.metrics, test_report.drawn, test_report.page


@pytest.fixture
def search_page() -> str:
    rows, histories = test_tune_page.make_search()
    return render_tune_page(test_tune_page.SUMMARY, rows, histories, "lr: 0.1", "cifake-ray tune")


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["page", "search_page"])
def test_a_page_is_accessible_on_a_telephone(
    request: pytest.FixtureRequest, name: str, is_dark: bool, tmp_path: Path
) -> None:
    text: str = request.getfixturevalue(name)
    without = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert without != text
    file = tmp_path / "page.html"
    file.write_text(without + CHECK % AXE.read_text(encoding="utf-8"), encoding="utf-8")
    process = subprocess.run(
        [
            str(CHROMIUM),
            *("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"),
            *("--window-size=500,900", "--virtual-time-budget=60000", "--dump-dom"),
            f"--blink-settings=preferredColorScheme={0 if is_dark else 1}",
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    (output,) = re.findall("<output>(.*?)</output>", process.stdout, re.DOTALL)
    found = json.loads(unescape(output))
    assert found == {"violations": [], "beside": 0, "texts": [], "dark": is_dark}
