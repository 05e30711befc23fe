"""Greedy continuation of token sequences by the fastest way that a model and a device allow.

    fused    blocks in few launches (`blocks.py`), recorded as a CUDA graph
    compiled the same blocks on a CPU, a token as one compiled program (`compiled.py`)
    library  transformers' `generate`: for models whose blocks are others, and where nothing is compiled
    static   the model's own forward over a cache of fixed size, recorded as a CUDA graph: if asked for, because a
             forward that keeps count on the host would be recorded wrongly

Nothing between two tokens waits for the host. The result says which way was taken, and why not a faster one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from whit.errors import DataError, KnobError
from whit.generation.blocks import UnsuitedError, gated_decoder, text_config
from whit.generation.compiled import CompiledStep, refuse_to_compile
from whit.generation.fused import LONGEST, FusedStep, check_against
from whit.generation.loop import Chooser, Step, decode
from whit.generation.static import StaticStep

WAYS = ("auto", "fused", "compiled", "static", "library")
FEW_TOKENS = 8
"""New tokens up to which a CPU leaves it to the library: showing that another way is right takes as long."""
TRIAL = 4
"""Tokens of the trial on a CPU, where nothing is compiled for the length of the prompt."""


@dataclass(frozen=True)
class Continuation:
    """What a model says.

    Attributes:
        tokens: int64 (sequences, prompt + new); after its end a sequence is filled with the padding token.
        way: "fused", "compiled", "static" or "library". graph: whether steps were replayed from a CUDA graph.
        reasons: why faster ways were not taken.
    """

    tokens: Tensor
    way: str
    graph: bool
    reasons: tuple[str, ...]

    def explain(self) -> str:
        """One line for people."""
        return "; ".join([f"{self.way}{' in a CUDA graph' if self.graph else ''}", *self.reasons])


@dataclass(frozen=True)
class Request:
    """What is to be continued.

    Attributes:
        inputs: `input_ids` int64 (sequences, prompt) and `attention_mask`, 0 for padding, which stands on the left.
        new_tokens: at most. stops: tokens that end a sequence. pad: what fills it up then.
    """

    inputs: dict[str, Tensor]
    new_tokens: int
    stops: tuple[int, ...]
    pad: int

    @property
    def positions(self) -> Tensor:
        """int64 (sequences, prompt): places counted from the first token that is no padding."""
        return (self.inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)

    @property
    def length(self) -> int:
        """Tokens in the end."""
        return self.inputs["input_ids"].shape[1] + self.new_tokens


def continue_greedily(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    new_tokens: int,
    stop_tokens: Sequence[int] = (),
    pad_token: int | None = None,
    way: str = "auto",
    graph: bool | None = None,
    join: bool = False,
    branches: bool = True,
) -> Continuation:
    """The most probable next token, again and again.

    Args:
        model: a causal language model of transformers, packed or not, with all tensors on one device.
        input_ids: int64 (sequences, prompt). attention_mask: the same shape, any dtype, 0 for padding on the left.
        new_tokens: at most so many; fewer where every sequence ends with one of `stop_tokens`.
        way: one of the ways above, refused where it is impossible; "auto": fused on a GPU and compiled on a CPU where
            possible, else library.
        graph: record a CUDA graph; default: on a GPU.
        join: let the model's modules with equal layouts and inputs share tensors from now on, and others hold their
            weight in the form that products read fastest (`Products`), which is faster and changes no value.
            branches: run others beside each other. Both for the fused way.

    Raises:
        DataError: the prompt is empty or of another shape than its mask, or prompt and new tokens together are longer
            than the model's positions.
        KnobError: `way` is unknown or impossible for this model.
    """
    if way not in WAYS:
        raise KnobError(f"way must be one of {', '.join(WAYS)}, got {way!r}")
    if new_tokens < 1:
        raise KnobError(f"new tokens must be at least 1, got {new_tokens}")
    _check_shapes(input_ids, attention_mask)
    _check_length(model, input_ids, new_tokens)
    mask = torch.ones_like(input_ids) if attention_mask is None else (attention_mask != 0).to(torch.int64)
    stops = tuple(stop_tokens)
    pad = pad_token if pad_token is not None else stops[0] if stops else 0
    request = Request({"input_ids": input_ids, "attention_mask": mask}, new_tokens, stops, pad)
    on_gpu = input_ids.device.type == "cuda"
    wanted = on_gpu if graph is None else graph and on_gpu
    if way == "library" or (way == "auto" and not on_gpu and new_tokens <= FEW_TOKENS):
        return _by_library(model, request, ())
    device = torch.cuda.device(input_ids.device) if on_gpu else nullcontext()
    with torch.inference_mode(), device:
        prepared = prepare(model, request, way, join=join, branches=branches)
        reasons = prepared.reasons
        if prepared.step is not None and prepared.first is not None:
            chooser = Chooser(torch.zeros_like(input_ids[:, :1]), new_tokens, stops, pad)
            chooser.take(prepared.first)
            tokens, replayed, reason = decode(prepared.step, chooser, new_tokens, graph=wanted)
            whole = torch.cat([input_ids, tokens], 1)
            return Continuation(whole, prepared.way, replayed, (*reasons, reason) if reason else reasons)
    if way != "auto":
        raise KnobError(f"{reasons[0]} (leave out way={way!r})")
    return _by_library(model, request, reasons)


@dataclass(frozen=True)
class Prepared:
    """A prompt that has been read.

    Attributes:
        step: computes what follows; None where only the library can. first: logits (sequences, vocabulary) after the
            prompt. way, reasons: as in `Continuation`.
    """

    step: Step | None
    first: Tensor | None
    way: str
    reasons: tuple[str, ...]


def prepare(model: nn.Module, request: Request, way: str, *, join: bool = False, branches: bool = True) -> Prepared:
    """Read the prompt and set up the way asked for; "auto" is the fused one on a GPU, the compiled one elsewhere."""
    if way == "auto":
        way = "fused" if request.inputs["input_ids"].is_cuda else "compiled"
    try:
        if way == "static":
            step, first = _static(model, request)
        elif way == "compiled":
            step, first = _compiled(model, request)
        else:
            step, first = _fused(model, request, join=join, branches=branches)
    except UnsuitedError as error:
        return Prepared(None, None, "library", (f"not {way}: {error}",))
    return Prepared(step, first, way, ())


def _fused(
    model: nn.Module, request: Request, *, join: bool, branches: bool, trial: int = LONGEST
) -> tuple[FusedStep, Tensor]:
    _refuse_others(model, request)
    if torch.is_autocast_enabled(request.inputs["input_ids"].device.type):
        raise UnsuitedError("autocast changes the types of its parts")
    decoder = gated_decoder(model, join=join, branches=branches)
    ids, mask = request.inputs["input_ids"], request.inputs["attention_mask"]
    check_against(model, decoder, ids[0, mask[0] != 0] if bool(mask[0].any()) else ids[0], trial)
    step = FusedStep(decoder, (mask == 0).sum(-1), request.length)
    return step, step.prefill(ids, mask)


def _compiled(model: nn.Module, request: Request) -> tuple[Step, Tensor]:
    refuse_to_compile(model, request.inputs["input_ids"])
    fused, first = _fused(model, request, join=False, branches=False, trial=TRIAL)
    step = CompiledStep(fused)
    step.prove(first.argmax(-1, keepdim=True))
    return step, first


def _static(model: nn.Module, request: Request) -> tuple[Step, Tensor]:
    _refuse_others(model, request)
    step = StaticStep(model, request.inputs["attention_mask"], request.length)
    return step, step.prefill(request.inputs, request.positions)


def _refuse_others(model: nn.Module, request: Request) -> None:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsuitedError("it is an encoder and decoder")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        raise UnsuitedError("its parameters are on several devices")
    if bool((request.inputs["attention_mask"].diff(dim=-1) < 0).any()):
        raise UnsuitedError("padding stands elsewhere than before the text")


def _by_library(model: nn.Module, request: Request, reasons: tuple[str, ...]) -> Continuation:
    from transformers import GenerationConfig

    answer: Any = model
    own = getattr(model, "generation_config", None)
    never = int(getattr(text_config(model), "vocab_size", 0))
    # What is left open here would be filled in from the settings that many checkpoints bring: sampling, penalties,
    # tokens suppressed or forced. Only where an answer starts is theirs to say.
    settings = GenerationConfig(
        max_new_tokens=request.new_tokens,
        do_sample=False,
        eos_token_id=list(request.stops) or [never],
        pad_token_id=request.pad,
        bos_token_id=getattr(own, "bos_token_id", None),
        decoder_start_token_id=getattr(own, "decoder_start_token_id", None),
    )
    answer.generation_config = GenerationConfig()
    try:
        with torch.inference_mode():
            ids = answer.generate(**request.inputs, generation_config=settings)
    finally:
        answer.generation_config = own
    return Continuation(ids, "library", False, reasons)


def _check_shapes(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    shape = tuple(input_ids.shape)
    if len(shape) != 2 or shape[0] < 1:
        raise DataError(f"prompts must have the shape (sequences, tokens) with at least one sequence, got {shape}")
    if attention_mask is not None and tuple(attention_mask.shape) != shape:
        raise DataError(f"the attention mask has the shape {tuple(attention_mask.shape)}, the prompts have {shape}")


def _check_length(model: nn.Module, input_ids: Tensor, new_tokens: int) -> None:
    prompt = input_ids.shape[1]
    if prompt < 1:
        raise DataError("the prompt has no token: give some text to continue")
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    positions = None if both else getattr(text_config(model), "max_position_embeddings", None)
    if not isinstance(positions, int) or prompt + new_tokens <= positions:
        return
    if prompt >= positions:
        raise DataError(f"the prompt has {prompt} tokens, but the model has {positions} positions: shorten it")
    raise DataError(
        f"{prompt} prompt tokens and {new_tokens} new ones are more than the model's {positions} positions: "
        f"ask for at most {positions - prompt} new tokens"
    )
