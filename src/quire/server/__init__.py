"""The HTTP server. It is the only package that knows Starlette."""
