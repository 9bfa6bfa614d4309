"""What engines belong to: a GPU, its driver and the versions of the libraries that built them.

An engine runs on the GPU model and the TensorRT version that it was built with and nowhere else
(https://docs.nvidia.com/deeplearning/tensorrt, "Engine Compatibility").
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfopt.errors import ConversionError, InputError
from tfopt.measure import environment
from tfopt.trt.profiles import Profile

RECORD = "engine.json"
NO_GPU = (
    "it needs an NVIDIA GPU, and nvidia-smi finds none that CUDA_VISIBLE_DEVICES leaves visible."
)


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU with a set of libraries.

    Attributes:
      gpu: its name.
      compute_capability: such as `9.0`; empty where the driver does not tell.
      driver: its version.
      libraries: versions of what builds and runs engines, such as `{"TensorRT": "8.6.1"}`.
    """

    gpu: str
    compute_capability: str
    driver: str
    libraries: Mapping[str, str]

    @classmethod
    def here(cls, libraries: Mapping[str, str]) -> Target:
        """This machine's first GPU.

        Raises:
          ConversionError: when there is none.
        """
        if not (gpus := environment.gpus()):
            raise ConversionError("There is no NVIDIA GPU here, which engines are built on.")
        gpu = gpus[0]
        capability = ".".join(map(str, gpu.compute_capability or ()))
        return cls(gpu.name, capability, gpu.driver, dict(sorted(libraries.items())))

    def unlike(self, other: Target) -> list[str]:
        """What differs so that an engine of this target does not run on the other.

        Drivers may differ: they are in the key of caches, since timings depend on them.
        """
        found = []
        if (self.gpu, self.compute_capability) != (other.gpu, other.compute_capability):
            found.append(f"a {self.gpu} (here: {other.gpu})")
        for name, version in self.libraries.items():
            if (here := other.libraries.get(name)) != version:
                found.append(f"{name} {version} (here: {here or 'none'})")
        return found

    def key(self, *parts: Any) -> str:
        """A name for cached files that belong to this target, driver included, and `parts`.

        Args:
          *parts: anything that JSON holds, such as options and the hash of a model.
        """
        text = json.dumps([dataclasses.asdict(self), parts], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def __str__(self) -> str:
        libraries = ", ".join(f"{name} {version}" for name, version in self.libraries.items())
        return f"{self.gpu}, driver {self.driver}, {libraries}"


@dataclasses.dataclass(frozen=True)
class Record:
    """What lies beside an engine as `engine.json`.

    Attributes:
      target: where it runs.
      profile: for which shapes.
      details: of its runtime, plain values.
    """

    target: Target
    profile: Profile
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Writes the file into an artifact's folder."""
        value = {
            "target": dataclasses.asdict(self.target),
            "profile": self.profile.to_json(),
            "details": dict(self.details),
        }
        (folder / RECORD).write_text(json.dumps(value, indent=2) + "\n")

    @classmethod
    def open(cls, folder: Path) -> Record:
        """Reads the file.

        Raises:
          InputError: when it is missing or damaged.
        """
        try:
            value = json.loads((folder / RECORD).read_text())
            return cls(
                Target(**value["target"]), Profile.from_json(value["profile"]), value["details"]
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{folder / RECORD} is missing or damaged ({error}); convert the model again."
            ) from error

    def check_runs_here(self, folder: Path, here: Target) -> None:
        """Refuses engines of another GPU or version.

        Raises:
          InputError: says what they need, and how to build them anew.
        """
        if unlike := self.target.unlike(here):
            raise InputError(
                f"The engines in {folder} need {' and '.join(unlike)}; run them there, or build "
                f"them for this machine: tfopt rebuild --artifact={folder} --output_dir=NEW."
            )
