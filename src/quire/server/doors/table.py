"""The doors of a server: every HTTP API that it speaks. The first gives errors outside of all of them their shape."""

from quire.server.doors.anthropic.routes import ANTHROPIC
from quire.server.doors.ollama.routes import OLLAMA
from quire.server.doors.openai.routes import OPENAI
from quire.server.http.context import Api

DOORS: tuple[Api, ...] = (OPENAI, ANTHROPIC, OLLAMA)
