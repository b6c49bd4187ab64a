"""The object store that a config names: a directory, or a bucket of an S3 server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.credentials import check_transport, existing_file, read_secret
from shared.stores.directory import DirectoryStore

if TYPE_CHECKING:
    from pathlib import Path

    from shared.config import FederationConfig, StoreSection
    from shared.stores.port import ObjectStore
    from shared.stores.s3 import S3Store


def open_store(config: FederationConfig, folder: Path) -> ObjectStore:
    """The store of ``config``; its files are relative to ``folder``. Raises ConfigError."""
    if config.store.url is None:
        return DirectoryStore(folder / config.store.directory)
    return open_s3(config.store, folder)


def open_s3(section: StoreSection, folder: Path) -> S3Store:
    """The S3 server's bucket; nothing is asked of it yet. Raises ConfigError."""
    from shared.stores.s3 import S3Store  # noqa: PLC0415 - a directory needs no SDK

    assert section.url is not None  # the caller asked
    for url in (section.url, section.site_url):
        if url is not None:
            check_transport("store", url, section.transport)
    return S3Store(
        section.url,
        section.bucket,
        read_secret(section, "access_key", folder, "store"),
        read_secret(section, "secret_key", folder, "store"),
        region=section.region,
        ca_file=existing_file(folder, section.ca_file, "store.ca_file"),
        site_endpoint=section.site_url,
    )
