"""How is one stage trained, from its first batch (or the last checkpoint) to its last?"""

from __future__ import annotations

import math
import random
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from mllm import distributed
from mllm.data.mixture import Mixture
from mllm.errors import ConfigError
from mllm.heads.base import TARGET, count_targets
from mllm.heads.running_norm import share_statistics
from mllm.models.encoder_losses import encoder_costs
from mllm.processing.protocol import Processor, TextProcessor
from mllm.processing.template import for_training
from mllm.progress import phase
from mllm.recipe import Recipe, StageSpec
from mllm.stopping import asked_to_stop, started_by_launcher
from mllm.train.added_rows import rows_line
from mllm.train.beside import Beside
from mllm.train.checkpoint.mirror import mirror_of
from mllm.train.checkpoint.own_folders import OwnFolders
from mllm.train.checkpoint.resume import CheckpointReader, Progress, fingerprint, latest_checkpoint, signature
from mllm.train.checkpoint.write import CheckpointWriter
from mllm.train.data import StageData, open_mixture, tell_dropped, tell_faded, tell_left_out, tell_odd_settings
from mllm.train.engine.base import Engine, choose_engine
from mllm.train.engine.build import build_engine
from mllm.train.engine.groups import (
    Group,
    apply_learning,
    frozen_summary,
    groups_table,
    set_modes,
)
from mllm.train.engine.level import level
from mllm.train.engine.schedule import rate_factor, warmup_steps
from mllm.train.engine.trainable import StageModel
from mllm.train.features.stage import use_cache
from mllm.train.flash import kernel_of
from mllm.train.float8 import use_float8
from mllm.train.observe.dataset_loss import DatasetLoss
from mllm.train.observe.drawings import Drawings
from mllm.train.observe.fading import FadingParts
from mllm.train.observe.flops import FlopModel, flop_model, peak_flops
from mllm.train.observe.idle import AFTER, idle_parts, tell_idle
from mllm.train.observe.meter import Meter, count_batches, mean_losses
from mllm.train.observe.profiling import mark, profiler_of
from mllm.train.observe.progress import StageDisplay
from mllm.train.observe.run_info import RunInfo
from mllm.train.observe.spikes import SpikeDetector, diverged
from mllm.train.observe.tracking import Tracker
from mllm.train.preflight.first_row import what_is_learned
from mllm.train.prepare import DTYPES, attention_inputs, prepare_model
from mllm.train.stages.routing.monitor import watch_routing

if TYPE_CHECKING:
    from mllm.models.modeling_mllm import MllmForConditionalGeneration
    from mllm.train.engine.trainable import TrainableModel


SAVE_SECONDS = 20 * 60


@dataclass
class Run:
    """What all stages of one run share. tracker and info exist on the main process only."""

    recipe: Recipe
    output: Path
    resume: bool
    tracker: Tracker | None
    info: RunInfo | None
    stop_after: int | None = None
    """Optimizer steps this start of the run may still do; None: no limit."""
    profile: int | None = None
    """Steps of every stage to record with the profiler; None: of a long enough one two, told in a line."""
    extend: bool = False
    """The last stage may be longer than when it was started, or finished."""
    interrupted: bool = False
    """A signal asked for a stop; what is done is saved."""
    own_folders: OwnFolders | None = None
    """Where every machine has an output folder of its own."""

    def record(self) -> dict[str, Any]:
        """``run.json`` as it stands, for a stage's folder; empty on other processes."""
        return dict(self.info.data) if self.info is not None else {}

    def give_file(self, path: Path, *, writer: int | None = None) -> None:
        """Let all machines see a file of the output folder that one wrote (`OwnFolders.give_file`); all processes must call it."""
        if self.own_folders is not None:
            self.own_folders.give_file(path, writer=writer)

    def checkpoints(self, stage: StageSpec) -> Path:
        return self.output / "checkpoints" / stage.name


@dataclass
class Step:
    """One optimizer step's result, over all processes."""

    loss: float
    grad_norm: float
    counts: dict[str, float]
    save: bool
    written: bool = False
    """All processes have written their shares of the checkpoint that is being written."""
    stop: bool = False
    """Some process was told to stop."""
    losses: dict[str, float] = field(default_factory=dict)
    """What the model reports of its heads and encoders, by name: the mean over micro-batches that have it."""


@dataclass
class Session:
    """One stage, ready for its next step."""

    engine: Engine
    data: StageData
    progress: Progress
    attention: str
    flops: FlopModel | None
    checkpoint: CheckpointReader | None
    display: StageDisplay
    datasets: DatasetLoss | None = None
    """Of a mixture of several datasets."""


def train(
    run: Run,
    stage: StageSpec,
    model: TrainableModel,
    processor: TextProcessor,
    *,
    mixture: Mixture | None = None,
    beside: Beside | None = None,
) -> Engine | None:
    """Train one stage; returns its engine when the stage is done, None when ``run.stop_after`` ended it before.

    mixture: what it learns from; default: the stage's ``data``. beside: what is done besides the model's updates.

    Raises `TrainingDiverged`, `CheckpointError`, `ConfigError`, `DataError`; checkpoints written before stay as they
    are.
    """
    with ExitStack() as stack:
        beside = beside or Beside()
        session = open_session(run, stage, model, processor, stack, mixture=mixture)
        engine, progress, display = session.engine, session.progress, session.display
        steps = session.data.steps()
        whole = (
            cast("MllmForConditionalGeneration", model),
            cast("Processor", processor),
        )  # only such a model's stage draws
        routing, draw = watch_routing(model), Drawings(run.output, stage, *whole, run.tracker)
        peak = peak_flops(engine.device, DTYPES[stage.dtype])
        beside.start(engine, step=progress.step, total_steps=progress.total_steps, display=display)
        if session.checkpoint is not None:
            beside.restore(session.checkpoint.beside())
        seed_everything(run.recipe.seed, stage.name)
        if session.checkpoint is not None:  # last: whatever was drawn while starting must not count
            session.checkpoint.restore_random(engine)
        writer = CheckpointWriter(
            run.checkpoints(stage), background=stage.save_in_background, mirror=mirror_of(run.recipe)
        )
        stack.callback(writer.abandon)
        meter, saved = Meter(session.flops, peak, engine.device), time.monotonic()
        name = f"{stage.name}-{distributed.rank()}"
        spikes = SpikeDetector(
            run.output / "spikes" / f"{name}.jsonl", quiet=warmup_steps(stage.schedule, progress.total_steps)
        )
        fading = FadingParts(quiet=warmup_steps(stage.schedule, progress.total_steps))
        launched = started_by_launcher()
        profiler = profiler_of(run, stage, progress, display.print, model)
        stack.callback(profiler.close)
        asked = stack.enter_context(asked_to_stop(distributed.is_main() and not launched, patient=launched))
        first = True
        while progress.step < progress.total_steps:
            profiler()
            waited = time.perf_counter()
            with phase("loading the first batch", when=first), mark("mllm.data"):
                micro = next(steps)
            waited = time.perf_counter() - waited
            engine.set_rate_factor(rate_factor(stage.schedule, progress.step, progress.total_steps))
            rates = engine.rates()
            wish = time.monotonic() - saved > SAVE_SECONDS
            with phase("first step" + (", compiling" if stage.compiles_here else ""), when=first):
                step = optimizer_step(
                    engine,
                    micro,
                    session.attention,
                    session.flops,
                    session.data,
                    save=wish,
                    written=writer.done(),
                    stop=bool(asked.by),
                    datasets=session.datasets,
                )
            profiler.stepped()
            if step.written:
                writer.finish()
            first = False
            progress.step += 1
            last = progress.step == progress.total_steps
            if last or progress.step == AFTER:
                tell_idle(stage, idle_parts(engine), progress.step, display)
            beside.step(progress.step, last=last)
            spikes(stage.name, progress.step, {"loss": step.loss, "grad_norm": step.grad_norm}, micro)
            for line in fading(progress.step, engine.norms, step.grad_norm):
                tell_faded(run, stage, fading.faded, line, display)
            progress.samples += int(step.counts["samples"])
            meter.add(step.counts, (step.counts["model_flops"], step.counts["total_flops"]), waited)
            record = None
            if progress.step % stage.log_every == 0 or last:
                record = _record(stage, progress, step, rates, engine, meter, micro)
                record |= session.datasets.report() if session.datasets is not None else {}
                record |= routing.report() if routing is not None else {}
                record |= beside.report()
                if run.tracker is not None:
                    run.tracker.log(record)
            display.update(progress.step, record)
            draw(progress.step, last=last)
            stop = _count_down(run) or step.stop
            run.interrupted = step.stop
            due = step.save or stop or bool(stage.save_every and progress.step % stage.save_every == 0)
            if stage.keep_state if last else due:
                progress.extra = {"data": session.data.shared_state()}
                writer.save(engine, progress, beside=beside.state())
                _record_place(run, stage, session)
                saved = time.monotonic()
            if stop or last:
                writer.finish()
            if stop and not last:
                engine.close()
                return None
    engine.finish()
    ran = routing.ran if routing is not None else {}
    if ran:
        shown = ", ".join(f"{name} {count:,}" for name, count in sorted(ran.items(), key=lambda item: -item[1]))
        display.print(f"{stage.name}: images by the experts that ran on them: {shown}")
    tell_dropped(run, stage, display)
    if run.info is not None:
        if ran:
            run.info.stage(stage.name, experts_ran=ran)
        _record_place(run, stage, session)
    return engine


def open_session(
    run: Run,
    stage: StageSpec,
    model: TrainableModel,
    processor: TextProcessor,
    stack: ExitStack,
    *,
    mixture: Mixture | None = None,
) -> Session:
    """Everything before the first step: what learns, precision, data, the last checkpoint, the engine. stack: closes what
    must be closed when the stage ends."""
    device, choice = distributed.local_device(), choose_engine(stage)
    mixture = mixture or open_mixture(stage, run.recipe.seed)
    if stage.chat_template is not None:
        processor = for_training(cast("Processor", processor), stage.chat_template)
    seed_everything(run.recipe.seed, f"{stage.name}/adapters", same=True)
    groups = apply_learning(model, stage, zero_stage=choice.zero_stage)
    set_modes(model)
    attention = prepare_model(model, stage, device=device, zero_stage=choice.zero_stage)
    if stage.float8 is not None:
        stack.callback(use_float8(model, stage, device, zero_stage=choice.zero_stage))
    with phase("planning batches") as planning:
        data = StageData(
            stage, processor, mixture, cache=run.output / "lengths", log=_drop_log(run, stage), phase=planning
        )
    progress = Progress(
        stage=stage.name,
        total_steps=data.total_steps,
        world_size=distributed.world_size(),
        engine=choice.name,
        dtype=stage.dtype,
        seed=run.recipe.seed,
        frozen=fingerprint(model),
        signature=signature(run.recipe, stage, mixture.fingerprints),
    )
    flops = _flop_model(model, groups)
    display = StageDisplay(stage.name, active=distributed.is_main())
    data.tell = display.print
    display.print(groups_table(stage, groups, frozen_summary(model)))
    if (line := rows_line(model, stage)) is not None:
        display.print(line)
    tell_odd_settings(stage, data.total_steps, len(mixture), display)
    tell_left_out(mixture, display, run.info, stage)
    generation = getattr(model, "generation_config", None)  # an encoder that is tuned by itself says nothing
    if distributed.is_main() and generation is not None:
        for line in what_is_learned(cast("Processor", processor), data, generation.eos_token_id):
            display.print(line)
    whole = cast("MllmForConditionalGeneration", model), cast("Processor", processor)
    if use_cache(stage, data, *whole, {group.part for group in groups}, display, stack) and flops is not None:
        flops.cached = True
    checkpoint = latest_checkpoint(run.checkpoints(stage)) if run.resume else None
    if checkpoint is not None:
        checkpoint.check(model, progress, longer=run.extend)
        checkpoint.restore_weights(model)
    with phase(f"starting engine {choice.name}"):
        engine = build_engine(model, groups, stage, device)
    stack.push(lambda failed, *_: engine.close() if failed else None)
    if checkpoint is not None:
        checkpoint.restore_engine(engine)
        _go_on(checkpoint, data, progress, display, longer=run.extend)
    _record_start(run, stage, groups, mixture, attention, progress)
    display.start(progress.total_steps, progress.step)
    stack.callback(display.close)
    names = [source.name for source in mixture.sources]
    datasets = DatasetLoss(names, device) if len(names) > 1 else None
    return Session(engine, data, progress, attention, flops, checkpoint, display, datasets)


def optimizer_step(
    engine: Engine,
    micro: list[Any],
    attention: str,
    flops: FlopModel | None,
    data: StageData,
    *,
    save: bool = False,
    written: bool = False,
    stop: bool = False,
    datasets: DatasetLoss | None = None,
) -> Step:
    """Forward and backward of all micro-batches, then the update. The loss is the mean over all supervised tokens of
    the step, on all processes, however they are spread.

    data: counts the rows that cannot be used. save: this process asks for a checkpoint; the main process's wish is what
    counts. written: this process has written its share of the last one. stop: this process was told to. datasets: told each
    token's loss. Raises `TrainingDiverged` before anything is updated when the loss is not finite, `DataError` when too many rows
    of all processes cannot be used.
    """
    own = count_batches(micro, flops) | data.bad_rows(micro)
    targets = count_targets(engine.model, [batch.inputs for batch in micro])
    own |= {TARGET + head: number for head, number in targets.items()}
    own["save"] = float(save and distributed.is_main())
    own["written"] = float(written)
    own["stop"] = float(stop)
    counts = dict(zip(own, distributed.sum_numbers(list(own.values()))))
    data.bad_share.add(counts)
    losses, of_heads = [], []
    of_step = {"num_targets": {head: counts[TARGET + head] for head in targets}} if targets else {}
    passes = level(engine, micro)
    for index, batch in enumerate(passes):
        counts_nothing = index >= len(micro)
        batch = batch.to(engine.device, non_blocking=True)
        inputs = attention_inputs(batch, attention)
        with datasets.of(batch) if datasets is not None and not counts_nothing else nullcontext([]) as outputs:
            output = engine(
                **inputs, **of_step, num_items_in_batch=counts["supervised"], skip_logits=engine.zero_stage != 3
            )
            outputs.append(output)
        engine.backward(output.loss * 0.0 if counts_nothing else output.loss, last=index == len(passes) - 1)
        if counts_nothing:
            continue
        losses.append(output.loss.detach())
        of_heads.append(getattr(output, "losses", None))
    # From here to the update a GPU has nothing to do: nothing slow may stand between.
    loss = distributed.sum_numbers([float(torch.stack(losses).float().sum())])[0]
    if not math.isfinite(loss):
        raise diverged("loss", loss, micro)
    with mark("mllm.update"):
        norm = engine.step()
    share_statistics(engine.model)
    if not math.isfinite(norm):
        raise diverged("gradient norm", norm, micro)
    everywhere = counts["written"] == distributed.world_size()
    return Step(
        loss,
        norm,
        counts,
        save=counts["save"] > 0,
        written=everywhere,
        stop=counts["stop"] > 0,
        losses=mean_losses(of_heads, micro, engine.model, everywhere=bool(targets)),
    )


def seed_everything(seed: int, stage: str, *, same: bool = False) -> None:
    """Seed all generators for one stage, each process differently (dropout must not repeat over processes) unless
    ``same``."""
    value = random.Random(f"{seed}/{stage}/{0 if same else distributed.rank()}").getrandbits(31)
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def _go_on(
    checkpoint: CheckpointReader, data: StageData, progress: Progress, display: StageDisplay, *, longer: bool
) -> None:
    saved = checkpoint.progress
    same = saved.world_size == progress.world_size
    data.restore(saved.extra["data"])
    progress.step, progress.samples = saved.step, saved.samples
    whole = progress.total_steps if longer else saved.total_steps
    progress.total_steps = whole if same else saved.step + data.remaining_steps(saved.step, same)
    if longer and progress.total_steps <= saved.step == saved.total_steps:
        raise ConfigError(
            f"--extend: stage {saved.stage} has done its {saved.step} steps and is to have {progress.total_steps}; give more, as "
            f"stages.{saved.stage}.steps={2 * saved.step}"
        )
    for name in checkpoint.passed_over:
        display.print(f"[yellow]passed over a damaged checkpoint: {name}")
    display.print(f"going on at step {saved.step} of {progress.total_steps} ({checkpoint.path})")
    if not same:
        display.print(
            f"[yellow]started with {saved.world_size} processes, now {progress.world_size}: the data go on at the same "
            "place, but the numbers will not be equal to the bit"
        )


def _record(
    stage: StageSpec,
    progress: Progress,
    step: Step,
    rates: dict[str, float],
    engine: Engine,
    meter: Meter,
    micro: list[Any],
) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "step": progress.step,
        "loss": step.loss,
        "grad_norm": step.grad_norm,
        **({"head_loss": step.losses} if step.losses else {}),
        **({"encoder_cost": costs} if (costs := encoder_costs(engine.model)) else {}),
        "lr": rates,
        "grad_norms": dict(engine.norms),
        "epoch": micro[0].epoch,
        "samples": progress.samples,
        "tokens": int(step.counts["tokens"]),
        "supervised": int(step.counts["supervised"]),
        "images": int(step.counts["images"]),
        "data": int(step.counts["data"]),
        **meter.report(),
    }


def _record_start(
    run: Run, stage: StageSpec, groups: list[Group], mixture: Any, attention: str, progress: Progress
) -> None:
    if run.tracker is not None:
        run.tracker.start_stage(stage.name, progress.step)
    if run.info is not None:
        run.info.stage(
            stage.name,
            data=mixture.fingerprints,
            attention=kernel_of(attention),
            total_steps=progress.total_steps,
            groups=[
                {
                    "group": g.name,
                    "tensors": len(g.names),
                    "parameters": g.num_parameters,
                    "lr": g.lr,
                    "weight_decay": g.weight_decay,
                }
                for g in groups
            ],
        )


def _record_place(run: Run, stage: StageSpec, session: Session) -> None:
    """How far the stage is, and the sampler's place, in ``run.json``."""
    if run.info is not None:
        done = session.progress
        run.info.stage(stage.name, steps=done.step, samples=done.samples, **session.data.record())


def _count_down(run: Run) -> bool:
    """Whether ``stop_after`` steps have now been done."""
    if run.stop_after is None:
        return False
    run.stop_after -= 1
    return run.stop_after <= 0


def _flop_model(model: TrainableModel, groups: list[Group]) -> FlopModel | None:
    """None for a model whose operations cannot be counted on the meta device (then no MFU is reported)."""
    if isinstance(model, StageModel):
        return None
    try:
        return flop_model(model, {group.part for group in groups})
    except (NotImplementedError, RuntimeError, TypeError, AttributeError, ValueError):
        return None


def _drop_log(run: Run, stage: StageSpec) -> Path:
    return run.output / "dropped" / f"{stage.name}-{distributed.rank()}.jsonl"
