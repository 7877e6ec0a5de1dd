"""The event loops: a protocol, its implementations for asyncio, trio and worker threads, and their cancel scopes.

Private parts of asyncio, trio and anyio are used here and nowhere else in the kernel. If they are not as expected, the
files named ``public_...`` do the same by public API.
"""
