"""Tiny networks, each with the traits of a family that conversions stumble over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SIZE = 16  # pixels

STAND_INS: dict[str, Callable[[], Any]] = {}


def _stand_in(body: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Registers a function from features (batch, 8, 8, 8) to features; it gets `keras.layers`."""

    def build() -> Any:
        import keras

        image = keras.Input((SIZE, SIZE, 3), name="image")
        x = keras.layers.Rescaling(1 / 127.5, offset=-1)(image)
        x = keras.layers.Conv2D(8, 3, strides=2, padding="same")(x)
        x = keras.layers.BatchNormalization()(x)
        x = keras.layers.GlobalAveragePooling2D()(body(x, keras.layers))
        return keras.Model(image, keras.layers.Dense(5)(x), name=body.__name__)

    STAND_INS[body.__name__] = build
    return body


@_stand_in
def squeeze_and_excite(x: Any, layers: Any) -> Any:
    """As EfficientNet: swish, depthwise convolution, channels weighted by their averages."""
    inner = layers.Conv2D(16, 1, use_bias=False)(x)
    inner = layers.Activation("swish")(layers.BatchNormalization()(inner))
    inner = layers.DepthwiseConv2D(5, padding="same", use_bias=False)(inner)
    inner = layers.Activation("swish")(layers.BatchNormalization()(inner))
    weights = layers.GlobalAveragePooling2D(keepdims=True)(inner)
    weights = layers.Conv2D(4, 1, activation="swish")(weights)
    weights = layers.Conv2D(16, 1, activation="sigmoid")(weights)
    inner = layers.Conv2D(8, 1, use_bias=False)(layers.Multiply()([inner, weights]))
    return layers.Add()([x, layers.BatchNormalization()(inner)])


@_stand_in
def layer_scale(x: Any, layers: Any) -> Any:
    """As ConvNeXt: depthwise convolution, LayerNorm, exact gelu, a scale for each channel."""
    from keras.src.applications.convnext import LayerScale

    inner = layers.DepthwiseConv2D(7, padding="same")(x)
    inner = layers.LayerNormalization(epsilon=1e-6)(inner)
    inner = layers.Dense(32, activation="gelu")(inner)
    return layers.Add()([x, LayerScale(1.0, 8)(layers.Dense(8)(inner))])


@_stand_in
def hard_swish(x: Any, layers: Any) -> Any:
    """As MobileNetV3: hard swish, hard sigmoid, padding on two sides before a stride."""
    x = layers.Activation("hard_swish")(layers.Conv2D(16, 1)(x))
    x = layers.ZeroPadding2D(((0, 1), (0, 1)))(x)
    x = layers.DepthwiseConv2D(3, strides=2, use_bias=False)(x)
    x = layers.Activation("hard_swish")(layers.BatchNormalization()(x))
    weights = layers.GlobalAveragePooling2D(keepdims=True)(x)
    weights = layers.Conv2D(16, 1, activation="hard_sigmoid")(weights)
    return layers.Multiply()([x, weights])


@_stand_in
def separable(x: Any, layers: Any) -> Any:
    """As Xception and NASNet: separable convolutions, relu6, pooling beside a short cut."""
    short_cut = layers.BatchNormalization()(layers.Conv2D(12, 1, strides=2)(x))
    x = layers.SeparableConv2D(12, 3, padding="same", use_bias=False)(layers.ReLU()(x))
    x = layers.SeparableConv2D(12, 3, padding="same")(layers.ReLU(6.0)(x))
    x = layers.MaxPooling2D(3, strides=2, padding="same")(layers.BatchNormalization()(x))
    return layers.Add()([x, short_cut])


@_stand_in
def concatenation(x: Any, layers: Any) -> Any:
    """As Inception, DenseNet and ResNetV2: joined branches, asymmetric and grouped kernels, padded
    averages, and the maximum of features below zero with zeros around them."""
    pooled = layers.AveragePooling2D(3, strides=1, padding="same")(x)
    branches = [
        layers.Conv2D(6, 1, activation="relu")(x),
        layers.Conv2D(6, (1, 7), padding="same", activation="relu")(x),
        layers.Conv2D(6, (7, 1), padding="same", activation="relu")(pooled),
        layers.Conv2D(8, 3, padding="same", groups=2)(x),
        layers.MaxPooling2D(3, strides=1)(layers.ZeroPadding2D(1)(-layers.ReLU()(x))),
    ]
    return layers.ReLU()(layers.BatchNormalization()(layers.Concatenate()([x, *branches])))
