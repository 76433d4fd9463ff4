"""How does a model learn from preferences or rewards? The stage kinds ``dpo`` and ``grpo``, run by TRL's own trainers.

The model and processor are ours, unmodified; what learns, rates, schedule and data come from the stage as for any other. DPO: a
sample's last answer is the chosen one, ``options.rejected`` names the key of the other. GRPO: completions are drawn for the
conversation before the last answer and scored by ``options.rewards``: functions by dotted name (``package.module:name``), TRL's
``f(completions, **columns)``, or scoring rules with ``score(prediction, target, meta)`` such as
``mllm.eval.metrics.relaxed:RelaxedStripped``. They are looked up when the stage starts, so training knows nothing of evaluation.
"""

from __future__ import annotations

import copy
import importlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from mllm import distributed
from mllm.config import StrictModel, validate
from mllm.damage import naming_damage
from mllm.data.collate import Dropped
from mllm.data.dataset import BadShare, DropLog
from mllm.data.mixture import Mixture
from mllm.data.workers import at_first, cores_per_process
from mllm.errors import AlignmentError, ConfigError, DataError, UnavailableError, blamed_on, did_you_mean
from mllm.install import package_hint
from mllm.processing.images import load_image
from mllm.processing.protocol import Processor
from mllm.processing.template import parts_of
from mllm.recipe import StageSpec
from mllm.stopping import Asked, asked_to_stop, started_by_launcher
from mllm.train.added_rows import rows_line
from mllm.train.checkpoint.export import save_stage
from mllm.train.checkpoint.files import MANIFEST, describe, step_of, write_text
from mllm.train.checkpoint.resume import newest_whole
from mllm.train.data import open_mixture, tell_dropped, tell_left_out, tell_odd_settings
from mllm.train.engine.groups import apply_learning, frozen_summary, groups_table, set_modes
from mllm.train.engine.optim import build_optimizer
from mllm.train.engine.schedule import rate_factor
from mllm.train.observe.progress import StageDisplay
from mllm.train.prepare import DTYPES, give_dtype, give_frozen_dtype
from mllm.train.stages.kind import StageKind
from mllm.train.stages.preference.one_pixel_tensor import OnePixelTensor, read_video
from mllm.train.start import start_model
from mllm.train.trainer import Run, seed_everything
from mllm.types import IMAGE_MARK, Sample, Video

if TYPE_CHECKING:
    from mllm.models.modeling_mllm import MllmForConditionalGeneration

_ATTEMPTS = 100
_FORMERLY = "complete"  # what ended a checkpoint where there is now a manifest
_STATE = "trainer_state.json"
_OF_A_PROCESS = ("rng_state*", "training_args.bin")
"""Files of a checkpoint that are gone on without: each process has its own, and draws afresh where it has none."""
_OURS = {
    "output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs", "seed",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "weight_decay", "max_grad_norm", "bf16", "fp16",
    "logging_steps", "save_steps", "save_strategy", "report_to", "disable_tqdm", "use_cpu", "remove_unused_columns", "optim",
    "gradient_checkpointing", "dataloader_num_workers", "beta", "num_generations", "max_completion_length", "max_length",
    "save_on_each_node",
}  # fmt: skip


class PreferenceOptions(StrictModel):
    """``options`` of a dpo or grpo stage."""

    beta: float | None = Field(default=None, ge=0)
    """How strongly the model is held to where it started; default: TRL's (DPO 0.1, GRPO 0)."""
    rejected: str = "rejected"
    """DPO: where a row keeps the answer to be avoided."""
    rewards: list[str] = Field(default_factory=list)
    """GRPO: reward functions or scoring rules, ``package.module:name``; their sum is the reward."""
    num_generations: int = Field(default=8, ge=2)
    """GRPO: completions compared with each other, for one prompt."""
    max_completion_length: int = Field(default=256, ge=1)
    trl: dict[str, Any] = Field(default_factory=dict)
    """Further settings of TRL's DPOConfig or GRPOConfig, by its names."""


def check_preference(stage: StageSpec) -> PreferenceOptions:
    """The stage's options. Raises `ConfigError` for what a preference stage cannot have."""
    where = f"stages.{stage.name}"
    options = validate(PreferenceOptions, stage.options, where=f"{where}.options")
    for key in (
        "packing",
        "group_by_length",
        "max_tokens_per_batch",
        "cache_features",
        "compile",
        "chat_template",
        "attention",
        "save_in_background",
        "float8",
        "draw",
    ):
        if getattr(stage, key):
            raise ConfigError(f"{where}.{key}: TRL trains this stage and has no {key}; leave it out")
    if stage.engine != "none":
        raise ConfigError(
            f"{where}.engine: TRL runs DeepSpeed itself; leave engine out and give options.trl.deepspeed: file.json"
        )
    if stage.kind == "grpo" and not options.rewards:
        raise ConfigError(
            f"{where}.options.rewards: a grpo stage needs a reward, e.g. [mllm.eval.metrics.relaxed:RelaxedStripped]"
        )
    if stage.kind == "dpo" and options.rewards:
        raise ConfigError(f"{where}.options.rewards: a dpo stage learns from pairs and has no rewards; use kind: grpo")
    if stage.optimizer.ema is not None:
        raise ConfigError(f"{where}.optimizer.ema: TRL's trainers keep no average; leave it out")
    if stage.optimizer.compact:
        raise ConfigError(
            f"{where}.optimizer: TRL's trainers keep float32 moments and no copies; leave master and moments out"
        )
    for name in options.rewards:
        load_reward(name, where=f"{where}.options.rewards")
    for name in options.trl:
        if name in _OURS:
            raise ConfigError(f"{where}.options.trl.{name}: is set from the stage's own keys; take it out")
    return options


def load_reward(name: str, *, where: str) -> Callable[..., list[float | None]]:
    """A reward in TRL's form from ``package.module:name``. Raises `ConfigError` when there is none."""
    module, separator, attribute = name.partition(":")
    if not separator:
        raise ConfigError(f"{where}: {name!r} should read package.module:name")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ConfigError(f"{where}: {module} does not import: {error}") from error
    except AttributeError:
        known = [n for n in dir(importlib.import_module(module)) if not n.startswith("_")]
        raise ConfigError(f"{where}: {module} has no {attribute!r}{did_you_mean(attribute, known)}") from None
    if not hasattr(found, "score"):
        return found
    rule = found() if isinstance(found, type) else found

    def reward(completions: list[Any], target: list[Any], meta: list[dict[str, Any]], **_: Any) -> list[float | None]:
        """What the rule gives each completion; an answer that cannot be read gives 0."""
        scores = [rule.score(text_of(c), t, m) for c, t, m in zip(completions, target, meta)]
        return [0.0 if s.value is None else float(s.value) for s in scores]

    reward.__name__ = attribute
    return reward


def text_of(completion: Any) -> str:
    """A completion's text: TRL hands out messages for conversational prompts."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def train_preference(run: Run, stage: StageSpec, previous: Path | None, folder: Path) -> bool:
    """Train with TRL; the same contract as `StageKind.train`. Its own checkpoints are in the run's folder and are
    gone on from (bit for bit on one CPU, as tested; not on GPUs)."""
    options = check_preference(stage)
    trl = import_trl(f"stages.{stage.name}.kind")
    # On the CPU: its fp32 copy, and the reference's, would stand on the GPU beside what TRL keeps there.
    whole = stage.model_copy(update={"dtype": "float32"})
    model, processor = start_model(run.recipe, whole, previous, device=torch.device("cpu"))
    display = StageDisplay(stage.name, active=distributed.is_main())
    drops = DropLog(run.output / "dropped" / f"{stage.name}-{distributed.rank()}.jsonl")
    mixture = open_mixture(stage, run.recipe.seed)
    tell_left_out(mixture, display, run.info, stage)
    rows = make_rows(mixture, stage, options, drops, processor)
    reference = _reference(run, stage, options, model, processor)
    seed_everything(run.recipe.seed, f"{stage.name}/adapters", same=True)
    groups = apply_learning(model, stage)
    set_modes(model)
    if stage.dtype == "bfloat16":  # learned weights stay fp32, the rest is computed and kept in bf16
        give_frozen_dtype(model, torch.bfloat16)
    display.print(groups_table(stage, groups, frozen_summary(model)))
    if (line := rows_line(model, stage)) is not None:
        display.print(line)
    per_row = options.num_generations if stage.kind == "grpo" else 1
    per_step = stage.batch_size * stage.gradient_accumulation * distributed.world_size()
    steps = stage.steps or max(1, math.ceil(float(stage.epochs or 1) * len(rows) * per_row / per_step))
    tell_odd_settings(stage, steps, len(rows), display)
    optimizer = build_optimizer(model, groups, stage.optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(stage.schedule, step, steps))
    checkpoints = run.checkpoints(stage)
    arguments = _arguments(trl, run, stage, options, steps, checkpoints)
    seed_everything(run.recipe.seed, stage.name)
    last = _last(checkpoints) if run.resume else None
    log = _Log(run, stage, display)
    common = {"args": arguments, "train_dataset": rows, "optimizers": (optimizer, schedule), "callbacks": [log]}
    with OnePixelTensor(model, processor) as joined:
        try:
            joined.understood_by(reference)
            if stage.kind == "dpo":
                trainer = trl.DPOTrainer(model, ref_model=reference, processing_class=joined.processor, **common)
            else:
                rewards = [load_reward(name, where=f"stages.{stage.name}.options.rewards") for name in options.rewards]
                trainer = trl.GRPOTrainer(model, reward_funcs=rewards, processing_class=joined.processor, **common)
                joined.understood_by(trainer.ref_model)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"stages.{stage.name}: TRL refuses these settings: {error}") from error
        trainer.remove_callback(_transformers().PrinterCallback)
        begun = step_of(Path(last)) if last else 0
        if run.tracker is not None:
            run.tracker.start_stage(stage.name, begun)
        if run.info is not None:
            run.info.stage(stage.name, total_steps=steps)
        display.start(steps, begun)
        launched = started_by_launcher()
        try:
            with (
                naming_damage(last),
                asked_to_stop(distributed.is_main() and not launched, patient=launched) as log.asked,
            ):
                trainer.train(resume_from_checkpoint=last)
        finally:
            display.close()
    done = int(trainer.state.global_step)
    if done < steps:
        return False
    model.__dict__.pop("forward", None)  # TRL's
    model.requires_grad_(True).to("cpu")
    give_dtype(model, DTYPES[stage.dtype])
    model.config.dtype = next(model.parameters()).dtype
    tell_dropped(run, stage, display)
    if run.info is not None:
        run.info.stage(stage.name, steps=done)
    engine: Any = SimpleNamespace(model=model, shares_weights=False, close=lambda: None)
    save_stage(engine, processor, run.recipe, stage, folder, run.record())
    return True


def import_trl(where: str) -> Any:
    """TRL. Raises `UnavailableError` when it is not installed."""
    try:
        import trl
    except ImportError:
        raise UnavailableError(
            f"{where}: preference and reward stages are run by TRL: {package_hint('trl>=1.16')}"
        ) from None
    return trl


def make_rows(
    mixture: Mixture, stage: StageSpec, options: PreferenceOptions, drops: DropLog, processor: Processor
) -> Any:
    """The stage's samples as a `datasets` table that reads each row, pictures included, when it is asked for, once for all answers to
    it. A row that cannot be used is replaced by its dataset's next good one and logged."""
    import datasets

    draws = mixture.locate(range(len(mixture)))
    share, tried = BadShare(stage.max_bad_share), Counter[str]()

    def read(index: int) -> dict[str, Any]:
        draw = draws[index]
        for attempt in range(_ATTEMPTS):
            now = mixture.substitute(draw, attempt) if attempt else draw
            source = mixture.sources[now.dataset]
            try:
                sample = source[now.row]
                with blamed_on(source.where(now.row, sample.id)):
                    row = as_row(sample, stage.kind, options, processor)
                tried[source.name] += 1
                return row
            except (DataError, AlignmentError) as error:
                bad = [Dropped(source.name, now.row, str(now.row), str(error), "cannot be read")]
                drops(bad)
                tried[source.name] += 1
                share.check(source.name, bad, tried[source.name], number=drops.counts[source.name])
                reason = str(error)
        raise DataError(f"{source.name}: {_ATTEMPTS} samples one after another cannot be used. The last: {reason}")

    def transform(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        found = {index: read(index) for index in dict.fromkeys(batch["row"])}
        rows = [found[index] for index in batch["row"]]
        return {key: [row[key] for row in rows] for key in rows[0]}

    return datasets.Dataset.from_dict({"row": list(range(len(draws)))}).with_transform(transform)


def as_row(sample: Sample, kind: str, options: PreferenceOptions, processor: Processor) -> dict[str, Any]:
    """A sample as TRL reads it: ``prompt`` and ``images`` (videos among them, read), and ``chosen`` and ``rejected``, or ``target`` and
    ``meta``."""
    where = f"sample {sample.id!r} of {sample.dataset}"
    if not sample.turns or sample.turns[-1].role != "assistant" or len(sample.turns) < 2:
        raise DataError(f"{where}: does not end with an answer to a question")
    request, answer = sample.turns[:-1], sample.turns[-1].content
    if any(IMAGE_MARK in turn.content for turn in request if turn.role != "user") or IMAGE_MARK in answer:
        raise DataError(f"{where}: an image stands outside the user's turns")
    limit = processor.image_processor.max_pixels
    images = [
        read_video(i, processor, f"{where}, image {k}")
        if isinstance(i, Video)
        else load_image(i, where=where, max_pixels=limit)
        for k, i in enumerate(sample.images)
    ]
    # Every content as parts: TRL puts images before the first user turn that is a plain text, wherever they belong.
    prompt = [{"role": turn.role, "content": parts_of(turn.content, IMAGE_MARK)} for turn in request]
    row: dict[str, Any] = {"prompt": prompt, "images": images}
    if kind == "grpo":
        return {**row, "target": sample.meta.get("answers") or answer, "meta": dict(sample.meta)}
    other = sample.meta.get(options.rejected)
    if not isinstance(other, str) or not other.strip():
        found = (
            "nothing" if other is None else "an empty text" if isinstance(other, str) else f"a {type(other).__name__}"
        )
        raise DataError(
            f"{where}: no rejected answer under {options.rejected!r}, but {found}; expected a text. Beside the answer the row has "
            f"{sorted(sample.meta) or 'nothing'}; of a table that is read by columns, name it: columns: {{meta: [{options.rejected}]}}"
        )
    return {
        **row,
        "chosen": [{"role": "assistant", "content": answer}],
        "rejected": [{"role": "assistant", "content": other}],
    }


def _reference(
    run: Run, stage: StageSpec, options: PreferenceOptions, model: MllmForConditionalGeneration, processor: Processor
) -> Any:
    """Where the model starts. DPO: a copy; GRPO with a beta: written to disk, from where TRL reads it."""
    if stage.kind == "dpo":
        return copy.deepcopy(model).eval().requires_grad_(False)
    if options.beta:
        place = run.output / "references" / stage.name
        if distributed.keeps_folder():
            shutil.rmtree(place, ignore_errors=True)
            model.save_pretrained(place)
            processor.save_pretrained(place)
        distributed.barrier()
        model.config._name_or_path = str(place)
    return None


def _arguments(trl: Any, run: Run, stage: StageSpec, options: PreferenceOptions, steps: int, checkpoints: Path) -> Any:
    config = trl.DPOConfig if stage.kind == "dpo" else trl.GRPOConfig
    known = {field.name for field in fields(config)}
    for name in options.trl:
        if name not in known:
            raise ConfigError(
                f"stages.{stage.name}.options.trl.{name}: {config.__name__} has no such setting{did_you_mean(name, known)}"
            )
    own: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "per_device_train_batch_size": stage.batch_size,
        "gradient_accumulation_steps": stage.gradient_accumulation,
        "max_steps": steps,
        "max_grad_norm": stage.optimizer.max_grad_norm or 0.0,
        "seed": run.recipe.seed,
        "bf16": stage.dtype == "bfloat16",
        "fp16": False,
        "gradient_checkpointing": stage.gradient_checkpointing,
        "dataloader_num_workers": at_first(cores_per_process()) if stage.num_workers == "auto" else stage.num_workers,
        "logging_steps": stage.log_every,
        "save_strategy": "steps" if stage.save_every else "no",
        "save_steps": stage.save_every or 500,
        "save_total_limit": 2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "remove_unused_columns": False,
        "save_on_each_node": distributed.own_folder_of() != "",
    }
    if options.beta is not None:
        own["beta"] = options.beta
    if stage.kind == "dpo":
        own["max_length"] = stage.max_length
    else:
        own |= {"num_generations": options.num_generations, "max_completion_length": options.max_completion_length}
    try:
        return config(**{**own, **options.trl})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"stages.{stage.name}: TRL refuses these settings: {error}") from error


def _last(folder: Path) -> str | None:
    """The newest of TRL's checkpoints that was written to its end, and is as it was written; transformers would pick up one that a kill
    left half written."""
    former = [path.parent for path in folder.glob(f"checkpoint-*/{_FORMERLY}")] if distributed.is_main() else []
    whole = [path for path in (newest_whole(folder)[0], *distributed.gather_objects(former)[0]) if path is not None]
    return str(max(whole, key=step_of)) if whole else None


def _close(folder: Path) -> None:
    """The manifest of a checkpoint that all processes have written: by it the machines of a run complete each other's."""
    machine, own = distributed.own_folder_of(), dict[str, Any]()
    state = distributed.gather_objects((folder / _STATE).read_text() if distributed.is_main() else "")[0]
    if distributed.keeps_folder():
        (folder / _STATE).write_text(state)  # with the times of one machine, so that there is one
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not any(path.match(form) for form in _OF_A_PROCESS):
                own[path.relative_to(folder).as_posix()] = describe(path) | ({"machine": machine} if machine else {})
    files = {name: entry for part in reversed(distributed.gather_objects(own)) for name, entry in part.items()}
    if distributed.keeps_folder():
        write_text(folder / MANIFEST, json.dumps({"files": files}, indent=1))


def _transformers() -> Any:
    import transformers

    return transformers


class _Log(_transformers().TrainerCallback):
    """TRL's log lines as records of the run; marks complete checkpoints; honours ``stop_after`` and signals."""

    def __init__(self, run: Run, stage: StageSpec, display: StageDisplay):
        self.run, self.stage, self.display, self.asked = run, stage, display, Asked()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, optimizer: Any = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        numbers = {key: value for key, value in logs.items() if isinstance(value, (int, float))}
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups} if optimizer is not None else {}
        record = {"stage": self.stage.name, "step": state.global_step, **numbers, "lr": rates}
        record.setdefault("grad_norm", 0.0)
        self.display.update(state.global_step, record)
        if self.run.tracker is not None:
            self.run.tracker.log(record)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        _close(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if distributed.sum_numbers([float(bool(self.asked.by))])[0]:
            self.run.interrupted = control.should_save = control.should_training_stop = True
        if self.run.stop_after is not None:
            self.run.stop_after -= 1
            if self.run.stop_after <= 0 and state.global_step < state.max_steps:
                control.should_save = control.should_training_stop = True


class PreferenceStage(StageKind):
    """A model learns from preferences or rewards, by TRL."""

    @classmethod
    def check_options(cls, stage: StageSpec) -> None:
        check_preference(stage)

    @classmethod
    def train(cls, run: Run, stage: StageSpec, previous: Path | None, folder: Path) -> bool:
        return train_preference(run, stage, previous, folder)
