"""Why the GPU of a machine cannot be used, in one line for people."""

from typing import Any

LEAST_TORCH = (2, 9)
LEAST_CAPABILITY = (8, 0)
"""Ampere: the first with GEMMs of bfloat16."""


def obstacle(torch: Any, triton_driver: Any) -> str | None:
    """What stands in the way of device "cuda", if anything does.

    Args:
        torch: the module.
        triton_driver: `triton.runtime.driver`, which finds out about the device when it is first asked.
    """
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2] if part.isdigit())
    if found < LEAST_TORCH:
        return f"torch is {torch.__version__}; {'.'.join(map(str, LEAST_TORCH))} or newer is needed"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install one that is, from pytorch.org"
    if not torch.cuda.is_available():
        hint = f"is there a driver for CUDA {torch.version.cuda}?"
        return f"torch {torch.__version__} finds no NVIDIA GPU that it can use ({hint})"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < LEAST_CAPABILITY:
        name, least = torch.cuda.get_device_name(), ".".join(map(str, LEAST_CAPABILITY))
        return f"{name} has compute capability {major}.{minor}; {least} or newer is needed"
    try:
        triton_driver.active.get_current_target()
    except Exception as error:  # noqa: BLE001 -- whatever its small build in C runs into: no compiler, no headers
        return f"Triton cannot be used here: {str(error).partition(chr(10))[0] or type(error).__name__}"
    return None
