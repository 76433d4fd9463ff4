"""How are the two best codes of many positions found without writing the scores to memory?

A Triton kernel: a program holds some positions, walks over a part of the codes, and keeps the best two scores of each position. Imported
where it runs alone, by `mllm.visual_tokenizers.quantizers.search`.
"""

# Triton compiles this function's source and knows plain names only, no postponed annotations.

import triton
import triton.language as tl


@triton.jit
def best_two_kernel(
    z, table, bias, ids, scores, num_positions, num_codes, part,
    DIM: tl.constexpr, WIDTH: tl.constexpr, POSITIONS: tl.constexpr, CODES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Best two of codes ``part * program_id(1)`` onwards, for each position: ids and scores ``(M, 2 · parts)``."""
    rows = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    channels = tl.arange(0, WIDTH)
    own = tl.load(
        z + rows[:, None] * DIM + channels[None, :],
        mask=(rows[:, None] < num_positions) & (channels[None, :] < DIM),
        other=0.0,
    )
    best = tl.full([POSITIONS], float("-inf"), tl.float32)
    next_best = tl.full([POSITIONS], float("-inf"), tl.float32)
    best_id = tl.zeros([POSITIONS], tl.int32)
    next_id = tl.zeros([POSITIONS], tl.int32)
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, num_codes)
    for start in range(begin, end, CODES):
        codes = start + tl.arange(0, CODES)
        there = codes < end
        entries = tl.load(
            table + codes[None, :] * DIM + channels[:, None], mask=there[None, :] & (channels[:, None] < DIM), other=0.0
        )
        found = tl.dot(own, entries, input_precision=PRECISION)
        found += tl.load(bias + codes, mask=there, other=float("-inf"))[None, :]
        top, place = tl.max(found, 1, return_indices=True)
        rest = tl.where(codes[None, :] - start == place[:, None], float("-inf"), found)
        second, second_place = tl.max(rest, 1, return_indices=True)
        better = top > best
        # The smaller of the two best is the second best, unless this block's second one, or the one of before, is.
        runner = tl.where(better, best, top)
        runner_id = tl.where(better, best_id, start + place)
        other = tl.where(better, second, next_best)
        other_id = tl.where(better, start + second_place, next_id)
        keep = tl.where(better, runner >= other, runner > other)  # of equal scores the code that stands first
        next_best = tl.where(keep, runner, other)
        next_id = tl.where(keep, runner_id, other_id)
        best = tl.where(better, top, best)
        best_id = tl.where(better, start + place, best_id)
    parts = tl.num_programs(1)
    at = rows * (2 * parts) + 2 * tl.program_id(1)
    inside = rows < num_positions
    tl.store(ids + at, best_id, mask=inside)
    tl.store(ids + at + 1, next_id, mask=inside)
    tl.store(scores + at, best, mask=inside)
    tl.store(scores + at + 1, next_best, mask=inside)
