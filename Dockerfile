# syntax=docker/dockerfile:1
# The RunPod worker on a CUDA machine.
#
#   docker build -t diffusion-workers .
#   docker build -t diffusion-workers --build-arg MODELS="sdxl-base-1.0 dreamshaper-8" --build-arg EXTRAS=controlnet .
#   docker run --gpus all --rm -v /data/volume:/runpod-volume diffusion-workers \
#       python -m diffusion_workers.handler --test_input '{"input": {"prompt": "a red circle on a white background"}}'
#
# MODELS  names of manifests. Everything that they name is baked in: the model, replaced components such as SDXL's VAE,
#         ControlNets, LoRAs, the refiner, and the weights of preprocessors.
# PARTS   less than everything: some of "model controlnets loras refiner annotators".
# EXTRAS  "controlnet" for preprocessors with weights, "quantization" for weights in fewer bits and .gguf files.
#
# Manifests of your own: --build-context manifests=FOLDER, whose files come to /opt/manifests.
# A model behind a license: --secret id=hf_token,env=HF_TOKEN; the token stays out of the image and its history.
#
# The built-in models are inside in any case. `diffusion-workers worker --check-config` says what is in force.

# Replaced by --build-context.
FROM scratch AS manifests

# uv installs the packages, and stays behind in a stage of its own.
# hadolint ignore=DL3029
FROM --platform=linux/amd64 nvidia/cuda:13.0.2-runtime-ubuntu24.04 AS uv
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir uv==0.13.9

# torch, then the other packages: what changes least comes first.
# hadolint ignore=DL3029
FROM --platform=linux/amd64 nvidia/cuda:13.0.2-runtime-ubuntu24.04 AS packages
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# Triton, by which torch.compile makes kernels, compiles its launchers with a C compiler and Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 worker

ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 \
    UV_NO_CACHE=1 UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1

RUN --mount=from=uv,source=/opt/uv,target=/opt/uv /opt/uv/bin/uv venv "$VIRTUAL_ENV" && /opt/uv/bin/uv pip install torch==2.14.1

WORKDIR /src
COPY settings.ini ./
ARG EXTRAS=""
# hadolint ignore=SC2086
RUN --mount=from=uv,source=/opt/uv,target=/opt/uv \
    python -c "import sys; from configparser import ConfigParser as P; p = P(delimiters='='); p.read('settings.ini'); print(*(p['DEFAULT'][f'{name}requirements'] for name in ['', 'worker_', *(extra + '_' for extra in sys.argv[1:])]), 'httpx', sep='\n')" $EXTRAS \
    | grep -v ez-diffusion-client > requirements.txt \
    && /opt/uv/bin/uv pip install -r requirements.txt

# The models, by the code as it is. Files of an earlier build come from the cache mount, so a change of the code downloads
# nothing again, and what comes out of this stage stays the same.
FROM packages AS models
ARG MODELS="" PARTS=""
COPY openapi/client_libs/python openapi/client_libs/python
COPY diffusion_workers diffusion_workers
COPY --from=manifests / /opt/manifests/
# hadolint ignore=SC2086
RUN --mount=type=cache,id=diffusion-workers-models,target=/cache --mount=type=secret,id=hf_token \
    mkdir -p /opt/models /opt/manifests \
    && export PYTHONPATH=/src:/src/openapi/client_libs/python DIFFUSION_WORKERS_MODELS=/opt/manifests HF_HUB_CACHE=/cache/hub \
    && if [ -n "$MODELS" ]; then python -m diffusion_workers.worker.baking $MODELS --parts $PARTS --into /opt/models; fi

FROM packages
COPY --from=models /opt/models /opt/models
COPY --from=models /opt/manifests /opt/manifests
COPY openapi/client_libs/python openapi/client_libs/python
COPY setup.py MANIFEST.in README.md LICENSE ./
COPY diffusion_workers diffusion_workers
RUN --mount=from=uv,source=/opt/uv,target=/opt/uv \
    /opt/uv/bin/uv pip install --no-deps ./openapi/client_libs/python . \
    && rm -rf /src/*

USER 10001
WORKDIR /home/worker
ENV DIFFUSION_WORKERS_MODELS=/opt/manifests DIFFUSION_WORKERS_READY_FILE=/tmp/diffusion-workers-ready
# The worker writes this file when it has made its first image, and removes it when the device fails.
HEALTHCHECK --interval=30s --timeout=5s --start-period=15m CMD ["test", "-f", "/tmp/diffusion-workers-ready"]
CMD ["python", "-m", "diffusion_workers.handler"]
