"""Plug-ins by location: importing every module of a package runs its registration decorators."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Generic, TypeVar

Kind = TypeVar("Kind")
Registered = TypeVar("Registered", bound=type)


def import_submodules(package: str) -> None:
    """Import each direct submodule of `package`, so that a new file registers itself without a central list."""
    module = importlib.import_module(package)
    for info in pkgutil.iter_modules(module.__path__):
        importlib.import_module(f"{package}.{info.name}")


class Registry(Generic[Kind]):
    """Classes by their `name`, each made known by a decorator in its own file of one package.

    Args:
        what: plural noun for errors. package: dotted name; its files are imported when the registry is first asked.
    """

    def __init__(self, what: str, package: str) -> None:
        self._what = what
        self._package = package
        self._classes: dict[str, type[Kind]] = {}
        self._complete = False

    def add(self, cls: Registered) -> Registered:
        """Make a class known by its name.

        Raises:
            ValueError: another class has that name.
        """
        name: str = cls.name  # type: ignore[attr-defined]
        if name in self._classes and self._classes[name] != cls:
            raise ValueError(f"two {self._what} are called {name!r}")
        self._classes[name] = cls
        return cls

    def known(self) -> dict[str, type[Kind]]:
        """Every class by name, sorted."""
        if not self._complete:
            import_submodules(self._package)
            self._complete = True
        return dict(sorted(self._classes.items()))
