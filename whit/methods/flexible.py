"""Mixed number formats: for every layer the pair of number systems, one for inputs and one for weights, that disturbs
its output least.

Source: Zhang et al. 2023, "Exploring the Potential of Flexible 8-bit Format: Design and Algorithm", arXiv 2310.13513:
one scale per tensor, five 8-bit systems, the pair of least squared output error (`--group-size -1 --input-scale tensor
--reserve-top true`). The defaults here are finer: a scale per row of weights and per token of inputs. With one system
named in `formats` it is plain FP8 or INT8 rounding (`--formats e4m3fn`, `--formats int8`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from whit.errors import KnobError
from whit.formats.base import Format, Packed
from whit.formats.minifloat import MENUS, NumberSystem, number_system
from whit.formats.quantised_inputs import QuantisedInputs
from whit.formats.scaled_codes import ScaledCodes, split_groups
from whit.methods.base import Compressed, Method, knob, register_method
from whit.methods.number_choice import (
    choose_pair,
    fit_scales,
    may_meet,
    output_scores,
    resolution_score,
    round_weight,
    tensor_score,
)
from whit.methods.statistics import LayerStatistics, Statistic

UNROUNDED = 16
"""`input_bits` that leaves the inputs alone."""

# Knobs that say how inputs are rounded: they do nothing where inputs are left alone.
_INPUT_KNOBS = {"input_scale": "token", "input_group_size": 0, "limited": False}


@dataclass(frozen=True)
class _Rounding:
    """One way to round the inputs: its layout (around any weight), stored scales if static, and the rounded sample."""

    layout: QuantisedInputs
    scales: Tensor | None
    sample: Tensor | None

    def around(self, weight: Packed) -> Packed:
        """The weight in a layer that rounds its inputs so."""
        return dataclasses.replace(self.layout, weight=weight.format).pack(weight, self.scales)


@register_method
@dataclass(frozen=True)
class Flexible(Method):
    """Weights, and inputs if asked for, in the number systems that fit the layer best, chosen from a menu."""

    name: ClassVar[str] = "flexible"
    summary: ClassVar[str] = "FP8/INT8 (also 6 and 4 bits): number systems chosen per layer, for weights and inputs"
    follows_pruning: ClassVar[bool] = True

    bits: int = knob(8, "bits per weight code", choices=(8, 6, 4))
    input_bits: int = knob(8, "bits of each input of a layer; 16 leaves inputs alone", choices=(16, 8, 6, 4))
    formats: str = knob(
        "", "number systems to choose from, as int8,e4m3fn; those of 6 and 4 bits likewise; empty: all of each width"
    )
    reserve_top: bool = knob(
        False, "the empty menu's floats keep their largest exponent for infinity, as IEEE 754 does"
    )
    group_size: int = knob(0, "columns that share a scale; 0 for the whole row, -1 for the whole tensor", minimum=-1)
    input_scale: str = knob(
        "token",
        "scale of inputs: of each token as it comes, or one for the tensor from calibration",
        choices=("token", "tensor"),
    )
    input_group_size: int = knob(0, "channels of the inputs that share a scale; 0 for all", minimum=0)
    scale: str = knob("max", "scales from the largest magnitude, or of least squared error", choices=("max", "mse"))
    score: str = knob(
        "output",
        "what a choice is judged by: the layer's output, each tensor by itself, or the spacing of numbers",
        choices=("output", "tensor", "resolution"),
    )
    raw_resolution: bool = knob(False, "score resolution as published: zeros counted, sums instead of means")
    limited: bool = knob(False, "inputs and weights of a layer are both integers or both floats")
    norm: float = knob(2.0, "exponent of the error norm", minimum=0.5, maximum=8)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.input_bits == UNROUNDED:
            given = [name for name, default in _INPUT_KNOBS.items() if getattr(self, name) != default]
            if given:
                raise KnobError(
                    f"knob {given[0]!r} of method {self.name!r} does nothing with input_bits {UNROUNDED}: leave one out"
                )
        if self.raw_resolution and self.score != "resolution":
            raise KnobError(
                f"knob 'raw_resolution' of method {self.name!r} does nothing with score {self.score!r}: leave it out, "
                "or use score resolution"
            )
        pairs = [(a, w) for a in self.input_menu() or (None,) for w in self.weight_menu()]
        if self.limited and not any(may_meet(a, w) for a, w in pairs):
            raise KnobError(
                f"knob 'limited' of method {self.name!r} leaves no pair among formats {self.formats!r}: name integers, "
                "or floats, for both widths"
            )

    def weight_menu(self) -> tuple[NumberSystem, ...]:
        """Candidates for weights, in the order in which ties are decided."""
        return self._menu(self.bits)

    def input_menu(self) -> tuple[NumberSystem, ...]:
        """Candidates for inputs; none if they are left alone."""
        return () if self.input_bits == UNROUNDED else self._menu(self.input_bits)

    def _menu(self, bits: int) -> tuple[NumberSystem, ...]:
        if not self.formats.strip():
            names = MENUS[bits] if self.reserve_top else [_with_usable_top(name) for name in MENUS[bits]]
            return tuple(number_system(name) for name in names)
        try:
            named = [number_system(name.strip()) for name in self.formats.split(",")]
        except ValueError as error:
            raise KnobError(f"knob 'formats' of method {self.name!r}: {error}") from None
        foreign = [item for item in named if item.bits not in (self.bits, self.input_bits)]
        if foreign:
            raise KnobError(
                f"knob 'formats' of method {self.name!r} names {foreign[0].name!r}, which has {foreign[0].bits} bits: "
                f"bits is {self.bits} and input_bits {self.input_bits}"
            )
        fitting = tuple(dict.fromkeys(item for item in named if item.bits == bits))
        if not fitting:
            raise KnobError(
                f"knob 'formats' of method {self.name!r} names no number system of {bits} bits, got {self.formats!r} "
                f"(for example: {', '.join(MENUS[bits])})"
            )
        return fitting

    def required(self) -> frozenset[Statistic]:
        """The range of the inputs for a stored scale, a sample of them to judge by, nothing for one fixed format."""
        static = self.input_bits != UNROUNDED and self.input_scale == "tensor"
        menus = len(self.weight_menu()) > 1, len(self.input_menu()) > 1
        judged = menus[1] or (menus[0] and self.score == "output") or (static and self.scale == "mse")
        needs = {Statistic.RANGE} if static else set()
        return frozenset(needs | ({Statistic.SAMPLE} if judged else set()))

    def plan_note(self) -> str | None:
        """That the number systems in the plan are the first of each menu, unless there is only one to choose."""
        if len(self.weight_menu()) == 1 and len(self.input_menu()) <= 1:
            return None
        names = dict.fromkeys(numbers.name for numbers in (*self.input_menu(), *self.weight_menu()))
        return (
            f"number systems are chosen per layer during compression (the plan names the first) of {', '.join(names)}"
        )

    def format(self, rows: int, columns: int) -> Format:
        """With the first system of each menu: all of a width are stored alike. A group wider than the row is it."""
        weight = self._weight_layout(self.weight_menu()[0], columns)
        return self._wrap(weight, self.input_menu()[0], columns) if self.input_menu() else weight

    def _weight_layout(self, numbers: NumberSystem, columns: int) -> ScaledCodes:
        return ScaledCodes(numbers.name, self.group_size if self.group_size < columns else 0)

    def _wrap(self, weight: Format, numbers: NumberSystem, columns: int) -> QuantisedInputs:
        group = self.input_group_size if self.input_group_size < columns else 0
        return QuantisedInputs(weight, numbers.name, self.input_scale == "tensor", group)

    def compress(self, weight: Tensor, statistics: LayerStatistics) -> Compressed:
        """Round in every system of the menus and keep the pair of least score; its table goes into the details.

        Where nothing is known of the inputs (an embedding, a layer that calibration never reached) weights are judged
        by themselves, inputs get the first system of their menu and, as no scale can be stored, one scale per token.

        Raises:
            ModelError: weights or the range of the inputs are not finite.
        """
        return self._compress(weight, weight, lambda part: part, statistics)

    def check_follows_pruning(self) -> None:
        """Only where inputs are left alone: a sparse layout does not round them.

        Raises:
            KnobError: `input_bits` is less than 16.
        """
        if self.input_bits != UNROUNDED:
            raise KnobError(
                f"method {self.name!r} can follow a pruning step with input_bits {UNROUNDED} only, "
                f"got input_bits {self.input_bits}"
            )

    def compress_kept(self, weight: Tensor, kept: Tensor, statistics: LayerStatistics) -> Compressed:
        """Round the kept weights of each row side by side; a choice is judged by the output of the sparse layer."""
        self.check_follows_pruning()
        values = torch.masked_select(weight, kept).reshape(len(weight), -1)
        return self._compress(
            values, weight, lambda part: torch.zeros_like(weight).masked_scatter_(kept, part), statistics
        )

    def _compress(
        self, values: Tensor, weight: Tensor, place: Callable[[Tensor], Tensor], statistics: LayerStatistics
    ) -> Compressed:
        """Round `values`; `place` puts them where they belong in the weight whose outputs judge the choice."""
        columns, search = values.shape[1], self.scale == "mse"
        packed = [
            round_weight(values, self._weight_layout(numbers, columns), search=search) for numbers in self.weight_menu()
        ]
        roundings = [self._rounding(numbers, columns, statistics) for numbers in self.input_menu()]
        notes = self._notes(statistics, roundings)
        if len(packed) * max(len(roundings), 1) == 1:
            return Compressed(roundings[0].around(packed[0]) if roundings else packed[0], notes)
        if self.score == "output" and statistics.sample is not None:
            inputs = [item.sample for item in roundings if item.sample is not None] or [statistics.sample]
            rounded = (place(item.unpack()) for item in packed)
            scores = output_scores(statistics.sample, weight, inputs, rounded, self.norm)
        else:
            scores = self._separate_scores(values, packed, roundings, statistics.sample)
        row, column = choose_pair(scores, self.input_menu() or (None,), self.weight_menu(), limited=self.limited)
        chosen = roundings[row].around(packed[column]) if roundings else packed[column]
        return Compressed(chosen, notes, self._details(scores))

    def _rounding(self, numbers: NumberSystem, columns: int, statistics: LayerStatistics) -> _Rounding:
        layout = self._wrap(self._weight_layout(self.weight_menu()[0], columns), numbers, columns)
        sample = statistics.sample
        scales = self._static_scales(layout, statistics) if layout.static else None
        if layout.static and scales is None:
            layout = dataclasses.replace(layout, static=False)
        tensors = {} if scales is None else {"input_scales": scales}
        return _Rounding(layout, scales, None if sample is None else layout.round_inputs(sample, tensors))

    def _static_scales(self, layout: QuantisedInputs, statistics: LayerStatistics) -> Tensor | None:
        """One float32 scale per group of channels, or None if nothing is known of the inputs."""
        known = [statistics.absolute_maximum] if statistics.tokens else []
        known += [None if statistics.sample is None else statistics.sample.abs().amax(0)]
        ranges = [item for item in known if item is not None]
        if not ranges:
            return None
        largest = split_groups(torch.stack(ranges).amax(0), layout.group_size).amax(-1)
        values = largest.unsqueeze(1)
        if statistics.sample is not None:
            values = split_groups(statistics.sample, layout.group_size).transpose(0, 1).flatten(1)
        search = self.scale == "mse" and statistics.sample is not None
        return fit_scales(values, layout.numbers, torch.float32, search=search, largest=largest)

    def _separate_scores(
        self, weight: Tensor, packed: Sequence[Packed], roundings: Sequence[_Rounding], sample: Tensor | None
    ) -> Tensor:
        """Score of the inputs plus score of the weight, float64 (inputs, weights); inputs nobody has seen score 0."""
        of_weights = [self._weight_score(weight, item) for item in packed]
        of_inputs = [0.0 if sample is None else self._input_score(sample, item) for item in roundings] or [0.0]
        return torch.tensor([[a + w for w in of_weights] for a in of_inputs], dtype=torch.float64)

    def _weight_score(self, weight: Tensor, packed: Packed) -> float:
        if self.score != "resolution":
            return tensor_score(weight, packed.unpack(), self.norm)
        layout = packed.format
        assert isinstance(layout, ScaledCodes)
        scales = packed.tensors["scales"].float()
        return resolution_score(weight, scales, max(layout.group_size, 0), layout.numbers, raw=self.raw_resolution)

    def _input_score(self, sample: Tensor, rounding: _Rounding) -> float:
        if self.score != "resolution":
            assert rounding.sample is not None
            return tensor_score(sample, rounding.sample, self.norm)
        layout = rounding.layout
        scales = layout.input_scales(sample, {} if rounding.scales is None else {"input_scales": rounding.scales})
        return resolution_score(sample, scales, layout.group_size, layout.numbers, raw=self.raw_resolution)

    def _notes(self, statistics: LayerStatistics, roundings: Sequence[_Rounding]) -> tuple[str, ...]:
        notes = []
        if Statistic.SAMPLE in self.required() and statistics.sample is None:
            notes.append("no sample of the inputs: number systems chosen by the weights alone")
        if self.input_scale == "tensor" and not all(item.layout.static for item in roundings):
            notes.append("range of the inputs unknown: their scale is taken from each token")
        return tuple(notes)

    def _details(self, scores: Tensor) -> dict[str, Any]:
        return {
            "inputs": [numbers.name for numbers in self.input_menu()],
            "weights": [numbers.name for numbers in self.weight_menu()],
            "scores": [[float(f"{score:.4g}") for score in line] for line in scores.tolist()],
        }


def _with_usable_top(name: str) -> str:
    """The menu's name of a system whose largest exponent holds numbers; e5m2 stays what hardware knows."""
    return name if name.startswith("int") or name == "e5m2" else f"{name}fn"
