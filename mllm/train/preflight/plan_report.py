"""How is a plan shown to a reader?"""

from __future__ import annotations

from typing import Any

import numpy as np

from mllm.train.preflight.plan import ROOM, RecipePlan, StagePlan
from mllm.train.preflight.scaling import Cluster, step_time

_BARS = " ▁▂▃▄▅▆▇█"


def plan_tables(plan: RecipePlan, *, peak_flops: float = 989e12, mfu: float = 0.45, processes: int = 1) -> list[Any]:
    """The plan as rich renderables. peak_flops, mfu: what times are stated at (an H200's dense bf16 peak)."""
    parts = ", ".join(f"{name} {count(size)}" for name, size in plan.parameters.items())
    out: list[Any] = [f"[bold]{plan.recipe}[/]: {count(sum(plan.parameters.values()))} parameters ({parts})"]
    out += [f"  {line}" for line in plan.joins]
    for stage in plan.stages:
        out.append(_stage_table(stage, peak_flops, mfu, processes))
        out += [f"  engine auto: {stage.engine}"] if stage.engine else []
        out += [] if stage.rows is None else [f"  {stage.rows}"]
        out += [f"[yellow]! {stage.name}: {hazard}" for hazard in stage.hazards]
    out.append(f"final checkpoint: {size(plan.final_bytes)}")
    out += [f"[yellow]! {hazard}" for hazard in plan.hazards]
    return out


def _stage_table(stage: StagePlan, peak_flops: float, mfu: float, processes: int) -> Any:
    from rich.table import Table

    table = Table(title=f"stage {stage.name}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for group in stage.groups:
        table.add_row(
            f"learns {group.name}", f"{group.num_parameters:,} at {group.lr:g}, weight decay {group.weight_decay:g}"
        )
    table.add_row("frozen", f"{sum(stage.frozen.values()):,}", end_section=True)
    for what, number in stage.memory.items():
        table.add_row(f"memory: {what}", size(number))
    table.add_row(f"memory: peak of one GPU, rows of {stage.row_length:,} tokens", f"[bold]{size(stage.peak)}[/]")
    for what, number in stage.offloaded.items():
        table.add_row(f"beside one GPU, {what}", size(number))
    table.add_row("checkpoints on disk (two kept)", size(stage.checkpoint_bytes), end_section=True)
    if stage.samples is not None:
        table.add_row("samples of one epoch", f"{stage.samples:,}")
    if stage.lengths:
        shown = np.percentile(stage.lengths, [5, 50, 95, 100]).astype(int)
        bars, low, high = histogram(stage.lengths)
        table.add_row(f"tokens of a sample, {low:,} to {high:,}", bars)
        table.add_row("  5 % · median · 95 % · longest", " · ".join(f"{n:,}" for n in shown))
        if stage.image_tokens:
            shown = np.percentile(stage.image_tokens, [5, 50, 95, 100]).astype(int)
            bars, low, high = histogram(stage.image_tokens)
            table.add_row(f"tokens of a picture ({len(stage.image_tokens)} looked at), {low:,} to {high:,}", bars)
            table.add_row("  5 % · median · 95 % · most", " · ".join(f"{n:,}" for n in shown))
        table.add_row(f"  cut by max_length (of the {len(stage.lengths)} looked at)", f"{stage.truncated or 0:.1%}")
    table.add_row("tokens of a step", f"{stage.tokens_step:,}")
    if stage.flops_step_language_model == stage.flops_step:  # there is no other part, or no language model
        table.add_row("operations of a step", operations(stage.flops_step))
    else:
        words = operations(stage.flops_step_language_model)
        table.add_row("operations of a step (language model alone)", f"{operations(stage.flops_step)} ({words})")
    if stage.steps is not None:
        seconds = stage.seconds(peak_flops=peak_flops, mfu=mfu, processes=processes) or 0.0
        table.add_row("steps", f"{stage.steps:,}")
        table.add_row(f"time at {mfu:.0%} of {peak_flops / 1e12:.0f} TFLOP/s × {processes}", duration(seconds))
    return table


def scaling_tables(plan: RecipePlan, cluster: Cluster, *, rate: float | None = None) -> list[Any]:
    """What each stage would do on the cluster, and on 8, 64 and 512 such GPUs, per engine; first what that rests on. rate: operations
    a second of one GPU, where another than ours was measured."""
    from rich.table import Table

    gpu, each = cluster.gpu, max(1, cluster.gpus // cluster.nodes)
    source = (
        "as given" if rate else "as measured at 7B" if gpu.measured else "an H200's share of its peak, not measured"
    )
    out: list[Any] = [
        f"[bold]scaling[/] on {gpu.name}: {(rate or gpu.rate) / 1e12:.0f} TFLOP/s each ({source}), {gpu.bus / 1e9:.0f} GB/s within a "
        f"machine of {each}, {cluster.port_bytes / 1e9:.0f} GB/s of ports a machine; gathers and sums go around all "
        "GPUs in rings, none within a machine first; no stragglers, no waiting for data. Two and four H200s were measured within 15 % of "
        "it; more were not."
    ]
    counts = sorted({8, 64, 512, cluster.gpus})
    for stage in plan.stages:
        if stage.load is None:
            continue
        table = Table(title=f"stage {stage.name}", title_justify="left")
        for heading in ("engine", "GPUs", "rows a step", "memory", "step", "tokens/s", "scaling"):
            table.add_column(heading, justify="left" if heading == "engine" else "right")
        own = stage.tokens_step / cluster.gpus
        alone = step_time(stage.load, "none", Cluster(gpu, 1), rate=rate).seconds
        for engine in stage.engines:
            for gpus in counts:
                machines = max(1, gpus // each)
                peak = stage.peak_for(engine, gpus)
                fits = peak <= ROOM * gpu.memory
                there = Cluster(gpu, gpus, machines, cluster.port_bytes)
                seconds = step_time(stage.load, engine, there, rate=rate).seconds
                table.add_row(
                    engine if gpus == counts[0] else "",
                    str(gpus),
                    f"{round(stage.rows_step * gpus / cluster.gpus):,}",
                    size(peak) if fits else f"[red]{size(peak)} do not fit",
                    f"{1e3 * seconds:,.0f} ms",
                    f"{own * gpus / seconds:,.0f}",
                    f"{alone / seconds:.2f}",
                    end_section=gpus == counts[-1],
                )
        out.append(table)
    return out


def histogram(lengths: list[int], *, bins: int = 24) -> tuple[str, int, int]:
    """(one character a bin, shortest, longest). A bin with any sample is never blank."""
    low, high = min(lengths), max(lengths)
    counts, _ = np.histogram(lengths, bins=bins, range=(low, high + 1))
    top = counts.max()
    marks = [_BARS[max(1, round(8 * c / top))] if c else _BARS[0] for c in counts]
    return "".join(marks), low, high


def too_large(plan: RecipePlan, limit_gb: float | None) -> list[str]:
    """One line for each stage whose peak exceeds the memory of one GPU, with what would lower it most."""
    lines = []
    if limit_gb is None:
        return lines
    for stage in plan.stages:
        if stage.peak <= limit_gb * 1e9:
            continue
        largest = max(stage.memory, key=lambda part: stage.memory[part])
        cure = {
            "activations and loss": f"stages.{stage.name}.gradient_checkpointing=true, or a smaller batch_size",
            "weights": f"stages.{stage.name}.engine=fsdp2 (or zero3), or a smaller language model",
        }.get(largest, f"stages.{stage.name}.engine=sharded or fsdp2 over more processes, or lora")
        lines.append(
            f"{stage.name}: {size(stage.peak)} do not fit {limit_gb:g} GB; most of it is {largest}: try {cure}"
        )
    return lines


def count(number: float) -> str:
    """``7.05 B``, ``21.0 M``."""
    return _scaled(number, ((1e9, " B"), (1e6, " M"), (1e3, " K")), "")


def size(number: float) -> str:
    """Bytes as ``14.1 GB``, ``320 MB``."""
    return _scaled(number, ((1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB")), " B")


def operations(number: float) -> str:
    return _scaled(number, ((1e15, " PFLOP"), (1e12, " TFLOP"), (1e9, " GFLOP")), " FLOP")


def duration(seconds: float) -> str:
    """``3.2 h``, ``12 min``, ``5 s``."""
    if seconds < 1:
        return "under 1 s"
    return _scaled(seconds, ((3600, " h"), (60, " min")), " s")


def _scaled(number: float, units: tuple[tuple[float, str], ...], rest: str) -> str:
    for unit, name in units:
        if number >= unit:
            return f"{number / unit:.3g}{name}" if number < 1000 * unit else f"{number / unit:,.0f}{name}"
    return f"{number:.3g}{rest}"
