"""Compiling kernels for real cards without one: Triton's compiler and PTX assembler run on any machine.

Shared memory is held to what the smallest card of a generation has: 64 KB on Turing, 99 KB on consumer Ampere and Ada. The stack,
where spilled registers go, is held small, since CUDA sets it aside for every thread that the card can hold.
The compiling happens in a process of its own, since the other tests interpret the kernels.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

LIMITS = {75: 64 * 1024, 80: 99 * 1024, 90: 99 * 1024}  # bytes of shared memory by compute capability
STACK = 512  # bytes a thread: 24 MB on a laptop card of 30 processors with 1536 threads each


def compiled(file: str, capability: int, root: Path) -> int:
    """Runs a test file as a program that ends in `main`; returns how many kernels it compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, file, str(capability)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.split()[-1])


def main(cases: Callable[..., Iterable[tuple]], limits: dict[int, int] = LIMITS) -> None:
    """Compiles cases(half, multiplies) for the capability that the command line names.

    half: fp16 on Turing, else bf16. multiplies: whether tl.dot runs on tensor cores as the project uses it, from 8.0 on. A case
    is (kernel, arguments, constants[, warps[, stages[, registers]]]).
    """
    import torch
    from triton.runtime.driver import driver

    capability, count = int(sys.argv[1]), 0
    driver.set_active(_Driver(capability))
    for kernel, arguments, constants, *launch in cases(torch.float16 if capability < 80 else torch.bfloat16, capability >= 80):
        options = dict(zip(("num_warps", "num_stages", "maxnreg"), launch))
        done = kernel.warmup(*arguments, grid=(1,), **constants, **options)
        assert done.metadata.shared <= limits[capability], (kernel.__name__, constants, done.metadata.shared)
        spilled = stack(done.asm["cubin"])
        assert spilled <= STACK, (kernel.__name__, constants, spilled)
        count += 1
    print(count)


def stack(cubin: bytes) -> int:
    """Bytes of stack a thread, as the assembler reports them."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return max(map(int, re.findall(r"STACK:(\d+)", said.stdout)))


class _Driver:
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
