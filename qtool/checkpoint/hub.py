"""From what a person types (a folder, a file, a hub id) to files on disk, or to headers alone."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qtool.checkpoint.reader import Checkpoint
from qtool.errors import QtoolError, UsageError
from qtool.gguf.checkpoint import open_checkpoint
from qtool.headers import TensorInfo

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
WANTED_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.md", "LICENSE*"]


def local_path(model: str) -> Path | None:
    """The folder or file that MODEL names, or None for a hub id. Raises UsageError for what is neither."""
    path = Path(model).expanduser()
    if path.exists():
        if path.is_file() and path.suffix not in (".safetensors", ".gguf"):
            raise UsageError(
                f"{path} is neither a .safetensors nor a .gguf file", "give a folder, such a file, or a hub id"
            )
        return path
    if not HUB_ID.fullmatch(model) or model.startswith((".", "/", "~")):
        raise UsageError(f"no such file or folder: {model}", "a hub id looks like `org/name` or `org/name@revision`")
    return None


def locate(model: str) -> Path:
    """The local folder or file of MODEL; a hub id (`org/name` or `org/name@revision`) is downloaded to the cache.

    Raises UsageError when there is no such path or id, QtoolError when the hub cannot be reached.
    """
    path = local_path(model)
    if path:
        return path
    with _explained(model):
        return _snapshot(model, cached_only=False)


def open_headers(model: str) -> Checkpoint:
    """The checkpoint of MODEL for those who need only headers: of a hub id, just these and config.json are fetched.

    What the cache holds is taken when the hub cannot be reached. Raises as `locate` does.
    """
    path = local_path(model)
    if path:
        return open_checkpoint(path)
    import httpx
    from huggingface_hub.errors import OfflineModeIsEnabled

    with _explained(model):
        try:
            return _fetch_headers(model)
        except (OfflineModeIsEnabled, httpx.TransportError):
            return open_checkpoint(_snapshot(model, cached_only=True))


def _fetch_headers(model: str) -> Checkpoint:
    from huggingface_hub import get_safetensors_metadata, hf_hub_download
    from huggingface_hub.errors import NotASafetensorsRepoError, RemoteEntryNotFoundError, SafetensorsParsingError

    repo, _, revision = model.partition("@")
    try:
        metadata = get_safetensors_metadata(repo, revision=revision or None)
    except NotASafetensorsRepoError:
        raise UsageError(f"`{model}` on the hub has neither model.safetensors nor an index of such files") from None
    except SafetensorsParsingError as error:
        raise QtoolError(f"`{model}` on the hub: {error}") from None
    try:
        config_file = hf_hub_download(repo, "config.json", revision=revision or None)
        config: dict[str, Any] = json.loads(Path(config_file).read_text(encoding="utf-8"))
    except RemoteEntryNotFoundError:
        config = {}
    infos = []
    for file, header in sorted(metadata.files_metadata.items()):
        for name, info in sorted(header.tensors.items(), key=lambda item: item[1].data_offsets):
            infos.append(TensorInfo(name, info.dtype, tuple(info.shape), file))
    return Checkpoint.from_headers(Path(model), config, infos)


def _snapshot(model: str, cached_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    repo, _, revision = model.partition("@")
    folder = snapshot_download(
        repo,
        revision=revision or None,
        allow_patterns=WANTED_FILES,
        ignore_patterns=["consolidated*"],
        local_files_only=cached_only,
    )
    return Path(folder)


@contextmanager
def _explained(model: str) -> Iterator[None]:
    """Turns what the hub's client raises into errors that say what to do."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        yield
    except (RepositoryNotFoundError, HFValidationError):
        raise UsageError(f"`{model}` is no local folder, and the hub has no such model (or it is private)") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        offline = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else "the hub cannot be reached"
        reason = str(error).strip().splitlines()[0] if isinstance(error, HfHubHTTPError) else offline
        raise QtoolError(
            f"`{model}` is no local folder and is not in the cache: {reason}",
            "download it where there is a network (`hf download ORG/NAME`) and give the folder",
        ) from None
