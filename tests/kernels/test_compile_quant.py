"""The quantizers' kernels compile for real cards, within the shared memory of the smallest ones."""

import pytest

pytest.importorskip("triton")
from tests.kernels.offline import LIMITS, compiled, main


@pytest.mark.parametrize("capability", sorted(LIMITS))
def test_quantizers_compile(capability, root):
    assert compiled(__file__, capability, root) > 0


def cases(half, fused):
    """(kernel, arguments, constants, warps, stages) for 16-bit values of dtype `half`; `fused` adds those with tl.dot."""
    import torch
    from triton.runtime.jit import MockTensor

    from kernels import dequant_grouped, dequant_int8, matmul_grouped, matmul_int8, optq_block
    from kernels.reference_grouped import FLAT, INDEX, MODULO, ROW

    def t(dtype):
        return MockTensor(dtype, [1 << 20])

    x, f32, i32, u8, fp16 = t(half), t(torch.float32), t(torch.int32), t(torch.uint8), t(torch.float16)
    modes = [(4, mode, mode == ROW, zeros) for mode in (ROW, INDEX, FLAT, MODULO) for zeros in (u8, fp16)]
    modes += [(bits, ROW, True, zeros) for bits in (2, 3, 8) for zeros in (u8, None)]
    for bits, mode, per_run, zeros in modes:
        unit = t(dequant_grouped.UNIT_DTYPE[bits])
        pointers = (unit, fp16, fp16 if zeros is None else zeros, i32)
        layout = {"BITS": bits, "MODE": mode, "SIZE": 128, "PER_RUN": per_run, "HAS_ZEROS": zeros is not None}
        sizes = (4096, 14336, 1792, 112)
        for out in (x, f32):
            yield dequant_grouped._dequantize_kernel, (*pointers, out, 0, *sizes), layout | {"ROWS": 4, "RUNS": 128}, 4
        for rows in (1, 4):
            tile = {"ROWS": rows, "RUNS": matmul_grouped.GEMV_RUNS}
            yield matmul_grouped._gemv_kernel, (x, *pointers, x, *sizes), layout | tile, 4
        if fused:
            tile = {"X_ROWS": 32, "ROWS": matmul_grouped.DOT_ROWS, "RUNS": matmul_grouped.DOT_RUNS}
            yield matmul_grouped._dot_kernel, (x, *pointers, f32, 17, *sizes, 1792), layout | tile, 4, 2
    i8 = t(torch.int8)
    yield dequant_int8._dequantize_kernel, (i8, f32, x, 0, 4096, 14336), {"ROWS": 4, "COLS": 1024}, 4
    yield matmul_int8._gemv_kernel, (x, i8, f32, x, 4096, 14336), {"ROWS": 4, "COLS": matmul_int8.GEMV_COLS}, 4
    if fused:
        tile = {"X_ROWS": 32, "ROWS": matmul_int8.DOT_ROWS, "COLS": matmul_int8.DOT_COLS}
        yield matmul_int8._dot_kernel, (x, i8, f32, f32, 17, 4096, 14336, 14336), tile, 4, 3
    block = {"COLUMNS": optq_block.MOST_COLUMNS, "OUTS": optq_block.OUTS}
    for kernel in (optq_block._round_kernel, optq_block._revisit_kernel):
        yield kernel, (*[f32] * 7, 100, 14336, 15.0), block, 4


if __name__ == "__main__":
    main(cases)
