"""Formats of quantised weights: what becomes of each weight of a model. The arithmetic is the operations' (`ops`)."""
