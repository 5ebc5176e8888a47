from collections.abc import Iterator
from typing import Any

import pytest

from tests.kernels.implementations import DEVICE, IMPLEMENTATIONS, name_of


@pytest.fixture(scope="package", autouse=True)
def _interpreted() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        yield


@pytest.fixture(params=IMPLEMENTATIONS, ids=name_of)
def implementation(request: pytest.FixtureRequest) -> Any:
    """`reference` and `fused`, which offer the same functions."""
    return request.param
