"""Linear layers whose weights stay quantized, as the checkpoint holds them."""

from __future__ import annotations

from torch import Tensor, nn

from kernels.quantized_matmul import QuantizedWeight, quantized_matmul


class QuantizedLinear(nn.Module):
    """A linear layer for the device that the weight lies on, which must have Triton kernels."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.weight: QuantizedWeight = weight
        self.bias = bias

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        rows = hidden.reshape(-1, self.in_features)
        return quantized_matmul(rows, self.weight, self.bias).view(*hidden.shape[:-1], self.out_features)
