"""The core in its own process: supervised, and replaced without loss when it dies. This folder can be deleted."""
