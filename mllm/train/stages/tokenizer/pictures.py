"""Which pictures does a tokenizer stage see, and how do they come as samples of the common data pipeline?"""

from __future__ import annotations

import hashlib
from functools import cached_property
from types import SimpleNamespace

import torch

from mllm.data.mixture import Mixture
from mllm.data.sources import Source
from mllm.data.spec import DatasetSpec, MixtureItem, MixtureSpec
from mllm.processing.chat import IGNORE, EncodedSample
from mllm.types import Sample
from mllm.visual_tokenizers.images import ImageSource
from mllm.visual_tokenizers.recipe import DiffusionTraining, TokenizerTraining

PIXELS = "pixel_values"


class PictureSource(Source):
    """An image source as rows of a mixture; a row's sample holds its number, and `PictureProcessor` reads the picture."""

    def __init__(self, images: ImageSource, name: str):
        # No declaration stands behind it: the recipe names an image source, not a dataset.
        super().__init__(DatasetSpec.model_construct(name=name, format="pictures"))
        self.images = images

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.images.identity().encode()).hexdigest()

    @property
    def reading(self) -> str:
        return "pictures"

    def __len__(self) -> int:
        return len(self.images)

    def sample(self, index: int) -> Sample:
        return Sample(self.images.describe(index), [], [index], self.name)

    def where(self, index: int, identity: str | None = None) -> str:
        return f"{self.name}, {self.images.describe(index)}"


def picture_mixture(training: TokenizerTraining | DiffusionTraining, images: ImageSource) -> Mixture:
    """The training images in the order of the common data pipeline."""
    source = PictureSource(images, training.images.type)
    spec = MixtureSpec.model_construct(name=source.name, datasets=[MixtureItem.model_construct(dataset=source.spec)])
    return Mixture(spec, seed=training.recipe.seed, sources=[source])


class PictureProcessor:
    """Makes samples of pictures: pixels as uint8 ``(1, 3, S, S)``; one learned position each, so that a step's loss is the
    mean over its pictures on all processes; as many tokens as the picture has codes."""

    image_tokens = 0
    chat_template = None

    def __init__(self, images: ImageSource, tokens_per_image: int):
        self.images, self.length = images, max(2, tokens_per_image)
        self.tokenizer = SimpleNamespace(pad_token_id=0)

    def encode_sample(self, sample: Sample, max_length: int | None = None) -> EncodedSample:
        """Raises `DataError` naming a picture that cannot be read."""
        pixels = self.images.batch([int(sample.images[0])])
        ids = torch.zeros(self.length, dtype=torch.long)
        labels = torch.full_like(ids, IGNORE)
        labels[-1] = 0
        encoded = EncodedSample(sample.id, sample.dataset, ids, labels, num_images=1)
        encoded.pixels = {PIXELS: pixels.contiguous()}
        return encoded
