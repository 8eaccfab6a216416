# The server and its page in a container, on the CPU. docs/en/deploy.md says how to use it.
#
#   docker build -t scratchlm .
#   docker run --rm -p 127.0.0.1:7860:7860 -v scratchlm-models:/models scratchlm
#
# The same file is a Space on Hugging Face: user 1000, port 7860, keys from a secret.

FROM python:3.11-slim-bookworm AS wheel
COPY constraints.txt pyproject.toml README.md LICENSE /src/
COPY llm_from_scratch /src/llm_from_scratch
COPY docs /src/docs
RUN PIP_CONSTRAINT=/src/constraints.txt pip wheel --no-cache-dir --no-deps --wheel-dir /wheel /src

FROM python:3.11-slim-bookworm
# The kernels for weights in few bits are compiled on first use, for the processor that is there.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 user && install --directory --owner=user /models

# What the project depends on changes more rarely than the project: a layer of its own.
COPY constraints.txt pyproject.toml /tmp/
RUN python -c "import tomllib; \
    project = tomllib.load(open('/tmp/pyproject.toml', 'rb'))['project']; \
    extras = project['optional-dependencies']; \
    print(*project['dependencies'], *extras['serve'], *extras['structured'], *extras['ja'], sep='\n')" \
    > /tmp/requirements.txt \
    && pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \
    --constraint /tmp/constraints.txt --requirement /tmp/requirements.txt
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip install --no-cache-dir --no-deps /wheel/*.whl

USER 1000
WORKDIR /home/user
# MODELS: one MODEL or several, as `scratchlm serve` takes them; /models is where they are kept.
ENV MODELS=smollm2-135m \
    PORT=7860 \
    SCRATCHLM_CACHE=/models \
    HF_HOME=/models/hub \
    PYTHONUNBUFFERED=1
VOLUME /models
EXPOSE 7860

# 0.0.0.0 is the container's own address: who may come in is decided by the port that docker
# publishes. Where that is more than this machine, set SCRATCHLM_API_KEYS to a long random key.
CMD ["sh", "-c", "exec scratchlm serve $MODELS --host 0.0.0.0 --port $PORT"]

# A first start fetches the model.
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s CMD ["python", "-c", \
    "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/healthz', timeout=4)"]
