"""NF4: the stored bytes are bitsandbytes' own, every code decodes as the format defines it, the kernel equals the reference."""

from __future__ import annotations

import os

import pytest
import torch

from kernels import reference_nf4

pytest.importorskip("triton")
from kernels import dequant_nf4

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels are compiled here")
SHAPES = [(576, 1536), (64, 100), (33, 130)]  # the demo model's largest, and two that no block divides


def weight(shape, dtype=torch.float32, device="cpu"):
    """Normal values with blocks of very different size, one block of zeros, and outliers."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
    made *= torch.logspace(-3, 1, shape[0])[:, None]
    made.view(-1)[128:192] = 0.0
    made[5, 7] = 60.0
    return made.to(device, dtype)


def every_code(shape=(8, 64), device="cpu"):
    """A packed weight that holds all 256 bytes of codes; its absmax codes include 0 and the largest, 255."""
    values = shape[0] * shape[1]
    blocks = values // 64
    codes = torch.arange(values // 2).remainder(256).to(torch.uint8)
    absmax = torch.linspace(0, 255, blocks).to(torch.uint8)
    assert absmax[0] == 0 and absmax[-1] == 255
    return {
        "weight": codes.to(device),
        "quant_map": torch.tensor(reference_nf4.LEVELS, device=device),
        "absmax": absmax.to(device),
        "nested_absmax": torch.tensor([0.75], device=device),
        "nested_quant_map": reference_nf4.dynamic_map().to(device),
        "nested_offset": torch.tensor([0.3], device=device),
    }


def decoded(packed, shape):
    """The format's definition, one value at a time."""
    out = []
    for i in range(shape[0] * shape[1]):
        byte = int(packed["weight"][i // 2])
        level = packed["quant_map"][byte >> 4 if i % 2 == 0 else byte & 15]
        block = i // 64
        scale = packed["nested_quant_map"][int(packed["absmax"][block])] * packed["nested_absmax"][block // 256]
        out.append(level * (scale + packed["nested_offset"][0]))
    return torch.stack(out).view(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantizing_and_back_equals_bitsandbytes(shape, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    w = weight(shape, dtype)
    theirs, state = functional.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
    ours = reference_nf4.quantize(w)
    assert torch.equal(ours["weight"], theirs.view(-1))
    assert torch.equal(ours["absmax"], state.absmax)
    assert torch.equal(ours["nested_absmax"], state.state2.absmax)
    assert torch.equal(ours["nested_quant_map"], state.state2.code)
    assert torch.equal(ours["quant_map"], state.code)
    assert ours["nested_offset"].item() == state.offset.item()
    back = reference_nf4.dequantize(ours, torch.full(shape, torch.nan, dtype=dtype))
    theirs_back = functional.dequantize_4bit(theirs, state)
    if dtype == torch.float32:
        assert torch.equal(back, theirs_back)
    else:  # bitsandbytes may round the absmax on its way to 16 bit: one step of the last place
        torch.testing.assert_close(back, theirs_back, rtol=2**-7, atol=0)


def test_without_double_quantization_the_absmax_is_exact():
    functional = pytest.importorskip("bitsandbytes.functional")
    w = weight((64, 100))
    theirs, state = functional.quantize_4bit(w, blocksize=64, compress_statistics=False, quant_type="nf4")
    ours = reference_nf4.quantize(w, double_quant=False)
    assert torch.equal(ours["weight"], theirs.view(-1)) and torch.equal(ours["absmax"], state.absmax)
    assert set(ours) == {"weight", "quant_map", "absmax"}
    assert torch.equal(reference_nf4.dequantize(ours, torch.empty(64, 100)), functional.dequantize_4bit(theirs, state))


def test_every_code_decodes_as_defined():
    packed = every_code()
    assert torch.equal(reference_nf4.dequantize(packed, torch.full((8, 64), torch.nan)), decoded(packed, (8, 64)))


def test_chunks_do_not_show(monkeypatch):
    w = weight((33, 130))
    whole = reference_nf4.quantize(w)
    monkeypatch.setattr(reference_nf4, "CHUNK", 640)
    for name, tensor in reference_nf4.quantize(w).items():
        assert torch.equal(tensor, whole[name]), name
    out = reference_nf4.dequantize(whole, torch.full((33, 130), torch.nan))
    monkeypatch.undo()
    assert torch.equal(out, reference_nf4.dequantize(whole, torch.empty(33, 130)))


def test_a_range_of_rows_is_that_part_of_the_whole():
    packed = reference_nf4.quantize(weight((64, 100)))
    whole = reference_nf4.dequantize(packed, torch.empty(64, 100))
    for first, rows in ((0, 5), (16, 48), (48, 3)):  # 16 rows of 100 are 25 blocks
        part = reference_nf4.dequantize(packed, torch.full((rows, 100), torch.nan), first * 100)
        assert torch.equal(part, whole[first : first + rows])


def check(shape, device, dtypes):
    """The kernel against the reference, exactly, with a guard row behind the output."""
    for double in (True, False):
        packed = reference_nf4.quantize(weight(shape, device=device), double)
        ranges = [(0, shape[0])]
        if shape[0] >= 64:  # 32 rows of an even length end at a block's end
            ranges.append((32, shape[0] - 40))
        for dtype in dtypes:
            for first, rows in ranges:
                guard = torch.full((rows + 1, shape[1]), torch.nan, dtype=dtype, device=device)
                dequant_nf4.dequantize(packed, guard[:-1], first * shape[1])
                oracle = reference_nf4.dequantize(packed, torch.empty(rows, shape[1], dtype=dtype, device=device), first * shape[1])
                assert torch.equal(guard[:-1], oracle), (double, dtype, first)
                assert guard[-1].isnan().all()


@interpreted
@pytest.mark.parametrize("shape", [(64, 100), (33, 130), (1, 2)], ids=str)
def test_kernel_equals_the_reference(shape):
    if shape == (1, 2):
        packed = reference_nf4.quantize(torch.tensor([[0.5, -2.0]]))
        out = dequant_nf4.dequantize(packed, torch.full((1, 2), torch.nan))
        assert torch.equal(out, reference_nf4.dequantize(packed, torch.empty(1, 2))) and out[0, 1] == -2.0
        return
    check(shape, "cpu", (torch.float32, torch.float16))


@interpreted
def test_kernel_decodes_every_code():
    packed = every_code()
    assert torch.equal(dequant_nf4.dequantize(packed, torch.full((8, 64), torch.nan)), decoded(packed, (8, 64)))


def test_kernel_refuses_a_start_inside_a_block():
    packed = reference_nf4.quantize(weight((64, 100)))
    with pytest.raises(ValueError, match="multiple of 64"):
        dequant_nf4.dequantize(packed, torch.empty(2, 100), 100)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(576, 1536), (33, 130), (4096, 14336)], ids=str)
def test_kernel_on_a_card(shape):
    check(shape, "cuda", (torch.float32, torch.float16, torch.bfloat16))
    cpu = reference_nf4.quantize(weight(shape))
    out = dequant_nf4.dequantize({k: v.cuda() for k, v in cpu.items()}, torch.empty(shape, device="cuda"))
    assert torch.equal(out.cpu(), reference_nf4.dequantize(cpu, torch.empty(shape)))
