"""Which private parts of DeepSpeed do we reach into, and what for? All of them are here; whoever moves them is told at the start."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mllm.errors import UnavailableError

_OF_OPTIMIZER = {
    # How ZeRO-1/2 lay parameters end to end and cut them: checkpoints are written by parameter, not by slice.
    1: ("round_robin_bit16_groups", "round_robin_bit16_offsets", "single_partition_of_fp32_groups", "partition_size"),
    3: ("fp16_groups", "fp32_partitioned_groups_flat"),
}
_OF_OPTIMIZER[2] = _OF_OPTIMIZER[1]
_OF_PARAMETER = {3: ("partition_numel", "ds_numel")}


@dataclass(frozen=True)
class Slice:
    """What this process holds of one parameter: elements ``start`` to ``start + length``, at ``offset`` of ``flat``."""

    parameter: Tensor
    start: int
    length: int
    offset: int
    flat: Tensor


def check_private(zero: Any, zero_stage: int) -> None:
    """Raises `UnavailableError` when this DeepSpeed's optimizer has not what is read of it: before anything is trained, not when
    the first checkpoint is due."""
    missing = [name for name in _OF_OPTIMIZER[zero_stage] if not hasattr(zero, name)]
    groups = getattr(zero, _OF_OPTIMIZER[zero_stage][0], None) or [[]]
    first = next((parameter for group in groups for parameter in group), None)
    if first is not None:
        missing += [name for name in _OF_PARAMETER.get(zero_stage, ()) if not hasattr(first, name)]
    if missing:
        import deepspeed

        raise UnavailableError(
            f"DeepSpeed {deepspeed.__version__} keeps ZeRO-{zero_stage}'s slices elsewhere ({', '.join(missing)} is gone), so no "
            "checkpoint could be written; install the version in constraints.txt, or use engine: none"
        )


def slices(zero: Any, zero_stage: int, rank: int) -> Iterator[Slice]:
    """This process's slices of all learning parameters."""
    return _slices_of_three(zero, rank) if zero_stage == 3 else _slices_of_one_and_two(zero, rank)


def _slices_of_one_and_two(zero: Any, rank: int) -> Iterator[Slice]:
    """ZeRO-1/2 lay a group's parameters end to end and give each process one equal slice of that."""
    for index, parameters in enumerate(zero.round_robin_bit16_groups):
        flat = zero.single_partition_of_fp32_groups[index]
        low = rank * int(zero.partition_size[index])
        high = low + int(zero.partition_size[index])
        for parameter, offset in zip(parameters, zero.round_robin_bit16_offsets[index]):
            begin, end = max(offset, low), min(offset + parameter.numel(), high)
            if begin < end:
                yield Slice(parameter, begin - offset, end - begin, begin - low, flat)


def _slices_of_three(zero: Any, rank: int) -> Iterator[Slice]:
    """ZeRO-3 gives each process one equal slice of every parameter, and lays those end to end."""
    for parameters, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat):
        offset = 0
        for parameter in parameters:
            size = parameter.partition_numel()
            start = rank * size
            length = min(size, parameter.ds_numel - start)
            if length > 0:
                yield Slice(parameter, start, length, offset, flat)
            offset += size


def leave_shared_memory_op(deepspeed: Any) -> None:
    """On a CPU DeepSpeed would build its shared-memory communication op at the first start, minutes of it; gloo does
    without."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
