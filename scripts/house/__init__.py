"""The laws of the house, checked by reading the tree: `scripts/check` runs them, tests/law tests them."""
