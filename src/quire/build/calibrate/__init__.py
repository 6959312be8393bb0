"""Calibration: the model walked once over a text, each matrix quantised where the walk meets it."""
