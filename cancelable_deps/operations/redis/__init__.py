"""The store in Redis or Valkey, for the workers of all machines. Its client library is loaded when one is made."""

from .store import RedisBackend as RedisBackend
