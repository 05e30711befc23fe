"""Turn the committed measurement of decoding into the table of docs/decoding.md and the README's speed table.

    python benchmarks/decode_tables.py     # rewrites docs/generated/decode-7b*.md and the part of README.md

No number of those tables is typed by hand: a test runs this script's functions and compares.
"""

from __future__ import annotations

from typing import Any

from committed import ROOT, load, markdown, with_part, write

BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
DENSE = "bfloat16"
DISTURBED = 0.045
"""Half the range of a measurement's rounds, relative, from which it is left out."""
README_ROWS = (DENSE, "FP8 W8A16", "LLM.int8()", "GPTQ 4 (g64)", "k-means 2 (row)", "BiLLM whit (row)", "signs (g128)")


def _measured(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: row for name, row in report["rows"].items() if "batch 1" in row}


def _bits(row: dict[str, Any]) -> str:
    """Stored bits per weight, and those of the form in which weights are held, if it is another."""
    stored = row.get("bits_per_weight", 16)
    held = row.get("running_bits_per_weight", stored)
    return f"{stored:.3f}" if held == stored else f"{stored:.3f} (held: {held:.2f})"


def _quiet(spread: float, found: float) -> bool:
    """Whether a measurement was left alone by what else runs on the machine."""
    return spread <= DISTURBED * found


def _cell(row: dict[str, Any], dense: dict[str, Any], key: str) -> list[str]:
    found = row.get(key)
    if found is None or not _quiet(found["spread_milliseconds"], found["milliseconds_per_token"]):
        return ["", "", ""]
    factor = dense[key]["milliseconds_per_token"] / found["milliseconds_per_token"]
    return [f"{found['tokens_per_second']:,.0f}", f"{found['milliseconds_per_token']:.2f}", f"{factor:.2f}"]


def _prefill(row: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    found = row.get("prefill_milliseconds")
    if found is None or not _quiet(row["prefill_spread_milliseconds"], found):
        return ["", ""]
    return [f"{found:.1f}", f"{dense['prefill_milliseconds'] / found:.2f}"]


def history_table(report: dict[str, Any]) -> str:
    """What was tried on decoding, as Markdown: change, prediction, and the times that followed."""
    names = report["columns"]
    rows = []
    for step in report["steps"]:
        times = [f"{step['milliseconds'][name]:.2f}" if name in step["milliseconds"] else "" for name in names]
        rows.append([step["change"], step["predicted"], *times])
    lines = [f"{report['hardware']}: {report['what']}.", "", *markdown(["change", "predicted", *names], rows)]
    return "\n".join(lines) + "\n"


def decode_table(report: dict[str, Any]) -> str:
    """Speed and memory of every format, as Markdown."""
    rows = _measured(report)
    dense = rows[DENSE]
    versions = report["versions"]
    lines = [
        f"{dense['hardware']}, torch {versions['torch']}, transformers {versions['transformers']}; "
        f"{report['new_tokens']} tokens after {report['prompt']}, ms per step; prefill of {report['prefill']} tokens. "
        f"Left out: what spread by more than {DISTURBED:.1%} between repeats; the values are in the JSON.",
        "",
        "| weights of the blocks | bits | tokens/s | ms | times bf16 | tokens/s at 16 | ms | times bf16 "
        "| prefill ms | times bf16 | GB resident | GB at most | way, products at batch 1 |",
        "|---|" + "---|" * 12,
    ]
    for name, row in rows.items():
        one = row["batch 1"]
        kernels = ", ".join(row.get("kernels", {}).get("1", ["cuBLAS"]))
        way = one["way"] + ("" if one["graph"] else ", no graph")
        cells = [
            name,
            _bits(row),
            *_cell(row, dense, "batch 1"),
            *_cell(row, dense, "batch 16"),
            *_prefill(row, dense),
            f"{row['resident_bytes'] / 1e9:.2f}",
            f"{one['peak_bytes'] / 1e9:.2f}",
            f"{way}: {kernels}; {one['products']}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if "note" in report:
        lines += ["", report["note"]]
    if "library" in dense:
        time = dense["library"]["milliseconds_per_token"]
        lines += ["", f"The same bfloat16 model in transformers' own loop: {time:.1f} ms per token."]
    return "\n".join(lines) + "\n"


def readme_table(report: dict[str, Any]) -> str:
    """The few rows and columns that the README shows."""
    rows = _measured(report)
    dense = rows[DENSE]
    lines = [
        "| weights of the blocks | bits | tokens/s, one text | times bf16 | tokens/s, 16 texts | GB of GPU memory |",
        "|---|---|---|---|---|---|",
    ]
    for name in README_ROWS:
        if name not in rows:
            continue
        row = rows[name]
        one, sixteen = _cell(row, dense, "batch 1"), _cell(row, dense, "batch 16")
        if not one[0]:
            continue
        bits, memory = f"{row.get('bits_per_weight', 16):.3f}", f"{row['resident_bytes'] / 1e9:.2f}"
        lines.append("| " + " | ".join([name, bits, one[0], one[2], sixteen[0], memory]) + " |")
    return "\n".join(lines) + "\n"


def contents() -> dict[str, str]:
    """Generated file name -> its text."""
    return {
        "decode-7b.md": decode_table(load("decode_7b.json")),
        "history-of-decoding.md": history_table(load("history-of-decoding.json")),
    }


def readme_with(text: str) -> str:
    """The README's text with its speed table made anew."""
    return with_part(text, BEGIN, END, readme_table(load("decode_7b.json")))


if __name__ == "__main__":
    write(contents())
    readme = ROOT / "README.md"
    readme.write_text(readme_with(readme.read_text(encoding="utf-8")), encoding="utf-8")
