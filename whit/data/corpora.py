"""Texts that come with the package: where they are, what they are, under which licence."""

from __future__ import annotations

import gzip
import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files

from whit.errors import DataError

DEFAULT_CALIBRATION = "mix"
DEFAULT_EVALUATION = "wikitext2"


@dataclass(frozen=True)
class Corpus:
    """A bundled text.

    Attributes:
        name: what the user types. title: what the protocol id says.
        summary, licence: one line each; the full attribution lies beside the file.
        asset: file name in `whit/data/assets`.
        rule: how the file becomes documents: "jsonl" (one per line) or "rows" (see `rows_of`).
        sha256: of the unpacked content.
    """

    name: str
    title: str
    summary: str
    licence: str
    asset: str
    rule: str
    sha256: str

    def content(self) -> bytes:
        """The unpacked file.

        Raises:
            DataError: the file is missing or was changed.
        """
        path = files("whit.data") / "assets" / self.asset
        try:
            content = gzip.decompress(path.read_bytes())
        except (OSError, EOFError) as error:
            raise DataError(f"bundled corpus {self.name!r} cannot be read ({error}): install whit again") from None
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise DataError(f"bundled corpus {self.name!r} was changed since it was packaged: install whit again")
        return content

    def documents(self) -> list[str]:
        """The texts in order."""
        text = self.content().decode("utf-8")
        return [json.loads(line)["text"] for line in text.splitlines()] if self.rule == "jsonl" else rows_of(text)


def rows_of(text: str) -> list[str]:
    r"""Rows of a WikiText file: every line with its line end; a blank line (" \n") is the empty string.

    These are the rows of the published data set, which the perplexities of the quantisation literature join by "\n\n".
    """
    return [line if line.strip() else "" for line in text.splitlines(keepends=True)]


_CORPORA = (
    Corpus(
        name="mix",
        title="mix-1",
        summary="worked maths questions, State of the Union addresses and Moby Dick, shuffled (calibration)",
        licence="MIT (GSM8K), PDDL-1.0 / CC0-1.0 (State of the Union, Moby Dick)",
        asset="mix.jsonl.gz",
        rule="jsonl",
        sha256="e4cb0561d6ffb24088640102b36253b51da81123289b3626e0ea0237e8fe97dc",
    ),
    Corpus(
        name="wikitext2",
        title="wikitext2-test",
        summary="WikiText-2 raw, test split (evaluation)",
        licence="CC BY-SA 3.0 / GFDL (Wikipedia contributors; Merity et al. 2016)",
        asset="wikitext2-test.raw.gz",
        rule="rows",
        sha256="173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
    ),
)


def bundled_corpora() -> dict[str, Corpus]:
    """Every bundled text by name."""
    return {item.name: item for item in _CORPORA}


def corpus_with_hash(sha256: str) -> Corpus | None:
    """The bundled corpus with that content, so that a user's own copy of it gets the same rule and protocol id."""
    return next((item for item in _CORPORA if item.sha256 == sha256), None)
