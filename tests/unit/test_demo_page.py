"""Does the demo's page show scores, the loss, which answers are right, and where the report is?"""

from __future__ import annotations

from PIL import Image

from mllm.demo.page import demo_page, loss_curve


def test_the_page_shows_scores_loss_marks_and_links(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    scores = {"charts": {"score": 55.3, "blank": 16.5, "shuffled": 18.0, "prior": 21.2}}
    losses = [{"stage": stage, "step": k, "loss": 4.0 - k} for stage in ("align", "sft") for k in range(3)]
    rows = [
        {"image": tmp_path / "a.png", "question": "<b>?", "answer": "3", "target": "3", "right": True},
        {"image": tmp_path / "a.png", "question": "How many?", "answer": "5", "target": "4", "right": False},
    ]
    page = demo_page(scores, losses, rows, {"every answer": "eval/report.html"})
    for words in ("55.3 %", "16.5 %", "18.0 %", "21.2 %", 'href="eval/report.html"', "✓ 3", "✗ 5", "&lt;b&gt;?"):
        assert words in page
    assert page.count("<polyline") == 2 and page.count("data:image/png;base64,") == 2 and "<b>?" not in page
    assert "no loss" in loss_curve([])
    assert "✗ no words" in demo_page(scores, losses, [{**rows[1], "answer": ""}], {})
    assert "color-scheme:light dark" in page  # links stay readable on a dark page
