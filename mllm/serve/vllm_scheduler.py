"""How do the two requests of a guided drawing stay together in vLLM? A scheduler that starts both in one step, or neither."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from mllm.serve.drawing import pair_of

PATIENCE = 10.0
"""Seconds that half a pair waits for the other half (an engine of its own, a client that went away in between)."""


class PairScheduler(Scheduler):
    """vLLM's scheduler, in which a guided drawing's two requests enter the running batch in the same step.

    They arrive one after the other, and the engine may begin a step in between: the first is held until the second is
    there, and both until the batch has two free seats (other requests wait meanwhile, or a busy server would never draw).
    Both prompts must fit into one step too. What happens later, a preemption for want of memory,
    is noticed by `mllm.serve.vllm_drawing.DrawingProcessor`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._halves: dict[str, tuple[Any, float]] = {}
        self._pairs: list[tuple[Any, Any]] = []
        # The attribute that says how many requests may run at once: newer versions tell it from the runner's slots.
        self._seats = "max_num_active_reqs" if hasattr(self, "max_num_active_reqs") else "max_num_running_reqs"

    def add_request(self, request: Any) -> None:
        pair = pair_of(request.sampling_params)
        if pair is None:
            super().add_request(request)
        elif pair in self._halves:
            self._pairs.append((self._halves.pop(pair)[0], request))
        else:
            self._halves[pair] = (request, time.monotonic())

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        late = [pair for pair, (_, since) in self._halves.items() if time.monotonic() - since > PATIENCE]
        for pair in late:
            super().add_request(self._halves.pop(pair)[0])  # the processor ends it: it is alone
        entering = self.admit()
        if not self._pairs:
            return super().schedule(*args, **kwargs)
        # Seats that become free are kept, so that two are free soon.
        seats = getattr(self, self._seats)
        setattr(self, self._seats, min(seats, len(self.running) + entering))
        try:
            return super().schedule(*args, **kwargs)
        finally:
            setattr(self, self._seats, seats)

    def admit(self) -> int:
        """Put pairs ahead of everything else that waits, while seats and tokens of this step last; how many requests that
        are."""
        seats = getattr(self, self._seats) - len(self.running)
        tokens = self.max_num_scheduled_tokens - len(self.running)
        entering = []
        while self._pairs:
            needed = sum(request.num_tokens for request in self._pairs[0])
            alone = not self.running and not entering  # nothing will ever be freer than that
            if not alone and (seats < 2 or tokens < min(needed, self.max_num_scheduled_tokens)):
                break
            entering += self._pairs.pop(0)
            seats, tokens = seats - 2, tokens - needed
        for request in reversed(entering):
            super().add_request(request)
            self.waiting.remove_requests([request])
            self.waiting.prepend_request(request)
        return len(entering)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> Any:
        ids = {request_ids} if isinstance(request_ids, str) else None if request_ids is None else set(request_ids)
        gone = lambda request: ids is None or request.request_id in ids  # noqa: E731
        self._halves = {pair: half for pair, half in self._halves.items() if not gone(half[0])}
        for first, second in [pair for pair in self._pairs if gone(pair[0]) or gone(pair[1])]:
            self._pairs.remove((first, second))
            for request in (first, second):
                if not gone(request):
                    super().add_request(request)
        return super().finish_requests(request_ids if ids is None else list(ids), finished_status)

    def get_num_unfinished_requests(self) -> int:
        return super().get_num_unfinished_requests() + len(self._halves) + 2 * len(self._pairs)
