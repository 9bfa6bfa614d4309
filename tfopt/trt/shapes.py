"""For which shapes the engines of a conversion are built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tfopt.errors import InputError
from tfopt.trt.profiles import Profile

if TYPE_CHECKING:
    from tfopt.runtimes.base import Conversion

MAX_BATCH_SIZE = 32  # of dynamic engines, where nothing else is said


def choose(conversion: Conversion, shapes: str) -> Profile:
    """The profile of a conversion: as given, or one shape, or the shapes that the data has.

    Args:
      conversion: what is converted.
      shapes: `static` for one shape where the model is free in its batch size at most, `dynamic`
        for a range of batch sizes.

    Raises:
      InputError: when the given profile is not of this model, or excludes the data.
      ConversionError: when there are no examples to take free dimensions from.
    """
    signature, given = conversion.source.signature, conversion.engine.profile
    batches = iter(()) if conversion.shapes is None else conversion.shapes()
    if given is not None:
        given.check(signature)
        for batch in batches:
            if (outside := given.outside(batch)) is not None:
                raise InputError(
                    "The profile excludes the data in batches of "
                    f"`batch_size={conversion.batch_size}`: {outside}"
                )
        return given
    fixed = Profile.fixed(signature, conversion.batch_size)
    if shapes == "static" and fixed is not None:
        return fixed
    if shapes == "static":
        conversion.notes.append(
            "The model's inputs have free dimensions besides the batch, so that its engines are "
            "for a range of shapes."
        )
    return Profile.of_data(signature, batches, conversion.batch_size, MAX_BATCH_SIZE)
