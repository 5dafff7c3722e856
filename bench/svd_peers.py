"""Other libraries' SVDs for `fastrank bench svd`, each called as its authors intend.

They get a case's matrices in their own form, made before the clock starts: SciPy's sparse matrices
or linear operators, NumPy, JAX or CuPy arrays. Those that use NumPy's or SciPy's BLAS get as many
threads as torch has, where threadpoolctl (which scikit-learn needs) can say so; a BLAS that spins
with more threads than there are free cores is a hundred times slower.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastrank.bench.cases import Unavailable

if TYPE_CHECKING:
    from fastrank.bench.svd_cases import SvdOperands

Triple = tuple[Tensor, Tensor, Tensor]  # U [G, N, r], S [G, r], Vh [G, r, K]


def sklearn(given: SvdOperands) -> Callable[[], Triple]:
    """scikit-learn's randomized_svd with its defaults, on SciPy's sparse form if there is one."""
    _need("sklearn", "scikit-learn is not installed (pip install 'fastrank[peers]')")
    from sklearn.utils.extmath import randomized_svd

    matrices = _sparse(given) if given.case.kind == "sparse" else list(_numpy(given))
    _threads_of_torch()

    def run() -> Triple:
        return _stacked(randomized_svd(one, given.case.R, random_state=0) for one in matrices)

    return run


def scipy_svds(given: SvdOperands) -> Callable[[], Triple]:
    """SciPy's svds (ARPACK) with its defaults: sparse matrices, sums of thin products as linear
    operators, dense ones as they are. Every run starts from the same vector."""
    _need("scipy", "SciPy is not installed (pip install 'fastrank[peers]')")
    from scipy.sparse.linalg import svds

    case = given.case
    forms = {"sparse": _sparse, "factored": _operators, "dense": lambda given: list(_numpy(given))}
    matrices = forms[case.kind](given)
    start = np.ones(min(case.N, case.K), dtype=np.float32)
    _threads_of_torch()

    def run() -> Triple:
        found = (svds(one, k=case.R, v0=start) for one in matrices)
        # singular values come in ascending order
        return _stacked((U[:, ::-1], S[::-1], Vh[::-1]) for U, S, Vh in found)

    return run


def jax(given: SvdOperands) -> Callable[[], Triple]:
    """jnp.linalg.svd of the dense batch, compiled by jax.jit, waited for, cut off."""
    _need("jax", "JAX is not installed (pip install jax)")
    import jax
    import jax.numpy as jnp

    r, dense = given.case.R, jax.device_put(_numpy(given), jax.devices("cpu")[0])
    decompose = jax.jit(functools.partial(jnp.linalg.svd, full_matrices=False))
    _threads_of_torch()

    def run() -> Triple:
        U, S, Vh = map(torch.from_dlpack, jax.block_until_ready(decompose(dense)))
        return U[:, :, :r], S[:, :r], Vh[:, :r]

    return run


def cupy(given: SvdOperands) -> Callable[[], Triple]:
    """CuPy's linalg.svd of the dense batch, cut off; on the stream that torch works on."""
    _need("cupy", "CuPy is not installed (pip install cupy-cuda12x)")
    import cupy

    r, dense = given.case.R, cupy.from_dlpack(given.dense)

    def run() -> Triple:
        U, S, Vh = map(torch.from_dlpack, cupy.linalg.svd(dense, full_matrices=False))
        return U[:, :, :r], S[:, :r], Vh[:, :r]

    return run


ON_CPU: Mapping[str, Callable] = {"sklearn": sklearn, "scipy-svds": scipy_svds, "jax": jax}
ON_GPU: Mapping[str, Callable] = {"cupy": cupy}


def _need(module: str, reason: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise Unavailable(reason)


def _numpy(given: SvdOperands) -> np.ndarray:
    return given.dense.cpu().numpy()  # [G, N, K]


def _sparse(given: SvdOperands) -> list[Any]:
    from scipy.sparse import csr_matrix

    return [csr_matrix(one) for one in _numpy(given)]


def _operators(given: SvdOperands) -> list[Any]:
    """B diag(w) A of each matrix, which is never formed."""
    from scipy.sparse.linalg import aslinearoperator

    operand = given.operand
    left = (operand.B * operand.weights).cpu().numpy()
    return [aslinearoperator(b) * aslinearoperator(a)
            for b, a in zip(left, operand.A.cpu().numpy(), strict=True)]  # fmt: skip


def _stacked(found: Iterable[tuple[np.ndarray, ...]]) -> Triple:
    parts = zip(*found, strict=True)
    return tuple(torch.from_numpy(np.stack(part)) for part in parts)


def _threads_of_torch() -> None:
    if importlib.util.find_spec("threadpoolctl") is not None:
        from threadpoolctl import threadpool_limits

        threadpool_limits(torch.get_num_threads(), user_api="blas")
