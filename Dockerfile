# certworker with HAProxy beside it, so that EMBEDDED_NODE=haproxy works in a container.
FROM python:3.13-slim-trixie AS build
WORKDIR /src
RUN python -m venv /opt/certworker
COPY requirements.lock ./
RUN /opt/certworker/bin/pip install --no-cache-dir --require-hashes --only-binary :all: -r requirements.lock
COPY . .
RUN /opt/certworker/bin/pip install --no-cache-dir --no-deps --no-build-isolation --no-index .

FROM python:3.13-slim-trixie
RUN apt-get update \
    && apt-get install -y --no-install-recommends haproxy \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --home-dir /var/lib/certworker certworker \
    && install -d -m 0700 -o certworker -g certworker /var/lib/certworker /var/lib/certworker-keys
COPY --from=build /opt/certworker /opt/certworker
ENV PATH=/opt/certworker/bin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONUNBUFFERED=1 \
    CERTWORKER_DATA_DIR=/var/lib/certworker
USER certworker
WORKDIR /var/lib/certworker
ENTRYPOINT ["certworker"]
CMD ["run"]
