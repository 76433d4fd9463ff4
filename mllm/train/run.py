"""How is a whole recipe trained: stage after stage, each from the one before, none twice?"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from mllm import distributed, progress
from mllm.damage import disk_full
from mllm.errors import CheckpointError, ConfigError, Interrupted
from mllm.machines import Machines
from mllm.plugins import load_plugins
from mllm.recipe import Recipe, StageSpec
from mllm.recipe_of_stage import parts_of_run, recipe_of_stage
from mllm.train.agreement import agree
from mllm.train.checkpoint.export import finished_otherwise, is_finished, publish
from mllm.train.checkpoint.files import found, step_of
from mllm.train.checkpoint.mirror import Mirror, NotCopied, bring_back, holds_a_run, mirror_of
from mllm.train.checkpoint.resume import LENGTH
from mllm.train.checkpoint.run_lock import only_run_in
from mllm.train.engine.base import choose_engine
from mllm.train.gpu_memory import naming_a_full_gpu
from mllm.train.launch import launch
from mllm.train.meeting import meeting
from mllm.train.observe.run_info import RunInfo
from mllm.train.observe.tracking import Tracker, plot_loss
from mllm.train.preflight.auto import choose_engines
from mllm.train.stages.kind import kind_of
from mllm.train.trainer import Run

_log = logging.getLogger(__name__)
GO_ON = "The same command with --resume goes on from the last checkpoint."


def run_recipe(
    recipe: Recipe,
    *,
    processes: int = 1,
    resume: bool = False,
    output: str | Path | None = None,
    stop_after: int | None = None,
    profile: int | None = None,
    extend: bool = False,
    machines: Machines | None = None,
) -> Path:
    """Train every stage of a recipe that is not finished.

    Args:
        recipe: what is trained.
        processes: on this machine, started for the caller.
        resume: go on in a folder that holds a run; without it such a folder is refused.
        output: the run's folder (default: the recipe's).
        stop_after: end with a checkpoint after so many optimizer steps (the returned folder may then not exist yet).
        profile: record so many steps of every stage with the profiler, into ``<output>/profile``. Default: where a step's time goes is
            told once, from two steps, in stages of 50 steps and more; 0: not even that.
        extend: resume, and let the last stage be longer than it was: it goes on from its optimizer's state (``keep_state``), with the
            schedule of the new length.
        machines: those that run the same command, this one among them; ``processes`` is then theirs.

    Returns:
        ``<output>/final``, a Hugging Face directory.

    Raises:
        ConfigError: before anything is trained; also when the machines do not agree on what is trained.
        MachineLost: another machine of the run ended.
        TrainingDiverged: the loss is not finite; checkpoints written before stay as they are.
        CheckpointError: a checkpoint cannot be read or written.
        DataError: the data cannot be used.
        Interrupted: Ctrl-C, SIGTERM or SIGUSR1; the step was finished and a checkpoint written. The message says how to go on.
    """
    folder = Path(output) if output is not None else recipe.output_dir
    if "://" in str(output or recipe.output):
        raise ConfigError(
            f"output {output or recipe.output}: is a folder of this machine, where the run is written; what is to be kept on an object "
            f"store goes beside it: mirror={output or recipe.output} (and resumes from there)"
        )
    if processes < 1:
        raise ConfigError(f"--processes is {processes}; 1 or more is expected")
    progress.begin()
    try:
        resume = resume or extend
        with meeting(machines) as met:
            _check_run(recipe, folder, resume, extend)
            needs_group = any(choose_engine(stage).zero_stage for stage in recipe.stages)
            processes, first = (processes, True) if machines is None else (machines.processes, machines.node_rank == 0)
            asks = first and os.environ.get("RANK", "0") == "0"
            arguments = recipe, folder, resume, stop_after, profile, extend
            with _naming_a_full_disk(folder), only_run_in(folder, asks=asks):
                launch(_train_recipe, processes, *arguments, needs_group=needs_group, meeting=met)
    except KeyboardInterrupt:
        raise Interrupted(saved_so_far(recipe, folder)) from None
    finally:
        progress.end()
    return folder / "final"


def saved_so_far(recipe: Recipe, folder: Path) -> str:
    """What of a stopped run is on disk, and how to go on, in a sentence each."""
    for stage in reversed(recipe.stages):
        if is_finished(folder / stage.name):
            return f"stage {stage.name} is finished in {folder}. The same command with --resume goes on with the next."
        if written := found(folder / "checkpoints" / stage.name):
            return f"stage {stage.name} is saved up to step {step_of(written[-1]):,} ({written[-1]}). {GO_ON}"
    return (
        "nothing is saved yet. A checkpoint comes every 20 minutes, or every stages.NAME.save_every steps. The same command with "
        "--resume begins again."
    )


def _check_run(recipe: Recipe, folder: Path, resume: bool, extend: bool) -> None:
    """Raises `ConfigError`, `DataError` or `CheckpointError` for what would end the run later."""
    with progress.phase("checking the recipe and its data"):
        load_plugins(recipe.plugins)
        for stage in recipe.stages:
            kind_of(stage).check(stage, recipe_of_stage(recipe, stage, folder))
    former = sorted(folder.glob("step-*/training_state.pt")) if folder.is_dir() else []
    if former:
        raise ConfigError(
            f"output {folder} holds a tokenizer's run of an earlier version, which this one cannot go on with; start from its "
            f"weights, stages.{recipe.stages[0].name}.options.init={former[-1].parent}, in another output folder"
        )
    if not resume and _holds_a_run(folder):
        raise ConfigError(
            f"output {folder} already holds a run; go on with --resume, choose another with output=…, or delete it"
        )
    mirror = mirror_of(recipe)
    if mirror is not None and not resume and holds_a_run(mirror):
        raise ConfigError(
            f"mirror {mirror.address} already holds a run; go on with --resume, or choose another with mirror=…"
        )
    _check_stages(recipe, folder, extend)


def _check_stages(recipe: Recipe, folder: Path, extend: bool) -> None:
    for stage in recipe.stages:
        if is_finished(folder / stage.name):
            own = recipe_of_stage(recipe, stage, folder)
            _check_finished(own, stage, folder, extend and stage is recipe.stages[-1])


def _check_finished(recipe: Recipe, stage: StageSpec, folder: Path, extend: bool) -> None:
    """Raises `CheckpointError` for a finished stage that the recipe now describes otherwise: nothing of that would be done."""
    changed = finished_otherwise(folder / stage.name, recipe, stage, leave_out=LENGTH if extend else ())
    if changed:
        raise CheckpointError(
            f"{folder / stage.name}: the stage is finished, with other settings ({changed}), and is not trained again. Give "
            "another output folder, or delete this one; more steps of a last stage: --extend"
        )
    if extend and not found(folder / "checkpoints" / stage.name):
        raise CheckpointError(
            f"{folder / stage.name}: --extend: the optimizer's state was not kept when the stage was finished. Train with "
            f"stages.{stage.name}.keep_state=true, or add a stage, which goes on from the weights alone"
        )


def _holds_a_run(folder: Path) -> bool:
    return folder.is_dir() and any((folder / name).exists() for name in ("run.json", "checkpoints", "final"))


def _train_recipe(
    recipe: Recipe, folder: Path, resume: bool, stop_after: int | None, profile: int | None, extend: bool
) -> None:
    """The body of every process."""
    with _naming_a_full_disk(folder), naming_a_full_gpu(), ExitStack() as stack:
        _train(recipe, folder, resume, stop_after, profile, extend, stack)


def _train(
    recipe: Recipe,
    folder: Path,
    resume: bool,
    stop_after: int | None,
    profile: int | None,
    extend: bool,
    stack: ExitStack,
) -> None:
    """stack: what keeps other runs out of this machine's folder until the end."""
    progress.begin()
    _quiet_libraries()
    load_plugins(recipe.plugins)
    main, info, tracker = distributed.is_main(), None, None
    folder.mkdir(parents=True, exist_ok=True)
    if (mirror := mirror_of(recipe)) is not None and resume:
        _bring_back(mirror, recipe, folder)
        _check_stages(recipe, folder, extend)
    own_folders = agree(recipe, folder)
    if own_folders is not None:
        stack.enter_context(own_folders.only_run_in(folder))
    if own_folders is not None and resume:
        with progress.phase("completing the machines' own folders"):
            own_folders.give_stages(folder, [stage.name for stage in recipe.stages], extend=extend)
    for part in parts_of_run(recipe, folder):
        choose_engines(part)
    if main:
        with progress.phase("opening the run's records"):
            info = RunInfo(folder, recipe, processes=distributed.world_size(), resume=resume)
            tracker = Tracker(folder, recipe, info)
    distributed.barrier()
    run = Run(recipe, folder, resume, tracker, info, stop_after, profile, extend, own_folders=own_folders)
    try:
        finished = _train_stages(run)
        if run.interrupted and not finished:
            raise Interrupted(saved_so_far(recipe, folder))
    finally:
        if tracker is not None:
            _finish_records(tracker, folder, recipe)
    if finished and distributed.keeps_folder():
        publish(folder / recipe.stages[-1].name, folder / "final")
    distributed.barrier()


@contextmanager
def _naming_a_full_disk(folder: Path) -> Iterator[None]:
    """A full disk met by records or a stage's weights rather than by a checkpoint (which tells it itself) as `CheckpointError`."""
    try:
        yield
    except Exception as error:
        if (full := disk_full(error)) is None:
            raise
        raise CheckpointError(
            f"{folder}: the disk is full ({full}). Complete checkpoints and finished stages in it are intact; free space, "
            "then go on with --resume (a folder in which nothing was trained yet: delete it)"
        ) from error


def _finish_records(tracker: Tracker, folder: Path, recipe: Recipe) -> None:
    """Close the records and draw the loss; what goes wrong here hides no error of the training."""
    try:
        tracker.close()
        plot_loss(folder, [stage.name for stage in recipe.stages])
    except OSError as error:
        _log.warning("records and loss plot of %s could not be finished: %s", folder, error)


def _quiet_libraries() -> None:
    """No second progress bar under ours, and DeepSpeed need not announce which accelerator it guesses."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns about guessing it


def _bring_back(mirror: Mirror, recipe: Recipe, folder: Path) -> None:
    """`bring_back` by the main process; what it raises is raised on all."""
    problem = ""
    if distributed.is_main():
        try:
            with progress.phase(f"looking into {mirror.address}"):
                bring_back(mirror, recipe, folder, progress.tell)
        except (CheckpointError, OSError) as error:
            problem = str(error)
    if problem := distributed.gather_objects(problem)[0]:
        raise CheckpointError(problem)


def _mirror_stage(run: Run, folder: Path) -> None:
    mirror = mirror_of(run.recipe)
    if mirror is None or not distributed.is_main():
        return
    try:
        with progress.phase(f"copying stage {folder.name} to {mirror.address}"):
            mirror.put_stage(folder)
    except NotCopied as error:
        _log.warning("stage %s is on disk and not in the mirror (%s)", folder, error)


def _train_stages(run: Run) -> bool:
    """Whether all stages are finished now."""
    previous: Path | None = None
    for stage in run.recipe.stages:
        folder = run.output / stage.name
        own = replace(run, recipe=recipe_of_stage(run.recipe, stage, run.output))
        if stage is own.recipe.stages[0]:
            previous = None  # of a model that is built on a tokenizer of this run, which its recipe names
        if not is_finished(folder) or (run.extend and stage is run.recipe.stages[-1]):
            distributed.barrier()
            finished = kind_of(stage).train(own, stage, previous, folder)
            run.stop_after, run.interrupted = own.stop_after, own.interrupted
            if not finished:
                return False
            if run.own_folders is not None:
                run.own_folders.give_finished(folder)
            _mirror_stage(run, folder)
        elif distributed.is_main():
            Console(stderr=True).print(f"stage {stage.name} is finished ({folder})", highlight=False)
        # A run killed right after the stage was written left its checkpoints behind.
        if distributed.keeps_folder() and not stage.keep_state:
            shutil.rmtree(run.checkpoints(stage), ignore_errors=True)
        distributed.barrier()
        previous = folder
        if run.interrupted and stage is not run.recipe.stages[-1]:
            return False
    return True
