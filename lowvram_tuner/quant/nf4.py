"""NF4 with double quantization (QLoRA, https://arxiv.org/abs/2305.14314), tensor for tensor as bitsandbytes stores it.

A weight is cut into blocks of 64 values along its rows. Each value is one of 16 levels times its block's largest magnitude
(absmax); the absmaxes, less their mean, are themselves stored as 8-bit codes with one fp32 scale per 256 of them.
4 + 8/64 + 32/(64*256) = 4.127 bits a weight.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lowvram_tuner.quant.spec import QuantError, QuantFormat, TensorSpec

if TYPE_CHECKING:
    import torch

BLOCK = 64
NESTED = 256


class NF4(QuantFormat):
    """packed: weight uint8 [out*in/2] (high nibble first), absmax, and with double quantization its nested parts.

    `quant_map` fp32 [16] and `nested_quant_map` fp32 [256] are the levels; a checkpoint brings its own.
    """

    fused_rows = 32  # on an H100 4096 x 14336 takes 71 us for 32 rows, 113 with dequantize and cuBLAS

    @property
    def row_tile(self) -> int:
        return 64  # so that a tile starts at a block's start for every even in_features

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        numel = out_features * in_features
        if numel % 2:
            raise QuantError(f"a weight of {out_features}x{in_features} has an odd number of values; nf4 packs pairs, use bits=16.")
        blocks = math.ceil(numel / BLOCK)
        tensors = {"weight": TensorSpec((numel // 2,), "uint8"), "quant_map": TensorSpec((16,), "float32")}
        if not self.spec.double_quant:
            return tensors | {"absmax": TensorSpec((blocks,), "float32")}
        return tensors | {
            "absmax": TensorSpec((blocks,), "uint8"),
            "nested_absmax": TensorSpec((math.ceil(blocks / NESTED),), "float32"),
            "nested_quant_map": TensorSpec((256,), "float32"),
            "nested_offset": TensorSpec((1,), "float32"),
        }

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        from kernels import reference_nf4

        self.layout(*weight.shape)
        return reference_nf4.quantize(weight, self.spec.double_quant)

    def quantize_into(self, weight: torch.Tensor, packed: dict[str, torch.Tensor]) -> None:
        from kernels import reference_nf4

        rest = reference_nf4.quantize(weight, self.spec.double_quant, packed["weight"])
        for name in rest.keys() - {"weight"}:
            packed[name].copy_(rest[name])

    def dequantize(self, packed: dict[str, torch.Tensor], out: torch.Tensor, row_start: int = 0) -> torch.Tensor:
        if out.is_cuda:
            from kernels import dequant_nf4

            return dequant_nf4.dequantize(packed, out, row_start * out.shape[1])
        from kernels import reference_nf4

        return reference_nf4.dequantize(packed, out, row_start * out.shape[1])

    def merges(self, in_features: int, device: torch.device) -> bool:
        if device.type != "cuda":
            return in_features % BLOCK == 0
        import torch

        return in_features % BLOCK == 0 and torch.cuda.get_device_capability(device) >= (8, 0)  # below, tl.dot is scalar

    def dequantize_merged(
        self, packed: dict[str, torch.Tensor], out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        import torch

        if out.is_cuda:
            from kernels import merge_nf4

            return merge_nf4.merge(packed, out, a, b, scaling)
        whole = self.dequantize(packed, torch.empty(out.shape, dtype=torch.float32))
        return out.copy_(whole.addmm_(b.float(), a.float(), alpha=scaling))

    def matmul(self, x: torch.Tensor, packed: dict[str, torch.Tensor], out_features: int) -> torch.Tensor:
        from kernels import matmul_nf4

        if x.shape[1] % 2:  # a byte would belong to two rows
            return x @ self.dequantize(packed, x.new_empty(out_features, x.shape[1])).t()
        return matmul_nf4.matmul(x, packed, out_features)

    def matmul_stacked(self, x: torch.Tensor, packed: list[dict[str, torch.Tensor]], out_features: list[int]) -> torch.Tensor:
        from kernels import matmul_nf4

        if x.shape[0] > 1 or x.shape[1] % 2 or len(packed) > matmul_nf4.MOST_WEIGHTS:
            return super().matmul_stacked(x, packed, out_features)
        return matmul_nf4.matmul_stacked(x, packed, out_features)
