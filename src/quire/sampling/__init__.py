"""From logits to tokens: injected features edit the logits, the sampler chooses; each keeps its own state by row."""
