"""The kernels of a token's step compile for real cards, within the shared memory of the smallest ones. See test_compile.py."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

LIMITS = {75: 64 * 1024, 80: 99 * 1024, 90: 99 * 1024}


@pytest.mark.parametrize("capability", sorted(LIMITS))
def test_decoding_compiles(capability, root):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, __file__, str(capability)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "compiled" in done.stdout


def cases(half, multiplies):
    """(kernel, arguments, constants, warps, stages) for 16-bit values of dtype `half`; `multiplies` adds NF4's with tl.dot."""
    import torch
    from triton.runtime.jit import MockTensor

    from kernels import attention_cache, matmul_nf4, thin

    def t(dtype):
        return MockTensor(dtype, [1 << 20])

    x, f32, i32, i64, u8 = t(half), t(torch.float32), t(torch.int32), t(torch.int64), t(torch.uint8)
    for double in (True, False):
        rest = (u8 if double else f32, f32, f32, f32, f32)
        weight = (i32, *rest)
        for count, rows, row_bytes in ((1, 4, 2048), (3, 2, 2048), (2, 4, 7168), (1, 1, 288)):
            flags = {"COUNT": count, "DOUBLE": double, "ALIGNED": True, "ROWS": rows, "BYTES": matmul_nf4.gemv_bytes(row_bytes)}
            arguments = (row_bytes, 6144, row_bytes, 4096, 1024, 1024, *weight * 3)
            yield matmul_nf4._gemv_kernel, (i32, x, *arguments), flags, 4, 3
        flags = {"COUNT": 1, "DOUBLE": double, "ALIGNED": False, "ROWS": 1, "BYTES": 512}
        yield matmul_nf4._gemv_kernel, (x, x, 100, 40, 50, 40, 0, 0, *(u8, *rest) * 3), flags, 4, 3
        if multiplies:
            tile = {"X_ROWS": 32, "ROWS": matmul_nf4.DOT_ROWS, "BYTES": matmul_nf4.DOT_BYTES, "DOUBLE": double, "ALIGNED": True}
            yield matmul_nf4._dot_kernel, (x, *weight, f32, 17, 4096, 7168, 1792), tile, 4, 2
    for group, d, width in ((4, 128, 128), (7, 80, 128), (1, 256, 256)):
        tile = {"GROUP": group, "QUERIES": 16, "D": d, "WIDTH": width, "BLOCK": 64 if width <= 128 else 32}
        yield attention_cache._part_kernel, (x, x, i64, f32, f32, 8, 64, 0.1), tile, 4, 2
        yield attention_cache._combine_kernel, (f32, f32, x, 32), {"D": d, "WIDTH": width, "PARTS": 32}, 4, 3
    yield thin._down_kernel, (x, x, f32, f32, 4096), {"BLOCK": thin.COLUMNS}, 4, 3
    flags = {"BIAS": True, "RESIDUAL": True, "ADAPTER": True, "WIDTH": 16, "BLOCK": thin.ROWS}
    yield thin._finish_kernel, (x, x, x, f32, x, i32, 6144, 48, 16), flags, 2, 3


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
