# The RunPod worker on a CUDA machine. Build it with BuildKit, which docker does by itself:
#
#   docker build -t diffusion-workers .
#   docker build -t diffusion-workers --build-arg HUB_MODEL=stabilityai/stable-diffusion-xl-base-1.0 --build-arg HUB_WEIGHTS="*.fp16.safetensors" .
#
# The built-in model is inside in any case. A model that is baked in is found before any other place; which model a request
# gets that names none is DIFFUSION_WORKERS_DEFAULT_MODEL. `diffusion-workers worker --check-config` says what is in force.

# uv installs the packages, and stays behind in a stage of its own.
# hadolint ignore=DL3029
FROM --platform=linux/amd64 nvidia/cuda:13.0.2-runtime-ubuntu24.04 AS uv
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir uv==0.13.9

# hadolint ignore=DL3029
FROM --platform=linux/amd64 nvidia/cuda:13.0.2-runtime-ubuntu24.04
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 worker

ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 \
    UV_NO_CACHE=1 UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1

# From what changes least to what changes most: torch, the other packages, a model, the code.
RUN --mount=from=uv,source=/opt/uv,target=/opt/uv /opt/uv/bin/uv venv "$VIRTUAL_ENV" && /opt/uv/bin/uv pip install torch==2.14.1

WORKDIR /src
COPY settings.ini ./
RUN --mount=from=uv,source=/opt/uv,target=/opt/uv \
    python -c "from configparser import ConfigParser as P; p = P(delimiters='='); p.read('settings.ini'); print(p['DEFAULT']['requirements'], p['DEFAULT']['worker_requirements'], 'httpx', sep='\n')" \
    | grep -v ez-diffusion-client > requirements.txt \
    && /opt/uv/bin/uv pip install -r requirements.txt

ARG HUB_MODEL="" HUB_REVISION=main HUB_WEIGHTS="*.safetensors"
RUN mkdir -p /opt/models \
    && if [ -n "$HUB_MODEL" ]; then \
        python -c "import sys; from huggingface_hub import snapshot_download as get; get(sys.argv[1], revision=sys.argv[2], cache_dir='/opt/models', allow_patterns=['*.json', '*.txt', '*.model', sys.argv[3]])" \
            "$HUB_MODEL" "$HUB_REVISION" "$HUB_WEIGHTS"; \
    fi

COPY openapi/client_libs/python openapi/client_libs/python
COPY setup.py MANIFEST.in README.md LICENSE ./
COPY diffusion_workers diffusion_workers
RUN --mount=from=uv,source=/opt/uv,target=/opt/uv \
    /opt/uv/bin/uv pip install --no-deps ./openapi/client_libs/python . \
    && rm -rf /src/*

USER 10001
WORKDIR /home/worker
ENV DIFFUSION_WORKERS_READY_FILE=/tmp/diffusion-workers-ready
# The worker writes this file when it has made its first image, and removes it when the device fails.
HEALTHCHECK --interval=30s --timeout=5s --start-period=15m CMD ["test", "-f", "/tmp/diffusion-workers-ready"]
CMD ["python", "-m", "diffusion_workers.handler"]
