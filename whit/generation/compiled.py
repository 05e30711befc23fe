"""Decoding one sequence on a CPU as one compiled program: no Python, and no thread woken up, within a token.

The program computes what `FusedStep` does, over its caches: phases of products whose rows all threads share, and
between them the small operations of a block. Whether it does is shown by the first token, computed both ways.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from whit.generation.blocks import GatedBlock, GatedDecoder, Norm, UnsuitedError, agrees
from whit.generation.fused import FusedStep
from whit.generation.products import hooked
from whit.kernels.cpu.compiling import numba_works
from whit.kernels.cpu.program import Phase, Program, Step
from whit.kernels.cpu_decode import Prepared, Steps, dense_steps, steps_of
from whit.kernels.decode_state import KeyValues
from whit.models.packed import PackedLinear, TiedPackedLinear


def refuse_to_compile(model: nn.Module, ids: Tensor) -> None:
    """What can be said before anything is computed, for prompts (sequences, tokens).

    Raises:
        UnsuitedError: numba is missing, or it is not one sequence in float32 on a CPU.
    """
    if not numba_works():
        raise UnsuitedError("numba is missing")
    kinds = {(item.device.type, item.dtype) for item in model.parameters()}
    if len(ids) != 1 or kinds != {("cpu", torch.float32)}:
        raise UnsuitedError("it is compiled for one sequence in float32 on a CPU")


class CompiledStep:
    """As `FusedStep`, for one sequence in float32 after its prompt has been read.

    Args:
        step: the fused form, with the prompt in its caches.

    Raises:
        UnsuitedError: a layer has no compiled product.
    """

    def __init__(self, step: FusedStep) -> None:
        decoder, place = step.decoder, step.place
        self._fused = step
        self._place = torch.stack([place.position, place.start[0]])
        self._states = torch.zeros(1, len(decoder.last.weight))
        self._rooms: dict[int, Tensor] = {}
        self._program = Program(self._phases(decoder))

    def logits(self, ids: Tensor) -> Tensor:
        """ids (1, 1) -> (1, vocabulary), valid until the next call."""
        self._states.copy_(self._fused.decoder.embedding(ids[:, 0]))
        self._program.run()
        return self._out

    def prove(self, ids: Tensor) -> None:
        """Compute one token, ids (1, 1), in both forms; it may be any, since the next one takes its place.

        Raises:
            UnsuitedError: the results differ by more than their roundings.
        """
        if not agrees(self.logits(ids), self._fused.logits(ids), coarse=self._fused.decoder.coarse):
            raise UnsuitedError("the compiled program computes something else")

    def advance(self) -> Tensor:
        """The next token stands one place further."""
        self._place[0] += 1
        return self._fused.advance()

    def _phases(self, decoder: GatedDecoder) -> list[Phase]:
        phases: list[Phase] = []
        update: Tensor | None = None
        tables = self._fused.place.cosine, self._fused.place.sine
        for block, cache in zip(decoder.blocks, self._fused.caches, strict=True):
            normal, norm = self._norm(block.before, update)
            (query, key, value), three = _products(block.attention.modules, normal)
            attended, attend = self._attention(block, cache, tables, (query, key, value))
            (out,), one = _products(block.output.modules, attended)
            phases += [*_after(norm, three), Phase([attend]), *_after(None, one)]
            normal, norm = self._norm(block.between, out)
            (gate, up), two = _products(block.gate_up.modules, normal)
            gated = torch.empty_like(gate)
            (update,), last = _products(block.down.modules, gated)
            between = Step("block_steps.gate", (gate, up, gated, gate.numel()))
            phases += [*_after(norm, two), *_after(between, last)]
        normal, norm = self._norm(decoder.last, update)
        (self._out,), head = _products(decoder.head.modules, normal)
        return [*phases, *_after(norm, head)]

    def _norm(self, norm: Norm, update: Tensor | None) -> tuple[Tensor, Step]:
        out = torch.empty_like(self._states)
        weight = norm.weight.float().contiguous()
        arguments = (self._states, update, weight, out, out.numel(), norm.epsilon)
        return out, Step("block_steps.normalise", arguments)

    def _attention(
        self, block: GatedBlock, cache: KeyValues, tables: tuple[Tensor, Tensor], inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, Step]:
        _, key_heads, length, size = cache.keys.shape
        heads = inputs[0].numel() // size
        out = torch.empty_like(inputs[0])
        room = self._rooms.setdefault(heads, torch.empty(heads, length + 2 * size))  # blocks come one after the other
        arguments = (*inputs, cache.keys, cache.values, out, *tables, self._place, room)
        shape = (heads // key_heads, length, size, block.scaling)
        return out, Step("block_steps.attend", (*arguments, *shape), heads)


def _products(modules: list[nn.Module], inputs: Tensor) -> tuple[list[Tensor], list[Steps]]:
    """The outputs of layers with one input, and the steps that compute them."""
    ordered: Prepared = {}
    pairs = [_product(module, inputs, ordered) for module in modules]
    return [out for out, _ in pairs], [steps for _, steps in pairs]


def _product(module: nn.Module, inputs: Tensor, ordered: Prepared) -> tuple[Tensor, Steps]:
    if hooked(module):
        raise UnsuitedError(f"a {type(module).__name__} carries hooks")
    bias = getattr(module, "bias", None)
    bias = None if bias is None else bias.detach().float().contiguous()
    steps: Steps | None = None
    if isinstance(module, PackedLinear | TiedPackedLinear):
        packed = module.source.packed if isinstance(module, TiedPackedLinear) else module.packed
        out = torch.empty(1, packed.rows)
        steps = steps_of(packed, inputs, out, bias, ordered)
    elif type(module) is nn.Linear and module.weight.dtype == torch.float32:
        out = torch.empty(1, module.out_features)
        steps = dense_steps(module.weight.detach(), inputs, out, bias)
    if steps is None:
        raise UnsuitedError(f"no compiled product for {type(module).__name__}")
    return out, steps


def _after(first: Step | None, products: list[Steps]) -> list[Phase]:
    """A small step with whatever lays out its result, then the products of it."""
    before = [steps.before for steps in products if steps.before is not None]
    chain = [*([first] if first is not None else []), *before]
    phases = [Phase(chain, together=True)] if chain else []
    return [*phases, Phase([steps.product for steps in products])]
