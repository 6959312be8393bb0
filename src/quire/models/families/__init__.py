"""One short file for each family: `config.json` -> `DecoderSpec`, and the names of its tensors."""
