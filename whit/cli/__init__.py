"""The command line: `whit compress`, `evaluate`, `export`, `generate`, `inspect`, `methods`."""

from whit.cli.main import main

__all__ = ["main"]
