"""How is a visual tokenizer trained?"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from mllm import distributed
from mllm.config import to_plain
from mllm.damage import naming_damage
from mllm.errors import CheckpointError, ConfigError
from mllm.odd_settings import interval_problems, schedule_problems
from mllm.threads import one_thread
from mllm.visual_tokenizers.base import VisualTokenizer, build_tokenizer
from mllm.visual_tokenizers.images import augment, load_images, to_pixels
from mllm.visual_tokenizers.losses import TokenizerLosses
from mllm.visual_tokenizers.optimise import (
    average_gradients,
    broadcast_state,
    build_optimizer,
    choose_parameters,
    epoch_order,
    rate_factor,
    step_seed,
    update_average,
)
from mllm.visual_tokenizers.quantizers.initialise import initialise_codebooks
from mllm.visual_tokenizers.recipe import TokenizerRecipe, load_tokenizer_recipe
from mllm.visual_tokenizers.teacher import build_teacher

STATE_FILE, RECIPE_FILE, LOG_FILE = "training_state.pt", "recipe.yaml", "metrics.jsonl"
KEEP_CHECKPOINTS = 2


def train_tokenizer(
    recipe_path: str | Path, overrides: list[str] | None = None, resume: bool = False
) -> dict[str, Any]:
    """Train the tokenizer of a recipe and save it in ``<output>/final``; returns the last evaluation.

    Under ``torchrun`` every process takes its own share of each batch. resume: go on from the newest checkpoint in the
    output folder; the result is the one an uninterrupted run gives.
    """
    recipe = load_tokenizer_recipe(recipe_path, overrides)
    device = torch.device(recipe.device) if recipe.device is not None else distributed.local_device()
    with distributed.process_group(device=device):
        run = TokenizerRun(recipe, device)
        if resume:
            run.load_checkpoint()
        elif distributed.is_main() and any(recipe.output_dir.glob("step-*")):
            raise ConfigError(f"{recipe.output_dir} holds a run; go on with resume, or choose another output")
        # On a GPU the CPU's part is small operations; on the CPU they need the cores.
        with one_thread() if device.type == "cuda" else contextlib.nullcontext():
            run.fit()
            return run.finish()


def odd_tokenizer_settings(recipe: TokenizerRecipe, epoch: int) -> list[str]:
    """One line for each combination of settings that cannot have been meant. epoch: whole steps in one pass over the images."""
    adversarial = recipe.losses.adversarial
    every: dict[str, tuple[int | None, str]] = {
        "save_every": (recipe.save_every, "no checkpoint is written on the way"),
        "log_every": (recipe.log_every, "only the last step is logged"),
        "evaluate_every": (recipe.evaluate_every, "it is evaluated at its end only"),
        "losses.adversarial.start": (adversarial.start if adversarial else None, "the discriminator never joins in"),
    }
    found = schedule_problems(recipe.schedule, recipe.steps) + interval_problems(every, recipe.steps)
    if epoch == 0:
        found.append(f"batch_size {recipe.batch_size}: one step over all processes is more than all training images")
    return found


class TokenizerRun:
    """One training run: everything that a step touches, and what a checkpoint holds."""

    def __init__(self, recipe: TokenizerRecipe, device: torch.device):
        self.recipe, self.device = recipe, device
        self.rank = distributed.rank()
        self.ranks = distributed.world_size()
        torch.manual_seed(recipe.seed)
        self.tokenizer = _initial_tokenizer(recipe).to(device).train()
        size = self.tokenizer.image.height
        self.images, self.held_out = (load_images(recipe.images, size, split) for split in ("train", "held_out"))
        if recipe.kmeans:
            picks = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(recipe.seed))[
                : recipe.kmeans
            ]
            initialise_codebooks(self.tokenizer, self._pixels(picks.tolist()), recipe.batch_size, seed=recipe.seed)
        broadcast_state(self.tokenizer)
        self.losses = TokenizerLosses(recipe, self.tokenizer, self._teacher()).to(device)
        if self.losses.discriminator is not None:
            broadcast_state(self.losses.discriminator)
        self.parameters = choose_parameters(self.tokenizer, recipe)
        self.optimizer = build_optimizer(recipe.optimizer, list(self.parameters.values()), recipe.rate)
        self.judge_optimizer = self._judge_optimizer()
        self.average = {k: v.detach().clone() for k, v in self.tokenizer.state_dict().items()} if recipe.ema else None
        self.step = 0
        self._reader = ThreadPoolExecutor(1)
        self._ahead: tuple[int, Future[Tensor]] | None = None

    def _teacher(self) -> nn.Module | None:
        spec, recipe = self.recipe.teacher, self.recipe
        if spec is None:
            return None
        # Rank 0 first: a supervised teacher is trained once and read by the others.
        teacher = None
        for turn in (True, False):
            if (self.rank == 0) == turn:
                teacher = build_teacher(
                    spec, self.tokenizer, self.images, seed=recipe.seed, directory=recipe.output_dir
                )
            if self.ranks > 1:
                distributed.barrier()
        return teacher

    def _judge_optimizer(self) -> torch.optim.Optimizer | None:
        spec = self.recipe.losses.adversarial
        if self.losses.discriminator is None or spec is None:
            return None
        parameters = list(self.losses.discriminator.parameters())
        return torch.optim.AdamW(parameters, lr=spec.rate or self.recipe.rate, betas=spec.betas, weight_decay=0.0)

    def _pixels(self, indices: list[int]) -> Tensor:
        return to_pixels(self.images.batch(indices), self.device)

    def _read(self, step: int) -> Tensor:
        recipe = self.recipe
        first = (step * self.ranks + self.rank) * recipe.batch_size
        order = [epoch_order(len(self.images), recipe.seed, i) for i in range(first, first + recipe.batch_size)]
        return self.images.batch(order)

    def batch(self, step: int) -> Tensor:
        """This rank's images of a step; the next step's are read meanwhile. The order follows from the seed alone, so a
        resumed run sees the same images."""
        if self._ahead is not None and self._ahead[0] == step:
            images = self._ahead[1].result()
        else:
            images = self._read(step)
        more = step + 1 < self.recipe.steps
        self._ahead = (step + 1, self._reader.submit(self._read, step + 1)) if more else None
        generator = torch.Generator().manual_seed(step_seed(self.recipe.seed, step, self.rank))
        return augment(to_pixels(images, self.device), self.recipe.images, generator)

    def train_step(self) -> dict[str, float]:
        """One update of the tokenizer, and of the discriminator where it is on; returns the named losses."""
        recipe = self.recipe
        # Seeded per step: noise and dropped scales do not depend on where a run was interrupted.
        torch.manual_seed(step_seed(recipe.seed, self.step, self.rank) + 1)
        factor = rate_factor(recipe.schedule, self.step, recipe.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate * factor
        pixels = self.batch(self.step)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16"):
            output = self.tokenizer(pixels)
            named, total = self.losses(output, pixels, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = self._update(self.optimizer, list(self.parameters.values()))
        logged = {**named, "total": total, "gradient_norm": norm, **output.usage}
        if self.judge_optimizer is not None and self.losses.adversarial_is_on(self.step):
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16"):
                loss = self.losses.discriminator_loss(output.reconstruction.detach(), pixels)
            self.judge_optimizer.zero_grad(set_to_none=True)
            loss.backward()
            assert self.losses.discriminator is not None
            self._update(self.judge_optimizer, list(self.losses.discriminator.parameters()))
            logged["discriminator"] = loss
        if self.average is not None:
            update_average(self.average, self.tokenizer, recipe.ema)
        self.step += 1
        return _as_numbers(logged)

    def _update(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> float:
        """Average gradients over ranks, clip, step; returns the gradient's norm before clipping."""
        average_gradients(parameters)
        limit = self.recipe.optimizer.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)
        if not torch.isfinite(norm):
            raise ConfigError(
                f"step {self.step}: the gradient is not finite; lower rate ({self.recipe.rate}) or use precision: fp32"
            )
        optimizer.step()
        return float(norm)

    def fit(self) -> None:
        """Train to the last step, with log lines, evaluations and checkpoints on the way."""
        recipe = self.recipe
        if self.rank == 0:
            recipe.output_dir.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(to_plain(recipe), sort_keys=False, allow_unicode=True)
            (recipe.output_dir / RECIPE_FILE).write_text(text, encoding="utf-8")
            for line in odd_tokenizer_settings(recipe, len(self.images) // (recipe.batch_size * self.ranks)):
                print(f"! {recipe.name}: {line}", file=sys.stderr)
        start = time.perf_counter()
        with progress(recipe.name, recipe.steps, self.step, shown=self.rank == 0) as advance:
            while self.step < recipe.steps:
                named = self.train_step()
                advance(named)
                last = self.step == recipe.steps
                if self.step % recipe.log_every == 0 or last:
                    self._log({"step": self.step, "seconds": round(time.perf_counter() - start, 2), **named})
                if recipe.evaluate_every and self.step % recipe.evaluate_every == 0 and not last:
                    self._log({"step": self.step, "evaluation": self.evaluate(recipe.evaluate_images)})
                if recipe.save_every and self.step % recipe.save_every == 0:
                    self.save_checkpoint()

    def _log(self, line: dict[str, Any]) -> None:
        if self.rank == 0:
            with (self.recipe.output_dir / LOG_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    @contextlib.contextmanager
    def averaged(self) -> Iterator[VisualTokenizer]:
        """The tokenizer in evaluation mode, with the averaged weights in place where they are kept."""
        kept = None
        if self.average is not None:
            kept = {k: v.detach().clone() for k, v in self.tokenizer.state_dict().items()}
            self.tokenizer.load_state_dict(self.average)
        try:
            yield self.tokenizer.eval()
        finally:
            if kept is not None:
                self.tokenizer.load_state_dict(kept)
            self.tokenizer.train()

    def evaluate(self, limit: int | None = None) -> dict[str, Any]:
        """Held-out scores (`mllm.visual_tokenizers.evaluate`)."""
        from mllm.visual_tokenizers.evaluate import evaluate_tokenizer

        with self.averaged() as tokenizer:
            return evaluate_tokenizer(tokenizer, self.held_out, batch_size=self.recipe.batch_size, limit=limit)

    def finish(self) -> dict[str, Any]:
        """Save the final tokenizer, its evaluation and a picture; every rank returns the evaluation."""
        from mllm.visual_tokenizers.evaluate import comparison_grid

        result = self.evaluate()
        if self.rank == 0:
            output = self.recipe.output_dir
            with self.averaged() as tokenizer:
                tokenizer.save_pretrained(output / "final")
                number = min(8, len(self.held_out))
                picks = [round(i * (len(self.held_out) - 1) / max(1, number - 1)) for i in range(number)]
                comparison_grid(tokenizer, to_pixels(self.held_out.batch(picks), self.device)).save(output / "grid.png")
            (output / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            self._log({"step": self.step, "evaluation": result})
        if self.ranks > 1:
            distributed.barrier()
        return result

    def save_checkpoint(self) -> None:
        """Write ``step-N`` (complete or not at all) and drop all but the newest ones."""
        if self.rank == 0:
            output = self.recipe.output_dir
            folder, part = output / f"step-{self.step}", output / f".step-{self.step}.part"
            shutil.rmtree(part, ignore_errors=True)
            self.tokenizer.save_pretrained(part)
            state = {
                "step": self.step,
                "optimizer": self.optimizer.state_dict(),
                "average": self.average,
                "discriminator": None if self.losses.discriminator is None else self.losses.discriminator.state_dict(),
                "judge_optimizer": None if self.judge_optimizer is None else self.judge_optimizer.state_dict(),
            }
            torch.save(state, part / STATE_FILE)
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
            for old in checkpoints(output)[:-KEEP_CHECKPOINTS]:
                shutil.rmtree(old)
        if self.ranks > 1:
            distributed.barrier()

    def load_checkpoint(self) -> None:
        """Continue from the newest checkpoint of the output folder. Raises `CheckpointError` when there is none."""
        found = checkpoints(self.recipe.output_dir)
        if not found:
            raise CheckpointError(f"{self.recipe.output_dir}: no step-N checkpoint to resume from (set save_every)")
        self.tokenizer.load_state_dict(VisualTokenizer.from_pretrained(found[-1]).state_dict())
        with naming_damage(found[-1]):
            state = torch.load(found[-1] / STATE_FILE, map_location=self.device, weights_only=True)
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            if state["average"] is None:
                raise CheckpointError(f"{found[-1]} has no averaged weights; it was trained with ema: 0")
            self.average = state["average"]
        if self.losses.discriminator is not None and self.judge_optimizer is not None:
            if state["discriminator"] is None:
                raise CheckpointError(f"{found[-1]} has no discriminator; it was trained without losses.adversarial")
            self.losses.discriminator.load_state_dict(state["discriminator"])
            self.judge_optimizer.load_state_dict(state["judge_optimizer"])


def _as_numbers(logged: dict[str, Tensor | float]) -> dict[str, float]:
    """Scalars as Python numbers, all tensors fetched from the device at once."""
    tensors = {key: value.detach().double() for key, value in logged.items() if isinstance(value, Tensor)}
    fetched = dict(zip(tensors, torch.stack(list(tensors.values())).tolist())) if tensors else {}
    return {key: fetched[key] if key in fetched else float(value) for key, value in logged.items()}


def _initial_tokenizer(recipe: TokenizerRecipe) -> VisualTokenizer:
    """Built from the config, with its parts' published weights, or from a saved one (``init``)."""
    tokenizer = build_tokenizer(recipe.tokenizer)
    if recipe.init is None:
        tokenizer.load_pretrained()
        return tokenizer
    skipped = tuple(recipe.init_skip)
    source = VisualTokenizer.from_pretrained(recipe.init).state_dict()
    taken = {key: value for key, value in source.items() if not (skipped and key.startswith(skipped))}
    own = tokenizer.state_dict()
    wrong = [key for key, value in taken.items() if key not in own or own[key].shape != value.shape]
    absent = [key for key in own if key not in taken and not (skipped and key.startswith(skipped))]
    if wrong or absent:
        shown = ", ".join([*wrong, *absent][:4])
        raise CheckpointError(f"init {recipe.init}: weights do not fit ({shown} …); name what changed in init_skip")
    tokenizer.load_state_dict(taken, strict=False)
    return tokenizer


def checkpoints(output: Path) -> list[Path]:
    """``step-N`` folders, oldest first."""
    found = [path for path in output.glob("step-*") if (path / STATE_FILE).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


@contextlib.contextmanager
def progress(name: str, steps: int, done: int, *, shown: bool) -> Iterator[Any]:
    """A bar with the step, the losses and the time left, on a terminal; gives the function that moves it on."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        yield lambda named: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=steps, completed=done, text="")

        def advance(named: dict[str, float]) -> None:
            keys = [k for k in ("l1", "l2", "semantic/tokens") if k in named]
            text = " ".join(f"{k} {named[k]:.4f}" for k in keys)
            bar.update(task, advance=1, text=text)

        yield advance
