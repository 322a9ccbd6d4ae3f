"""The Hugging Face hub, asked only where it can answer.

``datasets`` retries for more than 20 seconds on a machine without a network. So the hub is tried with one short
connection first; where that fails, a data set in the local cache still loads, and anything else is an error at once.
"""

import contextlib
import importlib.util
import os
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from safr_fast.data.corpus import DataUnavailable, Split

_PATIENCE_SECONDS = 1.0
_MEMORY_SECONDS = 60.0

# Address: when it was last tried, and whether it answered. A command asks before it loads torch, and again to load.
_tried: dict[str, tuple[float, bool]] = {}


def require(repository: str, dataset: str) -> str | None:
    """Why the hub cannot be asked, though the cache can; None if it can.

    Raises DataUnavailable, after little more than a second, where neither can.
    """
    if importlib.util.find_spec("datasets") is None:
        raise DataUnavailable(
            f'{repository} comes by the datasets package: pip install "safr-fast[data]", or give --data-dir'
        )
    obstacle = _obstacle()
    if obstacle is not None and not _cached(repository):
        raise DataUnavailable(
            f"{repository} cannot be downloaded ({obstacle}) and is not in the local cache: "
            f"give --data-dir with {dataset}'s files, or use --dataset synthetic, which needs neither"
        )
    return obstacle


def load_from_hub(repository: str, dataset: str) -> dict[str, Split]:
    """The labelled splits of a data set with columns ``text`` and ``label``."""
    obstacle = require(repository, dataset)
    import datasets

    try:
        with contextlib.nullcontext() if obstacle is None else _offline():
            loaded = datasets.load_dataset(repository)
    except Exception as error:  # whatever the hub, the network or the cache may raise
        reason = str(error).strip().split("\n")[0]
        raise DataUnavailable(f"{repository} cannot be loaded: {reason}; or give --data-dir") from error
    return {
        name: Split(list(split["text"]), list(split["label"]))
        for name, split in loaded.items()
        if name in ("train", "validation", "test")
    }


def _obstacle() -> str | None:
    """Why the hub cannot be asked, or None."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    address = constants.ENDPOINT
    if address not in _tried or time.monotonic() - _tried[address][0] > _MEMORY_SECONDS:
        answered = _reachable(address)
        _tried[address] = time.monotonic(), answered
    return None if _tried[address][1] else f"no connection to {urlsplit(address).hostname}"


def _reachable(address: str) -> bool:
    """Whether a connection can be made, to the proxy if there is one, within the time that a user should wait.

    Names are resolved in a thread of their own, since that has no time limit.
    """
    url = urlsplit(address)
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(url.hostname or ""):
        url = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    try:
        target = (url.hostname, url.port or (80 if url.scheme == "http" else 443))
    except ValueError:  # a port that is no number
        return False
    answered = threading.Event()

    def connect() -> None:
        with contextlib.suppress(OSError), socket.create_connection(target, timeout=_PATIENCE_SECONDS):
            answered.set()
        finished.set()

    finished = threading.Event()
    threading.Thread(target=connect, daemon=True).start()
    finished.wait(_PATIENCE_SECONDS)
    return answered.is_set()


def _cached(repository: str) -> bool:
    """Whether data, not just folders, are in the caches of ``datasets`` or ``huggingface_hub``: cheap, and generous."""
    from huggingface_hub import constants

    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets").expanduser()
    tables = (prepared / repository.replace("/", "___")).glob("*/*/*/*.arrow")
    if any(not table.parent.name.endswith(".incomplete") for table in tables):
        return True
    snapshots = Path(constants.HF_HUB_CACHE) / f"datasets--{repository.replace('/', '--')}" / "snapshots"
    # The card comes first, also where nothing else could be had.
    return any(file.is_file() and file.name != "README.md" for file in snapshots.glob("*/**/*"))


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """``datasets`` and ``huggingface_hub`` use their caches and nothing else; both read this setting when called."""
    import datasets
    from huggingface_hub import constants

    modules: tuple[Any, ...] = (constants, datasets.config)
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value
