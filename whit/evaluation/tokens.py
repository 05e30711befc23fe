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

ROWS = 32
DEVICE_ROWS = 512
ARGMAX_CHUNK = 256
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
        model = functional.log_softmax(_picked(logits, rows).float(), dim=-1)
        if targets is not None:
            wanted = targets[rows][:, None]
            likelihood -= model.gather(1, wanted).sum(dtype=torch.float64)
        if reference is None:
            continue
        original = functional.log_softmax(_picked(reference, rows).float(), dim=-1)
        if targets is not None:
            reference_likelihood -= original.gather(1, wanted).sum(dtype=torch.float64)
        agreement += (most_likely(model) == most_likely(original)).sum()
        divergence += _divergence(original, model).sum(dtype=torch.float64)
    found = totals.tolist()
    return TokenSums(
        tokens=len(scored),
        likelihood=found[0] if targets is not None else None,
        reference_likelihood=found[1] if targets is not None and reference is not None else None,
        divergence=found[2] if reference is not None else None,
        agreement=int(found[3]) if reference is not None else None,
    )


def most_likely(rows: Tensor) -> Tensor:
    """Index of the first largest value of each row, int64 (rows,): `argmax(-1)`.

    Maxima of chunks first, which a CPU finds many times faster than places; then the place in one chunk of each row.
    """
    count, width = rows.shape
    whole = width - width % ARGMAX_CHUNK
    if whole == 0 or rows.device.type != "cpu":
        return rows.argmax(-1)
    chunks = rows[:, :whole].reshape(count, -1, ARGMAX_CHUNK)
    chunk = chunks.amax(-1).argmax(-1)
    inside = chunks[torch.arange(count, device=rows.device), chunk]
    best, place = inside.max(-1)
    found = chunk * ARGMAX_CHUNK + place
    if whole == width:
        return found
    rest, place = rows[:, whole:].max(-1)
    last: Tensor = torch.where(rest > best, whole + place, found)
    return last


def _divergence(original: Tensor, model: Tensor) -> Tensor:
    """sum p (log p - log q) of each row from log-probabilities, in place, with 0 where p = 0."""
    difference = model.neg_().add_(original)
    probability = original.exp_()
    if difference.device.type == "cpu":
        found: Tensor = torch.linalg.vecdot(probability, difference)
        if bool(torch.isfinite(found).all()):  # else some p = 0 met an infinite logarithm
            return found
    return difference.mul_(probability).masked_fill_(probability == 0, 0).sum(-1, dtype=torch.float64)


def _picked(logits: Tensor, rows: Tensor) -> Tensor:
    """Some rows of the logits; on a CPU neighbours are not copied (on a GPU asking would make it wait)."""
    if logits.device.type != "cpu":
        return logits[rows]
    first, last = int(rows[0]), int(rows[-1])
    return logits[first : last + 1] if last - first + 1 == len(rows) else logits[rows]
