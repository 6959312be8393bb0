"""The OpenAI-compatible HTTP server. It is the only room that knows Starlette."""
