"""One file for each format in which weights are stored: `WeightSource`s."""
