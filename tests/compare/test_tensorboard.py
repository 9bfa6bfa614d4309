"""What TensorBoard reads back, with its own reader."""

import importlib.util

import pytest

import tfopt
from tests.compare.test_comparison import CHOSEN, DETAILS, FAILED, MEASURED
from tfopt.compare import tensorboard
from tfopt.compare.comparison import Comparison

COMPARISON = Comparison((MEASURED, CHOSEN, FAILED), DETAILS)


def read(folder):
    """Scalars and hyperparameters of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2
    from tensorboard.util import tensor_util

    events = EventAccumulator(str(folder))
    events.Reload()
    scalars = {
        tag: tensor_util.make_ndarray(events.Tensors(tag)[0].tensor_proto).item()
        for tag in events.Tags()["tensors"]
        if not tag.startswith("_hparams_")
    }
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    data = plugin_data_pb2.HParamsPluginData.FromString(content)
    values = {}
    for name, value in data.session_start_info.hparams.items():
        values[name] = getattr(value, value.WhichOneof("kind"))
    return scalars, values


def test_every_measured_row_is_a_run(tmp_path):
    paths = COMPARISON.to_tensorboard(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        f"{row['model']}/{tfopt.Variant.parse(row['variant']).slug}" for row in (MEASURED, CHOSEN)
    ]
    for path, row in zip(paths, (MEASURED, CHOSEN), strict=True):
        scalars, values = read(path)
        wanted = {
            name: pytest.approx(row[name], rel=1e-6)
            for name in tensorboard.METRICS
            if row.get(name) is not None
        }
        assert scalars == wanted
        variant = tfopt.Variant.parse(row["variant"])
        assert (values["precision"], values["runtime"]) == (variant.precision, variant.runtime)
        assert values["batch_size"] == row["batch_size"]
        assert values["chosen"] == str(row is CHOSEN).lower()


def test_dashboard_knows_columns(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    COMPARISON.to_tensorboard(tmp_path)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    content = events.PluginTagToContent("hparams")["_hparams_/experiment"]
    experiment = plugin_data_pb2.HParamsPluginData.FromString(content).experiment
    assert {"precision", "runtime", "options"} <= {info.name for info in experiment.hparam_infos}
    assert "speedup" in {info.name.tag for info in experiment.metric_infos}


def test_rows_with_one_name_become_runs_of_their_own(tmp_path):
    rows = ({**MEASURED, "batch_size": 1}, {**MEASURED, "batch_size": 8})
    paths = Comparison(rows).to_tensorboard(tmp_path / "sizes")
    assert [path.name for path in paths] == ["batch_1", "batch_8"]
    paths = Comparison((MEASURED, MEASURED)).to_tensorboard(tmp_path / "rows")
    assert [path.name for path in paths] == ["row_0", "row_1"]


def test_nothing_is_drawn_twice(tmp_path):
    COMPARISON.to_tensorboard(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(tfopt.InputError, match="exists already; nothing was written"):
        COMPARISON.to_tensorboard(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_to_show(tmp_path):
    with pytest.raises(tfopt.InputError, match="no measured row"):
        Comparison((FAILED,)).to_tensorboard(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(tfopt.InputError, match="cannot be written"):
        COMPARISON.to_tensorboard(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(tfopt.InputError, match=r"pip install 'tfopt\[tensorboard\]'"):
        COMPARISON.to_tensorboard(tmp_path)
