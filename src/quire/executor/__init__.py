"""Carries a plan to whoever computes it, and the result back."""
