"""What the model card of a folder (README.md with front matter between two lines of `---`) says about its licence."""

from __future__ import annotations

import re
from pathlib import Path

_LARGEST_CARD = 1 << 20


def license_in_card(directory: Path) -> str | None:
    """The value of `license` (of `license_name` where that says "other"), or None: a card is never worth an error."""
    try:
        with (directory / "README.md").open(encoding="utf-8", errors="replace") as file:
            text = file.read(_LARGEST_CARD)
    except OSError:
        return None
    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    if front is None:
        return None
    pairs = re.findall(r"^(license|license_name):[ \t]*(\S[^\n#]*)", front[1], re.MULTILINE)
    fields = {key: value.strip().strip("\"'") for key, value in pairs}
    stated = fields.get("license")
    return fields.get("license_name", stated) if stated == "other" else stated or None
