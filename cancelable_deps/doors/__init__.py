"""Floor 3: the doors, by which an application gets cancellation.

Dependencies, decorator, middleware, route class, streaming response, WebSocket and lifespan: the names that users import.
This floor may use all floors below. It must not depend on `testing`. How a request is run and stopped is the job of
`request`.
"""
