"""Rotations: the matrices, the plain-torch reference and the kernel against dense fp64 products, both directions."""

from __future__ import annotations

import json
import os

import pytest
import torch

from kernels import hadamard
from kernels.hadamard_matrices import hadamard_matrix, hadamard_order, sylvester_matrix

# Every order of QuIP#'s table that is included, with the dimensions of real models that use it.
SIZES = {
    576: 36, 1536: 12, 4096: 1, 5120: 20, 11008: 172, 13824: 108, 14336: 28, 6656: 52, 17920: 140, 8192: 1, 22016: 172, 28672: 28,
    12288: 12, 19968: 156, 15360: 60, 14848: 116, 192: 12, 960: 60, 8960: 140,
}  # fmt: skip
OWN_SIZES = {5632: 44, 4864: 76, 18944: 148, 17408: 68, 25600: 200}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Relative RMS error against fp64: a 16-bit result's own rounding is 2.9e-4 (fp16) for the two roundings of a size with a
# dense factor and 2.1e-4 for one rounding; fp32 measured at most 2.8e-7 on the CPU and,
# since tensor cores cut off what does not fit their sums, 8.1e-7 on a card.
LIMIT = {"fp32": 6e-7, "fp16": 4e-4, "bf16": 3.2e-3}
LIMIT_CARD = LIMIT | {"fp32": 1.2e-6}


@pytest.fixture
def interpreted() -> None:
    """The kernels run on the CPU; `gpu` tests run the same cases where there is a card."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the kernels are not interpreted here")


def dense(n: int) -> torch.Tensor:
    """U_n in fp64, by its definition."""
    order = hadamard_order(n)
    return torch.kron(hadamard_matrix(order).double(), sylvester_matrix(n // order).double()) / n**0.5


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("n", sorted(SIZES | OWN_SIZES))
def test_order_and_orthogonality(n):
    order = hadamard_order(n)
    assert order == (SIZES | OWN_SIZES)[n]
    h = hadamard_matrix(order)
    assert set(h.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(h @ h.t(), order * torch.eye(order))


@pytest.mark.parametrize("order", [52, 116, 156, 172])
def test_williamson_matrices_are_the_published_ones(order, shared_dir):
    known = json.loads((shared_dir / "data" / "hadamard_blocks.json").read_text())["orders"][str(order)]
    first = {name: torch.tensor([1.0 if c == "+" else -1.0 for c in row]) for name, row in known["first_rows"].items()}
    n = order // 4
    h = hadamard_matrix(order)
    for i, line in enumerate(known["layout"]):
        for j, name in enumerate(line):
            block = h[i * n : i * n + n, j * n : j * n + n]
            for k in range(n):
                assert torch.equal(block[k], first[name.lstrip("-")].roll(k) * (-1 if name.startswith("-") else 1))


def test_paley_matrices_by_their_rules():
    h = hadamard_matrix(12)
    squares = {i * i % 11 for i in range(1, 11)}
    assert h[0].tolist() == [1.0] + [-1.0] * 11
    assert h[:, 0].tolist() == [1.0] * 12
    for i in range(11):
        for j in range(11):
            assert h[i + 1, j + 1] == (1 if i == j or (i - j) % 11 in squares else -1), (i, j)
    h = hadamard_matrix(28)  # first row of the second kind: border, then the identity of the sign blocks
    assert h[0].tolist() == [1.0] * 14 + [-1.0] + [1.0] * 13
    assert h[14].tolist() == [-1.0] + [1.0] * 13 + [-1.0] * 14


@pytest.mark.parametrize("n", [1984, 3968])
def test_order_124_is_refused(n):
    with pytest.raises(ValueError, match="124"):
        hadamard_order(n)


def test_size_without_a_matrix_is_refused():
    with pytest.raises(ValueError, match="26 has no known"):
        hadamard_order(26)


@pytest.mark.parametrize("transposed", [False, True], ids=["U", "Ut"])
@pytest.mark.parametrize("n", [24, 192, 576, 1536, 2048, 5632])
def test_reference_is_the_dense_product(n, transposed):
    x = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    u = dense(n)
    assert error(hadamard.reference(x, transposed), x @ (u if transposed else u.t())) < 1e-14


@pytest.mark.parametrize("n", [576, 11008, 14336])
def test_rotating_back_gives_the_input(n):
    x = torch.randn(2, n, generator=torch.Generator().manual_seed(1))
    assert error(hadamard.rotate(hadamard.rotate(x), transposed=True), x.double()) < 1e-6


def check_kernel(n: int, dtype: str, transposed: bool, scaled: str, rows: int, device: str) -> None:
    g = torch.Generator().manual_seed(n)
    x = torch.randn(rows, n + 8, generator=g).to(device, DTYPES[dtype])[:, :n]  # strided rows
    vector = torch.randn(n, generator=g).to(device)
    pre, post = (vector if scaled == "pre" else None), (vector if scaled == "post" else None)
    out = torch.full((rows, n + 8), float("nan"), dtype=x.dtype, device=device)[:, :n]
    if scaled == "post":
        out.fill_(0.5)
    want = x.double() if pre is None else x.double() * pre
    want = hadamard.reference(want, transposed)
    if post is not None:
        want = want * post + 0.5
    got = hadamard.rotate_with_kernel(x, transposed, pre, post, out, add=scaled == "post")
    assert got is out
    assert error(got, want) < (LIMIT if device == "cpu" else LIMIT_CARD)[dtype]


@pytest.mark.parametrize("scaled", ["plain", "pre", "post"])
@pytest.mark.parametrize("transposed", [False, True], ids=["U", "Ut"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("n", [64, 256, 576, 1536, 4096, 11008])
def test_kernel_interpreted(n, dtype, transposed, scaled, interpreted):
    check_kernel(n, dtype, transposed, scaled, 3, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("scaled", ["plain", "pre", "post"])
@pytest.mark.parametrize("transposed", [False, True], ids=["U", "Ut"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", sorted(SIZES | OWN_SIZES))
def test_kernel_on_the_card(n, dtype, transposed, scaled):
    check_kernel(n, dtype, transposed, scaled, 70, "cuda")


def test_result_may_replace_the_input(interpreted):
    for n in (576, 512):
        x = torch.randn(5, n, generator=torch.Generator().manual_seed(0))
        want = hadamard.rotate(x)
        assert hadamard.rotate_with_kernel(x, False, None, None, x, False) is x
        assert torch.allclose(x, want, atol=2e-6, rtol=0)


def test_strided_columns_are_refused(interpreted):
    with pytest.raises(ValueError, match="contiguous rows"):
        hadamard.rotate_with_kernel(torch.zeros(2, 128)[:, ::2], False, None, None, torch.zeros(2, 64), False)
