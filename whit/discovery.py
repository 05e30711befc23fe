"""Plug-ins by location: importing every module of a package runs its registration decorators."""

from __future__ import annotations

import importlib
import pkgutil


def import_submodules(package: str) -> None:
    """Import each direct submodule of `package`, so that a new file registers itself without a central list."""
    module = importlib.import_module(package)
    for info in pkgutil.iter_modules(module.__path__):
        importlib.import_module(f"{package}.{info.name}")
