"""ONNX graphs: making them from TensorFlow graphs, and looking into them."""
