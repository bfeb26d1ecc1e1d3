# syntax=docker/dockerfile:1
# Three images from one file: `service` (API, courier, migrate; no torch), `worker` (the engine on CPUs), `worker-gpu`.
#   docker build --target service -t pagemill .
#   docker build --target worker -t pagemill-worker .
#   docker build --target worker-gpu -t pagemill-worker-gpu .
# A stage stands before those that are larger: a builder without BuildKit builds every stage up to its target.
ARG PYTHON_IMAGE=python:3.11.15-slim-bookworm

FROM ${PYTHON_IMAGE} AS base
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/pagemill/bin:$PATH
WORKDIR /src

FROM base AS runtime
# What is written goes below /data: the pepper, downloads from the model hub, kernels that Triton compiles.
# A numeric user, so that Kubernetes can see that it is not root.
RUN useradd --uid 10001 --user-group --create-home --home-dir /home/pagemill pagemill \
    && install -d -o pagemill -g pagemill -m 0700 /data /files \
    && install -d /models
ENV PAGEMILL_DATA_DIR=/data \
    PAGEMILL_HOST=0.0.0.0 \
    HF_HOME=/data/huggingface \
    XDG_CACHE_HOME=/data/cache \
    TRITON_CACHE_DIR=/data/triton
WORKDIR /home/pagemill
USER 10001:10001
VOLUME /data
ENTRYPOINT ["pagemill"]
CMD ["--help"]

# The libraries come before the code: a change of the code leaves their layer as it is.
FROM base AS libraries
RUN python -m venv /opt/pagemill
COPY pyproject.toml constraints.txt ./
RUN printf '%s\n' \
      'import sys, tomllib' \
      'project = tomllib.load(open("pyproject.toml", "rb"))["project"]' \
      'extras = project["optional-dependencies"]' \
      'print(*project["dependencies"], *(line for extra in sys.argv[1:] for line in extras[extra]), sep="\n")' \
      >/requirements.py \
    && python /requirements.py traces >/service.txt \
    && python /requirements.py worker >/worker.txt \
    && pip install -c constraints.txt -r /service.txt hatchling

FROM libraries AS build-service
COPY . .
RUN pip install --no-deps --no-build-isolation . && pip uninstall -y hatchling pip

FROM runtime AS service
COPY --from=build-service /opt/pagemill /opt/pagemill
EXPOSE 8100
CMD ["api"]

FROM libraries AS build-worker
# torch's build for CPUs is a fifth of the one that PyPI has. Empty: from wherever pip is configured to look.
ARG CPU_TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install -c constraints.txt ${CPU_TORCH_INDEX:+--index-url "$CPU_TORCH_INDEX"} torch \
    && pip install -c constraints.txt -r /worker.txt
RUN apt-get update && apt-get install -y --no-install-recommends g++
COPY . .
# The kernels are compiled here for every kind of processor: what runs the image needs no compiler. Then what only
# developers of torch need goes.
RUN pip install --no-deps --no-build-isolation . \
    && cd / && python -m kernels.cpu --into-package \
    && cd /opt/pagemill/lib/python3*/site-packages/torch && rm -rf test include bin/protoc* bin/test_* share/cmake \
    && pip uninstall -y hatchling pip

FROM runtime AS worker
USER root
# The OpenMP that the kernels were linked with; in the worker torch's own takes its place.
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
USER 10001:10001
COPY --from=build-worker /opt/pagemill /opt/pagemill
# SIGTERM, which Docker sends, lets running requests finish.
CMD ["worker"]

FROM libraries AS build-worker-gpu
ARG GPU_TORCH_INDEX=
RUN pip install -c constraints.txt ${GPU_TORCH_INDEX:+--index-url "$GPU_TORCH_INDEX"} torch triton \
    && pip install -c constraints.txt -r /worker.txt
COPY . .
RUN pip install --no-deps --no-build-isolation . && pip uninstall -y hatchling pip

FROM runtime AS worker-gpu
USER root
# A compiler, since Triton builds what speaks to a GPU's driver when its first kernel starts.
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 gcc libc6-dev && rm -rf /var/lib/apt/lists/*
USER 10001:10001
COPY --from=build-worker-gpu /opt/pagemill /opt/pagemill
CMD ["worker"]
