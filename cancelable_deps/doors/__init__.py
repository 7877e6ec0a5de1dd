"""Floor 3: the doors, the ways in which an application gets cancellation.

Decorator, dependencies, middleware, route class, streaming responses, WebSockets and lifespan: the names that users
import. This floor may use all floors below, but not `testing`. It leaves to `request` how a request is run and stopped.
"""
