"""Loading a model's tokenizer when it has one, and checking that it fits the embedding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from whit.errors import ModelError

_TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "*.model", "spiece*", "tekken.json")

# One token per atom, bond, branch, ring closure or reaction arrow: the usual tokenisation of SMILES strings
# (Schwaller et al., "Found in Translation", Chemical Science 9, 2018).
_SMILES = r"\[[^\]]+\]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>>?|\*|\$|%[0-9]{2}|[0-9]"


def folder_loader(directory: Path) -> Callable[[], Any]:
    """A loader for the tokenizer of a transformers folder; it returns None when the folder has no tokenizer files."""

    def load() -> Any:
        if not any(any(directory.glob(pattern)) for pattern in _TOKENIZER_FILES):
            return None
        try:
            return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(
                f"the tokenizer of {str(directory)!r} cannot be read ({reason}): download its files again"
            ) from error

    return load


def checked_loader(load: Callable[[], Any], config: Any, label: str) -> Callable[[], Any]:
    """The same loader, refusing a tokenizer with more tokens than the model has embedding rows."""

    def checked() -> Any:
        tokenizer = load()
        rows = getattr(config.get_text_config(), "vocab_size", None)
        if tokenizer is not None and isinstance(rows, int) and len(tokenizer) > rows:
            raise ModelError(
                f"the tokenizer of {label!r} has {len(tokenizer):,} tokens, the model's embedding only {rows:,} rows: "
                "use the tokenizer that belongs to this model"
            )
        return tokenizer

    return checked


def smiles_loader(vocabulary: Path) -> Callable[[], Any]:
    """A loader for a SMILES tokenizer: regular-expression split, one id per line of a vocabulary file."""

    def load() -> Any:
        tokens = vocabulary.read_text(encoding="utf-8").split()
        ids = {token: index for index, token in enumerate(tokens)}
        tokenizer = Tokenizer(WordLevel(ids, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = Split(Regex(_SMILES), behavior="isolated")
        ends = [(token, ids[token]) for token in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token="[UNK]",
            cls_token="[CLS]",
            sep_token="[SEP]",
            pad_token="[PAD]",
            mask_token="[MASK]",
        )

    return load
