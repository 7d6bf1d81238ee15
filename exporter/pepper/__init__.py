"""pepper: a small chat model that answers checkable questions, its tokenizer, and the script that trained it."""

from importlib.resources import files
from pathlib import Path


def checkpoint_path() -> Path:
    """The folder of pepper's checkpoint, in Hugging Face's layout.

    Raises FileNotFoundError when Gochu is not installed as plain files (from a zip, say): weights are mapped
    from disk, never unpacked.
    """
    folder = files(__name__) / "checkpoint"
    if not isinstance(folder, Path) or not folder.is_dir():
        raise FileNotFoundError(
            f"pepper's checkpoint is no folder on disk ({folder}): install Gochu unzipped"
        )
    return folder
