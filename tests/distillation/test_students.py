"""Parameters are counted by hand: kernels are window × inputs × outputs, norms 4 a channel."""

import importlib

import numpy as np
import pytest

import tfopt
from tests.goldens import GOLDENS
from tests.train.models import FRAMEWORKS, conv, policies
from tfopt.distillation.narrower import narrowed
from tfopt.distillation.students import make_student
from tfopt.train.layers import framework_of, policy_name

each = pytest.mark.parametrize("framework", FRAMEWORKS)

WIDTHS = {  # parameters of goldens at half the width; the others have no Keras layers
    "dense": (16 + 1) * 16 + (16 + 1) * 8 + (8 + 1) * 4,
    "conv": 27 * 4 + 16 + 36 * 4 + 16 + (36 + 1) * 8 + 32 + (8 + 1) * 5,
    "tf_keras_conv": 27 * 4 + 16 + 36 * 4 + 16 + (36 + 1) * 8 + 32 + (8 + 1) * 5,
    # 24 channels are 16, the next multiple of 8
    "depthwise": (27 * 4 + 16) + (4 * 16 + 64) + (9 * 16 + 64) + (16 + 1) * 4 + (4 + 1) * 16
    + (16 * 4 + 16) + (4 + 1) * 5,
    # 16 features come in and are added: only heads and the hidden layer are narrower
    "transformer": 3 * (16 + 1) * 8 + (8 + 1) * 16 + 2 * 32 + (16 + 1) * 16 + (16 + 1) * 16
    + (16 + 1) * 4,
    "lstm": 4 * (5 + 3 + 1) * 3 + (3 + 1) * 3,
    "two_inputs": (9 + 1) * 4 + (6 + 1) * 4 + (8 + 1) * 4 + (4 + 1) * 2,
    "dynamic": (12 + 1) * 4 + (4 + 1) * 3,
    "integer_input": 50 * 4 + (4 + 1) * 3,
}  # fmt: skip


def shapes(model):
    return [tuple(tensor.shape) for tensor in model.outputs]


def layer_widths(model, key="filters"):
    return [getattr(layer, key) for layer in model.layers if hasattr(layer, key)]


def residual(keras, num_blocks=3, preactivated=False):
    """A ResNet of two stages on 8 × 8 images, for both Kerases."""
    new = keras.layers

    def convolved(x, filters, strides=1):
        if preactivated:
            x = new.ReLU()(new.BatchNormalization()(x))
        x = new.Conv2D(filters, 3, strides, padding="same", use_bias=False)(x)
        return x if preactivated else new.BatchNormalization()(x)

    image = keras.Input((8, 8, 3), name="image")
    x = new.Conv2D(16, 3, padding="same", use_bias=False)(new.Rescaling(1 / 255)(image))
    x = x if preactivated else new.ReLU()(new.BatchNormalization()(x))
    for filters in (16, 32):
        for block in range(num_blocks):
            is_first = block == 0 and filters == 32
            y = convolved(x, filters, 2 if is_first else 1)
            y = convolved(y if preactivated else new.ReLU()(y), filters)
            skip = new.Conv2D(filters, 1, 2, use_bias=False)(x) if is_first else x
            x = skip + y if preactivated else new.ReLU()(new.Add()([y, skip]))
    x = new.GlobalAveragePooling2D()(x)
    return keras.Model(image, new.Dense(10, name="logits")(x), name="residual")


def train_save_load(model, inputs, path):
    """One step on zeros, then a file and back."""
    keras = framework_of(model)
    before = [np.array(weight) for weight in model.get_weights()]
    outputs = model(inputs)
    flat = outputs if isinstance(outputs, dict) else {"": outputs}
    targets = {key: np.zeros(value.shape, np.float32) for key, value in flat.items()}
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
    model.train_on_batch(inputs, targets if isinstance(outputs, dict) else targets[""])
    after = model.get_weights()
    assert all(np.isfinite(weight).all() for weight in after)
    assert any((one != other).any() for one, other in zip(before, after, strict=True))
    model.save(path)
    loaded = keras.models.load_model(path, compile=False)
    found, expected = loaded(inputs), model(inputs)
    for key in flat:
        one, other = (value[key] if key else value for value in (found, expected))
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "width", "expected"),
    [
        (6, 0.5, 3), (5, 0.5, 3), (3, 0.1, 1), (1, 0.5, 1), (15, 0.5, 8), (16, 0.5, 8),
        (16, 0.25, 8), (24, 0.5, 16), (64, 0.5, 32), (100, 0.3, 32), (96, 0.35, 32), (20, 0.95, 20),
        (1280, 0.5, 640), (44, 0.5, 24),
    ],
)  # fmt: skip
def test_narrowed(size, width, expected):
    assert narrowed(size, width) == expected


@pytest.mark.parametrize("name", [name for name, one in GOLDENS.items() if not one.precisions])
def test_goldens_at_half_the_width(name, tmp_path):
    golden = GOLDENS[name]
    teacher = golden.build()
    if name not in WIDTHS:
        assert not hasattr(teacher, "layers")
        with pytest.raises(tfopt.InputError, match="needs a Keras model as the teacher"):
            make_student("teacher(width=0.5)", teacher)
        return
    student = make_student("teacher(width=0.5)", teacher)
    assert student.count_params() == WIDTHS[name]
    assert shapes(student) == shapes(teacher)
    assert student.name == teacher.name
    inputs = golden.examples(4, 0)
    inputs = inputs if len(inputs) > 1 else next(iter(inputs.values()))
    if isinstance(inputs, dict):
        inputs = list(inputs.values())
    train_save_load(student, inputs, tmp_path / "student.keras")


@pytest.mark.parametrize("name", WIDTHS)
def test_no_golden_has_two_blocks_of_a_kind(name):
    with pytest.raises(tfopt.InputError, match="no residual blocks and no repeated layers"):
        make_student("teacher(depth=0.5)", GOLDENS[name].build())


@each
def test_the_same_architecture_with_new_weights(framework):
    teacher = conv(framework)
    student = make_student("teacher", teacher)
    assert student.count_params() == teacher.count_params()
    assert not np.allclose(student.get_weights()[0], teacher.get_weights()[0])
    again = make_student("teacher()", teacher)
    assert not np.allclose(student.get_weights()[0], again.get_weights()[0])


@each
def test_nested_models_and_softmax(framework, tmp_path):
    teacher = conv(framework)
    student = make_student("teacher(width=0.5)", teacher)
    block = student.get_layer("block3")
    assert tuple(block.inputs[0].shape) == (None, 8, 8, 4)
    assert block.get_layer("conv1").filters == student.get_layer("stem").filters == 4
    expected = (27 + 1) * 4 + 36 * 4 + 16 + (4 + 1) * 8 + (8 + 1) * 4
    assert student.count_params() == expected
    images = np.random.default_rng(0).uniform(size=(3, 8, 8, 3)).astype(np.float32)
    np.testing.assert_allclose(np.asarray(student(images)).sum(-1), 1, rtol=1e-5)
    train_save_load(student, images, tmp_path / "student.keras")


@each
@pytest.mark.parametrize("preactivated", [False, True])
def test_a_shallower_residual_network(framework, preactivated, tmp_path):
    """Of three blocks a stage two stay, the one that halves the image among them."""
    keras = importlib.import_module(framework)
    student = make_student("teacher(depth=0.5)", residual(keras, 3, preactivated))
    expected = residual(keras, 2, preactivated)
    assert student.count_params() == expected.count_params()
    assert len(student.layers) == len(expected.layers)
    student.set_weights(expected.get_weights())
    images = np.random.default_rng(0).uniform(0, 255, (3, 8, 8, 3)).astype(np.float32)
    np.testing.assert_allclose(student(images), expected(images), rtol=1e-4, atol=1e-5)
    train_save_load(student, images, tmp_path / "student.keras")


@each
def test_depth_that_leaves_only_what_changes_shapes(framework):
    keras = importlib.import_module(framework)
    student = make_student("teacher(depth=0.1)", residual(keras, 3))
    assert (
        layer_widths(student) == [16, 16, 16, 32, 32, 32]
        or sorted(layer_widths(student)) == [16] * 3 + [32] * 3
    )


@each
def test_narrower_and_shallower(framework):
    keras = importlib.import_module(framework)
    student = make_student("teacher(width=0.5, depth=0.5)", residual(keras, 3))
    block1, block2 = 2 * (72 * 8 + 32), 2 * (144 * 16 + 64)
    halving = (72 * 16 + 64) + (144 * 16 + 64) + 8 * 16
    assert student.count_params() == 27 * 8 + 32 + 2 * block1 + halving + block2 + (16 + 1) * 10


@each
def test_repeated_layers(framework):
    keras = importlib.import_module(framework)
    new = keras.layers
    teacher = keras.Sequential([keras.Input((8, 8, 3))], name="plain")
    for filters in (4, 8):
        for _ in range(3):
            teacher.add(new.Conv2D(filters, 3, padding="same"))
            teacher.add(new.BatchNormalization())
            teacher.add(new.ReLU())
        teacher.add(new.MaxPooling2D())
    teacher.add(new.Flatten())
    teacher.add(new.Dense(2))
    student = make_student("teacher(depth=0.5)", teacher)
    assert layer_widths(student) == [4, 4, 8, 8]
    names = [
        type(layer).__name__ for layer in student.layers if "Input" not in type(layer).__name__
    ]
    unit = ["Conv2D", "BatchNormalization", "ReLU"]
    assert names == [*unit * 2, "MaxPooling2D"] * 2 + ["Flatten", "Dense"]
    assert shapes(student) == shapes(teacher)


@each
def test_stacked_recurrent_layers(framework):
    keras = importlib.import_module(framework)
    new = keras.layers
    layers = [new.LSTM(6, return_sequences=True) for _ in range(4)]
    teacher = keras.Sequential(
        [keras.Input((None, 5)), *layers, new.Bidirectional(new.GRU(4)), new.Dense(2)]
    )
    student = make_student("teacher(depth=0.5)", teacher)
    assert [type(layer).__name__ for layer in student.layers].count("LSTM") == 2
    student = make_student("teacher(width=0.5)", teacher)
    gru = 2 * 3 * (3 * 2 + 2 * 2 + 2 * 2)  # of two biases, both ways
    lstms = 4 * (5 + 3 + 1) * 3 + 3 * 4 * (3 + 3 + 1) * 3
    assert student.count_params() == lstms + gru + (4 + 1) * 2


def vision_transformer(keras, num_blocks):
    """Patches of 4 × 4, attention and feed-forward after their norms."""
    new = keras.layers
    image = keras.Input((16, 16, 3))
    x = new.Reshape((16, 32))(new.Conv2D(32, 4, 4)(image))
    for _ in range(num_blocks):
        y = new.LayerNormalization()(x)
        x = new.Add()([x, new.MultiHeadAttention(2, 16)(y, y)])
        y = new.Dense(64, activation="gelu")(new.LayerNormalization()(x))
        x = new.Add()([x, new.Dense(32)(y)])
    x = new.GlobalAveragePooling1D()(new.LayerNormalization()(x))
    return keras.Model(image, new.Dense(4)(x))


@each
def test_vision_transformers(framework, tmp_path):
    """Attention and feed-forward stay or go together."""
    keras = importlib.import_module(framework)
    student = make_student("teacher(depth=0.5)", vision_transformer(keras, 4))
    expected = vision_transformer(keras, 2)
    assert student.count_params() == expected.count_params()
    student.set_weights(expected.get_weights())
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    np.testing.assert_allclose(student(images), expected(images), rtol=1e-4, atol=1e-5)
    student = make_student("teacher(width=0.5)", vision_transformer(keras, 1))
    attention = 3 * (16 + 1) * 2 * 8 + (2 * 8 + 1) * 16
    forward = (16 + 1) * 32 + (32 + 1) * 16
    assert student.count_params() == (48 + 1) * 16 + attention + forward + 3 * 32 + (16 + 1) * 4
    train_save_load(student, images, tmp_path / "student.keras")


@each
def test_attention_before_its_norm(framework):
    """Norms after sums go with their blocks, as far as one comes before."""
    keras = importlib.import_module(framework)
    new = keras.layers
    inputs = keras.Input((6, 8))
    x = new.LayerNormalization()(inputs)
    for _ in range(2):
        x = new.LayerNormalization()(x + new.MultiHeadAttention(2, 4)(x, x))
        x = new.LayerNormalization()(x + new.Dense(8)(new.Dense(16)(x)))
    student = make_student("teacher(depth=0.5)", keras.Model(inputs, new.Dense(3)(x)))
    kinds = [type(layer).__name__ for layer in student.layers]
    assert kinds.count("MultiHeadAttention") == 1
    assert kinds.count("LayerNormalization") == 3
    assert kinds.count("Dense") == 3


@each
def test_groups_and_einsum(framework):
    keras = importlib.import_module(framework)
    new = keras.layers
    inputs = keras.Input((4, 4, 3))
    x = new.Conv2D(32, 1, use_bias=False)(inputs)
    x = new.GroupNormalization(8)(x)
    x = new.Conv2D(32, 3, groups=4, use_bias=False, name="grouped")(x)
    gate = new.Reshape((1, 1, 32))(new.GlobalAveragePooling2D()(x))
    x = new.Reshape((4, 32))(new.Multiply()([x, gate]))
    x = new.EinsumDense("abc,cde->abde", output_shape=(None, 2, 16))(x)
    x = new.EinsumDense("abde,dec->abc", output_shape=(None, 64))(x)
    x = new.SeparableConv1D(8, 1, use_bias=False)(x)
    teacher = keras.Model(inputs, new.Flatten()(new.Dense(2, name="logits")(x)))
    student = make_student("teacher(width=0.5)", teacher)
    norm = next(layer for layer in student.layers if "Group" in type(layer).__name__)
    assert (norm.groups, student.get_layer("grouped").groups) == (4, 2)
    convolutions = 3 * 16 + 9 * 8 * 16
    einsum = 16 * 2 * 8 + 2 * 8 * 32
    separable = 32 + 32 * 4
    assert student.count_params() == convolutions + 32 + einsum + separable + (4 + 1) * 2
    assert shapes(student) == shapes(teacher)
    assert student(np.ones((3, 4, 4, 3), np.float32)).shape == (3, 8)


@each
def test_what_outputs_are_added_of_keeps_its_width(framework):
    keras = importlib.import_module(framework)
    new = keras.layers
    inputs = keras.Input((6,))
    hidden = new.Dense(8, name="hidden")(inputs)
    heads = [new.Dense(4, name=name)(hidden) for name in ("one", "other")]
    teacher = keras.Model(inputs, new.Activation("softmax")(new.Add()(heads)))
    student = make_student("teacher(width=0.5)", teacher)
    assert student.get_layer("hidden").units == 4
    assert [student.get_layer(name).units for name in ("one", "other")] == [4, 4]
    # boxes of a detector: four numbers of each of 3 channels' groups
    image = keras.Input((2, 2, 3))
    x = new.Conv2D(8, 1, name="features")(image)
    boxes = new.Reshape((-1, 4))(new.Conv2D(12, 1, name="boxes")(x))
    student = make_student("teacher(width=0.5)", keras.Model(image, boxes))
    assert layer_widths(student) == [4, 12]


@each
def test_inputs_are_preprocessed_as_before(framework):
    keras = importlib.import_module(framework)
    new = keras.layers
    data = np.random.default_rng(0).normal(5, 3, (64, 4)).astype(np.float32)
    norm = new.Normalization(name="norm")
    norm.adapt(data)
    lookup = new.StringLookup(name="lookup")
    lookup.adapt(np.array(["b", "b", "a"]))
    numbers, word = keras.Input((4,), name="n"), keras.Input((1,), dtype="string", name="w")
    x = new.Dense(8)(new.Rescaling(0.5, name="half")(norm(numbers)))
    y = new.Flatten()(new.Embedding(3, 8)(lookup(word)))
    teacher = keras.Model([numbers, word], new.Dense(2)(new.Concatenate()([x, y])))
    student = make_student("teacher(width=0.5)", teacher)
    found = np.asarray(student.get_layer("norm")(data))
    np.testing.assert_allclose(found, (data - data.mean(0)) / data.std(0), rtol=1e-3, atol=1e-4)
    assert student.get_layer("half").scale == 0.5
    assert student.get_layer("lookup").get_vocabulary() == ["[UNK]", "b", "a"]
    assert student.count_params() - (4 + 1) * 4 - 3 * 4 - (8 + 1) * 2 == 9  # of the norm


@each
def test_frozen_teachers_have_students_that_learn(framework):
    keras = importlib.import_module(framework)
    base = conv(framework)
    base.trainable = False
    inputs = keras.Input((8, 8, 3))
    teacher = keras.Model(inputs, keras.layers.Dense(3)(base(inputs, training=False)))
    student = make_student("teacher(width=0.5)", teacher)
    images = np.random.default_rng(0).uniform(size=(4, 8, 8, 3)).astype(np.float32)
    student(images, training=True)
    norm = student.get_layer("conv").get_layer("block3").get_layer("norm")
    assert len(norm.trainable_weights) == 2
    assert np.asarray(norm.moving_mean).any()  # statistics are taken, too


@each
def test_layers_used_twice_stay_shared(framework):
    keras = importlib.import_module(framework)
    new = keras.layers
    one, other = keras.Input((4,)), keras.Input((4,))
    tower = keras.Sequential([new.Dense(8), new.Dense(6)])
    difference = new.Subtract()([tower(one), tower(other)])
    teacher = keras.Model([one, other], new.Dense(1)(difference))
    student = make_student("teacher(width=0.5)", teacher)
    assert student.count_params() == (4 + 1) * 4 + (4 + 1) * 3 + (3 + 1)


@each
def test_masks(framework):
    keras = importlib.import_module(framework)
    new = keras.layers
    states = keras.Input((None, 8))
    tower = keras.Model(states, new.LSTM(6)(states))
    words = keras.Input((None,), dtype="int32")
    x = new.Embedding(9, 8, mask_zero=True)(words)
    teacher = keras.Model(words, new.Dense(2)(new.Concatenate()([tower(x), new.GRU(4)(x)])))
    student = make_student("teacher(width=0.5)", teacher)
    recurrent = 4 * (4 + 3 + 1) * 3 + 3 * (4 + 2 + 2) * 2
    assert student.count_params() == 9 * 4 + recurrent + (5 + 1) * 2
    padded, short = np.array([[1, 2, 0, 0]]), np.array([[1, 2]])
    np.testing.assert_allclose(student(padded), student(short), rtol=1e-5, atol=1e-6)


@each
def test_half_precision_stays(framework):
    with tfopt.precision("mixed_bfloat16"):
        teacher = conv(framework)
    student = make_student("teacher(width=0.5)", teacher)
    assert policies(student) == policies(teacher)
    assert policy_name(student) == "mixed_bfloat16"


@each
def test_layers_without_a_configuration(framework):
    keras = importlib.import_module(framework)

    class Hidden(keras.layers.Layer):
        def __init__(self, function):
            super().__init__()
            self._own = function

        def call(self, inputs):
            return self._own(inputs)

        def get_config(self):
            raise NotImplementedError("Hidden has no configuration")

    inputs = keras.Input((4,))
    x = Hidden(abs)(keras.layers.Dense(8)(inputs))
    teacher = keras.Model(inputs, keras.layers.Dense(2)(x), name="own")
    with pytest.raises(tfopt.InputError, match=r"'own' cannot be made smaller.*; give a name"):
        make_student("teacher(width=0.5)", teacher)


@each
def test_custom_layers(framework):
    keras = importlib.import_module(framework)

    class Block(keras.layers.Layer):
        def __init__(self, width, **kwargs):
            super().__init__(**kwargs)
            self.width = width
            self.dense = keras.layers.Dense(width)

        def call(self, inputs):
            return inputs + self.dense(inputs)

        def get_config(self):
            return {**super().get_config(), "width": self.width}

    inputs = keras.Input((4,))
    x = keras.layers.Dense(8)(inputs)
    for _ in range(4):
        x = Block(8)(x)
    teacher = keras.Model(inputs, keras.layers.Dense(2)(x), name="own")
    student = make_student("teacher(depth=0.5)", teacher)
    assert [type(layer) for layer in student.layers].count(Block) == 2
    with pytest.raises(tfopt.InputError, match=r"'own' cannot be made smaller.*give a name"):
        make_student("teacher(width=0.5)", teacher)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("teacher(width=0)", "The width of a student is 0; expected a number above 0"),
        ("teacher(width=2)", "The width of a student is 2"),
        ("teacher(depth=half)", "The depth of a student is half"),
        ("teacher(widht=0.5)", "no option 'widht'; expected width, depth"),
        ("teacher(width=0.99)", "no layer that a width of 0.99 would make narrower"),
        ("teacher(0.5)", "No student 'teacher(0.5)': expected teacher(width=0.5)"),
        ("MobilNetV2", "such as MobileNetV2"),
        ("MobileNetV2(beta=1)", "no option 'beta' as a student; expected alpha, weights."),
        ("MobileNetV2(classes=7)", "no option 'classes'"),
        ("preprocess_input", "No student 'preprocess_input'"),
        ("MobileNetV2", "takes images of shape (height, width, channels), not examples"),
        ("nowhere.keras", "it does not exist"),
        ("tests:no_such_function", "names no function"),
        ("no_such_package.module:make", "names no function"),
        ("tests.goldens.registry:normal", "gives a function; expected a built model"),
        ("numpy:zeros", "failed with TypeError"),
        (7, "The student is a int; expected a path, a name"),
    ],
)
def test_wrong_students(spec, message):
    with pytest.raises(tfopt.InputError) as raised:
        make_student(spec, GOLDENS["dense"].build())
    text = str(raised.value)
    assert message in text
    assert text.endswith(".")
    assert "\n" not in text


@each
def test_teachers_that_have_no_smaller_copy(framework):
    keras = importlib.import_module(framework)

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.out = keras.layers.Dense(1)

        def call(self, inputs):
            return self.out(inputs)

    model = Own()
    model(np.ones((2, 4), np.float32))
    with pytest.raises(tfopt.InputError, match=r"is a subclass of keras.Model.*give a name"):
        make_student("teacher(width=0.5)", model)
    with pytest.raises(tfopt.InputError, match="there is none"):
        make_student("teacher(width=0.5)")
    inputs = keras.Input((4,))
    single = keras.Model(inputs, keras.layers.Dense(2)(inputs), name="single")
    with pytest.raises(tfopt.InputError, match=r"'single' has no layer that a width of 0\.5"):
        make_student("teacher(width=0.5)", single)


@each
def test_files(framework, tmp_path):
    model = conv(framework)
    for end in (".keras", ".h5"):
        path = tmp_path / f"student{end}"
        model.save(path)
        loaded = make_student(path)
        for one, other in zip(loaded.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)
        smaller = make_student("teacher(width=0.5)", path)
        assert smaller.get_layer("hidden").units == 8
    (tmp_path / "model.tflite").write_bytes(b"")
    with pytest.raises(tfopt.InputError, match="cannot be a student that is made or trained"):
        make_student(str(tmp_path / "model.tflite"))
    with pytest.raises(tfopt.InputError, match="cannot be a teacher that is made or trained"):
        make_student("teacher(width=0.5)", str(tmp_path / "model.tflite"))


def make_golden():
    return GOLDENS["dense"].build()


@each
def test_functions_and_models(framework):
    model = conv(framework)
    assert make_student(model) is model
    assert make_student(lambda: model) is model
    assert make_student(f"{__name__}:make_golden").name == "dense"
    keras = importlib.import_module(framework)
    with pytest.raises(tfopt.InputError, match="without input shapes"):
        make_student(lambda: keras.Sequential([keras.layers.Dense(1)]))
    with pytest.raises(tfopt.InputError, match="gives a NoneType"):
        make_student(lambda: None)
