"""The quantizers by name, and which one is sensible for a bit width. Modules are imported when first asked for."""

from __future__ import annotations

from importlib import import_module

from lowvram_tuner.quant.spec import QuantError, QuantFormat, QuantSpec

_FORMATS = {
    "none": "lowvram_tuner.quant.none:Unquantized",
    "nf4": "lowvram_tuner.quant.nf4:NF4",
    "int8": "lowvram_tuner.quant.int8:Int8",
    "gptq": "lowvram_tuner.quant.gptq:GPTQ",
    "hqq": "lowvram_tuner.quant.hqq:HQQ",
    "quip": "lowvram_tuner.quant.quip:Quip",
}
_BITS = {"none": (16,), "nf4": (4,), "int8": (8,), "gptq": (2, 3, 4, 8), "hqq": (2, 3, 4, 8), "quip": (2, 4)}
_READ_ONLY = {("quip", 3)}  # in checkpoints of others; none is made
_AUTO = {2: "quip", 3: "gptq", 4: "nf4", 8: "int8", 16: "none"}


def register(name: str, target: str | type[QuantFormat], bits: tuple[int, ...]) -> None:
    """Adds a quantizer: `target` is the class or its "module:Class" path."""
    _FORMATS[name] = target
    _BITS[name] = bits


def methods(bits: int) -> list[str]:
    """The quantizers that can make `bits` of a model, the default one first."""
    found = [m for m in _FORMATS if bits in _BITS[m]]
    return sorted(found, key=lambda m: m != _AUTO.get(bits))


def resolve(bits: int, method: str = "auto", **options: object) -> QuantSpec:
    """The spec for a bit width and a method ('auto' takes the default), or QuantError when there is none."""
    available = methods(bits)
    if method == "auto" and available:
        method = available[0]
    if method not in available and (method, bits) not in _READ_ONLY:
        raise QuantError(f"bits={bits} with method {method!r} is not available; {_offer(bits, available)}")
    return QuantSpec(method=method, bits=bits, **({"sym": False} | options))  # a zero of its own costs a group 8 bits, and is better


def quant_format(spec: QuantSpec) -> QuantFormat:
    """The QuantFormat of a spec."""
    if spec.method not in _FORMATS:
        raise QuantError(f"method={spec.method!r} is unknown; use one of {', '.join(_FORMATS)}.")
    target = _FORMATS[spec.method]
    if isinstance(target, str):
        module, name = target.split(":")
        target = getattr(import_module(module), name)
    return target(spec)


def _offer(bits: int, available: list[str]) -> str:
    if available:
        return f"for {bits} bits use {' or '.join(available)}."
    offered = sorted({b for m in _FORMATS for b in _BITS[m]})
    return f"use {', '.join(map(str, offered))} bits."
