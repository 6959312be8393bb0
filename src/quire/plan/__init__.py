"""What a model will take and how fast it can be, from its configuration alone."""
