"""QuIP#'s kernels compile for real cards, within the shared memory of the smallest ones. See test_compile.py."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# Rotations and products of several rows are used from compute capability 8.0; sm_90 is a data-centre card alone.
LIMITS = {75: 64 * 1024, 80: 99 * 1024, 90: 227 * 1024}


@pytest.mark.parametrize("capability", sorted(LIMITS))
def test_quip_compiles(capability, root):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, __file__, str(capability)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "compiled" in done.stdout


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
            for pre, post in ((True, False), (False, True)):
                flags = {"A": a, "B": b, "ROWS": rows, "PRE": pre, "POST": post, "ADD": post}
                arguments = (x, x, f32 if pre else x, f32 if post else x, 4096, 28, 14336, 14336, 0.1)
                yield hadamard_kernel._sylvester_kernel, arguments, flags, warps, 1


def main(capability: int) -> None:
    import torch
    from triton.runtime.driver import driver

    from tests.kernels.test_compile import OfflineDriver

    driver.set_active(OfflineDriver(capability))
    count = 0
    for kernel, arguments, constants, warps, stages in cases(torch.float16 if capability < 80 else torch.bfloat16, capability >= 80):
        compiled = kernel.warmup(*arguments, grid=(1,), **constants, num_warps=warps, num_stages=stages)
        assert compiled.metadata.shared <= LIMITS[capability], (kernel.__name__, constants, compiled.metadata.shared)
        count += 1
    print(f"{count} compiled for sm_{capability}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
