"""OpenAI's text API, with vLLM's fields beside it."""
