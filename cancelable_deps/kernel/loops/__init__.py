"""The event loops: a protocol, its implementations for asyncio and trio, and one for worker threads without a loop.

Private parts of asyncio, trio and anyio are used here and nowhere else in the kernel.
"""
