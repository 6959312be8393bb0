"""Models over the operations: an architecture is data (`spec`), one decoder computes it (`decoder`)."""
