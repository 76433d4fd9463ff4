"""Which private parts of DeepSpeed do we reach into, and what for? All of them are here; whoever moves them is told at the start."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mllm.errors import UnavailableError
from mllm.models.pipeline import EncoderBank

_OF_OPTIMIZER = {
    # How ZeRO-1/2 lay parameters end to end and cut them: checkpoints are written by parameter, not by slice.
    1: (
        "round_robin_bit16_groups",
        "round_robin_bit16_offsets",
        "single_partition_of_fp32_groups",
        "partition_size",
        # How they are told of a gradient that is there, and of the end of a backward pass: `GradientOrder`.
        "process_gradients",
        "independent_gradient_partition_epilogue",
        "partition_gradients",
        "overlap_comm",
        "is_gradient_accumulation_boundary",
    ),
    3: (
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "parameter_offload",
        # How they bring what lies on NVMe into memory, and back.
        "_swappable_optimizer_subgroup",
        "_optimizer_states_and_gradient_swap_in",
        "_optimizer_states_and_gradient_swap_out",
        "_release_swap_buffers",
    ),
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
            f"DeepSpeed {deepspeed.__version__} keeps ZeRO-{zero_stage}'s slices elsewhere ({', '.join(missing)} is gone), so "
            "gradients could be mixed up and no checkpoint written; install the version in constraints.txt, or use engine: none"
        )


def slices(zero: Any, zero_stage: int, rank: int, *, changed: bool = False) -> Iterator[Slice]:
    """This process's slices of all learning parameters, each good until the next is asked for. changed: write back what was on disk."""
    return _slices_of_three(zero, rank, changed) if zero_stage == 3 else _slices_of_one_and_two(zero, rank)


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


def _slices_of_three(zero: Any, rank: int, changed: bool) -> Iterator[Slice]:
    """ZeRO-3 gives each process one equal slice of every parameter, and lays those end to end."""
    for index, (parameters, flat) in enumerate(zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat)):
        with _in_memory(zero, index, changed):
            offset = 0
            for parameter in parameters:
                size = parameter.partition_numel()
                start = rank * size
                length = min(size, parameter.ds_numel - start)
                if length > 0:
                    yield Slice(parameter, start, length, offset, flat)
                offset += size


@contextmanager
def _in_memory(zero: Any, index: int, changed: bool) -> Iterator[None]:
    """While entered, a group's weights and states that lie on NVMe are in memory."""
    on_disk = zero._swappable_optimizer_subgroup(index)
    if on_disk:
        zero._optimizer_states_and_gradient_swap_in(index)
    yield
    if on_disk and changed:
        zero._optimizer_states_and_gradient_swap_out(index)
    elif on_disk:
        zero._release_swap_buffers(index)


def leave_shared_memory_op(deepspeed: Any) -> None:
    """On a CPU DeepSpeed would build its shared-memory communication op at the first start, minutes of it; gloo does
    without."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class GradientOrder:
    """Lets ZeRO-1/2 sum the gradients of ``parameters`` in one order on all processes, from the last one's on.

    DeepSpeed lays gradients end to end as a backward pass makes them, and sums what lies at the same place over processes. Where a
    process's batch goes another way through the model (a head without targets, an expert that nobody asked), its gradients come in another
    order, and one parameter's would be added to another's without a word. So each waits for those before it; most come in this order.
    """

    def __init__(self, zero: Any, parameters: Sequence[Tensor]):
        self._zero, self._order = zero, list(reversed(parameters))
        self._groups = {id(p): index for index, group in enumerate(zero.bit16_groups) for p in group}
        self._arrived: set[int] = set()
        self._next = 0
        self._process, self._end = zero.process_gradients, zero.independent_gradient_partition_epilogue
        zero.process_gradients = self._told
        zero.independent_gradient_partition_epilogue = self._ended

    def _told(self, parameter: Tensor, group: int) -> None:
        zero = self._zero
        summed = zero.partition_gradients or (zero.overlap_comm and zero.is_gradient_accumulation_boundary())
        if not summed:
            self._process(parameter, group)
            return
        self._arrived.add(id(parameter))
        while self._next < len(self._order) and id(self._order[self._next]) in self._arrived:
            self._sum_next()

    def _ended(self) -> None:
        if self._arrived:
            while self._next < len(self._order):  # one that nothing reached here has a gradient elsewhere, perhaps
                parameter = self._order[self._next]
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                self._sum_next()
        self._arrived, self._next = set(), 0
        self._end()

    def _sum_next(self) -> None:
        parameter = self._order[self._next]
        self._next += 1
        self._process(parameter, self._groups[id(parameter)])


class KeptWhole:
    """Frozen encoders that ZeRO-3 leaves whole on every process: it meets a model without them.

    It cuts every parameter that a model has at the start, lets go of all of them before each update, and looks through those of coming
    modules when it lets one go. The encoders are out of the model at these moments, and in it whenever it runs.

    Args:
        model: whose encoders that do not learn stay whole; None: of none.
    """

    def __init__(self, model: nn.Module | None):
        banks = [module for module in model.modules() if isinstance(module, EncoderBank)] if model is not None else []
        frozen = {
            (bank, name): encoder
            for bank in banks
            for name, encoder in bank.encoders.items()
            if not any(p.requires_grad for p in encoder.parameters())
        }
        self.encoders: dict[tuple[EncoderBank, str], nn.Module] = frozen

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """The model has none of them inside; their places and order stay."""
        for bank, name in self.encoders:
            bank.encoders[name] = nn.Identity()
        try:
            yield
        finally:
            for (bank, name), encoder in self.encoders.items():
                bank.encoders[name] = encoder

    def stay_with(self, zero: Any, device: torch.device) -> None:
        """Move them to the device, where the rest is, and keep them from ZeRO-3's optimizer."""
        if not self.encoders:
            return
        for encoder in self.encoders.values():
            encoder.to(device)
        offload = zero.parameter_offload
        offload.partition_all_parameters = self._without(offload.partition_all_parameters)
        coordinator = offload.get_param_coordinator()
        coordinator.release_sub_module = self._without(coordinator.release_sub_module)

    def _without(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def hidden(*args: Any, **options: Any) -> Any:
            with self.hidden():
                return function(*args, **options)

        return hidden
