import importlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import tfopt
from tests.train.models import FRAMEWORKS, IMAGES, LABELS, conv
from tfopt.distillation import losses, views
from tfopt.distillation.distiller import Distilling

each = pytest.mark.parametrize("framework", FRAMEWORKS)

NUM, CLASSES = 12, 3
X = np.random.default_rng(0).normal(size=(NUM, 4)).astype(np.float32)
Y = np.arange(NUM) % CLASSES
WEIGHTS = np.linspace(0.5, 2, NUM).astype(np.float32)


def dense(framework, seed, activation=None, units=CLASSES, l2=0.0):
    """One matrix, which gradients by hand are easy for."""
    keras = importlib.import_module(framework)
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((4,), name="x")
    regularizer = keras.regularizers.L2(l2) if l2 else None
    outputs = keras.layers.Dense(
        units, activation=activation, kernel_regularizer=regularizer, name="logits"
    )(inputs)
    return keras.Model(inputs, outputs, name=f"dense{seed}")


def logits_by_hand(model, x=X):
    kernel, bias = (np.asarray(value, np.float64) for value in model.get_weights())
    return x.astype(np.float64) @ kernel + bias


def softmax(logits):
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def compiled(student, teachers, framework, *, rate=0.1, loss=True, **options):
    keras = importlib.import_module(framework)
    found = tfopt.Distiller(student, teachers, **options)
    last = student.layers[-1]
    from_logits = getattr(getattr(last, "activation", None), "__name__", "softmax") == "linear"
    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits)
    found.compile(
        keras.optimizers.SGD(rate), entropy if loss else None,
        metrics=["accuracy"] if loss else None, jit_compile=False,
    )  # fmt: skip
    return found


def step_by_hand(student, teachers, labels, *, alpha, temperature, weights=None, shares=None):
    """Losses and gradients of one step on all examples, in float64."""
    x, z = X.astype(np.float64), logits_by_hand(student)
    weights = np.ones(NUM) if weights is None else weights.astype(np.float64)
    shares = [1 / len(teachers)] * len(teachers) if shares is None else shares
    has_label = labels >= 0
    onehot = np.eye(CLASSES)[np.maximum(labels, 0)]
    hard = -np.log(softmax(z))[np.arange(NUM), np.maximum(labels, 0)]
    of_labels = (weights * hard * has_label).sum() / max(1, has_label.sum())
    of_hard = (weights * has_label)[:, None] * (softmax(z) - onehot) / max(1, has_label.sum())
    of_teachers, of_soft = 0.0, 0.0
    q = softmax(z / temperature)
    for teacher, share in zip(teachers, shares, strict=True):
        p = softmax(logits_by_hand(teacher) / temperature)
        divergence = temperature**2 * (p * np.log(p / q)).sum(-1)
        of_teachers += share * (weights * divergence).mean()
        of_soft += share * temperature * weights[:, None] * (q - p) / NUM
    gradient = alpha * of_hard + (1 - alpha) * of_soft
    return of_labels, of_teachers, x.T @ gradient, gradient.sum(0)


@each
@pytest.mark.parametrize("activation", [None, "softmax"])
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("missing", [(), (0, 3, 4, 11), range(NUM)])
def test_a_step_is_that_of_mathematics(framework, activation, is_weighted, missing):
    student = dense(framework, 0, activation)
    teachers = [dense(framework, 1), dense("keras", 2, "softmax")]
    labels = Y.copy()
    labels[list(missing)] = -1
    weights = WEIGHTS if is_weighted else None
    of_labels, of_teachers, of_kernel, of_bias = step_by_hand(
        student, teachers, labels, alpha=0.3, temperature=2.0, weights=weights, shares=[0.75, 0.25]
    )
    kernel, bias = student.get_weights()
    taught_by = [tfopt.Teacher(teachers[0], weight=3.0), teachers[1]]
    distiller = compiled(student, taught_by, framework, alpha=0.3, temperature=2.0)
    before = logits_by_hand(student).argmax(-1)
    history = distiller.fit(X, labels, sample_weight=weights, batch_size=NUM, verbose=0).history
    np.testing.assert_allclose(history["label_loss"], [of_labels], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(history["teacher_loss"], [of_teachers], rtol=1e-4)
    np.testing.assert_allclose(
        history["loss"], [0.3 * of_labels + 0.7 * of_teachers], rtol=1e-4, atol=1e-6
    )
    new_kernel, new_bias = student.get_weights()
    np.testing.assert_allclose(new_kernel, kernel - 0.1 * of_kernel, atol=1e-5)
    np.testing.assert_allclose(new_bias, bias - 0.1 * of_bias, atol=1e-5)
    is_there = labels >= 0
    expected = (before == labels)[is_there].mean() if is_there.any() else 0.0
    np.testing.assert_allclose(history["accuracy"], [expected], atol=1e-6)


@each
def test_regularization_counts_as_in_fit(framework):
    keras = importlib.import_module(framework)
    results = []
    for is_distilled in (True, False):
        student = dense(framework, 0, l2=0.1)
        model = student
        if is_distilled:
            model = tfopt.Distiller(student, dense("keras", 1), alpha=1.0)
        entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1), entropy, metrics=["accuracy"], jit_compile=False)
        history = model.fit(X, Y, batch_size=5, epochs=3, shuffle=False, verbose=0).history
        evaluated = model.evaluate(X, Y, sample_weight=WEIGHTS, batch_size=5, verbose=0)
        results.append((student.get_weights(), history["loss"], history["accuracy"], evaluated))
    # With a share of 1 it is training on labels alone.
    for mine, plain in zip(*results, strict=True):
        for one, other in zip(mine, plain, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@each
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_get_the_squared_error(framework, dtype):
    keras = importlib.import_module(framework)
    student, teacher = dense(framework, 0, units=2), dense("keras", 1, units=2)
    distiller = tfopt.Distiller(student, teacher, alpha=0.5)
    distiller.compile(keras.optimizers.SGD(0.0), "mse", metrics=["mae"], jit_compile=False)
    values = np.random.default_rng(1).normal(size=(NUM, 2)).astype(dtype)
    values[[2, 7]] = np.nan
    history = distiller.fit(X, values, batch_size=NUM, verbose=0).history
    z, t = logits_by_hand(student), logits_by_hand(teacher)
    is_there = ~np.isnan(values).any(1)
    of_labels = np.square(z - values)[is_there].mean()
    of_teachers = np.square(z - t).mean()
    np.testing.assert_allclose(history["label_loss"], [of_labels], rtol=1e-4)
    np.testing.assert_allclose(history["teacher_loss"], [of_teachers], rtol=1e-4)
    np.testing.assert_allclose(
        history["mae" if "mae" in history else "mean_absolute_error"],
        [np.abs(z - values)[is_there].mean()], rtol=1e-4,
    )  # fmt: skip
    assert "SquaredError" in distiller.notes[-1]


@each
def test_without_labels_it_learns_from_teachers_alone(framework):
    student, teacher = dense(framework, 0), dense("keras", 1)
    distiller = compiled(student, teacher, framework, rate=1.0, loss=False, temperature=1.0)
    distiller.fit(np.tile(X, (40, 1)), batch_size=NUM, epochs=10, verbose=0)
    np.testing.assert_allclose(
        softmax(logits_by_hand(student)), softmax(logits_by_hand(teacher)), atol=0.02
    )


@each
def test_features_are_compared(framework):
    student, teacher = conv(framework, 0), conv("keras", 1)
    pairs = [
        tfopt.FeaturePair("block3/conv1", "block3/conv1", losses.AttentionTransfer(), 10.0),
        tfopt.FeaturePair("hidden", "hidden", losses.RelationalTargets(), 0.5),
    ]
    distiller = compiled(student, teacher, framework, rate=0.0, features=pairs)
    keras = importlib.import_module(framework)

    def features(model, name, kind):
        layer = model.get_layer("block3").get_layer(name) if name == "conv1" else None
        if layer is None:
            return kind.Model(model.inputs, model.get_layer(name).output)(IMAGES)
        inner = kind.Model(model.get_layer("block3").inputs, layer.output)
        return inner(kind.Model(model.inputs, model.get_layer("stem").output)(IMAGES))

    # In training mode the student's normalisation changes nothing before these two layers' inputs
    # but for what lies behind it, so that only the first is compared with another model's run.
    import keras as keras_3

    expected = losses.AttentionTransfer()(
        features(student, "conv1", keras), features(teacher, "conv1", keras_3)
    )
    history = distiller.fit(IMAGES, LABELS, batch_size=32, verbose=0).history
    of_relations = history["feature_loss"][0] - 10 * float(tf.reduce_mean(expected))
    assert of_relations > 0
    only_first = compiled(student, teacher, framework, rate=0.0, features=pairs[:1])
    history = only_first.fit(IMAGES, LABELS, batch_size=32, verbose=0).history
    np.testing.assert_allclose(
        history["feature_loss"], [10 * float(tf.reduce_mean(expected))], rtol=1e-4
    )


@each
def test_hints_train_a_projection(framework):
    student = conv(framework, 0)
    teacher = tfopt.make_student("teacher(width=0.5)", conv("keras", 1))
    distiller = compiled(
        student, teacher, framework, features=[tfopt.FeaturePair("hidden", "hidden")]
    )
    first = distiller.fit(IMAGES, LABELS, batch_size=32, epochs=30, verbose=0).history
    (projection,) = distiller._projections
    assert tuple(projection.kernel.shape) == (16, 8)
    assert first["feature_loss"][-1] < 0.8 * first["feature_loss"][0]
    names = [variable.name for variable in distiller.trainable_variables]
    assert len(names) == len(student.trainable_variables) + 1
    assert isinstance(distiller, Distilling)


@each
def test_teachers_stay_as_they_were(framework):
    student, teacher = conv(framework, 0), conv(framework, 1)
    before = teacher.get_weights()
    distiller = compiled(student, teacher, framework)
    distiller.fit(IMAGES, LABELS, batch_size=8, verbose=0)
    for old, new in zip(before, teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert teacher.trainable
    assert len(distiller.weights) < 2 * len(student.weights)


@each
def test_saving_gives_the_student_alone(framework, tmp_path):
    keras = importlib.import_module(framework)
    student = conv(framework, 0)
    distiller = compiled(student, conv("keras", 1), framework)
    checkpoint = keras.callbacks.ModelCheckpoint(str(tmp_path / "checkpoint.keras"))
    distiller.fit(IMAGES, LABELS, verbose=0, callbacks=[checkpoint])
    distiller.save(tmp_path / "student.keras")
    for name in ("student.keras", "checkpoint.keras"):
        loaded = keras.models.load_model(tmp_path / name)
        assert type(loaded) is type(student)
        np.testing.assert_allclose(
            loaded.predict(IMAGES, verbose=0), student.predict(IMAGES, verbose=0), atol=1e-6
        )


@each
@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.filterwarnings("ignore:mixed_")
def test_half_precision_scales_the_loss_where_it_must(framework, precision):
    student = tfopt.set_precision(conv(framework, 0), precision)
    distiller = compiled(
        student, conv("keras", 1), framework, features=[tfopt.FeaturePair("hidden", "hidden")]
    )
    assert hasattr(distiller.optimizer, "inner_optimizer") == (precision == "mixed_float16")
    watch = tfopt.PrecisionWatch()
    history = distiller.fit(IMAGES, LABELS, epochs=2, verbose=0, callbacks=[watch]).history
    assert np.isfinite(history["loss"]).all()
    assert watch.problem is None and history["zero_gradients"][-1] < 1


class Doubled(views.View):
    """Not random: with XLA the same seed gives other random numbers."""

    def __call__(self, inputs, labels, seed):
        return 2 * inputs + 0 * tf.cast(seed[0], tf.float32), labels


@each
def test_xla(framework):
    keras = importlib.import_module(framework)
    results = []
    for jit_compile in (False, True):
        student = dense(framework, 0)
        distiller = tfopt.Distiller(student, dense("keras", 1), view=Doubled())
        distiller.compile(
            keras.optimizers.SGD(0.1),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=jit_compile,
        )
        distiller.fit(X, Y, batch_size=NUM, epochs=2, shuffle=False, verbose=0)
        results.append(student.get_weights())
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


TWO_DEVICES = """
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from tests.distillation import test_distiller
test_distiller.check_replicas({framework!r})
"""


def check_replicas(framework):
    """Two replicas learn what one device learns."""
    keras = importlib.import_module(framework)
    results = []
    for strategy in (
        tf.distribute.get_strategy(),
        tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]),
    ):
        with strategy.scope():
            student, teacher = dense(framework, 0, l2=0.01), dense(framework, 1)
            distiller = tfopt.Distiller(student, teacher, alpha=0.5)
            distiller.compile(
                keras.optimizers.SGD(0.1, momentum=0.9),
                keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
                jit_compile=False,
            )
        assert distiller.distribute_strategy.num_replicas_in_sync == len(results) + 1
        history = distiller.fit(X, Y, batch_size=6, epochs=2, shuffle=False, verbose=0).history
        results.append((student.get_weights(), history["loss"], history["teacher_loss"]))
    for one, other in zip(*results, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@each
def test_replicas_give_what_one_device_gives(framework):
    script = TWO_DEVICES.format(framework=framework)
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]


@each
def test_several_outputs(framework):
    keras = importlib.import_module(framework)

    def two(seed, framework):
        keras = importlib.import_module(framework)
        keras.utils.set_random_seed(seed)
        inputs = keras.Input((4,), name="x")
        classes = keras.layers.Dense(CLASSES, name="classes")(inputs)
        value = keras.layers.Dense(1, name="value")(inputs)
        return keras.Model(inputs, [classes, value])

    student, teacher = two(0, framework), two(1, "keras")
    distiller = tfopt.Distiller(student, teacher, alpha=0.5, temperature=2.0)
    distiller.compile(
        keras.optimizers.SGD(0.0),
        {"classes": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "value": "mse"},
        jit_compile=False,
    )
    values = np.random.default_rng(2).normal(size=(NUM, 1)).astype(np.float32)
    values[:6] = np.nan
    labels = Y.copy()
    labels[6:] = -1  # no example has both
    history = distiller.fit(
        X, {"classes": labels, "value": values}, batch_size=NUM, verbose=0
    ).history
    (z, v), (t, w) = (
        [np.asarray(o, np.float64) for o in model(X, training=False)]
        for model in (student, teacher)
    )
    hard = -np.log(softmax(z))[np.arange(6), labels[:6]].mean() + np.square(v - values)[6:].mean()
    p, q = softmax(t / 2), softmax(z / 2)
    soft = (4 * (p * np.log(p / q)).sum(-1)).mean() + np.square(v - w).mean()
    np.testing.assert_allclose(history["label_loss"], [hard], rtol=1e-4)
    np.testing.assert_allclose(history["teacher_loss"], [soft], rtol=1e-4)


class Recorded(losses.DistillationLoss):
    """A loss of one's own, which sees what both make."""

    needs_logits = True

    def call(self, student, teacher, labels):
        return tf.reduce_sum(tf.abs(student - teacher), -1) + tf.cast(labels, tf.float32)


@each
def test_a_loss_of_ones_own(framework):
    student, teacher = dense(framework, 0, "softmax"), dense("keras", 1)
    distiller = compiled(student, teacher, framework, rate=0.0, losses=Recorded())
    labels = np.where(np.arange(NUM) < 4, -1, Y)
    history = distiller.fit(X, labels, batch_size=NUM, verbose=0).history
    distance = np.abs(logits_by_hand(student) - logits_by_hand(teacher)).sum(-1) + labels
    np.testing.assert_allclose(history["teacher_loss"], [distance.mean()], rtol=1e-4)


@each
def test_student_and_teacher_see_the_same_view(framework):
    class Shift(views.View):
        def __call__(self, inputs, labels, seed):
            moved = inputs + tf.random.stateless_normal(tf.shape(inputs), seed)
            return moved, labels

    # Teacher and student are one function, so that all they could differ by is what they see.
    student, teacher = dense(framework, 0), dense(framework, 0)
    distiller = compiled(student, teacher, framework, rate=0.0, view=Shift())
    history = distiller.fit(X, Y, batch_size=4, epochs=2, verbose=0).history
    np.testing.assert_allclose(history["teacher_loss"], 0.0, atol=1e-6)
    assert history["label_loss"][0] != pytest.approx(history["label_loss"][1], rel=1e-3)
    evaluated = [distiller.evaluate(X, Y, verbose=0)[0] for _ in range(2)]
    assert evaluated[0] == evaluated[1]  # as they are, without a view


@each
def test_keras_layers_are_views(framework):
    keras = importlib.import_module(framework)
    student = conv(framework, 0)
    distiller = compiled(
        student, conv("keras", 1), framework, view=keras.layers.RandomFlip("horizontal")
    )
    distiller.fit(IMAGES, LABELS, verbose=0)
    with pytest.raises(tfopt.InputError, match="random by itself"):
        distiller.cached((IMAGES, LABELS), "unused", num_views=2)


@each
def test_kept_teachers_teach_the_same(framework, tmp_path):
    results = []
    for is_kept in (False, True):
        student = dense(framework, 0)
        distiller = compiled(student, [dense("keras", 1), dense("keras", 2)], framework)
        if is_kept:
            data = distiller.cached((X, Y, WEIGHTS), tmp_path / "kept", batch_size=NUM)
            history = distiller.fit(data, epochs=3, verbose=0).history
        else:
            history = distiller.fit(
                X, Y, sample_weight=WEIGHTS, batch_size=NUM, epochs=3, verbose=0
            ).history
        results.append((student.get_weights(), history["loss"], history["teacher_loss"]))
    for one, other in zip(*results, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@each
def test_a_session_teaches_compiled_steps_through_the_cache(framework, tmp_path):
    keras = importlib.import_module(framework)
    teacher = dense("keras", 1)
    tfopt.convert(teacher, "float32@litert", tmp_path / "litert")
    student = dense(framework, 0)
    distiller = tfopt.Distiller(student, tmp_path / "litert")
    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    distiller.compile(keras.optimizers.SGD(0.1), entropy, jit_compile=True)
    with pytest.raises(tfopt.InputError, match="XLA cannot compile"):
        distiller.fit(X, Y, verbose=0)
    kept = distiller.cached((X, Y), tmp_path / "kept", batch_size=NUM)
    history = distiller.fit(kept, verbose=0).history
    _, expected, *_ = step_by_hand(dense(framework, 0), [teacher], Y, alpha=0.1, temperature=4.0)
    np.testing.assert_allclose(history["teacher_loss"], [expected], rtol=1e-3)


@each
def test_views_that_are_kept_come_again(framework, tmp_path):
    student, teacher = conv(framework, 0), conv("keras", 1)
    distiller = compiled(
        student, teacher, framework, rate=0.0, view=views.CropAndFlip(2), temperature=2.0
    )
    kept = distiller.cached((IMAGES, LABELS), tmp_path / "kept", batch_size=8, num_views=2)
    losses_ = distiller.fit(kept, epochs=4, verbose=0).history["teacher_loss"]
    assert losses_[0] == pytest.approx(losses_[2], rel=1e-4)
    assert losses_[1] == pytest.approx(losses_[3], rel=1e-4)
    assert losses_[0] != pytest.approx(losses_[1], rel=1e-4)


def test_generators_lose_no_batch():
    student = dense("keras", 0)
    distiller = compiled(student, dense("keras", 1), "keras", rate=0.0)

    def batches():
        for start in range(0, NUM, 4):
            yield X[start : start + 4], Y[start : start + 4]

    seen = distiller.fit(batches(), steps_per_epoch=3, epochs=1, verbose=0).history
    expected, *_ = step_by_hand(student, [dense("keras", 1)], Y, alpha=0.1, temperature=4.0)
    np.testing.assert_allclose(seen["label_loss"], [expected], rtol=1e-4)


@each
def test_notes_say_what_teachers_return(framework, tmp_path, capsys):
    teacher = dense("keras", 1, "softmax")
    teacher.export(tmp_path / "saved_model", verbose=False)
    distiller = compiled(
        dense(framework, 0), [teacher, dense("keras", 2), tmp_path / "saved_model"], framework
    )
    distiller.fit(X, Y, verbose=2)
    told = capsys.readouterr().out
    assert "'dense1' returns probabilities (softmax) and tells their logits." in told
    assert "'dense2' returns logits or values." in told
    assert "saved_model returns probabilities (softmax), taken for logits by logarithm." in told


@each
class TestRefusals:
    def refuse(self, match, framework, teacher, x=X, y=Y, student=None, **options):
        student = dense(framework, 0) if student is None else student
        before = student.get_weights()
        with pytest.raises(tfopt.InputError, match=match) as caught:
            compiled(student, teacher, framework, **options).fit(x, y, verbose=0)
        assert "\n" not in str(caught.value)
        for old, new in zip(before, student.get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)

    def test_other_classes(self, framework):
        match = "has 3 classes and .* has 5; expected the same classes"
        self.refuse(match, framework, dense("keras", 1, units=5))

    def test_rounded_probabilities(self, framework):
        teacher = dense("keras", 1, "softmax")
        teacher.set_weights([1e5 * value for value in teacher.get_weights()])
        keras = importlib.import_module("keras")
        rounded = keras.Sequential(  # which does not tell its logits
            [teacher, keras.layers.Rescaling(1.0)]
        )
        rounded.build((None, 4))
        match = "probabilities, .*% of them rounded to 0, which a temperature of 4 cannot soften"
        self.refuse(match, framework, rounded)
        soft = compiled(dense(framework, 0), rounded, framework, temperature=1.0)
        soft.fit(X, Y, verbose=0)

    def test_unknown_layers(self, framework):
        pair = tfopt.FeaturePair("hiden", "hidden")
        match = "no layer 'hiden'; expected the path of one, such as hidden"
        self.refuse(match, framework, conv("keras", 1), student=conv(framework, 0), features=[pair])
        pair = tfopt.FeaturePair("hidden", "block3/conv2")
        match = "no layer 'block3/conv2'; expected the path of one, such as block3/conv1"
        self.refuse(match, framework, conv("keras", 1), student=conv(framework, 0), features=[pair])

    @pytest.mark.parametrize("pair", [tfopt.FeaturePair("hidden", ""), ("hidden",), "hidden"])
    def test_one_sided_pairs(self, framework, pair):
        self.refuse("is no pair of features", framework, dense("keras", 1), features=[pair])

    def test_features_that_cannot_be_compared(self, framework):
        pair = tfopt.FeaturePair("hidden", "stem")
        self.refuse("other positions", framework, conv("keras", 1), IMAGES, LABELS,
                    conv(framework, 0), features=[pair])  # fmt: skip
        pair = tfopt.FeaturePair("hidden", "stem", losses.SquaredError())
        self.refuse("expected the same", framework, conv("keras", 1), IMAGES, LABELS,
                    conv(framework, 0), features=[pair])  # fmt: skip

    def test_empty_data(self, framework):
        self.refuse("no examples", framework, dense("keras", 1), X[:0], Y[:0])

    def test_teachers_that_give_nan(self, framework):
        teacher = dense("keras", 1)
        teacher.set_weights([value * np.nan for value in teacher.get_weights()])
        self.refuse("is not finite in 100.0% of its values", framework, teacher)

    def test_other_inputs(self, framework):
        keras = importlib.import_module("keras")
        other = keras.Sequential([keras.Input((7,)), keras.layers.Dense(3)])
        self.refuse("cannot run on the student's examples", framework, other)

    def test_other_number_of_outputs(self, framework):
        keras = importlib.import_module("keras")
        inputs = keras.Input((4,))
        new = keras.layers.Dense
        other = keras.Model(inputs, [new(3)(inputs), new(3)(inputs)])
        self.refuse("has 2 outputs and the student 1", framework, other)

    def test_arguments(self, framework):
        teacher = dense("keras", 1)
        self.refuse("alpha is 1.5", framework, teacher, alpha=1.5)
        self.refuse("There is no teacher", framework, [])
        self.refuse("no output 'logit', which losses are given for; expected one of logits",
                    framework, teacher, losses={"logit": losses.SoftTargets()})  # fmt: skip
        self.refuse("Both losses and a temperature", framework, teacher,
                    losses=losses.SoftTargets(), temperature=2.0)  # fmt: skip

    def test_students(self, framework):
        with pytest.raises(tfopt.InputError, match="expected a model of Keras 3 or tf_keras"):
            tfopt.Distiller("student.keras", dense("keras", 1))
        distiller = tfopt.Distiller(dense(framework, 0), dense("keras", 1))
        with pytest.raises(tfopt.InputError, match="not compiled"):
            distiller.fit(X, Y)

    def test_caches_of_others(self, framework, tmp_path):
        distiller = compiled(dense(framework, 0), dense("keras", 1), framework)
        distiller.cached((X, Y), tmp_path / "kept").fill()
        other = compiled(dense(framework, 0), dense("keras", 2), framework)
        with pytest.raises(tfopt.InputError, match=r"identity|teacher"):
            other.cached((X, Y), tmp_path / "kept")
        with pytest.raises(tfopt.InputError, match=r"inputs|data"):
            distiller.cached((X + 1, Y), tmp_path / "kept")


@each
@pytest.mark.parametrize("of_student", ["float32", "float64"])
@pytest.mark.parametrize("of_teacher", ["float32", "float64"])
def test_models_of_float64(framework, of_student, of_teacher):
    keras = importlib.import_module(framework)
    models = []
    for seed, dtype in ((0, of_student), (1, of_teacher)):
        keras.utils.set_random_seed(seed)
        inputs = keras.Input((4,), dtype=dtype)
        hidden = keras.layers.Dense(CLASSES, kernel_regularizer="l2", dtype=dtype, name="logits")
        models.append(keras.Model(inputs, hidden(inputs)))
    student, teacher = models
    _, expected, *_ = step_by_hand(student, [teacher], Y, alpha=0.1, temperature=4.0)
    pairs = [tfopt.FeaturePair("logits", "logits", losses.SquaredError())]
    distiller = compiled(student, teacher, framework, features=pairs)
    of_features = np.square(logits_by_hand(student) - logits_by_hand(teacher)).mean()
    history = distiller.fit(X, Y, batch_size=NUM, verbose=0).history
    np.testing.assert_allclose(history["teacher_loss"], [expected], rtol=1e-4)
    np.testing.assert_allclose(history["feature_loss"], [of_features], rtol=1e-4)


@each
class TestDataThatDoNotFit:
    """One sentence, and no word of a graph."""

    @pytest.mark.parametrize(
        ("labels", "loss", "match"),
        [
            (Y + CLASSES, "sparse_categorical_crossentropy", "go up to 5 and .* has 3 classes"),
            (Y.astype(str), "sparse_categorical_crossentropy", "expected numbers"),
            (np.zeros((NUM, 2)), "sparse_categorical_crossentropy", r"have shape \(2,\)"),
            (np.zeros((NUM, 5)), "mse", "cannot be trained on these data"),
            ({"other": Y}, "sparse_categorical_crossentropy", "has no output 'other'"),
            (Y[:5], "sparse_categorical_crossentropy", "cannot be trained on these data"),
        ],
    )
    def test_labels(self, framework, labels, loss, match):
        keras = importlib.import_module(framework)
        student = dense(framework, 0, "softmax")
        distiller = tfopt.Distiller(student, dense("keras", 1))
        distiller.compile(keras.optimizers.SGD(0.1), loss, jit_compile=False)
        before = student.get_weights()
        with pytest.raises(tfopt.InputError, match=match) as caught:
            distiller.fit(X, labels, batch_size=NUM, verbose=0)
        assert "\n" not in str(caught.value) and "node" not in str(caught.value)
        for old, new in zip(before, student.get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)

    def test_a_callback_keeps_its_own_error(self, framework):
        keras = importlib.import_module(framework)

        class Failing(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                raise KeyError("mine")

        distiller = compiled(dense(framework, 0), dense("keras", 1), framework)
        with pytest.raises(KeyError, match="mine"):
            distiller.fit(X, Y, verbose=0, callbacks=[Failing()])
