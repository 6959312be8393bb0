"""HTTP as every API needs it: bodies, keys, limits, errors, streams, probes. It knows no API by name."""
