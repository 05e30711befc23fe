"""Greedy decoding with packed models: few launches per token, recorded once and replayed."""

from whit.generation.greedy import Continuation, continue_greedily

__all__ = ["Continuation", "continue_greedily"]
