import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfopt.trt import cache
from tfopt.trt.profiles import Profile
from tfopt.trt.spec import Built, EngineSpec
from tfopt.trt.target import Target

H100 = Target("NVIDIA H100 80GB HBM3", "9.0", "580.159.04", {"TensorRT": "8.6.0"})
PROFILE = Profile.parse(*["image:1x8x8x3"] * 3)
SPEC = EngineSpec("float16", PROFILE)
BUILT = Built("tensorrt 8.6.1", 57.3, ({"Name": "conv"},), {"device_memory_bytes": 7.0}, ("x",))

specs = st.builds(
    EngineSpec,
    st.sampled_from(["float32", "float16", "int8"]),
    st.integers(1, 9).map(lambda n: Profile.parse(*[f"image:{n}x8x8x3"] * 3)),
    st.booleans(),
    st.none() | st.integers(1, 1 << 40),
    st.lists(st.sampled_from("abc"), max_size=2).map(tuple),
    st.booleans(),
    st.integers(0, 5),
    st.none() | st.just(Path("/somewhere")),
)


@pytest.fixture
def model(tmp_path):
    file = tmp_path / "model" / "model.onnx"
    file.parent.mkdir()
    file.write_bytes(b"model")
    return file


@pytest.fixture(scope="module")
def one_model(tmp_path_factory):
    file = tmp_path_factory.mktemp("model") / "model.onnx"
    file.write_bytes(b"model")
    return file


@given(specs, specs)
def test_keys_are_the_same_for_the_same_engine_only(one_model, one, other):
    def key(spec):
        return cache.engine_key(H100, one_model, spec, "python")

    without = [dataclasses.replace(spec, timing_cache=None) for spec in (one, other)]
    assert (key(one) == key(other)) == (without[0] == without[1])


@pytest.mark.parametrize("field", ["gpu", "driver", "compute_capability", "libraries"])
def test_each_part_of_the_target_is_in_the_keys(model, field):
    other = dataclasses.replace(
        H100, **{field: {"TensorRT": "10.0.1"} if field == "libraries" else "x"}
    )
    keys = [cache.engine_key(target, model, SPEC, "python") for target in (H100, other)]
    assert keys[0] != keys[1]
    files = [cache.timing_file(Path("/cache"), target) for target in (H100, other)]
    assert files[0] != files[1]


def test_builder_and_model_are_in_the_key(model):
    key = cache.engine_key(H100, model, SPEC, "python")
    assert cache.engine_key(H100, model, SPEC, "trtexec") != key
    (model.parent / "weights.data").write_bytes(b"1")
    with_weights = cache.engine_key(H100, model, SPEC, "python")
    assert with_weights != key
    (model.parent / "weights.data").write_bytes(b"2")
    assert cache.engine_key(H100, model, SPEC, "python") not in (key, with_weights)


def test_what_is_kept_is_found_again(tmp_path):
    engine = tmp_path / "model.engine"
    engine.write_bytes(b"engine")
    cache.keep(tmp_path / "cache", "key", engine, BUILT)
    copy = tmp_path / "copy.engine"
    assert cache.fetch(tmp_path / "cache", "key", copy) == BUILT
    assert copy.read_bytes() == b"engine"
    assert {file.name for file in (tmp_path / "cache").iterdir()} == {"key.engine", "key.json"}


@pytest.mark.parametrize("damage", ["engine", "json", "text"])
def test_what_is_damaged_is_built_anew(tmp_path, damage):
    engine = tmp_path / "model.engine"
    engine.write_bytes(b"engine")
    cache.keep(tmp_path / "cache", "key", engine, BUILT)
    if damage == "text":
        (tmp_path / "cache" / "key.json").write_text("{")
    else:
        (tmp_path / "cache" / f"key.{damage}").unlink()
    assert cache.fetch(tmp_path / "cache", "key", tmp_path / "copy.engine") is None
    assert cache.fetch(tmp_path / "cache", "other", tmp_path / "copy.engine") is None


def test_the_folder_follows_the_users_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_folder() == tmp_path / "tfopt" / "tensorrt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.default_folder() == tmp_path / ".cache" / "tfopt" / "tensorrt"
