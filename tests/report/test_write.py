"""The three files of a run: complete, self-contained, safe against any user string, and always the same bytes."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.report.example import example_result
from whit.report.card import model_card
from whit.report.figures import recipe_lines
from whit.report.page import report_page
from whit.report.record import Result
from whit.report.write import write_reports

NASTY = "</td></script><script>alert('1')</script> | `a` \"b\" [c](javascript:d) & <img src=x onerror=y>"
VOID = {"meta", "br", "hr", "link", "img", "input"}


class Outline(HTMLParser):
    """Checks nesting and collects tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str, style: str | None = None) -> int:
        return sum(name == tag and style in (None, attributes.get("class")) for name, attributes in self.tags)


def outline(result: Result) -> Outline:
    parser = Outline()
    parser.feed(report_page(result))
    parser.close()
    assert parser.open == []
    return parser


def nasty_result() -> Result:
    """The example with a hostile string in every place that a user controls."""
    result = example_result(2)
    assert result.compressed is not None
    layers = [
        dataclasses.replace(layer, name=layer.name + NASTY, notes=[NASTY], format={"format": NASTY, NASTY: NASTY})
        for layer in result.layers
    ]
    metric = dataclasses.replace(result.compressed.metrics[0], name=NASTY, protocol=NASTY)
    compressed = dataclasses.replace(
        result.compressed, sample={NASTY: NASTY}, data={NASTY: NASTY}, metrics=[metric, *result.compressed.metrics]
    )
    return dataclasses.replace(
        result,
        model={**result.model, "label": NASTY, "architecture": NASTY, "notes": [NASTY], "license": NASTY},
        run={
            **result.run,
            "options": {**result.run["options"], "skip": [NASTY]},
            "method": {"method": NASTY, NASTY: NASTY},
        },
        layers=layers,
        untouched={NASTY: NASTY},
        compressed=compressed,
    )


def test_all_three_files_are_written_and_the_record_comes_back(tmp_path: Path) -> None:
    result = example_result()
    write_reports(tmp_path, result)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "report.html", "result.json"]
    assert Result.load(tmp_path / "result.json") == result


def test_the_same_record_gives_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_reports(tmp_path / name, example_result(3))
        contents.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1]


def test_page_loads_nothing_and_is_small() -> None:
    page = report_page(example_result())
    assert len(page) < 300_000
    assert "default-src &#x27;none&#x27;" in page
    assert not re.search(r"https?://|url\(|@import|\bsrc=|<link", page)


def test_page_shows_every_layer_cell_and_figure() -> None:
    result = example_result(4)
    found = outline(result)
    assert found.count("td", "cell") == 2 * 4 * 7
    assert found.count("figure", "metric") == 1
    assert "131.4 [113.9, 152.6]" in found.text
    for layer in result.layers:
        assert layer.name in found.text
    assert "tied to model.embed_tokens.weight" in found.text
    assert (
        "whit compress smollm2-135m --method billm --block-size 128 --variant whit --samples 32 --skip lm_head"
        in found.text
    )


def test_bars_of_the_size_chart_add_up_to_the_file() -> None:
    result = example_result(4)
    shares = [float(text) for text in re.findall(r"· ([\d.]+) %", outline(result).text)]
    assert sum(shares) == pytest.approx(100, abs=0.5)


def test_hostile_strings_stay_text() -> None:
    found = outline(nasty_result())
    assert found.count("script") == 1
    assert found.count("img") == 0
    assert not any(key.startswith("on") for _, attributes in found.tags for key in attributes)
    assert NASTY in found.text


def test_hostile_strings_stay_text_in_the_card() -> None:
    card = model_card(nasty_result())
    front = card.split("---\n")[1]
    values = dict(line.split(": ", 1) for line in front.strip().splitlines())
    assert json.loads(values["base_model"]) == NASTY
    assert json.loads(values["license"]) == NASTY
    body = re.sub(r"`[^`\n]*`", "", card.split("---\n", 2)[2].replace("\\`", ""))
    assert not re.search(r"(?<!\\)<(script|img)", body)
    assert not re.search(r"(?<!\\)\[c(?<!\\)\]\(", body)


def test_fingerprints_for_machines_are_not_shown_to_people() -> None:
    result = example_result(2)
    assert "JasxFAAA" in str(result.to_json())
    assert "JasxFAAA" not in report_page(result)
    assert "JasxFAAA" not in model_card(result)


def test_a_run_without_evaluation_says_so() -> None:
    result = example_result(2, evaluated=False)
    assert "Not measured in this run (--no-evaluate)" in outline(result).text
    assert "Nothing: the run was made with `--no-evaluate`" in model_card(result)


def test_a_leak_is_the_first_remark_everywhere() -> None:
    result = example_result(2, leak=True)
    text = outline(result).text
    assert "the quality is overstated" in text
    assert "the quality is overstated" in model_card(result)
    assert text.index("the quality is overstated") < text.index("The source file is quantised")


def test_a_model_without_blocks_or_layers_still_has_a_page() -> None:
    bare = dataclasses.replace(example_result(2, evaluated=False), layers=[], untouched={}, timings={})
    text = outline(bare).text
    assert "Layer by layer" not in text
    assert "All 0 layers" in text
    assert "0 layers compressed" in model_card(bare)


def test_equal_bits_are_one_sentence_instead_of_a_map() -> None:
    result = example_result(2)
    even = [dataclasses.replace(layer, stored_bytes=layer.parameters // 4) for layer in result.layers]
    found = outline(dataclasses.replace(result, layers=even))
    assert "Every layer in a block stores 2.000 bits per weight." in found.text
    assert found.count("td", "cell") == 2 * 7


def test_two_stacks_have_a_map_each() -> None:
    result = example_result(2)
    renamed = [
        dataclasses.replace(
            layer, name=layer.name.replace("model.", "decoder."), block=layer.block.replace("model.", "decoder.")
        )
        for layer in result.layers
        if layer.block
    ]
    text = outline(dataclasses.replace(result, layers=[*result.layers, *renamed])).text
    assert "Relative output error in model.layers" in text
    assert "Relative output error in decoder.layers" in text


def test_card_has_front_matter_table_and_loading_code() -> None:
    card = model_card(example_result())
    assert card.startswith('---\nbase_model: "smollm2-135m"\nbase_model_relation: "quantized"\n')
    assert 'license: "apache-2.0"' in card
    assert "| stored bits per weight, layers in blocks | 16.00 | 2.687 |" in card
    assert 'AutoModelForCausalLM.from_pretrained("DIR")' in card
    assert "perplexity-v1/" in card


def test_card_of_another_family_loads_with_whit() -> None:
    result = example_result(2)
    other = dataclasses.replace(result, model={"label": "whisper", "architecture": "WhisperForConditionalGeneration"})
    card = model_card(other)
    assert 'whit.load("DIR")' in card
    assert "AutoModelForCausalLM" not in card
    assert "license:" not in card


def test_a_recipe_is_listed_step_by_step_everywhere() -> None:
    steps = [
        {"method": "wanda", "pattern": "2:4", "exclude": ["@first"]},
        {"method": "gptq", "bits": 4, "exclude": ["@first"]},
        {"method": "rtn", "bits": 8, "layers": ["lm_head"]},
    ]
    result = example_result(2)
    result = dataclasses.replace(result, run={**result.run, "method": {"method": "recipe", "step": steps}})
    lines = [
        "@blocks but @first: wanda (pattern=2:4)",
        "@blocks but @first: gptq (bits=4)",
        "lm_head: rtn (bits=8)",
    ]
    assert recipe_lines(result) == lines
    card, page = model_card(result), report_page(result)
    for index, line in enumerate(lines, 1):
        assert f"\n{index}. `{line}`\n" in card
        assert f"<li>{line}</li>" in page
    assert 'tags: ["whit", "quantized", "wanda", "gptq", "rtn"]' in card
    assert recipe_lines(example_result(2)) == []
