"""Eigenvalues at the ends of the spectrum of large matrices, by the Lanczos and Arnoldi iterations of ARPACK."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mpicomp.topology.sparse import SparseMatrix

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

Product: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""A linear map from a vector (size,) to another."""

ACCURACY = 1e-10
"""The relative error at which an iteration ends."""

BASIS = 40
"""How many vectors the iterations keep."""

RESTARTS = 50
"""After how many restarts the iteration gives way to one with a factorized matrix, which long chains need."""

SHIFT = 1e-6
"""How far from the end of the spectrum the shift of that iteration lies."""


def extremes(matrix: SparseMatrix) -> tuple[float, float]:
    """Return the second largest and the smallest eigenvalue of a symmetric matrix whose rows sum to one."""
    from scipy.sparse.linalg import ArpackNoConvergence

    size = matrix.size
    try:
        # The largest eigenvalue, 1, becomes -1, so that the second one is the largest.
        second = largest(lambda x: matrix.times(x) - 2 * x.mean(), size, RESTARTS)
    except ArpackNoConvergence:
        second = _nearest(matrix, 1 + SHIFT)
    try:
        last = -largest(lambda x: -matrix.times(x), size, RESTARTS)
    except ArpackNoConvergence:
        # All eigenvalues lie in the circles of Gershgorin around the diagonal.
        last = _nearest(matrix, 2 * float(matrix.diagonal().min()) - 1 - SHIFT)
    return second, last


def largest(product: Product, size: int, restarts: int | None = None) -> float:
    """Return the largest eigenvalue of a symmetric map.

    Raises:
        ArpackNoConvergence: after this number of restarts; by default ten times `size`.

    """
    from scipy.sparse.linalg import eigsh

    found = eigsh(_operator(product, size), k=1, which="LA", maxiter=restarts, **_options(size))
    return float(found[0])


def second_modulus(product: Product, size: int) -> float:
    """Return the modulus of the eigenvalue second in modulus."""
    from scipy.sparse.linalg import eigs

    found = eigs(_operator(product, size), k=2, which="LM", **_options(size))
    return float(np.sort(np.abs(found))[0])


def _nearest(matrix: SparseMatrix, shift: float) -> float:
    """Return the eigenvalue nearest to `shift`, which lies beyond an end of the spectrum, but for that of the mean."""
    from scipy.sparse import csc_array, eye_array
    from scipy.sparse.linalg import eigsh, splu

    size = matrix.size
    # CSR of a matrix is CSC of the transposed one, and this one is symmetric.
    columns = csc_array((matrix.values, matrix.indices, matrix.indptr), shape=(size, size))
    inverse = splu(columns - shift * eye_array(size, format="csc"))

    def product(x: np.ndarray) -> np.ndarray:
        solved: np.ndarray = inverse.solve(x - x.mean())
        centered: np.ndarray = solved - solved.mean()
        return centered

    found = eigsh(_operator(product, size), k=1, which="LM", **_options(size))
    return shift + 1 / float(found[0])


def _operator(product: Product, size: int) -> LinearOperator:
    from scipy.sparse.linalg import LinearOperator

    return LinearOperator((size, size), matvec=lambda x: product(x.ravel()), dtype=np.float64)


def _options(size: int) -> dict[str, Any]:
    # All ranks start from the same vector, so that they find the same figure.
    start = np.random.Generator(np.random.PCG64(0)).standard_normal(size)
    return {"v0": start, "tol": ACCURACY, "ncv": BASIS, "return_eigenvectors": False}
