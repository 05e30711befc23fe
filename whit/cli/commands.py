"""The commands. Parsing and doing are apart: each typer command returns an action, which `main` then runs."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import whit
from whit.cli.display import make_display
from whit.cli.engine import Engine
from whit.cli.inspection import kernel_of, read_result
from whit.cli.options import (
    DEFAULT_METHOD,
    argument,
    knob_parameters,
    option,
    requested_method,
    requested_recipe,
    run_options,
    run_parameters,
    torch_dtype,
    whole_numbers,
    with_signature,
)
from whit.cli.tables import evaluation_view, export_view, layers_view, method_view, methods_view, tuned_view
from whit.errors import KnobError
from whit.methods.base import available_methods, knobs, method_class
from whit.models.loading import saved_dtype
from whit.pipeline.events import Plan
from whit.pipeline.options import DTYPES
from whit.pipeline.prepare import choose_device
from whit.pipeline.ranks import is_helper
from whit.pipeline.recipe import Recipe, read_recipe

Action = Callable[[Callable[[], Engine]], None]
EVALUATION_OPTIONS = (
    "evaluation",
    "evaluation_windows",
    "window",
    "allow_leak",
    "device",
    "dtype",
)
DTYPE_HELP = "compute dtype; auto: float32 on a CPU, on a GPU as saved, or bfloat16 if that is float32"
REQUIRED = inspect.Parameter.empty


def build(argv: Sequence[str]) -> typer.Typer:
    """The application, with the knobs of the method that `argv` asks for.

    Raises:
        KnobError: the arguments ask to compress by a method that does not exist.
    """
    app = typer.Typer(
        name="whit",
        help="Make pretrained models small, and prove what is left.",
        add_completion=False,
        rich_markup_mode="rich",
    )
    app.callback(invoke_without_command=True)(_root)
    app.command("compress")(_compress_command(argv))
    app.command("evaluate")(_evaluate_command())
    app.command("export")(_export)
    app.command("generate")(_generate)
    app.command("inspect")(_inspect)
    app.command("methods")(_methods)
    app.command("tune")(_tune)
    return app


def output_directory(model: str | None, method: str) -> Path:
    """The directory that a run without -o writes to: named after the model and the method."""
    from whit.models.catalog import DEFAULT
    from whit.pipeline.prepare import default_output

    name = model or DEFAULT
    return default_output(str(Path(name).resolve()) if Path(name).exists() else name, method)


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        print(f"whit {whit.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


def _compress_command(argv: Sequence[str]) -> Callable[..., Action]:
    # Looking a method up imports every method: only the command that shows knobs pays for that.
    wanted = "compress" in argv
    cls = method_class(requested_method(argv)) if wanted and not requested_recipe(argv) else None
    knob_names = [item.name for item in knobs(cls)] if cls is not None else []
    parameters = [
        argument(
            "model", str | None, None, metavar="MODEL", help="directory, GGUF file or hub id; default: SmolLM2-135M"
        ),
        option(
            "method", str, DEFAULT_METHOD, "--method", "-m", help="how to compress; see 'whit methods'", metavar="NAME"
        ),
        option(
            "recipe",
            Path | None,
            None,
            "--recipe",
            help="TOML or JSON file of several methods and their layers, in place of --method",
            metavar="FILE",
        ),
        option(
            "output", Path | None, None, "--output", "-o", help="default: whit-output/<model>-<method>", metavar="DIR"
        ),
        option("dry_run", bool, False, "--dry-run", help="show the plan and stop"),
        *_output_options(),
        *run_parameters(),
        *(knob_parameters(cls) if cls is not None else []),
    ]

    def compress(**values: Any) -> Action:
        model: str | None = values["model"]
        method: str | Recipe = values["method"]
        if values["recipe"] is not None:
            if {"--method", "-m"} & set(argv) or any(item.startswith("--method=") for item in argv):
                raise KnobError("--recipe and --method exclude each other: a recipe names its methods itself")
            method = read_recipe(values["recipe"])
        options = run_options(values)
        label = method if isinstance(method, str) else method.label
        output: Path = values["output"] or output_directory(model, label)
        chosen = {name: values[name] for name in knob_names}

        def action(engine: Callable[[], Engine]) -> None:
            display = make_display(as_json=values["as_json"], quiet=values["quiet"] or is_helper())
            with display:
                outcome = engine().compress(
                    model, method, output, options=options, listener=display, dry_run=values["dry_run"], **chosen
                )
                if not isinstance(outcome, Plan):
                    display.finished(outcome, output)
                elif not display.plan_seen:
                    display.planned(outcome)

        return action

    return with_signature(compress, parameters, "Compress a model, measure what is left, write a report.")


def _evaluate_command() -> Callable[..., Action]:
    parameters = [
        argument("model", str, REQUIRED, metavar="MODEL", help="compressed directory, or any model"),
        option("against", str | None, None, "--against", help="the original, for KL divergence", metavar="MODEL"),
        option(
            "tasks", str | None, None, "--tasks", metavar="NAME|FILE,...",
            help="score tasks of lm-eval instead: names, or paths of task files (.yaml)", panel="Tasks",
        ),
        option("limit", int | None, None, "--limit", help="items per task; default: all", panel="Tasks"),
        *_output_options(),
        *run_parameters(EVALUATION_OPTIONS),
    ]  # fmt: skip

    def evaluate(**values: Any) -> Action:
        options = run_options(values)

        def action(engine: Callable[[], Engine]) -> None:
            display = make_display(as_json=values["as_json"], quiet=values["quiet"])
            tasks = None if values["tasks"] is None else [name.strip() for name in values["tasks"].split(",")]
            record = engine().evaluate(
                values["model"], against=values["against"], options=options, tasks=tasks, limit=values["limit"]
            )
            display.show(evaluation_view(record), dataclasses.asdict(record))

        return action

    return with_signature(
        evaluate, parameters, "Measure a model: perplexity with its interval, beside another if given."
    )


def _export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="compressed directory")],
    target: Annotated[str, typer.Option("--to", metavar="TARGET", help="compressed-tensors or gguf")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="OUT", help="new directory; for gguf also a new file that ends in .gguf"
        ),
    ],
    prefer: Annotated[
        str | None, typer.Option("--prefer", metavar="TYPE", help="gguf: block type to take where exact, as TQ2_0")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON value on standard output")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="print errors only")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> Action:
    """Write a compressed model, exactly, in the format of another tool."""

    def action(engine: Callable[[], Engine]) -> None:
        record = engine().export(directory, target, output, prefer=prefer)
        make_display(as_json=as_json, quiet=quiet).show(export_view(record), dataclasses.asdict(record))

    return action


def _generate(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="compressed directory")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="text to continue")],
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="tokens to generate")] = 64,
    device: Annotated[str, typer.Option("--device", help="where to compute: auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", metavar="|".join(DTYPES), help=DTYPE_HELP)] = "auto",
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> Action:
    """Continue a prompt with a compressed model."""
    wanted = torch_dtype(dtype)

    def action(engine: Callable[[], Engine]) -> None:
        print(prompt + engine().generate(directory, prompt, new_tokens=new_tokens, dtype=wanted, device=device))

    return action


def _inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="compressed directory")],
    device: Annotated[str, typer.Option("--device", help="device whose kernels are shown")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="one JSON value on standard output")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> Action:
    """Show what each layer became: format, shape, stored bits, error, kernel."""

    def action(engine: Callable[[], Engine]) -> None:
        result = read_result(directory)
        dtype = saved_dtype(directory)
        place = choose_device(device)
        kernels = {layer.name: kernel_of(layer, dtype, place) for layer in result.layers}
        layers = [
            {**dataclasses.asdict(layer), "stored_bits": layer.stored_bits, "kernel": kernels[layer.name]}
            for layer in result.layers
        ]
        data = {"layers": layers, "untouched": result.untouched, "size": dataclasses.asdict(result.size)}
        make_display(as_json=as_json, quiet=False).show(layers_view(result, kernels), data)

    return action


def _tune(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="compressed directory")],
    vectors: Annotated[
        str, typer.Option("--vectors", metavar="N,...", help="input vectors: 1 decodes one text; 2048 reads a prompt")
    ] = "1,16",
    device: Annotated[str, typer.Option("--device", help="GPU to tune for: auto, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", metavar="|".join(DTYPES), help=DTYPE_HELP)] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines on standard output")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> Action:
    """Find the fastest launches of a model's products on this GPU, and keep them for all later runs."""
    counts, wanted = whole_numbers(vectors, "--vectors"), torch_dtype(dtype)

    def action(engine: Callable[[], Engine]) -> None:
        display = make_display(as_json=as_json, quiet=False)
        found = 0
        for product in engine().tune(directory, vectors=counts, dtype=wanted, device=device):
            display.show(tuned_view(product), dataclasses.asdict(product))
            found += 1
        if not found and not as_json:
            display.show("nothing to tune: no layer of this model has a kernel with a choice of launches", None)

    return action


def _methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="show the knobs of this method")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON value on standard output")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> Action:
    """List the methods, or the knobs of one."""

    def action(engine: Callable[[], Engine]) -> None:
        chosen = available_methods() if name is None else {name: method_class(name)}
        view = methods_view(chosen) if name is None else method_view(chosen[name])
        data = {
            key: {
                "summary": cls.summary,
                "knobs": [{**dataclasses.asdict(item), "type": item.type.__name__} for item in knobs(cls)],
            }
            for key, cls in chosen.items()
        }
        make_display(as_json=as_json, quiet=False).show(view, data)

    return action


def _output_options() -> list[inspect.Parameter]:
    return [
        option("as_json", bool, False, "--json", help="JSON lines on standard output, nothing else there"),
        option("quiet", bool, False, "--quiet", "-q", help="print errors only"),
        option("debug", bool, False, "--debug", help="show the traceback of an error"),
    ]
