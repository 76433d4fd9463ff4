"""Do probes tell a good encoder from a blind one, and two that see the same from two that do not?"""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from mllm.encoders.backbones.biformer import BiFormerEncoder
from mllm.encoders.backbones.gldmnet import GlDmNetEncoder
from mllm.errors import ConfigError, DataError, UnavailableError
from mllm.eval.studies.probe import cka, effective_rank, halves, labelled_pictures, run_probe


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three classes that only colour tells apart, as a folder and as rows."""
    root = tmp_path_factory.mktemp("pictures")
    rng, rows = np.random.default_rng(0), []
    for number, name in enumerate(("red", "green", "blue")):
        (root / name).mkdir()
        for k in range(12):
            pixels = rng.integers(0, 60, (16, 16, 3)).astype(np.uint8)
            pixels[..., number] += 120
            file = root / name / f"{k}.png"
            Image.fromarray(pixels).save(file)
            rows.append({"image": f"{name}/{k}.png", "answer": name, "kind": "even" if k % 2 == 0 else "odd"})
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_probes_rank_encoders_and_tell_what_they_cost(pictures, tmp_path):
    specs = {
        "sees": {"type": "raw_patches", "image_size": 16, "patch_size": 8},
        "again": {"type": "raw_patches", "image_size": 16, "patch_size": 8, "resize": "squash"},
        "other": {**BiFormerEncoder.tiny(), "image_size": 64},
    }
    for name, spec in specs.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps(spec))
    names = [str(tmp_path / f"{name}.yaml") for name in specs]
    data = labelled_pictures(pictures, limit=30)
    assert len(data.files) == 30 and data.labels.count("red") == 10
    study = run_probe(names, data, tmp_path / "out", progress=False, device="cpu")
    found = {entry["name"]: entry for entry in study.data["encoders"]}
    sees = found[names[0]]
    assert sees["linear"] == 1.0 and sees["neighbours"] == 1.0 and sees["weights"] == "random"
    assert sees["gflops"] >= 0 and sees["milliseconds"] > 0 and found[names[2]]["gflops"] > sees["gflops"]
    pairs = {(p["first"], p["second"]): p["cka"] for p in study.data["cka"]}
    assert pairs[names[0], names[1]] == pytest.approx(1.0) and pairs[names[0], names[2]] < 0.99
    assert study.data["chance"] == pytest.approx(1 / 3) and any("never trained" in note for note in study.notes)
    page = (tmp_path / "out" / "probe.html").read_text()
    assert names[0] in page and "the same" in page and (tmp_path / "out" / "probe.md").is_file()


def test_a_picture_with_too_few_panels_is_named(pictures, tmp_path):
    (tmp_path / "depth.yaml").write_text(json.dumps(GlDmNetEncoder.tiny()))
    data = labelled_pictures(pictures, limit=6)
    with pytest.raises(DataError, match=r"image \S+\.png: an encoder sees pictures of 2 panels"):
        run_probe([str(tmp_path / "depth.yaml")], data, tmp_path / "out", progress=False, device="cpu")


def test_rows_are_chosen_by_their_values_and_halves_keep_every_class(pictures):
    rows = labelled_pictures(pictures / "rows.jsonl", where={"kind": "odd"})
    assert len(rows.files) == 18 and set(rows.labels) == {"red", "green", "blue"}
    train, test = halves(rows.labels)
    assert not set(train) & set(test) and len(train) + len(test) == 18
    assert {rows.labels[k] for k in test} == {rows.labels[k] for k in train} == {"red", "green", "blue"}


def test_rank_and_likeness_are_what_they_are_called():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((200, 8)), rng.standard_normal((200, 8))
    turned = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    assert cka(x, 3 * x @ turned + 1) == pytest.approx(1.0) and cka(x, y) < 0.2
    assert effective_rank(x) == pytest.approx(8, abs=0.2)
    assert effective_rank(np.outer(x[:, 0], np.ones(8))) == pytest.approx(1, abs=1e-6)
    assert effective_rank(np.ones((5, 3))) == 0.0


def test_data_that_cannot_be_probed_is_told(pictures, tmp_path):
    with pytest.raises(DataError, match=r"rows.jsonl:1: no 'lable' in the row It has|rows.jsonl:1: no 'lable'"):
        labelled_pictures(pictures / "rows.jsonl", label="lable")
    with pytest.raises(DataError, match="two classes of two pictures or more"):
        labelled_pictures(pictures / "rows.jsonl", where={"answer": "red"})
    with pytest.raises(ConfigError, match="one subfolder a class"):
        labelled_pictures(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="--label and --where are for"):
        labelled_pictures(pictures, label="answer")
    with pytest.raises(UnavailableError, match=r"no encoder could be opened.*--random"):
        run_probe(["crossvit-9-dagger-240"], labelled_pictures(pictures), tmp_path, progress=False, device="cpu")
