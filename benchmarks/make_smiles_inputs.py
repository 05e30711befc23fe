"""Make calibration and evaluation inputs of the reaction-SMILES ALBERT model from the tests of its source package.

    pip download --no-deps --no-binary :all: rxnmapper==0.4.3
    python benchmarks/make_smiles_inputs.py rxnmapper-0.4.3.tar.gz CALIBRATION.safetensors EVALUATION.safetensors

The source distribution (MIT) holds a few dozen reactions; every third distinct one is used for the evaluation, and
those of the rest that share a run of 8 tokens with it are dropped. Atom maps are removed, as the model never saw them.
Each file holds `input_ids` and `attention_mask` (samples, length).
"""

from __future__ import annotations

import argparse
import re
import tarfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from whit.data.leak import SHINGLE
from whit.models.resolve import resolve_model

REACTION = re.compile(r"[\"']([A-Za-z0-9@+\-\[\]().=#/\\~:%]+>[A-Za-z0-9@+\-\[\]().=#/\\~:%]*>[^\"'\s]+)[\"']")


def reactions(path: Path) -> list[str]:
    """Distinct reactions in the Python files of the archive, without atom maps, in alphabetical order."""
    found = set()
    with tarfile.open(path) as archive:
        for member in archive.getmembers():
            file = archive.extractfile(member) if member.name.endswith(".py") else None
            if file is not None:
                text = file.read().decode("utf-8")
                found.update(re.sub(r":\d+\]", "]", item) for item in REACTION.findall(text))
    return sorted(item for item in found if len(item) > 20)


def runs(tokens: list[int]) -> set[tuple[int, ...]]:
    """Every run of SHINGLE tokens."""
    return {tuple(tokens[start : start + SHINGLE]) for start in range(len(tokens) - SHINGLE + 1)}


def make(rows: list[list[int]], path: Path, padding: int) -> None:
    """Write one file."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), padding, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    save_file({"input_ids": ids, "attention_mask": mask}, path)
    print(path, tuple(ids.shape))


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("evaluation", type=Path)
    options = parser.parse_args()
    tokenizer = resolve_model("albert-smiles").load_tokenizer()
    rows = [tokenizer(text)["input_ids"] for text in reactions(options.source)]
    evaluation = rows[1::3]
    seen = set().union(*map(runs, evaluation))
    calibration = [row for row in rows if not runs(row) & seen]
    padding = tokenizer.pad_token_id or 0
    make(calibration, options.calibration, padding)
    make(evaluation, options.evaluation, padding)


if __name__ == "__main__":
    main()
