# tfopt with TF-TRT, TensorRT and ONNX Runtime on NVIDIA GPUs.
#
#   docker build -f containers/tensorrt.Dockerfile -t tfopt .
#   docker run --rm --gpus all -v "$PWD":/work -w /work tfopt \
#       optimize --model=saved_model --data=data.npz --output_dir=optimized
#
# NVIDIA's image brings TensorFlow 2.17 with TF-TRT, TensorRT with its Python binding and trtexec, CUDA
# and cuDNN; BUILD.md says which versions. Nothing of that is installed anew: the constraints hold
# the rest at versions that go with it; ONNX Runtime 1.23 is for the image's CUDA 12, later ones are
# for CUDA 13.
FROM nvcr.io/nvidia/tensorflow:25.02-tf2-py3

WORKDIR /opt/tfopt
COPY setup.cfg setup.py README.md LICENSE ./
COPY tfopt tfopt
RUN pip install --no-cache-dir --no-deps . \
 && pip install --no-cache-dir --no-deps \
        absl-py ai-edge-litert flatbuffers onnx==1.17.0 tf2onnx==1.17.0 cuda-bindings cuda-pathfinder \
 && pip install --no-cache-dir 'numpy<2' 'pandas>=2.2' onnxruntime-gpu==1.23.2

ENTRYPOINT ["tfopt"]
CMD ["runtimes"]
