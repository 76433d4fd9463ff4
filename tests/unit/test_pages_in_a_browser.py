"""Do the pages that people open look right in a real browser: on a telephone, at night, with every picture there?

Screenshots are kept in $MLLM_SCREENSHOTS (default: the test's own folder).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mllm.demo.page import demo_page
from mllm.eval.report import page as report_page
from mllm.eval.report.show import write_report
from tests.unit.eval.test_runner import TASK, make_data, run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium or Chrome is on the path (apt-get install chromium)"
)
NARROW, WIDE = 420, 1200
FRAME = """<!doctype html><meta charset=utf-8><style>:root{color-scheme:SCHEME}body{margin:0}
iframe{border:0;width:WIDTHpx;height:2000px}</style><iframe src="PAGE"></iframe><pre id=told></pre><script>
window.addEventListener('load',()=>{const d=document.querySelector('iframe').contentDocument,p=[...d.images];
for(const i of p)i.loading='eager';setTimeout(()=>{
const t=[...d.querySelectorAll('svg text')].map(x=>x.getBoundingClientRect().height);
document.getElementById('told').textContent=JSON.stringify({width:d.documentElement.scrollWidth,pictures:p.length,
broken:p.filter(i=>!i.naturalWidth).length,letters:t.length?Math.min(...t):0,charts:d.querySelectorAll('svg.chart').length})},2000)})
</script>"""


def look(page: Path, width: int, scheme: str) -> dict[str, Any]:
    """What the browser measures in the page, as wide as a telephone or a screen, by day or by night; ``shade``: of its background in
    the screenshot, 0 to 255."""
    kept = Path(os.environ.get("MLLM_SCREENSHOTS", page.parent / "screenshots"))
    kept.mkdir(exist_ok=True)
    target = kept / f"{page.stem}.{width}.{scheme}.png"
    frame = page.with_name(f"{page.stem}.{width}.{scheme}.frame.html")
    text = FRAME.replace("SCHEME", scheme).replace("WIDTH", str(width)).replace("PAGE", page.name)
    frame.write_text(text, encoding="utf-8")
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files",
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}", "--virtual-time-budget=5000",
        f"--user-data-dir={page.parent / 'profile'}", f"--window-size={max(width, 500)},2000", f"--screenshot={target}",
        "--dump-dom", frame.as_uri(),
    ]  # fmt: skip
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'<pre id="told">(\{.*?\})</pre>', said.stdout)
    assert found is not None, said.stderr[-2000:]
    pixels = np.asarray(Image.open(target).convert("L"))[:, :width]
    return json.loads(found[1]) | {"shade": int(np.median(pixels))}


def holds(told: dict[str, Any], width: int, scheme: str, *, pictures: int, charts: int) -> None:
    assert told["width"] <= width, "nothing stands out at the side"
    assert (told["pictures"], told["broken"], told["charts"]) == (pictures, 0, charts)
    assert told["letters"] >= 10 or not charts, "letters of charts can be read"
    assert told["shade"] < 60 if scheme == "dark" else told["shade"] > 200


def test_the_report_reads_on_a_telephone_and_at_night(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_data(tmp_path / "d", 12)
    result, _ = run(folder, tmp_path / "o", lambda request: str(int(request.id[1:]) % 7), blind=True)
    page = write_report({TASK: result}, tmp_path / "o", show=False)["report.html"]
    for width, scheme in ((NARROW, "dark"), (WIDE, "light")):
        holds(look(page, width, scheme), width, scheme, pictures=12, charts=1)
    monkeypatch.setattr(report_page, "WHOLE", 4)
    write_report({TASK: result}, tmp_path / "o", show=False)
    part = tmp_path / "o/report/demo-charts.right.001.html"
    holds(look(part, NARROW, "dark"), NARROW, "dark", pictures=part.read_text().count("<img"), charts=0)


def test_the_demos_page_reads_on_a_telephone_and_at_night(tmp_path: Path) -> None:
    Image.new("RGB", (48, 48), (200, 120, 40)).save(tmp_path / "a.png")
    floors = {"score": 55.3, "blank": 16.5, "shuffled": 18.0, "prior": None}
    losses = [{"stage": stage, "loss": 4.0 - k / 30} for stage in ("pretrain", "sft") for k in range(60)]
    row = {"image": tmp_path / "a.png", "question": "How many?", "answer": "3", "target": "3", "right": True}
    page = tmp_path / "demo.html"
    page.write_text(
        demo_page({"charts": floors, "digits": floors}, losses, [row, {**row, "right": False}], {"every answer": "a"}),
        encoding="utf-8",
    )
    for width, scheme in ((NARROW, "dark"), (WIDE, "light")):
        holds(look(page, width, scheme), width, scheme, pictures=2, charts=1)
