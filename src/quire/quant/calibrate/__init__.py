"""Calibrated quantisation: the arithmetic on one matrix and what its inputs were. What runs the model is `build.calibrate`."""
