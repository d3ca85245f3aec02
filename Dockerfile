# The service, not as root. `--target test` makes the image that runs the tests instead.
FROM python:3.13-slim-trixie AS tools
RUN apt-get update \
    && apt-get install -y --no-install-recommends iputils-ping mtr-tiny tini traceroute \
    && apt-get dist-clean


FROM tools AS packages
COPY requirements.txt /
RUN python -m venv --without-pip /venv \
    && python -m pip --python /venv/bin/python install --no-cache-dir -r /requirements.txt
# For a store that is shared, for example: --build-arg EXTRA_PACKAGES=redis
ARG EXTRA_PACKAGES=""
RUN [ -z "$EXTRA_PACKAGES" ] || python -m pip --python /venv/bin/python install --no-cache-dir $EXTRA_PACKAGES


FROM packages AS test
COPY .ci/requirements-test.txt /
RUN python -m pip --python /venv/bin/python install --no-cache-dir -r /requirements-test.txt
ENV PATH=/venv/bin:$PATH
WORKDIR /app
COPY . .
ENTRYPOINT ["tini", "-s", "--"]
CMD ["python", "-m", "pytest", "-q", "test_lg.py"]


FROM tools
# Who may send ICMP: ping raises the capability when it needs it, so `permitted` does, and it starts without too.
# mtr-packet must be given it as `effective`, and then does not start where the bounding set lacks it: a script
# of its name chooses between that copy and the plain one, which may do what net.ipv4.ping_group_range lets it.
# The base's pip goes, wherever it came from, and every set-id bit: nothing here may become root.
RUN printf '%s\n' '#!/bin/sh' \
        'while read -r name value; do [ "$name" = CapBnd: ] && break; done </proc/self/status' \
        '[ $((0x${value:-0} >> 13 & 1)) = 1 ] && exec /usr/local/libexec/mtr-packet  # CAP_NET_RAW' \
        'exec /usr/bin/mtr-packet' >/usr/local/bin/mtr-packet \
    && chmod 755 /usr/local/bin/mtr-packet
RUN apt-get update \
    && apt-get install -y --no-install-recommends libcap2-bin \
    && install -D -m 755 /usr/bin/mtr-packet /usr/local/libexec/mtr-packet \
    && setcap cap_net_raw+p /usr/bin/ping cap_net_raw+ep /usr/local/libexec/mtr-packet \
    && apt-get purge -y libcap2-bin python3-pip python3-pip-whl python3-setuptools python3-setuptools-whl \
        python3-venv python3-wheel \
    && apt-get dist-clean \
    && rm -rf /usr/local/bin/pip* /usr/local/lib/python3*/ensurepip /usr/local/lib/python3*/site-packages/* \
    && find / -xdev -perm /6000 -exec chmod ug-s {} +
COPY --from=packages /venv /venv
ENV PATH=/venv/bin:$PATH
WORKDIR /app
COPY --chmod=644 lg.py .
# The base has no compiled standard library, and at run time nobody may write one.
RUN python -c "import lg"
ENV PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=5s CMD ["python", "lg.py", "health"]
ENTRYPOINT ["tini", "-s", "--"]
CMD ["python", "lg.py"]
