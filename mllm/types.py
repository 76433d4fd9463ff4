"""What do the parts of the system hand to one another?

Shape letters used in the whole project: B images · C H W pixels · N patches · P prefix tokens · D encoder width ·
M visual tokens · T text tokens · L language-model width · E experts · Q codes per position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import Field

from mllm.config import StrictModel
from mllm.errors import DataError
from mllm.video_entries import fields_of_entry

if TYPE_CHECKING:
    from torch import Tensor

Grid = tuple[int, int]  # rows, columns
Box = tuple[float, float, float, float]  # top, left, bottom, right


class ImageSpec(StrictModel):
    """The pixels one encoder expects: ``(channels, height, width)``, RGB, ``(x / 255 - mean) / std``."""

    height: int = Field(gt=0)
    width: int = Field(gt=0)
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resize: Literal["squash", "letterbox", "crop"] = "squash"
    """squash: to height × width, aspect ratio lost. letterbox: fit inside, pad with the mean colour. crop: shorter side
    to size, centre crop."""
    interpolation: Literal["bicubic", "bilinear", "nearest", "lanczos"] = "bicubic"
    patch: int | None = Field(default=None, gt=0)
    """Side in pixels of the square that one token is made of, for encoders that take any grid of them (views native)."""
    panels: int = Field(default=1, ge=1)
    """Pictures under one another in one, each resized by itself to height / panels (`mllm.processing.panels`): how channels beyond three
    travel. An encoder of one panel sees the first."""
    points: Literal["refuse", "unknown"] | None = None
    """Not the picture is given but where each of its pixels lies in space (x, y, z in metres, NaN: not known), and what nothing tells is
    refused or unknown. None: the picture."""
    cameras: Literal["refuse", "unknown"] | None = None
    """A fourth channel follows the picture's three, whose first cells tell the frame's camera (`mllm.processing.known_cameras`), and a
    frame whose camera nothing tells is refused or unknown. None: the picture alone."""

    @property
    def channels(self) -> int:
        """Of the pixels."""
        return 3 if self.cameras is None else 4


class EncoderInfo(StrictModel):
    """What an encoder with a given config takes and gives; agrees with its ``forward`` (contract-tested)."""

    image: ImageSpec
    grid: Grid
    """Rows and columns of the feature map; ``grid[0] * grid[1] == N``."""
    width: int = Field(gt=0)
    """D: channels of one feature token."""
    num_prefix_tokens: int = 0
    """P: class and register tokens returned beside the patches (0 when dropped)."""
    in_place: bool = True
    """A cell of the grid shows that place of the image; False for tokens that gather from all of it."""
    leading: int = 0
    """Tokens of the sequence before the map (EVE's class token); unlike a prefix, they are visual tokens."""
    row_ends: bool = False
    """A token closes every row of the map (EVE's split token)."""

    @property
    def num_tokens(self) -> int:
        """N: tokens of one image."""
        return self.leading + self.grid[0] * (self.grid[1] + self.row_ends)


class WeightsSource(StrictModel):
    """Where an encoder's published weights come from and what one may do with them."""

    source: str
    """``hub id``, open_clip tag, ``timm`` (the model's own), or a local file or directory."""
    revision: str | None = None
    licence: str = "unknown"
    """SPDX name where there is one."""
    commercial: bool | None = None
    """May the weights be used commercially? None: not known."""
    territory: str | None = None
    """Where use is restricted to or excluded from, in words."""


class FastFrames(StrictModel):
    """Which tokens of a video stand in the sequence, where the others are only read (Slow-Fast). A video of one frame is a picture."""

    cell: int = Field(default=2, ge=1)
    """cell × cell tokens of a video's frame are averaged: those are the slow ones."""
    stride: int = Field(default=1, ge=1)
    """Every so many-th frame is kept."""
    pool: int = Field(default=1, ge=1)
    """So many of the frames kept are averaged together."""
    side: int = Field(default=1, ge=1)
    """side × side slow tokens of a frame are averaged for the sequence."""
    least: int = Field(default=16, ge=1)
    """Frames that are left at least, in each of both steps."""
    every: int = Field(default=8, ge=1)
    """Layers 0, every, 2 · every … of the language model read the slow tokens."""

    def sampled(self, frames: int) -> list[int]:
        """Which frames the stride keeps.

        Args:
            frames: of the video.

        Returns:
            Their numbers, from 0.
        """
        number = min(max(frames // self.stride, self.least), frames)
        return [int(k * frames / number) for k in range(number)]

    def first(self, frames: int) -> list[int]:
        """For each frame of the sequence, the first of the video's frames that it is made of.

        Args:
            frames: of the video.

        Returns:
            Their numbers, from 0.
        """
        kept = self.sampled(frames)
        if self.pool == 1:
            return kept
        number = len(kept) // self.pool
        if number >= self.least:
            return [kept[k * self.pool] for k in range(number)]
        number = min(len(kept), self.least)
        return [kept[k * len(kept) // number] for k in range(number)]


class ViewLayout(StrictModel):
    """What a connector makes of one view: how many tokens, in which order. `Connector.layout` gives it."""

    num_tokens: int = Field(ge=0)
    """M: visual tokens of the view, separators included."""
    grid: Grid
    """Rows and columns of the tokens that carry position."""
    row_separators: bool = False
    """A learned separator token closes every row (included in ``num_tokens``)."""
    in_place: bool = True
    """A cell of the grid shows that place of the view, so that the maps of neighbouring views can be laid side by side."""
    joins_perspectives: bool = False
    """The connector makes one map of all ``dual_perspective`` views of a visual."""
    joins_scales: tuple[int, ...] = ()
    """The scales of ``multi_scale`` views that the connector makes one map of."""
    leading: int = 0
    """Tokens before the map (included in ``num_tokens``)."""
    cell: int | None = None
    """Views native: cell × cell tokens of the encoder become one; 0: the number is always ``num_tokens``. None: the connector
    takes one grid only."""
    frames: int = Field(default=1, ge=1)
    """Successive frames of a video that become one set of tokens; a picture is shown so often."""
    repeats: int = Field(default=1, ge=1)
    """How often a picture is shown, each time with tokens of its own (PVC)."""
    levels: int = Field(default=0, ge=0)
    """Further vectors of every visual token, each added to it behind one of the language model's first layers (DeepStack); the
    connector gives them beside the token itself, so that its width is ``levels + 1`` times the language model's."""
    fast: FastFrames | None = None
    """Of a video, only some tokens stand in the sequence; all are read by layers of the language model."""
    beside: int = Field(default=0, ge=0)
    """Further channels of every visual token, which the connector's `readers` read inside the language model (Cambrian-1)."""

    @property
    def shown(self) -> int:
        """How many equal frames a picture is."""
        return self.frames * self.repeats


ImageLayout = ViewLayout
"""The former name, which plug-ins that checkpoints carry still import."""


@dataclass(frozen=True)
class Block:
    """Tokens of one visual that lie together: a map in raster order, or tokens of the vocabulary.

    num_tokens: all of them, separators included; grid: (time, rows, columns) of those that carry position; row_separators:
    a learned token closes every row; newlines: it is the visual's own one, not the connector's; view: the first view that
    the map is taken from; tiles: (rows, columns) of views laid side by side; corner: the (row, column) of their joined map
    where the block begins; ids: the vocabulary's tokens, for a block of these; leading: tokens before the map, in ``num_tokens``;
    shrunk: (rows, columns) of the joined map where it is resized (bilinear) to ``grid``; (0, 0): it is not.
    """

    num_tokens: int
    grid: tuple[int, int, int] = (0, 0, 0)
    row_separators: bool = False
    newlines: bool = False
    view: int = 0
    tiles: Grid = (1, 1)
    corner: Grid = (0, 0)
    ids: tuple[int, ...] = ()
    leading: int = 0
    shrunk: Grid = (0, 0)


@dataclass(frozen=True)
class VisualLayout:
    """How one visual lies in the token sequence. Made by `mllm.processing.layout` only.

    num_views: views that the connector joins; fewer: encoder → how many of them it has itself, where that is not all (of a picture the
    thumbnail, of a video those that `frames_of` says);
    tiles: (rows, columns) of tiles among the views; thumbnail: which view is the whole picture; corners: of each tile, what
    it shows of the picture, as (top, left, bottom, right) from 0 to 1 (beyond it where it is padded); perspectives: n, where
    the views are n × n crops, n × n strided pictures and a thumbnail; patches: (rows, columns) of the encoders' tokens, where
    the picture is seen at its own aspect (views native) and pixels come as patches; scales: of the views, where the connector makes
    one map of several; frames: of a video, each a view (0: no video); num_slow: tokens that the connector gives behind those of the
    sequence, which layers of the language model read (`FastFrames`).
    """

    blocks: tuple[Block, ...]
    num_views: int = 1
    fewer: tuple[tuple[str, int], ...] = ()
    tiles: Grid = (0, 0)
    thumbnail: int | None = None
    corners: tuple[Box, ...] = ()
    perspectives: int = 0
    patches: Grid | None = None
    scales: tuple[int, ...] = ()
    frames: int = 0
    num_slow: int = 0

    def rows_of(self, encoder: str) -> int:
        """Rows of an encoder's pixels that belong to the visual.

        Args:
            encoder: its name.

        Returns:
            The number of its views, or of its patches where the visual is seen at its own aspect.
        """
        if self.patches is not None:
            return self.patches[0] * self.patches[1]
        return dict(self.fewer).get(encoder, self.num_views)

    def frames_of(self, encoder: str) -> tuple[int, ...]:
        """Which frames of a video an encoder is given.

        Args:
            encoder: its name.

        Returns:
            Their numbers among the video's ``frames``, ascending; beyond the last one where views are repeated to whole groups.
        """
        count = self.rows_of(encoder)
        return tuple(range(count)) if count == self.num_views else tuple(k * self.frames // count for k in range(count))

    @property
    def places(self) -> tuple[Grid, ...]:
        """(row, column) of every view among the tiles; (-1, -1) for one that is no tile."""
        tiles = [(row, column) for row in range(self.tiles[0]) for column in range(self.tiles[1])]
        number = iter(tiles)
        return tuple((-1, -1) if view == self.thumbnail else next(number, (-1, -1)) for view in range(self.num_views))

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence that stand for the visual, the vocabulary's among them included."""
        return sum(block.num_tokens for block in self.blocks)

    @property
    def num_placeholders(self) -> int:
        """M: visual tokens, those that the connector gives."""
        return sum(block.num_tokens for block in self.blocks if not block.ids)

    @property
    def num_given(self) -> int:
        """All tokens that the connector gives: those of the sequence and those beside it."""
        return self.num_placeholders + self.num_slow

    @property
    def grid(self) -> tuple[int, int, int]:
        """(time, rows, columns) of the largest map: where the visual is seen best."""
        return max(self.blocks, key=lambda block: block.num_tokens if not block.ids else -1).grid

    @property
    def separators(self) -> tuple[int, ...]:
        """Places of the learned tokens that close a row."""
        places: list[int] = []
        for start, block in self.starts():
            if block.row_separators:
                time, rows, columns = block.grid
                places += [start + block.leading + (row + 1) * (columns + 1) - 1 for row in range(time * rows)]
        return tuple(places)

    @property
    def literals(self) -> tuple[tuple[int, int], ...]:
        """(place, id) of the tokens that are ordinary vocabulary."""
        return tuple((start + k, token) for start, block in self.starts() for k, token in enumerate(block.ids))

    def starts(self) -> list[tuple[int, Block]]:
        """Every block with the place of its first token."""
        places, place = [], 0
        for block in self.blocks:
            places.append((place, block))
            place += block.num_tokens
        return places


@dataclass
class VisionFeatures:
    """Features of B images from one encoder, raster order.

    tokens: ``(B, N, D)`` with ``N == rows * cols`` (`EncoderInfo.num_tokens` where there are others beside the map); prefix:
    ``(B, P, D)`` or None; attention: last block's attention ``(B, heads, P + N, P + N)`` when asked for; grids: of every image,
    where these differ (views native): tokens are ``(1, ΣN, D)`` then, image after image.
    """

    tokens: Tensor
    grid: Grid
    prefix: Tensor | None = None
    attention: Tensor | None = None
    grids: tuple[Grid, ...] | None = None


@dataclass
class Routing:
    """Which experts each image uses. experts: names in order (E of them); weights: ``(B, E)``, 0 = not run.

    logits: ``(B, E)`` before selection, when a learned router made the choice; losses: named scalars to add in training.
    """

    experts: tuple[str, ...]
    weights: Tensor
    logits: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class VisualCodes:
    """Discrete codes of B images. codes: codebook name → ``(B, N, Q)`` int64; scales: side lengths of a multi-scale code."""

    codes: dict[str, Tensor]
    grid: Grid
    scales: tuple[int, ...] | None = None


PLAYS = Literal["forward", "reversed", "shuffled", "frozen", "gray"]


@dataclass(frozen=True)
class Video:
    """A video among a sample's images: which one, and what of it. Which frames are seen the model's ``video:`` section says
    (`mllm.processing.frames.VideoSpec`).

    source: a file (``.npy`` of ``(T, H, W, 3)`` too), its bytes or ``data:`` URI, an animated picture, a folder of frames, a list of
    pictures, or an array ``(T, H, W, 3)``; fps: frames per second of a source that does not tell; seconds: when each frame of such a
    source is, where they follow at no one rate; start, end: seconds between which frames are taken; frames: their numbers, where they are
    chosen already; play: how the chosen frames follow one another (all but
    forward are controls for a study: frozen shows the middle one in every place, gray none); key: what the shuffled order depends
    on beside the frames' numbers, so that clips of equal length are not all shuffled alike; points: what tells where the scene lies,
    for frames that are chosen by it (`mllm.processing.scene_points`).

    A mapping as source is a row's entry: ``{"path" | "bytes" | "frames" | "url": …}`` and beside it ``fps``, ``seconds``, ``start``,
    ``end``, ``points``, ``numbers`` (``frames`` here). Raises `DataError` for any other key, and for what is told twice.
    """

    source: Any
    fps: float | None = None
    start: float | None = None
    end: float | None = None
    frames: tuple[int, ...] | None = None
    play: PLAYS = "forward"
    key: str = ""
    points: Any = None
    seconds: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.source, Mapping):
            for name, value in fields_of_entry(self.source).items():
                if name != "source" and getattr(self, name) is not None:
                    raise DataError(f"a video's {name} is told twice, in its entry and beside it")
                object.__setattr__(self, name, value)
        if self.play not in get_args(PLAYS):
            raise DataError(f"a video's play is {self.play!r}, expected one of {', '.join(get_args(PLAYS))}")
        if self.frames is not None and not (self.start is None and self.end is None):
            raise DataError("a video's frames are chosen by number and by start or end; give one of the two")
        for name in ("fps", "start", "end"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
                raise DataError(f"a video's {name} is {value!r}, expected a number")


def scene(pictures: Sequence[Any], seconds: Sequence[float] | None = None) -> Video:
    """Several pictures of one scene as one visual, for a model that takes video: all of them are seen, and encoders that join views see
    them together.

    Args:
        pictures: files, bytes, PIL images or arrays, all of one size.
        seconds: when each was taken, ascending from 0 on; needed where the model's ``stamp`` tells seconds.

    Returns:
        A video of these frames, at those times or at none.

    Raises:
        DataError: one picture in place of several.
    """
    if (
        isinstance(pictures, (str, bytes, Mapping))
        or not hasattr(pictures, "__iter__")
        or getattr(pictures, "ndim", 4) == 3
    ):
        told = type(pictures).__name__ + str(getattr(pictures, "shape", ""))
        raise DataError(f"a scene takes a list of pictures, and was given {told}; put a single picture into a list")
    views = list(pictures)
    times = None if seconds is None else tuple(map(float, seconds))
    return Video(views, frames=tuple(range(len(views))), seconds=times)


@dataclass
class Turn:
    """One message. ``content`` may hold ``<image>`` markers only where the sample's images go (see `Sample`)."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    learn: bool = True
    """Assistant turns only: whether its tokens carry loss."""
    thoughts: str | None = None
    """Assistant turns only: ``reasoning_content``, what was thought before ``content`` was said."""
    calls: list[dict[str, Any]] | None = None
    """Assistant turns only: ``tool_calls`` as OpenAI has them, arguments as a mapping."""
    call_id: str | None = None
    """Tool turns only: the call that this is the result of."""
    name: str | None = None
    """Tool turns only: the tool."""


@dataclass
class Sample:
    """One training or evaluation sample, whatever file format it came from.

    images: paths, bytes, PIL images or `Video` objects, in order of use. In ``turns``, image k stands where the k-th `IMAGE_MARK` is.
    A user's own ``<image>`` text is not a marker: sources escape it.
    """

    id: str
    turns: list[Turn]
    images: list[Any] = field(default_factory=list)
    dataset: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    masks: list[Any] = field(default_factory=list)
    """What the assistant marks, one for each mask token of its turns, in order, as `mllm.processing.mask_files.read_mask` takes them."""
    poses: list[Any] = field(default_factory=list)
    """The cameras of the videos among ``images``, one entry for each image (None: not known), as `mllm.processing.geometry.read_poses`
    takes them."""
    depths: list[Any] = field(default_factory=list)
    """Depth maps of ``images``, one entry for each (None: not known), as `mllm.processing.geometry` reads them."""


VISUAL_TOKENS = "visual_tokens"
"""Key of `Sample.meta`: most visual tokens of each of the sample's pictures (its dataset's ``visual_tokens``)."""

IMAGE_MARK = "\ufffcimage\ufffc"
"""Marks an image's place inside `Turn.content`: U+FFFC (object replacement character) does not occur in user text, and is
removed from it where it does, so a typed ``<image>`` stays text."""


@dataclass
class Request:
    """One thing to generate. ``messages`` as in `Sample.turns`; ``options`` are generation settings by HF names."""

    id: str
    turns: list[Turn]
    images: list[Any] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Response:
    """What a generator answered. prompt: as rendered for the model; error: why there is no text, else None; logprob: the log
    probability that the model gives the whole answer with its end, None where the generator does not say."""

    id: str
    text: str
    prompt: str = ""
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    routing: dict[str, float] | None = None
    error: str | None = None
    logprob: float | None = None
