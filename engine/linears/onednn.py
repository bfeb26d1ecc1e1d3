"""Linear layers whose weights oneDNN has packed beforehand into the order that its kernels read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# The number of rows that oneDNN chooses a layout for. Others work too.
_TYPICAL_ROWS = 64


class OneDNNLinear(nn.Module):
    """Takes a linear layer's weight over: the layer is not to be used afterwards."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _TYPICAL_ROWS)
        self.bias = linear.bias
        del linear.weight

    @staticmethod
    def takes(linear: nn.Linear) -> bool:
        """Whether this machine packs weights of the layer's type."""
        if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            return False
        dtype = linear.weight.dtype
        if dtype is torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        if dtype is torch.float16:
            return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
        return dtype is torch.float32

    @staticmethod
    def is_best(linear: nn.Linear) -> bool:
        """Whether oneDNN beats the kernels in C++: with vectors of 512 bits, and with instructions for the type.

        Decision 0005 has what was measured.
        """
        if not OneDNNLinear.takes(linear):
            return False
        if linear.weight.dtype is torch.bfloat16:
            return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        if linear.weight.dtype is torch.float16:
            return torch.cpu._is_amx_fp16_supported()
        return torch.cpu._is_avx512_supported()

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, self._weight, self.bias, "none", [], "")
        return result
