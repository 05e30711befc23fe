"""Sums over the tokens of one window: negative log-likelihood, KL divergence, top-1 agreement.

Logits of one window are large (2048 x 49152 float32 is 403 MB), so rows are taken a few at a time: the workspace stays
at a few times `ROWS` x vocabulary, whatever the window, and no float32 copy of all logits is made. A GPU takes more
rows, because many small steps cost it more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

ROWS = 64
DEVICE_ROWS = 512
#: Label that marks a position without a target (the convention of the field).
IGNORED = -100


@dataclass(frozen=True)
class TokenSums:
    """Sums over the scored tokens of one window.

    Attributes:
        tokens: scored positions.
        likelihood: sum of -log p(target), nats; None without targets.
        reference_likelihood: the same of the reference model.
        divergence: sum of KL(reference || model), nats; None without a reference.
        agreement: positions where both have the same most likely token.
    """

    tokens: int
    likelihood: float | None
    reference_likelihood: float | None
    divergence: float | None
    agreement: int | None


def token_sums(logits: Tensor, targets: Tensor | None, reference: Tensor | None = None) -> TokenSums:
    """Sum over the rows of one window.

    KL(p || q) = sum_v p(v) (log p(v) - log q(v)) with p the reference's and q the model's next-token distribution
    (Kullback and Leibler 1951).

    Args:
        logits: (tokens, vocabulary), any floating dtype.
        targets: int64 (tokens,), `IGNORED` where nothing is scored; None scores every position without likelihood.
        reference: logits of the reference model, same shape, or None.
    """
    scored = torch.arange(logits.shape[0], device=logits.device)
    if targets is not None:
        targets = targets.to(logits.device)
        scored = scored[targets != IGNORED]
    step = ROWS if logits.device.type == "cpu" else DEVICE_ROWS
    # Added up where the logits are and read once: asking a GPU for a number makes it wait for all that came before.
    totals = torch.zeros(4, dtype=torch.float64, device=logits.device)
    likelihood, reference_likelihood, divergence, agreement = totals
    for start in range(0, len(scored), step):
        rows = scored[start : start + step]
        model = functional.log_softmax(logits[rows].float(), dim=-1)
        if targets is not None:
            wanted = targets[rows][:, None]
            likelihood -= model.gather(1, wanted).sum(dtype=torch.float64)
        if reference is None:
            continue
        original = functional.log_softmax(reference[rows].float(), dim=-1)
        if targets is not None:
            reference_likelihood -= original.gather(1, wanted).sum(dtype=torch.float64)
        agreement += (model.argmax(-1) == original.argmax(-1)).sum()
        # In place: p * (log p - log q), and 0 where p = 0; a few buffers of `step` x vocabulary in all.
        difference = model.neg_().add_(original)
        probability = original.exp_()
        difference.mul_(probability).masked_fill_(probability == 0, 0)
        divergence += difference.sum(dtype=torch.float64)
    found = totals.tolist()
    return TokenSums(
        tokens=len(scored),
        likelihood=found[0] if targets is not None else None,
        reference_likelihood=found[1] if targets is not None and reference is not None else None,
        divergence=found[2] if reference is not None else None,
        agreement=int(found[3]) if reference is not None else None,
    )
