"""QuIP# (https://arxiv.org/abs/2402.04396): E8P codes of a rotated weight, 2 bits a value, or 3 and 4 with a second layer.

    W = diag(SV) U_out Wq U_in^T diag(SU),      U_n = (H_K kron Sylvester_{n/K}) / sqrt(n)

Rotations spread outliers over whole rows and columns, so that eight rotated values look like a Gaussian vector, which the
65,536 points of E8P cover well. Forward and backward rotate the activations instead of the weight:

    y = SV * U_out (Wq (U_in^T (SU * x)))         grad_x = SU * U_in (Wq^T (U_out^T (SV * grad_y)))

QuIP#'s own checkpoints fuse q, k, v and up, gate into one weight whose rows U_out mixes, so the three or two cannot be told
apart any more. Each of them is then a `part` of the whole: it shares all codes and uses some rows of the result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowvram_tuner.quant.spec import QuantError, QuantFormat, QuantSpec, Scratch, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

RESIDUAL_SCALE = {2: 1.0, 3: 2.04, 4: 3.45}
RESIDUAL_DTYPE = {3: "uint8", 4: "int16"}
ROW_UNIT, COLUMN_UNIT = 16, 64  # what QuIP#'s layout is tiled by
ROWS_AT_A_TIME = 4096  # of activations, which bounds their rotated copies
TILE_BYTES = 1 << 24  # of fp32 columns at a time where W itself is wanted


class Quip(QuantFormat):
    """packed: codes int16 [out, in/8] (`kernels.e8p`), SU fp32 [in] with the weight's scale in it, SV fp32 [out].

    4 bits add `residual` int16 and 3 bits `residual` uint8, [out, in/8]. A part holds the codes of the fused weight.
    """

    calibrated = True
    dense = False
    fused_rows = 8  # on an H100 4096 x 14336 takes 36 us for 8 rows and 119 for 16, 111 with dequantize and cuBLAS

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__(spec)
        if spec.bits not in RESIDUAL_SCALE:
            raise QuantError(f"bits={spec.bits} is not possible with quip; use 2 or 4 (3 can be read).")
        self.residual_scale = spec.residual_scale or RESIDUAL_SCALE[spec.bits]
        self.whole_rows, self.first_row = spec.part

    def layout(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        rows = self.whole_rows or out_features
        check_shape(rows, in_features)
        codes, shared = (rows, in_features // 8), bool(self.whole_rows)
        tensors = {"codes": TensorSpec(codes, "int16", shared)}
        if self.spec.bits > 2:
            tensors["residual"] = TensorSpec(codes, RESIDUAL_DTYPE[self.spec.bits], shared)
        return tensors | {"SU": TensorSpec((in_features,), "float32"), "SV": TensorSpec((out_features,), "float32")}

    def work_bytes(self, rows: int, out_features: int, in_features: int, item: int) -> int:
        """Rotated activations: two copies of the wider side, or one of each."""
        out_features = self.whole_rows or out_features
        return 2 * max(out_features, in_features) * min(rows, ROWS_AT_A_TIME) * item

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each eight rotated values to their nearest code."""
        return self.round(weight, None)[0]

    def round(self, weight: torch.Tensor, hessian: torch.Tensor | None) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        from lowvram_tuner.quant import quip_round

        if self.spec.bits == 3 or self.whole_rows:
            raise QuantError("3-bit and fused quip weights can be read, not made; use 2 or 4 bits.")
        check_shape(*weight.shape)
        packed = quip_round.solve(weight, hessian, self.residual_scale if self.spec.bits == 4 else None)
        return packed, self.dequantize(packed, weight.new_empty(weight.shape, dtype=packed["SU"].dtype))

    def dequantize(self, packed: dict[str, torch.Tensor], out: torch.Tensor, row_start: int = 0) -> torch.Tensor:
        """Rotates Wq's columns a few at a time into `out`, then out's rows in place."""
        import torch

        from kernels.hadamard import rotate

        rows, columns = packed["codes"].shape[0], out.shape[1]
        first = self.first_row + row_start
        step = max(COLUMN_UNIT, TILE_BYTES // (4 * rows) // COLUMN_UNIT * COLUMN_UNIT)
        for start in range(0, columns, step):
            stop = min(start + step, columns)
            tile = torch.empty(rows, stop - start, dtype=torch.float32, device=out.device)
            turned = rotate(self.decode(packed, tile, 0, start).t().contiguous())  # [columns, rows]
            out[:, start:stop] = turned[:, first : first + out.shape[0]].t()
        step = max(1, TILE_BYTES // (4 * columns))
        for start in range(0, out.shape[0], step):
            part = out[start : start + step]
            rotate(part, post=packed["SU"], out=part)
            part *= packed["SV"][row_start + start : row_start + start + part.shape[0], None]
        return out

    def forward(self, x: torch.Tensor, packed: dict[str, torch.Tensor], scratch: Scratch, out: torch.Tensor) -> torch.Tensor:
        import torch

        from kernels.hadamard import rotate

        rows = packed["codes"].shape[0]
        for part in _row_ranges(x.shape[0]):
            turned = rotate(x[part], transposed=True, pre=packed["SU"])
            product = turned.new_empty(turned.shape[0], rows) if self.whole_rows else out[part]
            for start, stop in scratch.tiles(rows, x.shape[1], x.dtype):
                w = self.decode(packed, scratch.tile(stop - start, x.shape[1], x.dtype), start)
                torch.mm(turned, w.t(), out=product[:, start:stop])
            del turned
            self._turn_output(product, packed["SV"], out[part])
        return out

    def matmul(self, x: torch.Tensor, packed: dict[str, torch.Tensor], out_features: int) -> torch.Tensor:
        from kernels.hadamard import rotate
        from kernels.matmul_e8p import matmul

        turned = rotate(x, transposed=True, pre=packed["SU"])
        product = matmul(turned, packed["codes"], packed.get("residual"), self.residual_scale)
        out = product.new_empty(x.shape[0], out_features) if self.whole_rows else product
        return self._turn_output(product, packed["SV"], out)

    def grad_input(self, gy: torch.Tensor, packed: dict[str, torch.Tensor], scratch: Scratch, out: torch.Tensor) -> torch.Tensor:
        from kernels.hadamard import rotate

        rows = packed["codes"].shape[0]
        for part in _row_ranges(gy.shape[0]):
            turned = self._turn_gradient(gy[part], packed["SV"], rows)
            product = turned.new_zeros(turned.shape[0], out.shape[1])
            for start, stop in scratch.tiles(rows, out.shape[1], gy.dtype):
                w = self.decode(packed, scratch.tile(stop - start, out.shape[1], gy.dtype), start)
                product.addmm_(turned[:, start:stop], w)
            del turned
            rotate(product, post=packed["SU"], out=out[part], add=True)
        return out

    def decode(self, packed: dict[str, torch.Tensor], out: torch.Tensor, row: int = 0, column: int = 0) -> torch.Tensor:
        """out = the tile of Wq that starts at (row, column): what forward and backward make of the codes."""
        if out.is_cuda:
            from kernels.dequant_e8p import dequantize
        else:
            from kernels.e8p import dequantize

        tile = (slice(row, row + out.shape[0]), slice(column // 8, (column + out.shape[1]) // 8))
        residual = packed["residual"][tile] if "residual" in packed else None
        return dequantize(packed["codes"][tile], out, residual, self.residual_scale)

    def _turn_output(self, product: torch.Tensor, sv: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """out = SV * U_out product, of a part its own rows."""
        from kernels.hadamard import rotate

        if not self.whole_rows:
            return rotate(product, post=sv, out=out)
        turned = rotate(product, out=product)
        return out.copy_(turned[:, self.first_row : self.first_row + out.shape[1]] * sv)

    def _turn_gradient(self, gy: torch.Tensor, sv: torch.Tensor, rows: int) -> torch.Tensor:
        """U_out^T (SV * gy), where the other parts' rows count as zero."""
        from kernels.hadamard import rotate

        if not self.whole_rows:
            return rotate(gy, transposed=True, pre=sv)
        whole = gy.new_zeros(gy.shape[0], rows)
        whole[:, self.first_row : self.first_row + gy.shape[1]] = gy * sv
        return rotate(whole, transposed=True, out=whole)


def check_shape(out_features: int, in_features: int) -> None:
    """Raises QuantError for a weight whose sides QuIP#'s layout or its rotations do not divide. Needs no torch."""
    from kernels.hadamard_matrices import hadamard_order

    if out_features % ROW_UNIT or in_features % COLUMN_UNIT:
        raise QuantError(
            f"a weight of {out_features}x{in_features} does not fit quip, which needs multiples of {ROW_UNIT} and {COLUMN_UNIT}; "
            "use another method."
        )
    try:
        hadamard_order(out_features), hadamard_order(in_features)
    except ValueError as error:
        raise QuantError(str(error)) from None


def _row_ranges(rows: int) -> Iterator[slice]:
    return (slice(start, min(start + ROWS_AT_A_TIME, rows)) for start in range(0, rows, ROWS_AT_A_TIME))
