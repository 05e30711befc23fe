"""Turn the committed measurements of kernels into the tables of docs/kernels.md.

    python benchmarks/kernel_tables.py     # rewrites docs/generated/kernels-*.md, machine-*.md, history-of-kernels.md

No number of those tables is typed by hand: a test runs this script's functions and compares.
"""

from __future__ import annotations

from typing import Any

from committed import load, load_all, markdown, numbered_steps, write


def kernel_table(report: dict[str, Any]) -> str:
    """Time, bytes, floor and bandwidth of the packed products of one device, as Markdown.

    The floor is the larger of bytes over bandwidth and operations over the measured float16 rate; the bandwidth is the
    highest that the copy or any record of the run reached.
    """
    limits = report["ceilings"]
    reached = max(limits["copy_bytes_per_second"], *(row["bytes_per_second"] for row in report["records"]))
    lines = [
        f"{report['hardware']}, torch {report['torch']}, CUDA {report['cuda']}, {report['dtype']} inputs, kernels of "
        f"step {report['step']} below. Highest bandwidth of the run {reached / 1e12:.2f} TB/s, 8192 x 8192 x 8192 "
        f"float16 product {limits['float16_operations_per_second'] / 1e12:.0f} TFLOP/s.",
        "",
    ]
    header = ["outputs x inputs", "vectors", "weight", "bits", "µs", "floor µs", "TB/s", "times dense", "kernel"]
    rows = []
    for row in report["records"]:
        bandwidth = row["bytes_moved"] / reached
        arithmetic = 2 * row["rows"] * row["columns"] * row["vectors"] / limits["float16_operations_per_second"]
        cells = [
            f"{row['rows']} x {row['columns']}",
            str(row["vectors"]),
            row["format"],
            f"{row['bits_per_weight']:.3f}",
            f"{row['seconds'] * 1e6:.1f}",
            f"{max(bandwidth, arithmetic) * 1e6:.1f}",
            f"{row['bytes_per_second'] / 1e12:.2f}",
            f"{row['times_dense']:.2f}",
            row["kernel"].removeprefix("cuda "),
        ]
        rows.append(cells)
    return "\n".join(lines + markdown(header, rows)) + "\n"


def peer_table(report: dict[str, Any]) -> str:
    """Products of GemLite beside ours in one run, as Markdown."""
    header = ["outputs x inputs", "vectors", "weight", "µs", "times dense"]
    rows = []
    for row in report["records"]:
        times = [f"{row['seconds'] * 1e6:.1f}", f"{row['times_dense']:.2f}"]
        rows.append([f"{row['rows']} x {row['columns']}", str(row["vectors"]), row["format"], *times])
    machine = f"{report['hardware']}, torch {report['torch']}"
    lines = [f"{machine}, GemLite {report['gemlite']}, {report['dtype']} inputs.", ""]
    return "\n".join(lines + markdown(header, rows)) + "\n"


def machine_table(report: dict[str, Any]) -> str:
    """Bandwidth, matrix products, and what a scheduler issues with 1 to 16 warps on its multiprocessor, as Markdown."""
    rates = report["operations_per_second"].items()
    products = ", ".join(f"{name} {value / 1e12:.0f}" for name, value in rates)
    lines = [
        f"{report['hardware']}, torch {report['torch']}, CUDA {report['cuda']}. Reading "
        f"{report['read_bytes_per_second'] / 1e12:.2f} TB/s, copying {report['copy_bytes_per_second'] / 1e12:.2f} TB/s "
        f"(bytes read and written), products of 8192 x 8192 x 8192 in TOP/s: {products}.",
        "",
    ]
    warps = list(next(iter(report["cycles_per_instruction"].values())))
    header = ["cycles of a scheduler per instruction of 32 lanes", *(f"{count} warps" for count in warps)]
    header[1] = header[1].replace("1 warps", "1 warp")
    rows = [
        [name, *(f"{cycles[count]:.2f}" for count in warps)]
        for name, cycles in report["cycles_per_instruction"].items()
    ]
    return "\n".join(lines + markdown(header, rows)) + "\n"


def contents() -> dict[str, str]:
    """Generated file name -> its text."""
    history = load("history-of-kernels.json")
    tables = {f"kernels-{device}.md": kernel_table(report) for device, report in load_all("kernels-").items()}
    tables |= {f"machine-{device}.md": machine_table(report) for device, report in load_all("machine-").items()}
    tables["gemlite-h200.md"] = peer_table(load("gemlite_h200.json"))
    return tables | {"history-of-kernels.md": numbered_steps(history, f"{history['hardware']}, float16.")}


if __name__ == "__main__":
    write(contents())
