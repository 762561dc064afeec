import pytest

from mpicomp.compression import QSGD, Cast, HardThreshold, RandomBlock, RandomK, TopK
from mpicomp.errors import ConfigError


@pytest.mark.parametrize("ratio", [0, -0.1, 1.5, float("nan")])
@pytest.mark.parametrize("kind", [TopK, RandomK, RandomBlock])
def test_ratio(kind, ratio):
    with pytest.raises(ConfigError, match=r"compression.ratio = .* must be in \(0, 1\]: it is the fraction of entries"):
        kind(ratio=ratio)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HardThreshold(threshold=0.0), "compression.threshold = 0.0 must be a finite number > 0"),
        (lambda: QSGD(bits=9), r"compression.bits = 9 must be in 1\.\.\.8"),
        (lambda: Cast(dtype="float8"), "compression.dtype = 'float8' must be 'float16' or 'bfloat16'"),
    ],
)
def test_other_numbers(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
