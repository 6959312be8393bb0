"""From logits to tokens: edits of the logits, then the draw, each feature keeping its own state by row."""
