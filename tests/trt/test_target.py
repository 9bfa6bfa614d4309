import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfopt.errors import ConversionError, InputError
from tfopt.measure import environment
from tfopt.trt.profiles import Profile
from tfopt.trt.target import RECORD, Record, Target

H100 = Target("NVIDIA H100 80GB HBM3", "9.0", "580.159.04", {"TensorRT": "8.6.0"})
PROFILE = Profile.parse(*["image:1x8x8x3"] * 3)

names = st.text(min_size=1, max_size=8)
targets = st.builds(Target, names, names, names, st.dictionaries(names, names, max_size=3))


@given(targets, st.lists(names, max_size=3))
def test_keys_are_the_same_for_the_same_and_short(target, parts):
    again = Target(**json.loads(json.dumps(dataclasses.asdict(target))))
    assert target.key(*parts) == again.key(*parts)
    assert len(target.key(*parts)) == 32


@given(targets, targets, st.lists(names, max_size=2), st.lists(names, max_size=2))
def test_keys_differ_for_anything_else(one, other, parts, others):
    assert (one.key(*parts) == other.key(*others)) == (one == other and parts == others)


@pytest.mark.parametrize("field", ["gpu", "compute_capability", "driver", "libraries"])
def test_each_part_is_in_the_key(field):
    changed = {"TensorRT": "8.6.1"} if field == "libraries" else "other"
    assert dataclasses.replace(H100, **{field: changed}).key() != H100.key()


def test_drivers_may_differ_but_not_gpu_and_versions():
    assert H100.unlike(dataclasses.replace(H100, driver="1")) == []
    assert H100.unlike(dataclasses.replace(H100, gpu="Tesla T4")) == [
        "a NVIDIA H100 80GB HBM3 (here: Tesla T4)"
    ]
    assert H100.unlike(dataclasses.replace(H100, libraries={})) == ["TensorRT 8.6.0 (here: none)"]


def test_engines_of_another_machine_are_refused_with_what_they_need(tmp_path):
    Record(H100, PROFILE, {"num_engines": 1}).save(tmp_path)
    opened = Record.open(tmp_path)
    assert opened == Record(H100, PROFILE, {"num_engines": 1})
    opened.check_runs_here(tmp_path, H100)
    other = dataclasses.replace(H100, gpu="Tesla T4", libraries={"TensorRT": "10.1.0"})
    with pytest.raises(InputError) as caught:
        opened.check_runs_here(tmp_path, other)
    assert "need a NVIDIA H100 80GB HBM3 (here: Tesla T4) and TensorRT 8.6.0" in str(caught.value)
    assert f"tfopt rebuild --artifact={tmp_path}" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "{}", '{"target": 1, "profile": {}, "details": {}}'])
def test_damaged_records_are_refused(tmp_path, text):
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(InputError, match="missing or damaged"):
        Record.open(tmp_path)


@pytest.mark.skipif(bool(environment.gpus()), reason="there is a GPU")
def test_there_is_no_target_without_a_gpu():
    with pytest.raises(ConversionError, match="no NVIDIA GPU here"):
        Target.here({})
