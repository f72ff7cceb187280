"""16 bit: the frozen weight as it is. It follows the same protocol so that no layer needs to know the difference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowvram_tuner.quant.spec import QuantFormat, Scratch, TensorSpec

if TYPE_CHECKING:
    import torch


class Unquantized(QuantFormat):
    """packed = {"weight": W [out, in]} in the model's compute dtype; nothing is ever copied to the scratch."""

    dtype = "bfloat16"

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        return {"weight": TensorSpec((out_features, in_features), self.dtype)}

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"weight": weight}

    def quantize_into(self, weight: torch.Tensor, packed: dict[str, torch.Tensor]) -> None:
        packed["weight"].copy_(weight)

    def dequantize(self, packed: dict[str, torch.Tensor], out: torch.Tensor, row_start: int = 0) -> torch.Tensor:
        return out.copy_(packed["weight"][row_start : row_start + out.shape[0]])

    def forward(self, x: torch.Tensor, packed: dict[str, torch.Tensor], scratch: Scratch, out: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.mm(x, packed["weight"].t(), out=out)

    def grad_input(self, gy: torch.Tensor, packed: dict[str, torch.Tensor], scratch: Scratch, out: torch.Tensor) -> torch.Tensor:
        return out.addmm_(gy, packed["weight"])
