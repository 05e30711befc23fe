"""Turn committed benchmark JSON into the tables and plots that README and documentation show.

    python benchmarks/tables.py     # rewrites docs/generated/*.md, docs/images/frontier-*.svg, the README table

No number in the documentation is typed by hand: a test runs this script's functions and compares.
"""

from __future__ import annotations

import statistics
from typing import Any

from committed import ROOT, load, load_all, markdown, with_part, write
from frontier_tables import number, plot, sections, table

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
README_MODEL = "smollm2-135m"
README_ROWS = (
    "RTN 4 (g64)",
    "GPTQ 4 (g64)",
    "GPTQ 3 (g64)",
    "GPTQ 3 (g64, order, clip)",
    "GPTQ 2 (g64)",
    "GPTQ 2 (g64, order, clip)",
    "k-means 2 (128)",
    "BiLLM official",
    "BiLLM paper",
    "BiLLM whit",
    "k-means 2 (row, order)",
    "STBLLM 6:8",
    "STBLLM 4:8, released",
    "codebook 256 of 4",
    "codebook 256 of 8",
    "flexible 8 (W8A8, row and token)",
    "LLM.int8() (W8A8)",
    "GPTQ 1 (g64, signs)",
)


def int8_layer_table(report: dict[str, Any]) -> str:
    """Errors of the ways to treat outliers on the synthetic layer of `llm_int8.py`, as Markdown: mean of the seeds."""
    lines = [
        "| inputs and weights in INT8 | stored bits | output error | of the other columns' output |",
        "|---|---|---|---|",
    ]
    for label, row in report["layer"].items():
        means = [sum(row[key]) / len(row[key]) for key in ("errors", "quiet_errors")]
        lines.append(f"| {label} | {row['stored_bits']:.3f} | {number(means[0])} | {number(means[1])} |")
    return "\n".join(lines) + "\n"


def int8_planted_table(report: dict[str, Any]) -> str:
    """Perplexity and KL divergence of the planted models of `llm_int8.py`, as Markdown."""
    lines = ["| loudness | inputs and weights in INT8 | perplexity | KL (nats) |", "|---|---|---|---|"]
    seen = set()
    for row in report["planted"]:
        if row["factor"] not in seen:
            seen.add(row["factor"])
            lines.append(f"| {row['factor']} | original | {row['original']:.2f} | |")
        metrics = row["metrics"]
        lines.append(f"| | {row['row']} | {metrics['perplexity'][0]:.2f} | {number(metrics['kl_divergence'][0])} |")
    return "\n".join(lines) + "\n"


def int8_memory_table(report: dict[str, Any]) -> str:
    """Bytes of tensors and process in 16 bit and as LLM.int8(), as Markdown."""
    head = ("tensor_bytes", "resident_bytes")
    lines = ["| model in memory | tensors | process, above an empty one |", "|---|---|---|"]
    for name, row in report["rows"].items():
        lines.append(f"| {name} | " + " | ".join(f"{row[key] / 1e6:.1f} MB" for key in head) + " |")
    lines.append("| ratio | " + " | ".join(f"{report['ratios'][key]:.2f}" for key in head) + " |")
    return "\n".join(lines) + "\n"


STBLLM_ROWS = (
    "GPTQ 2 bits, group 64",
    "BiLLM official",
    "BiLLM whit",
    "STBLLM released 4:8",
    "STBLLM whit 6:8",
    "STBLLM whit 5:8",
    "STBLLM whit 4:8",
    "STBLLM whit 4:8, tied",
    "STBLLM whit 4:8, tied, no passes",
    "STBLLM whit 4:8, free, no passes",
    "STBLLM whit 4:8, scalars per 128",
    "STBLLM whit 4:8, Wanda",
    "STBLLM whit 4:8, magnitude",
    "STBLLM whit 4:8, paper-literal",
    "STBLLM whit 6:8, two magnitudes",
    "STBLLM whit 4:8, two magnitudes",
    "STBLLM whit 2:8",
    "STBLLM whit 2:8, two magnitudes",
    "STBLLM whit 4:8, sign and row scale",
    "STBLLM whit 1:2, sign and row scale",
    "STBLLM whit 2:8, sign and row scale",
    "STBLLM whit 1:4, sign and row scale",
    "codebook 256 of width 4",
    "codebook 256 of width 6",
    "codebook 256 of width 8",
    "codebook 64 of width 8",
    "codebook 256 of width 12",
)
CODEBOOK_ROWS = (
    "codebook 256 of width 4",
    "codebook 256 of width 6",
    "codebook 256 of width 8",
    "codebook 64 of width 8",
    "codebook 256 of width 12",
    "codebook 256 of width 16",
    "codebook 16 of width 8",
    "ternary 256 of width 8",
    "ternary 64 of width 8",
    "codebook 256 of width 8, one round",
    "codebook 256 of width 8, one round, no passes",
    "GPTQ 2 bits, group 64",
    "BiLLM whit",
    "STBLLM whit 2:8",
    "STBLLM whit 1:2, sign and row scale",
    "STBLLM whit 2:8, sign and row scale",
    "STBLLM whit 1:4, sign and row scale",
)
LAYER_TABLES = {
    "billm": ("billm_layers.json", None),
    "stbllm": ("stbllm_layers.json", STBLLM_ROWS),
    "codebook": ("stbllm_layers.json", CODEBOOK_ROWS),
}
"""Page -> committed layer errors and its rows in order (None: all)."""


def layer_table(report: dict[str, Any], rows: tuple[str, ...] | None = None) -> str:
    """Errors on single layers (`billm_layers.py`, `stbllm_layers.py`), as Markdown: held out, but where it is said."""
    real, synthetic = report["real"], report["synthetic"]
    head = ["method", "stored bits", *real, "geometric mean", "calibration", "synthetic"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for label in rows or [row["label"] for row in report["rows"]]:
        bits = statistics.fmean(layer[label]["stored_bits"] for layer in real.values())
        held_out = [layer[label]["held_out_error"] for layer in real.values()]
        means = [
            statistics.geometric_mean(errors)
            for errors in (
                held_out,
                [layer[label]["error"] for layer in real.values()],
                [layer[label]["error"] for layer in synthetic.values()],
            )
        ]
        lines.append(f"| {label} | {bits:.3f} | " + " | ".join(f"{error:.4f}" for error in [*held_out, *means]) + " |")
    return "\n".join(lines) + "\n"


def layer_tables() -> dict[str, str]:
    """Content of each generated file of layer errors, by name."""
    return {f"{page}-layers.md": layer_table(load(file), rows) for page, (file, rows) in LAYER_TABLES.items()}


def run_table(report: dict[str, Any]) -> str:
    """Time, memory and bytes of `random_llama.py` runs, as Markdown."""
    header = ["method", "wall time", "in the method", "peak device memory", "peak host", "file", "bits, layers"]
    rows = []
    for row in report["rows"]:
        name = row["method"]["method"] + (f" {row['method']['variant']}" if "variant" in row["method"] else "")
        cells = [
            name,
            f"{row['seconds'] / 60:.1f} min",
            f"{row['method_seconds'] / 60:.1f} min",
            f"{row['peak_device_bytes'] / 1e9:.1f} GB",
            f"{row['peak_host_bytes'] / 1e9:.1f} GB",
            f"{row['file_bytes'] / 1e9:.2f} GB (was {row['original_file_bytes'] / 1e9:.2f})",
            f"{row['stored_bits_compressed']:.3f}",
            f"{row['stored_bits_file']:.3f}",
        ]
        rows.append(cells)
    return "\n".join(markdown([*header, "bits, file"], rows)) + "\n"


def readme_table(report: dict[str, Any]) -> str:
    """The few rows that the README shows."""
    return table(report, {name: report["rows"][name] for name in README_ROWS}, short=True)


def contents() -> dict[str, str]:
    """Generated file name -> its text."""
    int8 = load("llm_int8.json")
    made = {
        "random-llama-7b.md": run_table(load("random_llama_7b.json")),
        "llm-int8-layer.md": int8_layer_table(int8),
        "llm-int8-memory.md": int8_memory_table(load("int8_memory.json")),
        "llm-int8-planted.md": int8_planted_table(int8),
    }
    for model, report in load_all("frontier-").items():
        made |= {f"{name}-{model}.md": text for name, text in sections(report).items()}
    return made | layer_tables()


def readme_with(text: str) -> str:
    """The README's text with its table of results made anew."""
    return with_part(text, BEGIN, END, readme_table(load(f"frontier-{README_MODEL}.json")))


def main() -> None:
    """Write everything."""
    write(contents())
    for model, report in load_all("frontier-").items():
        plot(model, report, ROOT / "docs" / "images" / f"frontier-{model}.svg")
    readme = ROOT / "README.md"
    readme.write_text(readme_with(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
