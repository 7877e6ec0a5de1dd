"""Floor 0: stop a block of work, and say why.

Tokens, blocks, task groups, threads and processes, and in `loops` all that asyncio and trio do differently. It knows
anyio and the two backends, and of the web only that its errors are ``HTTPException``s. It must not know requests,
servers or frameworks.
"""
