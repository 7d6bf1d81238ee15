"""Profiles: what the phones and chips are, as data with a source for each figure.

    >>> import profiles
    >>> profiles.find("갤럭시 S24 울트라").soc.name
    'Snapdragon 8 Gen 3'

Importing this package costs nothing: the TOML files are read, and pydantic is loaded, at the first use of a
name below.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from profiles.errors import AmbiguousDevice, ProfileError, UnknownDevice, UnknownModel

if TYPE_CHECKING:
    from profiles.architectures import KnownModel, find_model, models
    from profiles.loader import chips, devices, find, observations, search
    from profiles.model import Chip, Device
    from profiles.observation import Observation

__all__ = [
    "AmbiguousDevice",
    "Chip",
    "Device",
    "KnownModel",
    "Observation",
    "ProfileError",
    "UnknownDevice",
    "UnknownModel",
    "chips",
    "devices",
    "find",
    "find_model",
    "models",
    "observations",
    "search",
]

_HOME = {
    "Chip": "model",
    "Device": "model",
    "Observation": "observation",
    **dict.fromkeys(("KnownModel", "find_model", "models"), "architectures"),
    **dict.fromkeys(("chips", "devices", "find", "observations", "search"), "loader"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
