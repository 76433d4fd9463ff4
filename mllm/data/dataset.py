"""How does a planned batch get loaded, in whichever worker, and what happens to samples that cannot be used?"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from mllm.data.collate import Batch, Dropped, collate, collate_packed, split_by_tokens
from mllm.data.mixture import Draw, Mixture
from mllm.data.parallel import pool_context
from mllm.data.plan import PackedPlan, Plan, PlannedBatch, Position
from mllm.errors import AlignmentError, DataError, blamed_on
from mllm.processing.chat import EncodedSample
from mllm.stopping import outlive_the_step
from mllm.threads import one_thread
from mllm.types import Sample

_log = logging.getLogger(__name__)
_MAX_ATTEMPTS = 100


class PlannedDataset(Dataset):
    """A planned batch → its `Batch`, or several where ``collate_rows`` splits it: only behind the last of them does the next planned
    one follow. Holds no state, so workers, their number and a resume change nothing.

    encode: sample → `EncodedSample` (e.g. ``partial(encode_sample, processor, max_length=2048)``). A sample that cannot be
    read or encoded, whatever it raises, is replaced by the next good row of its dataset (in a packed row it is left out,
    and replaced only when nothing else is in the row) and listed in ``Batch.dropped``. 100 bad rows one after another end
    the run. room: tokens of a packed row; a sample that turns out longer than it was planned is left out too.
    """

    def __init__(
        self,
        mixture: Mixture,
        encode: Callable[[Sample], EncodedSample],
        *,
        collate_rows: Callable[[list[list[EncodedSample]]], list[Batch]],
        packed: bool = False,
        room: int | None = None,
    ):
        self.mixture, self.encode, self.collate_rows, self.packed = mixture, encode, collate_rows, packed
        self.room = room

    @one_thread()
    def __getitem__(self, planned: PlannedBatch) -> list[Batch]:
        began = time.perf_counter()
        dropped: list[Dropped] = []
        rows = []
        for draws in planned.rows:
            rows.append(self._packed_row(draws, dropped) if self.packed else [self._good(draws[0], dropped)])
        parts = self.collate_rows(rows)
        for part in parts:
            part.epoch, part.position, part.following = planned.epoch, planned.position, planned.position
        parts[0].dropped, parts[-1].following = dropped, planned.following
        parts[0].seconds = time.perf_counter() - began
        return parts

    def _packed_row(self, draws: tuple[Draw, ...], dropped: list[Dropped]) -> list[EncodedSample]:
        samples: list[EncodedSample] = []
        for draw in draws:
            sample = self._load(draw, dropped)
            if sample is None:
                continue
            used = sum(map(len, samples)) + len(sample)
            if self.room is not None and used > self.room:
                name = self.mixture.sources[draw.dataset].name
                reason = f"{name}, sample {sample.id!r} (row {draw.row}): longer than when its packed row was planned"
                dropped.append(Dropped(name, draw.row, sample.id, reason, "changed"))
                continue
            samples.append(sample)
        return samples or [self._good(draws[0], dropped, first_attempt=1)]

    def _load(self, draw: Draw, dropped: list[Dropped]) -> EncodedSample | None:
        source = self.mixture.sources[draw.dataset]
        identity, kind = str(draw.row), "cannot be read"
        try:
            sample = source[draw.row]
            identity, kind = sample.id, "cannot be encoded"
            with blamed_on(source.where(draw.row, sample.id)):
                return self.encode(sample)
        except (DataError, AlignmentError) as error:
            kind = "placeholders and images differ" if isinstance(error, AlignmentError) else kind
            dropped.append(Dropped(source.name, draw.row, identity, str(error), kind))
            return None

    def _good(self, draw: Draw, dropped: list[Dropped], first_attempt: int = 0) -> EncodedSample:
        for attempt in range(first_attempt, _MAX_ATTEMPTS):
            sample = self._load(self.mixture.substitute(draw, attempt) if attempt else draw, dropped)
            if sample is not None:
                return sample
        source = self.mixture.sources[draw.dataset]
        path = str(source.spec.path or "")  # the command takes that, or the name of a dataset that is listed
        checked = path if path and "$" not in path else source.name
        raise DataError(
            f"{source.name}: {_MAX_ATTEMPTS} samples one after another cannot be used; run `mllm data check {checked}`. "
            f"The last: {dropped[-1].reason}"
        )


class DropLog:
    """Counts and names the samples that were dropped: one warning each (the first ``shown``), all in a jsonl file."""

    def __init__(self, path: Path | str | None = None, *, shown: int = 20):
        self.path, self.shown = Path(path) if path else None, shown
        self.counts: Counter[str] = Counter()
        self.kinds: dict[str, Counter[str]] = {}
        """Dataset → how often for which kind of reason."""

    def __call__(self, dropped: Iterable[Dropped]) -> None:
        for item in dropped:
            self.counts[item.dataset] += 1
            self.kinds.setdefault(item.dataset, Counter())[item.kind] += 1
            if sum(self.counts.values()) <= self.shown:
                _log.warning("dropped: %s", item.reason)
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(item._asdict(), ensure_ascii=False) + "\n")


def dropped_rows(folder: Path, stage: str) -> dict[str, Counter[str]]:
    """Dataset → kind → different rows, of all that the processes' `DropLog` files of a stage hold."""
    rows: dict[tuple[str, int, str], str] = {}
    for path in sorted(folder.glob(f"{stage}-*.jsonl")):
        if not path.stem.removeprefix(f"{stage}-").isdigit():
            continue  # another stage's, whose name begins alike
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a line cut short by a kill
                item = json.loads(line)
                rows[item["dataset"], item["row"], item.get("shard", "")] = item.get("kind") or "cannot be used"
    found: dict[str, Counter[str]] = {}
    for (name, _, _), kind in rows.items():
        found.setdefault(name, Counter())[kind] += 1
    return found


class BadShare:
    """Ends a run in which too many samples cannot be used: what is trained on would no longer be the data.

    share: what part of a dataset's samples may be bad, of those tried so far by all processes, of at least 100 (so that a few
    bad rows end no short run). Raises `DataError` with the counts, the last reason and the cure.
    """

    _FEWEST = 100

    def __init__(self, share: float):
        self.share = share
        self.good: Counter[str] = Counter()
        self.bad: Counter[str] = Counter()
        self._last: dict[str, Dropped] = {}

    def count(self, batches: Iterable[Batch], datasets: Sequence[str]) -> dict[str, float]:
        """What these batches of one process hold: ``good/NAME`` and ``bad/NAME`` of every dataset, to be summed over the
        processes and given to `add`."""
        found = {f"{kind}/{name}": 0.0 for name in datasets for kind in ("good", "bad")}
        for batch in batches:
            for name in batch.datasets:
                found[f"good/{name}"] += 1
            for item in batch.dropped:
                found[f"bad/{item.dataset}"] += 1
                self._last[item.dataset] = item
        return found

    def add(self, counts: Mapping[str, float]) -> None:
        """Take the sums of `count` over all processes in. Raises `DataError`, on every process alike."""
        for key, number in counts.items():
            kind, _, name = key.partition("/")
            if kind in ("good", "bad"):
                (self.good if kind == "good" else self.bad)[name] += round(number)
        for name, number in self.bad.items():
            if number and counts.get(f"bad/{name}"):
                last = [self._last[name]] if name in self._last else []
                self.check(name, last, self.good[name] + number, number=number)

    def check(self, dataset: str, bad: Sequence[Dropped], tried: int, *, number: int | None = None) -> None:
        """Raises `DataError` for too many of one dataset. number: how many were bad in all; default: ``bad``'s."""
        number = len(bad) if number is None else number
        if number > self.share * max(tried, self._FEWEST):
            last = f"The last: {bad[-1].reason}" if bad else "Other processes met them"
            raise DataError(
                f"{dataset}: {number} of the {tried} samples tried so far cannot be used, more than max_bad_share "
                f"{self.share:g} allows. {last}. See all with `mllm data check`; then mend them, leave "
                "them out with --write-quarantine, or raise the stage's max_bad_share"
            )


class _PlanSampler(Sampler):
    def __init__(self, plan: Plan, rank: int, start: Position):
        self.plan, self.rank, self.start = plan, rank, start

    def __iter__(self) -> Iterator[PlannedBatch]:
        return self.plan.batches(self.rank, self.start)


class DataStream:
    """One process's batches, from any position: ``for batch in stream``; ``batch.following`` is where to start again. max_tokens: a
    padded batch of more (padding included) comes as several.

    `state_dict` tells the place after the last batch handed out (not after what workers have prefetched);
    `load_state_dict` continues there, also with another number of workers, and approximately with another number of
    processes.
    """

    def __init__(
        self,
        plan: Plan,
        encode: Callable[[Sample], EncodedSample],
        *,
        pad_token_id: int,
        rank: int = 0,
        num_workers: int = 0,
        padding_side: Any = "right",
        pad_to_multiple_of: int | None = None,
        max_tokens: int | None = None,
        pin_memory: bool = False,
        prefetch_factor: int = 4,
        on_drop: Callable[[list[Dropped]], None] | None = None,
    ):
        self.plan, self.rank, self.num_workers = plan, rank, num_workers
        self.pin_memory, self.prefetch_factor = pin_memory, prefetch_factor
        self.on_drop = on_drop if on_drop is not None else DropLog()
        room = plan.max_length if isinstance(plan, PackedPlan) else None
        if isinstance(plan, PackedPlan):
            rows: Any = partial(_collate_packed, max_length=plan.max_length, pad_token_id=pad_token_id)
        else:
            rows = partial(
                _collate_single,
                pad_token_id=pad_token_id,
                padding_side=padding_side,
                pad_to_multiple_of=pad_to_multiple_of,
                max_tokens=max_tokens,
            )
        self.dataset = PlannedDataset(
            plan.mixture, encode, collate_rows=rows, packed=isinstance(plan, PackedPlan), room=room
        )
        self.position = Position()

    def __iter__(self) -> Iterator[Batch]:
        loader = DataLoader(
            self.dataset,
            sampler=_PlanSampler(self.plan, self.rank, self.position),
            batch_size=None,
            num_workers=self.num_workers,
            worker_init_fn=outlive_the_step if self.num_workers else None,
            pin_memory=self.pin_memory,
            prefetch_factor=self.prefetch_factor if self.num_workers else None,
            # Training processes that were spawned themselves would spawn workers too, and pickle whole datasets for it.
            multiprocessing_context=pool_context() if self.num_workers else None,
            # Without a generator of its own, iter(DataLoader) draws from torch's global one and a resumed run's dropout
            # differs from the uninterrupted run's.
            generator=torch.Generator().manual_seed(0),
        )
        for batch in chain.from_iterable(loader):
            self.position = batch.following
            if batch.dropped:
                self.on_drop(batch.dropped)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        plan = self.plan
        sizes = {"window_size": plan.window_size, "rows_per_step": plan.rows_per_step}
        return {"position": self.position.as_dict(), **sizes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        position = Position.from_dict(state["position"])
        sizes = {name: int(state[name]) for name in ("window_size", "rows_per_step")}
        self.position = self.plan.resume(position, **sizes)


def _collate_single(
    rows: list[list[EncodedSample]], *, max_tokens: int | None, pad_to_multiple_of: int | None, **options: Any
) -> list[Batch]:
    samples = [row[0] for row in rows]
    parts = [samples] if max_tokens is None else split_by_tokens(samples, max_tokens, pad_to_multiple_of or 1)
    return [collate(part, pad_to_multiple_of=pad_to_multiple_of, **options) for part in parts]


def _collate_packed(rows: list[list[EncodedSample]], **options: Any) -> list[Batch]:
    return [collate_packed(rows, **options)]
