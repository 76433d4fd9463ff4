"""What do all published sets of masks share: how their files are found, what is asked of a picture, where unusable rows go?"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from mllm.data.files import file_hash
from mllm.data.sources import Source
from mllm.data.spec import DatasetSpec, expand_path
from mllm.errors import ConfigError, DataError
from mllm.types import IMAGE_MARK, Turn

ANSWER, ANSWER_NOTHING = "It is [SEG].", "It is [SEG]: none."
"""What is learned beside the mask (LISA's first answer), and beside the empty mask of what is not there."""


class MaskRows(Source):
    """Rows of a set of masks. ``path``: its file or folder; ``image_root``: where its pictures lie; ``prompt``: what the user says, with
    what is asked for as ``{question}``."""

    what = "an annotation file"
    """That ``path`` has to be."""
    named = ""
    """What it is called where it is not there; empty: ``what``."""
    asked = "what is asked for"
    rows: list[Any]

    def __init__(self, spec: DatasetSpec):
        super().__init__(spec)
        where = f"dataset {spec.name}"
        if spec.path is None or spec.streaming:
            raise ConfigError(
                f"{where}: format {spec.format} reads {self.what}; give path, and neither hub nor streaming"
            )
        if "{question}" not in spec.prompt:
            raise ConfigError(
                f"{where}: prompt: {spec.prompt!r} has no place for {self.asked}; write {{question}} there"
            )
        self.path = expand_path(spec.path, where=where)
        if not self.is_there():
            hint = f". It comes from: {' ; '.join(spec.download)}" if spec.download else ""
            raise DataError(f"{where}: no {self.named or self.what} {self.path}{hint}")
        beside = self.path if self.path.is_dir() else self.path.parent
        self.root = expand_path(spec.image_root, where=where) if spec.image_root else beside

    def is_there(self) -> bool:
        """Whether ``path`` is."""
        return self.path.exists()

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def fingerprint(self) -> str:
        return file_hash([self.path])

    def quarantine_path(self) -> Path:
        if self.spec.quarantine:
            return super().quarantine_path()
        return self.path.with_name(f"{self.path.name}.{self.spec.split}.quarantine.jsonl")

    def turns(self, question: str, answer: str) -> list[Turn]:
        """What is said of a row's picture. question: as the set has it; a picture's mark in it is text."""
        request = self.spec.prompt.replace("{question}", question.replace(IMAGE_MARK, "").strip())
        return [Turn("user", f"{IMAGE_MARK}\n{request}"), Turn("assistant", answer)]
