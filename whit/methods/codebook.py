"""Vector quantisation by a learnt codebook, below one stored bit per weight.

A group of d neighbouring weights is one code of K, by default K = 256 and d = 12: 0.67 bits, and what the scales and
the codebook add. Codewords are learnt per layer, either with real entries (stored in 8 bits) or ternary (-1, 0, 1:
patterns of signs and zeros, which is what structured binary methods make of a group). Groups are rounded in turn with
error feedback (`whit.methods.group_feedback`); the codebook is then learnt again on the values that the feedback made
of the weights, and codes are refined by coordinate descent.

Source of the approach (GPTQ's update for vectors, codebooks by weighted k-means with 8-bit entries): van Baalen et al.,
"GPTVQ: The Blessing of Dimensionality for LLM Quantization", 2024, arXiv 2402.15319.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from whit.errors import KnobError, ModelError
from whit.finite import all_finite
from whit.formats.vector_codebook import STEPS, VectorCodebook
from whit.kernels.split_product import product
from whit.methods.base import Compressed, Method, knob, register_method
from whit.methods.codebook_learning import (
    TERNARY_UNIT,
    WIDEST_TERNARY,
    distinct_ternary,
    initial_words,
    learn_words,
)
from whit.methods.group_feedback import (
    decode,
    descend_groups,
    loudest_first,
    metrics,
    refit_scales,
    round_groups,
    stacked,
)
from whit.methods.statistics import LayerStatistics, Statistic

RELEARNING_ITERATIONS = 3


@register_method
@dataclass(frozen=True)
class Codebook(Method):
    """One code per group of weights; codewords learnt per layer in the metric of the inputs."""

    name: ClassVar[str] = "codebook"
    summary: ClassVar[str] = "groups of weights as entries of a learnt codebook, under one stored bit per weight"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.SECOND_MOMENT})

    codes: int = knob(256, "codewords, K; log2(K) / width bits per weight", choices=(4, 8, 16, 32, 64, 128, 256))
    width: int | None = knob(
        None, "neighbouring weights per code; if not given: 12, for ternary patterns 8", minimum=1, maximum=32
    )
    patterns: str = knob(
        "real", "entries of a codeword: any (stored in 8 bits) or -1, 0, 1", choices=("real", "ternary")
    )
    iterations: int = knob(20, "turns of k-means for the codebook", minimum=0, maximum=1000)
    rounds: int = knob(3, "times all groups are rounded, the codebook learnt again in between", minimum=1, maximum=100)
    passes: int = knob(3, "turns of refitting scales and choosing every code anew", minimum=0, maximum=100)
    damping: float = knob(0.1, "added to diag(H), relative to its mean", minimum=0, maximum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patterns == "real":
            return
        width = self._width()
        if width > WIDEST_TERNARY:
            raise KnobError(
                f"width {width} is too wide for ternary patterns, all 3^width of which are tried: at most "
                f"{WIDEST_TERNARY}, or patterns real"
            )
        if self.codes > 3**width:
            raise KnobError(
                f"there are only {3**width} ternary patterns of width {width}, fewer than {self.codes} codes"
            )

    def _width(self) -> int:
        if self.width is not None:
            return self.width
        return 12 if self.patterns == "real" else 8

    def format(self, rows: int, columns: int) -> VectorCodebook:
        """Codes, a scale per row and the codebook."""
        return VectorCodebook(self.codes, self._width(), self.patterns == "ternary")

    def compress(self, weight: Tensor, statistics: LayerStatistics) -> Compressed:
        """Learn a codebook and round with feedback; needs `statistics.second_moment`.

        Raises:
            ModelError: a scale overflows float16.
        """
        layout = self.format(*weight.shape)
        moment = statistics.second_moment
        if moment is None:
            raise ValueError("second moments were not gathered")
        order = loudest_first(torch.diagonal(moment), layout.width)
        factor = statistics.inverse_factor(self.damping, order.columns)
        inner = moment[order.columns][:, order.columns].float()
        diagonal = torch.diagonal(inner)
        diagonal[factor.dead[order.columns]] = 1
        diagonal += max(factor.damping, 1e-6) * float(diagonal.mean())
        metric = metrics(factor.upper, order, layout.width)
        target = weight[:, order.columns]
        ternary = layout.ternary

        groups = stacked(target, order, layout.width)
        scales = target.square().mean(1).sqrt()
        words = initial_words(groups, scales, self.codes // 2)
        words = learn_words(groups, scales, metric, words, self.iterations)
        if ternary:
            words, scales = distinct_ternary(words), scales * TERNARY_UNIT
            words = learn_words(groups, scales, metric, words, self.iterations, ternary)
        codebook, words, scales = storable(words, scales, ternary)
        codes, current = round_groups(target, factor.upper, order, metric, scales, words)
        for _ in range(self.rounds - 1):
            scales = refit_scales(target, decode(codes, scales, words, order), inner, scales)
            groups = stacked(current, order, layout.width)
            words = learn_words(groups, scales, metric, words, RELEARNING_ITERATIONS, ternary)
            codebook, words, scales = storable(words, scales, ternary)
            codes, current = round_groups(target, factor.upper, order, metric, scales, words)
        for turn in range(self.passes + 1):
            values = decode(codes, scales, words, order)
            scales = _float16(refit_scales(target, values, inner, scales))
            if turn < self.passes:
                values = decode(codes, scales, words, order)
                descend_groups(codes, values, product(target - values, inner), inner, order, scales, words)
        if not all_finite(scales):
            raise ModelError(
                f"a weight of magnitude {float(weight.abs().max()):.3g} needs a scale beyond float16; rescale the model"
            )
        natural = torch.empty_like(codes)
        natural[:, order.groups] = codes
        return Compressed(layout.pack(natural, scales, codebook, weight.shape[1]), factor.notes)


def storable(words: Tensor, scales: Tensor, ternary: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Round a codebook and scales to what is stored.

    Returns:
        whole numbers of the codebook (K/2, d); the words they stand for, float32; scales exact in float16, (rows,). The
        largest entry of real words becomes 127 / 128, its size moves into the scales.
    """
    if ternary:
        return words, words, _float16(scales)
    peak = float(words.abs().max()) or 1.0
    steps = (words * ((STEPS - 1) / peak)).round()
    return steps, steps / STEPS, _float16(scales * (peak * STEPS / (STEPS - 1)))


def _float16(scales: Tensor) -> Tensor:
    return scales.half().float()
