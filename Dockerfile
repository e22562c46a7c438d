# The image in which diffusion_workers runs on a CUDA machine.
# Not yet built or run anywhere: the tag of the base and the steps below are written from their documentation.
FROM nvidia/cuda:13.0.2-runtime-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home worker

ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
RUN python3 -m venv "$VIRTUAL_ENV"

# A layer of its own: the largest download, which changes least. Any release within the range of settings.ini does.
RUN pip install torch==2.14.1

WORKDIR /src
COPY openapi/client_libs/python openapi/client_libs/python
COPY settings.ini setup.py MANIFEST.in README.md LICENSE ./
COPY diffusion_workers diffusion_workers
RUN pip install ./openapi/client_libs/python .

USER worker
WORKDIR /home/worker
ENTRYPOINT ["diffusion-workers"]
CMD ["--help"]
