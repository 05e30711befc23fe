"""Compression methods, one file each: a frozen dataclass of knobs and pure functions (weight, statistics) -> packed."""

from whit.methods.base import (
    Compressed,
    Knob,
    Method,
    available_methods,
    knob,
    knobs,
    make_method,
    method_class,
    method_from_json,
    register_method,
)
from whit.methods.statistics import LayerStatistics, Statistic, relative_output_error

__all__ = [
    "Compressed",
    "Knob",
    "LayerStatistics",
    "Method",
    "Statistic",
    "available_methods",
    "knob",
    "knobs",
    "make_method",
    "method_class",
    "method_from_json",
    "register_method",
    "relative_output_error",
]
