"""The command line: `whit compress`, `evaluate`, `generate`, `inspect`, `methods`."""

from whit.cli.main import main

__all__ = ["main"]
