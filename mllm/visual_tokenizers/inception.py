"""Which features is rFID measured on? Those of the FID network, an Inception-v3 whose weights the user supplies."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import torch
from torch import Tensor, nn

from mllm.errors import CheckpointError, ConfigError, UnavailableError
from mllm.install import install_hint
from mllm.visual_tokenizers.base import as_unit_range

WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""In release v0.2.0 of toshas/torch-fidelity; the digits begin its sha256. pytorch-fid releases the same file as
``pt_inception-2015-12-05-6726825d.pth``."""
WIDTH = 2048


class InceptionFeatures(nn.Module):
    """Pixels in [-1, 1] ``(B, 3, H, W)`` → ``(B, 2048)`` after the last pooling, of the 2015 Inception-v3 that FID was
    defined on (arXiv 1706.08500), as torch-fidelity runs it: 8-bit images, TensorFlow 1's bilinear resize to 299 (torchmetrics'
    ``antialias=False``; its default resizes otherwise, which moves the distance by percents).

    sha256: of the weights file; published: whether that is the file every published rFID was measured with.
    """

    width = WIDTH

    def __init__(self, path: str | Path):
        """Raises `ConfigError` for a missing file, `CheckpointError` for another network's weights, and
        `UnavailableError` without torch-fidelity."""
        super().__init__()
        path = Path(path).expanduser()
        if not path.is_file():
            raise ConfigError(
                f"{path}: no such file. Download the FID network's weights once, {WEIGHTS_FILE} (about 95 MB) among the "
                "files of release v0.2.0 of toshas/torch-fidelity on GitHub, and give its path"
            )
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise UnavailableError(f"rFID needs torch-fidelity: {install_hint('eval')}") from error
        content = path.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.published = self.sha256.startswith(WEIGHTS_FILE.removesuffix(".pth").rpartition("-")[2])
        # torch-fidelity unpickles whatever the file holds; what it gets here holds tensors and nothing else.
        plain = io.BytesIO()
        try:
            torch.save(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True), plain)
            plain.seek(0)
            self.network = FeatureExtractorInceptionV3("fid", [str(WIDTH)], feature_extractor_weights_path=plain)
        except Exception as error:  # torch.load raises what the file's contents make it raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{path} is not the FID network's weights, {WEIGHTS_FILE} ({reason})") from error
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        return self.network((as_unit_range(pixels) * 255).round().to(torch.uint8))[0].float()
