"""TensorRT engines: what the runtimes `tf_trt` and `tensorrt` share."""
