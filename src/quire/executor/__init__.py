"""Carries a plan to the runner, and the result back."""
