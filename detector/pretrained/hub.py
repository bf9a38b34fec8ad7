"""Files on Hugging Face's hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.utils import HfHubHTTPError

from detector.errors import ModelError, one_line

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"  # the hub's names


def fetch(repository: str, **options: Any) -> Path:
    """Fetch a repository's config and weights, and return the folder of the hub's cache that holds them."""
    reason = "does not have it"
    if not options.get("local_files_only"):
        try:  # Without a network the download itself would retry for half a minute.
            address = hf_hub_url(repository, CONFIG, revision=options.get("revision"))
            get_hf_file_metadata(address, token=options.get("token"))
        except (HfHubHTTPError, ValueError):  # the hub answered, or the name is invalid: the download raises the error
            pass
        except Exception as error:  # the hub's client and its transport raise errors of many types
            reason, options["local_files_only"] = f"cannot be reached ({one_line(error)})", True
    try:
        return Path([hf_hub_download(repository, name, **options) for name in (CONFIG, WEIGHTS)][-1]).parent
    except Exception as error:
        raise ModelError(f"{repository}: no such folder, and the hub {reason}: {one_line(error)}") from None


def upload(repository: str, folder: str, *, token: str | bool | None = None, **options: Any) -> str:
    """Upload the files of a folder to a repository, which is created if it does not exist."""
    api = HfApi(token=token)
    name = api.create_repo(repository, exist_ok=True, **options).repo_id
    return str(api.upload_folder(repo_id=name, folder_path=folder))


def is_hub_name(path: Path) -> bool:
    """Return whether a path is neither a file nor a folder and may be "owner/name" on Hugging Face's hub."""
    weights = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
    return not path.exists() and len(path.parts) == 2 and path.suffix not in weights
