"""Checks of an application: what in it breaks or weakens cancellation, and what to do about it.

This floor knows all the others but `testing`, and none of them knows it: a lifespan loads it by its name when an
application starts.
"""

from .findings import Finding as Finding
from .stack import check_stack as check_stack
from .store import check_store as check_store

__all__ = ["Finding", "check_stack", "check_store"]
