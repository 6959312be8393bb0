"""What is always true, said aloud."""


def require(holds: bool, statement: str) -> None:
    """Raise AssertionError when an invariant does not hold: a fault of the engine, never of a user."""
    if not holds:
        raise AssertionError(f"broken invariant: {statement}")
