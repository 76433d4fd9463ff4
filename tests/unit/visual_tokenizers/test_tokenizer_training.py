"""Does tokenizer training learn, resume exactly, and agree over processes?"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mllm.config import validate
from mllm.errors import CheckpointError, ConfigError, MllmError, UnavailableError
from mllm.former_recipes import upgraded
from mllm.recipe import Recipe, load_recipe
from mllm.train.run import run_recipe
from mllm.visual_tokenizers.base import TokenizerOutput, VisualTokenizer, build_tokenizer
from mllm.visual_tokenizers.losses import TokenizerLosses
from mllm.visual_tokenizers.perceptual import PerceptualLoss
from mllm.visual_tokenizers.quantizers.initialise import initialise_codebooks
from mllm.visual_tokenizers.recipe import (
    LossesSpec,
    PerceptualSpec,
    TokenizerOptions,
    diffusion_training,
    load_training,
    tokenizer_recipes,
)
from mllm.visual_tokenizers.teacher import Teacher
from tests.unit.visual_tokenizers.tokenizer_configs import CONV, HEAD, TINY

EMA_VQ = {**TINY["vq"], "quantizer": {**TINY["vq"]["quantizer"], "codebook": {"learn": "ema"}}}


def make(folder: Path, *, tokenizer: Any = TINY["vq"], learn: Any = None, options: Any = None, **stage: Any) -> Recipe:
    stage = {
        "name": "tokenizer", "kind": "tokenizer", "learn": learn or {"visual_tokenizer": 1e-3}, "steps": 4, "batch_size": 4,
        "data": {"type": "digits_and_charts", "options": {"charts": 40, "digits": False}}, "dtype": "float32", "log_every": 1,
        "schedule": {"type": "constant", "warmup": 0.0}, "optimizer": {"betas": [0.9, 0.95]}, "options": options or {}, **stage,
    }  # fmt: skip
    return validate(
        Recipe,
        {
            "name": "tiny",
            "output": str(folder / "run"),
            "model": {"visual_tokenizer": tokenizer},
            "stages": [stage],
        },
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return VisualTokenizer.from_pretrained(folder / "run" / "final").state_dict()


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_training_lowers_the_loss_and_writes_everything(tmp_path):
    final = run_recipe(make(tmp_path, steps=30, options={"kmeans": 16, "evaluate_every": 20}, optimizer={"ema": 0.5}))
    lines = log(tmp_path)
    assert len(lines) == 30 and lines[-1]["losses"]["l2"] < 0.6 * lines[0]["losses"]["l2"]
    assert [line["step"] for line in lines if "evaluation" in line] == [20]
    assert {"model.safetensors", "grid.png", "evaluation.json", "recipe.yaml", "run.json"} <= {
        p.name for p in final.iterdir()
    }
    result = json.loads((final / "evaluation.json").read_text())
    assert result["psnr"] > 10 and 0 < result["usage"]["pixel"]["used"] <= 1
    record = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]["tokenizer"]
    assert record["evaluation"] == result and record["steps"] == 30 and "folder" not in record["data"]
    assert load_training(final / "recipe.yaml").stage.steps == 30


TOKENFLOW = {**TINY["tokenflow"], "quantizer": {**TINY["tokenflow"]["quantizer"], "drop": 0.5}}
FULL = {
    "teacher": {"supervised": {"width": 24, "depth": 1, "heads": 2, "patch_size": 4, "steps": 3, "batch_size": 8}},
    "losses": {
        "l1": 1.0, "semantic": {"weight": 1.0},
        "adversarial": {"start": 2, "adaptive": [0.3, 10], "discriminator": {"channels": 8, "num_layers": 1}},
    },
}  # fmt: skip


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    same: dict[str, Any] = {"tokenizer": TOKENFLOW, "steps": 6, "save_every": 4, "options": FULL}
    same |= {"optimizer": {"ema": 0.9}, "data": {**make(tmp_path).stages[0].data, "crop": [0.5, 1.0], "flip": True}}
    run_recipe(make(whole, **same))
    run_recipe(make(broken, **same), stop_after=4)
    assert not (broken / "run" / "final").exists()
    run_recipe(make(broken, **same), resume=True)
    first, second = weights(whole), weights(broken)
    assert set(first) == set(second) and all(torch.equal(first[k], second[k]) for k in first)
    lines, again = log(whole), log(broken)
    assert "adversarial" in lines[4]["losses"] and "adversarial" not in lines[1]["losses"]
    assert lines[4]["losses"]["discriminator"] > 0 and lines[4]["losses"]["semantic/tokens"] > 0
    assert [line["losses"] for line in lines] == [line["losses"] for line in again]


def test_a_run_is_not_overwritten_and_an_earlier_versions_is_refused(tmp_path):
    run_recipe(make(tmp_path, steps=2, save_every=1))
    with pytest.raises(ConfigError, match="--resume"):
        run_recipe(make(tmp_path, steps=2))
    with pytest.raises(CheckpointError, match="finished, with other settings"):
        run_recipe(make(tmp_path, steps=3), resume=True)
    former = tmp_path / "former" / "run" / "step-20"
    former.mkdir(parents=True)
    (former / "training_state.pt").touch()
    with pytest.raises(ConfigError, match=r"stages\.tokenizer\.options\.init=\S+step-20"):
        run_recipe(make(tmp_path / "former"), resume=True)


def test_a_picture_that_cannot_be_read_is_named_and_replaced(tmp_path):
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(12):
        Image.new("RGB", (20, 24), (20 * number, 30, 40)).save(folder / f"{number}.png")
    good = folder / "3.png"
    good.write_bytes(good.read_bytes()[:40])
    data = {"type": "folder", "options": {"path": str(folder), "held_out": 2}}
    run_recipe(make(tmp_path, data=data, max_bad_share=0.5, num_workers=1))
    stage = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]["tokenizer"]
    dropped = (tmp_path / "run" / "dropped" / "tokenizer-0.jsonl").read_text()
    assert "3.png" in dropped and stage["dropped"] == {"folder": 1}
    with pytest.raises(MllmError, match=r"3\.png|max_bad_share"):
        run_recipe(make(tmp_path / "strict", data=data, max_bad_share=0.0))


@pytest.mark.parametrize("name", ["dualtoken", "illume"])
def test_the_other_tokenizers_train(tmp_path, name):
    changes = {}
    if name == "dualtoken":
        changes = {
            "teacher": {"initial": True},
            "losses": {
                "semantic": {"kind": "mse_cosine", "tokens": 5.0, "pooled": 1.0},
                "weights": {"commitment/pixel": 5.0, "commitment/semantic": 5.0},
                "outliers": {"region": 4, "start": 3},
            },
        }
    run_recipe(make(tmp_path, tokenizer=TINY[name], steps=12, options={"kmeans": 8, **changes}))
    lines = [line["losses"] for line in log(tmp_path)]
    assert lines[-1]["l2"] < lines[0]["l2"]
    assert any(key.startswith("semantic") for key in lines[0])
    if name == "dualtoken":
        assert [number for number, line in enumerate(lines) if "kept_pixels" in line] == list(range(3, 12))
        assert all(0 < line["kept_pixels"] <= 1 for line in lines[3:])


def test_outliers_are_not_learned_from_and_leave_the_losses_values():
    """Gradients end where a picture is left out; what is logged of the losses is the same."""

    class Means(Teacher):
        grid, width = (4, 4), 3

        def forward(self, pixels):
            return {"tokens": F.adaptive_avg_pool2d(pixels, 4).flatten(2).transpose(1, 2)}

    torch.manual_seed(0)
    tokenizer, pixels = build_tokenizer(TINY["dualtoken"]), torch.rand(1, 3, 16, 16)
    seen = {}
    for kind in (None, "regions", "soft"):
        made = pixels.clone()
        made[..., :4, :4] *= -1  # one square looks like nothing that it should
        made.requires_grad_()
        outliers = None if kind is None else {"kind": kind, "region": 4}
        spec = validate(LossesSpec, {"semantic": {"weight": 1e-9}, "outliers": outliers})
        features = {"tokens": torch.zeros(1, tokenizer.grid[0] * tokenizer.grid[1], 3)}
        output = TokenizerOutput(made, tokenizer.encode(pixels), {}, features)
        named, total = TokenizerLosses(spec, tokenizer, Means())(output, pixels, 0)
        seen[kind] = named["l2"].item(), torch.autograd.grad(total, made)[0]
    assert seen[None][0] == seen["regions"][0] == pytest.approx(seen["soft"][0], rel=1e-6)
    assert seen[None][1][..., :4, :4].any()
    for kind in ("regions", "soft"):
        assert not seen[kind][1][..., :4, :4].any(), kind
    with pytest.raises(ConfigError, match=r"losses\.outliers compares features"):
        validate(TokenizerOptions, {"losses": {"outliers": {}}})


def test_parts_and_freeze_choose_what_learns(tmp_path):
    start = tmp_path / "start"
    build_tokenizer(TINY["vq"]).save_pretrained(start)
    options = {"init": str(start), "freeze": ["decoder.conv_in"]}
    run_recipe(make(tmp_path, learn={"visual_tokenizer.decoder": 1e-3}, options=options))
    before, after = VisualTokenizer.from_pretrained(start).state_dict(), weights(tmp_path)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(k.startswith("decoder.") and not k.startswith("decoder.conv_in") for k in changed)


def test_an_enhanced_decoder_starts_anew_on_a_saved_tokenizer(tmp_path):
    start = tmp_path / "start"
    build_tokenizer(TINY["vq"]).save_pretrained(start)
    bigger, decoder = {**TINY["vq"], "decoder": {**CONV, "channels": 24}}, {"visual_tokenizer.decoder": 1e-3}
    with pytest.raises(CheckpointError, match="init_skip"):
        run_recipe(make(tmp_path / "a", tokenizer=bigger, learn=decoder, options={"init": str(start)}))
    run_recipe(make(tmp_path, tokenizer=bigger, learn=decoder, options={"init": str(start), "init_skip": ["decoder."]}))
    before = VisualTokenizer.from_pretrained(start).state_dict()
    assert torch.equal(before["encoder.conv_in.weight"], weights(tmp_path)["encoder.conv_in.weight"])


@pytest.mark.slow
def test_two_processes_under_zero_train_what_one_does(tmp_path):
    """Codebooks that follow a moving average and a discriminator included; only the order of sums differs."""
    one, two, zero = tmp_path / "one", tmp_path / "two", tmp_path / "zero"
    adversarial = {"start": 1, "discriminator": {"channels": 8, "num_layers": 1}}
    # Plain gradient descent: AdamW's first steps have the size of the rate whatever rounding does to a gradient near zero.
    shared: dict[str, Any] = {"tokenizer": EMA_VQ, "steps": 3, "optimizer": {"type": "sgd", "betas": [0.0, 0.9]}}
    shared |= {"options": {"kmeans": 8, "losses": {"adversarial": adversarial}}}
    run_recipe(make(one, batch_size=8, **shared))
    run_recipe(make(two, batch_size=4, **shared), processes=2)
    run_recipe(make(zero, batch_size=4, engine="zero1", **shared), processes=2)
    first = weights(one)
    for folder in (two, zero):
        second = weights(folder)
        worst = max(float((first[k].float() - second[k].float()).abs().max()) for k in first)
        assert worst < 2e-5, worst
        for a, b in zip(log(one), log(folder), strict=True):
            # The discriminator's batch norms see a process's own pictures.
            close = 1e-6 if a["step"] == 1 else 2e-3
            assert a["data"] == b["data"] and a["loss"] == pytest.approx(b["loss"], rel=close)
    counted = (first["quantizer.books.pixel.counts"].sum() - 32) / (8 * 16 - 32)
    assert float(counted) == pytest.approx(1 - 0.99**3, rel=1e-4), "the moving averages count all 8 images' codes"


def test_kmeans_start_uses_more_codes_than_a_random_start():
    torch.manual_seed(0)
    pixels = torch.rand(16, 3, 16, 16) * 2 - 1
    for name in ("vq", "dualtoken"):
        tokenizer = build_tokenizer(TINY[name]).eval()
        fresh = copy.deepcopy(tokenizer)
        initialise_codebooks(tokenizer, pixels, 8)
        used = lambda t: len(t.encode(pixels).codes["pixel"].unique())  # noqa: E731
        assert used(tokenizer) > used(fresh) and used(tokenizer) >= 0.7 * tokenizer.codebooks["pixel"][0]


def test_perceptual_loss_is_lpips_on_given_weights(tmp_path):
    from torchvision.models.vgg import cfgs, make_layers

    torch.manual_seed(0)
    vgg = make_layers(cfgs["D"], batch_norm=False)
    torch.save({f"features.{k}": v for k, v in vgg.state_dict().items()}, tmp_path / "vgg.pth")
    loss = PerceptualLoss(PerceptualSpec(vgg=str(tmp_path / "vgg.pth")))
    a, b = (torch.rand(2, 3, 32, 32) * 2 - 1 for _ in range(2))
    assert float(loss(a, a)) == 0
    expected = 0.0
    xs = [(x - loss.shift) / loss.scale for x in (a, b)]
    with torch.no_grad():
        for index, layer in enumerate(vgg[:30]):
            xs = [layer(x) for x in xs]
            if index in (3, 8, 15, 22, 29):
                f, g = (x / x.norm(dim=1, keepdim=True) for x in xs)
                expected += float((f - g).square().mean(1).mean())
    assert float(loss(a, b)) == pytest.approx(expected, rel=1e-4)
    a.requires_grad_(True)
    loss(a, b).backward()
    assert a.grad is not None and a.grad.abs().sum() > 0
    with pytest.raises(UnavailableError, match="does not exist"):
        PerceptualLoss(PerceptualSpec(vgg=str(tmp_path / "none.pth")))


def test_a_stage_compiles_the_networks_where_it_says_so(tmp_path, monkeypatch):
    """What compiled networks give is tests/unit/models/test_compilation.py's."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: compiled.append(type(module).__name__))
    run_recipe(make(tmp_path / "plain", steps=1))
    assert not compiled
    run_recipe(make(tmp_path / "compiled", steps=1, compile=True))
    assert sorted(compiled) == ["ConvolutionalDecoder", "ConvolutionalEncoder"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepz": 3}, "did you mean 'steps'"),
        ({"options": {"teacher": {"initial": True}}}, "go together"),
        ({"options": {"teacher": {}, "losses": {"semantic": {}}}}, "exactly one"),
        ({"options": {"losses": {"adversarial": {"rate": 1e-4}}}}, "adversarial.rate: this key is now lr"),
        ({"tokenizer": {"type": "vq", "image_siz": 3}}, "image_siz"),
        ({"data": {"type": "digits_charts"}}, "did you mean 'digits_and_charts'"),
        ({"data": {"type": "digits_and_charts", "options": {"chart": 1}}}, "did you mean 'charts'"),
        ({"data": "/no/such/folder"}, "no folder"),
        ({"learn": {"visual_tokenizer.encoderr": 1e-3}}, "did you mean 'visual_tokenizer.encoder'"),
        ({"learn": {"visual_tokenizer": {"lr": 1e-3, "lora": {"r": 2}}}}, "take lora"),
        ({"options": {"freeze": ["encoderr."]}}, "Parts: decoder, encoder"),
        ({"options": {"losses": {"weights": {"commitmnt": 1.0}}}}, "this tokenizer has"),
        ({"optimizer": {"type": "muon"}, "engine": "zero1"}, "does not work on ZeRO"),
        ({"engine": "zero3"}, "use none, sharded, zero1 or zero2"),
        ({"engine": "fsdp2"}, "use none, sharded, zero1 or zero2"),
        ({"packing": True}, "has no packing"),
        ({"kind": "sft"}, "no language_model"),
        ({"options": {"losses": {"l2": 0.0}}}, "nothing would be reconstructed"),
        ({"options": {"teacher": {"initial": True}, "losses": {"semantic": {}}}}, "no vision model"),
        (
            {
                "tokenizer": {**TINY["vq"], "semantic_head": {**HEAD, "teacher_dim": 7}},
                "options": {"teacher": {"encoder": TINY["tokenflow"]["student"]}, "losses": {"semantic": {}}},
            },
            "teacher_dim",
        ),
    ],
)  # fmt: skip
def test_bad_recipes_say_what_to_change(tmp_path, changes, message):
    with pytest.raises(MllmError, match=message):
        run_recipe(make(tmp_path, **changes))


def test_every_shipped_tokenizer_recipe_builds_on_meta():
    found = tokenizer_recipes()
    assert len(found) >= 8
    for name in found:
        recipe = load_recipe(name)
        assert recipe.description
        first, whole = recipe.stages[0], recipe.model.visual_tokenizer
        settings = whole if first.kind == "tokenizer" else diffusion_training(recipe, first).tokenizer
        with torch.device("meta"):
            tokenizer = build_tokenizer(settings)
        assert tokenizer.bits_per_image > 0


def test_a_recipe_of_the_former_format_is_refused_and_converts(tmp_path):
    former = {
        "name": "tiny", "tokenizer": TINY["vq"], "images": {"type": "folder", "options": {"path": "x"}}, "steps": 5, "rate": 2e-4,
        "precision": "bf16", "ema": 0.9, "only": ["decoder."], "teacher": {"supervised": {"patch_size": 4, "rate": 1e-2}},
        "losses": {"l1": 1.0, "semantic": {}, "adversarial": {"rate": 3e-4}}, "optimizer": {"weight_decay": 0.1},
    }  # fmt: skip
    path = tmp_path / "former.yaml"
    path.write_text(json.dumps(former))
    with pytest.raises(ConfigError, match="mllm convert"):
        load_recipe(str(path))
    stage = validate(Recipe, upgraded(former)).stages[0]
    assert stage.learn == {"visual_tokenizer.decoder": 2e-4} and stage.dtype == "bfloat16" and stage.batch_size == 32
    assert stage.optimizer.ema == 0.9 and stage.optimizer.betas == (0.9, 0.95) and stage.schedule.type == "constant"
    path.write_text(json.dumps(upgraded(former)))
    training = load_training(path)
    assert training.losses.adversarial.lr == 3e-4 and training.teacher.supervised.lr == 1e-2
    assert training.images.type == "folder"
