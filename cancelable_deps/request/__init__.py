"""Floor 2: one request or WebSocket, whichever doors cover it.

Its first door and its state, its reader, its blocks, its response and its end, and all requests in flight. This floor
may use the kernel and the hosts. It must not know how a door is put into an application: no decorators, no
dependencies, no signatures.
"""
