"""A converted model on disk: its files plus `artifact.json`."""

from __future__ import annotations

import dataclasses
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

from tfopt.errors import InputError
from tfopt.signature import Signature
from tfopt.variant import Variant

FILE_NAME = "artifact.json"


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A converted model on disk.

    Attributes:
      folder: where the files lie.
      variant: what it is.
      parent: the artifact it was converted from, or None when that is the source.
      source_sha256: hash of the model that came in.
      signature: inputs and outputs of its sessions.
      size_bytes: all model files together, without `artifact.json`.
      compressed_bytes: the same after deflate, file by file.
      versions: of the packages that converted it.
      notes: what a user should know, one sentence each.
      needs: what a processor must have for the outputs to be right; only "vnni" so far, see
        `tfopt.measure.environment.has_vnni`.
      measured_on: CPU, versions and threads of the measurement, once it was measured.
    """

    folder: Path
    variant: Variant
    parent: Variant | None
    source_sha256: str
    signature: Signature
    size_bytes: int
    compressed_bytes: int
    versions: dict[str, str]
    notes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    measured_on: dict[str, Any] | None = None

    def save(self) -> None:
        """Writes `artifact.json` into the folder."""
        value = {
            "format": 1,
            "variant": str(self.variant),
            "parent": None if self.parent is None else str(self.parent),
            "source_sha256": self.source_sha256,
            "signature": self.signature.to_json(),
            "size_bytes": self.size_bytes,
            "compressed_bytes": self.compressed_bytes,
            "versions": self.versions,
            "notes": list(self.notes),
            "needs": list(self.needs),
            "measured_on": self.measured_on,
        }
        (self.folder / FILE_NAME).write_text(json.dumps(value, indent=2) + "\n")

    @classmethod
    def open(cls, folder: str | Path) -> Artifact:
        """Reads the artifact in a folder.

        Raises:
          InputError: when the folder holds none.
        """
        folder = Path(folder)
        path = folder / FILE_NAME
        if not path.is_file():
            raise InputError(
                f"No artifact in {folder}: {FILE_NAME} is missing; give a folder that "
                "`tfopt convert` or `tfopt optimize` wrote, such as OUTPUT_DIR/best."
            )
        try:
            value = json.loads(path.read_text())
            return cls(
                folder=folder,
                variant=Variant.parse(value["variant"]),
                parent=None if value["parent"] is None else Variant.parse(value["parent"]),
                source_sha256=value["source_sha256"],
                signature=Signature.from_json(value["signature"]),
                size_bytes=value["size_bytes"],
                compressed_bytes=value["compressed_bytes"],
                versions=value["versions"],
                notes=tuple(value["notes"]),
                needs=tuple(value.get("needs", ())),
                measured_on=value["measured_on"],
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is damaged ({error}); convert the model again.") from error

    def identity(self) -> dict[str, Any]:
        """What tells whether two results were timed against the same thing."""
        return {
            "variant": str(self.variant),
            "source_sha256": self.source_sha256,
            "versions": self.versions,
        }

    def copy_to(self, folder: str | Path, **changes: Any) -> Artifact:
        """Copies the files to a new folder and returns the artifact there.

        Raises:
          InputError: when the folder is there already.
        """
        folder = Path(folder)
        if folder.exists():
            raise InputError(f"{folder} exists already; nothing was overwritten, name another.")
        shutil.copytree(self.folder, folder)
        artifact = dataclasses.replace(self, folder=folder, **changes)
        artifact.save()
        return artifact


def measure_files(folder: Path) -> tuple[int, int]:
    """Total size in bytes of the model files in a folder, and after deflate (level 6)."""
    size = compressed = 0
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name == FILE_NAME:
            continue
        compressor = zlib.compressobj(6)
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                size += len(block)
                compressed += len(compressor.compress(block))
        compressed += len(compressor.flush())
    return size, compressed
