"""What an export target is: it says how it would hold every layer of a model, or why it cannot, and writes files.

Exports are exact: a target holds a layer only if its own reader gives back the very weights that the packed layer
stands for. What it cannot hold in blocks is never approximated; the error names the layer and the targets that can.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from whit.discovery import Registry
from whit.errors import KnobError, nearest
from whit.exporters.source import CompressedModel

_TARGETS: Registry[Target] = Registry("export targets", "whit.exporters")
TargetType = TypeVar("TargetType", bound="type[Target]")


class CannotHoldError(Exception):
    """A target cannot represent a layer (or, with an empty name, the model): `reason` says why, for one line of text.

    Never shown as it is: `whit.export` turns it into an `ExportError` that also names the targets that can.
    """

    def __init__(self, layer: str, reason: str) -> None:
        super().__init__(reason)
        self.layer = layer
        self.reason = reason


@dataclass(frozen=True)
class Written:
    """What `Target.write` reports: see `whit.report.record.ExportRecord`."""

    stored: dict[str, int]
    bytes: int
    notes: list[str]


class Target(ABC):
    """A file format of other tools.

    Attributes:
        name: as typed after `--to`.
        summary: for help texts.
        suffix: of a single file that the target writes, or "" for targets that fill a directory.
        types: storage types among which the smallest exact one is taken, for targets that have a choice.
        prefer: one of them, taken where it is exact even if a smaller one is, too.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    suffix: ClassVar[str] = ""
    types: ClassVar[tuple[str, ...]] = ()

    def __init__(self, prefer: str | None = None) -> None:
        if prefer is not None and prefer not in self.types:
            known = f"is one of {', '.join(self.types)}" if self.types else f"is nothing that {self.name} knows"
            raise KnobError(f"--prefer {known}, got {prefer!r}{nearest(prefer, self.types)}")
        self.prefer = prefer

    @abstractmethod
    def plan(self, model: CompressedModel) -> Any:
        """How each packed layer will be stored; writes nothing.

        Raises:
            CannotHoldError: the target cannot represent a layer exactly, or not this model (`write` may find out, too).
            MissingDependencyError: a package the target writes with is not installed.
        """

    @abstractmethod
    def write(self, model: CompressedModel, plan: Any, path: Path) -> Written:
        """Write the model as planned.

        Args:
            path: an empty directory, or for targets with a `suffix` the file to create.
        """


def register_target(cls: TargetType) -> TargetType:
    """Class decorator that makes a target available by its name."""
    return _TARGETS.add(cls)


def available_targets() -> dict[str, type[Target]]:
    """Every target by name, sorted."""
    return _TARGETS.known()


def make_target(name: str, prefer: str | None = None) -> Target:
    """The target of that name.

    Raises:
        KnobError: there is none, or it has no type `prefer`; names the nearest.
    """
    targets = available_targets()
    if name not in targets:
        raise KnobError(f"no export target {name!r}: it is one of {', '.join(targets)}{nearest(name, targets)}")
    return targets[name](prefer)
