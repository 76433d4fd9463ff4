"""Which experts does a model run on a batch: limits, routing by the language model itself, and the record of what was chosen."""

# transformers' and torch's own annotations (FloatTensor outputs, Tensor | Module attributes) do not fit their documented use.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mllm.errors import AlignmentError, ConfigError
from mllm.heads.base import MultimodalModel
from mllm.processing.chat import render_prompt
from mllm.processing.layout import IMAGE_SIZES
from mllm.processing.protocol import TextTokenizer
from mllm.routers.fixed import fixed_weights_of
from mllm.routers.language_model import RoutingAnswer, pool_routing_tokens
from mllm.types import IMAGE_MARK, Grid, Routing, Turn, ViewLayout

ANSWER_TOKENS = 16


def routing_probabilities(routing: Routing) -> Tensor:
    """``(B, E)`` fp32: what the router thinks of each expert before selection; the weights where there are no logits."""
    if routing.logits is not None:
        return routing.logits.detach().float().softmax(dim=-1)
    return routing.weights.detach().float()


def limit_routing(
    routing: Routing, *, budget: int | None = None, threshold: float | None = None, fixed: Tensor | None = None
) -> Routing:
    """The same routing with at most ``budget`` experts per image, and none whose probability is below ``threshold``; what
    remains shares the weight. Rows that are ``fixed`` ``(B,)`` by hand stay as they are. No experts at all is legal."""
    if budget is None and threshold is None:
        return routing
    weights, probabilities = routing.weights, routing_probabilities(routing)
    kept = weights > 0
    if threshold is not None:
        kept = kept & (probabilities >= threshold)
    if budget is not None and budget < weights.shape[-1]:
        order = probabilities.masked_fill(~kept, -1.0).argsort(dim=-1, descending=True, stable=True)
        kept = kept & (order.argsort(dim=-1) < budget)
    limited = torch.where(kept, weights, 0.0)
    limited = limited / limited.sum(dim=-1, keepdim=True).clamp_min(1e-12)
    if fixed is not None:
        limited = torch.where(fixed.to(limited.device)[:, None], weights, limited)
    return Routing(routing.experts, limited, routing.logits, routing.losses)


def routing_records(
    routing: Routing | None, images_per_sample: Sequence[int]
) -> list[tuple[dict[str, float], list[str]] | None]:
    """For each sample of a batch: expert → probability (mean over the sample's images), and the experts that ran on any of
    them; None for a sample without images or a model without router."""
    if routing is None:
        return [None] * len(images_per_sample)
    probabilities, ran = routing_probabilities(routing).cpu(), routing.weights.detach().gt(0).cpu()
    if sum(images_per_sample) != len(ran):
        raise AlignmentError(f"routing of {len(ran)} images for samples with {sum(images_per_sample)} images")
    records: list[tuple[dict[str, float], list[str]] | None] = []
    for part, used in zip(probabilities.split(list(images_per_sample)), ran.split(list(images_per_sample))):
        if not len(part):
            records.append(None)
            continue
        means = (round(value, 6) for value in part.mean(dim=0).tolist())
        chosen = [name for name, any_image in zip(routing.experts, used.any(dim=0).tolist()) if any_image]
        records.append((dict(zip(routing.experts, means)), chosen))
    return records


# Training ------------------------------------------------------------------------------------------------------------


def routing_loss_of_step(
    model: MultimodalModel, routing: Routing, targets: Tensor | None, labels: Tensor, num_items: Tensor | float | None
) -> Tensor:
    """The router's own losses and, with ``targets`` ``(B, E)``, its supervised loss, as a part of one optimizer step.

    They are means over images, while the language model's loss is a sum divided by the step's supervised tokens ``num_items``
    (None: this batch is the step). They count by this batch's share of those, so that more processes or micro-batches do not
    make them weigh more.
    """
    total = sum(routing.losses.values(), torch.zeros((), device=routing.weights.device))
    if targets is not None:
        router = model.model.vision_tower.router
        if not hasattr(router, "supervised_loss"):
            raise ConfigError(f"routing_targets were given, but a {router.name} router cannot be trained on them")
        total = total + router.supervised_loss(routing, targets.to(routing.weights.device))
    if num_items is None:
        return total
    return total * (labels[:, 1:].ne(-100).sum().to(total) / num_items)


def ask_gate(model: MultimodalModel, pixels: Mapping[str, Tensor], questions: Tensor | None) -> Routing:
    """The router's choice for B images from the always-on encoders and the questions alone: no expert and no language model
    runs, and the experts' pixels are not needed."""
    bank = model.model.vision_tower
    return bank.route(bank.encode_base(pixels), model.model.question_summary(questions))


# Generation ----------------------------------------------------------------------------------------------------------


def check_choices(pool: Sequence[str], experts: Any, budget: int | None, threshold: float | None) -> None:
    """Raise `ConfigError` for settings of ``generate`` that a model with these experts cannot follow."""
    given = {"experts": experts, "expert_budget": budget, "expert_threshold": threshold}
    names = [name for name, value in given.items() if value is not None]
    if names and not pool:
        raise ConfigError(f"{names[0]} was given, but this model has no router; it always runs all its encoders")
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or not 0 <= budget <= len(pool)):
        raise ConfigError(
            f"expert_budget is {budget!r}; expected 0 to {len(pool)}, the number of experts ({', '.join(pool)})"
        )
    if threshold is not None and not 0 <= threshold <= 1:
        raise ConfigError(f"expert_threshold is {threshold!r}; expected a probability from 0 to 1")


@torch.no_grad()
def encode_for_generation(
    model: MultimodalModel,
    inputs: dict[str, Any],
    *,
    experts: Any = None,
    expert_budget: int | None = None,
    expert_threshold: float | None = None,
    tokenizer: TextTokenizer | None = None,
) -> tuple[dict[str, Any], Routing]:
    """Route and encode the images of ``generate``'s inputs once, whatever the number of beams and steps.

    Returns the inputs with ``image_features`` in place of pixels and routing, and the routing. Raises `ConfigError` when a
    ``language_model`` router must decide and there is no tokenizer to read its answer with.
    """
    body, bank = model.model, model.model.vision_tower
    inputs = dict(inputs)
    pixels, sizes = body.pixel_keys.pop(inputs), inputs.get(IMAGE_SIZES)
    weights, questions = inputs.pop("expert_weights", None), inputs.pop("router_input_ids", None)
    count = len(next(iter(pixels.values()))) if sizes is None else len(sizes)
    if experts is not None:
        weights = fixed_weights_of(experts, bank.experts, count)
    base = bank.encode_base(pixels, body.visual_layouts(sizes))
    fixed = None if weights is None else ~weights.isnan().any(dim=-1)
    if bank.router.asks_language_model and (fixed is None or not fixed.all()):
        routing, _ = ask_language_model(model, pixels, base, questions, tokenizer)
        routing = limit_routing(routing, budget=expert_budget)
        decided = routing.weights
        weights = (
            decided
            if weights is None
            else torch.where(weights.isnan().to(decided.device), decided, weights.to(decided))
        )
        expert_budget = expert_threshold = None
    tokens, routing = body.encode_images(
        pixels,
        expert_weights=weights,
        router_input_ids=questions,
        image_sizes=sizes,
        base=base,
        expert_budget=expert_budget,
        expert_threshold=expert_threshold,
    )
    inputs["image_features"] = tokens
    return inputs, routing


# The language model as router ----------------------------------------------------------------------------------------


def routing_grid(layout: ViewLayout, router: Any) -> Grid:
    """Rows and columns that an image's visual tokens are averaged to in the routing pass: the router's ``grid``, or half
    the model's own (MoVA: 24×24 → 12×12)."""
    if router.config.grid is not None:
        return router.config.grid
    rows, cols = layout.grid
    return max(1, rows // 2), max(1, cols // 2)


def short_image(tokens: Tensor, layout: ViewLayout, grid: Grid) -> Tensor:
    """Visual tokens ``(B, M, L)`` averaged to ``(B, rows * cols, L)``; row separators are left out."""
    rows, cols = layout.grid
    if layout.row_separators:
        tokens = tokens.unflatten(1, (rows, cols + 1))[:, :, :cols].flatten(1, 2)
    return pool_routing_tokens(tokens, layout.grid, grid)


def encode_short(
    model: MultimodalModel,
    pixels: Mapping[str, Tensor],
    questions: Tensor | None = None,
    base: Mapping[str, Any] | None = None,
) -> Tensor:
    """Visual tokens of the routing pass: no expert runs, the image is short. Gradients pass."""
    body = model.model
    bank, text = body.vision_tower, body.question_summary(questions)
    base = bank.encode_base(pixels) if base is None else base
    count = len(next(iter(base.values())).tokens)  # pyright: ignore[reportOptionalMemberAccess]
    none = Routing(bank.experts, torch.zeros(count, len(bank.experts), device=next(iter(base.values())).tokens.device))  # pyright: ignore[reportOptionalMemberAccess]
    layout = body.rules.view
    tokens = body.connect(dict(base), none, text)  # pyright: ignore[reportArgumentType, reportCallIssue]
    tokens = tokens.view(count, layout.num_tokens, tokens.shape[-1])
    return short_image(tokens, layout, routing_grid(layout, bank.router))


def routing_text(
    tokenizer: TextTokenizer,
    router: Any,
    question: str,
    image_token: str,
    num_tokens: int,
    answer: str | None = None,
) -> str:
    """The routing request as the model reads it: chat template, short image, pool and question; with ``answer``, the whole
    conversation to learn from."""
    turns = [Turn("user", f"{IMAGE_MARK}\n{router.prompt(question)}")]
    if answer is not None:
        turns.append(Turn("assistant", answer))
    text = render_prompt(_Template(tokenizer), turns, add_generation_prompt=answer is None)
    return text.replace(image_token, image_token * num_tokens)


class _Template:
    """What `render_prompt` needs of a processor, from a tokenizer that carries the chat template."""

    def __init__(self, tokenizer: TextTokenizer):
        self.tokenizer, self.chat_template = tokenizer, tokenizer.chat_template


@torch.no_grad()
def ask_language_model(
    model: MultimodalModel,
    pixels: Mapping[str, Tensor],
    base: Mapping[str, Any],
    questions: Tensor | None,
    tokenizer: TextTokenizer | None,
) -> tuple[Routing, list[RoutingAnswer]]:
    """First of two passes (MoVA, arXiv 2404.13046): the language model names experts by letter, seeing a short image of
    the always-on encoders' features ``base`` and the question.

    questions ``(B, T)``: token ids padded with -1, one row per image. An answer that cannot be read runs no expert and is in
    the second result with its ``error``.
    """
    router = model.model.vision_tower.router
    if tokenizer is None:
        raise ConfigError(
            "this model's language model routes by answering in letters: pass tokenizer=processor.tokenizer to generate, or fix "
            "the routing with experts=[…]"
        )
    if not base:
        raise ConfigError(
            "router language_model: every encoder is an expert, so the first pass sees nothing; keep one out of experts"
        )
    images = encode_short(model, pixels, questions, base)
    if questions is None:
        texts = [""] * len(images)
    else:
        texts = [tokenizer.decode([i for i in row if i >= 0], skip_special_tokens=True) for row in questions.tolist()]
    image_token = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    prompts = [routing_text(tokenizer, router, text, image_token, images.shape[1]) for text in texts]
    encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    longest = max(len(row) for row in encoded)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in encoded], device=images.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in encoded], device=images.device)
    output = model.generate_text(
        input_ids=ids,
        attention_mask=mask,
        image_features=images,
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=pad,
    )
    answers = [tokenizer.decode(row[longest:], skip_special_tokens=True).strip() for row in output]
    return router.decide(answers, device=images.device)
