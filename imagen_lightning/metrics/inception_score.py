"""The Inception score: how certain and how varied the classes of pictures are (Salimans et al. 2016, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imagen_lightning.errors import InputError
from imagen_lightning.metrics.finite import check_finite


@dataclass(frozen=True)
class InceptionScore:
    """exp(E KL(p(y|x) || p(y))).

    Attributes:
        value: its mean over the splits.
        std: its standard deviation over the splits.
        num_splits: how many.
    """

    value: float
    std: float
    num_splits: int

    @property
    def settings(self) -> str:
        """In words, for a protocol."""
        return f"{self.num_splits} splits"


def inception_score(logits: Tensor, *, num_splits: int = 10, seed: int = 0) -> InceptionScore:
    """The score over random splits, in float64.

    Args:
        logits: (N, classes); torch-fidelity's and the original's are without the bias of the last layer
            (`InceptionFeatures.logits`).
        num_splits: of N shuffled samples.
        seed: of the shuffle.

    Raises:
        InputError: more splits than samples, or none; logits that are not finite.
    """
    if not 1 <= num_splits <= len(logits):
        raise InputError(f"the Inception score of {len(logits)} samples cannot have {num_splits} splits; take fewer")
    check_finite(logits)
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    log_p = logits.detach().double().log_softmax(dim=1)[order.to(logits.device)]
    scores = []
    for k in range(num_splits):
        part = log_p[k * len(log_p) // num_splits : (k + 1) * len(log_p) // num_splits]
        marginal = part.exp().mean(dim=0)
        # A class without any probability adds 0 log 0 = 0.
        divergence = torch.xlogy(part.exp(), part.exp()) - torch.xlogy(part.exp(), marginal)
        scores.append(divergence.sum(dim=1).mean().exp())
    each = torch.stack(scores)
    return InceptionScore(float(each.mean()), float(each.std(correction=0)), num_splits)
