"""Is each encoder worth its cost: what happens to the score without it, and what does it cost?

Masking an encoder of a trained model is not training without it; the two rank encoders differently (arXiv 2606.03879).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mllm.errors import ConfigError, DataError
from mllm.eval.data.loading import load_data
from mllm.eval.generators.hf import HFGenerator
from mllm.eval.metrics.base import Mean
from mllm.eval.predictions import PredictionWriter, header_path, prediction_path
from mllm.eval.report.results import TaskResult
from mllm.eval.report.statistics import Comparison, holm
from mllm.eval.run import evaluate, run_header
from mllm.eval.studies.compare import compare_predictions
from mllm.eval.task import TaskSpec, load_tasks
from mllm.modes import by_umask
from mllm.types import VisionFeatures

if TYPE_CHECKING:
    from mllm.models.modeling_mllm import MllmForConditionalGeneration
    from mllm.processing.processor import MllmProcessor

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
        self.gathering = True
        self.pool: list[Tensor] = []
        self.keys: list[str] = []
        self.seconds: list[float] = []
        self.num_images = 0
        self._started = 0.0
        self._handles = [encoder.register_forward_pre_hook(self._before), encoder.register_forward_hook(self._after)]

    def _before(self, module: Any, arguments: Any) -> None:
        if self.gathering:
            _synchronise(arguments[0])
            self._started = time.perf_counter()

    def _after(self, module: Any, arguments: Any, output: VisionFeatures) -> VisionFeatures:
        pixels = arguments[0]
        if self.mode is not None:
            return replace(output, tokens=self._masked(pixels, output.tokens), prefix=None)
        if self.gathering:
            _synchronise(output.tokens)
            if len(pixels):
                self.seconds.append((time.perf_counter() - self._started) / len(pixels))
            self.num_images += len(pixels)
            for image, tokens in zip(pixels, output.tokens):
                if len(self.pool) < _POOL and (key := _key(image)) not in self.keys:
                    self.pool.append(tokens.detach().float().cpu())
                    self.keys.append(key)
        return output

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

    def state(self) -> dict[str, Any]:
        return {"keys": self.keys, "seconds": self.seconds, "num_images": self.num_images}

    def restore(self, state: Mapping[str, Any], pool: list[Tensor]) -> None:
        self.keys, self.seconds, self.num_images = list(state["keys"]), list(state["seconds"]), state["num_images"]
        self.pool = pool

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class _Masked(HFGenerator):
    """The same model under another name, so that its answers are not taken for the intact model's."""

    masking = ""

    def fingerprint(self) -> str:
        return f"{super().fingerprint()}{self.masking}"


def ablate(
    model: MllmForConditionalGeneration,
    processor: MllmProcessor,
    tasks: Sequence[str],
    output_dir: str | Path,
    *,
    encoders: Sequence[str] | None = None,
    modes: Sequence[Mode] = MODES,
    limit: int | None = None,
    batch_size: int = 8,
    data: Mapping[str, str | Path] | None = None,
    seed: int = 0,
    resume: bool = True,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
) -> Ablation:
    """Evaluate the model intact, then with each encoder (or expert) masked in each way; paired comparisons on the
    same samples.

    drop: features are zeros; shuffle: those of another picture of the benchmark; mean: the mean over its pictures,
    position by position. resume: keep the answers that stand in ``output_dir``; only an intact task that was cut short
    is asked again whole, since the encoders' features are gathered while it runs. say: told what comes next. Raises
    `ConfigError` for an unknown encoder or mode, and for answers of another model, data or setting in the folder.
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
    specs = load_tasks(tasks)
    with _probes({name: bank.encoders[name] for name in bank.encoders}) as probes:
        num_runs, run = 1 + len(names) * len(modes), 1
        tell(f"[1/{num_runs}] intact")
        intact = _intact(generator, specs, folder / "intact", probes, resume, common)
        for probe in probes.values():
            probe.gathering = False
        effects = []
        for name in names:
            for mode in modes:
                run += 1
                tell(f"[{run}/{num_runs}] {name}: {mode}")
                place = folder / f"{name}-{mode}"
                probes[name].mode, generator.masking = mode, f":{name}={mode}{_pool_name(probes[name], mode)}"
                for spec in specs:
                    kept = resume and _made_by(generator, prediction_path(place, spec.name))
                    evaluate(generator, [spec], place, resume=kept, **common)
                for entry in compare_predictions(folder / "intact", place, seed=seed):
                    effects.append(
                        Effect(name, mode, entry.task, entry.metric, entry.value_a, entry.value_b, entry.comparison)
                    )
            probes[name].mode = None
        costs = [_cost(probes[name], bank, max(probe.num_images for probe in probes.values())) for name in names]
    adjusted = holm([effect.comparison.p_value for effect in effects])
    effects = [replace(effect, adjusted=p) for effect, p in zip(effects, adjusted)]
    return Ablation(effects, costs, {task: routing_by_category(Path(result.path)) for task, result in intact.items()})


def _intact(
    generator: _Masked,
    specs: Sequence[TaskSpec],
    folder: Path,
    probes: Mapping[str, _Probe],
    resume: bool,
    common: Mapping[str, Any],
) -> dict[str, TaskResult]:
    """The intact run, task by task; what the probes gathered is kept beside the predictions of each finished task."""
    results: dict[str, TaskResult] = {}
    history: list[Any] = []
    for spec in specs:
        loaded = load_data(spec, data=common["data"], limit=common["limit"])
        header = run_header(generator, loaded, spec.build_metrics(), None)
        path = prediction_path(folder, spec.name)
        if resume:
            with PredictionWriter(path, header):
                pass  # refuses answers of another run
        history = [*history, header["identity"], _digest([item.id for item in loaded.items])]
        gathered = path.with_suffix(".probes.safetensors")
        finished = resume and _restore(gathered, probes, history)
        if not finished:
            gathered.unlink(missing_ok=True)
        results |= evaluate(generator, [spec], folder, resume=finished, **common)
        if not finished:
            _keep(gathered, probes, history)
    return results


def _keep(path: Path, probes: Mapping[str, _Probe], history: Sequence[Any]) -> None:
    """Write what the probes gathered, whole or not at all."""
    from safetensors.torch import save_file

    tensors = {f"{name}.{k}": t.contiguous() for name, probe in probes.items() for k, t in enumerate(probe.pool)}
    states = {name: probe.state() for name, probe in probes.items()}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    save_file(tensors, part, {"history": _digest(history), "probes": json.dumps(states)})
    by_umask(part)
    part.replace(path)


def _restore(path: Path, probes: Mapping[str, _Probe], history: Sequence[Any]) -> bool:
    """Give the probes what they gathered before; False when nothing was kept of the same tasks, model and samples."""
    from safetensors import safe_open

    if not path.is_file():
        return False
    with safe_open(path, "pt") as stored:
        about = stored.metadata()
        states = json.loads(about["probes"])
        if about["history"] != _digest(history) or set(states) != set(probes):
            return False
        for name, state in states.items():
            probes[name].restore(state, [stored.get_tensor(f"{name}.{k}") for k in range(len(state["keys"]))])
    return True


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def _pool_name(probe: _Probe, mode: Mode) -> str:
    """Answers that hang on other pictures' features are named after those pictures."""
    return "" if mode == "drop" else f":{_digest(probe.keys)}"


def _made_by(generator: _Masked, path: Path) -> bool:
    """Whether the predictions at ``path`` are this model's, masked with the same pictures."""
    try:
        before = json.loads(header_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return before.get("identity", {}).get("model") == generator.fingerprint()


def encoder_bank(model: MllmForConditionalGeneration) -> Any:
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
    pixels = torch.zeros(1, info.image.channels, info.image.height, info.image.width, **kind)
    # the counter does not know every fused attention kernel; the plain one it does
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        probe.encoder(pixels)
    return counter.get_total_flops() / 1e9


def routing_by_category(path: Path) -> dict[str, dict[str, float]]:
    """Category → expert → mean routing weight over a prediction file; empty for a model without a router."""
    from mllm.eval.predictions import iterate_predictions

    sums: dict[str, dict[str, Mean]] = {}
    for row in iterate_predictions(path):
        if row.get("routing"):
            means = sums.setdefault(str(row.get("category") or "all"), {})
            for name, weight in row["routing"].items():
                means.setdefault(name, Mean()).append(weight)
    return {category: {name: mean.value for name, mean in means.items()} for category, means in sums.items()}


def _key(image: Tensor) -> str:
    return hashlib.sha256(image.detach().float().cpu().numpy().tobytes()).hexdigest()


def _synchronise(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
