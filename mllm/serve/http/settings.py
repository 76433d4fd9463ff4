"""What does a server let through? The settings of its admission, as its start hands them to its processes."""

from __future__ import annotations

import secrets
from typing import Any

from pydantic import Field

from mllm.config import StrictModel
from mllm.serve.heads import ServedHeads
from mllm.serve.images.requests import NO_HEAD

ENVIRONMENT = "MLLM_ADMISSION"
"""Environment variable with the settings as JSON; vLLM makes middleware without arguments."""


class AdmissionSettings(StrictModel):
    """What is let through."""

    max_body_bytes: int = Field(default=32 * 2**20, gt=0)
    body_timeout: float = Field(default=60.0, gt=0)
    """Seconds a client may take to send its body."""
    media_domains: list[str] = Field(default_factory=list)
    """Hosts whose pictures are fetched; empty: only base64 data URIs."""
    media_timeout: float = Field(default=5.0, gt=0)
    """Seconds that such a host has for a picture."""
    max_images: int = Field(default=8, ge=0)
    max_videos: int = Field(default=0, ge=0)
    """0 where the model takes none."""
    max_seconds: float = Field(default=0.0, ge=0)
    """The longest video that is read."""
    max_frames: int = Field(default=0, ge=0)
    """Most pictures of a scene: the frames that the model sees of a video."""
    timed: bool = False
    """Whether each picture of a scene must say its seconds: the model is told the time of every frame."""
    whole: bool = False
    """Whether a video may have no more frames than a scene has pictures: the model's frames are chosen by points that no request has."""
    video: dict[str, Any] | None = None
    """The checkpoint's video section, for clients that choose frames by it; None: the model takes no videos."""
    max_pixels: int = Field(default=16_000_000, gt=0)
    image_token: str = "<image>"
    image_token_id: int | None = None
    router: dict[str, Any] | None = None
    """The checkpoint's router config; None: nothing is routed."""
    checkpoint: str | None = None
    """Whose visual tokenizer decodes drawings; None: nothing is drawn."""
    cannot_draw: str = NO_HEAD
    """What a drawing request is told where ``checkpoint`` is None."""
    draws_beside: bool = False
    """Whether drawings are made by the model itself, beside the engine."""
    max_drawings: int = Field(default=4, ge=1)
    """Most pictures one request may ask for."""
    heads: ServedHeads | None = None
    """Which heads answer beside the text of a chat; None: there is none."""
    name: str | None = None
    """The served model's name."""
    salt: str = Field(default_factory=lambda: secrets.token_hex(16), min_length=1)
    """What cache names are made with; servers that share a cache share it."""
    loopback: bool = False
    """Whether only names of this machine are answered: a server without a key, which a web page could else reach by a name
    of its own that leads here."""
    adapters: list[str] = Field(default_factory=list)
    """Names of the adapters that are there from the start."""
    visual_adapters: dict[str, int] = Field(default_factory=dict)
    """Those of them that change encoders or the connector, and by which number the engine knows each."""
    greedy: bool = False
    """Whether the server answers greedily where no temperature is asked for."""
