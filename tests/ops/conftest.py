import pytest

from quire.ops.cpu import CpuOps
from quire.ops.select import instruction_sets


@pytest.fixture(scope="session", params=instruction_sets())
def cpu(request: pytest.FixtureRequest) -> CpuOps:
    """The native provider, for every instruction set that this processor runs."""
    return CpuOps(2, request.param)
