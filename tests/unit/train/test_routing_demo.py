"""Does the routing demo's data say the right expert only where it is meant to?"""

from __future__ import annotations

import json

from PIL import Image

from mllm.demo.routing import EXPERT_OF, prepare_routing_demo


def test_only_the_specialising_rows_name_their_expert(tmp_path):
    data = prepare_routing_demo(tmp_path, num_train=3, num_test=2)
    rows = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in tmp_path.glob("*.jsonl")
    }
    assert {name: len(found) for name, found in rows.items()} == {"specialise": 9, "train": 9, "test": 6}
    assert all(row["experts"] == [EXPERT_OF[row["kind"]]] for row in rows["specialise"])
    assert not any("experts" in row for row in rows["train"] + rows["test"]), "a named expert would fix the routing"
    assert [{k: v for k, v in row.items() if k != "experts"} for row in rows["specialise"]] == rows["train"]
    sizes = {row["kind"]: Image.open(tmp_path / row["image"]).size for row in rows["test"]}
    assert sizes == {"charts": (160, 80), "digits": (16, 512), "text": (384, 12)}
    before = data.train.stat().st_mtime_ns
    assert prepare_routing_demo(tmp_path, num_train=3, num_test=2) == data
    assert data.train.stat().st_mtime_ns == before
