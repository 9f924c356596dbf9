# On a CPU:        docker build -t falcon_fast .
# On NVIDIA GPUs:  docker build -t falcon_fast:cuda --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04 .
# Driver below 580: docker build -t falcon_fast:cuda12 --build-arg BASE=nvidia/cuda:12.6.3-base-ubuntu24.04 \
#                      --build-arg EXTRA=cuda12 --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 .
# Run:             docker run --rm --user $(id -u):$(id -g) -v /data/images:/images:ro -v /data/runs:/work/runs \
#                      falcon_fast train --amp --data /images          (on GPUs add --gpus all --ipc=host)
#
# BASE is a Debian or Ubuntu image with Python 3.11 or newer among its packages. torch's wheels bring the CUDA libraries, so a
# `base` image of CUDA is enough. EXTRA chooses DALI for CUDA 12 or 13. TORCH_INDEX is the index that torch and torchvision come
# from, if not from PyPI. PIP_ARGS go to pip when everything else is installed.
ARG BASE=ubuntu:24.04
FROM ${BASE}
ARG EXTRA="cuda13"
ARG TORCH_INDEX=""
ARG PIP_ARGS=""

# g++ and Python's headers stay in the image: Triton and torch.compile call the compiler at run time.
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev python3-venv g++ \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/falcon_fast
ENV PATH=/opt/falcon_fast/bin:${PATH}

COPY . /src
RUN if [ -n "${TORCH_INDEX}" ]; then \
        pip install --no-cache-dir torch torchvision --index-url "${TORCH_INDEX}"; \
    fi
RUN pip install --no-cache-dir ${PIP_ARGS} "/src[${EXTRA}]" \
    && falcon-fast info \
    && rm -rf /src

# Runs as any user (`--user $(id -u):$(id -g)`): caches go to HOME, and torch.compile asks for the user's name.
RUN mkdir --mode=1777 /work
ENV HOME=/work USER=falcon
USER 1000:1000
WORKDIR /work
ENTRYPOINT ["falcon-fast"]
CMD ["info"]
