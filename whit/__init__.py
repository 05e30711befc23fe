"""whit: make pretrained models small, and prove that what is left still behaves.

`import whit` registers the packed formats with transformers, so that `AutoModelForCausalLM.from_pretrained` reads what
`whit.compress` wrote. The functions themselves are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

from whit.models import integration as _integration  # noqa: F401 - registers the packed formats

if TYPE_CHECKING:
    from whit.api import compress, evaluate, export, generate, load, load_into, save, tune
    from whit.errors import WhitError
    from whit.methods import Method, available_methods, make_method
    from whit.module.result import CompressedModule
    from whit.pipeline.events import Listener, Plan
    from whit.pipeline.options import RunOptions
    from whit.pipeline.recipe import Recipe, Step, read_recipe
    from whit.report.record import Result

_EXPORTS = {
    "compress": "whit.api",
    "evaluate": "whit.api",
    "export": "whit.api",
    "generate": "whit.api",
    "load": "whit.api",
    "load_into": "whit.api",
    "save": "whit.api",
    "tune": "whit.api",
    "CompressedModule": "whit.module.result",
    "Listener": "whit.pipeline.events",
    "Method": "whit.methods",
    "Plan": "whit.pipeline.events",
    "Recipe": "whit.pipeline.recipe",
    "Result": "whit.report.record",
    "RunOptions": "whit.pipeline.options",
    "Step": "whit.pipeline.recipe",
    "WhitError": "whit.errors",
    "available_methods": "whit.methods",
    "make_method": "whit.methods",
    "read_recipe": "whit.pipeline.recipe",
}
__all__ = [
    "CompressedModule",
    "Listener",
    "Method",
    "Plan",
    "Recipe",
    "Result",
    "RunOptions",
    "Step",
    "WhitError",
    "available_methods",
    "compress",
    "evaluate",
    "export",
    "generate",
    "load",
    "load_into",
    "make_method",
    "read_recipe",
    "save",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'whit' has no attribute {name!r}")
