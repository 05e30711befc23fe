"""Small tokenizers made on the spot: one token per byte, with or without special tokens."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BYTES = 256
BEGIN, END = 256, 257


def byte_tokenizer(*, begin: bool = False, end: bool = False) -> PreTrainedTokenizerFast:
    """256 byte tokens, then `<s>` (256) and `</s>` (257), which are added to every text where asked for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)} | {"<s>": BEGIN, "</s>": END}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if begin or end:
        template = " ".join(["<s>"] * begin + ["$A"] + ["</s>"] * end)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", BEGIN), ("</s>", END)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
