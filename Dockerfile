# The CUDA image: `docker build -t decar .`, then
# docker run --gpus all --shm-size 4g -p 8000:8000 -v /path/to/ensemble:/ensemble:ro decar
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# gcc: Triton compiles its launchers at run time.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends curl gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/decar
ENV PATH=/opt/decar/bin:$PATH
# Logs of containers are looked for on their standard output.
ENV DECAR_VERBOSE=1

COPY . /src
RUN pip install --no-cache-dir --constraint /src/constraints.txt "/src[cuda]" && rm -rf /src

RUN useradd --create-home --uid 10001 decar
USER 10001
WORKDIR /home/decar
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m \
    CMD ["curl", "--fail", "--silent", "--output", "/dev/null", "http://127.0.0.1:8000/health"]
ENTRYPOINT ["decar", "serve"]
CMD ["/ensemble", "--host", "0.0.0.0", "--port", "8000"]
