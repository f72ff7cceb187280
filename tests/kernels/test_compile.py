"""Every kernel of the engine compiles for real cards, without one: Triton's compiler and PTX assembler run on any machine.

Shared memory is held to what the smallest card of a generation has: 64 KB on Turing, 99 KB on consumer Ampere and Ada.
The compiling happens in a process of its own, since the other tests interpret the kernels.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

LIMITS = {75: 64 * 1024, 80: 99 * 1024, 90: 99 * 1024}


@pytest.mark.parametrize("capability", sorted(LIMITS))
def test_compiles_within_shared_memory(capability, root):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, __file__, str(capability)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "compiled" in done.stdout


class OfflineDriver:
    """What `JITFunction.warmup` asks of a driver."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        return self.target


def cases(half):
    """(kernel, arguments, constants) for 16-bit values of dtype `half`."""
    import torch
    from triton.runtime.jit import MockTensor

    from kernels import adamw, dequant_nf4, gather, loss, merge_nf4, norm, rope, swiglu

    def t(dtype):
        return MockTensor(dtype, [1 << 20])

    u8, f32, i64, i16 = t(torch.uint8), t(torch.float32), t(torch.int64), t(torch.int16)
    x = t(half)
    for out in (x, f32):
        for double in (True, False):
            absmax = u8 if double else f32
            yield dequant_nf4._dequantize_kernel, (u8, absmax, f32, f32, f32, f32, out, 0, 4096), {"DOUBLE": double, "BLOCKS": 32}
    for rank in (16, 128):
        sizes = {"DOUBLE": True, "RANK": rank, "ROWS": merge_nf4.ROWS}
        yield merge_nf4._merge_kernel, (u8, u8, f32, f32, f32, f32, x, x, x, 0, 4096, 4096, rank, 2.0), sizes
    yield norm._forward_kernel, (x, x, x, f32, 4096, 4096, 1e-5), {"BLOCK": 4096}
    yield norm._backward_kernel, (x, x, x, f32, x, 4096, 4096), {"BLOCK": 4096}
    for has_norm in (True, False):
        sizes = {"D": 96, "HALF": 64, "NORM": has_norm}
        yield rope._forward_kernel, (x, x, f32, f32, x, x, 960, 768, 96, 6, 1e-6), sizes
        yield rope._backward_kernel, (x, x, x, x, x, f32, f32, x, x, 960, 96, 6, 2, 1e-6), sizes
    yield swiglu._forward_kernel, (x, x, 1500), {"BLOCK": 1024}
    yield swiglu._backward_kernel, (x, x, 1500), {"BLOCK": 1024}
    for cap in (True, False):
        yield loss._tile_kernel, (x, i64, f32, f32, f32, f32, f32, 16384, 0, 16384, 30.0), {"CAP": cap, "BLOCK": 2048}
    yield gather._gather_kernel, (i64, x, x, 4096), {"BLOCK": 2048}
    rates = (5000, 7, 1e-3, 0.9, 0.999, 0.1, 0.001, 1e-8, 0.0)
    split = half == torch.bfloat16
    master = i16 if split else f32
    flags = {"SPLIT": split, "MASTER": not split, "ROWS": adamw.ROWS, "BLOCK": adamw.BLOCK}
    yield adamw._adamw_kernel, (x, x, t(torch.int8), u8, f32, f32, master, f32, *rates), {"EIGHT": True, **flags}
    yield adamw._adamw_kernel, (x, x, f32, f32, f32, f32, master, f32, *rates), {"EIGHT": False, **flags}


def main(capability: int) -> None:
    import torch
    from triton.runtime.driver import driver

    driver.set_active(OfflineDriver(capability))
    count = 0
    for kernel, arguments, constants in cases(torch.float16 if capability < 80 else torch.bfloat16):
        compiled = kernel.warmup(*arguments, grid=(1,), **constants)
        assert compiled.metadata.shared <= LIMITS[capability], (kernel.__name__, compiled.metadata.shared)
        count += 1
    print(f"{count} compiled for sm_{capability}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
