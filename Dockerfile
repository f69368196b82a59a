# execgate with what it drives: conmon, runc, crun. How to run it, and what that means: deploy/compose.yaml.

FROM debian:12-slim AS build
# hadolint ignore=DL3008  # Debian keeps no old versions of a stable release to pin to
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/build && python3 -m venv --without-pip /opt/execgate
WORKDIR /src
COPY requirements/runtime.txt requirements/build.txt requirements/
# pip stays in the build environment; the image gets only what the service imports.
RUN /opt/build/bin/pip install --no-cache-dir --require-hashes -r requirements/build.txt \
    && /opt/build/bin/pip --python /opt/execgate/bin/python install --no-cache-dir --require-hashes -r requirements/runtime.txt
COPY pyproject.toml README.md LICENSE ./
COPY service service
RUN /opt/build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir dist . \
    && /opt/build/bin/pip --python /opt/execgate/bin/python install --no-cache-dir --no-deps dist/*.whl

FROM debian:12-slim
# hadolint ignore=DL3008  # Debian keeps no old versions of a stable release to pin to
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 conmon runc crun curl \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/execgate /opt/execgate
ENV PATH=/opt/execgate/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# An exec service is root by its nature: it enters other containers. There is no USER to step down to.
HEALTHCHECK --interval=30s --timeout=3s --start-period=5s \
    CMD ["curl", "--fail", "--silent", "--show-error", "--unix-socket", "/run/execgate/execgate.sock", "http://localhost/_ping"]
ENTRYPOINT ["execgate"]
CMD ["serve", "--listen", "unix:///run/execgate/execgate.sock"]
