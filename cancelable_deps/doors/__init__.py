"""Floor 3: the ways into an application.

Dependencies, decorator, middleware, route class, streaming response, WebSocket and lifespan: what users import. They may
use all floors below. They must not depend on `testing`, and leave to `request` what happens to a request.
"""
