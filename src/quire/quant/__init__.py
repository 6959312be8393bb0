"""Quantisation schemes: the format of each weight of a model. The arithmetic is in `ops`."""
