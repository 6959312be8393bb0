"""Puts an engine together: the core, the text side, and both in one process or two."""
