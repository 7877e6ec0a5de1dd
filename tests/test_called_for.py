"""FastAPI tells a decorated function its request, by no argument that anybody sees."""

import functools
import gc
import logging
import time
import weakref
from collections.abc import Callable
from typing import Annotated, Any

import anyio
import fastapi.routing
import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, WebSocket
from fastapi.dependencies.utils import get_dependant
from fastapi.routing import APIRoute, APIWebSocketRoute
from starlette.applications import Starlette
from starlette.routing import Route

from cancelable_deps import Cancelable, RequestCancelationMiddleware, current_cancelable, with_cancelation
from cancelable_deps.hosts.route_handlers import KEYWORD, TARGET_ATTRIBUTE, Target, _calling, _is_asked, is_told
from cancelable_deps.kernel.cancelable import block_of
from cancelable_deps.request.state import SCOPE_KEY
from cancelable_deps.request.websocket import SocketDoorBlock
from tests import asgi
from tests.calls import checked_socket, get, hang_up, running
from tests.leftovers import nothing_left

pytestmark = pytest.mark.anyio


def passing_on(function: Any) -> Any:
    """A decorator that is between FastAPI and ours, and keeps what it was called with."""

    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        wrapper.seen.append((args, kwargs))  # type: ignore[attr-defined]
        return await function(*args, **kwargs)

    wrapper.seen = []  # type: ignore[attr-defined]
    return wrapper


def directly(function: Any) -> Any:
    return function


between = pytest.mark.parametrize("between", [directly, passing_on], ids=["directly", "below another"])


async def forever(n: int = 0) -> None:
    await anyio.sleep_forever()


def forever_in_steps(n: int = 0) -> None:
    block = current_cancelable()
    assert block is not None
    while True:
        block.check()
        time.sleep(0.001)


@pytest.mark.parametrize("function", [forever, forever_in_steps])
@between
async def test_the_endpoint_of_a_route(between: Any, function: Any) -> None:
    app = FastAPI()
    endpoint = app.get("/{n}")(between(with_cancelation(function)))
    async with nothing_left():
        call = await hang_up(app, "/3")
    assert (call.status, call.most_readers) == (499, 1)
    assert getattr(endpoint, "seen", [((), {"n": 3})]) == [((), {"n": 3})]


@between
async def test_a_route_of_a_router_in_a_router_in_a_mounted_application(between: Any) -> None:
    inner, outer, app, main = APIRouter(), APIRouter(), FastAPI(), FastAPI()
    inner.get("/forever")(between(with_cancelation(forever)))
    outer.include_router(inner, prefix="/inner")
    app.include_router(outer, prefix="/outer")
    app.include_router(inner, prefix="/again")
    main.mount("/app", app)
    for path in ("/app/outer/inner/forever", "/app/again/forever"):
        assert (await hang_up(main, path)).status == 499


@pytest.mark.parametrize("where", ["parameter", "route", "router", "application", "below"])
@between
async def test_a_dependency(between: Any, where: str) -> None:
    dependency = Depends(between(with_cancelation(forever)))

    async def below(value: Annotated[None, dependency]) -> None: ...

    async def endpoint() -> None: ...

    async def with_parameter(value: Annotated[None, dependency]) -> None: ...

    async def with_one_below(value: Annotated[None, Depends(below)]) -> None: ...

    router = APIRouter(dependencies=[dependency] * (where == "router"))
    endpoints: dict[str, Any] = {"parameter": with_parameter, "below": with_one_below}
    router.get("/", dependencies=[dependency] * (where == "route"))(endpoints.get(where, endpoint))
    app = FastAPI(dependencies=[dependency] * (where == "application"))
    app.include_router(router)
    async with nothing_left():
        call = await hang_up(app)
    assert (call.status, call.most_readers) == (499, 1)


@between
async def test_a_dependency_of_a_websocket(between: Any) -> None:
    app = FastAPI()
    blocks: list[Cancelable | None] = []

    async def dependency() -> None:
        blocks.append(current_cancelable())

    @app.websocket("/")
    async def endpoint(
        websocket: WebSocket, value: Annotated[None, Depends(between(with_cancelation(dependency)))]
    ) -> None:
        await websocket.accept()
        await websocket.close()

    async with checked_socket(app):
        pass
    assert [type(block_of(block)) for block in blocks if block is not None] == [SocketDoorBlock]


@between
async def test_requests_that_run_side_by_side_are_told_apart(between: Any) -> None:
    app = FastAPI()
    app.get("/{n}")(between(with_cancelation(forever)))
    async with running(app, "/1") as first, running(app, "/2") as second:
        for call in (first, second):
            await call.listened_to()
        await first.hang_up()
        await first.ended()
        assert (first.status, second.status) == (499, None)
        await second.hang_up()
    assert second.status == 499


@between
@pytest.mark.parametrize("is_decorated", [False, True])
async def test_an_endpoint_that_another_one_calls_is_called_for_no_request(between: Any, is_decorated: bool) -> None:
    app = FastAPI()
    app.add_middleware(RequestCancelationMiddleware, default_timeout=5)
    lifted: list[bool] = []
    inner = app.get("/inner")(between(with_cancelation(timeout=1)(forever_not)))

    # Which is told the request while the endpoint runs, too.
    dependency = Depends(passing_on(with_cancelation(forever_not)))

    async def outer(request: Request, value: Annotated[str, dependency]) -> str:
        state = request.scope[SCOPE_KEY]
        await inner()
        lifted.append(state.default is None)
        return "ok"

    app.get("/outer")(with_cancelation(outer) if is_decorated else outer)
    assert (await get(app, "/outer")).json() == "ok"
    assert lifted == [False]


async def forever_not() -> str:
    return "done"


@between
@pytest.mark.parametrize("path", ["/3", "/x", "/404", "/503"])
async def test_nothing_is_left_in_the_context_of_who_asks(between: Any, path: str) -> None:
    app = FastAPI()

    async def endpoint(n: int) -> int:
        if n > 400:
            raise HTTPException(n) if n < 500 else LookupError
        return n

    app.get("/{n}")(between(with_cancelation(endpoint)))
    call = asgi.Call(app)
    call.scope.update({"path": path, "raw_path": path.encode()})
    # In this very task.
    await call.run()
    assert call.status == {"/3": 200, "/x": 422, "/404": 404, "/503": 500}[path]
    assert _calling.get() is None


@between
async def test_a_task_that_goes_on_does_not_keep_the_request(between: Any) -> None:
    app = FastAPI()
    requests: list[weakref.ref[Request]] = []
    async with anyio.create_task_group() as tasks:

        async def before(request: Request) -> None:
            requests.append(weakref.ref(request))
            tasks.start_soon(anyio.sleep_forever)

        async def endpoint(value: Annotated[None, Depends(before)]) -> str:
            tasks.start_soon(anyio.sleep_forever)
            return "ok"

        app.get("/")(between(with_cancelation(endpoint)))
        await asgi.get(app)
        gc.collect()
        assert [request() for request in requests] == [None]
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("name", ["request", "req", "_"])
async def test_an_endpoint_of_starlette_may_call_its_request_as_it_likes(name: str) -> None:
    namespace: dict[str, Any] = {"anyio": anyio}
    exec(f"async def endpoint({name}): await anyio.sleep_forever()", namespace)  # noqa: S102
    app = Starlette(routes=[Route("/", with_cancelation(namespace["endpoint"]))])
    assert (await hang_up(app)).status == 499


def test_routes_without_a_decorated_function_stay_as_they_are() -> None:
    async def endpoint() -> None: ...

    is_told()
    dependant = get_dependant(path="/", call=endpoint)
    make: Any = fastapi.routing.get_request_handler
    assert make(dependant=dependant).__code__ is make.__wrapped__(dependant=dependant).__code__
    assert dependant.http_connection_param_name is None


def test_fastapi_asks_where_we_stand() -> None:
    assert is_told()
    assert hasattr(get_dependant(path="/", call=forever), "http_connection_param_name")


@pytest.mark.parametrize(
    ("maker", "route"), [("get_request_handler", APIRoute), ("get_websocket_app", APIWebSocketRoute)]
)
def test_one_that_does_not_ask_is_noticed(maker: str, route: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_told()
    assert _is_asked(route)
    monkeypatch.setattr(fastapi.routing, maker, getattr(fastapi.routing, maker).__wrapped__)
    assert not _is_asked(route)


@between
async def test_with_a_fastapi_that_does_not_ask_the_request_is_a_parameter(
    between: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for maker in ("get_request_handler", "get_websocket_app"):
        monkeypatch.setattr(fastapi.routing, maker, getattr(fastapi.routing, maker).__wrapped__)
    monkeypatch.setattr("cancelable_deps.hosts.route_handlers._MAKERS", ())
    is_told.cache_clear()
    try:
        app, plain = FastAPI(), FastAPI()
        app.get("/{n}")(between(with_cancelation(forever)))
        plain.get("/{n}")(forever)
        assert (await hang_up(app, "/3")).status == 499
        assert app.openapi() == plain.openapi()
        assert [record.levelname for record in caplog.records if KEYWORD in record.getMessage()] == ["WARNING"]
    finally:
        is_told.cache_clear()


@between
async def test_with_a_fastapi_that_describes_a_function_otherwise_it_is_told_all_the_same(
    between: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cancelable_deps.hosts.route_handlers._PARAMETER_OF_FASTAPI", "no_such_name")
    app = FastAPI()
    app.get("/{n}")(between(with_cancelation(forever)))
    assert (await hang_up(app, "/3")).status == 499


@pytest.mark.parametrize("is_first", [True, False])
async def test_an_integration_that_wraps_what_fastapi_calls(is_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As error reporters and tracers do, some before FastAPI has made the handler, and some after."""
    assert is_told()
    make: Any = fastapi.routing.get_request_handler

    def make_reported(*, dependant: Any, **options: Any) -> Any:
        if is_first:
            dependant.call = passing_on(dependant.call)
        handler = make(dependant=dependant, **options)
        if not is_first:
            dependant.call = passing_on(dependant.call)
        return handler

    monkeypatch.setattr(fastapi.routing, "get_request_handler", make_reported)
    app = FastAPI()
    app.get("/{n}")(with_cancelation(forever))
    assert (await hang_up(app, "/3")).status == 499


class Awkward:
    """A proxy for what there is only during a request: every look at it fails."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("outside of a request")

    def __call__(self) -> None: ...


async def test_what_cannot_be_looked_at_is_passed_over() -> None:
    awkward: Callable[[], None] = Awkward()

    def decorate(function: Any) -> Any:
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            assert awkward is not None
            return await function(*args, **kwargs)

        return functools.wraps(function)(wrapper)

    app = FastAPI()
    app.get("/")(decorate(with_cancelation(forever)))
    assert (await hang_up(app)).status == 499
    assert isinstance(vars(with_cancelation(forever))[TARGET_ATTRIBUTE], Target)
