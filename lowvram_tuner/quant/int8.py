"""LLM.int8 (https://arxiv.org/abs/2208.07339), its weight half: 8-bit rows with one fp32 scale each.

    W[o, i] = q[o, i] * SCB[o] / 127        q = round(127 * W / SCB), SCB[o] = max |W[o, :]|

The activations stay in 16 bit: the weight is dequantized, so outlier columns need no treatment of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowvram_tuner.quant.grouped import finite
from lowvram_tuner.quant.spec import QuantFormat, TensorSpec

if TYPE_CHECKING:
    import torch


PIECE = 1 << 22  # values quantized at a time where a whole head is: its fp32 copy never exists


class Int8(QuantFormat):
    """packed: qweight int8 [out, in], SCB fp32 [out]."""

    fused_rows = 16

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        return {"qweight": TensorSpec((out_features, in_features), "int8"), "SCB": TensorSpec((out_features,), "float32")}

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        from kernels import reference_int8

        return reference_int8.quantize(finite(weight))

    def quantize_into(self, weight: torch.Tensor, packed: dict[str, torch.Tensor]) -> None:
        step = max(1, PIECE // weight.shape[1])
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            super().quantize_into(weight[rows], {name: tensor[rows] for name, tensor in packed.items()})

    def dequantize(self, packed: dict[str, torch.Tensor], out: torch.Tensor, row_start: int = 0) -> torch.Tensor:
        if out.is_cuda:
            from kernels import dequant_int8 as kernel
        else:
            from kernels import reference_int8 as kernel

        return kernel.dequantize(packed["qweight"], packed["SCB"], out, row_start)

    def matmul(self, x: torch.Tensor, packed: dict[str, torch.Tensor], out_features: int) -> torch.Tensor:
        from kernels import matmul_int8

        return matmul_int8.matmul(x, packed["qweight"], packed["SCB"])
