"""What `trtexec` of TensorRT 7 to 11 writes to its log, as values.

Lines are `[time] [level] message`, with a second tag `[TRT]` when the library speaks and not the
program, and one line `&&&& PASSED …` or `&&&& FAILED …` at the end
(https://github.com/NVIDIA/TensorRT, samples/common/sampleReporting.cpp and logger.cpp).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

from tfopt.trt import libraries

_LINE = re.compile(r"(?:\[[\d/:-]+\] )?\[(?P<level>[VIWEF])\] ?(?:\[TRT\] ?)?(?P<message>.*)")
_VERDICT = re.compile(r"&&&& (RUNNING|PASSED|FAILED) TensorRT\.trtexec(?: \[TensorRT v(\d+)\])?")
_NUMBER = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"

# Errors that have no level: of the parser, the CUDA runtime and the loader.
_BARE_ERROR = re.compile(r"\[\d{1,2}\] (.+)|(Cuda failure.*)|.*(error while loading shared lib.*)")
# Errors that only say that there was one.
_UNTELLING = re.compile(
    r"Failed to parse onnx|Parsing model failed|Engine (could not|creation|set up)|Building engine"
    r"|Failed to create engine|Inference set up failed|ModelImporter\.cpp|.*: Skipping tactic"
)
_NODE = re.compile(r'.*While parsing node number (\d+) \[(\S+)(?: -> "([^"]*)")?\]')
_PLUGIN = re.compile(r".*(?:could not|[Cc]annot) find plugin:? (\S+?),? version")
_IMPORTER = re.compile(r".*No importer registered for op: (\S+?)\.")
_MEMORY = re.compile(r"out ?of ?memory|User allocator error", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Times:
    """What all runs took.

    Attributes:
      median_ms: of the runs.
      percentiles_ms: by percent, such as `{99.0: 1.2}`.
    """

    median_ms: float
    percentiles_ms: Mapping[float, float]


@dataclasses.dataclass(frozen=True)
class TrtexecLog:
    """The values of one log; None where it does not say.

    Attributes:
      version: of TensorRT.
      is_passed: how it ended.
      gpu: the name of the GPU.
      compute_capability: such as `8.6`.
      build_seconds: of the engine, without reading the ONNX file.
      engine_bytes: size of the engine.
      device_memory_bytes: that a run needs besides the engine.
      throughput_per_s: runs in a second, each of one batch.
      latency: from copying inputs to having copied outputs.
      gpu_compute: of the kernels.
      host_to_device: of copying the inputs.
      device_to_host: of copying the outputs.
      errors: messages.
      warnings: messages.
      reason: why it failed, without a full stop; None when it did not.
      is_out_of_memory: whether it failed because the GPU had no memory left.
    """

    version: str | None
    is_passed: bool | None
    gpu: str | None
    compute_capability: str | None
    build_seconds: float | None
    engine_bytes: int | None
    device_memory_bytes: int | None
    throughput_per_s: float | None
    latency: Times | None
    gpu_compute: Times | None
    host_to_device: Times | None
    device_to_host: Times | None
    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    reason: str | None
    is_out_of_memory: bool


def parse(text: str) -> TrtexecLog:
    """Reads a log; lines that are no `trtexec` line are passed over."""
    lines = [line.strip() for line in text.splitlines()]
    messages: list[str] = []
    errors: list[str] = []
    warnings: list[str] = []
    verdicts: list[tuple[str, str | None]] = []
    for line in lines:
        if match := _LINE.fullmatch(line):
            message = match["message"].strip()
            messages.append(message)
            if match["level"] in "EF":
                errors.append(message)
            elif match["level"] == "W":
                warnings.append(message)
        elif match := _VERDICT.match(line):
            verdicts.append((match[1], match[2]))
        elif match := _BARE_ERROR.match(line):
            errors.append(next(filter(None, match.groups())))
    ends = [word == "PASSED" for word, _ in verdicts if word != "RUNNING"]
    is_passed = ends[-1] if ends else None
    is_out_of_memory = is_passed is not True and any(map(_MEMORY.search, errors))
    return TrtexecLog(
        version=_version(verdicts, messages),
        is_passed=is_passed,
        gpu=_first(messages, "Selected Device: (.+)"),
        compute_capability=_first(messages, r"Compute Capability: ([\d.]+)"),
        build_seconds=_float(
            messages,
            rf"Engine built in {_NUMBER} sec",
            rf"Engine generation completed in {_NUMBER} sec",
        ),
        engine_bytes=_bytes(messages, rf"Created engine with size: {_NUMBER} MiB"),
        device_memory_bytes=_bytes(
            messages,
            rf"Created execution context with device memory size: {_NUMBER} MiB",
            rf"\[MemUsageChange\] .* in IExecutionContext creation: .*GPU \+{_NUMBER}, now",
        ),
        # TensorRT 7 says 0 for files with an explicit batch.
        throughput_per_s=_float(messages, rf"[Tt]hroughput: {_NUMBER} qps") or None,
        latency=_times(messages, "Latency", "Host Latency"),
        gpu_compute=_times(messages, "GPU Compute Time", "GPU Compute"),
        host_to_device=_times(messages, "H2D Latency"),
        device_to_host=_times(messages, "D2H Latency"),
        errors=tuple(errors),
        warnings=tuple(warnings),
        reason=None if is_passed else _reason(errors, messages, is_out_of_memory),
        is_out_of_memory=is_out_of_memory,
    )


def _first(messages: Sequence[str], *patterns: str) -> str | None:
    """What the first pattern that fits anywhere has in its parentheses."""
    for pattern in patterns:
        for message in messages:
            if match := re.match(pattern, message):
                return match[1]
    return None


def _float(messages: Sequence[str], *patterns: str) -> float | None:
    text = _first(messages, *patterns)
    return None if text is None else float(text)


def _bytes(messages: Sequence[str], *patterns: str) -> int | None:
    value = _float(messages, *patterns)
    return None if value is None else round(value * (1 << 20))


def _version(
    verdicts: Sequence[tuple[str, str | None]], messages: Sequence[str]
) -> str | None:  # fmt: skip
    for _, number in verdicts:
        if number is not None:
            return libraries.spell(libraries.decode(int(number)))
    return _first(messages, r"TensorRT version: ([\d.]+)")


def _times(messages: Sequence[str], name: str, title: str | None = None) -> Times | None:
    """The times of one line, or of the lines under a title, as TensorRT until 8.0 has them."""
    line = _first(messages, rf"{name}: (min = .+)") or ""
    section = ", ".join(_section(messages, title)) if title else ""
    median = re.search(rf"median = {_NUMBER} ms", line) or re.search(
        rf"median: {_NUMBER} ms", section
    )
    if median is None:
        return None
    found = re.findall(rf"percentile\({_NUMBER}%\) = {_NUMBER} ms", line) or [
        (percent, value)
        for value, percent in re.findall(rf"percentile: {_NUMBER} ms at {_NUMBER}%", section)
    ]
    return Times(float(median[1]), {float(percent): float(value) for percent, value in found})


def _section(messages: Sequence[str], title: str) -> Iterator[str]:
    is_inside = False
    for message in messages:
        if is_inside and not re.match(r"(min|max|mean|median|percentile): ", message):
            return
        if is_inside:
            yield message
        is_inside = is_inside or message == title


def _reason(errors: Sequence[str], messages: Sequence[str], is_out_of_memory: bool) -> str | None:
    """The first error that says something, with the node that it came from."""
    if is_out_of_memory:
        return "the GPU has no memory left"
    if not errors:
        return None
    node = next(filter(None, map(_NODE.match, errors)), None)
    where = ""
    if node is not None:
        number, op, output = node.groups()
        where = f", at node {number} ({op}" + (f", which makes {output})" if output else ")")
    if any("Plugin not found" in error for error in errors):
        # An operator that has no importer may be a plugin, and a plugin may stand inside a node.
        plugins = (
            _all(_PLUGIN, errors) or _all(_IMPORTER, messages)[-1:] or [node[2] if node else ""]
        )
        return f"TensorRT has no operator {', '.join(dict.fromkeys(plugins))}{where}"
    telling = [error for error in errors if not _UNTELLING.match(error)]
    return f"{(telling or list(errors))[0]}{where}"


def _all(pattern: re.Pattern[str], messages: Sequence[str]) -> list[str]:
    return [match[1] for message in messages if (match := pattern.match(message))]
