# SPDX-License-Identifier: Apache-2.0

"""Files on the Hugging Face hub, by address."""

import logging
import re
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

FORM = "hf://owner/repository/path/file.safetensors; a revision stands behind the repository: hf://owner/repository@main/..."
# The revision stands behind the repository, as the hub writes it, or at the end. Those of pull requests have slashes.
_ADDRESS = re.compile(
    r"hf://(?P<repository>[\w.-]+/[\w.-]+)"
    r"(?:@(?P<revision>refs/pr/\d+|refs/convert/\w+|[^/@]+))?"
    r"/(?P<path>[^@]+\.safetensors)"
    r"(?:@(?P<last>[^@]+))?"
)
_REMOTE = re.compile(r"\w{2,}:/")  # pathlib makes one slash of two; one letter is a drive of Windows
_KINDS = ("models/", "datasets/", "spaces/", "kernels/", "buckets/")  # of hub repositories; guides are models


def local_file(path: str | Path) -> Path:
    """Where a file lies on this machine, which may be one of a model repository on the Hugging Face hub.

    What was fetched stays in the hub's cache (``HF_HOME``) and is found there without internet. A repository is asked
    once in a process for what is new, so that all models of a run use the same file.

    Args:
        path (str | Path): Path of a local file, or address ``hf://owner/repository/path/file.safetensors``. A branch,
            tag or commit stands behind the repository, ``hf://owner/repository@revision/path/...``, or at the end.

    Returns:
        Path: A local path, as it was given; else the file in the hub's cache.

    Raises:
        ValueError: If the address is malformed, or the hub has no such repository, revision or file.
        RuntimeError: If the hub could not be asked, and the file is not in the cache.

    Example:
        >>> local_file("weights/guides.safetensors").as_posix()
        'weights/guides.safetensors'
        >>> local_file("hf://guides.safetensors")
        Traceback (most recent call last):
        ...
        ValueError: 'hf://guides.safetensors' is no address of a file on the hub. Write hf://owner/...
    """
    if not _REMOTE.match(str(path)):
        return Path(path)
    return _fetch(str(path))


def beside(path: str | Path, name: str) -> str:
    """Address or path of the file of another name in the same folder.

    Args:
        path (str | Path): Local path, or address on the hub.
        name (str): Name of the other file.

    Returns:
        str: Its path or address, of the same revision, which stands where it stood.

    Example:
        >>> beside("weights/guides.safetensors", "examples.safetensors")
        'weights/examples.safetensors'
        >>> beside("hf://owner/repository/textile/guides.safetensors@v1", "examples.safetensors")
        'hf://owner/repository/textile/examples.safetensors@v1'
    """
    if not _REMOTE.match(str(path)):
        return str(Path(path).with_name(name))
    repository, revision, file = _parse(str(path))
    folder = file.rpartition("/")[0]
    at = f"@{revision}" if revision else ""
    is_last = str(path).endswith(at)  # behind the repository one with slashes would be part of the path
    return "/".join(["hf:/", repository + at * (not is_last), *filter(None, [folder]), name + at * is_last])


def _parse(address: str) -> tuple[str, str | None, str]:
    """Repository, revision and path of a file."""
    found = _ADDRESS.fullmatch(address)
    if (
        not found
        or (found["revision"] and found["last"])
        or {"", ".", ".."} & set(found["path"].split("/"))
        or address.removeprefix("hf://").startswith(_KINDS)
    ):
        msg = f"'{address}' is no address of a file on the hub. Write {FORM}"
        raise ValueError(msg)
    return found["repository"], found["revision"] or found["last"], found["path"]


@cache  # of what was found only; after an error the next call asks again
def _fetch(address: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, revision, file = _parse(address)
    elsewhere = "Or download the file elsewhere, copy it here and give its path."
    try:
        path = Path(hf_hub_download(repository, file, revision=revision))
    except HFValidationError as exception:
        msg = f"'{address}' is no address of a file on the hub ({exception}). Write {FORM}"
        raise ValueError(msg) from exception
    except GatedRepoError as exception:
        msg = f"'{address}': the owner of '{repository}' has not given you access. Ask for it on its page. {elsewhere}"
        raise ValueError(msg) from exception
    except RepositoryNotFoundError as exception:
        msg = (
            f"'{address}': the hub has no model repository '{repository}', or a private one. Check the name, or log in "
            f"with the hub's command line (hf auth login). {elsewhere}"
        )
        raise ValueError(msg) from exception
    except RevisionNotFoundError as exception:
        msg = f"'{address}': '{repository}' has no branch, tag or commit '{revision}'. Look at its page on the hub."
        raise ValueError(msg) from exception
    except LocalEntryNotFoundError as exception:
        msg = (
            f"'{address}' is not in the hub's cache, and the hub could not be asked for it: there is no internet, or "
            f"HF_HUB_OFFLINE is set ({_reason(exception)}). Run once where there is, which fills the cache. {elsewhere}"
        )
        raise RuntimeError(msg) from exception
    except EntryNotFoundError as exception:
        of = f" of revision '{revision}'" if revision else ""
        msg = f"'{address}': '{repository}' has no file '{file}'{of}. Look at its files on the hub."
        raise ValueError(msg) from exception
    except Exception as exception:
        msg = f"Could not get '{address}' from the hub ({_reason(exception)}). Try again later. {elsewhere}"
        raise RuntimeError(msg) from exception
    logger.info("%s is %s.", address, path)
    return path


def _reason(exception: BaseException) -> str:
    """Name and first line of the error at the bottom, which says more than what the hub's client makes of it."""
    while exception.__cause__ is not None:
        exception = exception.__cause__
    return f"{type(exception).__name__}: {(str(exception).strip() or 'no message').splitlines()[0]}"
