"""Sequences of which it is not known which frame says what: speech, handwriting."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from matta.errors import LabelError
from matta.objectives.elementwise import Elementwise
from matta.objectives.labels import Labels, refuse_out_of_range
from matta.objectives.losses import log_probabilities
from matta.objectives.objective import check_labels


@final
class CTC(Elementwise):
    """Connectionist temporal classification (Graves et al. 2006), in nats for each symbol of the labels.

    f is −log of the probability of all paths that spell the labels, divided by their length, as in `torch.nn.CTCLoss`.
    g, frame by frame, is the cross-entropy −Σ p_TA·log p_S, averaged over the frames. Each loss is the mean over the
    examples whose labels are not all ignored. All frames count: frames of padding learn to be blank.

    Logits of shape (batch, frames, classes). Labels: classes of shape (batch, symbols), padded by `ignore_index` and
    never by the blank; there must be as many frames as symbols, and one more for each symbol that is repeated.

    Args:
        blank: The class of no symbol.
        ignore_index: Marks the padding of the labels.
        weights: The field of the batch that says what each example weighs in the mean; None: all the same.

    Example:
        >>> logits = torch.zeros(1, 3, 4)  # 3 frames of 4 classes, each of probability 1/4
        >>> round(CTC().cross_entropy(logits, torch.tensor([[2, -100]])).item(), 4)  # 6 of 64 paths spell it
        2.3671
    """

    def __init__(self, blank: int = 0, ignore_index: int = -100, *, weights: str | None = None) -> None:
        super().__init__(ignore_index, weights=weights)
        self.blank = blank

    def scores(self, logits: Tensor, labels: Labels | None) -> Tensor:
        if logits.ndim != 3:
            raise LabelError(f"the logits have shape {tuple(logits.shape)}; expected (batch, frames, classes)")
        return log_probabilities(logits)

    def judged(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As they are: frames and symbols do not stand side by side."""
        return logits, labels

    def counted(self, labels: Tensor) -> Tensor:
        return self.known(labels).any(-1)

    def soft(self, scores: Tensor) -> Tensor:
        return scores.exp()

    def targets(self, scores: Tensor, labels: Tensor) -> Tensor:
        if labels.ndim != 2 or len(labels) != len(scores) or labels.is_floating_point():
            raise LabelError(
                f"the labels are {labels.dtype} of shape {tuple(labels.shape)} and the logits of shape "
                f"{tuple(scores.shape)}; expected classes of shape (batch, symbols); a Teacher makes no labels for CTC"
            )
        known, symbols = self.known(labels), labels.long()
        check_labels(self, symbols.where(known, 0), lambda rows: refuse_out_of_range(rows, scores.shape[-1]))
        check_labels(self, symbols, self._refuse_blank, known)
        return symbols.where(known, -1)

    def total(self, scores: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
        if targets.is_floating_point():
            lowest = torch.finfo(scores.dtype).min
            return -((targets * scores.clamp(min=lowest)).sum(-1).mean(-1) * shares).sum()
        frames = torch.full((len(scores),), scores.shape[1], dtype=torch.long)
        known = targets >= 0
        packed = targets.gather(1, known.int().argsort(dim=1, descending=True, stable=True)).clamp(min=0)
        lengths = known.sum(1)
        losses = functional.ctc_loss(scores.transpose(0, 1), packed, frames, lengths, self.blank, reduction="none")
        return (losses / lengths.clamp(min=1) * shares).sum()

    def spread(self, shares: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
        return shares

    def _refuse_blank(self, symbols: Tensor) -> None:
        """Refuse labels that cannot be spelt, for which torch gives a number that is no loss.

        Raises:
            LabelError: a symbol is the blank, as where labels are padded with it.
        """
        if bool((symbols == self.blank).any()):
            raise LabelError(
                f"a label is {self.blank}, the blank of CTC; expected symbols alone, padded by {self.ignore_index}, "
                f"the ignore_index of the objective"
            )
