"""Codes survive packing exactly in every layout, the largest ones included."""

import pytest
import torch

from kernels import packing

BITS = packing.BITS
CYCLE = torch.arange(32) % 8


def codes(*shape, bits, seed=0):
    made = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    made.view(-1)[0], made.view(-1)[-1] = 2**bits - 1, 2**bits - 1
    return made


def words(*texts):
    return torch.tensor([int(t, 16) for t in texts]).to(torch.int32)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 31, 32, 33, 96, 576, 1000])
def test_rows_round_trip(bits, count):
    q = codes(5, count, bits=bits, seed=count)
    packed = packing.pack(q, bits)
    assert packed.dtype == torch.int32 and packed.shape == (5, packing.words(count, bits))
    assert torch.equal(packing.unpack(packed, bits, count), q)


@pytest.mark.parametrize("bits", BITS)
def test_all_largest_codes_are_all_ones(bits):
    packed = packing.pack(torch.full((2, 64), 2**bits - 1), bits)
    assert (packed == -1).all()
    assert (packing.unpack(packed, bits, 64) == 2**bits - 1).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_code_j_sits_at_bit_b_times_j(bits):
    per_word = 32 // bits
    for j in range(per_word):
        q = torch.zeros(32, dtype=torch.uint8)
        q[j] = 1
        assert int(packing.pack(q, bits)[0]) & 0xFFFFFFFF == 1 << bits * j


def test_three_bits_are_a_contiguous_stream():
    assert torch.equal(packing.pack(CYCLE, 3), words("88fac688", "c688fac6", "fac688fa"))


def test_planar_three_bits():
    expected = words("e4e4e4e4", "e4e4e4e4", "f0f0f0f0")
    assert torch.equal(packing.pack_planar(CYCLE), expected)
    assert torch.equal(packing.unpack_planar(expected, 32), CYCLE.to(torch.uint8))


@pytest.mark.parametrize("count", [32, 64, 576])
def test_planar_round_trip(count):
    q = codes(3, count, bits=3, seed=count)
    assert torch.equal(packing.unpack_planar(packing.pack_planar(q), count), q)


@pytest.mark.parametrize("bits", BITS)
def test_chunks_round_trip(bits):
    q = codes(40, 7, bits=bits)
    packed = packing.pack_chunks(q, bits)
    assert packed.dtype == (torch.int32 if bits == 3 else torch.uint8)
    assert len(packed) == (4 if bits == 3 else 40 * bits // 8)
    assert torch.equal(packing.unpack_chunks(packed, bits, 40), q)


def test_chunks_put_the_first_part_on_top():
    q = torch.tensor([[9], [1], [2], [3]], dtype=torch.uint8)
    assert packing.pack_chunks(q, 4).tolist() == [[0x92], [0x13]]
    q = torch.arange(10, dtype=torch.uint8).remainder(8).unsqueeze(1)
    assert int(packing.pack_chunks(q, 3)) == sum((k % 8) << 27 - 3 * k for k in range(10))


def test_three_bit_chunks_trim_their_padding():
    q = codes(13, 4, bits=3)
    assert packing.pack_chunks(q, 3).shape == (2, 4)
    assert torch.equal(packing.unpack_chunks(packing.pack_chunks(q, 3), 3, 13), q)


def test_rows_that_do_not_fill_a_byte_are_refused():
    with pytest.raises(ValueError, match="3 rows cannot be packed at 4 bits; use a multiple of 2"):
        packing.pack_chunks(codes(3, 2, bits=4), 4)
