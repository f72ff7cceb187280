"""bitsandbytes checkpoints: 4-bit (NF4 or FP4, nested or not) and LLM.int8.

4-bit, beside X.weight (uint8 [ceil(numel / 2), 1], perhaps viewed as a float type; high nibble first): X.weight.absmax,
X.weight.quant_map, X.weight.quant_state.bitsandbytes__nf4 (a JSON object as bytes), and when absmax itself is quantized
X.weight.nested_absmax and X.weight.nested_quant_map. The stored levels are used, so FP4 is the same as NF4 here.
8-bit: X.weight int8 [out, in], X.SCB fp32 [out], X.weight_format 0.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from lowvram_tuner.quant.checkpoint import QuantizedWeight, Reader, Writer
from lowvram_tuner.quant.spec import QuantError, QuantSpec

if TYPE_CHECKING:
    import torch

BLOCK, NESTED = 64, 256
ROW_MAJOR = 0
STATE = "quant_state.bitsandbytes__"
STORED = ("uint8", "int8", "float16", "bfloat16", "float32", "float64")  # a 4-bit weight may be stored viewed as these


class BitsandbytesReader(Reader):
    """Reads both kinds, module by module: whatever has no quantization beside its weight was skipped and is plain."""

    def read_spec(self) -> QuantSpec:
        if self.value("load_in_8bit", (False, True), False):
            return QuantSpec(method="int8", bits=8)
        self.value("load_in_4bit", (True,), True)
        self.value("bnb_4bit_quant_type", ("nf4", "fp4"), "fp4")
        return QuantSpec(method="nf4", bits=4, double_quant=self.value("bnb_4bit_use_double_quant", (False, True), False))

    def holds(self, module: str) -> bool:
        if f"{module}.weight" not in self.files:
            raise QuantError(f"{self.folder}: tensor {module}.weight is missing; the download may be incomplete.")
        return f"{module}.SCB" in self.files or bool(self.files.names(f"{module}.weight.{STATE}"))

    def load(self, module: str) -> QuantizedWeight:
        if f"{module}.SCB" in self.files:
            return self._load_8bit(module)
        return self._load_4bit(module)

    def _load_8bit(self, module: str) -> QuantizedWeight:
        weight = self.files.checked(f"{module}.weight", ("int8",), (None, None))
        if f"{module}.weight_format" in self.files:
            self.files.number(f"{module}.weight_format", (ROW_MAJOR,))
        scb = self.files.finite(f"{module}.SCB", ("float32",), (weight.shape[0],))
        return QuantizedWeight(QuantSpec(method="int8", bits=8), *weight.shape, {"qweight": weight, "SCB": scb})

    def _load_4bit(self, module: str) -> QuantizedWeight:
        import torch

        key = f"{module}.weight"
        state = self._state(key)
        rows, cols = state["shape"]
        stored = self.files.checked(key, STORED, (None, None)).contiguous().view(torch.uint8).reshape(-1)
        if len(stored) != math.ceil(rows * cols / 2):
            self.files.refuse(key, f"holds {len(stored)} bytes", f"{math.ceil(rows * cols / 2)} are accepted for {rows}x{cols}")
        blocks = math.ceil(rows * cols / BLOCK)
        double = f"{key}.nested_absmax" in self.files
        packed = {
            "weight": stored,
            "quant_map": self.files.finite(f"{key}.quant_map", ("float32",), (16,)),
            "absmax": self.files.finite(f"{key}.absmax", ("uint8",) if double else ("float32",), (blocks,)),
        }
        if double:
            offset = state.get("nested_offset")
            if not isinstance(offset, int | float) or not math.isfinite(offset):
                self.files.refuse(self._state_name(key), f"has nested_offset={offset!r}", "a finite number is needed beside nested_absmax")
            packed["nested_absmax"] = self.files.finite(f"{key}.nested_absmax", ("float32",), (math.ceil(blocks / NESTED),))
            packed["nested_quant_map"] = self.files.finite(f"{key}.nested_quant_map", ("float32",), (256,))
            packed["nested_offset"] = torch.tensor([offset], dtype=torch.float32)
        return QuantizedWeight(QuantSpec(method="nf4", bits=4, double_quant=double), rows, cols, packed)

    def _state_name(self, key: str) -> str:
        found = self.files.names(f"{key}.{STATE}")
        if not found:
            raise QuantError(f"{self.folder}: tensor {key}.{STATE}nf4 is missing; the download may be incomplete.")
        return found[0]

    def _state(self, key: str) -> dict[str, Any]:
        """The JSON object beside a 4-bit weight, checked."""
        name = self._state_name(key)
        try:
            state = json.loads(bytes(self.files.checked(name, ("uint8",), (None,)).tolist()))
            shape = [int(n) for n in state["shape"]]
        except (ValueError, KeyError, TypeError) as error:
            self.files.refuse(name, f"is no quantization state ({error})", "a JSON object with a shape is accepted")
        if len(shape) != 2 or min(shape) < 1:
            self.files.refuse(name, f"has shape={shape}", "two positive sizes are accepted")
        for field, accepted in (("blocksize", BLOCK), ("nested_blocksize", NESTED)):
            if state.get(field, accepted) != accepted:
                self.files.refuse(name, f"has {field}={state[field]}", f"{accepted} is accepted")
        return state | {"shape": shape}


class NF4Writer(Writer):
    """Writes what bitsandbytes' own 4-bit serialization writes."""

    def tensors(self, module: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        import torch

        key, packed = f"{module}.weight", {name: t.cpu() for name, t in weight.packed.items()}
        state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "float16", "shape": [weight.out_features, weight.in_features]}
        out = {key: packed["weight"].reshape(-1, 1), f"{key}.absmax": packed["absmax"], f"{key}.quant_map": packed["quant_map"]}
        if "nested_absmax" in packed:
            state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": float(packed["nested_offset"])}
            out |= {f"{key}.{name}": packed[name] for name in ("nested_absmax", "nested_quant_map")}
        return out | {f"{key}.{STATE}nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}

    def config(self, skipped: list[str]) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": self.spec.double_quant, "bnb_4bit_compute_dtype": "float16",
            "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": skipped, "llm_int8_threshold": 6.0,
            "llm_int8_has_fp16_weight": False, "llm_int8_enable_fp32_cpu_offload": False,
        }  # fmt: skip


class Int8Writer(Writer):
    """Writes what bitsandbytes' own 8-bit serialization writes."""

    def tensors(self, module: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        import torch

        return {
            f"{module}.weight": weight.packed["qweight"].cpu(),
            f"{module}.SCB": weight.packed["SCB"].cpu(),
            f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8),
        }

    def config(self, skipped: list[str]) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True, "llm_int8_skip_modules": skipped,
            "llm_int8_threshold": 6.0, "llm_int8_has_fp16_weight": False, "llm_int8_enable_fp32_cpu_offload": False,
        }  # fmt: skip
