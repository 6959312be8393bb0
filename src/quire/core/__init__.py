"""The control plane: integers only. No numpy, no torch, no clock, no sockets, by any path."""
