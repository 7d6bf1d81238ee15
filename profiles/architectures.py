"""Models that are known by name: `architectures.toml`, the config values that shape a decoder, with their source.

What the values mean is the exporter's business; here they are data.
"""

import difflib
from functools import lru_cache
from importlib.resources import files
from typing import Annotated, Any

from pydantic import Field, StringConstraints

from profiles.errors import UnknownModel
from profiles.loader import read, validate
from profiles.lookup import normalized
from profiles.model import Frozen, Source, Text

Repository = Annotated[str, StringConstraints(pattern=r"^[\w.-]+/[\w.-]+$")]


class KnownModel(Frozen):
    """A model without its weights. `config`: of its config.json; `repositories`: where that stands."""

    id: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+([.-][a-z0-9]+)*$")]
    name: Text
    aliases: tuple[Text, ...] = ()
    repositories: Annotated[tuple[Repository, ...], Field(min_length=1)]
    config: dict[str, Any]
    source: Source

    @property
    def names(self) -> tuple[str, ...]:
        """All that it is called, repositories with their owner and without."""
        bare = (repository.partition("/")[2] for repository in self.repositories)
        return (self.id, self.name, *self.aliases, *self.repositories, *bare)


class _File(Frozen):
    models: tuple[KnownModel, ...]


@lru_cache(maxsize=1)
def models() -> tuple[KnownModel, ...]:
    """All models of the catalogue, in the order of the file. ProfileError if it breaks the rules."""
    file = files("profiles") / "architectures.toml"
    return validate(_File, read(file), file).models


def find_model(name: str) -> KnownModel:
    """The model by its name, an alias or a repository; case, spaces and hyphens do not count. UnknownModel names those
    that are near.

    >>> find_model("llama 3.2 1b").config["num_hidden_layers"]
    16
    """
    key = normalized(name)
    names = {normalized(label): model for model in models() for label in model.names}
    if key in names:
        return names[key]
    near = [names[label].name for label in difflib.get_close_matches(key[:60], names, n=3)]
    listed = ", ".join(dict.fromkeys(near or [model.name for model in models()]))
    raise UnknownModel(
        f"{name[:60]!r} is no model of the catalogue: name {'one such as ' if near else 'one of '}{listed}, or give a "
        "checkpoint"
    )
