# On a CPU:        docker build -t falcon_fast .
# On NVIDIA GPUs:  docker build -t falcon_fast:cuda --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04 .
# Run:             docker run --rm -v /data/images:/images:ro -v /data/runs:/work/runs falcon_fast train --amp --data /images
#                  (on GPUs add --gpus all --ipc=host)
#
# BASE is a Debian or Ubuntu image with Python 3.11 or newer among its packages. torch's wheels bring the CUDA libraries, so a `base` image
# of CUDA is enough. PIP_ARGS go to pip, for example to choose an index with CPU-only wheels of torch.
ARG BASE=ubuntu:24.04
FROM ${BASE}
ARG PIP_ARGS=""

# g++ stays in the image: it builds the C++ kernels here, and Triton and torch.compile call it at run time (as do Python's headers).
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev python3-venv g++ \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/falcon_fast
ENV PATH=/opt/falcon_fast/bin:${PATH}

COPY . /src
RUN pip install --no-cache-dir ${PIP_ARGS} /src \
    && falcon-fast info \
    && rm -rf /src

RUN useradd --create-home falcon && mkdir /work && chown falcon /work
USER falcon
WORKDIR /work
ENTRYPOINT ["falcon-fast"]
CMD ["info"]
