"""The only layer that knows a device: plans in, arrays through the model, results out."""
