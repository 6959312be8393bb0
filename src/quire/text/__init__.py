"""Text: tokenise, apply the chat template, detokenise, find stop strings."""
