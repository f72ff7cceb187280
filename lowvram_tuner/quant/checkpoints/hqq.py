"""HQQ checkpoints.

    W = ((unpack(W_q) - zero) * scale).reshape(shape)

W_q holds the values as a matrix: [-1, group_size] for axis 1, [group_size, -1] for axis 0. Packing cuts that matrix's rows
into contiguous chunks (`kernels.packing.pack_chunks`). Beside it stand scale, zero, nbits, group_size, shape, axis, packing
and view_as_float, all as tensors; text is stored as its ASCII codes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lowvram_tuner.quant.checkpoint import QuantizedWeight, Reader, Writer
from lowvram_tuner.quant.checkpoints.files import FLOATS
from lowvram_tuner.quant.spec import QuantError, QuantSpec

if TYPE_CHECKING:
    import torch

PACKING = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8"}


class HQQReader(Reader):
    """Reads 2, 3, 4 and 8 bits, either axis, any group size."""

    def read_spec(self) -> QuantSpec:
        params = self.config.get("quant_config", self.config)
        params = params.get("weight_quant_params", params) if isinstance(params, dict) else {}
        bits, size = params.get("nbits", 4), params.get("group_size", 64)
        if bits not in PACKING:
            raise QuantError(f"{self.config_path}: nbits={bits!r} cannot be read; accepted: 2, 3, 4, 8.")
        return QuantSpec(method="hqq", bits=int(bits), group_size=-1 if size is None else int(size), axis=int(params.get("axis", 1)))

    def holds(self, module: str) -> bool:
        if f"{module}.W_q" in self.files:
            return True
        if f"{module}.weight" in self.files:
            return False
        raise QuantError(f"{self.folder}: tensor {module}.W_q is missing, and so is {module}.weight; complete the download.")

    def load(self, module: str) -> QuantizedWeight:
        from kernels import packing

        bits = self.files.number(f"{module}.nbits", tuple(sorted(PACKING)))
        axis = self.files.number(f"{module}.axis", (0, 1))
        rows, cols = (int(n) for n in self.files.checked(f"{module}.shape", ("int64", "int32"), (2,)))
        self._text(module, "packing", PACKING[bits])
        if f"{module}.scale_q" in self.files or f"{module}.zero_q" in self.files:
            self.files.refuse(f"{module}.scale_q", "is quantized", "scale and zero of a float type are accepted")
        scale = self.files.finite(f"{module}.scale", FLOATS, None).reshape(-1)
        dtype = str(scale.dtype).removeprefix("torch.")
        zero = self.files.finite(f"{module}.zero", (dtype,), None).reshape(-1)
        if len(zero) != len(scale):
            self.files.refuse(f"{module}.zero", f"has {len(zero)} groups", f"{len(scale)} are accepted, as {module}.scale has")
        if rows * cols % len(scale):
            self.files.refuse(f"{module}.scale", f"has {len(scale)} groups", f"a divisor of {rows}x{cols} is accepted")
        size = rows * cols // len(scale)
        shape = (len(scale), size) if axis == 1 else (size, len(scale))
        codes = packing.unpack_chunks(self._stored(module, bits, *shape), bits, shape[0])
        packed = {"qweight": packing.pack(codes.reshape(rows, cols), bits), "scales": scale.contiguous(), "qzeros": zero.contiguous()}
        spec = QuantSpec(method="hqq", bits=bits, group_size=size, axis=axis, scale_dtype=dtype)
        return QuantizedWeight(spec, rows, cols, packed)

    def _stored(self, module: str, bits: int, rows: int, cols: int) -> torch.Tensor:
        """W_q as whole words, [packed rows, cols]."""
        import torch

        name, word = f"{module}.W_q", torch.int32 if bits == 3 else torch.uint8
        stored = self.files.get(name).contiguous().view(word)
        height = math.ceil(rows / 10) if bits == 3 else math.ceil(rows * bits / 8)
        if stored.numel() != height * cols:
            self.files.refuse(name, f"holds {stored.numel()} words", f"{height * cols} are accepted for {rows}x{cols} codes of {bits} bits")
        return stored.reshape(height, cols)

    def _text(self, module: str, field: str, accepted: str) -> None:
        name = f"{module}.{field}"
        seen = "".join(chr(c) for c in self.files.get(name).tolist())
        if seen != accepted:
            self.files.refuse(name, f"is {seen!r}", f"{accepted!r} is accepted")


class HQQWriter(Writer):
    """Writes the tensors that HQQ's own safe serialization writes.

    hqq 0.2.8 and transformers 4.57.6 (in fp32) load them. transformers 5.23 loads no HQQ checkpoint, not even its own kind: it
    warns of missing weights and goes on with random ones.
    """

    def tensors(self, module: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        import torch

        from kernels import packing

        spec, rows, cols = weight.spec, weight.out_features, weight.in_features
        groups = weight.packed["scales"].numel()
        size = rows * cols // groups
        codes = packing.unpack(weight.packed["qweight"].cpu(), spec.bits, cols)
        codes = codes.reshape((groups, size) if spec.axis == 1 else (size, groups))
        column = (groups, 1) if spec.axis == 1 else (1, groups)
        numbers = {"nbits": spec.bits, "group_size": size, "axis": spec.axis}
        flags = {
            "view_as_float": 0, "offload_meta": 0, "encoded_state_dict": 1, "stores_quant_config": 1, "channel_wise": 1,
            "optimize": 1, "round_zero": 0, "quant_scale": 0, "quant_zero": 0,
        }  # fmt: skip
        texts = {
            "packing": PACKING[spec.bits], "unpack_view_dtype": "torch.int32" if spec.bits == 3 else "torch.uint8",
            "compute_dtype": f"torch.{spec.scale_dtype}",
        }  # fmt: skip
        try:
            packed = packing.pack_chunks(codes, spec.bits)
        except ValueError as error:
            raise QuantError(f"{module} of {rows}x{cols} cannot be stored as HQQ: {error}") from None
        tensors = {
            "W_q": packed,
            "scale": weight.packed["scales"].cpu().reshape(column),
            "zero": weight.packed["qzeros"].cpu().reshape(column),
            "shape": torch.tensor([rows, cols]),
        }
        tensors |= {name: torch.tensor(value, dtype=torch.int32) for name, value in numbers.items()}
        tensors |= {name: torch.tensor(value, dtype=torch.uint8) for name, value in flags.items()}
        tensors |= {name: torch.tensor(list(text.encode()), dtype=torch.uint8) for name, text in texts.items()}
        return {f"{module}.{name}": t for name, t in tensors.items()}

    def config(self, skipped: list[str]) -> dict[str, Any]:
        spec = self.spec
        params = {
            "nbits": spec.bits, "group_size": None if spec.group_size == -1 else spec.group_size, "axis": spec.axis,
            "channel_wise": True, "optimize": True, "round_zero": False, "view_as_float": False,
        }  # fmt: skip
        nested = {"weight_quant_params": params, "scale_quant_params": None, "zero_quant_params": None, "offload_meta": False}
        return {"quant_method": "hqq", "quant_config": nested, "skip_modules": skipped}
