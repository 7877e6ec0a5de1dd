"""The lowest layer: stop a block of work, and record the reason.

It has tokens, blocks, task groups, threads and processes; the differences between asyncio and trio are in `loops`. It
uses anyio and the two backends. Of the web it knows only ``HTTPException``, the base class of its errors. It must not
know requests, servers or frameworks.
"""
