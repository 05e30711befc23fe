"""The examples of the guide's section on modules run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = GUIDE.read_text(encoding="utf-8").split("## Your own module\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "guide"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(blocks[0], str(GUIDE), "exec"), names)
        assert torch.equal(
            names["again"].eval()(names["batches"][0]), names["result"].module.eval()(names["batches"][0])
        )
        assert [layer.name for layer in names["result"].layers] == ["features.0", "features.3", "head"]
        exec(compile(blocks[1], str(GUIDE), "exec"), names)
        assert [layer.method["method"] for layer in names["result"].layers] == ["gptq", "gptq", "rtn"]
        exec(compile(blocks[2], str(GUIDE), "exec"), names)
        assert {layer.method["method"] for layer in names["result"].layers} == {"pruner-zero"}
