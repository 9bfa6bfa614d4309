import functools
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfopt import main_module
from tfopt.errors import InputError
from tfopt.measure import metric_names
from tfopt.measure.metrics import METRICS

NAMES = st.from_regex(r"[a-z_][a-z_0-9]{0,8}", fullmatch=True).filter(
    lambda name: name not in ("if", "in", "is", "or", "as", "and", "not", "for", "def", "del")
)
VALUES = st.one_of(
    st.integers(-300, 300), st.booleans(), st.none(), st.floats(0, 1, width=16),
    st.text("ab ,=()\'", max_size=4), st.lists(st.floats(0, 1, width=16), max_size=3),
)  # fmt: skip


def distance(outputs, labels):
    return np.abs(outputs[:, 0] - labels)


class TestText:
    @settings(deadline=None, max_examples=50)
    @given(st.sampled_from(["top1", "keras:MeanIoU", "a.b:c"]), st.dictionaries(NAMES, VALUES))
    def test_what_is_spelled_parses_back(self, name, options):
        import keyword

        options = {key: value for key, value in options.items() if not keyword.iskeyword(key)}
        text = metric_names.spell(name, options)
        assert metric_names.parse(text) == (name, options)
        assert metric_names.split(text) == {None: text}
        both = metric_names.split(f"first={text}, second=mae")
        assert both == {"first": text, "second": "mae"}

    @pytest.mark.parametrize(
        "text", ["f1(", "f1(1)", "f1(a=)", "f1(**x)", "f1(a=1)(b=2)", "f1(a=open())"]
    )
    def test_what_does_not_parse(self, text):
        with pytest.raises(InputError, match="expected name"):
            metric_names.parse(text)

    @pytest.mark.parametrize("text", ["a=top1,mae", "a=top1,a=mae", "=top1,b=mae", "a=,b=mae"])
    def test_outputs_without_one_metric_each(self, text):
        with pytest.raises(InputError, match="`metric="):
            metric_names.split(text)

    def test_numbers_of_numpy(self):
        text = metric_names.spell("keras:AUC", {"thresholds": [np.float64(0.25), 0.5],
                                                "num_thresholds": np.int64(4)})  # fmt: skip
        assert text == "keras:AUC(num_thresholds=4,thresholds=[0.25,0.5])"


class TestFindMetric:
    def test_by_name(self):
        for name, found in METRICS.items():
            if name != "pinball":
                assert metric_names.find_metric(name) is found
        assert not metric_names.find_metric("mse").higher_is_better
        found = metric_names.find_metric("mean_iou(num_classes=3,ignore=255)")
        assert found.name == "mean_iou(ignore=255,num_classes=3)"

    def test_unknown_lists_the_names(self):
        with pytest.raises(InputError) as caught:
            metric_names.find_metric("top2")
        for name in ("'top2'", "package.module:function", "keras:", "sklearn:", *METRICS):
            assert name in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("top1(k=3)", "top1 has no option 'k'; it has no options"),
            ("mean_iou(void=1)", "no option 'void'; its options are ignore, num_classes"),
            ("mean_iou(num_classes=1)", "num_classes is 1; expected a whole number of at least 2"),
            ("pinball", "pinball needs quantiles"),
            ("pinball(quantiles=[1,2])", r"quantiles is \[1, 2\]; expected numbers between"),
            ("no_such_module:f", "cannot be found .*no_such"),
            ("json:no_such_function", "cannot be found .*no_such"),
            ("json:decoder", "is a module; expected a function"),
            ("json:dumps(a=1)", "take no options"),
            ("__main__:no_such_function", "cannot be found .*no_such"),
            (
                "sklearn:f2_score",
                "Unknown metric sklearn:f2_score; those of sklearn are .*f1_score",
            ),
            ("sklearn:f1_score(mean=macro)", "no option 'mean'; its options are .*average"),
            ("sklearn:f1_score(output=softmax)", "output is 'softmax'; expected scores, argmax"),
            ("keras:Accuracies", "Unknown metric keras:Accuracies; those of keras are .*Accuracy"),
            ("keras:MeanIoU(classes=2)", "no option 'classes'; its options are .*num_classes"),
        ],
    )
    def test_what_is_refused(self, name, message):
        with pytest.raises(InputError, match=message):
            metric_names.find_metric(name)


class TestNameOf:
    def test_functions_that_workers_can_import(self):
        name = metric_names.name_of(distance)
        assert name == f"{__name__}:distance"
        assert metric_names.find_metric(name).score is distance

    def test_others_are_sent_as_parts_of_the_script(self, monkeypatch):
        monkeypatch.setattr(main_module, "_shared", {})
        scale = 3.0

        def scaled(outputs, labels):
            return scale * distance(outputs, labels)

        scaled.higher_is_better = False
        name = metric_names.name_of(scaled)
        assert name.startswith("__main__:") and metric_names.find_metric(name).score is scaled
        packed, missing = main_module.pack()
        assert not missing
        monkeypatch.setattr(main_module, "_shared", {})
        monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
        main_module.install(packed, missing)
        found = metric_names.find_metric(name)
        assert not found.higher_is_better
        outputs, labels = np.array([[1.0], [5.0]]), np.array([2, 2])
        np.testing.assert_array_equal(found.score(outputs, labels), [3, 9])

    def test_two_lambdas_are_two_metrics(self, monkeypatch):
        monkeypatch.setattr(main_module, "_shared", {})
        both = {"a": lambda o, y: o[:, 0], "b": lambda o, y: o[:, 1]}
        names = metric_names.split(metric_names.name_of(both))
        assert names["a"] != names["b"]
        for output, function in both.items():
            assert metric_names.find_metric(names[output]).score is function
        assert metric_names.split(metric_names.name_of(both)) == names

    def test_functions_of_the_script(self, monkeypatch):
        script = types.ModuleType("__main__")
        exec("def half(o, y): return o[:, 0] / 2", vars(script))
        monkeypatch.setitem(sys.modules, "__main__", script)
        monkeypatch.setattr(main_module, "_shared", {})
        assert metric_names.name_of(script.half) == "__main__:half"
        assert metric_names.name_of("__main__:half") == "__main__:half"
        assert metric_names.find_metric("__main__:half").score is script.half
        assert not main_module._shared

    def test_partials_and_objects(self, monkeypatch):
        monkeypatch.setattr(main_module, "_shared", {})

        class Counter:
            def __call__(self, outputs, labels):
                return np.zeros(len(labels))

        for given_metric in (functools.partial(distance), Counter()):
            name = metric_names.name_of(given_metric)
            assert metric_names.find_metric(name).score is given_metric

    def test_keras_metrics(self):
        import keras

        assert metric_names.name_of(keras.metrics.MeanIoU(num_classes=21)) == (
            "keras:MeanIoU(num_classes=21)"
        )
        name = metric_names.name_of({"a": keras.metrics.BinaryAccuracy(threshold=0.25), "b": "mae"})
        assert name == "a=keras:BinaryAccuracy(threshold=0.25),b=mae"

        class Own(keras.metrics.Metric):
            pass

        with pytest.raises(InputError, match="metric is a Own, no metric of Keras's own"):
            metric_names.name_of(Own())

    @pytest.mark.parametrize("wrong", [3, [distance], {}, int])
    def test_what_is_no_metric(self, wrong):
        with pytest.raises(InputError, match="metric is"):
            metric_names.name_of(wrong)

    def test_fingerprints_follow_the_code(self, monkeypatch):
        monkeypatch.setattr(main_module, "_shared", {})
        names = [metric_names.name_of(f) for f in (lambda o, y: 1.0, lambda o, y: 2.0)]
        first, second = map(metric_names.fingerprint, names)
        assert first != second and first == metric_names.fingerprint(names[0])
        assert metric_names.fingerprint("top1") is metric_names.fingerprint(None) is None


class TestFunctionsOfLibraries:
    """They take labels first, and `higher_is_better` is not known of them."""

    def test_scikit_learn(self):
        metrics = pytest.importorskip("sklearn.metrics")
        name = metric_names.name_of(metrics.mean_squared_error)
        assert name == "sklearn:mean_squared_error"
        assert not metric_names.find_metric(name).higher_is_better
        with pytest.raises(InputError, match="Unknown metric sklearn:confusion_matrix"):
            metric_names.name_of(metrics.confusion_matrix)

    def test_losses_of_keras(self):
        import keras

        for function in (keras.losses.mean_squared_error, keras.losses.MeanSquaredError()):
            with pytest.raises(InputError, match="takes labels first and may be an error"):
                metric_names.name_of(function)

    def test_metrics_of_keras_need_labels_of_the_outputs_shape(self):
        labels = np.array([0, 1, 2])
        outputs = np.eye(3, dtype=np.float32)
        for name in ("CategoricalAccuracy", "MeanSquaredError"):
            with pytest.raises(InputError, match=r"own shape \(3, 3\) and got \(3,\)"):
                metric_names.find_metric(f"keras:{name}").score(outputs, labels)
        found = metric_names.find_metric("keras:SparseCategoricalAccuracy")
        np.testing.assert_array_equal(found.score(outputs, labels), 1)
