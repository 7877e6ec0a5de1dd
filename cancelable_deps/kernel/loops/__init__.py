"""The event loops: one protocol, asyncio and trio behind it, and the loop of a worker thread that has none.

The private parts of asyncio, trio and anyio stand here and nowhere else in the kernel.
"""
