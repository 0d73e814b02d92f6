# The image does what `make install` does, on a CUDA runtime. Build: docker build -t ris .
# Run: docker run --gpus all -v $PWD:/work ris extract --split refcoco
FROM nvidia/cuda:12.8.1-runtime-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/ris
COPY pyproject.toml Makefile README.md LICENSE ./
COPY ris_cache ris_cache
COPY ris_train ris_train
COPY cli cli
RUN make install

# The image's own user has uid 1000, which is what most hosts give the owner of a mounted folder.
RUN userdel --remove ubuntu && useradd --uid 1000 --create-home researcher
USER researcher
WORKDIR /work
ENTRYPOINT ["/opt/ris/.venv/bin/ris"]
