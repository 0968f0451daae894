# All that `make test` needs on Debian 12. The tests of sandboxes make namespaces:
#   docker build -t buswarden . && docker run --rm --privileged buswarden
FROM debian:12-slim

RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends make python3 \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /buswarden
# The Debian packages and the dependencies first: they change less often than the sources.
COPY .ci/packages .ci/
RUN .ci/packages && rm -rf /var/lib/apt/lists/*
COPY requirements.lock ./
RUN python3 -m venv .venv && .venv/bin/pip install --no-cache-dir -r requirements.lock
COPY . .
RUN make setup

CMD ["make", "test"]
