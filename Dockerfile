# syntax=docker/dockerfile:1
# Two images from one file: `service` (API, courier, migrate; no torch) and `worker` (the engine).
#   docker build --target service -t pagemill .
#   docker build --target worker -t pagemill-worker .
FROM python:3.11-slim AS base
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/pagemill/bin:$PATH
RUN python -m venv /opt/pagemill
WORKDIR /src

FROM base AS build-service
COPY . .
RUN pip install -c constraints.txt .

FROM base AS build-worker
COPY . .
RUN pip install -c constraints.txt '.[worker]'
# Compiled here for every kind of processor: what runs the image needs no compiler.
RUN apt-get update && apt-get install -y --no-install-recommends g++ \
    && cd / && python -m kernels.cpu --into-package

FROM base AS runtime
# What is written goes to the data directory: the pepper, and the worker's downloads from the model hub.
RUN useradd --uid 10001 --create-home --home-dir /home/pagemill pagemill \
    && install -d -o pagemill -g pagemill -m 0700 /data /files
ENV PAGEMILL_DATA_DIR=/data \
    PAGEMILL_HOST=0.0.0.0 \
    HF_HOME=/data/huggingface
WORKDIR /home/pagemill
USER pagemill
VOLUME /data
ENTRYPOINT ["pagemill"]
CMD ["--help"]

FROM runtime AS worker
USER root
# The OpenMP that the kernels were linked with; in the worker torch's own takes its place. A compiler, since Triton builds
# what speaks to a GPU's driver when its first kernel starts.
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 gcc libc6-dev && rm -rf /var/lib/apt/lists/*
USER pagemill
COPY --from=build-worker /opt/pagemill /opt/pagemill
# SIGTERM, which Docker sends, lets running requests finish.
CMD ["worker"]

# Last, so that it is what `docker build .` makes.
FROM runtime AS service
COPY --from=build-service /opt/pagemill /opt/pagemill
EXPOSE 8100
CMD ["api"]
