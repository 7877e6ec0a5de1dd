"""What the handlers work on, and the dependencies that give it to them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request

from .ledger import Run
from .work import Corpus, Table


@dataclass(frozen=True)
class Materials:
    """The data that the handlers work on."""

    table: Table
    corpus: Corpus
    numbers: int
    folder: Path


async def run_of(request: Request) -> Run:
    run: Run = request.state.run
    return run


async def materials_of(request: Request) -> Materials:
    materials: Materials = request.app.state.materials
    return materials


ThisRun = Annotated[Run, Depends(run_of)]
TheMaterials = Annotated[Materials, Depends(materials_of)]
