"""Makes a local lm-eval task of HellaSwag (Zellers et al. 2019, MIT licence) from its validation set as plain text.

    python benchmarks/lm_eval/hellaswag.py hellaswag_val_full.txt.bz2 FOLDER
    whit evaluate MODEL --tasks FOLDER/hellaswag.yaml --limit 500

The input is the text form of https://github.com/klosax/hellaswag_text_data, as it is or compressed by bzip2: six lines
per item, namely the context ("activity: text"), the index of the right ending, and the four endings. It lacks the
markers ([header], [title], ...) of the original, so scores are close to, not identical with, those of the harness's own
task `hellaswag`, which reads the original from the hub.
"""

from __future__ import annotations

import argparse
import bz2
import json
import sys
from pathlib import Path

LINES = 6
TASK = """\
task: hellaswag_text
dataset_path: json
dataset_kwargs:
  data_files:
    validation: hellaswag.jsonl
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: endings
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def read_items(path: Path) -> list[dict[str, object]]:
    """Context, endings and label of every item.

    Raises:
        ValueError: the file is not made of six lines per item.
    """
    data = path.read_bytes()
    text = (bz2.decompress(data) if path.suffix == ".bz2" else data).decode("utf-8")
    lines = text.removesuffix("\n").split("\n")
    if len(lines) % LINES:
        raise ValueError(f"{path} has {len(lines)} lines, not a multiple of {LINES}")
    items = []
    for start in range(0, len(lines), LINES):
        context, label, *endings = lines[start : start + LINES]
        if label not in ("0", "1", "2", "3"):
            raise ValueError(f"line {start + 2} of {path} is {label!r}, not the index of an ending")
        items.append({"context": context, "endings": endings, "label": int(label)})
    return items


def main() -> int:
    """Read the command line, write the task; 0, or 1 if the text cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="hellaswag_val_full.txt or .txt.bz2")
    parser.add_argument("folder", type=Path, help="where the task file and its data are written")
    arguments = parser.parse_args()
    try:
        items = read_items(arguments.text)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    arguments.folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    (arguments.folder / "hellaswag.jsonl").write_text(lines, encoding="utf-8")
    (arguments.folder / "hellaswag.yaml").write_text(TASK, encoding="utf-8")
    print(f"{len(items):,} items in {arguments.folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
