"""Calibrated quantisation: the arithmetic on one matrix and its inputs. What runs the model is `build.calibrate`."""
