"""Is rFID the standard one, and do device, type and batch size reach the work?"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mllm.cli.main import app
from mllm.errors import CheckpointError, ConfigError, DataError, UnavailableError
from mllm.visual_tokenizers.base import build_tokenizer
from mllm.visual_tokenizers.evaluate import evaluate_tokenizer, frechet_distance
from mllm.visual_tokenizers.images import load_images
from mllm.visual_tokenizers.inception import InceptionFeatures
from mllm.visual_tokenizers.recipe import ImagesSpec
from mllm.visual_tokenizers.running import choose_device, run_in_bfloat16, watched
from mllm.visual_tokenizers.storage import StoredCodes
from tests.unit.visual_tokenizers.tokenizer_configs import TINY

SPEC = ImagesSpec(type="digits_and_charts", options={"charts": 40, "digits": False})


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Path:
    """A file of random weights for the FID network."""
    network = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "none.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "load_state_dict", lambda self, state: None)  # its constructor reads a file or the net
        torch.manual_seed(0)
        model = network("fid", ["2048"], feature_extractor_weights_path=str(folder / "none.pth"))
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(model.state_dict(), folder / "weights.pth")
    return folder / "weights.pth"


def test_rfid_is_torchmetrics_fid_of_the_same_8_bit_images(inception):
    metric = pytest.importorskip("torchmetrics.image.fid").FrechetInceptionDistance
    tokenizer, images = build_tokenizer(TINY["vq"]).eval(), load_images(SPEC, 16, "held_out")
    network = InceptionFeatures(inception)
    found = evaluate_tokenizer(tokenizer, images, limit=6, batch_size=4, features=network)["frechet_distance"]
    real = images.batch(range(6))
    with torch.no_grad():
        made = tokenizer.decode(tokenizer.encode(real.float() / 127.5 - 1))
    made = ((made / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    # torchmetrics resizes otherwise by default; antialias=False is the resize that FID was defined with.
    fid = metric(2048, feature_extractor_weights_path=str(inception), antialias=False)
    fid.update(real, real=True)
    fid.update(made, real=False)
    assert found > 0.1
    assert found == pytest.approx(float(fid.compute()), rel=1e-3)
    assert network(real[:1].float() / 127.5 - 1).shape == (1, 2048)
    with pytest.raises(DataError, match="at least 2 images"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(1, 3))
    with pytest.raises(DataError, match="same features"):
        frechet_distance(torch.ones(4, 3), torch.ones(5, 3))


def test_weights_of_the_fid_network_are_asked_for_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"no such file.*weights-inception-2015-12-05-6726825d\.pth.*toshas"):
        InceptionFeatures(tmp_path / "absent.pth")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    for name in ("other", "broken"):
        with pytest.raises(CheckpointError, match=rf"{name}\.pth is not the FID network"):
            InceptionFeatures(tmp_path / f"{name}.pth")


def test_a_missing_device_is_refused_by_name(monkeypatch):
    assert choose_device("cpu") == torch.device("cpu")
    for name in ("gpu", "meta", "cuda:x"):
        with pytest.raises(ConfigError, match=f"device '{name}': give auto, cpu"):
            choose_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UnavailableError, match="device mps: there is no Apple GPU"):
        choose_device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(UnavailableError, match="device cuda: this machine has no CUDA device; give auto or cpu"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == torch.device("cuda") and choose_device("cuda:1").index == 1
    with pytest.raises(UnavailableError, match="device cuda:2: this machine has cuda:0 to cuda:1"):
        choose_device("cuda:2")


@pytest.mark.parametrize("kind", sorted(TINY))
def test_bfloat16_keeps_weights_codebooks_and_the_search_in_fp32(kind):
    torch.manual_seed(0)
    tokenizer = build_tokenizer(TINY[kind]).eval()
    pixels = torch.rand(4, 3, 16, 16) * 2 - 1
    before = {key: value.clone() for key, value in tokenizer.state_dict().items()}
    quantizers = [module for name, module in tokenizer.named_modules() if name.endswith("quantizer")]
    seen: list[tuple] = []
    with torch.no_grad():
        expected = tokenizer.decode(tokenizer.encode(pixels))
        run_in_bfloat16(tokenizer)
        hooks = [q.register_forward_hook(lambda q, inputs, out: seen.append((q, inputs[0], out))) for q in quantizers]
        codes = tokenizer.encode(pixels)
        made = tokenizer.decode(codes)
        seen.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again, _ = tokenizer.quantized(pixels)
        for hook in hooks:
            hook.remove()
        assert all(torch.equal(again.codes[name], codes.codes[name]) for name in codes.codes)
        assert len(seen) == len(quantizers) > 0
        for quantizer, vectors, out in seen:
            again = quantizer(vectors)
            assert vectors.dtype == torch.bfloat16 and out.quantized.dtype == torch.float32
            assert torch.equal(again.codes, out.codes) and torch.equal(again.quantized, out.quantized)
            assert torch.equal(quantizer.encode(vectors), out.codes)
    assert made.dtype == torch.bfloat16
    assert all(torch.equal(value, before[key]) for key, value in tokenizer.state_dict().items())
    assert torch.nn.functional.cosine_similarity(made.float().flatten(), expected.flatten(), dim=0) > 0.8


def test_a_bar_is_drawn_on_a_terminal_and_nowhere_else(monkeypatch, capsys):
    images = load_images(SPEC, 16, "train")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with watched("read", images) as (same,):
        assert same is images
    monkeypatch.setenv("FORCE_COLOR", "1")
    with watched("read", images, total=20, done=4) as (seen,):
        assert torch.equal(seen.batch(range(16)), images.batch(range(16)))
        assert len(seen) == len(images) and seen.labels is images.labels and seen.classes == images.classes
    said = capsys.readouterr()
    assert said.out == "" and "read" in said.err and "20/20" in said.err


def test_the_commands_take_device_batch_size_and_type(tmp_path, inception, monkeypatch):
    torch.manual_seed(0)
    build_tokenizer(TINY["tokenflow"]).save_pretrained(tmp_path / "tokenizer")
    recipe = tmp_path / "recipe.yaml"
    images = {"type": "digits_and_charts", "options": {"charts": 40, "digits": False}}
    stage = {"name": "t", "kind": "tokenizer", "learn": {"visual_tokenizer": 1e-3}, "data": images, "steps": 1}
    recipe.write_text(json.dumps({"model": {"visual_tokenizer": TINY["tokenflow"]}, "stages": [stage]}))
    sizes = []
    import mllm.visual_tokenizers.tokenflow as module

    whole = module.TokenFlow.encode
    monkeypatch.setattr(module.TokenFlow, "encode", lambda self, x: (sizes.append(len(x)), whole(self, x))[1])
    common = [str(tmp_path / "tokenizer"), "--recipe", str(recipe), "--device", "cpu", "--batch-size", "7"]
    done = CliRunner().invoke(app, ["tokenizer", "encode", *common, "--output", str(tmp_path / "codes")])
    assert done.exit_code == 0 and "1 shards written" in done.output
    assert sizes == [7, 7, 7, 7, 7, 5] and len(StoredCodes(tmp_path / "codes")) == 40
    former = CliRunner().invoke(app, ["tokenizer", "encode", *common, "--output", str(tmp_path), "--split", "test"])
    assert former.exit_code != 0 and "--split: test is now held_out" in str(former.exception)
    again = ["tokenizer", "encode", *common, "--output", str(tmp_path / "codes"), "--dtype", "bfloat16"]
    done = CliRunner().invoke(app, again)
    assert done.exit_code != 0 and "holds other codes (dtype differ)" in str(done.exception)
    sizes.clear()
    options = ["--features", f"inception={inception}", "--dtype", "bfloat16", "--limit", "3", "--questions", "classes"]
    done = CliRunner().invoke(app, ["tokenizer", "eval", *common, *options])
    assert done.exit_code == 0, done.output
    # 3 reconstructed; 40 and 10 for the questions, the same for the probe; 8 for the picture
    assert sizes == [3, *([7] * 5 + [5] + [7, 3]) * 2, 8]
    result = json.loads(done.stdout)
    assert result["device"] == "cpu" and result["dtype"] == "bfloat16" and "frechet_distance" not in result
    digest = hashlib.sha256(inception.read_bytes()).hexdigest()
    assert result["rfid"]["network"] == {"name": f"inception={inception}", "sha256": digest, "width": 2048}
    assert result["rfid"]["value"] > 0 and result["rfid"]["images"] == 3
    assert "biased: 3 images for 2048 features" in result["rfid"]["warning"]
    assert "not the weights" in result["rfid"]["warning"] and "rfid is biased" in done.stderr
    for wrong, message in (
        (["--dtype", "int8"], "expected one of float32, bfloat16"),
        (["--templates", "x"], "goes with"),
    ):
        done = CliRunner().invoke(app, ["tokenizer", "eval", *common, *wrong])
        assert done.exit_code != 0 and message in str(done.exception)
