"""Floor 0: stop a block of work, and record the reason.

Tokens, blocks, task groups, threads and processes; `loops` has the differences between asyncio and trio. This floor may
use anyio and the two backends. Of the web it knows only ``HTTPException``, the base class of its errors: no requests,
no servers, no frameworks.
"""
