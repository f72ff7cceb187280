"""How fast weights come back from every format on this card: one JSON object on stdout.

    python tests/benchmarks/bench_kernels.py [--rows 4096] [--cols 14336] [--only gptq-4]

Per format: dequantize of the whole weight (packed bytes read plus 16-bit bytes written, as a share of what a plain copy
reaches on this card), the same with an adapter merged where a format can, and the fused product of 1 to 32 rows against
dequantize + cuBLAS, both from a graph of 8 different weights, as chat runs them: a product of 15 us would else be timed by the
launches. Times are medians with a cold L2.
`fused_rows` is the most rows up to which the fused product wins: what the format's class should say.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lowvram_tuner.quant.registry import quant_format
from lowvram_tuner.quant.spec import QuantFormat, QuantSpec, Scratch

SPECS = {
    "nf4": QuantSpec("nf4", 4),
    "nf4-single": QuantSpec("nf4", 4, double_quant=False),
    "int8": QuantSpec("int8", 8),
    **{f"gptq-{bits}": QuantSpec("gptq", bits, 128) for bits in (2, 3, 4, 8)},
    "gptq-4-asym": QuantSpec("gptq", 4, 128, sym=False),
    "gptq-4-desc_act": QuantSpec("gptq", 4, 128, desc_act=True),
    **{f"hqq-{bits}": QuantSpec("hqq", bits, 64) for bits in (2, 3, 4, 8)},
    "hqq-4-axis0": QuantSpec("hqq", 4, 64, axis=0),
    **{f"quip-{bits}": QuantSpec("quip", bits) for bits in (2, 4)},
}
FUSED = (1, 2, 4, 8, 16, 24, 32)
COPIES = 8
RANK = 16  # of the adapter that is merged while dequantizing, where a format can
DTYPE = torch.bfloat16 if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def microseconds(function) -> float:
    from triton.testing import do_bench

    return do_bench(function, warmup=25, rep=100, return_mode="median") * 1e3


def in_a_graph(product, packed: dict[str, torch.Tensor]) -> float:
    """Microseconds of product(packed), taken of COPIES in one graph, each with tensors of its own."""
    weights = [packed, *({name: t.clone() for name, t in packed.items()} for _ in range(COPIES - 1))]

    def run() -> None:
        for each in weights:
            product(each)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return microseconds(graph.replay) / COPIES


def copy_gbs() -> float:
    """Bytes read plus bytes written per second of a device copy of 1 GB."""
    a = torch.empty(10**9, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / microseconds(lambda: b.copy_(a)) / 1e3


def measure(spec: QuantSpec, weight: torch.Tensor, copy: float) -> dict:
    rows, cols = weight.shape
    fmt = quant_format(spec)
    packed = fmt.quantize(weight)
    out = torch.empty(rows, cols, dtype=DTYPE, device="cuda")
    packed_bytes = sum(t.numel() * t.element_size() for t in packed.values())
    us = microseconds(lambda: (fmt.dequantize if fmt.dense else fmt.decode)(packed, out))  # what a step does
    gbs = (packed_bytes + out.numel() * 2) / us / 1e3
    entry = {
        "bits_per_weight": round(packed_bytes * 8 / weight.numel(), 3),
        "dequantize_us": round(us, 1), "dequantize_gbs": round(gbs), "share_of_copy": round(gbs / copy, 3),
    }  # fmt: skip
    if fmt.merges(cols, out.device):
        a, b = (torch.randn(shape, dtype=DTYPE, device="cuda") for shape in ((RANK, cols), (rows, RANK)))
        us = microseconds(lambda: fmt.dequantize_merged(packed, out, a, b, 1.0))
        entry |= {"merged_us": round(us, 1), "merged_share_of_copy": round((packed_bytes + out.numel() * 2) / us / 1e3 / copy, 3)}
    if type(fmt).matmul is QuantFormat.matmul:
        return entry
    scratch, won = Scratch(out.numel() * 2, "cuda"), 0
    entry["rows"] = {}
    for m in FUSED:
        x = torch.randn(m, cols, dtype=DTYPE, device="cuda")
        y = torch.empty(m, rows, dtype=DTYPE, device="cuda")
        fused = in_a_graph(lambda p, x=x: fmt.matmul(x, p, rows), packed)
        plain = in_a_graph(lambda p, x=x, y=y: fmt.forward(x, p, scratch, y), packed)
        entry["rows"][m] = {
            "fused_us": round(fused, 1), "dequantize_cublas_us": round(plain, 1),
            "packed_gbs": round(packed_bytes / fused / 1e3), "share_of_copy": round(packed_bytes / fused / 1e3 / copy, 3),
        }  # fmt: skip
        won = m if fused < plain and won == (FUSED[FUSED.index(m) - 1] if m > 1 else 0) else won
    return entry | {"fused_rows": won}


def bitsandbytes_gemv(weight: torch.Tensor) -> dict:
    """bitsandbytes' own NF4: its dequantize, and its product with one row."""
    try:
        import bitsandbytes.functional as functional
    except ImportError:
        return {}
    data, state = functional.quantize_4bit(weight.to(DTYPE), blocksize=64, quant_type="nf4", compress_statistics=True)
    x = torch.randn(1, weight.shape[1], dtype=DTYPE, device="cuda")
    return {
        "bitsandbytes_gemv_us": round(in_a_graph(lambda p: functional.gemv_4bit(x, p["data"].t(), state=state), {"data": data}), 1),
        "bitsandbytes_dequantize_us": round(microseconds(lambda: functional.dequantize_4bit(data, state)), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=14336)
    parser.add_argument("--only", nargs="*", choices=SPECS, help="formats to measure; default all")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this measures a CUDA card, and none is here.")
    weight = torch.randn(args.rows, args.cols, device="cuda").mul_(0.02)
    copy = copy_gbs()
    result = {
        "card": torch.cuda.get_device_name(), "torch": torch.__version__, "shape": [args.rows, args.cols],
        "dtype": str(DTYPE), "copy_gbs": round(copy), **bitsandbytes_gemv(weight), "formats": {},
    }  # fmt: skip
    for name in args.only or SPECS:
        try:
            result["formats"][name] = measure(SPECS[name], weight, copy)
        except (RuntimeError, ValueError) as error:  # one format's failure must not hide the others
            result["formats"][name] = {"error": str(error).splitlines()[0][:200]}
        print(name, result["formats"][name], file=sys.stderr, flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
