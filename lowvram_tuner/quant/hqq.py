"""HQQ (half-quadratic quantization, https://mobiusml.github.io/hqq_blog/): groups with fractional zeros, made without data.

    W = scale[g] * (q - zero[g])        zero: fp16; g runs over W cut into groups of group_size values

axis 1 (what this project makes) cuts the row-major values into runs of group_size; axis 0 gives a group every
(numel / group_size)-th value. The zeros minimize an lp norm (p < 1) of the error, which spares outliers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowvram_tuner.quant.grouped import GroupedFormat, finite
from lowvram_tuner.quant.spec import QuantError, TensorSpec

if TYPE_CHECKING:
    import torch


class HQQ(GroupedFormat):
    """packed: qweight int32 [out, words], scales and qzeros fp16 [groups]."""

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        size = self.group_size(out_features, in_features)
        if out_features * in_features % size:
            raise QuantError(f"group_size={size} does not divide {out_features}x{in_features} values; use 32, 64 or -1 with hqq.")
        groups = TensorSpec((out_features * in_features // size,), self.spec.scale_dtype)
        return {"qweight": self.codes_spec(out_features, in_features), "scales": groups, "qzeros": groups}

    def grouping(self, packed: dict[str, torch.Tensor], in_features: int):
        from kernels.reference_grouped import FLAT, MODULO, ROW, Grouping

        groups, out_features = packed["scales"].numel(), packed["qweight"].shape[0]
        size = self.group_size(out_features, in_features)
        if self.spec.axis == 0:
            return Grouping(MODULO, size, groups)
        return Grouping(ROW if in_features % size == 0 else FLAT, size, max(1, in_features // size))

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        from kernels import packing
        from lowvram_tuner.quant import half_quadratic

        weight = finite(weight)
        self.layout(*weight.shape)
        size = self.group_size(*weight.shape)
        grouped = weight.reshape(-1, size) if self.spec.axis == 1 else weight.reshape(size, -1).t()
        codes, scales, zeros = half_quadratic.solve(grouped, self.spec.bits, self.spec.scale_dtype)
        codes = (codes if self.spec.axis == 1 else codes.t()).reshape(weight.shape)
        return {"qweight": packing.pack(codes, self.spec.bits), "scales": scales, "qzeros": zeros}
