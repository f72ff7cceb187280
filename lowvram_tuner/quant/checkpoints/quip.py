"""QuIP# checkpoints: E8P12 (2 bits) and its residual forms E8P12RVQ4B (4 bits) and E8P12RVQ3B (3 bits, read only).

    Qidxs int64 [out, in/32 * layers]   SU fp16 [in]   SV fp16 [out]   Wscale, codebook_id scalars   scaleWH [in], maybe

Wscale, and one over scaleWH where the configuration has rescale_WH, go into SU. Published models fuse q, k, v into
`qkv_proj` and up, gate (in that order) into `upgate_proj`, with `fuse_scales` for the outputs of each; the members are read
as parts of the whole (`quip.Quip`). What is written here is not fused.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from lowvram_tuner.quant.checkpoint import QuantizedWeight, Reader, Writer
from lowvram_tuner.quant.checkpoints.files import FLOATS, read_json
from lowvram_tuner.quant.spec import QuantError, QuantSpec

if TYPE_CHECKING:
    import torch


class _Codebook(NamedTuple):
    bits: int
    number: int  # codebook_id
    words: int  # int64 words for 64 columns
    versions: tuple[int, ...]


CODEBOOKS = {
    "E8P12": _Codebook(2, 7, 2, (1,)),
    "E8P12RVQ4B": _Codebook(4, 17, 4, (1,)),
    "E8P12RVQ3B": _Codebook(3, 18, 3, (1, 0)),  # QuIP# never numbered this one, and its checkpoints say 0
}
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "upgate_proj": ("up_proj", "gate_proj")}


class QuipReader(Reader):
    """Reads all three codebooks, fused modules or single ones."""

    def read_spec(self) -> QuantSpec:
        self.codebook = CODEBOOKS[self.value("codebook", tuple(CODEBOOKS))]
        self.value("codebook_version", self.codebook.versions, 0)
        self.value("codesz", (8,), 8)
        self.value("idx_dtype", ("torch.int64",), "torch.int64")
        self.value("lora_rank", (0,), 0)
        self.rescaled = self.value("rescale_WH", (False, True), False)
        override = self.config.get("resid_scale_override", -1)
        if isinstance(override, bool) or not isinstance(override, int | float) or not math.isfinite(override):
            raise QuantError(f"{self.config_path}: resid_scale_override={override!r} cannot be read; a finite number is accepted.")
        self._unpacked: tuple[str, dict[str, torch.Tensor]] = ("", {})
        scale = float(override) if override > 0 and self.codebook.bits > 2 else 0.0
        return QuantSpec(method="quip", bits=self.codebook.bits, residual_scale=scale)

    def holds(self, module: str) -> bool:
        stored, _ = self._stored_name(module)
        if f"{stored}.Qidxs" in self.files:
            return True
        if f"{module}.weight" in self.files:
            return False
        raise QuantError(f"{self.folder}: tensor {module}.Qidxs is missing, and so is {module}.weight; complete the download.")

    def load(self, module: str) -> QuantizedWeight:
        from dataclasses import replace

        stored, member = self._stored_name(module)
        su = self._vector(f"{stored}.SU", None) * self._scalar(f"{stored}.Wscale", 1.0)
        if self.rescaled:
            scale = self._vector(f"{stored}.scaleWH", len(su))
            if not bool(scale.all()):
                self.files.refuse(f"{stored}.scaleWH", "holds 0, by which nothing can be divided", "other numbers are accepted")
            su /= scale
        sv = self._vector(f"{stored}.SV", None)
        packed = self._codes(stored, len(sv), len(su))
        if member is None:
            return QuantizedWeight(self.spec, len(sv), len(su), packed | {"SU": su, "SV": sv})
        first, size, scale = self._member(stored, member, len(sv))
        spec = replace(self.spec, part=(len(sv), first))
        return QuantizedWeight(spec, size, len(su), packed | {"SU": su, "SV": sv[first : first + size] * scale})

    def _stored_name(self, module: str) -> tuple[str, int | None]:
        """(the module that holds the codes, which member of it this is or None when it stands alone)."""
        parent, _, leaf = module.rpartition(".")
        if f"{module}.Qidxs" not in self.files:
            for fused, members in FUSED.items():
                if leaf in members and f"{parent}.{fused}.Qidxs" in self.files:
                    return f"{parent}.{fused}", members.index(leaf)
        return module, None

    def _member(self, stored: str, member: int, rows: int) -> tuple[int, int, float]:
        """(first row, rows, output scale) of a member of a fused module."""
        sizes = self._sizes(stored)
        if sum(sizes) != rows:
            self.files.refuse(f"{stored}.SV", f"has {rows} rows", f"{' + '.join(map(str, sizes))} are accepted by config.json")
        name = f"{stored}.fuse_scales"
        scales = self._vector(name, len(sizes)) if name in self.files else None
        return sum(sizes[:member]), sizes[member], 1.0 if scales is None else float(scales[member])

    def _sizes(self, stored: str) -> list[int]:
        config = read_json(self.folder / "config.json")
        try:
            if stored.endswith("upgate_proj"):
                return [int(config["intermediate_size"])] * 2
            heads = int(config["num_attention_heads"])
            size = int(config.get("head_dim") or config["hidden_size"] // heads)
            return [heads * size] + [int(config.get("num_key_value_heads") or heads) * size] * 2
        except (KeyError, TypeError, ValueError) as error:
            raise QuantError(f"{self.folder / 'config.json'}: the sizes of {stored} cannot be told ({error}).") from None

    def _codes(self, stored: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
        """Codes of a module; those of the last one are kept for the next member of the same fused module."""
        from kernels import e8p
        from lowvram_tuner.quant.quip import check_shape

        if self._unpacked[0] == stored:
            return self._unpacked[1]
        check_shape(rows, columns)
        if f"{stored}.codebook_id" in self.files:
            self.files.number(f"{stored}.codebook_id", (self.codebook.number,))
        qidxs = self.files.checked(f"{stored}.Qidxs", ("int64",), (rows, columns // 64 * self.codebook.words))
        codes, rest = qidxs[:, : columns // 32], qidxs[:, columns // 32 :]
        packed = {"codes": e8p.unpack(codes)}
        if self.codebook.bits > 2:
            packed["residual"] = e8p.unpack(rest) if self.codebook.bits == 4 else e8p.unpack_residual_indices(rest)
        self._unpacked = (stored, packed)
        return packed

    def _vector(self, name: str, size: int | None) -> torch.Tensor:
        """A tensor of floats [size] in fp32."""
        return self.files.finite(name, FLOATS, (size,)).float()

    def _scalar(self, name: str, default: float) -> float:
        if name not in self.files:
            return default
        tensor = self.files.finite(name, (*FLOATS, "float64"), None)
        if tensor.numel() != 1:
            self.files.refuse(name, f"is {tensor.tolist()}", "one number is accepted")
        return float(tensor)


class QuipWriter(Writer):
    """Writes QuIP#'s tensors, module by module, not fused."""

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__(spec)
        found = [name for name, codebook in CODEBOOKS.items() if codebook.bits == spec.bits != 3]
        if not found:
            raise QuantError(f"bits={spec.bits} cannot be written as QuIP#; use 2 or 4.")
        self.name = found[0]

    def tensors(self, module: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        import torch

        from kernels import e8p
        from lowvram_tuner.quant.quip_round import half_scale

        if weight.spec.part[0]:
            raise QuantError(f"{module} is part of a fused weight and cannot be written alone.")
        packed = {name: t.cpu() for name, t in weight.packed.items()}
        size = packed["SU"].abs()
        scale = size[0] if bool((size == size[0]).all()) and size[0] > 0 else half_scale(packed["SU"])
        qidxs = [e8p.pack(packed[name]) for name in ("codes", "residual") if name in packed]
        return {
            f"{module}.Qidxs": torch.cat(qidxs, 1),
            f"{module}.SU": (packed["SU"] / scale).half(),
            f"{module}.SV": packed["SV"].half(),
            f"{module}.Wscale": scale.clone(),
            f"{module}.codebook_id": torch.tensor(CODEBOOKS[self.name].number),
        }

    def config(self, skipped: list[str]) -> dict[str, Any]:
        codebook = CODEBOOKS[self.name]
        return {
            "quant_method": "quip", "codebook": self.name, "codebook_version": 1, "codesz": 8, "packsz": 8 // codebook.words,
            "idx_dtype": "torch.int64", "lora_rank": 0, "rescale_WH": False,
            "resid_scale_override": self.spec.residual_scale or -1, "modules_to_not_convert": skipped,
        }  # fmt: skip
