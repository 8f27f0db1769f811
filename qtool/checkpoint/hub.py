"""From what a person types (a folder, a file, a hub id) to files on disk, or to headers alone."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool.checkpoint.reader import Checkpoint
from qtool.errors import QtoolError, UsageError
from qtool.gguf.checkpoint import BESIDE_A_MODEL, open_checkpoint
from qtool.gguf.file import PART
from qtool.headers import TensorInfo

HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>(refs/pr/)?[\w./-]+?))?(/(?P<file>[\w./ +-]+\.gguf))?"
)
WANTED_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.md", "LICENSE*"]


@dataclass(frozen=True)
class HubId:
    """A repository on the hub, a branch, tag or commit of it, and one GGUF file if just that is meant."""

    repo: str
    revision: str | None = None
    file: str | None = None

    @classmethod
    def of(cls, model: str) -> HubId:
        match = HUB_ID.fullmatch(model)
        assert match, model
        return cls(match["repo"], match["revision"], match["file"])

    @property
    def without_file(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo

    def __str__(self) -> str:
        return f"{self.without_file}/{self.file}" if self.file else self.without_file


def local_path(model: str) -> Path | None:
    """The folder or file that MODEL names, or None for a hub id. Raises UsageError for what is neither."""
    path = Path(model).expanduser()
    if path.exists():
        if path.is_file() and path.suffix not in (".safetensors", ".gguf"):
            raise UsageError(
                f"{path} is neither a .safetensors nor a .gguf file", "give a folder, such a file, or a hub id"
            )
        return path
    match = HUB_ID.fullmatch(model)
    if not match or model.startswith((".", "/", "~")) or (match["file"] and path.parent.exists()):
        raise UsageError(f"no such file or folder: {model}", "a hub id looks like `org/name` or `org/name@revision`")
    return None


def locate(model: str) -> Path:
    """The local folder or file of MODEL; a hub id (`org/name` or `org/name@revision`) is downloaded to the cache.

    Of a repository of GGUF files that is the one named (`org/name/file.gguf`), with the other parts of a split one.
    Raises UsageError when there is no such path or id, QtoolError when the hub cannot be reached.
    """
    path = local_path(model)
    if path:
        return path
    hub_id = HubId.of(model)
    with _explained(model):
        if hub_id.file:
            return _gguf_file(hub_id, hub_id.file)
        folder = _snapshot(hub_id, cached_only=False)
        if not any(folder.glob("*.safetensors")):
            _refuse_gguf(hub_id)
        return folder


def open_headers(model: str) -> Checkpoint:
    """The checkpoint of MODEL for those who need only headers: of a hub id, just these and config.json are fetched.

    A GGUF file is fetched as a whole. What the cache holds is taken when the hub cannot be reached. Raises as
    `locate` does.
    """
    path = local_path(model)
    if path:
        return open_checkpoint(path)
    hub_id = HubId.of(model)
    if hub_id.file:
        return open_checkpoint(locate(model))
    import httpx
    from huggingface_hub.errors import OfflineModeIsEnabled

    with _explained(model):
        try:
            return _fetch_headers(hub_id)
        except (OfflineModeIsEnabled, httpx.TransportError):
            return open_checkpoint(_snapshot(hub_id, cached_only=True))


def _fetch_headers(hub_id: HubId) -> Checkpoint:
    from huggingface_hub import get_safetensors_metadata, hf_hub_download
    from huggingface_hub.errors import NotASafetensorsRepoError, RemoteEntryNotFoundError, SafetensorsParsingError

    try:
        metadata = get_safetensors_metadata(hub_id.repo, revision=hub_id.revision)
    except NotASafetensorsRepoError:
        _refuse_gguf(hub_id)
        raise UsageError(f"`{hub_id}` on the hub has neither model.safetensors nor an index of such files") from None
    except SafetensorsParsingError as error:
        raise QtoolError(f"`{hub_id}` on the hub: {error}") from None
    try:
        config_file = hf_hub_download(hub_id.repo, "config.json", revision=hub_id.revision)
        config: dict[str, Any] = json.loads(Path(config_file).read_text(encoding="utf-8"))
    except RemoteEntryNotFoundError:
        config = {}
    infos = []
    for file, header in sorted(metadata.files_metadata.items()):
        for name, info in sorted(header.tensors.items(), key=lambda item: item[1].data_offsets):
            infos.append(TensorInfo(name, info.dtype, tuple(info.shape), file))
    return Checkpoint.from_headers(Path(str(hub_id)), config, infos)


def _gguf_file(hub_id: HubId, file: str) -> Path:
    """A GGUF file in the cache; of a split one the first part, with the others beside it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    parts = [file]
    if (match := PART.fullmatch(file)) and int(match[3]):
        parts = [f"{match[1]}-{number:05d}-of-{match[3]}.gguf" for number in range(1, int(match[3]) + 1)]
    try:
        paths = [Path(hf_hub_download(hub_id.repo, part, revision=hub_id.revision)) for part in parts]
    except RemoteEntryNotFoundError:
        _refuse_gguf(hub_id)
        raise UsageError(f"`{hub_id.without_file}` on the hub has no GGUF files") from None
    return paths[0]


def _refuse_gguf(hub_id: HubId) -> None:
    """Raises UsageError with what to type where a repository holds GGUF files: which one is not guessed."""
    from huggingface_hub import list_repo_files

    files = sorted(file for file in list_repo_files(hub_id.repo, revision=hub_id.revision) if file.endswith(".gguf"))
    first = [file for file in files if not (part := PART.fullmatch(file)) or int(part[2]) == 1]
    models = [file for file in first if not BESIDE_A_MODEL.search(file)]
    if models:
        listed = ", ".join(models[:6]) + (", ..." if len(models) > 6 else "")
        what = f"has no `{hub_id.file}`: its GGUF files are" if hub_id.file else "is a repository of GGUF files:"
        raise UsageError(
            f"`{hub_id.without_file}` on the hub {what} {listed}",
            f"give one of them: `{hub_id.without_file}/{models[0]}`",
        )


def _snapshot(hub_id: HubId, cached_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        hub_id.repo,
        revision=hub_id.revision,
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
