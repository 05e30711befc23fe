"""Formulas of the documentation become MathML that the site shows without a script."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def test_marked_formulas_become_mathml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    hook = importlib.import_module("mathml")
    page = r'<p>a <span class="arithmatex">\(x &lt; 2^{-3}\)</span>, <code>\(y\)</code></p>'
    shown = hook.on_page_content(page, page=None)
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="inline">' in shown
    assert "arithmatex" not in shown
    assert r"<code>\(y\)</code>" in shown
    block = hook.on_page_content('<div class="arithmatex">\\[\ny = W x\n\\]</div>')
    assert 'display="block"' in block
