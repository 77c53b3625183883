"""Files behind an address such as `s3://bucket/corpus/*.jsonl.zst`: listed, identified and read as a stream."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

from llmtrainer.base.errors import UserError

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)(?=://)")
_BLOCK = 2**20
_IDENTITY = ("sha256", "ETag", "etag", "md5Hash", "content_md5", "blob_id")
"""What a server may call the thing that changes with a file's content, the surest first."""
PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs",
    "hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp", "sftp": "paramiko", "ssh": "paramiko",
    "oss": "ossfs", "webdav": "webdav4", "gdrive": "gdrivefs", "hdfs": "pyarrow",
}  # fmt: skip


def is_remote(text: str) -> bool:
    """Whether a text is an address, PROTOCOL://..."""
    return _ADDRESS.match(text) is not None


@dataclass(frozen=True, order=True)
class RemoteFile:
    """A file behind an address, with as much of a Path as a reader needs."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the address, without a query behind it."""
        return PurePosixPath(self.url.partition("?")[0]).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def suffixes(self) -> list[str]:
        return PurePosixPath(self.name).suffixes

    def with_name(self, name: str) -> RemoteFile:
        """The file beside it with another name."""
        place, mark, query = self.url.partition("?")
        return RemoteFile(place.removesuffix(self.name) + name + mark + query)

    def is_file(self) -> bool:
        system, path = _system(self.url)
        with explained(self.url):
            return bool(system.isfile(path))

    def open(self, mode: str = "rb") -> BinaryIO:
        """The content as a stream, fetched as it is read."""
        assert mode == "rb"
        system, path = _system(self.url)
        with explained(self.url):
            raw = _Raw(system.open(path, "rb"), self.url)
        return cast(BinaryIO, io.BufferedReader(raw, _BLOCK))


@dataclass(frozen=True)
class RemoteFacts:
    """What a server says of a file."""

    bytes: int | None
    identity: str | None
    """`etag:...` or the like, which changes with the content; None if the server has nothing of the kind."""


def remote_facts(file: RemoteFile) -> RemoteFacts:
    """Asked anew each time: listings are not believed for longer than they take."""
    system, path = _system(file.url)
    with explained(file.url):
        system.invalidate_cache()
        told = dict(system.info(path))
    lfs = told.get("lfs")
    if isinstance(lfs, dict):    # a large file on the Hugging Face hub
        told = {**told, "sha256": lfs.get("sha256")}
    found = next((name for name in _IDENTITY if told.get(name)), None)
    identity = f"{found.lower()}:{str(told[found]).strip(chr(34))}" if found else None
    size = told.get("size")
    return RemoteFacts(int(size) if size is not None else None, identity)


def remote_sha256(file: RemoteFile, report: Callable[[int], None] | None = None) -> str:
    """Hash of the content: the file is fetched once for this alone."""
    digest = hashlib.sha256()
    with file.open() as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            if report is not None:
                report(len(block))
    return digest.hexdigest()


def remote_files(url: str) -> list[RemoteFile]:
    """The files behind an address: itself, whatever its name holds, those of a pattern, or all below a folder (an
    address that ends in `/`, or that the protocol calls a folder). Unsorted."""
    system, path = _system(url)
    pattern = any(sign in url for sign in ("*", "[")) or ("?" in url and not url.startswith("http"))
    with explained(url):
        # Names that are published do hold brackets: what stands there under this very name is meant.
        if pattern and not system.isfile(path):
            found = [name for name, told in system.glob(path, detail=True).items() if told["type"] == "file"]
        elif url.endswith("/") or (not url.startswith("http") and system.isdir(path)):
            found = system.find(path)
        elif system.exists(path):
            return [RemoteFile(url)]
        else:
            raise FileNotFoundError(url)
    return [RemoteFile(system.unstrip_protocol(name)) for name in found]


@contextmanager
def explained(url: str) -> Iterator[None]:
    """What a network or its library may raise, as a UserError that names the address."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"no file `{url}`", fix="check the address, and that you may read it") from error
    except Exception as error:    # every protocol has a library of its own, with errors of its own
        raise UserError(
            "the remote file cannot be read", where=url, why=f"{type(error).__name__}: {_first_line(error)}",
            fix="check the address and the network, then run the same command again: it goes on where it was",
        ) from error


class _Raw(io.RawIOBase):
    """A remote file as Python's own raw stream, so that buffers, `peek` and short reads behave as on a disk."""

    def __init__(self, inner: Any, url: str) -> None:
        self._inner, self._url = inner, url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        # A server that gives no parts of a file lets it be read from the front alone.
        return bool(self._inner.seekable())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with explained(self._url):
            return int(self._inner.seek(offset, whence))

    def tell(self) -> int:
        return int(self._inner.tell())

    def readinto(self, buffer: Any) -> int:    # any writable buffer
        with explained(self._url):
            content = self._inner.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self._inner.close()
        super().close()


def _system(url: str) -> tuple[Any, str]:
    """The file system of an address, and the path on it."""
    found = _ADDRESS.match(url)
    assert found is not None
    protocol = found[1]
    try:
        import fsspec
    except ModuleNotFoundError as error:
        raise _missing("fsspec", protocol, error) from error
    try:
        with explained(url):
            system, path = fsspec.core.url_to_fs(url)
    except UserError as error:
        cause = error.__cause__
        if isinstance(cause, ImportError):
            raise _missing(PACKAGES.get(protocol, protocol), protocol, cause) from cause
        if isinstance(cause, ValueError) and "Protocol" in str(cause):
            raise UserError(
                f"there is no protocol `{protocol}://`", where=url,
                why=f"known are, among others: {', '.join(sorted(PACKAGES))}",
                fix="check the address",
            ) from cause
        raise
    return system, str(path)


def _missing(package: str, protocol: str, error: ImportError) -> UserError:
    return UserError(
        f"`{protocol}://` needs the package `{package}`, which is not installed", why=_first_line(error),
        fix=f"pip install {package}",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
