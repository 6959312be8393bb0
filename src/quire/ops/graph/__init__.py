"""A model's step as data: traced once, rewritten by passes, given memory, run in one native call."""
