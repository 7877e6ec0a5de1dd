"""Floor 1: knowledge of other software that is not part of its public API.

The private names of Starlette, FastAPI and the servers, and the handling of debuggers and signals. Each private name has
its reason beside it, and a test that notices a change. This floor may use the kernel. It must not know request states or
doors: it answers questions about scopes, tasks, routes and ``receive()`` functions.
"""
