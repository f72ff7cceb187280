"""Every kernel of the engine compiles for real cards, within the shared memory of the smallest ones."""

import pytest

pytest.importorskip("triton")
from tests.kernels.offline import LIMITS, compiled, main


@pytest.mark.parametrize("capability", sorted(LIMITS))
def test_compiles_within_shared_memory(capability, root):
    assert compiled(__file__, capability, root) > 0


def cases(half, multiplies):
    """(kernel, arguments, constants) for 16-bit values of dtype `half`; `multiplies` adds those with tl.dot."""
    import torch
    from triton.runtime.jit import MockTensor

    from kernels import adamw, dequant_nf4, gather, loss, merge_nf4, merge_nf4_tiles, norm, rope, swiglu

    def t(dtype):
        return MockTensor(dtype, [1 << 20])

    u8, f32, i64, i16 = t(torch.uint8), t(torch.float32), t(torch.int64), t(torch.int16)
    x = t(half)
    for out in (x, f32):
        for double in (True, False):
            absmax = u8 if double else f32
            yield dequant_nf4._dequantize_kernel, (u8, absmax, f32, f32, f32, f32, out, 0, 4096), {"DOUBLE": double, "BLOCKS": 32}
    for rank in (16, 128) if multiplies else ():
        sizes = {"DOUBLE": True, "RANK": rank, "ROWS": merge_nf4.ROWS}
        yield merge_nf4._merge_kernel, (u8, u8, f32, f32, f32, f32, x, x, x, 0, 4096, 4096, rank, 2.0), sizes
        for double in (True, False) if rank == 16 else ():
            for chunks in merge_nf4_tiles.RESIDENT:
                arguments = (u8, u8 if double else f32, f32, f32, f32, f32, x, x, x, 0, 4096, 64, 16 * chunks, 2.0, 9)
                yield merge_nf4_tiles._merge_tiles_kernel, arguments, {"DOUBLE": double, "CHUNKS": chunks, "WARPS": merge_nf4_tiles.WARPS}
    yield norm._forward_kernel, (x, x, x, f32, 4096, 4096, 1e-5), {"BLOCK": 4096}
    yield norm._backward_kernel, (x, x, x, f32, x, 4096, 4096), {"BLOCK": 4096}
    for has_norm in (True, False):
        sizes = {"D": 96, "HALF": 64, "NORM": has_norm, "HEADS": rope.HEADS}
        yield rope._forward_kernel, (x, x, f32, f32, x, x, 960, 768, 96, 6, 8, 1e-6), sizes
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


if __name__ == "__main__":
    main(cases)
