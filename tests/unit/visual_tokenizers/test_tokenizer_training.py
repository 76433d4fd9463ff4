"""Does tokenizer training learn, resume exactly, and agree over processes?"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import yaml

from mllm.errors import CheckpointError, ConfigError, MllmError, UnavailableError
from mllm.visual_tokenizers.base import VisualTokenizer, build_tokenizer
from mllm.visual_tokenizers.optimise import epoch_order, rate_factor, update_average
from mllm.visual_tokenizers.perceptual import PerceptualLoss
from mllm.visual_tokenizers.quantizers.initialise import initialise_codebooks
from mllm.visual_tokenizers.recipe import PerceptualSpec, TokenizerRecipe, load_tokenizer_recipe, tokenizer_recipes
from mllm.visual_tokenizers.train import _as_numbers, train_tokenizer
from tests.helpers import torchrun
from tests.unit.visual_tokenizers.tokenizer_configs import CONV, HEAD, TINY

ROOT = Path(__file__).resolve().parents[3]
EMA_VQ = {**TINY["vq"], "quantizer": {**TINY["vq"]["quantizer"], "codebook": {"learn": "ema"}}}


def recipe_file(folder: Path, **changes) -> Path:
    data = {
        "name": "tiny", "output": str(folder / "run"), "tokenizer": TINY["vq"], "steps": 4, "batch_size": 4,
        "rate": 1e-3,
        "images": {"type": "digits_and_charts", "options": {"charts": 40, "digits": False}}, "log_every": 1,
        **changes,
    }  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return VisualTokenizer.from_pretrained(folder / "run" / "final").state_dict()


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_training_lowers_the_loss_and_writes_everything(tmp_path):
    result = train_tokenizer(recipe_file(tmp_path, steps=30, kmeans=16, save_every=20, ema=0.5))
    lines = [line for line in log(tmp_path) if "l2" in line]
    assert len(lines) == 30 and lines[-1]["l2"] < 0.6 * lines[0]["l2"]
    run = tmp_path / "run"
    assert {"final", "step-20", "grid.png", "evaluation.json", "metrics.jsonl", "recipe.yaml"} <= {
        p.name for p in run.iterdir()
    }
    assert json.loads((run / "evaluation.json").read_text()) == result
    assert result["psnr"] > 10 and 0 < result["usage"]["pixel"]["used"] <= 1
    assert load_tokenizer_recipe(run / "recipe.yaml").steps == 30


FULL = {
    "tokenizer": {**TINY["tokenflow"], "quantizer": {**TINY["tokenflow"]["quantizer"], "drop": 0.5}},
    "teacher": {"supervised": {"width": 24, "depth": 1, "heads": 2, "patch_size": 4, "steps": 3, "batch_size": 8}},
    "losses": {
        "l1": 1.0, "semantic": {"weight": 1.0},
        "adversarial": {"start": 2, "adaptive": [0.3, 10], "discriminator": {"channels": 8, "num_layers": 1}},
    },
    "ema": 0.9,
}  # fmt: skip


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    train_tokenizer(recipe_file(whole, steps=6, save_every=3, **FULL))
    train_tokenizer(recipe_file(broken, steps=3, save_every=3, **FULL))
    train_tokenizer(recipe_file(broken, steps=6, save_every=3, **FULL), resume=True)
    first, second = weights(whole), weights(broken)
    assert set(first) == set(second) and all(torch.equal(first[k], second[k]) for k in first)
    assert "adversarial" in log(whole)[4] and "adversarial" not in log(whole)[1]
    assert log(whole)[4]["semantic/tokens"] > 0


def test_a_run_is_not_overwritten_and_resume_needs_one(tmp_path):
    with pytest.raises(CheckpointError, match="save_every"):
        train_tokenizer(recipe_file(tmp_path), resume=True)
    train_tokenizer(recipe_file(tmp_path, save_every=2))
    with pytest.raises(ConfigError, match="resume"):
        train_tokenizer(recipe_file(tmp_path))
    for state in tmp_path.rglob("step-*/*.pt"):
        state.write_bytes(state.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match=r"step-\d+/\S+\.pt: is cut short"):
        train_tokenizer(recipe_file(tmp_path, save_every=2), resume=True)


@pytest.mark.parametrize("name", ["dualtoken", "illume"])
def test_the_other_tokenizers_train(tmp_path, name):
    changes = {}
    if name == "dualtoken":
        changes = {
            "teacher": {"initial": True},
            "losses": {
                "semantic": {"kind": "mse_cosine", "tokens": 5.0, "pooled": 1.0},
                "weights": {"commitment/pixel": 5.0, "commitment/semantic": 5.0},
            },
        }
    train_tokenizer(recipe_file(tmp_path, tokenizer=TINY[name], kmeans=8, steps=12, **changes))
    lines = [line for line in log(tmp_path) if "l2" in line]
    assert lines[-1]["l2"] < lines[0]["l2"]
    assert any(key.startswith("semantic") for key in lines[0])


def test_only_and_freeze_choose_what_learns(tmp_path):
    start = tmp_path / "start"
    build_tokenizer(TINY["vq"]).save_pretrained(start)
    train_tokenizer(recipe_file(tmp_path, init=str(start), only=["decoder."], freeze=["decoder.conv_in"]))
    before, after = VisualTokenizer.from_pretrained(start).state_dict(), weights(tmp_path)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(k.startswith("decoder.") and not k.startswith("decoder.conv_in") for k in changed)


def test_an_enhanced_decoder_starts_anew_on_a_saved_tokenizer(tmp_path):
    start = tmp_path / "start"
    build_tokenizer(TINY["vq"]).save_pretrained(start)
    bigger = {**TINY["vq"], "decoder": {**CONV, "channels": 24}}
    with pytest.raises(CheckpointError, match="init_skip"):
        train_tokenizer(recipe_file(tmp_path, tokenizer=bigger, init=str(start), only=["decoder."]))
    path = recipe_file(tmp_path, tokenizer=bigger, init=str(start), init_skip=["decoder."], only=["decoder."])
    train_tokenizer(path)
    before = VisualTokenizer.from_pretrained(start).state_dict()
    assert torch.equal(before["encoder.conv_in.weight"], weights(tmp_path)["encoder.conv_in.weight"])


TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from mllm.distributed import process_group
from mllm.visual_tokenizers.recipe import load_tokenizer_recipe
from mllm.visual_tokenizers.train import TokenizerRun, train_tokenizer
train_tokenizer(sys.argv[1])
restart = load_tokenizer_recipe(sys.argv[1], ["tokenizer.quantizer.codebook.restart=true", f"output={sys.argv[2]}"])
with process_group():
    run = TokenizerRun(restart, torch.device("cpu"))
    for _ in range(3):
        run.train_step()
    for name, tensor in run.tokenizer.state_dict().items():
        other = tensor.clone()
        dist.broadcast(other, src=0)
        assert torch.equal(tensor, other), name
"""


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    shared = {"tokenizer": EMA_VQ, "steps": 3, "kmeans": 8}
    train_tokenizer(recipe_file(one, batch_size=8, **shared))
    path = recipe_file(two, batch_size=4, **shared)
    script = tmp_path / "go.py"
    script.write_text(TWO_PROCESSES)
    torchrun(script, str(path), str(tmp_path / "restart"))
    first, second = weights(one), weights(two)
    worst = max(float((first[k].float() - second[k].float()).abs().max()) for k in first)
    assert worst < 2e-5, worst
    counted = (first["quantizer.books.pixel.counts"].sum() - 32) / (8 * 16 - 32)
    assert float(counted) == pytest.approx(1 - 0.99**3, rel=1e-4), "the moving averages count all 8 images' codes"


def test_images_come_in_shuffled_epochs():
    seen = [epoch_order(10, 3, i) for i in range(30)]
    assert all(sorted(seen[i : i + 10]) == list(range(10)) for i in (0, 10, 20))
    assert seen[:10] != seen[10:20]


def test_the_rate_warms_up_and_falls():
    from mllm.recipe import ScheduleSpec

    spec = ScheduleSpec(type="cosine", warmup=2, minimum=0.1)
    rates = [rate_factor(spec, step, 10) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[2:] == sorted(rates[2:], reverse=True) and rates[-1] > 0.1


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepz": 3}, "did you mean 'steps'"),
        ({"teacher": {"initial": True}}, "go together"),
        ({"teacher": {}, "losses": {"semantic": {}}}, "exactly one"),
        ({"tokenizer": {"type": "vq", "image_siz": 3}}, "image_siz"),
        ({"images": {"type": "digits_charts"}}, "did you mean 'digits_and_charts'"),
        ({"images": {"type": "digits_and_charts", "options": {"chart": 1}}}, "did you mean 'charts'"),
        ({"images": {"type": "folder", "options": {"path": "/no/such/folder"}}}, "no folder"),
        ({"only": ["encoderr."]}, "Parts: decoder, encoder"),
        ({"losses": {"weights": {"commitmnt": 1.0}}}, "this tokenizer has"),
        ({"optimizer": {"type": "muon"}}, "adamw or sgd"),
        ({"losses": {"l2": 0.0}}, "nothing would be reconstructed"),
        ({"teacher": {"initial": True}, "losses": {"semantic": {}}}, "no vision model"),
        (
            {
                "tokenizer": {**TINY["vq"], "semantic_head": {**HEAD, "teacher_dim": 7}},
                "teacher": {"encoder": TINY["tokenflow"]["student"]}, "losses": {"semantic": {}},
            },
            "teacher_dim",
        ),
    ],
)  # fmt: skip
def test_bad_recipes_say_what_to_change(tmp_path, changes, message):
    with pytest.raises(MllmError, match=message):
        train_tokenizer(recipe_file(tmp_path, **changes))


def test_every_shipped_tokenizer_recipe_builds_on_meta():
    found = tokenizer_recipes()
    assert len(found) >= 8
    for name in found:
        recipe = load_tokenizer_recipe(name)
        assert isinstance(recipe, TokenizerRecipe) and recipe.description
        with torch.device("meta"):
            tokenizer = build_tokenizer(recipe.tokenizer)
        assert tokenizer.bits_per_image > 0


def test_the_average_moves_parameters_and_copies_buffers():
    torch.manual_seed(0)
    tokenizer = build_tokenizer(EMA_VQ)
    before = {key: torch.randn_like(value) for key, value in tokenizer.state_dict().items()}
    average = {key: value.clone() for key, value in before.items()}
    update_average(average, tokenizer, 0.9)
    parameters = dict(tokenizer.named_parameters())
    assert parameters.keys() < average.keys()
    for key, value in tokenizer.state_dict().items():
        expected = torch.lerp(before[key], value, 1 - 0.9) if key in parameters else value
        torch.testing.assert_close(average[key], expected, rtol=1e-6, atol=1e-7, msg=key)


def test_logged_scalars_become_numbers_in_their_order():
    named = {"l1": torch.tensor(0.1, requires_grad=True), "norm": 2.5, "used": torch.tensor(0.75)}
    numbers = _as_numbers(named)
    assert list(numbers) == list(named) and numbers == {"l1": torch.tensor(0.1).item(), "norm": 2.5, "used": 0.75}
    assert _as_numbers({"norm": 1.0}) == {"norm": 1.0}
