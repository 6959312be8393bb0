"""What an engine did, read from its step records: metrics, explanations, traces. This folder can be deleted."""
