"""How do the two requests of a guided drawing stay together in vLLM? A scheduler that starts both in one step, or neither,
and keeps the memory that both will need."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from mllm.serve.images.requests import pair_of

PATIENCE = 10.0
"""Seconds that half a pair waits for the other half (an engine of its own, a client that went away in between)."""
FIRST = -(2**31)
"""Priority of pairs, where vLLM schedules by priority: below any other."""
STARTABLE = (RequestStatus.WAITING, RequestStatus.PREEMPTED)


class PairScheduler(Scheduler):
    """vLLM's scheduler, in which a guided drawing's two requests run in the same steps from the first to the last.

    They arrive one after the other, and the engine may begin a step in between: the first is held until the second is
    there, and both until one step has room for them: two seats, the tokens of both prompts, and memory. vLLM takes memory
    back from the last of the requests that run, so pairs are put before all others, and no more of them run than the
    memory holds to their ends, which are known. Requests that came before a pair start before it; those that came after
    wait for it, or a busy server would never draw. A pair that is too large for the engine runs alone and comes apart,
    which `mllm.serve.vllm.logits_processor.DrawingProcessor` notices.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._halves: dict[str, tuple[Any, float]] = {}
        self._pairs: list[tuple[Any, Any]] = []
        self._preempted: list[Any] = []
        # The attribute that says how many requests may run at once: newer versions tell it from the runner's slots.
        self._seats = "max_num_active_reqs" if hasattr(self, "max_num_active_reqs") else "max_num_running_reqs"
        self._block_sizes = [group.kv_cache_spec.block_size for group in self.kv_cache_config.kv_cache_groups]

    def add_request(self, request: Any) -> None:
        super().add_request(request)
        pair = pair_of(request.sampling_params)
        if pair is None:
            return
        self._unqueue([request])
        request.priority = FIRST
        if pair in self._halves:
            self._pairs.append((self._halves.pop(pair)[0], request))
        else:
            self._halves[pair] = (request, time.monotonic())

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self._take_back()
        if self._pause_state != PauseState.UNPAUSED or not (self._pairs or self._halves):
            return super().schedule(*args, **kwargs)
        late = [pair for pair, (_, since) in self._halves.items() if time.monotonic() - since > PATIENCE]
        for pair in late:
            self.waiting.add_request(self._halves.pop(pair)[0])  # the processor ends it: it is alone
        earlier = self._earlier()
        entering = [] if earlier else self.admit()
        seats = getattr(self, self._seats)
        if self._pairs:  # seats and memory that become free are kept for them
            setattr(self, self._seats, min(seats, len(self.running) + earlier + 2 * len(entering)))
        try:
            return super().schedule(*args, **kwargs)
        finally:
            setattr(self, self._seats, seats)
            if entering:
                self.running.sort(key=lambda request: pair_of(request.sampling_params) is None)
                self._hold([pair for pair in entering if all(request.status in STARTABLE for request in pair)])

    def admit(self) -> list[tuple[Any, Any]]:
        """Put pairs ahead of everything else that waits, while seats, tokens and blocks of this step last, and blocks for
        all that pairs will yet write; returns them."""
        seats = getattr(self, self._seats) - len(self.running)
        tokens = self.max_num_scheduled_tokens
        free = self.kv_cache_manager.block_pool.get_num_free_blocks() - self.kv_cache_manager.watermark_blocks
        reserve = self.kv_cache_config.num_blocks - 1  # vLLM keeps one
        for request in self.running:
            tokens -= request.num_tokens_with_spec - request.num_computed_tokens
            owned = self.kv_cache_manager.get_blocks(request.request_id).blocks
            free -= self._blocks(request.num_tokens_with_spec, [len(blocks) for blocks in owned])
            if pair_of(request.sampling_params) is not None:
                reserve -= self._blocks(request.num_prompt_tokens + request.max_tokens)
        entering: list[tuple[Any, Any]] = []
        while self._pairs:
            pair = self._pairs[0]
            needed = sum(request.num_tokens for request in pair)
            written = sum(self._blocks(request.num_tokens) for request in pair)
            kept = sum(self._blocks(request.num_prompt_tokens + request.max_tokens) for request in pair)
            fits = seats >= 2 and tokens >= needed and free >= written and reserve >= kept
            if not fits and (self.running or entering):  # else nothing will ever be freer than that
                break
            entering.append(self._pairs.pop(0))
            seats, tokens, free, reserve = seats - 2, tokens - needed, free - written, reserve - kept
        front = getattr(self, "skipped_waiting", None) or self.waiting  # 0.26 starts those it has skipped first
        for request in reversed([request for pair in entering for request in pair]):
            front.prepend_request(request)
        return entering

    def _blocks(self, num_tokens: int, owned: list[int] | None = None) -> int:
        """KV blocks that so many tokens of a request need at most, besides those it has."""
        have = owned or [0] * len(self._block_sizes)
        return sum(
            max(0, -(-num_tokens // size) - number) for size, number in zip(self._block_sizes, have, strict=True)
        )

    def _earlier(self) -> int:
        """Requests that wait, could start, and were there before the first pair."""
        if not self._pairs:
            return 0
        since = self._pairs[0][1].arrival_time
        return sum(request.status in STARTABLE and request.arrival_time < since for request in self.waiting)

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        if pair_of(request.sampling_params) is not None:
            self._preempted.append(request)

    def _take_back(self) -> None:
        """Pairs of which both were preempted, as when the cache is emptied under running requests, wait as pairs again."""
        halves: dict[str | None, list[Any]] = {}
        for request in self._preempted:
            if request.status == RequestStatus.PREEMPTED:
                halves.setdefault(pair_of(request.sampling_params), []).append(request)
        self._preempted.clear()
        self._hold([(pair[0], pair[1]) for pair in halves.values() if len(pair) == 2])

    def _hold(self, pairs: list[tuple[Any, Any]]) -> None:
        """Take pairs out of vLLM's queues, to be the next that are admitted."""
        self._unqueue([request for pair in pairs for request in pair])
        self._pairs[:0] = pairs

    def _unqueue(self, requests: list[Any]) -> None:
        for name in ("waiting", "skipped_waiting"):
            if getattr(self, name, None):
                getattr(self, name).remove_requests(requests)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> Any:
        finished = super().finish_requests(request_ids, finished_status)
        self._halves = {pair: half for pair, half in self._halves.items() if not half[0].is_finished()}
        for pair in [pair for pair in self._pairs if any(request.is_finished() for request in pair)]:
            self._pairs.remove(pair)
            for request in pair:
                if not request.is_finished():
                    self.waiting.add_request(request)
        return finished

    def get_num_unfinished_requests(self) -> int:
        held = len(self._halves) + 2 * len(self._pairs) if self._pause_state == PauseState.UNPAUSED else 0
        return super().get_num_unfinished_requests() + held
