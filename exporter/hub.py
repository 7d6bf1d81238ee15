"""Checkpoints from the Hugging Face hub, pinned to a commit."""

from collections.abc import Sequence
from pathlib import Path

from exporter.errors import CheckpointError
from runtimes.extras import require


def download(repository: str, revision: str | None, patterns: Sequence[str]) -> tuple[Path, str]:
    """Fetch the files that match `patterns`; returns the folder and the commit that `revision` means now.

    A checkpoint that was fetched before is taken from the hub's cache when the hub cannot be reached.
    The token, where one is needed, is the hub library's own (HF_TOKEN or its login file).
    """
    hub = require("huggingface_hub", "hub")
    errors = require("huggingface_hub.errors", "hub")
    httpx = require("httpx2", "hub")  # the client library of huggingface_hub 2
    try:
        hub.HfApi().model_info(repository, revision=revision)  # says best what is wrong with a name
        path = Path(hub.snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
        return path, path.name  # the cache names the folder after the commit
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{repository} asks for its licence to be accepted: do that on its page, then set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(
            f"{repository} has no revision {revision!r}: look at the branches on its page"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"there is no folder and no Hugging Face repository {repository!r} (or it is private: set HF_TOKEN)"
        ) from None
    except (
        errors.OfflineModeIsEnabled,
        errors.HfHubHTTPError,
        errors.LocalEntryNotFoundError,
        httpx.HTTPError,
        OSError,
    ):
        return _cached(hub, errors, repository, revision, patterns)


def _cached(
    hub: object, errors: object, repository: str, revision: str | None, patterns: Sequence[str]
) -> tuple[Path, str]:
    try:
        path = Path(
            hub.snapshot_download(  # type: ignore[attr-defined]
                repository, revision=revision, allow_patterns=list(patterns), local_files_only=True
            )
        )
    except errors.LocalEntryNotFoundError:  # type: ignore[attr-defined]
        raise CheckpointError(
            f"{repository} cannot be fetched: the Hugging Face hub cannot be reached and no copy is in its cache; "
            "go online once, or give a folder that you downloaded"
        ) from None
    return path, path.name
