"""Floor 2: one request or WebSocket, whichever door covers it.

Its state, its reader, its blocks, its response and its end. This floor may use the kernel and the hosts. It must not know
how a door is added to an application: no decorators, no dependencies, no signatures.
"""
