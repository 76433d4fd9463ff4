"""Is each checkpoint evaluated once, are disagreeing encoders' pairs found, and is sensitivity the share of verdicts that flip?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.encoders.hf import HfEncoder
from mllm.errors import ConfigError
from mllm.eval.data.loading import load_data
from mllm.eval.predictions import read_predictions
from mllm.eval.report.show import write_report
from mllm.eval.run import evaluate
from mllm.eval.studies.mine import mine_pairs, picture_features, run_mine
from mllm.eval.studies.sensitivity import run_sensitivity, variations
from mllm.eval.studies.watch import checkpoints_in, watch
from mllm.eval.task import load_task
from tests.unit.eval.rules import RuleGenerator, constant
from tests.unit.eval.test_more_tasks import LAYOUTS
from tests.unit.eval.test_more_tasks import table as write_table
from tests.unit.eval.test_official_files import picture, write


def mmvp(folder: Path) -> Path:
    write_table(folder / "Questions.csv", LAYOUTS["mmvp"][2]["Questions.csv"], ",")
    for k in (1, 2, 3, 4):
        picture(folder / f"MMVP Images/{k}.jpg", 40 * k)
    return folder


def test_a_model_that_goes_by_the_letter_flips_with_the_order_alone(tmp_path):
    """It always says A: right on two of four as they stand, and on the other two when the options turn round."""
    data = {"mmvp": mmvp(tmp_path / "d")}
    study = run_sensitivity(RuleGenerator(constant("A")), ["mmvp"], tmp_path / "out", data=data, progress=False)
    flips = {row[1]: float(row[5]) for row in study.tables[0].rows}
    assert flips == {"wording": 0.0, "options": 100.0, "resize": 0.0, "jpeg": 0.0}
    each = {row[1]: row for row in study.tables[1].rows}
    assert len(each) == 13 and each["options reversed"][2:6] == ("50.00", "50.00", "+0.00", "100.0")
    varied = read_predictions(tmp_path / "out/sensitivity/options-reversed/mmvp.jsonl")
    assert [row["target"] for row in varied] == ["B", "A", "B", "A"] and varied[0]["meta"]["options"] == [
        "Closed",
        "Open",
    ]
    assert "A. Closed\nB. Open" in varied[0]["prompt"]


def test_a_model_that_goes_by_the_wording_and_the_pixels_flips_there(tmp_path):
    data = {"mmvp": mmvp(tmp_path / "d")}

    def rule(request) -> str:
        red = np.asarray(request.images[0], float)[..., 0].mean()
        return (
            "A"
            if "Please help" in request.turns[-1].content or request.images[0].width < 24
            else "B"
            if red > 50
            else "A"
        )

    generator = RuleGenerator(rule)
    study = run_sensitivity(
        generator, ["mmvp"], tmp_path / "out", ways=["wording", "resize"], data=data, progress=False
    )
    each = {row[1]: float(row[5]) for row in study.tables[1].rows}
    assert each["wording 5"] == 75.0 and each["wording 1"] == 0.0, "three of four say B otherwise"
    assert each["resize 0.5"] == 75.0 and each["resize 1.5"] == 0.0
    asked = len(generator.asked)
    run_sensitivity(generator, ["mmvp"], tmp_path / "out", ways=["wording", "resize"], data=data, progress=False)
    assert len(generator.asked) == asked, "a second call keeps every answer"
    with pytest.raises(ConfigError, match="ways 'jpg': expected some of wording, options, resize, jpeg"):
        list(variations(["jpg"]))


def test_what_cannot_be_varied_is_left_out_and_named(tmp_path):
    write(tmp_path / "d/test/test_human.json", [{"imgname": "1.png", "query": "q?", "label": "5"}])
    write(tmp_path / "d/test/test_augmented.json", [{"imgname": "1.png", "query": "r?", "label": "5"}])
    picture(tmp_path / "d/test/png/1.png")
    data, ways = {"chartqa": tmp_path / "d"}, ["options", "wording"]
    study = run_sensitivity(
        RuleGenerator(constant("5")), ["chartqa"], tmp_path / "out", ways=ways, data=data, progress=False
    )
    assert any("no question can be asked with options reversed" in note for note in study.notes)
    assert [row[1] for row in study.tables[0].rows] == ["wording"]


def test_pairs_on_which_encoders_disagree_are_found_widest_first():
    one = np.array([[1, 0], [0.99, 0.141], [0, 1], [0.05, 0.9987], [-1, 0]], np.float32)  # 0 ~ 1 (.99), 2 ~ 3 (.9987)
    apart = np.eye(5, dtype=np.float32)
    pairs = mine_pairs({"one": one, "two": apart})
    assert [(p.first, p.second, p.blind) for p in pairs] == [(2, 3, "one"), (0, 1, "one")]
    assert pairs[1].similarity == {"one": pytest.approx(0.99), "two": 0.0}
    assert [(p.first, p.second) for p in mine_pairs({"one": one, "two": apart}, most=1)] == [(2, 3)]
    # two is blind to 1 and 4 (one: −.99) and to 0 and 2 (one: 0); these gaps are wider, and each picture is in one pair
    two = np.array([[1, 0], [0, 1], [1, 0], [0.6, 0.8], [0, 1]], np.float32)
    assert [(p.first, p.second, p.blind) for p in mine_pairs({"one": one, "two": two})] == [
        (1, 4, "two"),
        (0, 2, "two"),
    ]
    assert mine_pairs({"one": one, "two": one}) == []


@pytest.fixture(scope="module")
def encoders():
    """A real tiny encoder, and one that sees nothing but the mean colour (its patches are averaged away by the resize)."""
    import torch

    torch.manual_seed(0)
    small = build_encoder(encoder_config(HfEncoder.tiny(), where="encoder")).eval()
    torch.manual_seed(1)
    other = build_encoder(encoder_config(HfEncoder.tiny(), where="encoder")).eval()
    return {"small": small, "other": other}


def test_mining_a_folder_writes_pairs_that_mmvp_reads(tmp_path, encoders):
    rng = np.random.default_rng(0)
    for k in range(8):
        place = tmp_path / f"photos/{k}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(place)
    files = sorted((tmp_path / "photos").glob("*.png"))
    features = {
        name: picture_features(name, encoder, files, batch_size=3, progress=False) for name, encoder in encoders.items()
    }
    assert all(np.allclose(np.linalg.norm(values, axis=1), 1, atol=1e-5) for values in features.values())
    gaps = sorted(
        (float(a), float(b))
        for i in range(8) for j in range(i)
        for a, b in [(features["small"][i] @ features["small"][j], features["other"][i] @ features["other"][j])]
    )  # fmt: skip
    alike, unlike = (
        gaps[-1][0] - 1e-4,
        gaps[-1][1] + 1e-4,
    )  # bounds that the likest pair of the first encoder just meets
    told: list[str] = []
    study = run_mine(
        [],
        tmp_path / "out",
        pictures=tmp_path / "photos",
        opened=encoders,
        alike=alike,
        unlike=unlike,
        progress=False,
        say=told.append,
    )
    pairs = [json.loads(line) for line in (tmp_path / "out/pairs.jsonl").read_text().splitlines()]
    assert pairs and study.data["pairs"][0]["blind"] in ("small", "other") and "pairs.html" in told[0]
    sheet = (tmp_path / "out/Questions.csv").read_text()
    filled = (
        sheet.replace(",(a)  (b) ,", ",(a) left (b) right,").replace("1,,", "1,Which?,").replace("2,,", "2,Which?,")
    )
    (tmp_path / "out/Questions.csv").write_text(filled)
    items = load_data(load_task("mmvp"), data={"mmvp": tmp_path / "out"}).items
    assert len(items) >= 2 and items[0].pictures[0].read() == Path(pairs[0]["first"]).read_bytes()
    kept = {path.name for path in (tmp_path / "out/features").glob("*.npy")}
    run_mine(
        [], tmp_path / "out", pictures=tmp_path / "photos", opened=encoders, alike=alike, unlike=unlike, progress=False
    )
    assert {path.name for path in (tmp_path / "out/features").glob("*.npy")} == kept
    assert "Which?" in (tmp_path / "out/Questions.csv").read_text(), "questions by hand are not written over"


def test_encoders_are_measured_on_mmvps_own_pairs(tmp_path, encoders):
    study = run_mine([], tmp_path / "out", mmvp=mmvp(tmp_path / "d"), opened=encoders, progress=False)
    assert [row[0] for row in study.tables[0].rows] == ["small", "other"] and study.tables[0].rows[0][4] == "2"
    assert all(-1 <= value <= 1 for value in study.data["small"]["cosine"])
    with pytest.raises(ConfigError, match="a folder of pictures to mine"):
        run_mine([], tmp_path / "out", opened=encoders)
    with pytest.raises(ConfigError, match="--mmvp wants the folder"):
        run_mine([], tmp_path / "out", mmvp=tmp_path, opened=encoders)


def checkpoint(folder: Path, weight: bytes) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    head = json.dumps({"w": {"dtype": "U8", "shape": [len(weight)], "data_offsets": [0, len(weight)]}}).encode()
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + weight)
    return folder


def test_each_checkpoint_is_evaluated_once_as_it_appears(tmp_path):
    """Four looks: one stage, then a second, then ``final`` with the second's weights."""
    run, asked, told, looks = tmp_path / "run", [], [], []
    data = {"mmvp": mmvp(tmp_path / "d")}

    def score(path: Path, folder: Path) -> None:
        asked.append(path.name)
        reply = constant("A") if path.name == "align" else lambda r: "A" if r.id in ("1", "3") else "B"
        write_report(evaluate(RuleGenerator(reply), ["mmvp"], folder, data=data, progress=False), folder, show=False)

    def look(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            checkpoint(run / "tune", b"bb")
        if len(looks) == 4:
            shutil.copytree(run / "tune", run / "final")
        assert len(looks) < 12

    checkpoint(run / "align", b"aa")
    (run / "state").mkdir()
    (run / "state/config.json").write_text("{}")  # no weights: no model
    study = watch(run, score, interval=1, say=told.append, sleep=look)
    assert asked == ["align", "tune"] and "final is tune" in study.notes
    assert [row[:3] for row in study.tables[0].rows] == [("align", "mmvp", "0.00"), ("tune", "mmvp", "100.00")]
    assert study.tables[0].rows[1][4] == "+100.00"
    page = (run / "eval/watch/curve.html").read_text()
    assert "<svg" in page and "align: 0.00" in page and "src=" not in page
    watch(run, score, once=True, sleep=look)
    assert asked == ["align", "tune"], "what was evaluated before is kept"


def test_half_written_and_broken_checkpoints_wait_or_are_named(tmp_path):
    folder = checkpoint(tmp_path / "run/align", b"aa")
    (folder / "model.safetensors.part").write_bytes(b"")
    assert checkpoints_in(tmp_path / "run") == []
    (folder / "model.safetensors.part").unlink()
    told: list[str] = []

    def fail(path: Path, place: Path) -> None:
        raise ConfigError("no processor")

    with pytest.raises(ConfigError, match="no checkpoint to evaluate"):
        watch(tmp_path / "run", fail, once=True, say=told.append)
    assert told[-1] == "align: not evaluated (no processor)"
    with pytest.raises(ConfigError, match="no such folder"):
        checkpoints_in(tmp_path / "nowhere")
