"""Floor 1: facts about other software that are not part of its public API.

Private names of Starlette, FastAPI and the servers, debuggers and signals. Each private name has its reason beside it,
and a test that notices a change. This floor may use the kernel. It answers questions about scopes, tasks, routes and
``receive()`` functions, and must not know requests or doors.
"""
