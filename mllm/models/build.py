"""How is a model made from a recipe's model section?"""

# transformers' and torch's own annotations (FloatTensor outputs, Tensor | Module attributes) do not fit their documented use.

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import torch
from transformers import AutoTokenizer

from mllm import progress
from mllm.damage import naming_damage
from mllm.encoders.weights import default_dtype
from mllm.errors import CheckpointError, ConfigError, DataError, UnavailableError
from mllm.heads.base import Head, HeadParts
from mllm.heads.build import drawing_head, head_tokens, resolved_heads
from mllm.heads.codes.build import empty_tokenizer, tokenizer_settings, visual_span
from mllm.heads.geometry.build import geometry_spec
from mllm.heads.segmentation.build import segment_spec
from mllm.hub import hub_reason
from mllm.models.configuration_mllm import MllmConfig
from mllm.models.making import language_model_left_out, num_elements, reading_language_model, shapes
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.models.position_axes import checked_positions
from mllm.models.stops import set_stops
from mllm.models.text_check import check_inside
from mllm.models.text_part import decoder_of
from mllm.models.text_source import (
    begins_every_text,
    check_language_model,
    open_language_model,
    opened_by,
    text_config,
    trained_clip_rate,
)
from mllm.models.vocabulary import add_image_token, add_tokens, added_ids, give_padding, grow_vocabulary, num_token_ids
from mllm.models.weight_files import some_names
from mllm.processing.frames import video_spec
from mllm.processing.image_processor import MllmImageProcessor
from mllm.processing.processor import MllmProcessor
from mllm.processing.protocol import TextTokenizer
from mllm.processing.template import check_template, is_wrapped, read_template, unwrapped
from mllm.processing.views import VIEWS
from mllm.processing.views.base import views_config
from mllm.recipe import LanguageModelSpec, ModelSpec
from mllm.visual_tokenizers.reader import load_tokenizer_weights

_log = logging.getLogger(__name__)


def build_config(
    spec: ModelSpec, *, image_token_id: int | None = None, tokenizer: TextTokenizer | None = None
) -> MllmConfig:
    """The model's whole config. Needs no weights and, where the recipe states the language model's config, no network.

    Args:
        spec: the recipe's ``model`` section.
        image_token_id: id of the image placeholder (default: the first one past the vocabulary).
        tokenizer: the text tokenizer, for the ids of the heads' tokens (added to it where they are missing).

    Returns:
        The config that `MllmForConditionalGeneration` is built from.

    Raises:
        ConfigError: a grid does not fit a connector (the encoder is named), or parts do not go together.
        UnavailableError: the language model's config cannot be read.
    """
    from mllm.connectors.build import connector_config
    from mllm.connectors.deepstack import check_depths
    from mllm.encoders.series import encoder_configs
    from mllm.processing.layout import layout_rules

    encoders = encoder_configs(spec.encoders, where="model.encoders")
    connector = None if spec.connector is None else connector_config(spec.connector, where="model.connector")
    infos = {name: config.info for name, config in encoders.items() if config.info is not None}
    if connector is not None:
        rules = layout_rules(spec, infos)  # a misfit is told now, before anything is built
        try:
            rules.layout(rules.largest())
        except DataError as error:
            raise ConfigError(f"model.views.max_visual_tokens: {error}") from error
    router = dict(spec.router) if spec.router is not None else None
    if router is not None:
        for name in router.get("experts", []):
            if name not in encoders:
                raise ConfigError(
                    f"model.router.experts: {name!r} is no encoder of this model; it has {list(encoders)}"
                )
    if connector is not None:
        check_views(spec, encoders)
        for name, encoder in encoders.items():
            encoder.check_frames(0 if rules.video is None else rules.video.fewer.get(name, rules.video.most), name)
    text = text_config(spec.text_model)
    check_language_model(text)
    positions = checked_positions(text, spec.text_model.positions, spec.heads, spec.router)
    _check_clip_rate(spec, positions)
    if connector is not None and (rules.view.levels or rules.view.beside):
        if rules.view.levels:
            check_depths(rules.view.levels, encoders, text.num_hidden_layers)
        if drawing_head(spec.heads) is not None:
            raise ConfigError(
                f"model.connector: {connector.type} with parts inside the language model reads pictures only, beside no head that draws; "
                "use mlp or pixel_shuffle"
            )
    visual_tokenizer = tokenizer_settings(spec.visual_tokenizer, encoders)
    drawing = drawing_head(spec.heads) is not None and visual_tokenizer is not None
    drawn_by = empty_tokenizer(visual_tokenizer, encoders) if drawing and visual_tokenizer else None
    words = None if tokenizer is None else lambda said: tokenizer(said, add_special_tokens=False)["input_ids"]
    seen = None if connector is None else rules
    parts = HeadParts(text.hidden_size, infos, drawn_by, words, text.num_hidden_layers, seen)
    if tokenizer is not None:
        add_tokens(tokenizer, head_tokens(spec.heads, parts))
        give_padding(tokenizer)
    heads = resolved_heads(
        spec.heads,
        parts,
        id_of=None if tokenizer is None else tokenizer.convert_tokens_to_ids,
        first_free=text.vocab_size + 1,
        null=0 if tokenizer is None else tokenizer.pad_token_id,  # pyright: ignore[reportArgumentType]
    )
    return MllmConfig(
        text_config=text,
        encoders=encoders,
        connector=connector,
        views=_views_with_ids(spec.views, tokenizer, text.vocab_size + 1),
        video=video_spec(spec.video),
        router=router,
        visual_tokenizer=visual_tokenizer,
        heads=heads,
        image_token_id=text.vocab_size if image_token_id is None else image_token_id,
        lm_head_bias=check_inside(text),
        modality_switch=spec.text_model.modality_switch,
        positions=positions,
    )


def _check_clip_rate(spec: ModelSpec, positions: str | None) -> None:
    """Refuse positions in time where there are none, and warn where a language model was trained with others."""
    video = video_spec(spec.video)
    if video is None:
        return
    if video.positions_per_second is not None and positions != "grid":
        raise ConfigError(
            f"model.video.positions_per_second: {video.positions_per_second:g}, and this language model gives frames no position in time "
            "(see model.language_model.positions); leave it out"
        )
    if video.positions_per_second is None and video.stamp is None and positions == "grid":
        rate = trained_clip_rate(spec.text_model)
        if rate is not None:
            _log.warning(
                "model.video: %s was trained with %g positions a second between a clip's frames, and here frames are one apart; give "
                "positions_per_second: %g, unless you train it on other clips",
                spec.text_model.source,
                rate,
                rate,
            )


def _views_with_ids(value: Any, tokenizer: TextTokenizer | None, first_free: int) -> Any:
    """The views' config with the ids of the vocabulary's tokens that it writes (added where they are missing; made up where
    there is no tokenizer yet)."""
    if value is None:
        return None
    config = views_config(value)
    kind = VIEWS.get(config.type)
    names = list(kind.marks(config).values())
    if tokenizer is None:
        return kind.with_ids(config, lambda name: first_free + names.index(name))
    for name in names:
        add_image_token(tokenizer, name)
    return kind.with_ids(config, tokenizer.convert_tokens_to_ids)


def check_views(spec: ModelSpec, encoders: dict[str, Any]) -> None:
    """Refuse parts that take whole pictures only, where the model looks at them in several views.

    Args:
        spec: the recipe's ``model`` section.
        encoders: encoder name → config.

    Raises:
        ConfigError: naming the part and what to use instead.
    """
    views = views_config(spec.views)
    kind = VIEWS.get(views.type)
    if not kind.needs_size:
        return
    for name in kind.whole_only(views):
        if name not in encoders or name == next(iter(encoders)):
            what = "the first encoder, which sees all views" if name in encoders else "no encoder"
            raise ConfigError(f"model.views.thumbnail_only: {name!r} is {what}; the others are {list(encoders)[1:]}")
    if (spec.router or {}).get("type") == "language_model":
        raise ConfigError(
            f"model.views: a language_model router asks with whole pictures, not {views.type}; use {{type: gate}}, or leave "
            "views out"
        )
    if kind.native and spec.router is not None:
        raise ConfigError("model.router: experts take pictures of one size, not views native; leave one of the two out")
    codes = [name for name, config in encoders.items() if config.type == "visual_tokenizer"]
    if codes:
        raise ConfigError(
            f"model.views: encoder {codes[0]!r} reads a visual tokenizer's codes, which stand for whole pictures, not "
            f"{views.type}; leave views out"
        )


def build_processor(spec: ModelSpec, config: MllmConfig, tokenizer: TextTokenizer) -> MllmProcessor:
    """The processor of a model.

    Args:
        spec: the recipe's ``model`` section.
        config: the model's config (`build_config`).
        tokenizer: the text tokenizer; the image token is added to it where it is missing.

    Returns:
        Tokenizer, image processor and chat template in one.

    Raises:
        ConfigError: there is no chat template, or it drops what is said.
    """
    add_image_token(tokenizer, spec.image_token)
    template = read_template(spec.chat_template) if spec.chat_template else tokenizer.chat_template
    if template is None:
        from mllm.processing.template import shipped_templates

        raise ConfigError(
            "model.chat_template: the tokenizer has no chat template; give one of "
            f"{', '.join(shipped_templates())}, or a Jinja file"
        )
    give_padding(tokenizer)
    template = unwrapped(template)  # the tokenizer may be one of our own checkpoints
    check_template(tokenizer, template)
    _tell_a_missing_start(spec.text_model, tokenizer, template)
    if spec.template_options and is_wrapped(template):
        raise ConfigError(
            "model.template_options: this tokenizer's template was saved by an older version; give model.chat_template"
        )
    images = MllmImageProcessor(
        encoders={name: info.image for name, info in config.encoder_infos().items()},
        layout=config.view_layout(),
        views=config.views,
        video=config.video,
        experts=(config.router or {}).get("experts", ()),
        code_encoders=[name for name, encoder in config.encoders.items() if encoder["type"] == "visual_tokenizer"],
    )
    return MllmProcessor(
        images,
        tokenizer,
        chat_template=template,
        image_token=spec.image_token,
        visual_span=visual_span(config),
        template_options=spec.template_options,
        segment_spec=segment_spec(config),
        geometry_spec=geometry_spec(config),
    )


def _tell_a_missing_start(spec: LanguageModelSpec, tokenizer: TextTokenizer, template: str) -> None:
    """Warn when the language model expects its BOS token before every text and the template does not write it."""
    source = spec.source or spec.tokenizer
    if source is None or not begins_every_text(source, tokenizer):
        return
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template=template, tokenize=False)
    if not rendered.startswith(tokenizer.bos_token):
        _log.warning(
            "model.chat_template: %s was trained with %s before every text, and this template does not write it; begin the template "
            "with {{ bos_token }}, unless you train the language model long enough to do without",
            source,
            tokenizer.bos_token,
        )


def load_tokenizer(spec: LanguageModelSpec) -> Any:
    """The language model's tokenizer.

    Args:
        spec: the recipe's ``model.language_model``.

    Returns:
        A tokenizer of transformers.

    Raises:
        ConfigError: a model from scratch names no tokenizer.
        UnavailableError: it cannot be read.
    """
    source = spec.tokenizer or spec.source
    if source is None:
        raise ConfigError(
            "model.language_model.tokenizer: a model from scratch needs a tokenizer (hub id or local path)"
        )
    try:
        with naming_damage(source):
            place, options = opened_by(source, spec.revision if spec.tokenizer is None else None)
            return AutoTokenizer.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        raise UnavailableError(
            f"model.language_model.tokenizer: {source!r} cannot be read: {hub_reason(error, source)}"
        ) from error


def build_model(
    spec: ModelSpec,
    *,
    dtype: torch.dtype = torch.float32,
    load_weights: bool = True,
    device: torch.device | None = None,
) -> tuple[MllmForConditionalGeneration, MllmProcessor]:
    """Model and processor of a recipe. The vocabulary grows when the tokenizer (image token included) needs it.

    Args:
        spec: the recipe's ``model`` section.
        dtype: of every parameter.
        load_weights: read the language model's and encoders' published weights (a part without a source starts from its own
            initialisation); False: every part is initialised.
        device: where parts are initialised and weights are read to (default: the CPU); initial values depend on the kind of device.

    Returns:
        The model, in training mode, and its processor.

    Raises:
        ConfigError: parts do not go together.
        UnavailableError: a source cannot be read.
        CheckpointError: a source lacks weights.
    """
    device = torch.device("cpu") if device is None else device
    with progress.phase("reading tokenizer and configs"):
        config, processor = config_and_processor(spec, load_tokenizer(spec.text_model))
        tokenizer = processor.tokenizer
    for target in (config, config.text_config):
        target.dtype = dtype  # else the language model is made in its source's
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(tokenizer, name)
            if value is not None and getattr(target, name, None) is None:
                setattr(target, name, value)
    published = load_weights and spec.text_model.source is not None
    left_out = language_model_left_out() if published else nullcontext()
    with progress.phase(f"building the model on {device}"), default_dtype(dtype), device, left_out:
        model = MllmForConditionalGeneration(config)
    if published:
        read_language_model(model, spec.text_model, dtype=dtype, device=device)
    if load_weights:
        load_pretrained_parts(model, spec)
        processor.image_processor.code_source = _codes_made_by(model)
    grow_vocabulary(model, num_token_ids(tokenizer))
    set_stops(model, processor, source=spec.text_model.source, revision=spec.text_model.revision)
    model.generation_config.do_sample = False
    return model, processor


def config_and_processor(spec: ModelSpec, tokenizer: TextTokenizer) -> tuple[MllmConfig, MllmProcessor]:
    """A model's config and processor; the config says which ids are new to the language model's source.

    Args:
        spec: the recipe's ``model`` section.
        tokenizer: the text tokenizer; gets the tokens that the model needs.

    Returns:
        Config and processor.

    Raises:
        ConfigError: parts do not go together.
        UnavailableError: the language model's config cannot be read.
    """
    before = set(tokenizer.get_vocab().values())
    add_image_token(tokenizer, spec.image_token)
    image_id = tokenizer.convert_tokens_to_ids(spec.image_token)
    config = build_config(spec, image_token_id=image_id, tokenizer=tokenizer)
    processor = build_processor(spec, config, tokenizer)
    config.num_token_ids = num_token_ids(tokenizer)
    if spec.text_model.source is not None:
        config.added_token_ids = added_ids(before, tokenizer, config.text_config.vocab_size)
    return config, processor


def read_language_model(
    model: MllmForConditionalGeneration, spec: LanguageModelSpec, *, dtype: torch.dtype, device: torch.device
) -> None:
    """Put the published language model into a model that was built without one.

    Args:
        model: changed in place.
        spec: the recipe's ``model.language_model``.
        dtype: of its parameters.
        device: where its weights are read to.

    Raises:
        UnavailableError: the source cannot be read.
        CheckpointError: the source lacks weights, or is no plain model of its type.
    """
    assert spec.source is not None
    with progress.phase(f"reading weights of {spec.source}") as reading, reading_language_model(device) as place:
        source = open_language_model(spec, dtype, config=model.config.text_config, **placed_on(place))
        reading.num_bytes = num_bytes(source)
    decoder, head = decoder_of(source), source.get_output_embeddings()
    wanted, found = shapes(model.model.language_model), shapes(decoder)
    if wanted != found:
        raise CheckpointError(
            f"model.language_model.source: {spec.source} is no plain {model.config.text_config.model_type}: "
            f"{some_names(sorted(set(wanted.items()) ^ set(found.items())))}"  # pyright: ignore[reportArgumentType]
        )
    source.config.name_or_path = ""
    model.config.text_config = source.config  # transformers gave the modules a copy of it
    model.model.take_decoder(decoder)
    model.lm_head.load_state_dict(head.state_dict(), assign=True)
    model.tie_weights()


def load_pretrained_parts(model: MllmForConditionalGeneration, spec: ModelSpec) -> None:
    """Read published weights into every encoder, head and visual tokenizer that names some.

    Args:
        model: changed in place.
        spec: the recipe's ``model`` section.

    Raises:
        UnavailableError: a source cannot be read; it is named.
        CheckpointError: a source lacks weights.
    """
    if model.model.vision_tower is not None:
        for name, encoder in model.model.vision_tower.encoders.items():
            if encoder.config.weights is not None:
                with progress.phase(f"reading weights of encoder {name}") as reading:
                    encoder.load_pretrained()
                    reading.num_bytes = num_bytes(encoder)
    weights = (spec.visual_tokenizer or {}).get("weights")
    for name, head in model.heads.items():
        if type(head).load_pretrained is not Head.load_pretrained:
            with progress.phase(f"reading weights of head {name}"):
                head.load_pretrained()
    if model.model.visual_tokenizer is not None and weights is not None:
        with progress.phase("reading weights of the visual tokenizer"):
            load_tokenizer_weights(model.model.visual_tokenizer, weights)


def placed_on(device: torch.device) -> dict[str, Any]:
    """What ``from_pretrained`` is told so that it reads weights straight to a device.

    Args:
        device: the device.

    Returns:
        Keyword arguments; none for the CPU.
    """
    return {} if device.type == "cpu" else {"device_map": {"": device}}


def num_bytes(module: torch.nn.Module) -> int:
    """Memory of a module's parameters.

    Args:
        module: any module.

    Returns:
        Bytes.
    """
    return sum(num_elements(p) * p.element_size() for p in module.parameters())


def _codes_made_by(model: MllmForConditionalGeneration) -> str | None:
    """Fingerprint of the model's visual tokenizer, so that stored codes of another one are refused."""
    from mllm.visual_tokenizers.storage import fingerprint

    tokenizers = [] if model.config.visual_tokenizer is None else [model.image_tokenizer]
    if model.model.vision_tower is not None:
        encoders = model.model.vision_tower.encoders.values()
        tokenizers += [encoder.tokenizer for encoder in encoders if encoder.config.type == "visual_tokenizer"]
    found = {fingerprint(tokenizer) for tokenizer in tokenizers}
    return found.pop() if len(found) == 1 else None
