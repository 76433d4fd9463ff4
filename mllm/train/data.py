"""Which batches does a stage see, and how many steps is that?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mllm import distributed
from mllm.data.collate import Batch, Dropped
from mllm.data.dataset import BadShare, DataStream, DropLog, dropped_rows
from mllm.data.lengths import counting_processes, measure
from mllm.data.mixture import Draw, Mixture
from mllm.data.plan import Plan, SteppedPlan, make_plan
from mllm.data.shards.stream import ShardStream, merged
from mllm.data.workers import AT_FIRST, WorkerChoice
from mllm.errors import AlignmentError, ConfigError, DataError
from mllm.odd_settings import odd_settings
from mllm.processing.chat import count_tokens, encode_sample
from mllm.processing.images import read_bytes
from mllm.processing.protocol import TextProcessor
from mllm.processing.videos import open_video
from mllm.processing.views.base import BudgetConfig
from mllm.progress import Phase, tell
from mllm.recipe import StageSpec
from mllm.references import refer
from mllm.types import Sample, Video

_ROWS_TRIED = 16
PADDED_TO = 8
"""Padded rows are a multiple of so many tokens."""
SHUFFLED = 512
"""Rows of shards that are held and shuffled, where ``shuffle_buffer`` says nothing."""


def open_mixture(stage: StageSpec, seed: int) -> Mixture:
    """The stage's datasets. Raises `ConfigError` or `DataError` naming the stage (an unknown name, a missing file, no
    row left)."""
    try:
        return Mixture(stage.data, seed=seed)
    except (ConfigError, DataError) as error:
        kind = ConfigError if isinstance(error, ConfigError) else DataError
        raise kind(f"stages.{stage.name}.data: {error}") from error


def check_some_rows(mixture: Mixture, stage: StageSpec) -> None:
    """Raises `DataError` when none of some rows of a dataset, spread over it, can be read, or their pictures are not there: a
    wrong key or folder, which would end the run at its first batch. What single rows have is counted while training."""
    if stage.max_bad_share >= 1:
        return
    for source, rows, left_out in zip(mixture.sources, mixture.num_rows, mixture.quarantined, strict=True):
        step = max(1, rows // _ROWS_TRIED) if source.random_access else 1
        tried = [row for row in range(0, rows, step) if row not in left_out][:_ROWS_TRIED]
        problems: list[str] = []
        for row in tried:
            try:
                sample = source[row]
                for image in sample.images:
                    _refuse_absent(image, source.where(row, sample.id))
            except (DataError, AlignmentError) as error:
                problems.append(str(error))
            else:
                break
        if tried and len(problems) == len(tried):
            raise DataError(
                f"stages.{stage.name}.data: of {source.name} {len(tried)} rows were tried and none can be used. {problems[0]}"
            )


def _refuse_absent(image: Any, where: str) -> None:
    if isinstance(image, Video):
        open_video(image, where=where)
        return
    reference = refer(image, where=where)
    if reference.kind == "remote":
        read_bytes(image, where=where)  # refused, with the cure
    if reference.kind == "file" and not reference.value.is_file():
        raise DataError(
            f"{where}: no such image file: {str(reference.value)!r}; is image_root the folder the paths start from?"
        )


def refuse_with_shards(stage: StageSpec, mixture: Mixture) -> None:
    """Raises `ConfigError` for what a stage asks for that needs to know every row beforehand, where rows lie in shards."""
    if not any(mixture.sharded):
        return
    name = mixture.sources[mixture.sharded.index(True)].name
    refused = {
        "group_by_length": (stage.group_by_length, "batches are planned by all lengths; packing: true needs none"),
        "samples_per_step": (
            stage.samples_per_step is not None,
            "how many rows hold so many samples is known only when they are read; give batch_size and gradient_accumulation",
        ),
        "cache_features": (bool(stage.cache_features), "features are stored by row; leave it out"),
        "epochs": (
            stage.packing and stage.epochs is not None,
            "how many packed rows an epoch makes is known only at its end, and the schedule needs a length; give steps",
        ),
    }
    for key, (asked, reason) in refused.items():
        if asked:
            raise ConfigError(f"stages.{stage.name}.{key}: {name} lies in shards, which are read in order: {reason}")


def refuse_fixed_tokens(stage: StageSpec, mixture: Mixture, processor: TextProcessor) -> None:
    """Raises `ConfigError` for a dataset's ``visual_tokens`` where pictures always take the same number."""
    bound = next((source for source in mixture.sources if source.spec.visual_tokens is not None), None)
    if bound is None:
        return
    where = f"stages.{stage.name}.data: {bound.name}: visual_tokens {bound.spec.visual_tokens}"
    views = getattr(getattr(processor, "rules", None), "views", None)
    if not isinstance(views, BudgetConfig) or getattr(processor, "encode_sample", None) is not None:
        how = (
            "this stage's kind"
            if isinstance(views, BudgetConfig)
            else f"model.views {getattr(views, 'type', 'single')}"
        )
        raise ConfigError(
            f"{where}: with {how} a picture always takes the same number; use views tiles or native in a stage of kind sft"
        )
    if stage.cache_features:
        raise ConfigError(f"{where}: features are stored for one way of seeing a picture; leave cache_features out")


def tell_left_out(mixture: Mixture, display: Any, info: Any, stage: StageSpec) -> None:
    """Show and record which rows never come because a quarantine list holds them. display, info: `StageDisplay`, and
    `RunInfo` or None."""
    for source in mixture.sources:
        if source.spec.recognised is not None:
            display.print(f"{stage.name}: {source.spec.recognised}")
    for line in mixture.left_out():
        display.print(f"{stage.name}: {line}")
    if info is not None:
        lists = zip(mixture.sources, mixture.quarantines, strict=True)
        info.stage(stage.name, quarantined={s.name: q.record() for s, q in lists if q.rows or q.stale})


def tell_odd_settings(stage: StageSpec, steps: int, samples: int, display: Any) -> None:
    """Show the settings that mean nothing together, before anything is trained with them."""
    rows = stage.samples_per_step or stage.batch_size * stage.gradient_accumulation * distributed.world_size()
    for line in odd_settings(stage, steps=steps, samples=samples, rows=rows):
        display.print(f"[yellow]! {stage.name}: {line}")


def tell_faded(run: Any, stage: StageSpec, faded: dict[str, int], line: str, display: Any) -> None:
    """Show and record, on the main process, a part that the loss has stopped hearing."""
    display.print(f"[yellow]! {stage.name}: {line}")
    if run.info is not None:
        run.info.stage(stage.name, faded=dict(faded))


def tell_dropped(run: Any, stage: StageSpec, display: Any) -> None:
    """Show and record, at a stage's end, which rows could not be used on any process, in any start of the run."""
    distributed.barrier()  # all have written what they met
    if run.info is None:
        return
    found = dropped_rows(run.output / "dropped", stage.name)
    for name, kinds in found.items():
        reasons = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
        display.print(
            f"{stage.name}: {sum(kinds.values()):,} rows of {name} could not be used and were replaced ({reasons}); each is "
            f"named in {run.output / 'dropped'}"
        )
    run.info.stage(
        stage.name,
        dropped={name: sum(kinds.values()) for name, kinds in found.items()},
        dropped_reasons={name: dict(kinds) for name, kinds in found.items()},
    )


def token_count(processor: TextProcessor, sample: Sample) -> int:
    """Tokens of a sample, visual ones included; of its images at most the headers are read."""
    return count_tokens(processor, sample, where=f"sample {sample.id!r}")


@dataclass
class _Counter:
    """Rows whose tokens have been counted, told as they grow."""

    phase: Phase
    total: int
    done: int = 0

    def add(self, rows: int) -> None:
        self.done += rows
        self.phase.so_far = f"tokens of {self.done:,} of {self.total:,} rows counted"


class StageData:
    """Batches of one stage on this process, optimizer step by optimizer step, from any step on."""

    def __init__(
        self,
        stage: StageSpec,
        processor: TextProcessor,
        mixture: Mixture,
        *,
        cache: Path,
        log: Path | None = None,
        phase: Phase | None = None,
    ):
        """phase: learns how many rows have been counted."""
        self.stage, self.mixture, self.phase = stage, mixture, phase or Phase()
        world, rank = distributed.world_size(), distributed.rank()
        self.drops, self.bad_share = DropLog(log), BadShare(stage.max_bad_share)
        self.tell: Callable[[str], Any] = tell
        total = None if stage.epochs is None else max(1, round(stage.epochs * len(mixture)))
        sharded = any(mixture.sharded)
        self.workers = WorkerChoice(AT_FIRST if sharded else 0) if stage.num_workers == "auto" else None
        common: dict[str, Any] = {
            "pad_token_id": processor.tokenizer.pad_token_id,
            "rank": rank,
            "num_workers": stage.num_workers if self.workers is None else self.workers.first,
            "pad_to_multiple_of": None if stage.packing else PADDED_TO,
            "max_tokens": stage.max_tokens_per_batch,
            "pin_memory": distributed.local_device().type == "cuda",
            "on_drop": self.drops,
        }
        encode = partial(encode_sample, processor, max_length=stage.max_length)
        refuse_with_shards(stage, mixture)
        refuse_fixed_tokens(stage, mixture, processor)
        self.plan: Plan | None = None
        if sharded:
            buffers = [
                source.spec.shuffle_buffer or SHUFFLED for source in mixture.sources if source.shards is not None
            ]
            self.stream: DataStream | ShardStream = ShardStream(
                mixture,
                encode,
                batch_size=stage.batch_size,
                world_size=world,
                total=total,
                buffer=max(buffers),
                lanes_per_process=None if self.workers is None else AT_FIRST,
                max_length=stage.max_length if stage.packing else None,
                count=partial(token_count, processor),
                **common,
            )
            self.micro_batches = self.stream.num_batches
            return
        lengths = self._lengths(processor, cache) if stage.packing or stage.group_by_length else None
        self.plan = make_plan(
            mixture,
            batch_size=stage.batch_size,
            world_size=world,
            total=total,
            packing=stage.packing,
            group_by_length=stage.group_by_length,
            lengths=lengths,
            max_length=stage.max_length,
            samples_per_step=stage.samples_per_step,
        )
        self.stream = DataStream(self.plan, encode, **common)
        stepped = isinstance(self.plan, SteppedPlan)
        self.micro_batches = None if total is None or stepped else self.plan.num_batches()

    def _lengths(self, processor: TextProcessor, cache: Path) -> list[Any]:
        """Every dataset's token counts, measured once by the main process. Rows that cannot be measured are named, for
        packing plans around them; too many of them raise `DataError`."""
        tokenizer = processor.tokenizer.backend_tokenizer.to_str()
        span = getattr(processor, "visual_span", None)
        key = f"{tokenizer}|{processor.chat_template}|{processor.layout_key}|{span}"
        count, tables = partial(token_count, processor), []
        counter = _Counter(self.phase, sum(len(source) for source in self.mixture.sources))
        for source, left_out, rows in zip(
            self.mixture.sources, self.mixture.quarantined, self.mixture.num_rows, strict=True
        ):
            bad: list[Dropped] = []

            def on_bad(
                row: int,
                reason: str,
                name: str = source.name,
                known: Any = left_out,
                found: Any = bad,
                last: int = rows,
            ) -> None:
                if row not in known and row < last:
                    found.append(Dropped(name, row, str(row), reason, "cannot be measured"))

            if distributed.is_main():  # the others read its cache
                measure(
                    source,
                    count,
                    key=key,
                    cache=cache,
                    on_bad=on_bad,
                    processes=counting_processes(len(source)),
                    progress=counter.add,
                )
            bad = distributed.gather_objects(bad)[0]  # every process stops where one does
            tables.append(measure(source, count, key=key, cache=cache))
            if self.stage.packing:
                self.drops(bad if distributed.is_main() else [])
                BadShare(self.stage.max_bad_share).check(source.name, bad, rows)
        return tables

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole stage."""
        if self.stage.steps is not None:
            return self.stage.steps
        if isinstance(self.plan, SteppedPlan):
            return max(1, self.plan.num_steps())
        assert self.micro_batches is not None
        return max(1, math.ceil(self.micro_batches / self.stage.gradient_accumulation))

    def draws(self) -> Iterator[Draw]:
        """The samples that this process will see, in order, as far as the plan tells (replacements of bad ones aside)."""
        if self.plan is None:  # of shards only the datasets of the draws are known
            numbers = range(self.total_steps * self.stage.gradient_accumulation * self.stage.batch_size)
            yield from itertools.chain.from_iterable(self.mixture.locate([k]) for k in numbers)
            return
        batches = self.plan.batches(self.stream.rank)
        if isinstance(self.plan, SteppedPlan):
            last = self.total_steps
            planned = itertools.takewhile(lambda batch: batch.position.window < last, batches)
        else:
            planned = itertools.islice(batches, self.total_steps * self.stage.gradient_accumulation)
        for batch in planned:
            for row in batch.rows:
                yield from row

    def bad_rows(self, micro: list[Batch]) -> dict[str, float]:
        """This process's numbers of usable and unusable rows in an optimizer step (`BadShare.count`)."""
        return self.bad_share.count(micro, [source.name for source in self.mixture.sources])

    def steps(self) -> Iterator[list[Batch]]:
        """The micro-batches of each optimizer step, from the present position on; the last step may have fewer, and one in which a
        batch was split has more."""
        read = self._until_windows_end if isinstance(self.plan, SteppedPlan) else self._planned
        steps = read(iter(self.stream))
        while (micro := next(steps, None)) is not None:
            if self.workers is not None:
                self.workers.hand()
            yield micro
            chosen = self.workers.back(micro) if self.workers is not None else None
            if chosen is None:
                continue
            self.workers = None
            before, self.stream.num_workers = self.stream.num_workers, chosen[0]
            self.tell(f"{self.stage.name}: {chosen[1]}")
            if before != chosen[0]:
                steps.close()  # ends the workers; others begin where this step ended
                steps = read(iter(self.stream))

    def _planned(self, batches: Iterator[Batch]) -> Generator[list[Batch], None, None]:
        while micro := _planned(batches, self.stage.gradient_accumulation):
            yield micro

    @staticmethod
    def _until_windows_end(batches: Iterator[Batch]) -> Generator[list[Batch], None, None]:
        yield from _until_windows_end(batches)

    def record(self) -> dict[str, Any]:
        """This process's place in the data and how many read for it, for ``run.json``."""
        return {"sampler": self.stream.state_dict(), "num_workers": self.stream.num_workers}

    def shared_state(self) -> dict[str, Any]:
        """The place of all processes, for a checkpoint. All must call it."""
        state = self.stream.state_dict()
        return state if isinstance(self.stream, DataStream) else merged(distributed.gather_objects(state))

    def restore(self, state: dict[str, Any]) -> None:
        """Go on after the batches that were consumed; with another number of processes, about there."""
        self.stream.load_state_dict(state)

    def remaining_steps(self, done: int, same_layout: bool) -> int:
        """Steps left; after a change of processes counted anew from the position."""
        if self.stage.steps is not None or same_layout:
            return self.total_steps - done
        if isinstance(self.stream, ShardStream):
            return math.ceil((self.stream.num_batches or 0) / self.stage.gradient_accumulation)
        if isinstance(self.plan, SteppedPlan):
            return self.plan.num_steps(self.stream.position)
        left = self.stream.plan.num_batches(self.stream.position)
        return math.ceil(left / self.stage.gradient_accumulation)


def _planned(batches: Iterator[Batch], count: int) -> list[Batch]:
    """The micro-batches of the next ``count`` planned batches, or of as many as there are."""
    micro: list[Batch] = []
    for batch in batches:
        micro.append(batch)
        count -= batch.following != batch.position
        if not count:
            break
    return micro


def _until_windows_end(batches: Iterator[Batch]) -> Iterator[list[Batch]]:
    """The batches of one window after the other; a window is one optimizer step."""
    micro: list[Batch] = []
    for batch in batches:
        micro.append(batch)
        assert batch.following is not None
        if batch.following.batch == 0:
            yield micro
            micro = []
