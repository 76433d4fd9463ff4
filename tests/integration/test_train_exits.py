"""Does a stage of kind exits teach Dynamic Perceiver when to stop, and hand it on so that confidence works?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mllm.encoders.backbones.dynperceiver import DynPerceiverEncoder
from mllm.errors import ConfigError, DataError
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.train import run_recipe
from mllm.train.stages.kind import kind_of
from tests.integration.test_train_contrastive import _data
from tests.integration.train_helpers import make_recipe, metrics


def _recipe(folder, *, encoder=None, **changes):
    file = Path(_data(folder / "pairs"))
    rows = json.loads(file.read_text())
    for row in rows:  # the class is the inner colour
        row["conversations"][1]["value"] = row["conversations"][1]["value"].split(" on ")[0]
    file.write_text(json.dumps(rows))
    classes = sorted({row["conversations"][1]["value"] for row in rows})
    stage = {
        "name": "stop",
        "kind": "exits",
        "steps": 12,
        "batch_size": 8,
        "data": {"format": "llava", "path": str(file)},
        "learn": {"encoders.cheap": 3e-3},
        "options": {"classes": classes, **changes.pop("options", {})},
        **changes,
    }
    tiny = {**DynPerceiverEncoder.tiny(), "output": "latents", "image_size": [32, 32], "depth_factor": [1, 1, 1, 1]}
    tiny |= {"classifier": True, "num_classes": len(classes), "confidence": 0.5, **(encoder or {})}
    model = {"encoders": {"cheap": tiny}, "connector": {"type": "mlp"}}
    return make_recipe(folder, stages=[stage], model=model)


def test_exits_learn_and_the_encoder_stops_early_afterwards(tmp_path):
    run_recipe(_recipe(tmp_path))
    rows = [row for row in metrics(tmp_path / "run") if row["stage"] == "stop"]
    losses = [float.fromhex(row["loss"]) for row in rows]
    assert sum(losses[-3:]) < sum(losses[:3]), losses
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    exits = ("early3", "att", "cnn", "merge")
    told = {f"exits/{name}" for name in (*exits, "distilled")} | {f"right/{name}" for name in exits}
    assert set(first["head_loss"]) == told
    state = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert any("early_classifier3" in key for key in state)
    assert not any(part in key for key in state for part in ("classifier_merge", "cnn_body_stage4", "isc3"))
    model = MllmForConditionalGeneration.from_pretrained(tmp_path / "run" / "final").eval()
    encoder = model.model.vision_tower.encoders["cheap"]
    with torch.no_grad():
        encoder(torch.randn(4, 3, 32, 32))
    assert 0 <= encoder.last_cost()["early"] <= 1


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"options": {"classes": ["red"]}}, "two classes or more"),
        ({"options": {"classes": ["red", "blue", "red"]}}, "'red' stands twice"),
        ({"options": {"classes": "nowhere.txt"}}, "no such file: nowhere.txt"),
        ({"learn": {"connector": 1e-3}}, "trains one encoder"),
        ({"packing": True}, "sees pictures and classes only"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_built(changes, word, tmp_path):
    recipe = _recipe(tmp_path, **changes)
    with pytest.raises(ConfigError, match=word):
        kind_of(recipe.stages[0]).check(recipe.stages[0], recipe)


def test_other_classes_than_the_classifiers_and_answers_that_are_none_are_named(tmp_path):
    wrong = _recipe(tmp_path, encoder={"num_classes": 7})
    with pytest.raises(ConfigError, match="classifier: true, num_classes: 4; set them"):
        run_recipe(wrong, output=tmp_path / "classes")
    stray = _recipe(tmp_path, options={"classes": ["red", "mauve", "pink", "teal"]})
    with pytest.raises(DataError, match=r"is none of the 4 classes \(red, mauve"):
        run_recipe(stray, output=tmp_path / "answers")
