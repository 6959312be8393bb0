"""One folder per HTTP API: bodies, parser, answers, the shape of its errors and the framing of its streams."""
