# The service, run by an unprivileged user. `--target test` builds the image that runs the tests instead.
#
#     --build-arg EXTRA_PACKAGES="maxminddb redis"   Python packages: AS numbers, a shared rate-limit store
#     --build-arg EXTRA_TOOLS=bird2                  Debian packages: the tools of EXTRA_COMMANDS
FROM python:3.13-slim-trixie AS tools
RUN apt-get update \
    && apt-get install -y --no-install-recommends iputils-ping mtr-tiny tini traceroute \
    && apt-get dist-clean


FROM tools AS packages
COPY requirements.txt /
RUN python -m venv --without-pip /venv \
    && python -m pip --python /venv/bin/python install --no-cache-dir -r /requirements.txt
ARG EXTRA_PACKAGES=""
RUN [ -z "$EXTRA_PACKAGES" ] || python -m pip --python /venv/bin/python install --no-cache-dir $EXTRA_PACKAGES


FROM packages AS test
COPY .ci/requirements-test.txt /
RUN python -m pip --python /venv/bin/python install --no-cache-dir -r /requirements-test.txt
ENV PATH=/venv/bin:$PATH
WORKDIR /app
COPY . .
ENTRYPOINT ["tini", "-s", "--"]
CMD ["python", "-m", "pytest", "-q", "-rs", "-n", "4", "--dist", "worksteal", "test_lg.py"]


FROM tools
# Permission to send ICMP. ping raises CAP_NET_RAW itself, so a permitted file capability is enough, and the file
# still starts without it. mtr-packet does not raise it and needs an effective one; the kernel refuses to execute
# such a file where the bounding set lacks the capability. So there are two copies of mtr-packet, and a script of
# that name that starts the one with the capability where the bounding set has it, else the plain one, which works
# where net.ipv4.ping_group_range includes the user's group.
RUN printf '%s\n' '#!/bin/sh' \
        'while read -r name value; do [ "$name" = CapBnd: ] && break; done </proc/self/status' \
        '[ $((0x${value:-0} >> 13 & 1)) = 1 ] && exec /usr/local/libexec/mtr-packet  # CAP_NET_RAW' \
        'exec /usr/bin/mtr-packet' >/usr/local/bin/mtr-packet \
    && chmod 755 /usr/local/bin/mtr-packet
# Then remove everything that could gain privileges: pip, and the set-id bit of every file.
ARG EXTRA_TOOLS=""
RUN apt-get update \
    && apt-get install -y --no-install-recommends libcap2-bin $EXTRA_TOOLS \
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
# Compile the standard library's modules now: the base comes without them, and the service cannot write them.
RUN python -c "import lg"
ENV PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=5s CMD ["python", "lg.py", "health"]
ENTRYPOINT ["tini", "-s", "--"]
CMD ["python", "lg.py"]
