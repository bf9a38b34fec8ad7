"""Detectors on Hugging Face's hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.utils import HfHubHTTPError

from detector.errors import ModelError, one_line

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"  # the hub's names


def fetch(repository: str, local_files_only: bool, **options: Any) -> Path:
    """The folder of the hub's cache that the files of a repository are fetched to."""
    unreachable = None
    try:
        if not local_files_only:
            try:
                address = hf_hub_url(repository, CONFIG, revision=options["revision"])
                get_hf_file_metadata(address, token=options["token"])
            except (HfHubHTTPError, ValueError):  # it answers, or is not asked: what is wrong is said below
                pass
            except Exception as error:  # of the network; the download would try again for half a minute
                unreachable = error
        local_files_only |= unreachable is not None
        files = [
            hf_hub_download(repository, name, local_files_only=local_files_only, **options)
            for name in (CONFIG, WEIGHTS)
        ]
    except Exception as error:  # of the hub's client, and of what it fetches by
        reason = f"cannot be reached: {one_line(unreachable)}" if unreachable else f"has it not to give: {error}"
        raise ModelError(f"{repository}: no such folder, and the hub {' '.join(reason.split())}") from None
    return Path(files[-1]).parent


def is_hub_name(path: Path) -> bool:
    """Whether it is no file or folder, and may be "owner/name" on Hugging Face's hub."""
    weights = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
    return not path.exists() and len(path.parts) == 2 and path.suffix not in weights
