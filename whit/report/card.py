"""The model card: `README.md` with YAML front matter, an honest table and the lines that load the model."""

from __future__ import annotations

import json
from typing import Any

from whit.report.figures import (
    SummaryRow,
    cost_rows,
    facts,
    format_number,
    group_reasons,
    method_line,
    method_name,
    method_names,
    metric_rows,
    model_label,
    protocols,
    recipe_lines,
    remarks,
    size_rows,
)
from whit.report.record import EvaluationRecord, Result


def model_card(result: Result) -> str:
    """Markdown text of the card."""
    parts = [
        _front_matter(result),
        f"# {_inline(model_label(result))}, compressed by {_inline(method_name(result))}",
        _method(result),
        _table([*size_rows(result), *metric_rows(result), *cost_rows(result)]),
        *_remarks(result),
        _loading(result),
        *_measured(result),
        _layers(result),
    ]
    return "\n\n".join(parts) + "\n"


def _method(result: Result) -> str:
    line, steps = method_line(result), recipe_lines(result)
    made = f"Made with whit: {line}, in `recipe.json`:" if steps else f"Made with whit: `{_code(line)}`."
    listed = "\n".join(f"{index}. `{_code(step)}`" for index, step in enumerate(steps, 1))
    counted = "Bits are stored bytes x 8 / weights; scales, masks, indices and headers are counted."
    return "\n\n".join([made, listed, counted]) if steps else f"{made} {counted}"


def _front_matter(result: Result) -> str:
    fields: dict[str, Any] = {"base_model": model_label(result), "base_model_relation": "quantized"}
    licence = result.model.get("license")
    if licence:
        fields["license"] = str(licence)
    fields["library_name"] = "transformers"
    fields["tags"] = ["whit", "quantized", *method_names(result)]
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()]
    return "\n".join(["---", *lines, "---"])


def _table(rows: list[SummaryRow]) -> str:
    lines = ["| | original | compressed |", "|---|---:|---:|"]
    lines += [f"| {_inline(row.label)} | {_inline(row.before)} | {_inline(row.after)} |" for row in rows]
    return "\n".join(lines)


def _remarks(result: Result) -> list[str]:
    found = remarks(result)
    return ["## Read this first\n\n" + "\n".join(f"- {_inline(text)}" for text in found)] if found else []


def _loading(result: Result) -> str:
    causal = str(result.model.get("architecture", "")).endswith("ForCausalLM")
    lines = ["```python", "import whit  # registers the packed formats with transformers"]
    if causal:
        lines += [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("DIR")',
            'tokenizer = AutoTokenizer.from_pretrained("DIR")',
        ]
    else:
        lines += ["", 'model = whit.load("DIR")']
    lines.append("```")
    return "## Load it\n\n" + "\n".join(lines) + "\n\nThe file holds plain tensors (safetensors) and no code."


def _measured(result: Result) -> list[str]:
    record = result.compressed or result.original
    if record is None:
        return ["## What was measured\n\nNothing: the run was made with `--no-evaluate`."]
    lines = [f"- protocol `{_code(protocol)}`" for protocol in protocols(result)]
    lines += [f"- evaluation data, {_inline(key)}: {_inline(value)}" for key, value in facts(record.data).items()]
    lines.append("- intervals: 95 %, bootstrap; equal protocol ids mean comparable numbers")
    return ["## What was measured\n\n" + "\n".join(lines), *_samples(result)]


def _samples(result: Result) -> list[str]:
    found = [_sample("original", result.original), _sample("compressed", result.compressed)]
    texts = [text for text in found if text]
    return ["## Sample\n\n" + "\n\n".join(texts)] if texts else []


def _sample(name: str, record: EvaluationRecord | None) -> str:
    if record is None or not record.sample:
        return ""
    quoted = [
        f"> *{_inline(key)}*: " + _inline(text.strip()).replace("\n", "\n> ") for key, text in record.sample.items()
    ]
    return f"{name}:\n\n" + "\n>\n".join(quoted)


def _layers(result: Result) -> str:
    errors = [layer.error for layer in result.layers]
    lines = [f"- {len(result.layers)} layers compressed; details in `result.json` and `report.html`"]
    if errors:
        mean = sum(errors) / len(errors)
        lines.append(
            f"- relative output error of a layer: mean {format_number(mean)}, worst {format_number(max(errors))}"
        )
    lines += [f"- {len(reason.names)} left alone: {_inline(reason.text)}" for reason in group_reasons(result.untouched)]
    return "## Layers\n\n" + "\n".join(lines)


def _inline(text: str) -> str:
    """Text that Markdown shows as it is: no table cells, links, emphasis or HTML from user strings."""
    for character in "\\`*_[]<>|#":
        text = text.replace(character, "\\" + character)
    return text


def _code(text: str) -> str:
    return text.replace("`", "'").replace("\n", " ")
