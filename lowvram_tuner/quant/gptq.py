"""GPTQ (OPTQ, https://arxiv.org/abs/2210.17323): integer codes and zeros, one fp16 scale per group of input columns.

    W[o, i] = scales[o, g] * (q[o, i] - z[o, g])      g = i // group_size, or g_idx[i] with desc_act

Checkpoints store the transpose; `checkpoints.gptq` converts both ways exactly. A symmetric weight (z = 2**(bits - 1)
everywhere) stores no zeros. 4 bits in groups of 128 take 4 + 16/128 = 4.125 bits a weight, 4.19 with zeros.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lowvram_tuner.quant.grouped import GroupedFormat, finite
from lowvram_tuner.quant.spec import TensorSpec

if TYPE_CHECKING:
    import torch


class GPTQ(GroupedFormat):
    """packed: qweight int32 [out, words], scales [out, groups], qzeros uint8 [out, groups] unless sym, g_idx int32 [in] with desc_act."""

    calibrated = True

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        groups = (out_features, math.ceil(in_features / self.group_size(out_features, in_features)))
        tensors = {"qweight": self.codes_spec(out_features, in_features), "scales": TensorSpec(groups, self.spec.scale_dtype)}
        if not self.spec.sym:
            tensors["qzeros"] = TensorSpec(groups, "uint8")
        if self.spec.desc_act:
            tensors["g_idx"] = TensorSpec((in_features,), "int32")
        return tensors

    def grouping(self, packed: dict[str, torch.Tensor], in_features: int):
        from kernels.reference_grouped import INDEX, ROW, Grouping

        mode = INDEX if "g_idx" in packed else ROW
        return Grouping(mode, self.group_size(0, in_features), packed["scales"].shape[1])

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Round to nearest: each group's scale by a grid search of the squared error."""
        from lowvram_tuner.quant import optq

        weight = finite(weight)
        return self.pack(*optq.nearest(weight, self.spec, self.group_size(*weight.shape)))

    def round(self, weight: torch.Tensor, hessian: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        from lowvram_tuner.quant import optq

        weight = finite(weight)
        packed = self.pack(*optq.solve(weight, hessian, self.spec, self.group_size(*weight.shape)))
        return packed, self.dequantize(packed, weight.new_empty(weight.shape))

    def pack(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, g_idx: torch.Tensor) -> dict[str, torch.Tensor]:
        """codes uint8 [out, in], scales and zeros [out, groups], g_idx [in] as packed tensors."""
        import torch

        from kernels import packing

        packed = {"qweight": packing.pack(codes, self.spec.bits), "scales": scales.to(getattr(torch, self.spec.scale_dtype))}
        if not self.spec.sym:
            packed["qzeros"] = zeros.to(torch.uint8)
        if self.spec.desc_act:
            packed["g_idx"] = g_idx.to(torch.int32)
        return {name: t.contiguous() for name, t in packed.items()}
