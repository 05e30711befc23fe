"""Command-line options made from dataclasses: the fields of `RunOptions` and the knobs of the chosen method."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape

from whit.errors import KnobError, nearest
from whit.methods.base import Knob, Method, available_methods, knobs
from whit.pipeline.options import DTYPES, RunOptions

DEFAULT_METHOD = "billm"

RUN_HELP: Mapping[str, str] = {
    "calibration": "bundled set, or a text, jsonl or safetensors file; default: a bundled mix",
    "samples": "calibration sequences",
    "sequence_length": "tokens per calibration sequence; 0: the smaller of 512 and the model's maximum",
    "evaluation": "bundled set, or a file, to evaluate on",
    "evaluation_windows": "windows to evaluate; 0: all of the text",
    "window": "tokens per evaluation window; 0: the smaller of 2048 and the model's maximum",
    "evaluate": "measure the original and the compressed model",
    "allow_leak": "evaluate even if the calibration text is part of the evaluation text; the result is marked",
    "embedding_bits": "round-to-nearest bits of token embeddings and output head, 2 to 8; 16 leaves them alone",
    "true_sequential": "gather statistics again after each group of layers inside a block",
    "skip": "module name or pattern to leave alone; may be given again",
    "seed": "seed of everything random",
    "device": "where to compute: auto, cpu, cuda, cuda:1, ...",
    "dtype": (
        "compute dtype; auto: float32 on CPU (calibration in bfloat16 if it has matrix units), the model's own on a GPU"
    ),
    "batch_size": "sequences per forward pass; 0 chooses",
}
_METAVARS = {"calibration": "FILE|NAME", "evaluation": "FILE|NAME", "skip": "PATTERN", "dtype": "|".join(DTYPES)}
_PANELS = {
    **dict.fromkeys(("calibration", "samples", "sequence_length"), "Calibration"),
    **dict.fromkeys(("evaluation", "evaluation_windows", "window", "evaluate", "allow_leak"), "Evaluation"),
    **dict.fromkeys(("embedding_bits", "true_sequential", "skip"), "What is compressed"),
    **dict.fromkeys(("seed", "device", "dtype", "batch_size"), "Computing"),
}


def flag(name: str) -> str:
    """`sequence_length` -> `--sequence-length`."""
    return "--" + name.replace("_", "-")


def requested_method(argv: Sequence[str]) -> str:
    """The value of --method (or -m) in raw arguments, needed before the options can be built; the last one counts."""
    found = DEFAULT_METHOD
    for index, argument in enumerate(argv):
        if argument == "--":
            break
        if argument in ("--method", "-m") and index + 1 < len(argv):
            found = argv[index + 1]
        elif argument.startswith("--method="):
            found = argument.partition("=")[2]
    return found


RECIPE = "recipe"
"""Stands for the method of a command that gives a recipe file."""


def requested_recipe(argv: Sequence[str]) -> bool:
    """Whether raw arguments give a recipe file; there are no knobs beside one."""
    before = argv[: argv.index("--")] if "--" in argv else argv
    return any(argument == "--recipe" or argument.startswith("--recipe=") for argument in before)


def run_parameters(names: Sequence[str] | None = None) -> list[inspect.Parameter]:
    """One option per field of `RunOptions`, or of the named fields."""
    hints = typing.get_type_hints(RunOptions)
    fields = [field for field in dataclasses.fields(RunOptions) if names is None or field.name in names]
    return [_run_parameter(field, hints[field.name]) for field in fields]


def run_options(values: Mapping[str, Any]) -> RunOptions:
    """Options from parsed values; values that are no field of `RunOptions` are left out.

    Raises:
        KnobError: a value is out of range.
    """
    names = [field.name for field in dataclasses.fields(RunOptions) if field.name in values]
    chosen = {name: values[name] for name in names}
    if "skip" in chosen:
        chosen["skip"] = tuple(chosen["skip"] or ())
    return RunOptions(**chosen)


def knob_parameters(cls: type[Method]) -> list[inspect.Parameter]:
    """One option per knob of a method, in a help panel of its own."""
    return [_knob_parameter(item, f"Knobs of {cls.name}") for item in knobs(cls)]


def knob_range(item: Knob) -> str:
    """What values a knob takes: `1..8`, `>= 0`, `a|b|c`, or an empty string."""
    if item.choices is not None:
        return "|".join(map(str, item.choices))
    if item.minimum is not None and item.maximum is not None:
        return f"{item.minimum:g}..{item.maximum:g}"
    if item.minimum is not None:
        return f">= {item.minimum:g}"
    return f"<= {item.maximum:g}" if item.maximum is not None else ""


def methods_with_knob(option: str) -> list[str]:
    """Names of the methods that have a knob behind an option such as `--bits` or `--no-symmetric`."""
    name = option.lstrip("-").replace("-", "_")
    names = {name, name.removeprefix("no_")}
    return [method for method, cls in available_methods().items() if any(item.name in names for item in knobs(cls))]


def explain_unknown(option: str, known: Sequence[str], method: str | None) -> str:
    """Why an option does not exist: a knob of another method, a misspelling, or nothing of the kind.

    Args:
        option: as typed.
        known: options that the command has.
        method: the method of a `compress` command, `RECIPE` if it has a recipe, None for other commands.
    """
    owners = methods_with_knob(option) if method is not None else []
    if owners and method == RECIPE:
        return f"option {option!r} is a knob, and with --recipe the recipe holds all knobs: write it into its step"
    if owners:
        return f"option {option!r} is a knob of {', '.join(owners)}, not of {method}: add --method {owners[0]}"
    return f"no option {option!r}{nearest(option, known)} (--help lists the options)"


def torch_dtype(name: str) -> torch.dtype | None:
    """The dtype that `--dtype` names, None for "auto".

    Raises:
        KnobError: another name.
    """
    if name not in DTYPES:
        raise KnobError(f"--dtype is one of {', '.join(DTYPES)}, got {name!r}")
    return None if name == "auto" else getattr(torch, name)


def whole_numbers(text: str, name: str) -> list[int]:
    """The numbers of an option that takes several, as "1,16".

    Raises:
        KnobError: a part is no whole number of at least 1.
    """
    parts = [part.strip() for part in text.split(",")]
    wrong = next((part for part in parts if not part.isdecimal() or int(part) < 1), None)
    if wrong is not None:
        raise KnobError(f"{name} {text!r}: {wrong!r} is no whole number of at least 1 (as in {name} 1,16)")
    return [int(part) for part in parts]


def with_signature(
    function: Callable[..., Any], parameters: Sequence[inspect.Parameter], help_text: str
) -> Callable[..., Any]:
    """Give a function of keyword arguments the signature and help text that typer shall see."""
    function.__signature__ = inspect.Signature(list(parameters))  # type: ignore[attr-defined]
    function.__doc__ = help_text
    return function


def option(
    name: str, kind: Any, default: Any, *flags: str, help: str, panel: str | None = None, metavar: str | None = None
) -> inspect.Parameter:
    """A keyword parameter that typer reads as an option; square brackets in the help are shown as they are."""
    info = typer.Option(*flags, help=escape(help), rich_help_panel=panel, metavar=metavar)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def argument(name: str, kind: Any, default: Any, *, metavar: str, help: str) -> inspect.Parameter:
    """A keyword parameter that typer reads as a positional argument; `inspect.Parameter.empty` makes it required."""
    info = typer.Argument(metavar=metavar, help=escape(help))
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def _run_parameter(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    name, default = field.name, field.default
    flags = [flag(name)]
    if hint is bool and default is True:
        flags = [f"{flag(name)}/{flag('no_' + name)}"]
    if name == "skip":
        hint, default = list[str] | None, None
    return option(name, hint, default, *flags, help=RUN_HELP[name], panel=_PANELS[name], metavar=_METAVARS.get(name))


def _knob_parameter(item: Knob, panel: str) -> inspect.Parameter:
    if item.type is bool:
        both = f"{flag(item.name)}/{flag('no_' + item.name)}"
        return option(item.name, bool, item.default, both, help=item.help, panel=panel)
    hint = item.type if item.default is not None else item.type | None
    limits = knob_range(item)
    metavar = limits if item.choices else f"{item.type.__name__.upper()} {limits}".strip()
    return option(item.name, hint, item.default, flag(item.name), help=item.help, panel=panel, metavar=metavar)
