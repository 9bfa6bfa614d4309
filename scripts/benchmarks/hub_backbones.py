"""Tiny configurations of KerasHub's image and text backbones, and inputs for them."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
from architectures import NUM_EXAMPLES, smooth_images

_SIZE = 64  # pixels
_VOCABULARY = 97
_LENGTH = 12  # tokens

_LAYERS: dict[str, Any] = {"num_layers": 2, "hidden_dim": 32, "intermediate_dim": 64}
_TEXT = {**_LAYERS, "vocabulary_size": _VOCABULARY}
_HEADS = {**_TEXT, "num_heads": 4}
_GROUPED_HEADS = {**_TEXT, "num_query_heads": 4, "num_key_value_heads": 2}
_EXPERTS = {**_GROUPED_HEADS, "moe_intermediate_dim": 32, "num_experts": 4, "top_k": 2}
_VISION = {**_LAYERS, "num_heads": 4, "patch_size": 16, "image_shape": (_SIZE, _SIZE, 3)}
_IMAGE = {"image_shape": (_SIZE, _SIZE, 3)}
_RESNET = {
    **_IMAGE,
    "input_conv_filters": [64],
    "input_conv_kernel_sizes": [7],
    "stackwise_num_filters": [64, 32, 48],
    "stackwise_num_blocks": [2, 2, 2],
    "stackwise_num_strides": [1, 2, 2],
    "block_type": "basic_block",
}

_DEEPER_RESNET = {
    "stackwise_num_filters": [64, 24, 32, 48],
    "stackwise_num_blocks": [2, 2, 2, 2],
    "stackwise_num_strides": [1, 2, 2, 2],
}

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    # Images
    "CSPNetBackbone": {
        **_IMAGE,
        "stem_filters": 16,
        "stem_kernel_size": 3,
        "stem_strides": 1,
        "stackwise_depth": [1, 2, 2],
        "stackwise_strides": [1, 2, 2],
        "stackwise_num_filters": [16, 32, 48],
        "block_type": "dark_block",
        "stage_type": "csp",
        "block_ratio": [0.5],  # a stage works on half of its channels
    },
    "DINOV2Backbone": {**_VISION, "position_embedding_shape": (96, 96), "use_mask_token": False},
    "DINOV3Backbone": {**_VISION, "use_mask_token": False},
    "DeiTBackbone": _VISION,
    "DenseNetBackbone": {**_IMAGE, "stackwise_num_repeats": [2, 2, 2], "growth_rate": 12},
    "EfficientNetBackbone": {
        "input_shape": (_SIZE, _SIZE, 3),
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
        "stackwise_kernel_sizes": [3, 3, 5, 3],
        "stackwise_num_repeats": [1, 2, 2, 1],
        "stackwise_input_filters": [16, 16, 24, 32],
        "stackwise_output_filters": [16, 24, 32, 48],
        "stackwise_expansion_ratios": [1, 4, 4, 6],
        "stackwise_squeeze_and_excite_ratios": [0.0, 0.0, 0.25, 0.25],
        "stackwise_strides": [1, 2, 2, 2],
        "stackwise_block_types": ["fused", "fused", "unfused", "unfused"],
        "stackwise_force_input_filters": [0, 0, 0, 0],
        "stackwise_nores_option": [False, False, False, False],
    },
    "HGNetV2Backbone": {
        **_IMAGE,
        "depths": [1, 2, 1],
        "embedding_size": 16,
        "hidden_sizes": [32, 48, 64],
        "stem_channels": [3, 8, 16],
        "hidden_act": "relu",
        "use_learnable_affine_block": True,
        "stackwise_stage_filters": [
            (16, 8, 32, 1, 2, 3),
            (32, 16, 48, 2, 2, 3),
            (48, 24, 64, 1, 2, 5),
        ],
        "apply_downsample": [False, True, True],
        "use_lightweight_conv_block": [False, False, True],
    },
    "MiTBackbone": {
        **_IMAGE,
        "layerwise_depths": [2, 2],
        "num_layers": 2,
        "layerwise_num_heads": [1, 2],
        "layerwise_sr_ratios": [8, 4],
        "max_drop_path_rate": 0.1,
        "layerwise_patch_sizes": [7, 3],
        "layerwise_strides": [4, 2],
        "hidden_dims": [16, 32],
    },
    "MobileNetBackbone": {
        **_IMAGE,
        "stackwise_expansion": [[40, 56], [64, 80, 80]],
        "stackwise_num_blocks": [2, 3],
        "stackwise_num_filters": [[16, 16], [24, 24, 24]],
        "stackwise_kernel_size": [[3, 3], [5, 5, 5]],
        "stackwise_num_strides": [[2, 1], [2, 1, 1]],
        "stackwise_se_ratio": [[None, None], [0.25, 0.25, 0.25]],
        "stackwise_activation": [["relu", "relu"], ["hard_swish", "hard_swish", "hard_swish"]],
        "stackwise_padding": [[1, 1], [2, 2, 2]],
        "output_num_filters": 96,
        "depthwise_filters": 8,
        "depthwise_stride": 2,
        "depthwise_residual": False,
        "last_layer_filter": 64,
        "squeeze_and_excite": 0.5,
    },
    "ResNetBackbone": _RESNET,
    "SwinTransformerBackbone": {
        **_IMAGE,
        "embed_dim": 16,
        "depths": (2, 2),
        "num_heads": (2, 4),
        "window_size": 4,
    },
    "VGGBackbone": {
        **_IMAGE,
        "stackwise_num_repeats": [2, 2, 2],
        "stackwise_num_filters": [16, 24, 32],
    },
    "ViTBackbone": {
        "image_shape": (_SIZE, _SIZE, 3),
        "patch_size": (16, 16),
        "num_layers": 2,
        "num_heads": 4,
        "hidden_dim": 32,
        "mlp_dim": 64,
    },
    "ViTDetBackbone": {
        **_IMAGE,
        "hidden_size": 32,
        "num_layers": 2,
        "intermediate_dim": 64,
        "num_heads": 4,
        "global_attention_layer_indices": [1],
        "patch_size": 16,
        "num_output_channels": 16,
        "window_size": 2,
    },
    "XceptionBackbone": {
        **_IMAGE,
        "stackwise_conv_filters": [[16, 24], [32, 32], [48, 48]],
        "stackwise_pooling": [True, True, False],
    },
    # Images, on top of another backbone
    "BASNetBackbone": {  # its encoder fixes the number of filters, so images are small instead
        "image_shape": (_SIZE // 2, _SIZE // 2, 3),
        "num_classes": 3,
        "projection_filters": 64,
    },
    "DeepLabV3Backbone": {
        **_IMAGE,
        "low_level_feature_key": "P2",
        "spatial_pyramid_pooling_key": "P4",
        "dilation_rates": [2, 4],
        "upsampling_size": 4,
        "projection_filters": 16,
    },
    "DepthAnythingBackbone": {
        "feature_keys": ["stage1", "stage2"],
        "reassemble_factors": [4, 2],
        "neck_hidden_dims": [16, 32],
        "fusion_hidden_dim": 24,
        "head_hidden_dim": 16,
        "head_in_index": -1,
    },
    "RetinaNetBackbone": {**_IMAGE, "min_level": 3, "max_level": 5, "use_p5": False},
    "SegFormerBackbone": {"projection_filters": 16},
    # Text
    "AlbertBackbone": {**_HEADS, "embedding_dim": 16},
    "BartBackbone": _HEADS,
    "BertBackbone": _HEADS,
    "BloomBackbone": _HEADS,
    "DebertaV3Backbone": {**_HEADS, "max_sequence_length": 32, "bucket_size": 16},
    "DistilBertBackbone": _HEADS,
    "ESM2Backbone": _HEADS,
    "ElectraBackbone": {
        **_LAYERS,
        "vocab_size": _VOCABULARY,
        "num_heads": 4,
        "embedding_dim": 16,
    },
    "FNetBackbone": _TEXT,
    "FalconBackbone": {**_TEXT, "num_attention_heads": 4},
    "GPT2Backbone": _HEADS,
    "GPTNeoXBackbone": _HEADS,
    "GemmaBackbone": {**_GROUPED_HEADS, "head_dim": 8},
    "Gemma3Backbone": {
        **_GROUPED_HEADS,
        "head_dim": 8,
        "image_size": _SIZE,
        "use_sliding_window_attention": True,
        "sliding_window_size": 4,
    },
    "GptOssBackbone": {**_GROUPED_HEADS, "num_experts": 4, "head_dim": 8, "sliding_window": 4},
    "Llama3Backbone": _GROUPED_HEADS,
    "LlamaBackbone": _GROUPED_HEADS,
    "MistralBackbone": {**_GROUPED_HEADS, "sliding_window": 4},
    "MixtralBackbone": {**_GROUPED_HEADS, "num_experts": 4, "sliding_window": 4},
    "OPTBackbone": _HEADS,
    "Phi3Backbone": _GROUPED_HEADS,
    "Qwen2Backbone": _GROUPED_HEADS,
    "Qwen3Backbone": {**_GROUPED_HEADS, "head_dim": 8},
    "Qwen3MoeBackbone": {**_EXPERTS, "head_dim": 8},
    "QwenMoeBackbone": {**_EXPERTS, "shared_expert_intermediate_dim": 32},
    "RWKV7Backbone": {
        "hidden_size": 32,
        "head_size": 8,
        "num_layers": 2,
        "vocabulary_size": _VOCABULARY,
        "intermediate_dim": 64,
        "gate_lora": 8,
        "mv_lora": 8,
        "aaa_lora": 8,
        "decay_lora": 8,
    },
    "RobertaBackbone": _HEADS,
    "RoformerV2Backbone": {**_HEADS, "head_size": 8},
    "SmolLM3Backbone": {
        **_TEXT,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_layer_enabled_list": [True, False],
        "layer_types": ["full_attention", "full_attention"],
        "mlp_bias": False,
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 64,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
    },
    "T5Backbone": _HEADS,
    "XLMRobertaBackbone": _HEADS,
    "XLNetBackbone": _HEADS,
}

# The backbone that another one is built on, the argument that takes it, and what it has instead of
# the configuration above.
_ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "BASNetBackbone": (
        "ResNetBackbone",
        "image_encoder",
        {**_DEEPER_RESNET, "image_shape": (None, None, 3)},
    ),
    "DeepLabV3Backbone": ("ResNetBackbone", "image_encoder", {}),
    "DepthAnythingBackbone": ("DINOV2Backbone", "image_encoder", {}),
    "RetinaNetBackbone": ("ResNetBackbone", "image_encoder", _DEEPER_RESNET),
    "SegFormerBackbone": ("MiTBackbone", "image_encoder", {}),
}


def names() -> list[str]:
    """The backbones that have a configuration here and are in the installed KerasHub."""
    import keras_hub

    return [name for name in CONFIGURATIONS if hasattr(keras_hub.models, name)]


def left_out() -> list[str]:
    """The backbones of the installed KerasHub that have no configuration here."""
    import keras_hub

    return [
        name
        for name, value in sorted(vars(keras_hub.models).items())
        if name.endswith("Backbone") and inspect.isclass(value) and name not in CONFIGURATIONS
    ]


def build(name: str, random: np.random.Generator) -> tuple[Any, dict[str, np.ndarray]]:
    """A backbone with random weights, and inputs by name.

    Sentences are of different lengths, padded behind with the token 0 and masked there.
    """
    model = _make(name)
    inputs = model.input if isinstance(model.input, dict) else {model.inputs[0].name: model.input}
    lengths = np.linspace(_LENGTH // 2, _LENGTH, NUM_EXAMPLES).astype(int)
    is_text = np.arange(_LENGTH) < lengths[:, None]
    values = {}
    for key, tensor in inputs.items():
        if len(tensor.shape) == 4:
            values[key] = smooth_images(random, NUM_EXAMPLES, tensor.shape[1]) / 255
        elif key.endswith("padding_mask"):
            values[key] = is_text
        elif key.endswith("segment_ids"):
            values[key] = is_text & (np.arange(_LENGTH) >= _LENGTH // 3)
        else:
            values[key] = random.integers(3, _VOCABULARY, is_text.shape) * is_text
        values[key] = values[key].astype(tensor.dtype)
    return model, values


def _make(name: str, changes: dict[str, Any] | None = None) -> Any:
    import keras_hub

    configuration = {**CONFIGURATIONS[name], **(changes or {})}
    if name in _ENCODERS:
        encoder, argument, changes = _ENCODERS[name]
        configuration[argument] = _make(encoder, changes)
    return getattr(keras_hub.models, name)(**configuration)
