"""Which settings are each legal and mean nothing together?"""

from __future__ import annotations

from collections.abc import Mapping

from mllm.recipe import ScheduleSpec, StageSpec

_CLIPPING = ("epsilon", "epsilon_high", "delta")


def odd_settings(stage: StageSpec, *, steps: int | None, samples: int | None = None, rows: int = 1) -> list[str]:
    """One line for each combination of a stage's settings that cannot have been meant.

    steps: optimizer steps of the stage; samples: of one epoch; rows: samples of one step, over micro-batches and processes.
    """
    found: list[str] = []
    if stage.epochs is not None and samples is not None and stage.epochs * samples < rows:
        found.append(
            f"epochs {stage.epochs:g} of {samples:,} samples are {stage.epochs * samples:g}, less than the {rows:,} of one step: "
            "it is filled up with the samples that would come next"
        )
    if stage.steps is not None and samples is not None and samples < rows:
        found.append(
            f"{rows:,} samples of one step (batch_size {stage.batch_size} x gradient_accumulation {stage.gradient_accumulation} x "
            f"processes) are more than the {samples:,} there are: each comes several times a step"
        )
    if stage.group_by_length and rows == 1:
        found.append("group_by_length with one sample a step groups nothing")
    if stage.max_tokens_per_batch is not None and stage.batch_size * stage.max_length <= stage.max_tokens_per_batch:
        found.append(
            f"max_tokens_per_batch {stage.max_tokens_per_batch:,} splits nothing: {stage.batch_size} rows of max_length "
            f"{stage.max_length:,} have no more tokens"
        )
    if stage.kind == "grpo":
        found += _clipping(stage)
    if steps is None:
        return found
    found += schedule_problems(stage.schedule, steps)
    every: dict[str, tuple[int | None, str]] = {
        "save_every": (stage.save_every, "no checkpoint is written on the way, but for one every 20 minutes"),
        "log_every": (stage.log_every, "only the last step is logged"),
        "draw.every": (stage.draw.every if stage.draw is not None else None, "pictures are drawn at its end only"),
    }
    return found + interval_problems(every, steps)


def schedule_problems(schedule: ScheduleSpec, steps: int) -> list[str]:
    """A warm-up that leaves no step to the schedule, a floor under a rate that does not fall."""
    found = []
    if schedule.warmup >= 1 and int(schedule.warmup) >= steps > 1:
        found.append(
            f"schedule.warmup {int(schedule.warmup):,} is not shorter than the {steps:,} steps: the rate rises to the last one and "
            f"never follows {schedule.type}; give fewer, or a share below 1"
        )
    if schedule.type == "constant" and schedule.minimum:
        found.append(
            f"schedule.minimum {schedule.minimum:g}: a constant rate has none; take it out, or use cosine or linear"
        )
    return found


def interval_problems(every: Mapping[str, tuple[int | None, str]], steps: int) -> list[str]:
    """Intervals that never come round. every: setting → its value and what follows."""
    return [
        f"{name} {value:,} is beyond the {steps:,} steps: {result}"
        for name, (value, result) in every.items()
        if value is not None and value > steps
    ]


def _clipping(stage: StageSpec) -> list[str]:
    """GRPO's clipping compares a policy with the one that answered: the same, unless a batch is used more than once."""
    trl = stage.options.get("trl") or {}
    given = [name for name in _CLIPPING if name in trl]
    if not given or int(trl.get("num_iterations", 1)) > 1:
        return []
    return [
        f"options.trl.{given[0]} clips nothing: each batch is learned from once, so no ratio leaves 1; raise "
        "options.trl.num_iterations, or take it out"
    ]
