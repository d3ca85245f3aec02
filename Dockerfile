# The service, run by an unprivileged user. `--target test` builds the image that runs the tests instead.
#
#     --build-arg EXTRA_PACKAGES="maxminddb redis"   Python packages: AS numbers, a shared rate-limit store
#     --build-arg EXTRA_TOOLS=bird2                  Debian packages: the tools of EXTRA_COMMANDS
FROM python:3.13-slim-trixie AS tools
RUN apt-get update \
    && apt-get install -y --no-install-recommends curl iputils-ping mtr-tiny tini traceroute \
    && apt-get dist-clean


FROM tools AS packages
COPY requirements.txt /
RUN python -m venv --without-pip /venv \
    && python -m pip --python /venv/bin/python install --no-cache-dir -r /requirements.txt
ARG EXTRA_PACKAGES=""
RUN [ -z "$EXTRA_PACKAGES" ] || python -m pip --python /venv/bin/python install --no-cache-dir $EXTRA_PACKAGES


FROM tools AS licence
COPY README.md /
RUN sed -n '/^MIT License$/,$p' /README.md >/licence && grep -q 'AS IS' /licence


FROM packages AS test
COPY .ci/requirements-test.txt /
RUN python -m pip --python /venv/bin/python install --no-cache-dir -r /requirements-test.txt
ENV PATH=/venv/bin:$PATH
WORKDIR /app
COPY . .
ENTRYPOINT ["tini", "-s", "--"]
CMD ["python", "-m", "pytest", "-q", "-rs", "-n", "4", "--dist", "worksteal", "test_lg.py"]


FROM tools
LABEL org.opencontainers.image.title="Looking glass" \
    org.opencontainers.image.description="ping, traceroute, mtr and speed tests over HTTP" \
    org.opencontainers.image.licenses="MIT"
# Permission to send ICMP. ping raises CAP_NET_RAW itself, so a permitted file capability is enough, and the file
# still starts without it. mtr-packet does not raise it and needs an effective one; the kernel refuses to execute
# such a file where the bounding set lacks the capability. So there are two copies of mtr-packet, and a script of
# that name that starts the one with the capability where the bounding set has it, else the plain one, which works
# where net.ipv4.ping_group_range includes the user's group.
# Permission to send TCP probes, for `traceroute -T` in EXTRA_COMMANDS: a second copy of traceroute has the capability.
# The plain one has none, since glibc ignores RES_OPTIONS for a program with one, and silent resolvers then delay each hop.
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
    && install -D -m 755 /usr/bin/traceroute /usr/local/libexec/tcp/traceroute \
    && setcap cap_net_raw+p /usr/bin/ping \
        cap_net_raw+ep /usr/local/libexec/mtr-packet cap_net_raw+ep /usr/local/libexec/tcp/traceroute \
    && apt-get purge -y libcap2-bin python3-pip python3-pip-whl python3-setuptools python3-setuptools-whl \
        python3-venv python3-wheel \
    && apt-get dist-clean \
    && rm -rf /usr/local/bin/pip* /usr/local/lib/python3*/ensurepip /usr/local/lib/python3*/site-packages/* \
    && find / -xdev -perm /6000 -exec chmod ug-s {} +
COPY --from=licence --chmod=644 /licence /usr/share/doc/looking-glass/copyright
COPY --from=packages /venv /venv
ENV PATH=/venv/bin:$PATH
WORKDIR /app
COPY --chmod=644 lg.py .
# Compile the standard library's modules now: the base comes without them, and the service cannot write them.
RUN python -c "import lg"
ENV PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 8000
# HOST may be one address, then it is that which answers; HTTP_PROXY is not for this request.
HEALTHCHECK --interval=30s --timeout=10s --start-period=5s \
    CMD case $HOST in *:*) HOST="[$HOST]" ;; esac; \
        exec curl -fsS --noproxy '*' "http://${HOST:-127.0.0.1}:${PORT:-8000}/health"
ENTRYPOINT ["tini", "-s", "--"]
CMD ["python", "lg.py"]
