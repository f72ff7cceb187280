"""What a quantizer is: the black box that forward, backward, loader, estimator and chat see.

A frozen weight W [out, in] is held as a few packed tensors. A `QuantFormat` knows their names, shapes and dtypes, makes
them from a weight, and turns any range of W's rows back into 16 or 32 bit. Nothing else of the project knows more about a
quantizer than this protocol (the ModuLoRA idea, https://arxiv.org/abs/2309.16119). Adding one takes one file and one line
in `registry.py`.

This module and the size arithmetic of every format need no torch, so that the planner and the page can use them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ITEM_BYTES = {"uint8": 1, "int8": 1, "int16": 2, "float16": 2, "bfloat16": 2, "int32": 4, "float32": 4, "int64": 8}


class QuantError(ValueError):
    """A weight or checkpoint that a format cannot hold: one sentence with the value seen and what is accepted."""


@dataclass(frozen=True)
class QuantSpec:
    """How a frozen weight is held. `group_size` is in input columns, -1 for a whole row; formats ignore what is not theirs."""

    method: str = "nf4"
    bits: int = 4
    group_size: int = 128
    double_quant: bool = True
    desc_act: bool = False
    sym: bool = True
    axis: int = 1  # hqq: groups run along a row (1) or down the rows (0)
    scale_dtype: str = "float16"  # of the stored scales (gptq, hqq); a checkpoint brings its own
    residual_scale: float = 0.0  # quip at 3 and 4 bits: what the second layer is divided by; 0 is the format's own
    part: tuple[int, int] = (0, 0)  # quip: (rows of the fused weight that this one is cut from, its first row); 0 rows: none


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype (torch's name for it) of one packed tensor. `shared`: the linears of one module hold the same one."""

    shape: tuple[int, ...]
    dtype: str
    shared: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class QuantFormat(ABC):
    """One quantizer. Subclasses say what they can do in the capability flags and implement the three abstract methods.

    `packed` is always a dict of tensors as `layout` describes it, all on one device.
    """

    calibrated = False  # True: needs sample activations, made once by `quantize` the command, not on load
    row_tile = 1  # row ranges given to `dequantize` start and end at multiples of this (or at the last row)
    dense = True  # False: `forward`/`grad_input` are not "dequantize, then multiply" (quip's rotations)
    fused_rows = 0  # `matmul` exists and is the faster way up to this many rows of x on CUDA; 0: there is none

    def __init__(self, spec: QuantSpec) -> None:
        self.spec = spec

    @abstractmethod
    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Name, shape and dtype of each packed tensor of a weight [out_features, in_features]. No torch needed.

        Raises QuantError when the format cannot hold that shape.
        """

    @abstractmethod
    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Packs W [out, in] (any float dtype, any device) by the format's data-free rounding."""

    def quantize_into(self, weight: torch.Tensor, packed: dict[str, torch.Tensor]) -> None:
        """Packs W [out, in] of any device into the tensors `packed`, which are as `layout` says. A format that heads are held in
        takes W piece by piece: a large vocabulary's would be more than all else that a card holds."""
        device = next(iter(packed.values())).device
        for name, tensor in self.quantize(weight.to(device)).items():
            packed[name].copy_(tensor.view(packed[name].shape))

    @abstractmethod
    def dequantize(self, packed: dict[str, torch.Tensor], out: torch.Tensor, row_start: int = 0) -> torch.Tensor:
        """out[i, :] = W[row_start + i, :] in out's dtype. out: [rows, in], fp16, bf16 or fp32, contiguous. Returns out.

        Allocates nothing of the size of `out` on CUDA, so that at most one dequantized weight exists at a time.
        """

    def round(self, weight: torch.Tensor, hessian: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Packs W [out, in] so that the layer's output error tr((W - Q) H (W - Q).T) is small. Returns (packed, Q in fp32).

        hessian: H = mean of x x.T over calibration inputs, [in, in] fp32 on W's device. Data-free formats ignore it.
        Raises QuantError when W or H is not finite, or H cannot be factorized even with much damping.
        """
        import torch

        packed = self.quantize(weight)
        return packed, self.dequantize(packed, torch.empty(weight.shape, dtype=torch.float32, device=weight.device))

    def merges(self, in_features: int, device: torch.device) -> bool:
        """Whether `dequantize_merged` exists here, and costs a pass over many tokens less than the adapter's own products."""
        return False

    def dequantize_merged(
        self, packed: dict[str, torch.Tensor], out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """out = W + scaling * b @ a, rounded once to out's dtype. out: [rows, in]; a: [r, in], b: [rows, r]. Returns out."""
        raise QuantError(f"{self.spec.method} does not merge an adapter; dequantize, and multiply by it beside.")

    def nbytes(self, out_features: int, in_features: int) -> int:
        """Bytes of one packed weight: what loading allocates, and what the planner counts."""
        return sum(t.nbytes for t in self.layout(out_features, in_features).values())

    def work_bytes(self, rows: int, out_features: int, in_features: int, item: int) -> int:
        """Bytes that `forward` and `grad_input` allocate at their peak for x [rows, in] of `item` bytes a value, beside the
        scratch and their result. No torch needed."""
        return 0

    def matmul(self, x: torch.Tensor, packed: dict[str, torch.Tensor], out_features: int) -> torch.Tensor:
        """y = x @ W.T without writing W. x: [M, in] with few rows (M <= fused_rows), fp16 or bf16. Returns [M, out]."""
        raise QuantError(f"{self.spec.method} has no fused product; dequantize instead.")

    def matmul_stacked(self, x: torch.Tensor, packed: list[dict[str, torch.Tensor]], out_features: list[int]) -> torch.Tensor:
        """y = x @ [W1; W2; ..].T of weights that share their input, otherwise as `matmul`. Returns [M, sum of out_features]."""
        import torch

        return torch.cat([self.matmul(x, p, rows) for p, rows in zip(packed, out_features)], 1)

    def forward(self, x: torch.Tensor, packed: dict[str, torch.Tensor], scratch: Scratch, out: torch.Tensor) -> torch.Tensor:
        """out = x @ W.T. x: [M, in], out: [M, out_features], same dtype. Works in row tiles that fit the scratch."""
        import torch

        for start, stop in scratch.tiles(out.shape[1], x.shape[1], x.dtype, self.row_tile):
            w = self.dequantize(packed, scratch.tile(stop - start, x.shape[1], x.dtype), start)
            torch.mm(x, w.t(), out=out[:, start:stop])
        return out

    def grad_input(self, gy: torch.Tensor, packed: dict[str, torch.Tensor], scratch: Scratch, out: torch.Tensor) -> torch.Tensor:
        """out += gy @ W. gy: [M, out_features], out: [M, in], same dtype."""
        for start, stop in scratch.tiles(gy.shape[1], out.shape[1], gy.dtype, self.row_tile):
            w = self.dequantize(packed, scratch.tile(stop - start, out.shape[1], gy.dtype), start)
            out.addmm_(gy[:, start:stop], w)
        return out


class Scratch:
    """The one buffer that holds a dequantized weight, shared by every layer of a model on one device.

    A weight larger than the buffer is worked on in tiles of rows, so its size trades launches against memory.
    """

    def __init__(self, nbytes: int, device: torch.device | str) -> None:
        import torch

        self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def tile(self, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialized [rows, cols] view at the buffer's start; the next call's view overwrites it."""
        return self.buffer[: rows * cols * dtype.itemsize].view(dtype).view(rows, cols)

    def tiles(self, rows: int, cols: int, dtype: torch.dtype, row_tile: int = 1) -> list[tuple[int, int]]:
        """The row ranges, each a multiple of `row_tile` but the last, in which a [rows, cols] weight fits the buffer."""
        fit = self.buffer.numel() // (cols * dtype.itemsize)
        step = rows if fit >= rows else fit // row_tile * row_tile
        if step == 0:
            raise QuantError(f"a scratch of {self.buffer.numel()} bytes cannot hold {row_tile} rows of {cols}; make it larger.")
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]
