"""Quantised Hugging Face checkpoints (GPTQ, AWQ, compressed-tensors, fp8) as one `WeightSource`."""
