"""Members of .npz files as streams, whether compressed or not; NumPy reads them as a whole only."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tfopt.errors import InputError

_DAMAGES = (zipfile.BadZipFile, zlib.error, EOFError)


class NpzFile:
    """The members of an .npz file.

    Raises:
      InputError: when there is no such file or it is no .npz file.
    """

    def __init__(self, path: Path):
        if not path.exists():
            raise InputError(f"No data at {path}: it does not exist; expected an .npz file.")
        try:
            with zipfile.ZipFile(path) as archive:
                self._files = {
                    name.removesuffix(".npy"): name
                    for name in archive.namelist()
                    if name.endswith(".npy")
                }
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise InputError(
                f"{path} is no .npz file ({error}); write it with numpy.savez."
            ) from error
        self._path = path
        self._members: dict[str, Member] = {}

    def keys(self) -> Iterable[str]:
        """The names of the members."""
        return self._files.keys()

    def __iter__(self) -> Iterator[str]:
        """Likewise."""
        return iter(self._files)

    def __getitem__(self, name: str) -> Member:
        """One member, by name."""
        # Members that nobody asks for may hold anything.
        if name not in self._members:
            self._members[name] = Member(self._path, self._files[name])
        return self._members[name]


class Member:
    """One array of an .npz file.

    Attributes:
      shape: the first dimension counts examples.
      dtype: of the array.

    Raises:
      InputError: when it is damaged, holds Python objects or is stored by columns.
    """

    def __init__(self, path: Path, name: str):
        self._path, self._name = path, name
        with self.open() as stream:
            del stream

    def open(self) -> Any:
        """A stream that stands at the first example."""
        try:
            stream = zipfile.ZipFile(self._path).open(self._name)  # noqa: SIM115
            version = np.lib.format.read_magic(stream)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            self.shape, is_fortran, self.dtype = read(stream)
        except (ValueError, *_DAMAGES) as error:
            raise self._damaged(error) from error
        if self.dtype.hasobject or (is_fortran and len(self.shape) > 1):
            what = "holds Python objects" if self.dtype.hasobject else "is stored by columns"
            raise InputError(
                f"{self._name} in {self._path} {what}; save numpy.ascontiguousarray(array), "
                "strings with a dtype such as 'S20'."
            )
        return stream

    def take(self, stream: Any, count: int) -> np.ndarray:
        """The next `count` examples of a stream."""
        shape = (count, *self.shape[1:])
        size = int(np.prod(shape)) * self.dtype.itemsize
        pieces = []
        try:
            while size and (piece := stream.read(size)):
                pieces.append(piece)
                size -= len(piece)
        except _DAMAGES as error:
            raise self._damaged(error) from error
        if size:
            raise InputError(f"{self._path} ends inside {self._name}; write it again.")
        return np.frombuffer(b"".join(pieces), self.dtype).reshape(shape)

    def _damaged(self, error: Exception) -> InputError:
        return InputError(f"{self._name} in {self._path} is damaged ({error}); write it again.")
