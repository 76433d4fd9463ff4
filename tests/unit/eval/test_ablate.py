"""Does masking an encoder do what it says, leave the model as it was, and count its cost right?"""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mllm.errors import ConfigError
from mllm.eval.generators.hf import HFGenerator
from mllm.eval.studies.ablate import WARNING, Ablation, _Probe, ablate, effective_rank, encoder_bank
from mllm.eval.studies.ablation_report import ablation_study
from mllm.eval.studies.study import study_markdown
from mllm.types import IMAGE_MARK, Request, Turn, VisionFeatures
from tests.helpers import picture, tiny_model
from tests.unit.eval.test_runner import make_data


class Linear(torch.nn.Module):
    """An encoder whose two tokens are sums over the picture."""

    def forward(self, pixels):
        total = pixels.sum((1, 2, 3))
        return VisionFeatures(torch.stack([total, -total], 1).unsqueeze(-1), (1, 2))


def test_each_masking_replaces_features_as_described():
    encoder = Linear()
    probe = _Probe("x", encoder)
    pixels = torch.arange(3.0)[:, None, None, None].expand(3, 3, 2, 2)  # sums 0 12 24
    intact = encoder(pixels).tokens
    assert len(probe.pool) == 3 and probe.num_images == 3
    probe.mode = "drop"
    assert encoder(pixels).tokens.abs().sum() == 0
    probe.mode = "mean"
    assert encoder(pixels).tokens[:, 0, 0].tolist() == [12.0, 12.0, 12.0]
    probe.mode = "shuffle"
    shuffled = encoder(pixels).tokens
    assert not (shuffled == intact).all(dim=(1, 2)).any(), "no picture keeps its own features"
    assert torch.equal(encoder(pixels[[2, 0]]).tokens, shuffled[[2, 0]]), "the batch does not matter"
    probe.remove()
    assert torch.equal(encoder(pixels).tokens, intact)


def test_effective_rank_of_known_spectra():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 8, generator=generator))[0]
    basis = torch.linalg.qr(basis - basis.mean(0))[0]
    assert effective_rank(basis) == pytest.approx(8.0, abs=1e-4)
    assert effective_rank(basis[:, :1] @ torch.ones(1, 8)) == pytest.approx(1.0, abs=1e-3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tokenizer"))


def test_ablation_of_a_two_encoder_model(tiny, tmp_path):
    model, processor = tiny
    folder = make_data(tmp_path / "d", 8)
    request = Request("r", [Turn("user", f"{IMAGE_MARK}\nwhat?")], [picture(3)], {"max_new_tokens": 6})
    before = next(iter(HFGenerator(model, processor).generate([request]))).text
    found = ablate(
        model, processor, ["demo_charts"], tmp_path / "o", data={"demo_charts": folder}, batch_size=4, progress=False,
        modes=("drop", "shuffle", "mean"),
    )  # fmt: skip
    assert next(iter(HFGenerator(model, processor).generate([request]))).text == before, "the hooks are gone"
    assert [(e.encoder, e.mode) for e in found.effects] == [
        (name, mode) for name in ("semantic", "detail") for mode in ("drop", "shuffle", "mean")
    ]
    assert all(e.comparison.num_samples == 8 and e.task == "demo_charts" for e in found.effects)
    assert all(e.adjusted >= e.comparison.p_value for e in found.effects)
    intact = (tmp_path / "o/intact/demo_charts.jsonl").read_text()
    changed = [(tmp_path / f"o/{e.encoder}-{e.mode}/demo_charts.jsonl").read_text() != intact for e in found.effects]
    assert all(changed), "every masking changes the answers of this model"
    semantic, detail = found.costs
    assert semantic.width == 32 and detail.width == 24 and semantic.milliseconds > 0 and semantic.share_of_images == 1.0
    # a ViT on 17 tokens of which 2 blocks run (features are taken there): per block 4 d² + 2 d·ff projections and 2 n d
    # attention, 2 flops each; plus patches
    n, d, ff, layers = 17, 32, 48, 2
    expected = layers * 2 * n * (4 * d * d + 2 * d * ff + 2 * n * d) + 2 * 16 * d * 3 * 49
    assert semantic.gflops * 1e9 == pytest.approx(expected)
    assert 1 < semantic.effective_rank <= 32 and found.routing == {"demo_charts": {}}
    text = "\n".join(study_markdown(ablation_study(found)))
    assert (
        WARNING in text
        and "| semantic | drop | demo_charts | relaxed_strict v2 |" in text
        and "| 100 % |" in text
        and "Never run" not in text
    )


def test_unknown_encoders_modes_and_models_are_named(tiny, tmp_path):
    model, processor = tiny
    with pytest.raises(ConfigError, match="'spatial': the model has semantic, detail"):
        ablate(model, processor, ["demo_charts"], tmp_path, encoders=["spatial"])
    with pytest.raises(ConfigError, match="expected one of drop"):
        ablate(model, processor, ["demo_charts"], tmp_path, modes=["blur"])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="no named encoders"):
        encoder_bank(torch.nn.Linear(1, 1))


def test_routing_is_recorded_per_question_and_summed_by_category(tmp_path):
    changes = {
        "router": {"type": "gate", "experts": ["detail"], "top_k": 1},
        "connector": {"type": "channel_concat", "projector": {"depth": 2}},
    }
    model, processor = tiny_model(tmp_path / "tokenizer", **changes)
    folder = make_data(tmp_path / "d", 6)
    found = ablate(
        model, processor, ["demo_charts"], tmp_path / "o", data={"demo_charts": folder}, modes=["drop"],
        encoders=["detail"], progress=False,
    )  # fmt: skip
    assert set(found.routing["demo_charts"]) == {"a", "b"}
    weights = list(found.routing["demo_charts"].values())
    assert all(set(row) == {"detail"} and 0 <= row["detail"] <= 1 for row in weights)
    text = "\n".join(study_markdown(ablation_study(found)))
    assert (
        "**Routing on demo_charts: mean weight of each expert by category**" in text and "| category | detail |" in text
    )


def answered(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*/*.jsonl"))


def table(found: Ablation) -> tuple:
    """Everything but the time, which no two runs share."""
    return found.effects, [replace(cost, milliseconds=0.0) for cost in found.costs], found.routing


def ablate_alone(model, processor, data: Path, output: Path) -> None:
    torch.set_num_threads(1)
    ablate(model, processor, ["demo_charts"], output, data={"demo_charts": data}, batch_size=2, progress=False)


@pytest.mark.parametrize("seed", [1, 2])
def test_kill_minus_nine_at_random_points_then_the_same_table_and_no_finished_run_asked_again(
    tiny, tmp_path, monkeypatch, seed
):
    model, processor = tiny
    data, output, draw = make_data(tmp_path / "d", 6), tmp_path / "o", random.Random(seed)
    common = {"data": {"demo_charts": data}, "batch_size": 2, "progress": False}
    whole = ablate(model, processor, ["demo_charts"], tmp_path / "whole", **common)
    # 6 intact answers, then 6 for each of 6 maskings: within the intact run, and twice among the masked ones
    for target in (draw.randint(1, 4), *sorted(draw.sample(range(8, 40), 2))):
        process = multiprocessing.get_context("fork").Process(
            target=ablate_alone, args=(model, processor, data, output)
        )
        process.start()
        until = time.monotonic() + 60
        while time.monotonic() < until and answered(output) < target and process.is_alive():
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL and target <= answered(output) < 42
    stood = {path.parent.name: path.read_text() for path in output.glob("*/demo_charts.jsonl")}
    finished = [name for name, text in stood.items() if text.count("\n") == 6]
    assert "intact" in finished
    asked = []
    answer = HFGenerator.generate

    def counted(self, requests):
        for response in answer(self, requests):
            asked.append((self.masking.split(":")[1].replace("=", "-") if self.masking else "intact", response.id))
            yield response

    monkeypatch.setattr(HFGenerator, "generate", counted)
    again = ablate(model, processor, ["demo_charts"], output, **common)
    assert table(again) == table(whole) and not {name for name, _ in asked} & set(finished)
    assert (
        len(asked)
        == len(set(asked))
        == 42 - sum(sum(line.endswith("\n") for line in text.splitlines(keepends=True)) for text in stood.values())
    ), "what stood of an unfinished masking is kept, too"
    for path in output.glob("*/demo_charts.jsonl"):
        assert sorted(path.read_text().splitlines()) == sorted(
            (tmp_path / "whole" / path.relative_to(output)).read_text().splitlines()
        )
    asked.clear()
    assert ablate(model, processor, ["demo_charts"], output, **common) == again and asked == []


def test_another_limit_masks_with_other_pictures_and_another_model_is_refused(tiny, tmp_path):
    model, processor = tiny
    data = make_data(tmp_path / "d", 8)
    common = {"data": {"demo_charts": data}, "batch_size": 4, "progress": False, "encoders": ["detail"]}
    ablate(model, processor, ["demo_charts"], tmp_path / "o", limit=4, modes=["mean"], **common)
    found = ablate(model, processor, ["demo_charts"], tmp_path / "o", modes=["mean"], **common)
    fresh = ablate(model, processor, ["demo_charts"], tmp_path / "fresh", modes=["mean"], **common)
    assert table(found) == table(fresh) and found.effects[0].comparison.num_samples == 8
    other, processor = tiny_model(tmp_path / "tokenizer")
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    with pytest.raises(ConfigError, match="answers of another run"):
        ablate(other, processor, ["demo_charts"], tmp_path / "o", modes=["mean"], **common)
    ablate(other, processor, ["demo_charts"], tmp_path / "o", modes=["mean"], resume=False, **common)
