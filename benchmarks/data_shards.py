"""How fast do shards open and how much memory does reading them take, whatever the number of rows?

For each number of rows: the time to open the data set and to have its first batch, and the process's memory after as many batches as asked
for, beside what it was before the data set was opened. Rows are jsonl lines without pictures, in shards of 100,000; the largest set is
written once under --folder. Text alone, so that the figures are those of the reader and not of decoding.

    python benchmarks/data_shards.py [--rows 10000 100000 1000000 10000000] [--batches 300] [--folder FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

os.environ.setdefault("OMP_NUM_THREADS", "1")

PER_SHARD = 100_000
BATCH = 16


def write(folder: Path, rows: int) -> None:
    """Shards of so many rows in all; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(-(-rows // PER_SHARD)):
        path = folder / f"rows-{shard:05d}.jsonl"
        if path.is_file():
            continue
        with path.open("w", encoding="utf-8") as file:
            for row in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
                turns = [
                    {"role": "user", "content": f"What is {row}?"},
                    {"role": "assistant", "content": f"A number, {row}."},
                ]
                file.write(json.dumps({"id": row, "messages": turns}) + "\n")


def resident() -> float:
    """This process's memory, MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(folder: str, rows: int, batches: int, into: Any) -> None:
    """Figures of one size, in a process of its own."""
    import torch

    from mllm.data.mixture import Mixture
    from mllm.data.shards.stream import ShardStream
    from mllm.processing.chat import EncodedSample

    torch.set_num_threads(1)

    def encode(sample: Any) -> EncodedSample:
        ids = torch.tensor([ord(letter) % 256 for turn in sample.turns for letter in turn.content])
        return EncodedSample(sample.id, sample.dataset, ids, ids.clone(), {}, {}, num_images=0)

    def stream(total: int) -> ShardStream:
        last = -(-total // PER_SHARD) - 1
        path = f"file://{folder}/rows-{{00000..{last:05d}}}.jsonl"
        mixture = Mixture({"name": "rows", "format": "messages", "path": path, "rows": total})
        return ShardStream(mixture, encode, batch_size=BATCH, pad_token_id=0)

    next(iter(stream(PER_SHARD)))  # imports and the first allocations count for no size
    before, start = resident(), time.perf_counter()
    one = stream(rows)
    opened = time.perf_counter() - start
    iterator = iter(one)
    next(iterator)
    first = time.perf_counter() - start
    start = time.perf_counter()
    count = sum(len(batch.ids) for batch in islice(iterator, batches))
    rate = count / (time.perf_counter() - start)
    into.put(
        {
            "rows": rows,
            "open_s": round(opened, 3),
            "first_batch_s": round(first, 3),
            "rows_per_s": round(rate),
            "memory_mb": round(resident() - before, 1),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--batches", type=int, default=2000)
    parser.add_argument("--folder", help="where the shards are written and kept; default: a folder that is deleted")
    parser.add_argument("--json", help="write the figures there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary).resolve()
        write(folder, max(arguments.rows))
        figures = []
        context = multiprocessing.get_context("spawn")
        for rows in arguments.rows:
            into = context.Queue()
            process = context.Process(target=measure, args=(str(folder), rows, arguments.batches, into))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{rows:,} rows: the measuring process ended with {process.exitcode}")
            figures.append(into.get())
            print(
                "{rows:>12,} rows: open {open_s:.2f} s, first batch {first_batch_s:.2f} s, {rows_per_s:,} rows/s, "
                "{memory_mb:.0f} MB more than before".format(**figures[-1])
            )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
