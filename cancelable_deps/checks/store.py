"""`check_store`: whether the store of operations keeps what it is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .findings import found

if TYPE_CHECKING:
    from .findings import Finding


async def check_store(backend: Any) -> list[Finding]:
    """Return what is wrong with the store of `Operations <cancelable_deps.operations.Operations>`: does its Redis evict?

    It asks Redis once, on a connection of its own if the store is not open, and waits for 2 seconds at most. A backend
    that is in memory has nothing to be asked. May be cancelled.

    :param backend: a ``RedisBackend``; that of some operations is ``operations.backend``.
    :raises TypeError: if it is no backend.
    """
    if not hasattr(backend, "broadcast"):
        raise TypeError(f"check_store takes the backend of operations, as operations.backend, not {backend!r}")
    policy_of = getattr(backend, "evicting_policy", None)
    if policy_of is None:
        return []
    try:
        policy = await policy_of()
    except Exception as exc:
        return [
            found(
                "store-unreachable",
                "operations",
                f"Redis cannot be asked whether it evicts keys: {exc}. An application starts all the same, and cannot stop "
                "what runs in other workers until Redis answers.",
            )
        ]
    if policy is None:
        return []
    return [
        found(
            "evicting-redis",
            "operations",
            f"This Redis deletes keys when its memory is full (maxmemory-policy {policy}): it may forget operations and "
            "cancels. Use one with `maxmemory-policy noeviction`.",
        )
    ]
