"""Reading, cutting and quantizing `.tflite` files."""
