"""Checks of the strings that name operations: ids, owners, keys and labels."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from enum import Enum
from typing import Any, Final
from uuid import UUID

MOST_ID = 128
MOST_NAME = 256
MOST_LABELS = 16
MOST_LABEL_NAME = 64
MOST_MESSAGE = 1000

# Not a segment of a path that clients leave out: a cancel of ".." would go to another route.
_ID: Final = re.compile(rf"(?!\.{{1,2}}\Z)[A-Za-z0-9._~:-]{{1,{MOST_ID}}}")
_MINTED: Final = re.compile(r"(w[A-Za-z0-9_-]{11})\.[A-Za-z0-9_-]{16}")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_BREAKS: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class Anyone(Enum):
    """The type of `ANYONE`."""

    ANYONE = "anyone"

    def __repr__(self) -> str:
        return "ANYONE"


ANYONE: Final = Anyone.ANYONE
"""Stands for every owner, and for operations without one: the right of an operator."""

Owner = str | Anyone


def new_worker() -> str:
    """Return a name for a worker, which no other has."""
    return "w" + secrets.token_urlsafe(9)[:11]


def new_id(worker: str) -> str:
    """Return an id for an operation of ``worker``, with 96 random bits."""
    return f"{worker}.{secrets.token_urlsafe(12)}"


def worker_of(id: str) -> str | None:
    """Return the worker that has made an id; ``None`` if a client has chosen it."""
    match = _MINTED.fullmatch(id)
    return None if match is None else match[1]


def is_id(value: object) -> bool:
    """Return whether ``value`` may be the id of an operation."""
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def checked_id(value: object) -> str:
    """Return ``value`` if it may be the id of an operation.

    :raises TypeError: if it is no string.
    :raises ValueError: if it has other characters, or too many.
    """
    if not isinstance(value, str):
        raise TypeError(f"the id of an operation is a string, not {value!r}")
    if not is_id(value):
        raise ValueError(
            f"the id of an operation has 1 to {MOST_ID} of the characters A-Z a-z 0-9 . _ ~ : - (not . or .. alone) and "
            f"not {_shown(value)}"
        )
    return value


def checked_owner(value: object) -> str:
    """Return an owner as a string; numbers and UUIDs are taken, too.

    :raises TypeError: if it is something else, such as ``None``.
    :raises ValueError: if it is empty, too long or has control characters.
    """
    if isinstance(value, UUID) or (isinstance(value, int) and not isinstance(value, bool)):
        value = str(value)
    return _text(value, "an owner", MOST_NAME)


def checked_owners(value: object) -> Owner:
    """Return ``ANYONE``, or a checked owner. ``None`` is refused: it is nobody, and must not be taken for anybody."""
    return ANYONE if value is ANYONE else checked_owner(value)


def owner_as_data(owner: Owner) -> str | None:
    """Return an owner as an entry has it."""
    return None if owner is ANYONE else owner


def owner_of_data(data: Mapping[str, Any]) -> Owner:
    """Return the owner that an entry has."""
    return ANYONE if data.get("owner") is None else str(data["owner"])


def checked_key(value: object) -> str:
    """Return a key, or an error as `checked_owner` does."""
    if isinstance(value, UUID) or (isinstance(value, int) and not isinstance(value, bool)):
        value = str(value)
    return _text(value, "a key", MOST_NAME)


def checked_name(value: object) -> str:
    """Return the name of work, or an error as `checked_owner` does."""
    return _text(value, "the name of an operation", MOST_NAME)


def checked_labels(values: object) -> dict[str, str]:
    """Return labels as a dictionary of strings.

    :raises TypeError: if they are no mapping of strings to strings, numbers or booleans.
    :raises ValueError: if there are too many, or one is too long or has control characters.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"labels are a mapping of names to strings, not {values!r}")
    if len(values) > MOST_LABELS:
        raise ValueError(f"an operation has at most {MOST_LABELS} labels, and not {len(values)}")
    return {_text(name, "the name of a label", MOST_LABEL_NAME): _label(value) for name, value in values.items()}


def checked_message(value: Any) -> str | None:
    """Return the message of a cancel, cut off where it is too long, on one line, and as text that can be encoded.

    It goes to logs, and into the response of what it stops.

    :raises TypeError: if it is neither a string nor ``None``.
    """
    if value is not None and not isinstance(value, str):
        raise TypeError(f"message must be a string, or None for the sentence of the reason, not {value!r}: use str()")
    if not value:
        return None
    return _BREAKS.sub(" ", value[:MOST_MESSAGE]).encode(errors="replace").decode()


def _label(value: object) -> str:
    if isinstance(value, bool | int | float):
        value = str(value)
    return _text(value, "a label", MOST_NAME, least=0)


def _text(value: object, what: str, most: int, least: int = 1) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{what} is a string, not {value!r}")
    if not least <= len(value) <= most or _CONTROL.search(value):
        raise ValueError(f"{what} has {least} to {most} characters and no control characters, unlike {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} must be text that can be encoded, unlike {_shown(value)}") from None
    return value


def _shown(value: str) -> str:
    return ascii(value if len(value) <= MOST_NAME else value[:MOST_NAME] + "...")
