"""What GPTQ and HQQ have in common: groups of codes that share a scale and a zero point.

    W[o, i] = scales[g] * (q[o, i] - zeros[g])

Codes are held row by row, packed along the inputs, whatever a checkpoint's own layout is: the rows of a tile are then
contiguous, reads and writes of a dequantize are both coalesced, and weights that see the same input can be stacked.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING

from lowvram_tuner.quant.spec import QuantError, QuantFormat, TensorSpec

if TYPE_CHECKING:
    import torch

BITS = (2, 3, 4, 8)
# Of x, by bits, as measured on an H100 (4096 x 14336): 8 rows take 25 to 35, 20, 18 and 27 us, 16 take 66, 114, 75 and 119, with
# dequantize and cuBLAS 102, 105, 106 and 118.
FUSED_ROWS = {2: 32, 3: 8, 4: 32, 8: 8}
UNIT = 32  # codes that fill whole 32-bit words at every width


class GroupedFormat(QuantFormat):
    """packed: qweight int32 [out, words], scales, and where the format has them qzeros and g_idx."""

    def __init__(self, spec) -> None:
        super().__init__(spec)
        if spec.bits not in BITS:
            raise QuantError(f"bits={spec.bits} is not possible with {spec.method}; use 2, 3, 4 or 8.")
        self.fused_rows = FUSED_ROWS[spec.bits]
        if spec.group_size != -1 and spec.group_size < 1:
            raise QuantError(f"group_size={spec.group_size} is not possible; use 32, 64, 128, or -1 for a whole row.")

    def group_size(self, out_features: int, in_features: int) -> int:
        """Values in a group: the spec's, or a whole row (axis 1) or column (axis 0) for -1."""
        if self.spec.group_size != -1:
            return self.spec.group_size
        return in_features if self.spec.axis == 1 else out_features

    def codes_spec(self, out_features: int, in_features: int) -> TensorSpec:
        return TensorSpec((out_features, math.ceil(in_features / UNIT) * self.spec.bits), "int32")

    @abstractmethod
    def grouping(self, packed: dict[str, torch.Tensor], in_features: int):
        """The kernels' description of which group a value belongs to."""

    def dequantize(self, packed: dict[str, torch.Tensor], out: torch.Tensor, row_start: int = 0) -> torch.Tensor:
        if out.is_cuda:
            from kernels import dequant_grouped as kernel
        else:
            from kernels import reference_grouped as kernel

        return kernel.dequantize(*self._operands(packed, out.shape[1]), out, row_start)

    def matmul(self, x: torch.Tensor, packed: dict[str, torch.Tensor], out_features: int) -> torch.Tensor:
        from kernels import matmul_grouped

        return matmul_grouped.matmul(x, *self._operands(packed, x.shape[1]))

    def matmul_stacked(self, x: torch.Tensor, packed: list[dict[str, torch.Tensor]], out_features: list[int]) -> torch.Tensor:
        from kernels import matmul_grouped

        return matmul_grouped.matmul_stacked(x, [self._operands(p, x.shape[1]) for p in packed])

    def _operands(self, packed: dict[str, torch.Tensor], in_features: int) -> tuple:
        grouping = self.grouping(packed, in_features)
        return packed["qweight"], packed["scales"], packed.get("qzeros"), packed.get("g_idx"), grouping, self.spec.bits


def finite(weight: torch.Tensor) -> torch.Tensor:
    """W in fp32, or QuantError when it holds inf or nan or its scale would not fit 16 bits."""
    weight = weight.detach().float()
    bad = int((~weight.isfinite()).sum())
    if bad:
        raise QuantError(f"a weight of {'x'.join(map(str, weight.shape))} holds {bad} values that are inf or nan; it cannot be quantized.")
    return weight
