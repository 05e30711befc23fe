"""What a compression method is: a frozen dataclass of knobs and one pure function (weight, statistics) -> packed.

A method declares which statistics of a layer's inputs it needs; the pipeline gathers only those. A new method is one
file in this folder with one `@register_method` dataclass whose fields are made by `knob(...)`: command-line options,
validation, help and the `whit methods` listing all come from them.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeVar

from torch import Tensor

from whit.discovery import Registry
from whit.errors import KnobError, nearest
from whit.formats.base import Format, Packed
from whit.methods.statistics import LayerStatistics, Statistic

_METHODS: Registry[Method] = Registry("methods", "whit.methods")
_COMPOSITES: Registry[Method] = Registry("composed methods", "whit.methods")
MethodType = TypeVar("MethodType", bound="type[Method]")


def knob(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[Any] | None = None,
) -> Any:
    """A dataclass field that is also a typed, range-checked command-line option with one line of help."""
    return field(
        default=default,
        metadata={"help": help, "minimum": minimum, "maximum": maximum, "choices": choices},
    )


@dataclass(frozen=True)
class Knob:
    """Description of one method field, for the command line and the documentation."""

    name: str
    type: type
    default: Any
    help: str
    minimum: float | None
    maximum: float | None
    choices: tuple[Any, ...] | None


@dataclass(frozen=True)
class Compressed:
    """What a method returns.

    Attributes:
        packed: the packed weight.
        notes: remarks worth reading (for example: damping was raised).
        details: what the method measured on the way, as JSON values: kept in the record of the layer, shown nowhere.
    """

    packed: Packed
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SurveyedBlock:
    """One block in the division of a budget: the number its survey gave, and the weights it would apply to."""

    name: str
    score: float
    parameters: int


@dataclass(frozen=True)
class Method(ABC):
    """A compression method: a value. Subclasses are frozen dataclasses with `name`, `summary` and `needs`."""

    name: ClassVar[str]
    summary: ClassVar[str]
    needs: ClassVar[frozenset[Statistic]] = frozenset()
    survey_needs: ClassVar[frozenset[Statistic]] = frozenset()
    prunes: ClassVar[bool] = False
    follows_pruning: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for item in knobs(type(self)):
            _check(self.name, item, getattr(self, item.name))

    @abstractmethod
    def format(self, rows: int, columns: int) -> Format:
        """The layout this method will produce for a (rows, columns) weight: the plan's sizes come from it."""

    @abstractmethod
    def compress(self, weight: Tensor, statistics: LayerStatistics) -> Compressed:
        """Compress one weight.

        Args:
            weight: float32 (rows, columns), finite, rows = outputs. Not modified.
            statistics: of this layer's inputs; holds what `needs` names.

        Returns:
            the packed weight in `self.format(rows, columns)`, or where calibration decides (`plan_note`) in a layout of
            the same kind that stores no more; on the weight's device.
        """

    def plan_note(self) -> str | None:
        """What the plan must add to its sizes because calibration decides them; None if they are exact."""
        return None

    def required(self) -> frozenset[Statistic]:
        """Statistics that `compress` needs with these knobs; by default what the class declares in `needs`."""
        return self.needs

    def compress_kept(self, weight: Tensor, kept: Tensor, statistics: LayerStatistics) -> Compressed:
        """Compress only the weights that a pruning step kept; methods that can set `follows_pruning`.

        Args:
            weight: float32 (rows, columns), zero where pruned.
            kept: bool (rows, columns), the same number k in every row.
            statistics: as in `compress`, for all columns.

        Returns:
            the kept weights of each row side by side: packed (rows, k) in `self.format(rows, k)`.
        """
        self.check_follows_pruning()
        raise TypeError(f"{type(self).__name__} says that it follows pruning, but lacks compress_kept")

    def check_follows_pruning(self) -> None:
        """Refuse a method that cannot compress what a pruning step kept.

        Raises:
            KnobError: names the methods that can.
        """
        if not self.follows_pruning:
            raise KnobError(f"method {self.name!r} cannot follow a pruning step (methods that can: {_followers()})")

    def survey_required(self) -> frozenset[Statistic]:
        """Statistics of the dense model that dividing the budget among blocks needs; empty: every block alike."""
        return self.survey_needs

    def survey(self, weights: Sequence[Tensor], statistics: Sequence[LayerStatistics]) -> float:
        """How much one block of the dense model deserves, from its layers: a number that `allocate` understands."""
        return 0.0

    def allocate(self, blocks: Sequence[SurveyedBlock]) -> list[Self]:
        """One method per block, together within the budget that this method asks for."""
        return [self for _ in blocks]

    def to_json(self) -> dict[str, Any]:
        """`{"method": name, **knobs}`, methods inside methods likewise."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        nested = {key: value.to_json() if isinstance(value, Method) else value for key, value in fields.items()}
        return {"method": self.name, **nested}


def register_method(cls: MethodType) -> MethodType:
    """Class decorator that makes a method known by its name."""
    return _METHODS.add(cls)


def register_composite(cls: MethodType) -> MethodType:
    """Class decorator for a method made of other methods: known to `method_from_json`, not offered by name."""
    return _COMPOSITES.add(cls)


def available_methods() -> dict[str, type[Method]]:
    """Every method by name, sorted."""
    return _METHODS.known()


def _followers() -> str:
    return ", ".join(name for name, cls in available_methods().items() if cls.follows_pruning) or "none"


def method_class(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        KnobError: no such method; the message suggests the nearest.
    """
    known = available_methods()
    if name not in known:
        raise KnobError(f"unknown method {name!r}{nearest(name, known)} (known: {', '.join(known)})")
    return known[name]


def make_method(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """Build a method from its name and knob values (strings are converted to the knob's type).

    Raises:
        KnobError: unknown method or knob, wrong type, or a value out of range.
    """
    cls = method_class(name)
    known = {item.name: item for item in knobs(cls)}
    values: dict[str, Any] = {}
    for key, value in (options or {}).items():
        attribute = key.replace("-", "_")
        if attribute not in known:
            raise KnobError(
                f"method {name!r} has no knob {key!r}{nearest(attribute, known)} (knobs: {', '.join(known)})"
            )
        values[attribute] = _convert(name, known[attribute], value)
    return cls(**values)


def method_from_json(fields: Mapping[str, Any]) -> Method:
    """Inverse of `Method.to_json`, for plain and composed methods.

    Raises:
        KnobError: no name, an unknown method or knob, or a value out of range.
    """
    name = fields.get("method")
    if not isinstance(name, str):
        raise KnobError(f"a method is described by its name and knobs, as in {{'method': 'rtn'}}, got {dict(fields)!r}")
    values = {key: value for key, value in fields.items() if key != "method"}
    composites = _COMPOSITES.known()
    if name not in composites:
        return make_method(name, values)
    parts = {key: method_from_json(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    expected = [field.name for field in dataclasses.fields(composites[name])]
    if set(parts) != set(expected):
        raise KnobError(f"method {name!r} is made of {', '.join(expected)}, got {', '.join(parts) or 'nothing'}")
    return composites[name](**parts)


def knobs(cls: type[Method]) -> list[Knob]:
    """The knobs of a method class, in order of declaration."""
    hints = typing.get_type_hints(cls)
    out = []
    for item in dataclasses.fields(cls):
        meta = item.metadata
        choices = meta.get("choices")
        out.append(
            Knob(
                item.name,
                _plain_type(hints[item.name]),
                item.default,
                meta.get("help", ""),
                meta.get("minimum"),
                meta.get("maximum"),
                tuple(choices) if choices else None,
            )
        )
    return out


def _plain_type(hint: Any) -> type:
    """`float | None` -> float; plain types stay."""
    if isinstance(hint, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not type(None))  # type: ignore[no-any-return]
    return hint  # type: ignore[no-any-return]


def _convert(method: str, item: Knob, value: Any) -> Any:
    if value is None or not isinstance(value, str) or item.type is str:
        return value
    if item.type is bool:
        lowered = value.lower()
        if lowered in ("true", "yes", "on", "1"):
            return True
        if lowered in ("false", "no", "off", "0"):
            return False
        raise KnobError(f"knob {item.name!r} of method {method!r} is true or false, got {value!r}")
    try:
        return item.type(value)
    except ValueError:
        raise KnobError(
            f"knob {item.name!r} of method {method!r} is of type {item.type.__name__}, got {value!r}"
        ) from None


def _check(method: str, item: Knob, value: Any) -> None:
    if value is None and item.default is None:
        return
    where = f"knob {item.name!r} of method {method!r}"
    allowed: Any = (int, float) if item.type is float else (item.type,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and item.type is not bool):
        raise KnobError(f"{where} is of type {item.type.__name__}, got {value!r}")
    if item.choices is not None and value not in item.choices:
        suggestion = nearest(str(value), [str(choice) for choice in item.choices])
        raise KnobError(f"{where} is one of {', '.join(map(str, item.choices))}, got {value!r}{suggestion}")
    if item.minimum is not None and not value >= item.minimum:
        raise KnobError(f"{where} must be at least {item.minimum}, got {value!r}")
    if item.maximum is not None and not value <= item.maximum:
        raise KnobError(f"{where} must be at most {item.maximum}, got {value!r}")
