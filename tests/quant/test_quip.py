"""The quip format against its definition W = diag(SV) U_out Wq U_in^T diag(SU), in fp64."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from kernels import e8p
from kernels.hadamard_matrices import hadamard_matrix, hadamard_order, sylvester_matrix
from lowvram_tuner.quant.linear import QuantLinear, quant_linear
from lowvram_tuner.quant.quip import Quip
from lowvram_tuner.quant.registry import quant_format
from lowvram_tuner.quant.spec import QuantError, QuantSpec, Scratch

SHAPES = [(16, 64), (192, 576), (576, 192), (320, 128), (96, 448)]
SCALES = {2: 1.0, 3: 2.04, 4: 3.45}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def rotation(n: int) -> torch.Tensor:
    order = hadamard_order(n)
    return torch.kron(hadamard_matrix(order).double(), sylvester_matrix(n // order).double()) / n**0.5


def random_packed(fmt: Quip, rows: int, columns: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every code is as likely as any other; SU and SV are real numbers, as fine-tuned checkpoints have them."""
    g = torch.Generator().manual_seed(seed)
    packed = {}
    for name, spec in fmt.layout(rows, columns).items():
        if spec.dtype == "float32":
            packed[name] = torch.randn(spec.shape, generator=g) * (0.02 if name == "SU" else 1.0)
        else:
            packed[name] = torch.randint(0, 1 << 16, spec.shape, generator=g).to(getattr(torch, spec.dtype))
    return packed


def oracle(fmt: Quip, packed: dict[str, torch.Tensor]) -> torch.Tensor:
    """W [out, in] in fp64, by the definition."""
    codes = packed["codes"]
    wq = e8p.codebook()[codes.int() & 0xFFFF].double().view(codes.shape[0], -1)
    if "residual" in packed:
        table = e8p.codebook() if fmt.spec.bits == 4 else e8p.residual_codebook()
        wq += table[packed["residual"].int() & 0xFFFF].double().view(codes.shape[0], -1) / fmt.residual_scale
    whole = rotation(wq.shape[0]) @ wq @ rotation(wq.shape[1]).t() * packed["SU"].double()
    first = fmt.spec.part[1]
    return packed["SV"].double()[:, None] * whole[first : first + len(packed["SV"])]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.cpu().double() - want).norm() / want.norm())


@pytest.mark.parametrize("bits", SCALES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantize_is_the_definition(shape, bits):
    fmt = quant_format(QuantSpec("quip", bits))
    packed = random_packed(fmt, *shape)
    out = fmt.dequantize(packed, torch.full(shape, float("nan")))
    assert error(out, oracle(fmt, packed)) < 5e-7  # measured 2.4e-7: fp32 sums of rotations
    assert fmt.residual_scale == SCALES[bits]


@pytest.mark.parametrize("shape", [(192, 576), (576, 192)], ids=str)
def test_dequantize_of_any_rows(shape, monkeypatch):
    from lowvram_tuner.quant import quip

    monkeypatch.setattr(quip, "TILE_BYTES", 4 * shape[0] * 64)  # one unit of columns at a time
    fmt = quant_format(QuantSpec("quip", 2))
    packed = random_packed(fmt, *shape)
    want = oracle(fmt, packed)
    for start, stop in ((0, 1), (5, 50), (shape[0] - 3, shape[0])):
        assert error(fmt.dequantize(packed, torch.empty(stop - start, shape[1]), start), want[start:stop]) < 5e-7


def check_products(shape, bits, dtype, device, limit):
    fmt = quant_format(QuantSpec("quip", bits))
    packed = {name: t.to(device) for name, t in random_packed(fmt, *shape).items()}
    w = oracle(fmt, {name: t.cpu() for name, t in packed.items()})
    g = torch.Generator().manual_seed(5)
    x = torch.randn(37, shape[1], generator=g).to(device, DTYPES[dtype])
    gy = torch.randn(37, shape[0], generator=g).to(device, DTYPES[dtype])
    # A little more than a fifth of the rows: several ragged tiles. Each adds to a sum that is rounded to the dtype, so hundreds
    # of them would lose what no plan's scratch does (fp16 at 4096 rows: 2.9e-3 with 7 rows a tile, 3.6e-4 with 1500).
    scratch = Scratch(shape[1] * max(7, shape[0] // 5 + 3) * DTYPES[dtype].itemsize, device)
    wide = torch.full((37, shape[0] + 24), float("nan"), dtype=x.dtype, device=device)
    y = fmt.forward(x, packed, scratch, wide[:, 16:-8])
    assert error(y, x.cpu().double() @ w.t()) < limit
    assert bool(wide[:, :16].isnan().all())
    assert bool(wide[:, -8:].isnan().all())
    before = torch.randn(37, shape[1], generator=g).to(device, DTYPES[dtype])
    gx = fmt.grad_input(gy, packed, scratch, before.clone())
    assert error(gx, before.cpu().double() + gy.cpu().double() @ w) < limit


@pytest.mark.parametrize("bits", SCALES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_grad_input(shape, bits):
    check_products(shape, bits, "fp32", "cpu", 1e-6)


def test_activations_in_several_parts(monkeypatch):
    from lowvram_tuner.quant import quip

    monkeypatch.setattr(quip, "ROWS_AT_A_TIME", 10)
    check_products((192, 128), 2, "fp32", "cpu", 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", SCALES)
@pytest.mark.parametrize("shape", [*SHAPES, (4096, 4096), (4096, 11008), (14336, 4096)], ids=str)
def test_products_on_the_card(shape, bits, dtype):
    """Limits: about twice what plain torch loses when it rounds W and x to the dtype (fp16 5e-4, bf16 4e-3)."""
    check_products(shape, bits, dtype, "cuda", {"fp32": 2e-6, "fp16": 1.5e-3, "bf16": 1.2e-2}[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("bits", SCALES)
@pytest.mark.parametrize("rows", [1, 5, 32])
def test_few_rows_on_the_card(rows, bits):
    fmt = quant_format(QuantSpec("quip", bits))
    packed = random_packed(fmt, 4096, 14336)
    x = torch.randn(rows, 14336, generator=torch.Generator().manual_seed(0)).to("cuda", torch.float16)
    y = fmt.matmul(x, {name: t.cuda() for name, t in packed.items()}, 4096)
    assert error(y, x.cpu().double() @ oracle(fmt, packed).t()) < 1.5e-3


@pytest.mark.gpu
def test_dequantize_on_the_card_needs_little_memory():
    fmt = quant_format(QuantSpec("quip", 2))
    packed = {name: t.cuda() for name, t in random_packed(fmt, 4096, 14336).items()}
    out = torch.empty(4096, 14336, dtype=torch.float16, device="cuda")
    fmt.dequantize(packed, out)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fmt.dequantize(packed, out)
    assert torch.cuda.max_memory_allocated() - before < 0.6 * out.nbytes
    assert error(out, oracle(fmt, {name: t.cpu() for name, t in packed.items()})) < 1e-3


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_parts_of_a_fused_weight(bits):
    """q, k, v of one fused weight: the same codes, each with its own rows."""
    sizes, columns = (96, 48, 48), 128
    whole = quant_format(QuantSpec("quip", bits))
    packed = random_packed(whole, 192, columns)
    want, first = oracle(whole, packed), 0
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(1))
    scratch = Scratch(1 << 14, "cpu")
    for size in sizes:
        fmt = quant_format(QuantSpec("quip", bits, part=(192, first)))
        part = packed | {"SV": packed["SV"][first : first + size]}
        assert {n: (s.shape, s.dtype) for n, s in fmt.layout(size, columns).items()} == {
            n: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in part.items()
        }
        w = want[first : first + size]
        assert error(fmt.dequantize(part, torch.empty(size, columns)), w) < 5e-7
        assert error(fmt.dequantize(part, torch.empty(7, columns), 9), w[9:16]) < 5e-7
        assert error(fmt.forward(x, part, scratch, torch.empty(5, size)), x.double() @ w.t()) < 1e-6
        gy = torch.randn(5, size, generator=torch.Generator().manual_seed(2))
        assert error(fmt.grad_input(gy, part, scratch, torch.zeros(5, columns)), gy.double() @ w) < 1e-6
        first += size


def test_under_an_adapter_every_gradient_is_right():
    fmt = quant_format(QuantSpec("quip", 2))
    packed = random_packed(fmt, 192, 576)
    layer = QuantLinear(576, 192, fmt)
    layer.bind(packed, Scratch(1 << 16, "cpu"))
    g = torch.Generator().manual_seed(0)
    x, a, b = torch.randn(2, 9, 576, generator=g), torch.randn(4, 576, generator=g), torch.randn(192, 4, generator=g)
    leaves = [t.clone().requires_grad_() for t in (x, a, b)]
    quant_linear(leaves[0], layer, leaves[1], leaves[2], 0.5).square().sum().backward()
    doubles = [t.double().requires_grad_() for t in (x, a, b)]
    w = oracle(fmt, packed)
    y = doubles[0] @ w.t() + 0.5 * (doubles[0] @ doubles[1].t()) @ doubles[2].t()
    y.square().sum().backward()
    for name, got, want in zip(("x", "lora_a", "lora_b"), leaves, doubles):
        assert error(got.grad, want.grad) < 1e-6, name


@pytest.mark.parametrize("bits", [2, 4])
def test_quantize_fills_the_layout_and_nbytes(bits):
    fmt = quant_format(QuantSpec("quip", bits))
    packed = fmt.quantize(torch.randn(96, 128, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0)))
    assert {n: (s.shape, s.dtype) for n, s in fmt.layout(96, 128).items()} == {
        n: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in packed.items()
    }
    assert fmt.nbytes(96, 128) == sum(t.nbytes for t in packed.values()) == 96 * 128 * bits // 8 + 4 * (96 + 128)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4096, 11008), (11008, 4096), (4096, 4096)], ids=str)
def test_work_bytes_on_the_card(shape):
    fmt = quant_format(QuantSpec("quip", 2))
    packed = {name: t.cuda() for name, t in random_packed(fmt, *shape).items()}
    scratch = Scratch(shape[0] * shape[1] * 2, "cuda")
    x, gy = (torch.zeros(512, n, dtype=torch.float16, device="cuda") for n in reversed(shape))
    y, gx = torch.empty_like(gy), torch.zeros_like(x)
    for call in (lambda: fmt.forward(x, packed, scratch, y), lambda: fmt.grad_input(gy, packed, scratch, gx)):
        call()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        assert torch.cuda.max_memory_allocated() - before <= fmt.work_bytes(512, *shape, 2)


def test_layout_needs_no_torch():
    code = (
        "import sys; from lowvram_tuner.quant.registry import quant_format, resolve; "
        "print(quant_format(resolve(2, 'quip')).nbytes(4096, 11008)); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 4096 * 11008 // 4 + 4 * (4096 + 11008)


def test_shapes_and_bits_that_cannot_be_held():
    fmt = quant_format(QuantSpec("quip", 2))
    with pytest.raises(QuantError, match=r"100x64 .* multiples of 16 and 64"):
        fmt.layout(100, 64)
    with pytest.raises(QuantError, match="124"):
        fmt.layout(1984, 64)
    with pytest.raises(QuantError, match="bits=8"):
        quant_format(QuantSpec("quip", 8))
    with pytest.raises(QuantError, match="3-bit"):
        quant_format(QuantSpec("quip", 3)).quantize(torch.zeros(16, 64))
