"""What do Dynamic Perceiver's four exits answer, and what is a wrong answer's cost in training (arXiv 2306.11248)?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXITS = ("early3", "att", "cnn", "merge")
"""From the cheapest to the last: latents of stage 3, latents of stage 4, the CNN alone, everything."""


class Exits(nn.Module):
    """Classifiers of an encoder whose every part is built (``output: map``), under the authors' names.

    widths: of the CNN's map at the entry of each stage and of its last map; hidden: width of the last two classifiers' hidden layer, for
    CNNs whose own classifier has one (MobileNets).
    """

    def __init__(self, widths: list[int], num_classes: int, hidden: int | None):
        super().__init__()
        latent, last = widths[3], widths[4]
        self.isc3, self.isc4 = _told(num_classes, latent), _told(num_classes, latent)
        self.classifier_att = nn.Linear(2 * latent, num_classes)
        merged = last + 2 * latent
        if hidden is None:
            self.classifier_cnn: nn.Module = nn.Linear(last, num_classes)
            self.classifier_merge = nn.Sequential(nn.BatchNorm1d(merged), nn.Linear(merged, num_classes))
        else:
            self.classifier_cnn = nn.Sequential(*_two_layers(last, hidden, num_classes))
            self.classifier_merge = nn.Sequential(nn.BatchNorm1d(merged), *_two_layers(merged, hidden, num_classes))

    def forward(self, early: Tensor, latents: Tensor, last: Tensor, read: Tensor) -> dict[str, Tensor]:
        """Logits ``(B, classes)`` of every exit.

        early: logits of the exit of stage 3; latents ``(B, N, C)`` of stage 4; last, read ``(B, D, rows, cols)``: the CNN's last map before
        and after it has read them.
        """
        mean = latents.mean(1)
        att = self.classifier_att(torch.cat([mean, self.isc3(early)], dim=1))
        cnn = self.classifier_cnn(last.mean((2, 3)))
        merge = self.classifier_merge(torch.cat([read.mean((2, 3)), mean, self.isc4(att)], dim=1))
        return {"early3": early, "att": att, "cnn": cnn, "merge": merge}


def _told(num_classes: int, width: int) -> nn.Sequential:
    """What an exit says, handed to the next one."""
    return nn.Sequential(nn.Linear(num_classes, width), nn.BatchNorm1d(width), nn.ReLU())


def _two_layers(width: int, hidden: int, out: int) -> list[nn.Module]:
    return [nn.Linear(width, hidden), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(hidden, out)]


def exit_losses(
    logits: dict[str, Tensor],
    labels: Tensor,
    *,
    weights: dict[str, float],
    distill: float = 0.5,
    temperature: float = 1.0,
    smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """Weighted losses, whose sum is the authors': each exit's cross entropy, and ``distill`` times what the last exit's answer, which is
    not moved by it, teaches the other three.

    logits: of `Exits`; labels ``(B,)``; weights: of every exit (the authors': 0.5, 0.5, 1, 1); smoothing: of the labels.
    """
    losses = {
        name: weights[name] * F.cross_entropy(logits[name].float(), labels, label_smoothing=smoothing) for name in EXITS
    }
    if distill:
        teacher = (logits["merge"].detach().float() / temperature).softmax(-1)
        taught = [
            F.kl_div((logits[name].float() / temperature).log_softmax(-1), teacher, reduction="batchmean")
            * temperature**2
            for name in EXITS[:-1]
        ]
        losses["distilled"] = distill * torch.stack(taught).sum()
    return losses


def accuracy(logits: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """Share of right answers of every exit."""
    return {name: (found.argmax(-1) == labels).float().mean() for name, found in logits.items()}
