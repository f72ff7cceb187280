"""E8P codes: the codebook's check values, the packing of every code, and the kernels against the fp32 reference."""

from __future__ import annotations

import os

import pytest
import torch

from kernels import e8p

ALL = torch.arange(1 << 16).to(torch.int16)  # as int16 the upper half is negative, as in memory
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RESIDUALS = {"2-bit": None, "4-bit": (torch.int16, 3.45), "3-bit": (torch.uint8, 2.04)}


@pytest.fixture
def interpreted() -> None:
    """The kernels run on the CPU; `gpu` tests run the same cases where there is a card."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the kernels are not interpreted here")


def decoded(absolute: int, signs: int) -> list[float]:
    """One code by the published rule, byte a and sign byte s, in plain Python."""
    word = int(e8p.published_grid()[absolute])
    parity = bin(signs).count("1") % 2
    signs ^= parity
    values = []
    for k in (0, 4, 1, 5, 2, 6, 3, 7):
        v = ((word >> 4 * k & 15) - 8) / 2
        values.append((-v if signs >> k & 1 else v) + (-0.25 if parity else 0.25))
    return values


def published_code(absolute: int, signs: int) -> int:
    """Our code for the published (a, s): the sign bits in the order of the weights."""
    return absolute | sum((signs >> k & 1) << 8 + i for i, k in enumerate((0, 4, 1, 5, 2, 6, 3, 7)))


def random_codes(rows: int, groups: int, kind: str, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(1 << 15), 1 << 15, (rows, groups), generator=g).to(torch.int16)
    if RESIDUALS[kind] is None:
        return codes, None, 1.0
    dtype, scale = RESIDUALS[kind]
    return codes, torch.randint(0, 1 << 15, (rows, groups), generator=g).to(dtype), scale


def test_grid_check_values():
    grid = e8p.published_grid()
    assert [f"{grid[i]:08x}" for i in (0, 1, 227, 255)] == ["99999999", "59999999", "5b99bb9b", "7b9bbb9b"]


def test_decode_check_values():
    assert decoded(0, 0) == [0.75] * 8
    assert decoded(0, 1) == [0.25] * 8
    assert decoded(255, 0) == [1.75, 1.75, 0.75, 0.75, 1.75, 1.75, 1.75, -0.25]


def test_codebook_is_the_published_rule_for_every_code():
    book = e8p.codebook()
    for signs in range(256):
        for absolute in range(256):
            assert book[published_code(absolute, signs)].tolist() == decoded(absolute, signs), (absolute, signs)
    assert len(torch.unique(book, dim=0)) == 1 << 16


def test_residual_codebook_is_the_ball_of_e8_and_fifteen_axes():
    book = e8p.residual_codebook()
    norms = book.square().sum(1)
    assert sorted(norms.tolist()) == [0.0, *[2.0] * 240, *[4.0] * 15]
    assert len(torch.unique(book, dim=0)) == 256
    assert book[0].tolist() == [-1.0, -1.0] + [0.0] * 6
    assert book[56].tolist() == [0.0] * 8  # the middle of the 113 integer points
    assert book[113].tolist() == [-0.5] * 8
    assert book[241].tolist() == [2.0] + [0.0] * 7
    assert book[249].tolist() == [-2.0] + [0.0] * 7
    assert book[255].tolist() == [0.0] * 6 + [-2.0, 0.0]


def test_published_layout_word_by_word():
    """Each word of Qidxs, taken apart by the rule, lands in the rows and columns that the rule says."""
    rows, columns = 32, 128
    g = torch.Generator().manual_seed(3)
    qidxs = torch.randint(-(1 << 62), 1 << 62, (rows, columns // 32), generator=g) * 2 + 1
    codes = e8p.unpack(qidxs)
    tiles = qidxs.view(rows // 16, columns // 64, 8, 4)
    for i in range(2):
        for j in range(2):
            for p in range(8):
                for q in range(4):
                    word = int(tiles[i, j, p, q]) & (1 << 64) - 1
                    for r in range(2):
                        for h in range(2):
                            k = 2 * h + r
                            signs = sum((word >> 32 + 4 * b + k & 1) << b for b in range(8))
                            want = published_code(word >> 8 * k & 255, signs)
                            assert int(codes[16 * i + 2 * p + r, 8 * j + 2 * q + h]) & 0xFFFF == want


def test_packing_round_trips_with_every_code():
    codes = ALL[torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0))].view(64, 1024)
    qidxs = e8p.pack(codes)
    assert qidxs.dtype == torch.int64
    assert qidxs.shape == (64, 256)
    assert torch.equal(e8p.unpack(qidxs), codes)
    assert torch.equal(e8p.pack(e8p.unpack(qidxs)), qidxs)


def test_residual_indices_are_consecutive_bytes():
    words = torch.tensor([[0x0706050403020100, -1]])
    assert e8p.unpack_residual_indices(words).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7] + [255] * 8]


@pytest.mark.parametrize("kind", RESIDUALS)
def test_reference_sums_two_layers(kind):
    codes, residual, scale = random_codes(5, 7, kind)
    out = torch.full((5, 56), float("nan"))
    e8p.dequantize(codes, out, residual, scale)
    for r in range(5):
        for g in range(7):
            want = e8p.codebook()[int(codes[r, g]) & 0xFFFF]
            if residual is not None:
                book = e8p.codebook() if residual.dtype == torch.int16 else e8p.residual_codebook()
                want = want + book[int(residual[r, g]) & 0xFFFF] / scale
            assert torch.equal(out[r, 8 * g : 8 * g + 8], want)


def check_dequantize(codes, residual, scale, dtype, device):
    want = e8p.dequantize(codes, torch.empty(codes.shape[0], 8 * codes.shape[1]), residual, scale).to(DTYPES[dtype])
    from kernels import dequant_e8p

    out = torch.full(want.shape, float("nan"), dtype=DTYPES[dtype], device=device)
    dequant_e8p.dequantize(codes.to(device), out, None if residual is None else residual.to(device), scale)
    if residual is None:
        assert torch.equal(out.cpu(), want)  # multiples of 1/4: exact in every dtype
    else:  # the kernel multiplies by 1 / scale: one rounding beside the reference's
        spacing = torch.finfo(DTYPES[dtype]).eps * want.float().abs().clamp(min=0.25)
        assert bool(((out.cpu().float() - want.float()).abs() <= spacing).all())


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_kernel_decodes_every_code(dtype, interpreted):
    check_dequantize(ALL.view(64, 1024), None, 1.0, dtype, "cpu")


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", RESIDUALS)
@pytest.mark.parametrize("shape", [(1, 8), (5, 130), (17, 72)], ids=str)
def test_kernel_interpreted(shape, kind, dtype, interpreted):
    check_dequantize(*random_codes(*shape, kind), dtype, "cpu")


def test_kernel_works_on_tiles(interpreted):
    from kernels import dequant_e8p

    codes, residual, scale = random_codes(20, 40, "4-bit")
    whole = e8p.dequantize(codes, torch.empty(20, 320), residual, scale)
    out = torch.zeros(20, 320)
    tile, area = (slice(3, 14), slice(9, 33)), (slice(3, 14), slice(72, 264))
    dequant_e8p.dequantize(codes[tile], out[area], residual[tile], scale)
    assert torch.allclose(out[area], whole[area], atol=3e-7, rtol=0)
    out[area] = 0
    assert not out.any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", RESIDUALS)
@pytest.mark.parametrize("shape", [(576, 72), (1536, 72), (576, 192), (4096, 1792), (4097, 1376), (64, 1024)], ids=str)
def test_dequantize_on_the_card(shape, kind, dtype):
    check_dequantize(*random_codes(*shape, kind), dtype, "cuda")


def check_matmul(rows, groups, batch, kind, dtype, device):
    from kernels import matmul_e8p

    codes, residual, scale = random_codes(rows, groups, kind)
    x = torch.randn(batch, 8 * groups, generator=torch.Generator().manual_seed(batch)).to(DTYPES[dtype])
    want = x.double() @ e8p.dequantize(codes, torch.empty(rows, 8 * groups), residual, scale).double().t()
    got = matmul_e8p.matmul(x.to(device), codes.to(device), None if residual is None else residual.to(device), scale)
    assert got.dtype == DTYPES[dtype]
    # fp32: the one-row kernel cancels sums 24 times the result (measured 1.6e-6); 16 bit: output and weight rounding
    limit = {"fp32": 4e-6, "fp16": 6e-4, "bf16": 5e-3}[dtype]
    assert float((got.cpu().double() - want).norm() / want.norm()) < limit


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", RESIDUALS)
@pytest.mark.parametrize("batch", [1, 2, 16, 17, 32])
def test_matmul_interpreted(batch, kind, dtype, interpreted):
    check_matmul(40, 20, batch, kind, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", RESIDUALS)
@pytest.mark.parametrize("batch", [1, 2, 16, 32])
@pytest.mark.parametrize("shape", [(576, 192), (4096, 1792), (14336, 512)], ids=str)
def test_matmul_on_the_card(shape, batch, kind, dtype):
    check_matmul(*shape, batch, kind, dtype, "cuda")


def test_launchers_refuse_what_they_cannot_read(interpreted):
    from kernels import dequant_e8p, matmul_e8p

    codes = torch.zeros(4, 8, dtype=torch.int16)
    with pytest.raises(ValueError, match="int16"):
        dequant_e8p.dequantize(codes.int(), torch.empty(4, 64))
    with pytest.raises(ValueError, match=r"out must be \[4, 64\]"):
        dequant_e8p.dequantize(codes, torch.empty(4, 60))
    with pytest.raises(ValueError, match="residual"):
        dequant_e8p.dequantize(codes, torch.empty(4, 64), torch.zeros(4, 7, dtype=torch.int16))
    with pytest.raises(ValueError, match="32"):
        matmul_e8p.matmul(torch.zeros(33, 64), codes)
