"""Do weights, checkpoints and data come from a hub, and go to it, as its own client does it? Against a hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import yaml
from safetensors.torch import save
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from mllm.models.card import model_card
from mllm.plugins import load_plugins
from tests.helpers import TINY_CLIP, TINY_LLM, tiny_model, tiny_tokenizer
from tests.hub_server import TOKEN, Hub, running_hub
from tests.integration.test_convert import llava
from tests.test_readme import block

ROOT = Path(__file__).resolve().parents[2]
CUT = 200_000
OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}
CODE = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import huggingface_hub.constants as hub
import torch
from mllm.cli.main import app
from mllm.config import validate
from mllm.data.sources import open_source
from mllm.data.recognise import recognise
from mllm.data.spec import DatasetSpec
from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.errors import MllmError
from mllm.eval.checkpoint import load_model
from mllm.models.build import build_model
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.recipe import ModelSpec
from mllm.serve.server import ServeSettings
from mllm.serve.server import plan as plan_server

folder, found = sys.argv[2], {}
def error(call):
    try:
        call()
    except MllmError as error:
        assert "\\n" not in str(error), error
        return str(error)
    return "nothing"
def push(token):
    os.environ["HF_TOKEN"] = token
    app(["push", folder + "/run/final", "owner/tiny"], standalone_mode=False)
def spec(source, encoder="owner/clip", revision=None, commit="v1"):
    return ModelSpec.model_validate({
        "language_model": {"source": source, "revision": revision},
        "encoders": {"eye": {"type": "hf", "weights": {"source": encoder, "revision": commit, "licence": "MIT"}, "layers": [-2]}},
        "connector": {"type": "mlp"}, "chat_template": "chatml",
    })
timm = {"architecture": "resnet10t", "options": {"channels": [8, 8, 8, 8]}, "image_size": 32, "layers": [-1]}
clip = {"architecture": folder + "/open_clip.json", "image_size": 32, "layers": [-1]}
def load(kind, source):
    encoder = build_encoder(encoder_config({**kind, "weights": {"source": source, "licence": "MIT"}}, where="eye"))
    encoder.load_pretrained()
    return float(sum(p.double().sum() for p in encoder.parameters()))
def text(model):
    return float(model.model.language_model.layers[0].self_attn.q_proj.weight.sum())

found["unknown"] = error(lambda: push("hf_another"))
push(os.environ.pop("RIGHT"))
os.environ.pop("HF_TOKEN")
opened = MllmForConditionalGeneration.from_pretrained("owner/tiny")
found["tiny"] = float(sum(p.double().sum() for p in opened.parameters()))
found["v1"] = text(build_model(spec("owner/llm", revision="v1"))[0])
found["main"] = text(build_model(spec("owner/llm"))[0])
for name in ("gated", "nope"):
    found[name] = error(lambda: build_model(spec("owner/" + name)))
    found["weights " + name] = error(lambda: build_model(spec("owner/llm", encoder="owner/" + name)))
for name in ("gated", "nope", "llm"):
    found["chat " + name] = error(lambda: app(["chat", "owner/" + name, "-q", "hi"], standalone_mode=False))
    found["eval " + name] = error(lambda: load_model("owner/" + name))
for name in ("gated", "nope"):
    found["serve " + name] = error(lambda: plan_server(ServeSettings(checkpoint="owner/" + name)))
    found["convert " + name] = error(lambda: app(["convert", "owner/" + name, folder + "/none"], standalone_mode=False))
    found["rows " + name] = error(lambda: recognise("owner/" + name))
    for kind in ({"type": "timm", **timm}, {"type": "open_clip", **clip}):
        source = "hf-hub:owner/" + name
        found[kind["type"] + " " + name] = error(lambda: load(kind, source))
found["rows v9"] = error(lambda: recognise("owner/rows@v9"))
found["no tag"] = error(lambda: load({"type": "open_clip", **clip}, "owner/open_clip"))
app(["chat", "owner/tiny", "-q", "hi", "--max-new-tokens", "2"], standalone_mode=False)
app(["convert", "owner/llava", folder + "/converted"], standalone_mode=False)
found["converted"] = type(load_model(folder + "/converted")[0]).__name__
found["evaluated"] = type(load_model("owner/tiny")[0]).__name__
found["timm"] = load({"type": "timm", **timm}, "owner/timm")
found["open_clip"] = load({"type": "open_clip", **clip}, "hf-hub:owner/open_clip")
found["revision"] = error(lambda: build_model(spec("owner/llm", revision="v9")))
found["plugin"] = error(lambda: MllmForConditionalGeneration.from_pretrained("owner/plugged"))
os.environ["MLLM_TRUST_CHECKPOINT_PLUGINS"] = "1"
found["trusted"] = type(MllmForConditionalGeneration.from_pretrained("owner/plugged").model.vision_tower.encoders["eye"]).__name__
rows = open_source(validate(DatasetSpec, {
    "name": "rows", "format": "columns", "hub": "owner/rows", "revision": "v1", "streaming": True, "rows": 3,
    "columns": {"question": "q", "answer": "a"},
}))
found["rows"] = [rows[k].turns[1].content for k in range(3)]
hub.HF_HUB_OFFLINE = True
found["offline"] = text(build_model(spec("owner/llm", revision="v1"))[0])
found["uncached"] = error(lambda: build_model(spec("owner/late")))
print(json.dumps(found))
"""


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def language_model(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    sizes = {key: value for key, value in TINY_LLM.items() if key != "model_type"}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def fill(hub: Hub, folder: Path) -> float:
    """Put parts, checkpoints (a plug-in's, another project's) and rows on the hub and a checkpoint into ``folder``; returns the
    sum of its weights."""
    hub.add("owner/llm", files(language_model(folder / "llm1", 1)), "v1")
    hub.add("owner/llm", files(language_model(folder / "llm2", 2)))
    hub.add("owner/late", files(folder / "llm1"))
    hub.add("owner/gated", files(folder / "llm1"), gated=True)
    clip = CLIPVisionConfig(**{k: v for k, v in TINY_CLIP["architecture"].items() if k != "model_type"})
    CLIPVisionModel(clip).save_pretrained(folder / "clip")
    hub.add("owner/clip", files(folder / "clip"), "v1")
    (folder / "my_encoder.py").write_text(block("plugin"))
    load_plugins([str(folder / "my_encoder.py")])
    model, processor = tiny_model(
        folder / "words", encoders={"eye": {"type": "mean-colour"}}, connector={"type": "mlp"}
    )
    for part in (model, processor):
        part.save_pretrained(folder / "plugged")
    hub.add("owner/plugged", files(folder / "plugged"))
    llava("small", folder / "llava")
    hub.add("owner/llava", files(folder / "llava"))
    torch.manual_seed(3)
    trunk = timm.create_model("resnet10t", channels=[8, 8, 8, 8], num_classes=0)
    hub.add("owner/timm", {"model.safetensors": save(trunk.state_dict())})
    (folder / "open_clip.json").write_text(json.dumps({"model_cfg": OPEN_CLIP}))
    whole = open_clip.CLIP(**OPEN_CLIP)
    hub.add("owner/open_clip", {"open_clip_model.safetensors": save(whole.state_dict())})
    hub.add("owner/gated", {"train.jsonl": b"{}"}, kind="datasets", gated=True)
    rows = "".join(json.dumps({"q": f"what {k}?", "a": f"it is {k}"}) + "\n" for k in range(3))
    hub.add("owner/rows", {"train.jsonl": rows.encode()}, "v1", kind="datasets")
    model, processor = tiny_model(folder / "words")
    for part in (model, processor):
        part.save_pretrained(folder / "run" / "final")
    (folder / "run" / "eval").mkdir()
    metric = {"label": "anls_rrc v1", "protocol": "the script of RRC", "value": 41.5}
    task = {"metrics": [metric], "num_samples": 12, "header": {"limited": True}}
    (folder / "run" / "eval" / "results.json").write_text(json.dumps({"tasks": {"docvqa": task}}))
    return float(sum(p.detach().double().sum() for p in model.parameters()))


@pytest.mark.slow
def test_every_way_to_the_hub(tmp_path: Path) -> None:
    with running_hub() as hub:
        total = fill(hub, tmp_path)
        hub.cut_after = CUT
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MLLM_"))}
        environment |= {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "RIGHT": TOKEN,
        }
        command = [sys.executable, "-c", CODE, str(ROOT), str(tmp_path)]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
        assert hub.cut_after is None and any((asked or "bytes=0-").startswith("bytes=") and asked not in (None, "bytes=0-")
                                             for _, _, asked in hub.requests), "what was broken off is resumed"  # fmt: skip
        card = (
            hub.repositories["models/owner/tiny"]
            .commits[hub.repositories["models/owner/tiny"].refs["main"]]["README.md"]
            .decode()
        )
    found = json.loads(result.stdout.strip().splitlines()[-1])
    assert "hf auth login" in found["unknown"] and "not pushed" in found["unknown"]
    assert found["tiny"] == pytest.approx(total, rel=1e-6)
    assert found["v1"] != found["main"] and found["offline"] == found["v1"]
    for name in ("gated", "weights gated"):
        assert "owner/gated is gated: accept its terms" in found[name]
    for name in ("nope", "weights nope"):
        assert "the hub has no owner/nope" in found[name]
    assert "owner/llm has no such revision" in found["revision"]
    for name, cure in (("gated", "owner/gated is gated: accept"), ("nope", "the hub has no owner/nope, or")):
        for command in ("chat", "eval", "serve", "convert", "rows"):
            assert cure in found[f"{command} {name}"], (command, found[f"{command} {name}"])
        for kind in ("timm", "open_clip"):
            assert cure.replace("owner/", "hf-hub:owner/") in found[f"{kind} {name}"], found[f"{kind} {name}"]
    assert "owner/rows@v9" in found["rows v9"] and "has no such revision" in found["rows v9"]
    assert "written hf-hub:owner/open_clip" in found["no tag"]
    assert found["chat llm"].startswith("owner/llm: a llama checkpoint, not one of mllm")
    assert found["eval llm"].startswith("owner/llm: a Llama checkpoint, which is no image-text model")
    assert (
        found["converted"] == found["evaluated"] == "MllmForConditionalGeneration"
        and found["timm"]
        and found["open_clip"]
    )
    assert (
        "--plugin" in found["plugin"]
        and "home/hub/models--owner--plugged" in found["plugin"]
        and found["trusted"] == "MeanColour"
    )
    assert found["rows"] == ["it is 0", "it is 1", "it is 2"]
    assert "owner/late is not in the hub's cache" in found["uncached"]
    assert "| docvqa (a part of it) | 41.50 | - | not measured | 12 | anls_rrc v1 | the script of RRC |" in card


def test_the_card_names_parts_licences_and_how_to_open(tmp_path: Path) -> None:
    weights = {"source": "openai/clip-vit-large-patch14", "licence": "MIT", "commercial": True}
    config = {
        "text_config": {"model_type": "llama"},
        "encoders": {"eye": {"type": "hf", "weights": weights}},
        "connector": {"type": "mlp"},
    }
    text = {"source": "owner/llm", "licence": "Llama 2", "commercial": None}
    learn = {"connector": 1e-3, "language_model": {"lr": 1e-3, "lora": {"r": 16}}, "encoders": {"lr": 1e-4}}
    stages = [{"name": "sft", "learn": learn, "steps": 5}]
    (tmp_path / "config.json").write_text(json.dumps({**config, "plugins": [{"file": "mine.py", "sha256": "0"}]}))
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({"model": {"language_model": text}, "stages": stages, "description": "Ours."})
    )
    card = model_card(tmp_path, "me/it")
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "other" and head["base_model"] == ["openai/clip-vit-large-patch14", "owner/llm"]
    for words in (
        "| encoder eye | openai/clip-vit-large-patch14 | MIT | yes |",
        "| language model | owner/llm | Llama 2 | not known |",
        "import mllm",
        "`mine.py`",
        "| sft | sft | connector, encoders, language_model (LoRA) | 5 |",
        "Ours.",
    ):
        assert words in card, words
    assert "## Scores" not in card and "videos=" not in card
    (tmp_path / "config.json").write_text(json.dumps({**config, "video": {"frames": 8, "which": "middle"}}))
    card = model_card(tmp_path, "me/it")
    assert 'videos="clip.mp4"' in card and "(`frames: 8`, `which: middle`)" in card and "- video-text-to-text" in card
