"""What may one say about an evaluation, besides the model and the tasks?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from mllm.config import StrictModel
from mllm.eval.generators.base import GeneratorSettings


class EvalSettings(StrictModel):
    """The settings of `run_eval`; plain data, so that the processes of one run are given all of them alike."""

    output_dir: Path | None = None
    """Default: ``eval`` beside the checkpoint."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first questions of each task."""
    ids: Sequence[str] | None = None
    """Only these questions."""
    batch_size: int = Field(default=8, ge=1)
    blind: bool | Literal["gray", "none"] = False
    """Also ask with every picture blanked (true or ``gray``: mid-gray of the same size; ``none``: no picture), with another
    question's, and count what the commonest answer scores."""
    check_batch: bool = False
    """Also answer some questions one by one and compare."""
    resume: bool = True
    data_dirs: Mapping[str, str | Path] = Field(default_factory=dict)
    """Task → folder of its data."""
    dtype: str = "float32"
    device: str | None = None
    generator: str = "hf"
    """``hf`` (in this process), ``vllm``, ``openai``, or a plug-in's."""
    base_url: str | None = None
    """openai: where the server is."""
    concurrency: int = Field(default=8, ge=1)
    """openai: requests at once."""
    picture_cache: int = Field(default=1024, ge=0)
    """hf: MiB for the visual tokens of pictures that are asked about again, in the same task or another; 0: none."""
    cache_dir: Path | None = None
    """Folder of answers shared by runs."""
    overrides: Sequence[str] = ()
    """``task.key.sub=value``: changes of a task's declaration (``chartqa.generation.max_new_tokens=64``)."""
    strict: bool = False
    """A row that cannot be used ends the run."""
    processes: int = Field(default=1, ge=1)
    """On this machine, sharing the questions."""
    earlier: Sequence[Path] = ()
    """Folders of earlier runs, which tell how long this one will take."""
    price: float | None = Field(default=None, ge=0)
    """Of an hour of one process, to say what the run costs."""
    progress: bool = True

    @property
    def generation(self) -> GeneratorSettings:
        """What of it the generator is told."""
        return GeneratorSettings(
            self.batch_size, self.dtype, self.device, self.base_url, self.concurrency, self.picture_cache
        )
