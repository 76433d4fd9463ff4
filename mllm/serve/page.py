"""What does the demonstration page look like? Pictures and conversation side by side, who looked at a picture, and what a phrase
marks in it."""

from __future__ import annotations

import html
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from mllm.errors import DataError, MllmError, UnavailableError
from mllm.install import install_hint
from mllm.processing.images import load_image
from mllm.processing.mask_files import decode_rle
from mllm.serve.http.client import ServerClient, data_uri

DECIDE = "the model decides"
Mark = Callable[[str, str], tuple[Image.Image, str]]
"""A picture's file and a phrase → the picture with what the phrase names laid over it."""

STYLE = """
.gradio-container, .gradio-container > main {width: 100%; max-width: 1280px !important; margin: auto}
#question textarea {border: 1px solid var(--border-color-primary)}
#status {font-size: .9rem; text-align: right} #title h2 {margin: 0}
.good {color: #1a9448} .bad {color: #c0281e} .waiting {color: #b07a00}
#history {height: 52vh !important} #shown {max-height: 52vh}
#shown .thumbnail-lg, #shown .gallery-item button {aspect-ratio: auto !important; height: 34vh}
#shown .thumbnail-lg {display: flex; flex-direction: column}
#shown img {object-fit: contain !important; height: 100%; flex: 1; min-height: 0}
#shown .caption-label {position: static; max-width: 100%; max-height: 50%; overflow: auto; text-align: left;
  white-space: normal; overflow-wrap: anywhere}
@media (max-width: 760px) {
  .gradio-container {padding: 6px !important}
  #shown .thumbnail-lg, #shown .gallery-item button {height: 21vh}
  #shown {height: 24vh !important; min-height: 0 !important} #history {height: 32vh !important}
  #shown [data-testid="block-label"] {display: none}
  #pictures {height: 6.5rem !important; min-height: 0 !important}
}
"""
_COLOURS = ("#e0403a", "#2b6fd6", "#1a9448", "#9a5fd8", "#d98a1f")


def build_page(client: ServerClient, *, mark: Mark | None = None, state: Callable[[], str] | None = None) -> Any:
    """The Gradio page of a running server. mark: for models with a segmentation head; state: says how the server is, for the line at
    the top. Raises `UnavailableError` without gradio or server."""
    try:
        import gradio as gr
    except ImportError:
        raise UnavailableError(f"the page needs gradio: {install_hint('serve')}") from None
    card, information = client.card(), client.information()
    name, experts = card["id"], information.get("experts", [])
    longest = max(16, int(card.get("max_model_len") or 2048) - 16)
    asking = _Asking(client, name, information)
    health = state or (lambda: server_state(client))

    with gr.Blocks(title=f"mllm: {name}", analytics_enabled=False, fill_width=True) as page:
        with gr.Row(equal_height=True):
            gr.Markdown(f"## {name}", elem_id="title")
            status = gr.HTML(health(), elem_id="status")
        past = gr.State([])
        with gr.Row():
            with gr.Column(scale=4, min_width=260):
                shown = gr.Gallery(
                    label="Who looked",
                    columns=2,
                    height="40vh",
                    object_fit="contain",
                    elem_id="shown",
                    interactive=False,
                )
                files = gr.File(
                    label="Pictures", file_count="multiple", file_types=["image"], elem_id="pictures", height=110
                )
                phrase = gr.Textbox(
                    label="Mark in the picture", placeholder="the left cup", visible=mark is not None, elem_id="phrase"
                )
            with gr.Column(scale=5, min_width=260):
                talk = gr.Chatbot(label="Conversation", elem_id="history", buttons=["copy"], render_markdown=False)
                question = gr.Textbox(label="Question", lines=1, max_lines=4, elem_id="question", submit_btn=True)
                with gr.Row():
                    stop = gr.Button("Stop", size="sm")
                    new = gr.Button("New conversation", size="sm", elem_id="new")
        with gr.Accordion("Settings", open=False, elem_id="settings"), gr.Row():
            with gr.Column():
                system = gr.Textbox("", label="System prompt", lines=2, elem_id="system")
                chosen = gr.CheckboxGroup(
                    [DECIDE, *experts], value=[DECIDE], label="Experts", visible=bool(experts), elem_id="experts"
                )
            with gr.Column():
                warmth = gr.Slider(
                    0, 2, value=0, step=0.1, label="Temperature (0: always the likeliest word)", elem_id="temperature"
                )
                length = gr.Slider(
                    1,
                    longest,
                    value=min(256, longest),
                    step=1,
                    label=f"Longest answer (this model: {longest} tokens)",
                    elem_id="length",
                )
        gr.Examples(example_questions(), [files, question], label="Examples", elem_id="examples")

        files.change(lambda paths: (paths or [], [], []), files, [shown, talk, past], show_progress="hidden")
        inputs = [files, question, talk, past, chosen, system, warmth, length]
        # A question that is sent while an answer still comes waits for its end; by default it would be dropped without a word.
        waits: dict[str, Any] = {"trigger_mode": "always_last"}
        running = question.submit(asking.answer, inputs, [talk, past, shown, question], show_progress="hidden", **waits)
        stop.click(None, cancels=[running])
        new.click(lambda: ([], []), None, [talk, past])
        # The chat's own button empties only what is seen. (Gradio reads a signature, which list has none of.)
        talk.clear(lambda: [], None, past)  # noqa: PIE807
        if mark is not None:
            phrase.submit(lambda paths, text: _marked(mark, paths, text), [files, phrase], shown, **waits)
        gr.Timer(3).tick(health, None, status, show_progress="hidden")
    return page


class _Asking:
    """Asks the server and writes the conversation as it comes; what goes wrong stands where the answer would be."""

    def __init__(self, client: ServerClient, name: str, information: dict[str, Any]):
        self.client, self.name, self.information = client, name, information

    def answer(
        self,
        files: list[str] | None,
        question: str | None,
        talk: list[dict[str, Any]],
        past: list[dict[str, Any]],
        chosen: list[str],
        system: str | None,
        temperature: float,
        max_tokens: float,
    ) -> Iterator[tuple[Any, ...]]:
        """Conversation, what is sent of it again, the pictures with who looked, and the question's box, piece by piece."""
        import gradio as gr

        experts = self.information.get("experts", [])
        routing = None if not experts or DECIDE in chosen or not files else [e for e in chosen if e in experts]
        if not question or not question.strip():
            yield gr.skip(), gr.skip(), gr.skip(), gr.skip()
            return
        talk = [*talk, {"role": "user", "content": question}]
        parts: list[dict[str, Any]] = []
        text, routed = "", None
        heads: dict[str, Any] = {}
        try:
            yield [*talk, {"role": "assistant", "content": "…"}], past, gr.skip(), ""
            if not past:  # the pictures stand in the first question, as they were when it was asked
                parts = [{"type": "image_url", "image_url": {"url": data_uri(path)}} for path in files or []]
            turn = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
            # A field in a part of the page that was never opened has no value yet.
            opening = [{"role": "system", "content": system}] if system and system.strip() else []
            options = {"experts": routing, "max_tokens": int(max_tokens), "temperature": float(temperature)}
            conversation = [*opening, *past, turn]
            for piece, who in self.client.stream_messages(conversation, model=self.name, heads=heads, **options):
                text, routed = text + piece, who
                yield [*talk, {"role": "assistant", "content": text}], past, gr.skip(), gr.skip()
            past = [*past, turn, {"role": "assistant", "content": text}]
            looked = _described(self.information, routed, files, heads)
            yield [*talk, {"role": "assistant", "content": text}], past, looked, gr.skip()
        except (MllmError, OSError) as error:
            what = "Refused" if isinstance(error, DataError) else "Failed"
            yield (
                [*talk, {"role": "assistant", "content": f"{text}\n⚠ {what}: {error}".strip()}],
                past,
                gr.skip(),
                question,
            )


def _described(
    information: dict[str, Any], routed: str | None, files: list[str] | None, heads: dict[str, Any]
) -> list[tuple[Any, str]]:
    """The pictures with a strip that names the experts which looked at each, where the server tells; over the last one the masks of
    the answer, and beside it how sure the model is of what it says."""
    paths = files or []
    rows = [None] * len(paths) if routed is None else routed.split(";")
    rows = rows * len(paths) if len(rows) == 1 else rows
    shown: list[tuple[Any, str]] = []
    for place, (path, row) in enumerate(zip(paths, rows)):
        names = [] if row in (None, "none") else row.split(",")
        text = f"always-on encoders and {', '.join(names)}" if names else "always-on encoders"
        if row is None and information.get("experts"):
            text = f"always-on encoders and what the {information.get('router')} router chose"
        text = text if information.get("experts") else "all encoders"
        masks = []
        if place == len(paths) - 1:
            masks = [decode_rle(mask["rle"]) > 0 for mask in heads.get("mllm_masks") or ()]
            text = " · ".join([text, *_said_by_heads(heads)])
        shown.append((labelled(path, names, masks), text))
    return shown


def _said_by_heads(heads: dict[str, Any]) -> list[str]:
    masks, sure = heads.get("mllm_masks") or [], heads.get("mllm_probability") or {}
    there: dict[bool, list[str]] = {True: [], False: []}
    for mask in masks:
        there[bool((decode_rle(mask["rle"]) > 0).any())].append(str(mask.get("phrase") or "a mask"))
    said = [f"{', '.join(there[True])} marked"] if there[True] else []
    said += [f"nothing found for {', '.join(there[False])}"] if there[False] else []
    return said + [f"{name} {share:.0%}" for name, share in sure.items()]


def labelled(path: str, names: Sequence[str], masks: Sequence[Any] = ()) -> Image.Image:
    """The picture with a label in its corner for every name, and below the labels the masks (`overlaid`)."""
    picture = load_image(path, where="the picture")
    picture.thumbnail((1024, 1024))
    picture = overlaid(picture, masks)
    draw = ImageDraw.Draw(picture, "RGBA")
    size = max(10, min(picture.size) // 18)
    for place, name in enumerate(names):
        top = 4 + place * (size + 10)
        left, upper, right, lower = draw.textbbox((10, top + 3), name, font_size=size)
        draw.rounded_rectangle(
            (left - 6, upper - 4, right + 6, lower + 4), 6, fill=_COLOURS[place % len(_COLOURS)] + "d0"
        )
        draw.text((10, top + 3), name, fill="white", font_size=size)
    return picture


def _marked(mark: Mark, paths: list[str] | None, phrase: str | None) -> list[tuple[Any, str]]:
    import gradio as gr

    if not paths or not phrase or not phrase.strip():
        raise gr.Error("give a picture, and say what to mark in it")
    try:
        return [mark(path, phrase) for path in paths]
    except MllmError as error:
        raise gr.Error(str(error)) from None


def marker(checkpoint: str) -> Mark | None:
    """Marks any phrase with the segmentation head of a checkpoint on this machine, which is read at the first one; None for a model
    without one. The masks of an answer come with it from the server; this is for what nobody asked the model. What it gives: the picture
    with the masks over it, and the phrase, or that nothing was found for it and what the model said."""
    from transformers import AutoConfig

    from mllm.heads.segmentation.build import segmentation_heads

    if not segmentation_heads(getattr(AutoConfig.from_pretrained(checkpoint), "heads", None) or {}):
        return None
    kept: list[Any] = []

    def mark(path: str, phrase: str) -> tuple[Image.Image, str]:
        from mllm.models.modeling_mllm import MllmForConditionalGeneration

        if not kept:
            kept.append(MllmForConditionalGeneration.from_pretrained(checkpoint).eval())
        picture = load_image(path, where="the picture")
        found = kept[0].segment(picture, phrase)
        text = phrase if found.masks.any() else f"nothing found for {phrase}: {found.text.strip()}"
        return overlaid(picture, [mask.numpy() for mask in found.masks]), text

    return mark


def overlaid(picture: Image.Image, masks: Sequence[Any]) -> Image.Image:
    """The picture with every mask ``(height, width)`` of bool laid over it in a colour of its own; a mask of another size, as of a
    picture that is shown smaller, is brought to the picture's."""
    made = picture.convert("RGB")
    for place, mask in enumerate(masks):
        area = Image.fromarray((mask * 128).astype("uint8")).resize(made.size, Image.Resampling.NEAREST)
        made.paste(Image.new("RGB", made.size, _COLOURS[place % len(_COLOURS)]), mask=area)
    return made


def server_state(client: ServerClient) -> str:
    """One line on how the server is."""
    if client.answers():
        return status_line("good", "server ready")
    return status_line("bad", f"the server does not answer ({time.strftime('%H:%M:%S')}); it is asked again every 3 s")


def status_line(kind: str, text: str) -> str:
    """The line at the top. kind: good, waiting or bad."""
    return f'<span class="{kind}">●</span> {html.escape(text)}'


def example_questions() -> list[list[Any]]:
    """Pictures drawn here, each with a question."""
    folder = Path(tempfile.mkdtemp(prefix="mllm-examples-"))
    chart = Image.new("RGB", (320, 240), "white")
    draw = ImageDraw.Draw(chart)
    for place, (height, colour) in enumerate(((150, "#d62728"), (90, "#1f77b4"), (190, "#2ca02c"))):
        draw.rectangle((50 + place * 85, 220 - height, 105 + place * 85, 220), fill=colour)
    draw.line((30, 220, 300, 220), fill="black", width=2)
    shapes = Image.new("RGB", (320, 240), "#f4efe2")
    draw = ImageDraw.Draw(shapes)
    draw.ellipse((40, 70, 140, 170), fill="#c23b22")
    draw.rectangle((190, 80, 280, 170), fill="#2b6fd6")
    found = []
    for name, picture, question in (
        ("chart", chart, "Which colour has the highest bar?"),
        ("shapes", shapes, "What is left of the blue square?"),
    ):
        picture.save(folder / f"{name}.png")
        found.append([[str(folder / f"{name}.png")], question])
    return found
