"""From what a person types (a folder, a file, a hub id) to files on disk."""

from __future__ import annotations

import os
import re
from pathlib import Path

from qtool.errors import QtoolError, UsageError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
WANTED_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.md", "LICENSE*"]


def locate(model: str) -> Path:
    """The local folder or file of MODEL; a hub id (`org/name` or `org/name@revision`) is downloaded to the cache.

    Raises UsageError when there is no such path or id, QtoolError when the hub cannot be reached.
    """
    path = Path(model).expanduser()
    if path.exists():
        if path.is_file() and path.suffix != ".safetensors":
            raise UsageError(f"{path} is not a .safetensors file", "give a folder, a .safetensors file, or a hub id")
        return path
    if not HUB_ID.fullmatch(model) or model.startswith((".", "/", "~")):
        raise UsageError(f"no such file or folder: {model}", "a hub id looks like `org/name` or `org/name@revision`")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    repo, _, revision = model.partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=WANTED_FILES))
    except RepositoryNotFoundError:
        raise UsageError(f"`{model}` is no local folder, and the hub has no such model (or it is private)") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        offline = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else "the hub cannot be reached"
        reason = str(error).strip().splitlines()[0] if isinstance(error, HfHubHTTPError) else offline
        raise QtoolError(
            f"`{model}` is no local folder and is not in the cache: {reason}",
            "download it where there is a network (`hf download ORG/NAME`) and give the folder",
        ) from None
