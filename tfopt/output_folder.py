"""Folders that long work writes into: nothing that was there is lost without being asked for."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from tfopt.errors import InputError


class Contents:
    """What one kind of work writes into its output folder.

    Args:
      *names: of all files and folders that it may write.
      state: the file that it goes on from.
      marks: files that only this work writes; one of them is in each folder that it began.
    """

    def __init__(self, *names: str, state: str, marks: tuple[str, ...]):
        self.names, self.state, self.marks = names, state, marks

    def check(self, folder: Path, resume: bool, overwrite: bool) -> Path:
        """Checks that the folder can be claimed, and changes nothing.

        Returns:
          Its absolute path.

        Raises:
          InputError: as `claim` does.
        """
        folder = folder.absolute()
        if resume and overwrite:
            raise InputError("`resume=True` and `overwrite=True` exclude each other; give one.")
        try:
            if folder.exists() and not folder.is_dir():
                raise InputError(f"{folder} is a file; `output_dir` must be a folder.")
            is_full = folder.exists() and any(folder.iterdir())
        except OSError as error:
            raise self._unusable(folder, error) from error
        if resume and not (folder / self.state).is_file():
            raise InputError(f"Nothing to resume in {folder}: it holds no {self.state}.")
        if is_full and overwrite and not self._is_ours(folder):
            raise InputError(
                f"{folder} was not written by tfopt, so `overwrite=True` leaves it alone; name "
                "another `output_dir`."
            )
        if is_full and not overwrite and not resume:
            raise InputError(f"{folder} is not empty; {self._remedy(folder)}.")
        return folder

    def claim(self, folder: Path, resume: bool, overwrite: bool) -> Path:
        """Makes the output folder, and empties it if that was asked for.

        Raises:
          InputError: when it holds something and neither was asked for, holds what tfopt did not
            write, or cannot be written.
        """
        folder = self.check(folder, resume, overwrite)
        try:
            if overwrite and folder.exists():
                self.empty(folder)
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".write-{time.monotonic_ns()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise self._unusable(folder, error) from error
        return folder

    def empty(self, folder: Path) -> None:
        """Deletes what the work writes, and only that."""
        for name in self.names:
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _is_ours(self, folder: Path) -> bool:
        return any((folder / mark).is_file() for mark in self.marks)

    def _remedy(self, folder: Path) -> str:
        """What can be done about a folder that holds something; only what would work."""
        if (folder / self.state).is_file():
            return (
                "give `resume=True` to go on with it, `overwrite=True` to start again, or another "
                "`output_dir`"
            )
        if self._is_ours(folder):
            return "give `overwrite=True` to start again, or another `output_dir`"
        return "name another `output_dir`"

    @staticmethod
    def _unusable(folder: Path, error: OSError) -> InputError:
        return InputError(
            f"{folder} cannot be written ({error.strerror}); name another `output_dir`."
        )
