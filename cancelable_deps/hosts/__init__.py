"""Floor 1: what we know of others that they do not promise.

Private names of Starlette, FastAPI and the servers, debuggers and signal handlers, each with the reason for it and the
test that notices a change. It may use the kernel. It must not know what a request state or a door is: it answers
questions about scopes, tasks, routes and ``receive()`` functions.
"""
