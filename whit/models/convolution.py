"""A two-dimensional convolution as a matrix product over its windows.

    y[n, o, p] = sum_k W[o, k] x_unfolded[n, p, k],    k over (input channel, kernel row, kernel column)

so `weight.flatten(1)` is the matrix (rows = output channels) and every window of the padded image is one input vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

Pair = tuple[int, int]
# Windows overlap, so unfolded images take many times their room: this many values (64 MB in float32) at a time.
PART_VALUES = 1 << 24
# What `functional.pad` calls the padding modes of `nn.Conv2d`.
_PAD_MODES = {"zeros": "constant"}


@dataclass(frozen=True)
class Window:
    """Where the windows of a convolution lie: the geometry of `nn.Conv2d`, (vertical, horizontal) throughout.

    Attributes:
        padding: zeros (or what `padding_mode` says) on both sides of each dimension, or "same" or "valid".
    """

    kernel: Pair
    stride: Pair
    padding: Pair | str
    dilation: Pair
    padding_mode: str

    @classmethod
    def of(cls, module: nn.Conv2d) -> Window:
        """The geometry of a module."""
        padding = module.padding if isinstance(module.padding, str) else _pair(module.padding)
        pairs = (_pair(module.kernel_size), _pair(module.stride))
        return cls(*pairs, padding, _pair(module.dilation), module.padding_mode)

    def unfold(self, images: Tensor) -> Tensor:
        """Every window as one vector: (n, channels, height, width) -> (n, positions, channels * kernel), contiguous.

        An image without the leading dimension counts as one.
        """
        batch = images if images.dim() == 4 else images.unsqueeze(0)
        windows = functional.unfold(self._pad(batch), self.kernel, self.dilation, 0, self.stride)
        return windows.transpose(1, 2).contiguous()

    def parts(self, images: Tensor) -> tuple[Tensor, ...]:
        """The images in batches whose windows take a bounded room, though one image at least."""
        if images.dim() < 4 or not len(images):
            return (images,)
        height, width = self._output_size(images.shape[-2], images.shape[-1])
        values = height * width * images.shape[1] * self.kernel[0] * self.kernel[1]
        return torch.split(images, max(1, PART_VALUES // max(values, 1)))

    def fold(self, rows: Tensor, images: Tensor) -> Tensor:
        """Outputs by window (n, positions, channels) -> image shape, for the images that `unfold` was given."""
        height, width = self._output_size(images.shape[-2], images.shape[-1])
        out = rows.transpose(1, 2).reshape(rows.shape[0], rows.shape[2], height, width)
        return out if images.dim() == 4 else out.squeeze(0)

    def convolve(self, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What `nn.Conv2d` computes with a weight (out channels, in channels, *kernel)."""
        if self.padding_mode == "zeros":
            return functional.conv2d(images, weight, bias, self.stride, self.padding, self.dilation)
        return functional.conv2d(self._pad(images), weight, bias, self.stride, 0, self.dilation)

    def _pad(self, images: Tensor) -> Tensor:
        (top, bottom), (left, right) = self._margins()
        if not any((top, bottom, left, right)):
            return images
        mode = _PAD_MODES.get(self.padding_mode, self.padding_mode)
        return functional.pad(images, (left, right, top, bottom), mode=mode)

    def _margins(self) -> tuple[Pair, Pair]:
        """Padding (before, after) of each dimension."""
        if self.padding == "valid":
            return (0, 0), (0, 0)
        if isinstance(self.padding, str):  # "same": what a kernel of odd reach lacks goes to the end
            totals = [step * (size - 1) for step, size in zip(self.dilation, self.kernel, strict=True)]
            vertical, horizontal = ((total // 2, total - total // 2) for total in totals)
            return vertical, horizontal
        return (self.padding[0], self.padding[0]), (self.padding[1], self.padding[1])

    def _output_size(self, height: int, width: int) -> Pair:
        sizes = []
        for axis, (size, margin) in enumerate(zip((height, width), self._margins(), strict=True)):
            reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
            sizes.append((size + sum(margin) - reach) // self.stride[axis] + 1)
        return sizes[0], sizes[1]


def _pair(values: tuple[int, ...]) -> Pair:
    vertical, horizontal = values
    return vertical, horizontal
