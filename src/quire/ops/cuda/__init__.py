"""The operations on NVIDIA GPUs: arrays are torch tensors, the work is Triton's. `pip install quire[cuda]`."""
