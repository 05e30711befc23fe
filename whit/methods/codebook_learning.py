"""Codebooks of short weight vectors: nearest codeword and weighted k-means, both in the metric that feedback implies.

A group of d columns rounded together leaves, once later columns have compensated for it, the error ||(v - q) T||^2 with
T = U_BB^-1, U_BB the group's diagonal block of U, H^-1 = U^T U. So the distance of k-means is ||(v - a c) T||^2, a the
scale of the row, and the best codeword for the vectors it was chosen for solves a d x d linear system. Weighted k-means
for codebooks of weights is that of van Baalen et al. 2024, "GPTVQ", arXiv 2402.15319.

Codebooks are symmetric: codeword(k + K/2) = -codeword(k), and only the first half ("words") is held.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

# Entries of the largest intermediate: vectors x words of one batch of groups; on a GPU.
BATCH_ENTRIES = 2**19
BATCH_ENTRIES_ON_GPU = 2**24
# Learning looks at about so many vectors; more hardly change a codebook of at most 256 words.
LEARNING_VECTORS = 2**16
WIDEST_TERNARY = 8
# Ternary words start from real ones, divided by this multiple of the row's root mean square.
TERNARY_UNIT = 1.3


def nearest_words(values: Tensor, scales: Tensor, words: Tensor, metric: Tensor) -> Tensor:
    """The signed codeword of least ||(v - a c) T||^2 for each vector.

    Args:
        values: v, (..., rows, d).
        scales: a >= 0, (rows,).
        words: (K/2, d).
        metric: T, (..., d, d).

    Returns:
        codes int64 (..., rows): k for words[k], k + K/2 for -words[k].
    """
    rotated = words @ metric
    products = (values @ metric) @ rotated.transpose(-1, -2)
    lengths = rotated.square().sum(-1).unsqueeze(-2)
    # |v - a c|^2 = |v|^2 - 2 a |v.c| + a^2 |c|^2 at the better sign.
    best = (2 * products.abs() - scales.unsqueeze(-1) * lengths).argmax(-1, keepdim=True)
    negative = products.gather(-1, best) < 0
    return (best + len(words) * negative).squeeze(-1)


def initial_words(values: Tensor, scales: Tensor, count: int) -> Tensor:
    """Words to start from: vectors of the weight, drawn with a seed of their own: (count, d).

    Args:
        values: (groups, rows, d).
        scales: (rows,); rows of scale zero are not drawn from while there are others.
        count: K/2.
    """
    live = torch.nonzero(scales > 0).squeeze(1)
    if not len(live):
        live = torch.arange(len(scales), device=scales.device)
    total = values.shape[0] * len(live)
    drawn = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count]
    places = drawn.repeat(-(-count // len(drawn)))[:count].to(values.device)
    rows = live[places % len(live)]
    return values[places // len(live), rows] / scales[rows].clamp(min=1e-30).unsqueeze(1)


def learn_words(
    values: Tensor, scales: Tensor, metrics: Tensor, words: Tensor, iterations: int, ternary: bool = False
) -> Tensor:
    """Weighted k-means from given words: (K/2, d).

    Each turn assigns all vectors, then moves every word to the minimum of its share of sum ||(v - a c) T||^2: the
    solution of (sum a^2 T T^T) c = sum a T T^T v, or the best of all ternary vectors.

    Args:
        values: (groups, rows, d).
        scales: (rows,).
        metrics: T of each group, (groups, d, d); rows of zeros where a group has no column.
        words: (K/2, d).
        iterations: turns.
        ternary: words of -1, 0, 1 only; d at most 8.
    """
    stride = -(-values.shape[0] * values.shape[1] // LEARNING_VECTORS)
    values, scales = values[:, ::stride], scales[::stride]
    squares = metrics @ metrics.transpose(1, 2)
    for _ in range(iterations):
        normal, right = _moments(values, scales, metrics, squares, words)
        if ternary:
            words = _best_ternary(normal, right)
            continue
        diagonal = torch.diagonal(normal, dim1=1, dim2=2)
        used = diagonal.sum(1, keepdim=True) > 0
        diagonal += 1e-6 * diagonal.mean(1, keepdim=True) + 1e-30
        words = torch.where(used, torch.linalg.solve_ex(normal, right).result, words)
    return words


def _moments(values: Tensor, scales: Tensor, metrics: Tensor, squares: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """sum a^2 T T^T (K/2, d, d) and sum a T T^T v (K/2, d) over the vectors of each word, signs folded in."""
    count, width = words.shape
    normal = torch.zeros(count, width, width, device=values.device)
    right = torch.zeros(count, width, device=values.device)
    numbers = torch.arange(count, device=values.device).unsqueeze(1)
    step = max(1, (BATCH_ENTRIES_ON_GPU if values.is_cuda else BATCH_ENTRIES) // (values.shape[1] * count))
    for start in range(0, len(values), step):
        part = slice(start, start + step)
        codes = nearest_words(values[part], scales, words, metrics[part])
        signs = torch.where(codes < count, scales, -scales)
        # A matrix product instead of scattered sums: the same bits on every run, on GPUs too.
        chosen = ((codes % count).unsqueeze(1) == numbers).to(values.dtype)
        mass = chosen @ scales.square()
        sums = chosen @ (values[part] * signs.unsqueeze(-1))
        normal += torch.einsum("gk,gij->kij", mass, squares[part])
        right += torch.einsum("gki,gij->kj", sums, squares[part])
    return normal, right


def ternary_words(width: int) -> Tensor:
    """All vectors of -1, 0, 1 up to their sign, zero among them: float32 ((3^width + 1) / 2, width)."""
    return _all_ternary(width)[3**width // 2 :]


def _all_ternary(width: int) -> Tensor:
    """Vector number i and number 3^width - 1 - i differ in sign only; the zero vector is in the middle."""
    return torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=width)))


def distinct_ternary(words: Tensor) -> Tensor:
    """Each word in turn replaced by the nearest ternary vector that no earlier one took, itself or negated."""
    candidates = ternary_words(words.shape[1]).to(words.device)
    scaled = words / TERNARY_UNIT
    # Both signs of a candidate stand for it: its distance is that of the nearer one.
    distance = candidates.square().sum(1) - 2 * (scaled @ candidates.T).abs()
    taken = []
    distance = distance.cpu()  # a small matrix, looked at word by word
    for row in distance:
        taken.append(int(row.argmin()))
        distance[:, taken[-1]] = torch.inf
    return candidates[torch.tensor(taken, device=words.device)]


def _best_ternary(normal: Tensor, right: Tensor) -> Tensor:
    """The ternary c of least c^T A c - 2 b^T c for each word, by trying all: (words, d)."""
    candidates = _all_ternary(normal.shape[1]).to(normal.device)
    squares = (candidates.unsqueeze(2) * candidates.unsqueeze(1)).flatten(1)
    return candidates[(squares @ normal.flatten(1).T - 2 * candidates @ right.T).argmin(0)]
