"""QuIP#'s kernels compile for real cards, within the shared memory of the smallest ones."""

import itertools

import pytest

pytest.importorskip("triton")
from tests.kernels.offline import LIMITS, compiled, main

# Rotations and products of several rows are used from compute capability 8.0; sm_90 is a data-centre card alone.
LARGER = LIMITS | {90: 227 * 1024}


@pytest.mark.parametrize("capability", sorted(LIMITS))
def test_quip_compiles(capability, root):
    assert compiled(__file__, capability, root) > 0


def cases(half, multiplies):
    """(kernel, arguments, constants, warps, stages) for 16-bit values of dtype `half`; `multiplies` adds those with tl.dot."""
    import torch
    from triton.runtime.jit import MockTensor

    from kernels import dequant_e8p, hadamard_kernel, matmul_e8p

    def t(dtype):
        return MockTensor(dtype, [1 << 20])

    x, f32, i32, i16, u8 = t(half), t(torch.float32), t(torch.int32), t(torch.int16), t(torch.uint8)
    for kind, residual in ((0, i16), (1, i16), (2, u8)):
        for out in (x, f32):
            yield (
                dequant_e8p._dequantize_kernel, (i16, residual, i32, i32, out, 4096, 1792, 1792, 14336, 0.29),
                {"KIND": kind, "ROWS": 4, "GROUPS": 128}, 4, 3,
            )  # fmt: skip
        sizes = (x, i16, residual, i32, i32, x, 4096, 1792, 1792, 0.29)
        yield matmul_e8p._vector_kernel, sizes, {"KIND": kind, "ROWS": 8 if kind == 0 else 4, "GROUPS": 128}, 4, 3
        if multiplies:
            for batch in (16, 32):
                yield matmul_e8p._matrix_kernel, (*sizes, 17), {"KIND": kind, "ROWS": 16, "GROUPS": 16, "BATCH": batch}, 2, 3
    if multiplies:
        for a, b, rows, warps in ((1, 16, 256, 4), (1, 128, 32, 4), (16, 16, 4, 1), (32, 32, 1, 1), (64, 64, 4, 4), (64, 128, 4, 8)):
            for pre, v in itertools.product((True, False), (x, f32)):
                flags = {"A": a, "B": b, "ROWS": rows, "PRE": pre, "POST": not pre, "ADD": not pre, **hadamard_kernel.multiplied(v.dtype, True)}
                arguments = (v, v, f32 if pre else v, v if pre else f32, 4096, 28, 14336, 14336, 0.1)
                yield hadamard_kernel._sylvester_kernel, arguments, flags, warps, 1


if __name__ == "__main__":
    main(cases, LARGER)
