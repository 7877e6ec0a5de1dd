"""How a handler does its work behind a door: as a dependency that gives it a `Runner`, so that one handler serves all."""

from collections.abc import Awaitable, Callable

from fastapi import Response

from cancelable_deps import RequestTaskGroup

Work = Callable[[], Awaitable[Response]]
Runner = Callable[[Work], Awaitable[Response]]


async def run_plainly() -> Runner:
    return lambda work: work()


async def run_in_group(get_task_group: RequestTaskGroup) -> Runner:
    async def run(work: Work) -> Response:
        responses: list[Response] = []

        async def child() -> None:
            responses.append(await work())

        async with get_task_group() as tg:
            tg.start_soon(child)
        return responses[0]

    return run
