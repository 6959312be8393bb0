"""Every door of a server, in one table: whoever starts, describes or attacks a server takes it from here.

The first has errors that belong to none; where two have a route for one path and method, the one that stands first.
"""

from quire.server.doors.openai.routes import OPENAI
from quire.server.http.context import Api

DOORS: tuple[Api, ...] = (OPENAI,)
