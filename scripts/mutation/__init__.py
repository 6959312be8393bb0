"""Mutation testing with a fixed list: plausible one-line faults, one at a time, and the tests that must fail."""
