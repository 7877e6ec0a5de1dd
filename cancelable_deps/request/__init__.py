"""Floor 2: one request or WebSocket, whichever door it has come in by.

Its state, its reader, its blocks, its response and its end. It may use the kernel and the hosts. It must not know how an
application is given a door: no decorators, no dependencies, no signatures.
"""
