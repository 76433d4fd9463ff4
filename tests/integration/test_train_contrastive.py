"""Does a contrastive stage train the encoder that the next stage goes on with, the same on one and two processes?"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from mllm.errors import CheckpointError, ConfigError
from mllm.train import run_recipe
from mllm.train.stages.contrastive.dual_encoder import _hf_model, _open_clip_dual
from mllm.train.stages.kind import kind_of
from tests.helpers import TINY_CLIP
from tests.integration.train_helpers import make_recipe, metrics

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "yellow": (220, 220, 20)}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 24,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {k: v for k, v in TINY_CLIP["architecture"].items() if k != "model_type"}


def _data(folder, rows: int = 24) -> str:
    """One square of a colour on another: the caption says which, the negatives exchange them or name a third."""
    folder.mkdir(parents=True, exist_ok=True)
    names, data = list(COLOURS), []
    for row in range(rows):
        inner, outer = names[row % 4], names[(row + 1 + row // 4 % 3) % 4]
        image = Image.new("RGB", (28, 28), COLOURS[outer])
        image.paste(COLOURS[inner], (7, 7, 21, 21))
        image.save(folder / f"{row}.png")
        third = next(n for n in names if n not in (inner, outer))
        data.append(
            {
                "id": str(row),
                "image": f"{row}.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nwhat is it?"},
                    {"from": "gpt", "value": f"{inner} on {outer}"},
                ],
                "negatives": [f"{outer} on {inner}", f"{third} on {third}"],
                "negative_scores": [0.6, 0.1],
            }
        )
    path = folder / "pairs.json"
    path.write_text(json.dumps(data))
    return str(path)


def _recipe(folder, *, options=None, after=True, **stage):
    data = {"format": "llava", "path": _data(folder / "pairs")}
    config = {"model_type": "clip", "text_config": TEXT, "vision_config": VISION, "projection_dim": 16}
    stages = [
        {
            "name": "pairs",
            "kind": "contrastive",
            "steps": 4,
            "batch_size": 4,
            "data": data,
            "learn": {"encoders.semantic": 2e-3},
            "options": {
                "config": config,
                "tokenizer": str(folder / "tokenizer"),
                "num_negatives": 2,
                **(options or {}),
            },
            **stage,
        }
    ]
    if after:
        stages.append({"name": "sft", "steps": 1, "learn": {"connector": 1e-3}})
    return make_recipe(folder, stages=stages, model={"encoders": {"semantic": TINY_CLIP}})


def _encoder(folder):
    state = load_file(folder / "model.safetensors")
    return {k: v for k, v in state.items() if "vision_tower" in k}


def _tuned(output, *, falls_to, over):
    """The encoder of a run whose loss fell to that share between its first and its last steps, and that the next stage left as it was."""
    losses = [float.fromhex(r["loss"]) for r in metrics(output) if r["stage"] == "pairs"]
    assert sum(losses[-over:]) < falls_to * sum(losses[:over]), losses
    tuned, after = _encoder(output / "pairs"), _encoder(output / "final")
    assert tuned and all(torch.equal(tuned[k], after[k]) for k in tuned), "the encoder is frozen in the second stage"
    return tuned


def test_the_tuned_encoder_goes_on_into_the_next_stage_and_is_kept_whole(tmp_path):
    from transformers import CLIPModel

    recipe = _recipe(tmp_path, steps=40, batch_size=8)
    run_recipe(recipe)
    output = tmp_path / "run"
    tuned = _tuned(output, falls_to=0.75, over=5)
    whole = CLIPModel.from_pretrained(output / "dual_encoders" / "pairs").state_dict()
    for key, value in tuned.items():
        name = "vision_model." + key.split("encoders.semantic.model.")[1]
        assert torch.equal(value, whole[name]), key
    short = _recipe(tmp_path, steps=1, after=False)
    run_recipe(short, output=tmp_path / "short")
    start = _encoder(tmp_path / "short" / "final")
    assert max((start[k] - tuned[k]).abs().max().item() for k in tuned) > 1e-3, "it did learn"


def test_an_open_clip_encoder_learns_with_ranked_negatives_and_goes_on_into_the_next_stage(tmp_path):
    from open_clip import CLIP

    vision = {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 7}
    text = {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    architecture = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    options = {"config": None, "tokenizer": None, "ranking_weight": 0.5, "ranking_floor": 0.05}
    recipe = _recipe(tmp_path, steps=12, batch_size=8, options=options)
    recipe.model.encoders["semantic"] = {"type": "open_clip", "architecture": architecture, "layers": [-1]}
    run_recipe(recipe)
    output = tmp_path / "run"
    tuned = _tuned(output, falls_to=0.8, over=3)
    whole = CLIP(16, vision, text)  # what is kept opens in open_clip alone, and is the tuned encoder
    whole.load_state_dict(load_file(output / "dual_encoders" / "pairs" / "open_clip_model.safetensors"))
    for key, value in tuned.items():
        assert torch.equal(value, whole.state_dict()["visual." + key.split("encoders.semantic.model.")[1]]), key


def test_an_encoder_without_a_text_side_learns_against_a_language_models_words(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from mllm.encoders.timm import TimmEncoder
    from tests.helpers import tiny_tokenizer

    words = tmp_path / "words"
    tiny_tokenizer().save_pretrained(str(words))
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    language_model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tiny_tokenizer()), **sizes))
    language_model.save_pretrained(words)
    options = {"config": None, "tokenizer": None, "words": str(words), "learn_text": 5e-3, "ranking_weight": 0.5}
    recipe = _recipe(tmp_path, steps=30, batch_size=8, options=options)
    recipe.model.encoders["semantic"] = {**TimmEncoder.tiny(), "image_size": 28, "keep_prefix": False}
    run_recipe(recipe)
    output = tmp_path / "run"
    tuned = _tuned(output, falls_to=0.75, over=5)
    kept = load_file(output / "dual_encoders" / "pairs" / "model.safetensors")
    assert all(torch.equal(tuned[k], kept["encoder.model." + k.split("encoders.semantic.model.")[1]]) for k in tuned)
    assert not any("table" in name for name in kept), "the language model's own words are not saved again"
    with pytest.raises(ConfigError, match="words: builds the text side; leave out source, config and tokenizer"):
        kind_of(recipe.stages[0]).check_options(_recipe(tmp_path, options={"words": str(words)}).stages[0])
    without = _recipe(tmp_path, options={"config": None, "tokenizer": None})
    without.model.encoders["semantic"] = recipe.model.encoders["semantic"]
    with pytest.raises(ConfigError, match=r"has no text side to be compared with.*set words to a language model"):
        run_recipe(without, output=tmp_path / "no")


@pytest.mark.slow
def test_two_processes_with_gathered_negatives_equal_one(tmp_path):
    """The same four pairs a step, as one batch and as two processes' batches of two: InfoNCE with ranking on plain torch, then
    the sigmoid loss under ZeRO-2."""

    def recipe(batch_size: int, engine: str):
        made, calm = _recipe(tmp_path, after=False), {"optimizer": {"eps": 1e-4}, "steps": 3, "batch_size": batch_size}
        first = made.stages[0]
        made.model.encoders["other"] = {
            **TINY_CLIP,
            "architecture": {"model_type": "siglip_vision_model", **VISION},
        }
        siglip = {"model_type": "siglip", "text_config": TEXT, "vision_config": VISION}
        changes: list[dict] = [
            {"options": {**first.options, "ranking_weight": 0.5}},
            {
                "name": "sigmoid",
                "engine": engine,
                "learn": {"encoders.other": 2e-3},
                "options": {**first.options, "config": siglip, "loss": "sigmoid", "learn_text": 1e-3},
            },
        ]
        made.stages = [type(first).model_validate(first.model_dump() | calm | change) for change in changes]
        return made

    run_recipe(recipe(4, "none"), output=tmp_path / "one")
    run_recipe(recipe(2, "zero2"), output=tmp_path / "two", processes=2)
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a["data"] == b["data"] and a["supervised"] == b["supervised"] == 4
        assert float.fromhex(a["loss"]) == pytest.approx(float.fromhex(b["loss"]), abs=5e-6)
        assert float.fromhex(a["grad_norm"]) == pytest.approx(float.fromhex(b["grad_norm"]), rel=1e-5)
    one, two = (_encoder(tmp_path / name / "final") for name in ("one", "two"))
    assert max((one[k] - two[k]).abs().max().item() for k in one) < 1e-6


def test_an_interrupted_contrastive_stage_goes_on_bit_equal(tmp_path):
    recipe = _recipe(tmp_path, steps=4, gradient_accumulation=2, save_every=1, options={"learn_text": False})
    run_recipe(recipe, output=tmp_path / "whole")
    run_recipe(recipe, output=tmp_path / "cut", stop_after=2)
    assert not (tmp_path / "cut" / "final").exists()
    run_recipe(recipe, output=tmp_path / "cut", resume=True)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    name = "model.safetensors"
    assert (tmp_path / "cut/final" / name).read_bytes() == (tmp_path / "whole/final" / name).read_bytes()
    assert set(metrics(tmp_path / "whole")[0]["lr"]) == {"encoders.semantic"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packing": True}, "has no packing"),
        ({"engine": "zero3"}, "use none, sharded, zero1 or zero2"),
        ({"engine": "fsdp2"}, "use none, sharded, zero1 or zero2"),
        ({"learn": {"connector": 1e-3}}, "trains one encoder"),
        ({"options": {"num_negative": 1}}, "did you mean 'num_negatives'"),
        ({"options": {"ranking_weight": 1.0, "num_negatives": 1}}, "needs num_negatives of 2"),
    ],
)
def test_settings_a_contrastive_stage_cannot_have_are_told_before_anything_is_trained(tmp_path, change, message):
    recipe = _recipe(tmp_path)
    stage = recipe.stages[0]
    broken = type(stage).model_validate(stage.model_dump() | change)
    with pytest.raises(ConfigError, match=message):
        kind_of(broken).check_options(broken)


def test_a_dual_model_of_another_architecture_is_refused(tmp_path):
    recipe = _recipe(tmp_path, after=False)
    recipe.stages[0].options["config"]["vision_config"] = {**VISION, "hidden_size": 16}
    with pytest.raises(CheckpointError, match="another architecture"):
        run_recipe(recipe)


def test_a_source_whose_text_side_would_start_at_random_is_refused(tmp_path):
    config = CLIPConfig(text_config=TEXT, vision_config=VISION)
    CLIPModel(config).save_pretrained(tmp_path)
    image = SimpleNamespace(
        config=SimpleNamespace(info=SimpleNamespace(image=SimpleNamespace(height=VISION["image_size"])))
    )
    options = SimpleNamespace(config=None)
    assert isinstance(_hf_model(image, options, "options", str(tmp_path), None)[0], CLIPModel)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    save_file(
        {k: v for k, v in whole.items() if not k.startswith("text_model.encoder")}, file, metadata={"format": "pt"}
    )
    with pytest.raises(
        CheckpointError, match=r"not the whole model: 16 weights are missing .*start at random \(text_model"
    ):
        _hf_model(image, options, "options", str(tmp_path), None)
    blocks = "text_model.encoder.layers."
    deeper = {f"{blocks}9{k[len(blocks) + 1 :]}": v.clone() for k, v in whole.items() if k.startswith(f"{blocks}0.")}
    save_file({**whole, **deeper}, file, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"16 weights that the text side lacks.*left out \(text_model.encoder.layers.9"
    ):
        _hf_model(image, options, "options", str(tmp_path), None)


def test_an_open_clip_source_gives_its_bias_and_a_deeper_text_side_is_refused(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    tower = {"width": 16, "layers": 1, "heads": 2}
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    described = {
        "embed_dim": 16,
        "vision_cfg": vision,
        "text_cfg": {**tower, "context_length": 8, "vocab_size": 49408},
    }
    whole = open_clip.CLIP(16, vision, described["text_cfg"])
    file = tmp_path / "whole.pt"
    settings = SimpleNamespace(
        architecture=described,
        weights=None,
        quick_gelu=False,
        info=SimpleNamespace(image=SimpleNamespace(height=16)),
    )
    encoder = SimpleNamespace(config=settings, model=whole.visual)
    options = SimpleNamespace(source=str(file), config=None)
    state = whole.state_dict()
    torch.save(state, file)
    same = _open_clip_dual(encoder, options, "options").model.state_dict()
    assert all(torch.equal(same[name], tensor) for name, tensor in state.items())
    torch.save(
        {**state, "logit_bias": torch.tensor([-7.5])}, file
    )  # open_clip itself fails where its config names none
    biased = _open_clip_dual(encoder, options, "options")
    assert biased.model.logit_bias is not None and float(biased.model.logit_bias) == -7.5
    biased.save(tmp_path / "saved")
    again = open_clip.create_model(f"local-dir:{tmp_path / 'saved'}")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in biased.model.state_dict().items())
    deeper = {k.replace("resblocks.0", "resblocks.1"): v for k, v in state.items() if k.startswith("transformer.")}
    torch.save({**state, **deeper}, file)
    with pytest.raises(CheckpointError, match=r"12 weights that the text side lacks.*transformer.resblocks.1"):
        _open_clip_dual(encoder, options, "options")


def test_rows_without_the_negatives_they_should_have_are_set_aside_by_name(tmp_path):
    recipe = _recipe(tmp_path, after=False, options={"negatives": "neg_caption"})
    from mllm.errors import DataError

    with pytest.raises(DataError, match="no hard negative under 'neg_caption'"):
        run_recipe(recipe)
