"""All variants that are measured, in the order in which they are printed."""

from benchmarks._doors import OURS
from benchmarks._rivals import rivals
from benchmarks._variants import FLOORS, REFERENCES, Variant


def everything() -> list[Variant]:
    return [*FLOORS, *OURS, *REFERENCES, *rivals()]


def named(name: str) -> Variant:
    return next(variant for variant in everything() if variant.name == name)
