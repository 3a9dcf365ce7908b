"""Compressed files, told by the end of their names: gzip (.gz), xz (.xz) and Zstandard (.zst)."""

from __future__ import annotations

import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, BinaryIO, cast

if TYPE_CHECKING:
    import zstandard

SUFFIXES = (".gz", ".xz", ".zst")
_PIECE = 1 << 17  # compressed bytes that are read at a time; they may become a thousand times more


def suffix_of(name: str) -> str:
    """The suffix of a compressed file's name, or an empty text."""
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")


def without_suffix(name: str) -> str:
    """The name that the file has when it is not compressed."""
    return name[: len(name) - len(suffix_of(name))]


def decompressed(file: BinaryIO, name: str) -> BinaryIO:
    """The plain bytes of a file whose name says how it is compressed.

    Reading raises OSError, EOFError, or one of `errors` where they are damaged or cut off.
    """
    suffix = suffix_of(name)
    if suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if suffix == ".xz":
        return cast(BinaryIO, lzma.LZMAFile(file))
    return cast(BinaryIO, _ZstandardReader(file)) if suffix else file


def errors() -> tuple[type[Exception], ...]:
    """What damaged data raises, beside OSError and EOFError."""
    import zstandard

    return (zlib.error, lzma.LZMAError, zstandard.ZstdError)


@contextlib.contextmanager
def compressed(file: IO[bytes], name: str) -> Iterator[IO[bytes]]:
    """A file to write plain bytes to, which go into `file` compressed as the name says.

    The bytes depend on nothing but what is written: no time, no name.
    """
    suffix = suffix_of(name)
    if suffix == ".gz":
        with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
            yield cast(IO[bytes], packed)
    elif suffix == ".xz":
        with lzma.LZMAFile(file, "wb") as packed:
            yield cast(IO[bytes], packed)
    elif suffix:
        import zstandard

        with zstandard.ZstdCompressor().stream_writer(file, closefd=False) as packed:
            yield cast(IO[bytes], packed)
    else:
        yield file


class _ZstandardReader(io.RawIOBase):
    """The plain bytes of a Zstandard file of one frame or several.

    The library's own reader takes a file that was cut off for one that has ended.
    """

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._file, self._decompressor = file, zstandard.ZstdDecompressor()
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._plain = b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        parts, length = [self._plain], len(self._plain)
        while (size < 0 or length < size) and (data := self._more()) is not None:
            parts.append(data)
            length += len(data)
        plain = b"".join(parts)
        size = length if size < 0 else size
        self._plain = plain[size:]
        return plain[:size]

    def _more(self) -> bytes | None:
        """The next plain bytes; None at the end. Raises: EOFError where the file is cut off."""
        data = self._file.read(_PIECE)
        if not data:
            if self._frame is not None:
                raise EOFError("compressed data ended before its end mark")
            return None
        plain = []
        # Files that were joined have several frames, one behind another.
        while data:
            frame = self._frame or self._decompressor.decompressobj()
            plain.append(frame.decompress(data))
            data, self._frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        return b"".join(plain)

    def close(self) -> None:
        self._file.close()
        super().close()
