"""What has been worked out for a packed weight, kept as long as its tensors are these and lie where they did.

Which kernel takes a weight, and what it must be told, follows from the layout, the shape and where the tensors lie. To
find it anew at every call takes the host longer than a kernel takes the device, so it is kept with the weight.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

from torch import Tensor


class Memory:
    """Answers by question, of one weight. Copies of a weight begin without any: their tensors lie elsewhere."""

    __slots__ = ("_state",)
    MOST: ClassVar[int] = 256
    """Answers kept, above which all are forgotten: a prompt of another length is another question."""
    _age: ClassVar[int] = 0

    def __init__(self) -> None:
        # One value, so that a thread never sees the answers of other tensors.
        self._state: tuple[int, tuple[tuple[str, Tensor, int], ...], dict[Hashable, Any]] = (-1, (), {})

    @classmethod
    def forget_all(cls) -> None:
        """Whatever any weight remembers no longer holds: another kernel is known to be faster, or has failed."""
        cls._age += 1

    def of(self, tensors: Mapping[str, Tensor]) -> dict[Hashable, Any]:
        """The answers for these tensors, to be read and added to; none if one is another or lies elsewhere now."""
        age, stored, answers = self._state
        if age == Memory._age and len(answers) <= Memory.MOST:
            for name, tensor, address in stored:
                if tensors[name] is not tensor or tensor.data_ptr() != address or not tensor.is_contiguous():
                    break
            else:
                return answers
        answers = {}
        self._state = (Memory._age, tuple((name, item, item.data_ptr()) for name, item in tensors.items()), answers)
        return answers

    def __reduce__(self) -> tuple[type[Memory], tuple[()]]:
        return Memory, ()
