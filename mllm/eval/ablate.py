"""Is each encoder worth its cost: what happens to the score without it, and what does it cost?

Masking an encoder of a trained model is not training without it; the two rank encoders differently (arXiv 2606.03879).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mllm.errors import ConfigError, DataError
from mllm.eval.compare import compare_predictions
from mllm.eval.generators.hf import HFGenerator
from mllm.eval.runner import evaluate
from mllm.eval.statistics import Comparison, holm
from mllm.types import VisionFeatures

Mode = Literal["drop", "shuffle", "mean"]
MODES: tuple[Mode, ...] = ("drop", "shuffle", "mean")
WARNING = "Masking is not retraining: a model trained without an encoder learns to do without it (arXiv 2606.03879)."
_POOL = 64
_TOKENS_FOR_RANK = 4096


@dataclass(frozen=True)
class EncoderCost:
    """What one encoder costs and gives, per image. milliseconds: median forward time on this machine; gflops: counted
    on one image (multiply and add are two); effective_rank: exp of the entropy of its features' normalised singular
    values (Roy & Vetterli 2007), out of ``width``, before the connector."""

    encoder: str
    milliseconds: float
    gflops: float
    effective_rank: float
    width: int
    share_of_images: float


@dataclass(frozen=True)
class Effect:
    """One encoder masked one way, on one task: masked score minus intact score, in display units. adjusted: p value
    after Holm over every encoder, mode and task of the ablation."""

    encoder: str
    mode: Mode
    task: str
    metric: str
    intact: float
    masked: float
    comparison: Comparison
    adjusted: float = float("nan")


@dataclass(frozen=True)
class Ablation:
    """effects: per encoder, mode and task. routing: task → category → expert → mean weight, for a model with a
    router."""

    effects: list[Effect]
    costs: list[EncoderCost]
    routing: dict[str, dict[str, dict[str, float]]]
    warning: str = WARNING


class _Probe:
    """Hooks on one encoder: collects features and timings, and masks its output when told how."""

    def __init__(self, name: str, encoder: torch.nn.Module):
        self.name, self.encoder = name, encoder
        self.mode: Mode | None = None
        self.pool: list[Tensor] = []
        self.keys: list[str] = []
        self.seconds: list[float] = []
        self.num_images = 0
        self._started = 0.0
        self._handles = [encoder.register_forward_pre_hook(self._before), encoder.register_forward_hook(self._after)]

    def _before(self, module: Any, arguments: Any) -> None:
        if self.mode is None:
            _synchronise(arguments[0])
            self._started = time.perf_counter()

    def _after(self, module: Any, arguments: Any, output: VisionFeatures) -> VisionFeatures:
        pixels = arguments[0]
        if self.mode is None:
            _synchronise(output.tokens)
            if len(pixels):
                self.seconds.append((time.perf_counter() - self._started) / len(pixels))
            self.num_images += len(pixels)
            for image, tokens in zip(pixels, output.tokens):
                if len(self.pool) < _POOL and (key := _key(image)) not in self.keys:
                    self.pool.append(tokens.detach().float().cpu())
                    self.keys.append(key)
            return output
        return replace(output, tokens=self._masked(pixels, output.tokens), prefix=None)

    def _masked(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        if self.mode == "drop" or not len(tokens):
            return torch.zeros_like(tokens)
        if self.mode == "mean":
            return torch.stack(self.pool).mean(0).to(tokens).expand_as(tokens).clone()
        return torch.stack([self._other(_key(image)) for image in pixels]).to(tokens)

    def _other(self, key: str) -> Tensor:
        """Features of another picture of the pool, the same one whenever this picture comes."""
        if len(self.pool) < 2:
            raise DataError(f"encoder {self.name}: shuffling needs at least two different pictures in the benchmark")
        place = int(key[:12], 16) % len(self.pool)
        return self.pool[(place + 1) % len(self.pool) if self.keys[place] == key else place]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class _Masked(HFGenerator):
    """The same model under another name, so that its answers are not taken for the intact model's."""

    masking = ""

    def fingerprint(self) -> str:
        return f"{super().fingerprint()}{self.masking}"


def ablate(
    model: Any,
    processor: Any,
    tasks: Sequence[str],
    output_dir: str | Path,
    *,
    encoders: Sequence[str] | None = None,
    modes: Sequence[Mode] = MODES,
    limit: int | None = None,
    batch_size: int = 8,
    data: Mapping[str, str | Path] | None = None,
    seed: int = 0,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
) -> Ablation:
    """Evaluate the model intact, then with each encoder (or expert) masked in each way; paired comparisons on the
    same samples.

    drop: features are zeros; shuffle: those of another picture of the benchmark; mean: the mean over its pictures,
    position by position. say: told what comes next. Raises `ConfigError` for an unknown encoder or mode.
    """
    bank = encoder_bank(model)
    names = list(encoders or bank.encoders)
    if unknown := [name for name in names if name not in bank.encoders]:
        raise ConfigError(f"encoder {unknown[0]!r}: the model has {', '.join(bank.encoders)}")
    if wrong := [mode for mode in modes if mode not in MODES]:
        raise ConfigError(f"mode {wrong[0]!r}: expected one of {', '.join(MODES)}")
    folder = Path(output_dir)
    generator = _Masked(model, processor, batch_size=batch_size)
    tell = say or (lambda text: None)
    common: dict[str, Any] = {"limit": limit, "data": data, "progress": progress}
    with _probes({name: bank.encoders[name] for name in bank.encoders}) as probes:
        num_runs, run = 1 + len(names) * len(modes), 1
        tell(f"[1/{num_runs}] intact")
        intact = evaluate(generator, tasks, folder / "intact", resume=False, **common)
        effects = []
        for name in names:
            for mode in modes:
                run += 1
                tell(f"[{run}/{num_runs}] {name}: {mode}")
                probes[name].mode, generator.masking = mode, f":{name}={mode}"
                evaluate(generator, tasks, folder / f"{name}-{mode}", resume=False, **common)
                for entry in compare_predictions(folder / "intact", folder / f"{name}-{mode}", seed=seed):
                    effects.append(
                        Effect(name, mode, entry.task, entry.metric, entry.value_a, entry.value_b, entry.comparison)
                    )
            probes[name].mode = None
        costs = [_cost(probes[name], bank, max(probe.num_images for probe in probes.values())) for name in names]
    adjusted = holm([effect.comparison.p_value for effect in effects])
    effects = [replace(effect, adjusted=p) for effect, p in zip(effects, adjusted)]
    return Ablation(effects, costs, {task: routing_by_category(Path(result.path)) for task, result in intact.items()})


def encoder_bank(model: Any) -> Any:
    """The part of the model that holds its named encoders. Raises `ConfigError` for a model that has none."""
    bank = getattr(getattr(model, "model", model), "vision_tower", None)
    if bank is None or not hasattr(bank, "encoders"):
        raise ConfigError(
            f"{type(model).__name__} has no named encoders to mask; ablation works on this toolkit's models"
        )
    return bank


@contextmanager
def _probes(encoders: Mapping[str, torch.nn.Module]) -> Iterator[dict[str, _Probe]]:
    probes = {name: _Probe(name, encoder) for name, encoder in encoders.items()}
    try:
        yield probes
    finally:
        for probe in probes.values():
            probe.remove()


def _cost(probe: _Probe, bank: Any, num_images: int) -> EncoderCost:
    info = bank.infos[probe.name]
    times = sorted(probe.seconds)
    rank = effective_rank(torch.cat(probe.pool)) if probe.pool else float("nan")
    median = 1000 * times[len(times) // 2] if times else float("nan")
    gflops = _gflops(probe, info)
    return EncoderCost(probe.name, median, gflops, rank, info.width, probe.num_images / max(num_images, 1))


def effective_rank(features: Tensor) -> float:
    """exp(entropy) of the normalised singular values of centred features ``(tokens, D)``: between 1 and D."""
    rows = features[torch.linspace(0, len(features) - 1, min(len(features), _TOKENS_FOR_RANK)).long()].double()
    values = torch.linalg.svdvals(rows - rows.mean(0))
    shares = values[values > 0] / values.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def _gflops(probe: _Probe, info: Any) -> float:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    parameter = next(probe.encoder.parameters(), None)
    kind = {"dtype": parameter.dtype, "device": parameter.device} if parameter is not None else {}
    pixels = torch.zeros(1, 3, info.image.height, info.image.width, **kind)
    counted = probe.num_images, list(probe.seconds), list(probe.pool), list(probe.keys)
    # the counter does not know every fused attention kernel; the plain one it does
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        probe.encoder(pixels)
    probe.num_images, probe.seconds, probe.pool, probe.keys = counted
    return counter.get_total_flops() / 1e9


def routing_by_category(path: Path) -> dict[str, dict[str, float]]:
    """Category → expert → mean routing weight over a prediction file; empty for a model without a router."""
    from mllm.eval.predictions import read_predictions

    groups: dict[str, list[dict[str, float]]] = {}
    for row in read_predictions(path):
        if row.get("routing"):
            groups.setdefault(str(row.get("category") or "all"), []).append(row["routing"])
    return {
        category: {name: sum(weights[name] for weights in rows) / len(rows) for name in rows[0]}
        for category, rows in groups.items()
    }


def _key(image: Tensor) -> str:
    return hashlib.sha256(image.detach().float().cpu().numpy().tobytes()).hexdigest()


def _synchronise(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
