"""A recipe: an ordered list of methods, each with the layers it is for, as a Python value or one TOML or JSON file.

    [[step]]                    # first remove half of every weight matrix in the blocks ...
    method = "wanda"
    pattern = "2:4"

    [[step]]                    # ... then round what was kept; a second step on a layer works on what the first left
    method = "gptq"
    bits = 4
    exclude = ["@first", "@last"]

    [[step]]
    method = "rtn"
    bits = 8
    layers = ["lm_head"]

A layer is named by its module name, an fnmatch pattern, or a word: `@blocks` (every matrix in the repeated blocks; the
default), `@first` and `@last` (those of the first and last block of each stack), `@embedding`, `@head`.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from whit.errors import KnobError, nearest
from whit.methods.base import Method, make_method, method_from_json

WORDS = ("@blocks", "@first", "@last", "@embedding", "@head")
RECIPE_FILE = "recipe.json"
STEP_KEYS = ("layers", "exclude")
"""Keys of a step beside its method and that method's knobs; no knob is called nearly so."""


@dataclass(frozen=True)
class Step:
    """One method and the layers it is for.

    Attributes:
        method: the value.
        layers: names, patterns or words of the layers it is for.
        exclude: names, patterns or words of layers among them that it is not for.
    """

    method: Method
    layers: tuple[str, ...] = ("@blocks",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("layers", "exclude"):
            patterns = getattr(self, name)
            if not isinstance(patterns, tuple) or not all(isinstance(item, str) and item for item in patterns):
                raise KnobError(f"{name} of a recipe step is a tuple of names or patterns, got {patterns!r}")
            for item in patterns:
                if item.startswith("@") and item not in WORDS:
                    raise KnobError(
                        f"unknown word {item!r} in {name} of a recipe step{nearest(item, WORDS)} "
                        f"(words: {', '.join(WORDS)})"
                    )
        if not self.layers:
            raise KnobError(f"a recipe step ({self.method.name}) names no layer: leave 'layers' out for all blocks")

    def to_json(self) -> dict[str, Any]:
        """The step as it would stand in a recipe file."""
        out = self.method.to_json()
        if self.layers != ("@blocks",):
            out["layers"] = list(self.layers)
        if self.exclude:
            out["exclude"] = list(self.exclude)
        return out


@dataclass(frozen=True)
class Recipe:
    """Steps in order. A layer may be named by one step, or by a pruning step and then one that quantises.

    Raises:
        KnobError: there is no step.
    """

    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        if not self.steps:
            raise KnobError("a recipe has at least one step: a table [[step]] with a key 'method'")

    @property
    def label(self) -> str:
        """Names of the methods in order, each once: `wanda+gptq`."""
        return "+".join(dict.fromkeys(step.method.name for step in self.steps))

    @property
    def plain(self) -> Method | None:
        """The method, if the recipe is nothing but one method for all blocks."""
        only = self.steps[0]
        return only.method if len(self.steps) == 1 and only == Step(only.method) else None

    def to_json(self) -> dict[str, Any]:
        """The method's own JSON for a plain recipe, else `{"method": "recipe", "step": [...]}`."""
        if self.plain is not None:
            return self.plain.to_json()
        return {"method": "recipe", "step": [step.to_json() for step in self.steps]}

    def save(self, path: Path) -> None:
        """Write the recipe as a JSON file that `read_recipe` reads."""
        text = json.dumps({"step": [step.to_json() for step in self.steps]}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")


def as_recipe(method: str | Method | Recipe, knobs: Mapping[str, Any]) -> Recipe:
    """A recipe from what `whit.compress` takes: a method's name with knobs, a method, or a recipe.

    Raises:
        KnobError: unknown method or knob, or knobs beside a value that holds its own.
    """
    if isinstance(method, str):
        return Recipe((Step(make_method(method, knobs)),))
    if knobs:
        raise KnobError(f"knobs {sorted(knobs)} were given beside a method value: put them into the value")
    return method if isinstance(method, Recipe) else Recipe((Step(method),))


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe file: TOML, or JSON if its name ends in `.json`.

    Raises:
        KnobError: the file cannot be read or says something a recipe cannot say; the message quotes it.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise KnobError(f"recipe {str(path)!r} cannot be read ({reason}): give a TOML or JSON file") from None
    try:
        data = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise KnobError(
            f"recipe {str(path)!r} is no valid {'JSON' if file.suffix == '.json' else 'TOML'}: {error}"
        ) from None
    return recipe_from_json(data, f"recipe {str(path)!r}")


def recipe_from_json(data: Any, where: str = "recipe") -> Recipe:
    """A recipe from the content of a recipe file.

    Raises:
        KnobError: as in `read_recipe`.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("step"), Sequence) or not data["step"]:
        raise KnobError(f"{where} holds no steps: write one table [[step]] with a key 'method' per step")
    unknown = sorted(set(data) - {"step", "method"})
    if unknown:
        raise KnobError(f"{where} has an unknown key {unknown[0]!r}{nearest(unknown[0], ['step'])} (keys: step)")
    return Recipe(tuple(_step(item, f"step {index + 1} of {where}") for index, item in enumerate(data["step"])))


def _step(data: Any, where: str) -> Step:
    if not isinstance(data, Mapping) or not isinstance(data.get("method"), str):
        raise KnobError(f"{where} has no 'method': name one (see whit methods)")
    fields = {key: value for key, value in data.items() if key not in STEP_KEYS}
    try:
        for key in sorted(fields):
            if guess := get_close_matches(key, STEP_KEYS, n=1, cutoff=0.8):
                raise KnobError(f"unknown key {key!r}; did you mean {guess[0]!r}?")
        method = method_from_json(fields)
        return Step(method, _patterns(data, "layers", ("@blocks",)), _patterns(data, "exclude", ()))
    except KnobError as error:
        raise KnobError(f"{where}: {error}") from None


def _patterns(data: Mapping[str, Any], key: str, default: tuple[str, ...]) -> tuple[str, ...]:
    value = data.get(key, default)
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Sequence):
        raise KnobError(f"{key!r} is a name, a pattern or a list of them, got {value!r}")
    return tuple(value)


@dataclass(frozen=True)
class Place:
    """Where a layer stands, which is all that words such as `@first` ask for.

    Attributes:
        names: its module name, and names of modules that share its weight (a tied head).
        words: the words of a recipe that mean it.
    """

    names: tuple[str, ...]
    words: frozenset[str]

    def matches(self, patterns: Sequence[str]) -> list[str]:
        """The patterns that name this layer."""
        return [
            pattern
            for pattern in patterns
            if pattern in self.words or any(fnmatchcase(name, pattern) for name in self.names)
        ]


def steps_for(recipe: Recipe, places: Mapping[str, Place]) -> dict[str, list[Step]]:
    """The steps of each layer in order.

    Raises:
        KnobError: a pattern of a step names no layer, or a step is left without any.
    """
    out: dict[str, list[Step]] = {name: [] for name in places}
    for index, step in enumerate(recipe.steps):
        where = f"step {index + 1} ({step.method.name})"
        used: set[str] = set()
        count = 0
        for name, place in places.items():
            found, without = place.matches(step.layers), place.matches(step.exclude)
            used.update(found, without)
            if found and not without:
                out[name].append(step)
                count += 1
        for pattern in (*step.layers, *step.exclude):
            if pattern not in used:
                known = [name for place in places.values() for name in place.names]
                raise KnobError(f"{where} of the recipe: {pattern!r} names no layer{nearest(pattern, known)}")
        if not count:
            raise KnobError(f"{where} of the recipe names no layer: its 'exclude' takes all of them away")
    return out
