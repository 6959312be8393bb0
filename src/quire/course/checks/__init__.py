"""The checks, a module for each exercise: its `CHECKS` in the order in which they are run."""
