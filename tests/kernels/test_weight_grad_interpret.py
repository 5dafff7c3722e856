"""masked_weight_grad's Triton path in the interpreter, against the dense gradient in float64.

bf16 is left to ahead-of-time compilation and GPUs: the interpreter truncates where GPUs round.
"""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrank.kernels.common.launch import INTERPRETED, plan_launches, pretend
from fastrank.kernels.packing import SparseMask, draws, launch_grad
from fastrank.kernels.packing.fused import join_seed
from fastrank.kernels.packing.fused_grad import _word_of, masked_gradient_kernel
from fastrank.kernels.packing.launch_grad import Tile
from fastrank.kernels.packing.overlay import places_of
from fastrank.kernels.packing.sparse_linear import sparse_linear
from fastrank.kernels.packing.weight_grad import masked_weight_grad

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned_empty")]

F64, F32, FP16 = torch.float64, torch.float32, torch.float16
CPU = torch.device("cpu")
SMALL = Tile(16, 32, 16, 2, 4, 2)


def operands(M: int, N: int, K: int, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(M + N + K)
    return tuple(torch.randn(M, n, generator=g, dtype=F64).to(dtype) for n in (N, K))


def dense(dy: Tensor, x: Tensor, mask: SparseMask) -> Tensor:
    return (dy.to(F64).t() @ x.to(F64)).reshape(-1)[mask.positions()]


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.to(F64) - exact).norm() / exact.norm())


def gradient(dy: Tensor, x: Tensor, mask: SparseMask, tile: Tile | None = SMALL) -> Tensor:
    return launch_grad.masked_gradient(dy, x, places_of(mask, CPU), tile)


@pytest.mark.parametrize(
    ("density", "dtype", "tile"),
    [
        (0.01, F32, SMALL),
        (0.2, FP16, SMALL),
        (1.0, F32, SMALL),
        (0.2, F32, None),
        (0.01, FP16, None),
    ],
    ids=["0.01-fp32", "0.2-fp16", "1-fp32", "0.2-fp32-chosen", "0.01-fp16-chosen"],
)
@pytest.mark.parametrize("scheme", ["stratified", "bernoulli"])
def test_equals_the_dense_gradient_at_the_mask(density, scheme, dtype, tile):
    mask = SparseMask((45, 53), density, seed=(1 << 63) + 5, tensor_id="w", scheme=scheme)
    dy, x = operands(37, 45, 53, dtype)
    assert error(gradient(dy, x, mask, tile), dense(dy, x, mask)) < 1e-6


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (33, 16), (32, 17), (5, 199)])
@pytest.mark.parametrize("scheme", ["stratified", "bernoulli"])
def test_shapes(scheme, shape):
    """Strata that end in another row, tile or column than they begin in, and a short last one."""
    for density in (1 / 7, 1 / 300):
        mask = SparseMask(shape, density, tensor_id=str(shape), scheme=scheme)
        dy, x = operands(19, *shape)
        got = gradient(dy, x, mask) if mask.nnz else torch.empty(0)
        assert got.shape == (mask.nnz,)
        assert torch.allclose(got.to(F64), dense(dy, x, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", ["stratified", "bernoulli"])
def test_rows_split_over_programs(scheme):
    """Parts are packed and added up in a fixed order, so twice gives the same bits."""
    mask = SparseMask((40, 30), 0.1, scheme=scheme)
    dy, x = operands(210, 40, 30)
    grids = []

    def note(kernel, grid, arguments):
        grids.append(grid)
        kernel[grid](**arguments)

    with pretend(INTERPRETED._replace(units=64)), plan_launches(note):
        first, second = gradient(dy, x, mask), gradient(dy, x, mask)
    assert grids[0] == (4, 3)
    assert error(first, dense(dy, x, mask)) < 1e-6
    assert torch.equal(first, second)
    assert error(gradient(dy, x, mask), dense(dy, x, mask)) < 1e-6


def test_any_strides():
    mask = SparseMask((40, 30), 0.1)
    dy, x = operands(50, 40, 30)
    expected = gradient(dy, x, mask)
    for other in (dy.t().contiguous().t(), torch.cat([dy, dy], 1)[:, :40]):
        assert torch.equal(gradient(other, x, mask), expected)
    for other in (x.t().contiguous().t(), torch.stack([x, -x], 1).flatten(0, 1)[::2]):
        assert torch.equal(gradient(dy, other, mask), expected)
    ones = torch.ones(()).expand(50, 40)
    assert error(gradient(ones, x, mask), dense(ones, x, mask)) < 1e-6


def test_offsets_are_64_bit(tmp_path):
    """Rows 2**30 elements apart, in a sparse file: the last starts beyond what int32 can count."""
    step = 2**30
    sparse = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * step + 64, dtype=FP16)
    mask = SparseMask((40, 30), 0.1)
    dy, x = operands(4, 40, 30, FP16)
    expected = gradient(dy, x, mask)
    far = sparse.as_strided((4, 30), (step, 1)).copy_(x)
    assert torch.equal(gradient(dy, far, mask), expected)
    far = sparse.as_strided((4, 40), (step, 1)).copy_(dy)
    assert torch.equal(gradient(far, x, mask), expected)


@pytest.mark.parametrize("where", [(3, 5), (39, 29)])
def test_a_nan_stays_in_its_row_and_column(where):
    mask = SparseMask((40, 30), 0.3)
    dy, x = operands(50, 40, 30)
    clean = gradient(dy, x, mask)
    row, column = mask.positions() // 30, mask.positions() % 30
    dy[7, where[0]], x[8, where[1]] = torch.nan, torch.inf
    got = gradient(dy, x, mask)
    hit = (row == where[0]) | (column == where[1])
    assert hit.any()
    assert not got[hit].isfinite().any()
    assert torch.equal(got[~hit], clean[~hit])


@triton.jit
def words_kernel(out_ptr, j_ptr, low, high, c2, c3):
    o = tl.arange(0, 16)
    word = _word_of(join_seed(low, high), c2, c3, tl.load(j_ptr + o))
    tl.store(out_ptr + o, word.to(tl.int64))


def test_words_of_the_mask_are_drawn_for_any_item():
    """Beyond 2**32 blocks as well."""
    items = torch.arange(16) * 5 + (1 << 34) - 20
    source = draws.stream((1 << 64) - 3, "layer", draws.MASK, 9)
    out = torch.empty(16, dtype=torch.int64)
    as_int32 = [w - (1 << 32) if w >= 1 << 31 else w for w in (*source.key, source.c2, source.c3)]
    words_kernel[(1,)](out, items, *as_int32)
    assert torch.equal(out, draws.words_at(source, items))


def test_the_public_functions_take_this_path():
    mask = SparseMask((24, 20), 0.1)
    dy, x = operands(30, 24, 20)
    seen = []

    def note(kernel, grid, arguments):
        seen.append(kernel)
        kernel[grid](**arguments)

    with plan_launches(note):
        got = masked_weight_grad(dy.view(3, 10, 24), x.view(3, 10, 20), mask, backend="triton")
        weight, values = torch.randn(24, 20), torch.zeros(mask.nnz, requires_grad=True)
        y = sparse_linear(x, weight, None, values, mask, backend="triton")
        y.backward(dy)
    assert seen == [masked_gradient_kernel] * 2
    assert error(got, dense(dy, x, mask)) < 1e-6
    assert torch.equal(values.grad, got)
