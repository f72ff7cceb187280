"""The kernels of a token's step compile for real cards, within the shared memory of the smallest ones."""

import itertools

import pytest

pytest.importorskip("triton")
from tests.kernels.offline import LIMITS, compiled, main

E8P = 16
# kind of code, groups told apart by columns, zeros, layers, warps that share the columns
EVEN = [(2, 4, 1, 1, 1), (2, 1, 0, 1, 4), (3, 1, 0, 1, 8), (4, 1, 2, 1, 2), (4, 2, 0, 1, 8), (8, 1, 1, 1, 8), (E8P, 1, 0, 1, 8), (E8P, 1, 0, 2, 4)]


@pytest.mark.parametrize("capability", sorted(LIMITS))
def test_decoding_compiles(capability, root):
    assert compiled(__file__, capability, root) > 0


def cases(half, multiplies):
    """(kernel, arguments, constants, warps, stages[, registers]) for 16-bit values of dtype `half`; `multiplies` adds NF4's with tl.dot."""
    import torch
    from triton.runtime.jit import MockTensor

    from kernels import attention_cache, gemv_even, gemv_nf4, matmul_nf4, thin

    def t(dtype):
        return MockTensor(dtype, [1 << 20])

    x, f32, i32, i64, u8 = t(half), t(torch.float32), t(torch.int32), t(torch.int64), t(torch.uint8)
    for double in (True, False):
        rest = (u8 if double else f32, f32, f32, f32, f32)
        weight = (i32, *rest)
        for count, rows, row_bytes in ((1, 4, 2048), (3, 2, 2048), (2, 4, 7168), (1, 1, 288)):
            flags = {"COUNT": count, "DOUBLE": double, "ALIGNED": True, "ROWS": rows, "BYTES": matmul_nf4.gemv_bytes(row_bytes)}
            arguments = (row_bytes, 6144, row_bytes, 4096, 1024, 1024, *weight * 3)
            yield matmul_nf4._gemv_kernel, (x, x, *arguments), flags, 4, 3
        flags = {"COUNT": 1, "DOUBLE": double, "ALIGNED": False, "ROWS": 1, "BYTES": 512}
        yield matmul_nf4._gemv_kernel, (x, x, 100, 40, 50, 40, 0, 0, *(u8, *rest) * 3), flags, 4, 3
        if multiplies:
            tile = {"X_ROWS": 32, "ROWS": matmul_nf4.DOT_ROWS, "BYTES": matmul_nf4.DOT_BYTES, "DOUBLE": double, "ALIGNED": True}
            yield matmul_nf4._dot_kernel, (x, *weight, f32, 17, 4096, 7168, 1792), tile, 4, 2
    if multiplies:  # 8.0 and later, as `gemv_nf4.capable`
        for dtype, double, one, parts, sizes in itertools.product(
            (torch.float16, torch.bfloat16), (True, False), (True, False), (1, 2, 4, 8), ((4096,), (4096, 1024, 1024))
        ):
            weight = (u8, u8 if double else f32, f32, f32, f32, f32)
            arguments = (t(dtype), t(dtype), 8, 6144, 7, *sizes, *[0] * (3 - len(sizes)), *weight * 3)
            flags = {"COUNT": len(sizes), "DOUBLE": double, "ONE": one, "BLOCKS": 64, "WARPS": gemv_nf4.WARPS, "PARTS": parts}
            yield gemv_nf4._gemv_kernel, arguments, flags, gemv_nf4.WARPS, 3, 128
        for (kind, split, zeros, layers, parts), one, dtype in itertools.product(EVEN, (True, False), (torch.float16, torch.bfloat16)):
            codes, scales = t(torch.int16 if kind == E8P else torch.int32), t(torch.float16)
            weight = (codes, scales, u8 if zeros == gemv_even.BYTES else scales)
            unit = gemv_even.UNIT[kind]
            flags = {"COUNT": layers % 2 + 1, "KIND": kind, "UNIT": unit, "UNITS": 4096 // unit, "SPLIT": split, "SIZE": 128, "GROUPS": 32,
                     "ZEROS": zeros, "ONE": one, "LAYERS": layers, "WARPS": gemv_even.WARPS, "PARTS": parts}  # fmt: skip
            arguments = (t(dtype), t(dtype), 8, 5120, t(torch.int16), t(torch.int32), codes, 0.3, 2, 4096, 1024 * (layers % 2), 0, *weight * 3)
            yield gemv_even._gemv_kernel, arguments, flags, gemv_even.WARPS, 3, 128
    for group, d, width in ((4, 128, 128), (7, 80, 128), (1, 256, 256)):
        tile = {"GROUP": group, "QUERIES": 16, "D": d, "WIDTH": width, "BLOCK": 64 if width <= 128 else 32}
        yield attention_cache._part_kernel, (x, x, i64, f32, f32, 8, 64, 0.1), tile, 4, 2
        yield attention_cache._combine_kernel, (f32, f32, x, 32), {"D": d, "WIDTH": width, "PARTS": 32}, 4, 3
    yield thin._down_kernel, (x, x, f32, f32, 4096), {"BLOCK": thin.COLUMNS}, 4, 3
    flags = {"BIAS": True, "RESIDUAL": True, "ADAPTER": True, "WIDTH": 16, "BLOCK": thin.ROWS}
    yield thin._finish_kernel, (x, x, x, f32, x, i32, 6144, 48, 16), flags, 2, 3


if __name__ == "__main__":
    main(cases)
