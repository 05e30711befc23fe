"""Turn the committed measurement of reading prompts into the tables of docs/decoding.md.

python benchmarks/prompt_tables.py     # rewrites docs/generated/prompts-7b.md and history-of-prompts.md
"""

from __future__ import annotations

from typing import Any

from committed import load, markdown, write

DENSE = "bfloat16"


def prompt_table(report: dict[str, Any]) -> str:
    """What the host takes to issue a prompt's kernels and how long the prompt takes, for every length."""
    rows, versions = report["rows"], report["versions"]
    counts = list(rows[DENSE])
    beside = f"; {report['busy']} processes computed beside" if report["busy"] else ""
    header = ["weights of the blocks"]
    for count in counts:
        header += [f"{count} tokens: host ms", "ms", "times bf16"]
    lines = []
    for name, row in rows.items():
        cells = [name]
        for count in counts:
            found = row.get(count)
            if found is None:
                cells += ["", "", ""]
                continue
            total = found["milliseconds"]
            cells += [f"{found['host_milliseconds']:.1f}", f"{total:.1f}"]
            cells.append(f"{rows[DENSE][count]['milliseconds'] / total:.2f}")
        lines.append(cells)
    told = (
        f"{report['hardware']}, torch {versions['torch']}, transformers {versions['transformers']}, one text{beside}."
    )
    return "\n".join([told, "", *markdown(header, lines)]) + "\n"


def history_table(history: dict[str, Any]) -> str:
    """What was tried: change, prediction, outcome."""
    rows = [[step["change"], step["predicted"], step["found"]] for step in history["steps"]]
    return "\n".join([f"{history['hardware']}.", "", *markdown(["change", "predicted", "found"], rows)]) + "\n"


def contents() -> dict[str, str]:
    """Generated file name -> its text."""
    return {
        "prompts-7b.md": prompt_table(load("prompts.json")),
        "history-of-prompts.md": history_table(load("history-of-prompts.json")),
    }


if __name__ == "__main__":
    write(contents())
