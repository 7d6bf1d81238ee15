"""A model by whatever a person calls it: a checkpoint, or a name of the catalogue, which needs no weights."""

from functools import cache
from pathlib import Path

import profiles
from exporter.architecture import Architecture, read_architecture
from exporter.checkpoint import open_checkpoint
from profiles import KnownModel, UnknownModel


def describe_model(checkpoint: str, revision: str | None = None) -> tuple[str, Architecture]:
    """Name and architecture of a folder, "pepper", a model of the catalogue, or a repository.

    A folder goes before a name, and a `revision` asks for the repository. Raises CheckpointError and its like; what
    is neither is said to be so.
    """
    if revision is None and not Path(checkpoint).exists():
        try:
            model = profiles.find_model(checkpoint)
        except UnknownModel:
            if " " in checkpoint.strip():  # no folder, and no repository either
                raise
        else:
            return model.name, architecture_of(model)
    with open_checkpoint(checkpoint, revision) as source:
        return source.name, source.architecture


@cache
def _read(id: str) -> Architecture:
    return read_architecture(profiles.find_model(id).config)


def architecture_of(model: KnownModel) -> Architecture:
    """The decoder of a model of the catalogue."""
    return _read(model.id)


def catalogue() -> dict[str, Architecture]:
    """All models of the catalogue by their names, the smallest first."""
    found = {model.name: architecture_of(model) for model in profiles.models()}
    return dict(sorted(found.items(), key=lambda pair: pair[1].parameters))
