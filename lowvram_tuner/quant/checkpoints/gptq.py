"""GPTQ checkpoints (AutoGPTQ, GPTQModel) in their three layouts: v1, v2 and planar.

    qweight int32 [in * b / 32, out]   qzeros int32 [groups, out * b / 32]   scales [groups, out]   g_idx int32 [in]
    W[o, i] = scales[g_idx[i], o] * (q[i, o] - z[g_idx[i], o])

v1 (`gptq`) stores z - 1 in each field, so the zero is (field + 1) & (2**b - 1); v2 (`gptq_v2`) and planar (`gptq_p`) store z.
Planar differs at 3 bits only: of every 32 codes two words of the low 2 bits, then one of the high bits.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lowvram_tuner.quant.checkpoint import QuantizedWeight, Reader, Writer
from lowvram_tuner.quant.checkpoints.files import FLOATS
from lowvram_tuner.quant.spec import QuantError, QuantSpec

if TYPE_CHECKING:
    import torch

BITS = (2, 3, 4, 8)
LAYOUTS = ("gptq", "gptq_v2", "gptq_p")


class GPTQReader(Reader):
    """Reads any of the layouts, symmetric or not, any group size, act-order, and per-module overrides (`dynamic`)."""

    def read_spec(self) -> QuantSpec:
        name = "format" if "format" in self.config and "checkpoint_format" not in self.config else "checkpoint_format"
        self.layout = self.value(name, LAYOUTS, "gptq")
        self.value("pack_dtype", ("int32",), "int32")
        dynamic = self.config.get("dynamic") or {}
        if not isinstance(dynamic, dict):
            raise QuantError(f"{self.config_path}: dynamic={dynamic!r} cannot be read; an object of pattern: overrides is accepted.")
        self.dynamic = dynamic
        return QuantSpec(
            method="gptq", bits=self.value("bits", BITS), group_size=self.positive("group_size", -1),
            desc_act=self.value("desc_act", (False, True), False), sym=self.value("sym", (True, False), True),
        )  # fmt: skip

    def holds(self, module: str) -> bool:
        if module + ".qweight" in self.files:
            return True
        if module + ".weight" in self.files:
            return False
        raise QuantError(f"{self.folder}: tensor {module}.qweight is missing, and so is {module}.weight; complete the download.")

    def load(self, module: str) -> QuantizedWeight:
        from lowvram_tuner.quant.gptq import GPTQ

        spec = self._overridden(module)
        codes, groups = self._codes(module, spec.bits)
        cols, rows = codes.shape
        size = cols if spec.group_size == -1 else spec.group_size
        expected = -(-cols // size)
        if groups != expected:
            self.files.refuse(f"{module}.scales", f"has {groups} groups", f"{expected} are accepted with group_size={spec.group_size}")
        g_idx = self._g_idx(module, spec, cols, size, groups)
        scales = self.files.finite(f"{module}.scales", FLOATS, (groups, rows))
        zeros = self._zeros(module, spec.bits, groups, rows)
        spec = replace(
            spec, desc_act=g_idx is not None, sym=bool((zeros == 1 << spec.bits - 1).all()),
            scale_dtype=str(scales.dtype).removeprefix("torch."),
        )  # fmt: skip
        packed = GPTQ(spec).pack(codes.t(), scales.t(), zeros.t(), g_idx)
        return QuantizedWeight(spec, rows, cols, packed)

    def _overridden(self, module: str) -> QuantSpec:
        """The configuration's spec with the first `dynamic` pattern that matches; such a pattern is a regex after '+:'."""
        for pattern, values in self.dynamic.items():
            if pattern.startswith("-:") or not re.match(pattern.removeprefix("+:"), module):
                continue
            known = {k: values[k] for k in ("bits", "group_size", "desc_act", "sym") if k in values}
            if known.get("bits", self.spec.bits) not in BITS:
                raise QuantError(f"{self.config_path}: dynamic {pattern!r} has bits={known['bits']!r}; accepted: 2, 3, 4, 8.")
            return replace(self.spec, **known)
        return self.spec

    def _codes(self, module: str, bits: int) -> tuple[torch.Tensor, int]:
        """(codes uint8 [in, out], groups)."""
        name = f"{module}.qweight"
        stored = self.files.checked(name, ("int32",), (None, None))
        groups = self.files.checked(f"{module}.scales", FLOATS, (None, stored.shape[1])).shape[0]
        if f"{module}.g_idx" in self.files:
            cols = len(self.files.checked(f"{module}.g_idx", ("int32", "int64"), (None,)))
        else:
            cols = stored.shape[0] * 32 // bits
        if stored.shape[0] * 32 != cols * bits or (bits == 3 and cols % 32):
            self.files.refuse(name, f"has {stored.shape[0]} rows of words", f"{cols * bits / 32:g} are accepted for {cols} inputs at {bits} bits")
        return self._unpack(stored.t(), bits, cols).t(), groups

    def _g_idx(self, module: str, spec: QuantSpec, cols: int, size: int, groups: int) -> torch.Tensor | None:
        """int32 [in], or None where groups are in order, whatever `desc_act` says."""
        import torch

        name = f"{module}.g_idx"
        if name not in self.files:
            if spec.desc_act:
                raise QuantError(f"{self.folder}: tensor {name} is missing, and desc_act=True needs it; complete the download.")
            return None
        g_idx = self.files.checked(name, ("int32", "int64"), (cols,))
        low, high = int(g_idx.min()), int(g_idx.max())
        if low < 0 or high >= groups:
            self.files.refuse(name, f"holds the group {low if low < 0 else high}", f"0 to {groups - 1} are accepted")
        ordered = torch.arange(cols) // size
        return None if torch.equal(g_idx.long(), ordered) else g_idx.to(torch.int32)

    def _zeros(self, module: str, bits: int, groups: int, rows: int) -> torch.Tensor:
        """uint8 [groups, out]."""
        stored = self.files.checked(f"{module}.qzeros", ("int32",), (groups, -(-rows * bits // 32)))
        fields = self._unpack(_padded(stored, bits), bits, rows)
        return fields + 1 & (1 << bits) - 1 if self.layout == "gptq" else fields

    def _unpack(self, stored: torch.Tensor, bits: int, count: int) -> torch.Tensor:
        from kernels import packing

        if bits == 3 and self.layout == "gptq_p":
            return packing.unpack_planar(stored, count)
        return packing.unpack(stored.contiguous(), bits, count)


class GPTQWriter(Writer):
    """Writes v1, which everything reads, or v2 where a zero of 0 cannot be told from v1's wrap-around."""

    def __init__(self, spec: QuantSpec, layout: str = "") -> None:
        super().__init__(spec)
        self.layout = layout or ("gptq" if spec.sym else "gptq_v2")
        if self.layout not in LAYOUTS[:2]:
            raise QuantError(f"checkpoint_format={self.layout!r} cannot be written; use gptq or gptq_v2.")

    def tensors(self, module: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        import torch

        from kernels import packing

        spec, rows, cols = weight.spec, weight.out_features, weight.in_features
        if cols * spec.bits % 32 or rows * spec.bits % 32:
            raise QuantError(f"{module} of {rows}x{cols} cannot be stored as GPTQ at {spec.bits} bits; both must be multiples of 32.")
        scales = weight.packed["scales"].cpu().t().contiguous()
        zeros = weight.packed["qzeros"].cpu().t() if "qzeros" in weight.packed else torch.full(scales.shape, 1 << spec.bits - 1)
        fields = zeros.to(torch.int32) - int(self.layout == "gptq") & (1 << spec.bits) - 1
        codes = packing.unpack(weight.packed["qweight"].cpu(), spec.bits, cols)
        size = cols if spec.group_size == -1 else spec.group_size
        g_idx = weight.packed["g_idx"].cpu() if "g_idx" in weight.packed else (torch.arange(cols) // size).to(torch.int32)
        return {
            f"{module}.qweight": packing.pack(codes, spec.bits)[:, : cols * spec.bits // 32].t().contiguous(),
            f"{module}.qzeros": packing.pack(fields, spec.bits)[:, : rows * spec.bits // 32].contiguous(),
            f"{module}.scales": scales,
            f"{module}.g_idx": g_idx,
        }

    def config(self, skipped: list[str]) -> dict[str, Any]:
        spec = self.spec
        return {
            "quant_method": "gptq", "bits": spec.bits, "group_size": spec.group_size, "desc_act": spec.desc_act,
            "sym": spec.sym, "checkpoint_format": self.layout, "pack_dtype": "int32", "lm_head": "lm_head" not in skipped,
            "damp_percent": 0.01, "true_sequential": True,
        }  # fmt: skip

    def extra_files(self, skipped: list[str]) -> dict[str, dict[str, Any]]:
        return {"quantize_config.json": self.config(skipped)}


def _padded(stored: torch.Tensor, bits: int) -> torch.Tensor:
    """Words of a row filled up to whole units of 32 codes."""
    import torch

    return torch.nn.functional.pad(stored, (0, -stored.shape[1] % bits))
