"""Do records, counts and run.json say what happened?"""

from __future__ import annotations

import json
import logging
import subprocess
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mllm.data.collate import collate, collate_packed
from mllm.errors import UnavailableError
from mllm.heads.segmentation.head import SegmentationHead
from mllm.processing.chat import encode_sample
from mllm.train.observe.dataset_loss import DatasetLoss
from mllm.train.observe.flops import FlopModel, flop_model, peak_flops
from mllm.train.observe.meter import Meter, mean_losses
from mllm.train.observe.run_info import RunInfo, git_state, hub_revisions
from mllm.train.observe.spikes import SpikeDetector
from mllm.train.observe.tracking import Tracker, plot_loss, read_metrics
from mllm.train.preflight.verify import compare
from mllm.train.prepare import attention_inputs
from mllm.types import Sample, Turn
from tests.helpers import tiny_model
from tests.integration.train_helpers import make_recipe


def _record(stage: str, step: int, loss: float = 1.0) -> dict:
    return {"stage": stage, "step": step, "loss": loss, "lr": {"connector": 0.1}}


def test_records_of_steps_that_come_again_are_dropped_and_a_cut_line_is_ignored(tmp_path):
    recipe = make_recipe(tmp_path)
    tracker = Tracker(tmp_path, recipe)
    tracker.start_stage("a", 0)
    for step in (1, 2, 3):
        tracker.log(_record("a", step, 0.1 + step))
    tracker.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "a", "st')
    tracker = Tracker(tmp_path, recipe)
    tracker.start_stage("a", 2)
    tracker.log(_record("a", 3, 9.0))
    tracker.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 1.1), (2, 2.1), (3, 9.0)]
    path = plot_loss(tmp_path, ["a", "b"])
    assert path is not None and path.stat().st_size > 1000


def test_a_service_that_is_not_installed_says_what_to_install(tmp_path):
    recipe = make_recipe(tmp_path)
    for name in ("wandb", "trackio"):
        try:
            __import__(name)
        except ImportError:
            with pytest.raises(UnavailableError, match=f"pip install {name}"):
                Tracker(tmp_path, recipe.model_copy(update={"track": [name]}))


def test_operations_equal_those_that_torch_counts_in_a_real_step(tmp_path):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model, _ = tiny_model(tmp_path)
    model.set_attn_implementation("eager")
    model.model.vision_tower.requires_grad_(False)  # nor do text-only batches then keep it in step with other ranks
    model.model.multi_modal_projector.requires_grad_(False)
    length, config = 24, model.config.get_text_config()
    flops = flop_model(model, ["language_model"])
    ids = torch.randint(5, 200, (2, length))
    with FlopCounterMode(display=False) as counter:
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    step = flops.step(tokens=2 * length, squares=2 * length**2, supervised=2 * length, views=0)
    dense = (
        3 * 2 * 2 * config.num_hidden_layers * config.hidden_size * length**2 * 2
    )  # eager computes the masked half too
    ours = step.language_model + dense / 2
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the CPU's own kernel is not counted
        infos = model.model.vision_tower.infos
        pixels = {n: torch.zeros(3, 3, i.image.height, i.image.width) for n, i in infos.items()}
        with torch.no_grad():
            model.model.encode_images(pixels)
    frozen = flop_model(model, ["language_model"])
    vision = sum(frozen.encoders.values()) + frozen.connector
    assert 3 * vision == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_a_part_that_learns_costs_three_passes_and_a_frozen_one_that_gradients_pass_two(tmp_path):
    model, _ = tiny_model(tmp_path)
    sizes = {"tokens": 10, "squares": 100, "supervised": 4, "views": 1}
    full, through = flop_model(model, ["language_model"]), flop_model(model, ["connector"])
    assert full.step(**sizes).language_model / through.step(**sizes).language_model == pytest.approx(1.5, rel=0.02)
    learned = flop_model(model, ["language_model", "encoders.semantic"]).step(**sizes)
    frozen = full.step(**sizes)
    assert learned.total - learned.language_model > frozen.total - frozen.language_model
    through.cached = True
    assert through.step(**sizes).total - through.step(**sizes).language_model == 2 * through.connector * 1.5


def test_rates_are_over_all_time_and_shares_of_the_peak():
    meter = Meter(FlopModel(matmul=1e6, adapters=0, head=0, attention=0), None, torch.device("cpu"))
    counts = {"tokens": 100.0, "slots": 200.0, "supervised": 50.0, "samples": 4.0, "images": 2.0}
    meter.add(counts, (3e9, 6e9), waited=0.0)
    report = meter.report()
    assert report["fill"] == 0.5 and report["tokens_per_second"] == pytest.approx(2 * report["supervised_per_second"])
    assert "mfu" not in report and report["tflops"]["total"] > 0, "a share only where the peak is known"
    assert peak_flops(torch.device("cpu"), torch.float32) is None
    meter.peak = 1e12
    meter.add(counts, (3e9, 6e9), waited=0.0)
    share = meter.report()["mfu"]
    assert share["total"] == pytest.approx(2 * share["language_model"]) and share["total"] > 0


def test_run_json_holds_commit_packages_starts_and_data_hashes(tmp_path):
    recipe = make_recipe(tmp_path)
    info = RunInfo(tmp_path, recipe, processes=2, resume=False)
    info.stage("sft", steps=3)
    RunInfo(tmp_path, recipe, processes=1, resume=True)
    data = json.loads((tmp_path / "run.json").read_text())
    assert [start["resumed"] for start in data["starts"]] == [False, True] and data["stages"]["sft"]["steps"] == 3
    assert data["packages"]["transformers"] and data["recipe"]["name"] == "tiny"
    repository = tmp_path / "repository"
    repository.mkdir()
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", "-C", str(repository), *command], check=True)
    clean = git_state(repository)
    (repository / "new").write_text("x")
    dirty = git_state(repository)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False and dirty["dirty"] is True and dirty["diff_sha256"]
    assert git_state(tmp_path / "nowhere") == {}
    (repository / "code").write_text("first\n")
    for command in (["add", "code"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "y"]):
        subprocess.run(["git", "-C", str(repository), *command], check=True)
    (repository / "code").write_text("second\n")
    kept = git_state(repository, keep=tmp_path)["diff"]
    assert "-first\n+second" in (tmp_path / kept).read_text()


def test_hub_revisions_are_the_commits_in_this_machines_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    reference = tmp_path / "models--org--llm" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_text("a" * 40)
    weights = {"source": "org/eye", "revision": "b" * 40}
    model = {"language_model": {"source": "org/llm"}, "encoders": {"vision": {"weights": weights}, "other": "absent/x"}}
    assert hub_revisions(model) == {"org/llm@main": "a" * 40, f"org/eye@{'b' * 40}": "b" * 40}


def test_a_comparison_of_two_runs_names_step_value_and_both_numbers():
    same = [_record("a", 1), _record("a", 2)]
    assert compare(same, same).equal and compare(same, same).compared == 2
    other = [_record("a", 1), _record("a", 2, loss=1.0000000000000002), _record("a", 3)]
    report = compare(same, other)
    assert not report.equal
    assert report.differences == [
        "a step 2: loss is 1.0 in the whole run and 1.0000000000000002 in the killed one",
        "a step 3: only in the killed run",
    ]


def test_wandb_gets_every_record_without_a_network(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_PROJECT", "charts")
    recipe = make_recipe(tmp_path).model_copy(update={"track": ["wandb"]})
    (tmp_path / "run").mkdir()
    tracker = Tracker(tmp_path / "run", recipe)
    tracker.start_stage("a", 0)
    for step in (1, 2):
        tracker.log(_record("a", step, 0.5 * step))
    assert wandb.run.step >= 2 and wandb.run.name == "tiny" and wandb.run.config["seed"] == 3
    assert wandb.run.project == "charts"
    tracker.close()
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")) and wandb.run is None


def test_one_step_number_grows_over_all_stages_and_a_resumed_run_goes_on_under_the_same_id(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    recipe = make_recipe(tmp_path, stages=[{"name": "a", "steps": 3}, {"name": "b", "steps": 4}])
    recipe = recipe.model_copy(update={"track": ["wandb"]})
    folder = tmp_path / "run"
    folder.mkdir()

    def start(*, resume: bool) -> tuple[RunInfo, Tracker, list[int]]:
        info = RunInfo(folder, recipe, processes=1, resume=resume)
        tracker = Tracker(folder, recipe, info)
        sent: list[int] = []
        log = tracker._services[0].log
        tracker._services[0].log = lambda values, step: (sent.append(step), log(values, step=step))
        return info, tracker, sent

    info, tracker, sent = start(resume=False)
    for stage, steps in (("a", (1, 2, 3)), ("b", (1, 2, 3))):  # killed in b at 3, its last checkpoint was at 2
        info.stage(stage, total_steps={"a": 3, "b": 4}[stage])
        tracker.start_stage(stage, 0)
        for step in steps:
            tracker.log(_record(stage, step, 1.0))
    assert sent == [1, 2, 3, 4, 5, 6]
    first = info.data["trackers"]["wandb"]
    tracker.close()

    info, tracker, sent = start(resume=True)
    tracker.start_stage("b", 2)
    for step in (3, 4):
        tracker.log(_record("b", step, 7.0))
    assert sent == [6, 7] and info.data["trackers"]["wandb"] == first
    tracker.close()
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("b/loss")] == [(4, 1.0), (5, 1.0), (6, 7.0), (7, 7.0)]
    assert [e.step for e in board.Scalars("a/loss")] == [1, 2, 3]


def test_a_leap_of_loss_or_gradient_names_the_samples_and_ordinary_noise_does_not(tmp_path, caplog):
    detector = SpikeDetector(tmp_path / "spikes" / "sft-0.jsonl")
    batch = SimpleNamespace(datasets=["a", "b"], ids=["1", "2"])
    torch.manual_seed(0)
    for step in range(200):
        noise = torch.randn(2).tolist()
        detector("sft", step, {"loss": 2 + 0.3 * noise[0], "grad_norm": 1.5 * 1.6 ** noise[1]}, [batch])
    assert not detector.spikes and not caplog.records and not detector.path.exists()
    with caplog.at_level(logging.WARNING):
        detector("sft", 200, {"loss": 9.0, "grad_norm": 1.5}, [batch])
    assert "sft step 200: loss leapt to 9" in caplog.text and "a/1, b/2" in caplog.text
    (line,) = detector.path.read_text().splitlines()
    assert json.loads(line) | {"median": 0} == {
        "stage": "sft", "step": 200, "what": "loss", "value": 9.0, "median": 0, "samples": ["a/1", "b/2"],
    }  # fmt: skip
    quiet = SpikeDetector(tmp_path / "quiet.jsonl", quiet=30)
    for step in range(1, 31):
        quiet("sft", step, {"loss": 9.0 if step == 25 else 2.0, "grad_norm": 1.0}, [batch])
    assert not quiet.spikes, "while the rate rises nothing is told"
    quiet("sft", 31, {"loss": 9.0, "grad_norm": 1.0}, [batch])
    assert quiet.spikes == 1


@pytest.mark.parametrize("skip_logits", [True, False], ids=["fused", "from logits"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_the_loss_of_each_dataset_is_that_of_its_own_samples(tmp_path, packing, skip_logits):
    model, processor = tiny_model(tmp_path)
    texts = {"a": ["hi", "what is it"], "b": ["no it is not"]}
    samples = [
        encode_sample(processor, Sample(f"{name}{k}", [Turn("user", "say"), Turn("assistant", text)], [], name, {}))
        for name, group in texts.items()
        for k, text in enumerate(group)
    ]
    order = [samples[0], samples[2], samples[1]]
    options = {"pad_token_id": 0}
    batch = collate_packed([order[:2], order[2:]], max_length=64, **options) if packing else collate(order, **options)
    meter, inputs = DatasetLoss(["a", "b"], torch.device("cpu")), attention_inputs(batch, "sdpa")
    for _ in range(2):
        with torch.no_grad(), meter.of(batch) as outputs:
            outputs.append(model(**inputs, skip_logits=skip_logits))
    found = meter.report()["dataset_loss"]
    assert meter.report() == {}
    for name in texts:
        alone = collate([s for s in samples if s.dataset == name], **options)
        with torch.no_grad():
            wanted = model(**attention_inputs(alone, "sdpa"), skip_logits=True).loss.item()
        assert found[name] == pytest.approx(wanted, rel=1e-5)


def test_what_heads_report_is_the_mean_over_all_that_teaches_them_however_it_is_spread_over_micro_batches():
    head = SegmentationHead(*_tiny(SegmentationHead))
    model = nn.Module()
    model.heads = nn.ModuleDict({"marks": head})
    values, tokens = torch.tensor([3.0, 1.0, 2.0, 8.0, 4.0]), [10, 2, 6]  # of five masks
    parts = values.split([1, 3, 1])
    micro = [SimpleNamespace(inputs={"target_masks": part}, num_supervised=n) for part, n in zip(parts, tokens)]
    micro.append(SimpleNamespace(inputs={}, num_supervised=7))
    found = [{"marks/dice": part.mean(), "encoders.eye/kept": torch.tensor(float(n))} for part, n in zip(parts, tokens)]
    told = mean_losses([*found, None], micro, model, everywhere=False)
    assert told["marks/dice"] == pytest.approx(float(values.mean()))  # the mean of their means is 3.56
    assert told["encoders.eye/kept"] == pytest.approx((10 * 10 + 2 * 2 + 6 * 6) / 18)
    nothing = [SimpleNamespace(inputs={}, num_supervised=0)] * 2
    assert mean_losses([{"x": torch.tensor(1.0)}, {"x": torch.tensor(2.0)}], nothing, model, everywhere=False) == {
        "x": 1.5
    }


def _tiny(kind):
    settings, parts = kind.tiny()
    return kind.Config(**settings), parts
