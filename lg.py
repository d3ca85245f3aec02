# SPDX-License-Identifier: MIT
"""A looking glass: streamed ping, traceroute and mtr from this server, and speed tests.

`python lg.py` starts the server, `python lg.py check` checks its settings. Importing does nothing.
It reads from top to bottom: settings, targets, limits, commands, parsing, running, connections, speed tests,
endpoints, OpenAPI, routes, serving, the page. Where to look first:

- A run takes its slot in `Runner.measure` and holds it until that `with` block ends: its processes are gone
  then, but its last bytes have not been sent yet. If the client leaves, the connection tells
  `Exchange.receive`, on which `StreamedResponse` closes `run_ahead`, which closes `measure`.
- The constants that bound a stranger's request stand at the head of targets, limits, parsing, running,
  connections, speed tests and serving. Those that an operator may change are in `Settings`.
- A command is a row of `BUILT_IN` or of the setting EXTRA_COMMANDS. New output needs a parser (`parser_for`)
  and, for new events, their types in `Event`, an example for the description (`EXAMPLES`) and `has_reply`.
  A built-in command is also listed in `PACKAGES` and, for the page, in `TITLES`, `ABOUT` and the script.
"""

from __future__ import annotations

import asyncio
import errno
import gzip
import ipaddress
import json
import logging
import logging.handlers
import math
import os
import queue
import re
import resource
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import typing
from base64 import b64encode
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, fields
from datetime import datetime
from difflib import get_close_matches
from functools import cache, cached_property, lru_cache, partial
from hashlib import sha256
from html import escape
from http import HTTPStatus
from importlib.util import find_spec
from inspect import cleandoc
from io import StringIO
from itertools import combinations, islice, takewhile
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Literal, NamedTuple, TypedDict, TypeVar, cast
from urllib.parse import parse_qs, unquote

try:
    from typing import NotRequired  # Python 3.11

    import h11
    import idna
    import limits
    import uvicorn
    from dotenv import dotenv_values
    from dotenv.parser import parse_stream
    from limits.storage import MemoryStorage, storage_from_string
    from limits.strategies import MovingWindowRateLimiter
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route
    from starlette.types import Message, Receive, Scope, Send
    from uvicorn.server import ServerState
except ImportError as error:
    if __name__ != "__main__":
        raise
    if sys.version_info < (3, 11):  # noqa: UP036
        raise SystemExit("lg.py: Python 3.11 or later is needed: install it and run lg.py with it") from None
    remedy = "install the packages with pip install -r requirements.txt, and run lg.py with that Python"
    raise SystemExit(f"lg.py: {error}: {remedy}") from None

VERSION = "1.0.0"

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
Target = IPAddress | str  # an address, or a host name in ASCII
Headers = Mapping[str, str]
T = TypeVar("T")

# ---- settings ----------------------------------------------------------------------------------------------

# NAME is the command for IPv4, NAME6 the one for IPv6. Each has a parser, which tells whether its tool works.
BUILT_IN = {
    "ping": "ping -{version} -n -O -c 15 -W 2 -s 56 {address}",
    "traceroute": "traceroute -{version} -q 3 -w 3,3,10 -m 30 {address}",
    "mtr": "mtr -{version} --raw -e -c 10 -i 1 -G 1 -Z 2 -m 30 {address}",
}
LOGO_BYTES = 2**16  # the logo is embedded in the page
BOOLEANS = dict.fromkeys(["true", "yes", "on", "1"], True) | dict.fromkeys(["false", "no", "off", "0"], False)
# Text without the characters that must not stand in a line of the log, in the page or in an argument.
USABLE = re.compile("[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]*")
# As a content security policy writes it: without a syntax for IPv6 addresses.
HTTP_ORIGIN = re.compile(r"https?://[A-Za-z0-9*._-]+(?::\d+)?", re.ASCII)
LOCATION_URL = re.compile(rf"({HTTP_ORIGIN.pattern}(?:/[A-Za-z0-9._~%-]+)*)/?", re.ASCII)
LINK_URL = re.compile(r"((?:https?://|mailto:)[^\s<>\"]+)")
CORS_ORIGIN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#@\s:*]+|\[[0-9A-Fa-f:.]+\])(?::(\d{1,5}))?/?")
DEFAULT_PORTS = {"http": "80", "https": "443"}
NODES = r"(?:.*@)?[^,@/]+:\d{1,5}(?:,[^,@/]+:\d{1,5})*/?"
# memcached has no moving window.
STORE = re.compile(rf"(memory|redis|valkey|mongodb)(?:\+cluster://{NODES}|s?(?:\+(?!cluster)[a-z]+)?://.*)")
STORE_PACKAGES = {"memory": "limits", "redis": "redis", "valkey": "valkey", "mongodb": "pymongo"}
SVG = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:svg|[?!].*?<svg)\b", re.DOTALL)

Rates = tuple[limits.RateLimitItem, ...]
NamedURL = dict[str, str]  # with the keys name and url
Parser = Callable[[str], T]  # raises ValueError("expected …") for a text that cannot be used


class SettingsError(Exception):
    """What stops the start, in one line; passwords in URIs are not shown."""

    def __init__(self, reason: str, **values: object) -> None:
        texts = [re.sub("(?i)password=[^&]*", "password=***", str(value)) for value in values.values()]
        named = ", ".join(f"{name}={text!r}" for name, text in zip(values, texts, strict=True))
        line = f"{named} cannot be used: {reason}" if values else reason
        super().__init__(re.sub(":/.*@", "://***@", line))


def boolean(value: str) -> bool:
    if value.lower() not in BOOLEANS:
        raise ValueError("expected true or false")
    return BOOLEANS[value.lower()]


def integer(low: int, high: int) -> Parser[int]:
    def parse(value: str) -> int:
        if not re.fullmatch("[0-9]{1,9}", value) or not low <= int(value) <= high:
            raise ValueError(f"expected an integer from {low} to {high}")
        return int(value)

    return parse


def matching(pattern: str | re.Pattern[str], expected: str) -> Parser[str]:
    def parse(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"expected {expected}, not {value!r}")
        return value

    return parse


def comma_separated(parse_entry: Parser[T]) -> Parser[tuple[T, ...]]:
    def parse(value: str) -> tuple[T, ...]:
        return tuple(parse_entry(entry.strip()) for entry in value.split(",") if entry.strip())

    return parse


def ip_network(value: str) -> IPNetwork:
    with suppress(ValueError):
        return ipaddress.ip_network("" if "%" in value else value)  # a zone matches no client and no target
    hint = ""
    with suppress(ValueError):
        hint = f": did you mean {ipaddress.ip_network(value.partition('%')[0], strict=False)}?"
    raise ValueError(f"expected an address or a network like 192.0.2.0/24, not {value!r}{hint}")


def proxy(value: str) -> IPNetwork:
    if value == "*" or not (parsed := ip_network(value)).prefixlen:
        raise ValueError(f"expected proxies' addresses, not {value!r}: any client could forge its address")
    return parsed


def cors_origin(value: str) -> str:
    """An origin as browsers send it. The error for another spelling has the right one."""
    if value in ("*", "null"):
        return value
    if not (match := CORS_ORIGIN.fullmatch(plain_text(value))):
        raise ValueError(f"expected * or whole origins like https://www.example.com, not {value!r}")
    scheme, host, port = match[1].lower(), match[2].lower(), match[3]
    with suppress(UnicodeError):
        host = host if host.isascii() else idna.encode(host, uts46=True).decode()
    spelled = f"{scheme}://{host}" + (f":{port}" if port and port != DEFAULT_PORTS.get(scheme) else "")
    if value != spelled:
        raise ValueError(f"expected {spelled}, as browsers send it, not {value!r}")
    return value


def rates(value: str) -> Rates:
    with suppress(ValueError):
        parsed = () if value.lower() == "off" else tuple(limits.parse_many(value))
        if all(0 < rate.amount < 10**9 and rate.get_expiry() < 10**9 for rate in parsed):
            return parsed
    raise ValueError("expected rates like 2/minute;30/hour, or off")


def storage_uri(value: str) -> str:
    if not (match := STORE.fullmatch(plain_text(value))):
        raise ValueError("expected a URI of memory, redis, valkey or mongodb, like redis://HOST:6379")
    if not find_spec(package := STORE_PACKAGES[match[1]]):
        raise ValueError(f"expected the Python package {package}: pip install {package}")
    return value


def json_list(url_pattern: re.Pattern[str], example: str) -> Parser[tuple[NamedURL, ...]]:
    """A JSON list of objects with `name` and `url`; other keys are ignored.

    `url_pattern` matches a whole URL, of which its group 1 is kept.
    """

    def parse_entry(entry: Any) -> NamedURL:
        with suppress(LookupError, TypeError, ValueError, AttributeError):
            if plain_text(entry["name"]).strip() and (url := url_pattern.fullmatch(plain_text(entry["url"]))):
                return {"name": entry["name"], "url": url[1]}
        raise ValueError(f"expected entries like {example}, not {json.dumps(entry)}")

    def parse(value: str) -> tuple[NamedURL, ...]:
        with suppress(json.JSONDecodeError, RecursionError):
            if isinstance(entries := json.loads(value or "[]"), list):
                return tuple(map(parse_entry, entries))
        raise ValueError(f"expected JSON like [{example}]")

    return parse


def extra_commands(value: str) -> Mapping[str, tuple[str, ...]]:
    """The argv of each command by name, split as a shell splits words. NAME also reserves NAME6."""
    pairs = None
    with suppress(ValueError, RecursionError):
        pairs = json.loads(value, object_pairs_hook=tuple)
    if not isinstance(pairs, tuple):
        raise ValueError('expected JSON like {"bgp": "birdc -r show route for {address} all"}')
    commands: dict[str, tuple[str, ...]] = {}
    taken = {"speedtest", *(f"{name}6" for name in BUILT_IN)}  # speedtest is a tab of the page
    for name, line in pairs:
        if not re.fullmatch("[a-z0-9-]+", name):
            raise ValueError(f"expected names of the characters a-z, 0-9 and -, not {name!r}")
        if name in taken or (f"{name}6" in taken and name not in BUILT_IN):
            raise ValueError(f"expected another name than {name!r}: it or {name}6 is taken")
        with suppress(AttributeError, TypeError, ValueError):
            commands[name] = tuple(shlex.split(plain_text(line)))
        if not any("{address}" in word for word in commands.get(name, ())[1:]):
            raise ValueError(f"expected a command line with {{address}} among its arguments for {name!r}")
        taken |= {name, f"{name}6"}
    return commands


def logo(path: str) -> str:
    """The SVG or PNG file at `path` as a data: URI."""
    if not path:
        return ""
    try:
        with Path(path).open("rb") as file:
            image = file.read(LOGO_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a file that can be read ({error})") from None
    kind = "png" if image.startswith(b"\x89PNG\r\n\x1a\n") else "svg+xml" if SVG.match(image) else ""
    if not kind or len(image) > LOGO_BYTES:
        raise ValueError(f"expected an SVG or PNG file of at most {LOGO_BYTES // 1024} KiB")
    return f"data:image/{kind};base64,{b64encode(image).decode()}"


def setting(default: str, parse: Parser[T]) -> T:
    """A row of Settings. An empty value means the default, unless `parse` accepts it."""
    row: T = field(metadata={"default": default, "parse": parse})
    return row


plain_text = matching(USABLE, "UTF-8 text without control characters")
log_level = matching("(?i)critical|error|warning|info|debug", "critical, error, warning, info or debug")
header_tokens = comma_separated(matching("[A-Za-z0-9!#$%&'*+.^_`|~-]+", "names of methods or headers, or *"))
ip_networks = comma_separated(ip_network)
http_origins = comma_separated(matching(HTTP_ORIGIN, "origins like https://www.example.com"))
command_names = comma_separated(matching(r"\*|[A-Za-z0-9-]+", "names of commands, or *"))
named_links = json_list(LINK_URL, '{"name": "Terms", "url": "https://www.example.com/terms"}')
locations = json_list(LOCATION_URL, '{"name": "Amsterdam", "url": "https://ams-lg.example.com"}')


@dataclass(frozen=True)
class Settings:
    """What an operator chooses, with its default; .env.example says what each does."""

    HOST: str = setting("", plain_text)
    PORT: int = setting("8000", integer(1, 65535))
    LOG_LEVEL: str = setting("info", log_level)
    FORWARDED_ALLOW_IPS: tuple[IPNetwork, ...] = setting("127.0.0.1,::1", comma_separated(proxy))
    NETWORK_LOCATION: str = setting("Unknown Location", plain_text)
    NETWORK_FACILITY: str = setting("Unknown Facility", plain_text)
    NETWORK_MAP_URL: str = setting("", plain_text)
    NETWORK_FACILITY_URL: str = setting("", plain_text)
    NETWORK_IPV4: str = setting("", plain_text)
    NETWORK_IPV6: str = setting("", plain_text)
    CORS_ORIGINS: tuple[str, ...] = setting("*", comma_separated(cors_origin))
    CORS_METHODS: tuple[str, ...] = setting("*", header_tokens)
    CORS_HEADERS: tuple[str, ...] = setting("*", header_tokens)
    CORS_CREDENTIALS: bool = setting("false", boolean)
    RATE_LIMIT_DIAGNOSTICS: Rates = setting("2/minute", rates)
    RATE_LIMIT_SPEEDTEST: Rates = setting("2/minute", rates)
    RATE_LIMIT_SPEEDTEST_10G: Rates = setting("1/minute", rates)
    RATE_LIMIT_LOOKUPS: Rates = setting("20/minute", rates)
    RATE_LIMIT_EXEMPT: tuple[IPNetwork, ...] = setting("", ip_networks)
    RATE_LIMIT_STORAGE_URI: str = setting("memory://", storage_uri)
    MAX_DIAGNOSTICS: int = setting("20", integer(1, 10000))
    MAX_DIAGNOSTICS_PER_CLIENT: int = setting("4", integer(1, 10000))
    MAX_SPEEDTESTS: int = setting("20", integer(0, 10000))
    MAX_SPEEDTESTS_PER_CLIENT: int = setting("4", integer(1, 10000))
    SPEEDTEST_GIB_PER_DAY: int = setting("0", integer(0, 10**8))
    DIAGNOSTIC_TIMEOUT: int = setting("60", integer(1, 3600))
    TARGET_ALLOW: tuple[IPNetwork, ...] = setting("127.0.0.0/8,::1/128", ip_networks)
    TARGET_DENY: tuple[IPNetwork, ...] = setting("", ip_networks)
    COMMANDS: tuple[str, ...] = setting("*", command_names)
    EXTRA_COMMANDS: Mapping[str, tuple[str, ...]] = setting("{}", extra_commands)
    ASN_DATABASE: str = setting("", plain_text)
    METRICS_ALLOW_IPS: tuple[IPNetwork, ...] = setting("127.0.0.1,::1", ip_networks)
    PAGE_TITLE: str = setting("", plain_text)
    PAGE_LOGO: str = setting("", logo)
    PAGE_COLOR: str = setting("", matching("(?:#[0-9A-Fa-f]{6})?", "a colour like #0a7cff"))
    PAGE_LINKS: tuple[NamedURL, ...] = setting("", named_links)
    LOCATIONS: tuple[NamedURL, ...] = setting("[]", locations)
    FRAME_ANCESTORS: tuple[str, ...] = setting("", http_origins)
    PATH: str = setting(os.defpath, plain_text)  # where the tools are, as for every program


def read_env_file() -> Mapping[str, str | None]:
    """The settings in the `.env` file beside this module, if there is one. Raises SettingsError."""
    path = Path(__file__).with_name(".env")
    try:
        content = path.read_text("utf-8-sig")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"{path} cannot be used: expected a text file ({error})") from None
    for binding in parse_stream(StringIO(content)):
        if binding.error or (binding.key and binding.value is None):
            line = f"{path}, line {binding.original.line}"
            raise SettingsError(f"{line}: expected NAME=value, not {binding.original.string.strip()!r}")
    return dotenv_values(stream=StringIO(content))


def load_settings(environment: Mapping[str, str | None] | None = None) -> Settings:
    """Settings from the texts in `environment`, or from `.env` and the process's environment.

    Raises SettingsError for the first that cannot be used.
    """
    if environment is None:
        environment = {**read_env_file(), **os.environ}
    values = {}
    for row in fields(Settings):
        default, parse = row.metadata["default"], row.metadata["parse"]
        value = (environment.get(row.name, default) or "").strip()
        if quoted := re.fullmatch(r"(['\"])(.*)\1", value, re.DOTALL):  # `docker run --env-file` keeps quotes
            value = quoted[2]
        try:
            values[row.name] = parse(value)
        except ValueError as error:
            if value:
                raise SettingsError(str(error), **{row.name: value}) from None
            values[row.name] = parse(default)
    return Settings(**values)


# ---- targets -----------------------------------------------------------------------------------------------

FORM_FIELDS = 100  # at most in a form: 4 KiB have room for thousands, which take milliseconds
RESOLVE_SECONDS = 5
RETRY_LATER = {"Retry-After": "5"}  # where the server is busy: a command takes about 15 s
# Limits on a service's threads, abandoned ones included: a resolver may take minutes to give up.
# Lookups are refused first, which leaves threads for the shared store.
LOOKUP_THREADS, STORE_THREADS = 100, 200

ADDRESS = re.compile(r"[0-9A-Fa-f:.]+|\[(?P<ipv6>[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*)\]")  # without a zone
LABEL = r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)"
# A last label that makes resolvers read a name as an IPv4 address.
NUMERIC = r"(?:[0-9]+|0[xX][0-9A-Fa-f]*)\.?$"
HOST_NAME = re.compile(rf"(?=.{{1,253}}\.?$)(?!(?:.*\.)?{NUMERIC}){LABEL}(?:\.{LABEL})*\.?")

# Which addresses are public; the longest prefix wins, as in a routing table. From the IANA Special-Purpose
# Address Registries (RFC 6890) with multicast, the IPv6 global unicast space (RFC 4291) and the former 6to4
# relays (RFC 7526).
PREFIXES = """
    0.0.0.0/0        public
    0.0.0.0/8        this network
    10.0.0.0/8       private
    100.64.0.0/10    carrier-grade NAT
    127.0.0.0/8      loopback
    169.254.0.0/16   link-local
    172.16.0.0/12    private
    192.0.0.0/24     protocol assignments, of which
    192.0.0.9/32     public: Port Control Protocol anycast
    192.0.0.10/32    public: TURN anycast
    192.0.2.0/24     documentation
    192.88.99.0/24   6to4 relays
    192.168.0.0/16   private
    198.18.0.0/15    benchmarking
    198.51.100.0/24  documentation
    203.0.113.0/24   documentation
    224.0.0.0/4      multicast
    240.0.0.0/4      reserved, broadcast
    ::/0             not assigned
    2000::/3         public: global unicast, of which
    2001::/23        protocol assignments (Teredo, benchmarking, ORCHID), of which
    2001:1::1/128    public: Port Control Protocol anycast
    2001:1::2/128    public: TURN anycast
    2001:1::3/128    public: DNS-SD service registration anycast
    2001:3::/32      public: AMT
    2001:4:112::/48  public: AS112
    2001:20::/28     public: ORCHIDv2
    2001:30::/28     public: drone remote identification
    2001:db8::/32    documentation
    2002::/16        6to4
    3fff::/20        documentation
"""
ROWS = [line.split(maxsplit=1) for line in PREFIXES.strip().split("\n")]
ROUTES = [(ipaddress.ip_network(prefix), purpose.startswith("public")) for prefix, purpose in ROWS]
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052
COMPATIBLE = ipaddress.IPv6Network("::/96")  # RFC 4291, deprecated


@dataclass(eq=False)
class RequestError(Exception):
    """A refused request: status, JSON body and headers of the answer, and the reason for the metrics."""

    status: int
    body: Mapping[str, object]
    headers: Headers = field(default_factory=dict)
    reason: str = "invalid"


def validation_error(
    message: str, value: object, kind: str = "value_error", reason: str = "invalid"
) -> RequestError:
    """422 for the field `target`, in FastAPI's shape; `message` tells a person what to do."""
    try:
        JSONResponse([[[[[[[[value]]]]]]]])  # nested deeper than in the answer
    except (ValueError, RecursionError):  # what the client sent cannot be echoed
        value = None
    error = {"type": kind, "loc": ["body", "target"], "msg": message, "input": value}
    return RequestError(422, {"detail": [error]}, reason=reason)


def busy(message: str, reason: str = "unavailable", headers: Headers = RETRY_LATER) -> RequestError:
    """503 for what this server cannot do now."""
    return RequestError(503, {"error": message}, headers, reason)


def shutdown_error() -> RequestError:
    """The answer to a request that would start something while the server stops."""
    return busy("The server is shutting down: try again in a moment")


def parse_form(text: str) -> dict[str, str | list[str]]:
    """The fields of a URL-encoded form; a field that is sent several times is a list. Raises ValueError."""
    form = parse_qs(text, keep_blank_values=True, max_num_fields=FORM_FIELDS)
    return {name: values if len(values) > 1 else values[0] for name, values in form.items()}


def parse_body(body: bytes) -> str:
    """The `target` of a request's body, a JSON object or a form. Raises RequestError."""
    example = 'send JSON like {"target": "example.com"} or a form like target=example.com'
    try:
        text = body.decode("utf-8-sig").strip()
        values = json.loads(text) if text.startswith("{") else parse_form(text)
    except (ValueError, RecursionError):
        raise validation_error(f"The body cannot be parsed: {example}", None, "json_invalid") from None
    if "target" not in values:
        raise validation_error(f"The target is missing: {example}", None, "missing")
    target = values["target"]
    if not isinstance(target, str):
        raise validation_error("The target must be one string: an address or a name", target, "string_type")
    return target.strip()


def parse_target(text: str) -> Target:
    """The address that `text` is, or the host name in ASCII. Raises RequestError for anything else.

    `[2001:db8::1]` and `2001:db8::1` are the same; `bücher.example` becomes `xn--bcher-kva.example` (UTS 46).
    """
    if match := ADDRESS.fullmatch(text):
        with suppress(ValueError):
            return ipaddress.ip_address(match["ipv6"] or text)
    name = text
    if not text.isascii() and len(text) <= 253:
        with suppress(UnicodeError):
            mapped = idna.uts46_remap(text, std3_rules=False)
            if max(map(len, mapped.split("."))) <= 63:  # encoding a label takes quadratic time
                name = idna.encode(mapped).decode("ascii")
    if not HOST_NAME.fullmatch(name):
        expected = "an address like 192.0.2.1 or 2001:db8::1, or a name like example.com"
        raise validation_error(f"Not a target: use {expected}", text)
    return name


def is_public(address: IPAddress) -> bool:
    """Whether this is a public unicast address, or the NAT64 form of one."""
    if address in NAT64:
        return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return max((prefix.prefixlen, public) for prefix, public in ROUTES if address in prefix)[1]


def embedded_ipv4(address: IPAddress) -> list[IPAddress]:
    """The IPv4 addresses inside an IPv6 address: mapped, compatible, NAT64, 6to4, Teredo."""
    if address.version == 4:
        return []
    low = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    embedded = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    embedded += [low for prefix in (NAT64, COMPATIBLE) if address in prefix and int(address) > 1]
    return [each for each in embedded if each]


def is_in(address: IPAddress | None, prefixes: Iterable[IPNetwork]) -> bool:
    return address is not None and any(address in prefix for prefix in prefixes)


class Threads:
    """Calls blocking functions in threads of their own, until the server stops.

    asyncio's pool has few threads, which slow names or a dead store would all occupy, and the loop waits for
    them when it closes.
    """

    def __init__(self, stopping: asyncio.Event) -> None:
        self.stopping = stopping
        self.running: list[threading.Thread] = []

    async def call(self, function: Callable[[], T], seconds: float, limit: int) -> T:
        """What `function` returns. A thread that is late is abandoned.

        Raises TimeoutError after `seconds`, RuntimeError beyond `limit` threads, RequestError when the server
        stops.
        """
        self.running = [thread for thread in self.running if thread.is_alive()]
        if len(self.running) >= limit:
            raise RuntimeError("too many threads")
        outcome: Future[T] = Future()
        outcome.set_running_or_notify_cancel()  # cancel() has no effect on it any more

        def work() -> None:
            try:
                outcome.set_result(function())
            except Exception as error:
                outcome.set_exception(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        self.running.append(thread)
        result, stop = asyncio.wrap_future(outcome), asyncio.create_task(self.stopping.wait())
        try:
            async with asyncio.timeout(seconds):
                await asyncio.wait((result, stop), return_when=asyncio.FIRST_COMPLETED)
            if self.stopping.is_set():  # also where it has a result: nothing may be started any more
                raise shutdown_error()
            return result.result()
        finally:
            result.cancel()
            stop.cancel()


class Targets:
    """Which addresses may be measured, and which of them a name has."""

    def __init__(self, settings: Settings, threads: Threads) -> None:
        self.allow, self.deny, self.threads = settings.TARGET_ALLOW, settings.TARGET_DENY, threads
        self.getaddrinfo: Callable[..., list[Any]] = socket.getaddrinfo

    def is_allowed(self, address: IPAddress) -> bool:
        """Whether this address is public or in TARGET_ALLOW, and not in TARGET_DENY."""
        if any(is_in(each, self.deny) for each in (address, *embedded_ipv4(address))):
            return False
        return is_public(address) or is_in(address, self.allow)

    async def resolve(self, target: Target, version: int, advice: str) -> IPAddress:
        """The address to measure: of a name, the first of this version that is allowed. Raises RequestError.

        `advice` tells the client what to do about a name without such an address.
        """
        if not isinstance(target, str):
            if self.is_allowed(target):
                return target
            message = f"{target} may not be measured here: use a different, public address"
            raise validation_error(message, str(target), reason="target")
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        lookup = partial(self.getaddrinfo, target.encode("ascii"), None, family, socket.SOCK_STREAM)
        message, found = "", []
        try:
            found = await self.threads.call(lookup, RESOLVE_SECONDS, LOOKUP_THREADS)
        except TimeoutError:
            message = f"This server's resolver gave no answer for {target} within {RESOLVE_SECONDS} s"
        except (OSError, RuntimeError) as error:
            if getattr(error, "errno", None) not in (socket.EAI_NONAME, socket.EAI_NODATA):
                message = f"This server cannot look up {target} now"
        if message:
            raise validation_error(f"{message}: try again, or use an address", target, reason="resolver")
        for *_, sockaddr in found:
            address = ipaddress.ip_address(str(sockaddr[0]).partition("%")[0])
            if self.is_allowed(address):
                return address
        # The same message for both cases: otherwise anyone could find out which internal names exist.
        message = f"{target} has no IPv{version} address that may be measured here: {advice}"
        raise validation_error(message, target, reason="target")


# ---- limits ------------------------------------------------------------------------------------------------

STORE_SECONDS = 2  # time limit of a query to the shared store
STORE_RETRY_SECONDS = 30  # pause before a store that has failed is queried again
SWEEP_SECONDS = 60  # how often clients without a recent request are removed from memory
LOG_REPEAT_SECONDS = 60  # one refusal of each client, and one failure of each tool, is logged in this time
LOG_KEYS = 1000  # of clients and tools, for what is logged seldom
GIVE_WAY_SECONDS = 60  # a speed test that has run so long has measured what there is to measure
RATE_HEADERS = {  # with what they mean
    "X-RateLimit-Limit": "Requests allowed.",
    "X-RateLimit-Remaining": "Requests left.",
    "X-RateLimit-Reset": "When one more is allowed, in epoch seconds.",
}

logger = logging.getLogger("lg")


def logfmt(**pairs: object) -> str:
    """key=value pairs on one line; None is left out."""

    def quote(text: str) -> str:
        if text.isprintable() and re.fullmatch(r'[^\s"=\\]+', text):
            return text
        return json.dumps(text, ensure_ascii=not text.isprintable())

    return " ".join(f"{key}={quote(str(value))}" for key, value in pairs.items() if value is not None)


def log(level: int, message: str, /, **pairs: object) -> None:
    """Log a constant message, with what varies as pairs: no text from outside is a template."""
    if logger.isEnabledFor(level):
        logger.log(level, logfmt(msg=message, **pairs))


class Once:
    """Limits how often something is logged; it holds at most LOG_KEYS keys."""

    def __init__(self) -> None:
        self.until: dict[object, float] = {}

    def __call__(self, key: object, seconds: float) -> bool:
        """Whether this is the first call with `key` in so many seconds."""
        now = time.monotonic()
        if len(self.until) >= LOG_KEYS:
            self.until = {each: until for each, until in self.until.items() if until > now}
        if self.until.get(key, 0) > now or len(self.until) >= LOG_KEYS:
            return False
        self.until[key] = now + seconds
        return True


# Prometheus' text format knows these three escapes alone, and rejects the others of JSON.
LABEL_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


class Counters:
    """Values for Prometheus, by name and labels. No client chooses the value of a label."""

    def __init__(self) -> None:
        self.values: defaultdict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)

    def add(self, name: str, amount: float, /, **labels: str) -> None:
        self.values[name, tuple(labels.items())] += amount

    def set(self, name: str, value: float, /, **labels: str) -> None:
        self.values[name, tuple(labels.items())] = value

    def samples(self, name: str) -> Iterator[str]:
        """The lines of a metric in Prometheus' text format."""
        for (each, labels), value in self.values.items():
            if each == name:
                texts = [f'{label}="{text.translate(LABEL_ESCAPES)}"' for label, text in labels]
                yield f"{name}{{{','.join(texts)}}} {value:.15g}"


@lru_cache(1000)
def rate_limit_key(address: IPAddress) -> str:
    """The key under which an address is limited: itself, or its /64 of IPv6."""
    return str(address) if address.version == 4 else str(ipaddress.IPv6Network((address, 64), strict=False))


class Client(NamedTuple):
    """Who is limited and logged; not `is_named` where a trusted proxy sent no readable address."""

    address: IPAddress  # the proxy's own where the client is not named
    is_named: bool = True

    def __str__(self) -> str:
        return str(self.address)

    @property
    def key(self) -> str:
        return rate_limit_key(self.address)

    def is_in(self, networks: Iterable[IPNetwork]) -> bool:
        return self.is_named and is_in(self.address, networks)


def describe_rates(rates: Rates) -> str:
    """Rates in English: `2 per minute and 30 per 2 hours`."""
    texts = [f"{rate}s" if rate.multiples > 1 else f"{rate}".replace(" 1 ", " ") for rate in rates]
    return " and ".join(texts) or "none"


@dataclass(eq=False)
class Slot:
    """Room for one command or transfer of a client; `give_way` ends what runs in it, if that may be ended."""

    client: str
    give_way: Callable[[], None] | None
    begun: float = field(default_factory=time.monotonic)
    length: int = 0  # of a speed test, in bytes
    moved: int = 0  # bytes of it so far
    test: bytes = b""  # the name that the client gave it


class Slots:
    """Limits how many run at once, in all and for each client; `what` names them in errors."""

    def __init__(self, what: str, total: int, per_client: int, stopping: asyncio.Event) -> None:
        self.what, self.total, self.per_client, self.stopping = what, total, per_client, stopping
        self.taken: set[Slot] = set()

    def __str__(self) -> str:
        return f"{self.total} at once, {self.per_client} per client"

    @contextmanager
    def take(self, client: str, give_way: Callable[[], None] | None = None) -> Iterator[Slot]:
        """Hold a slot. Raises RequestError where none is free."""
        if self.stopping.is_set():
            raise shutdown_error()
        by_client = Counter(slot.client for slot in self.taken)
        if by_client[client] >= self.per_client:
            message = f"You may run {self.per_client} {self.what} at once: wait until one has ended"
            raise RequestError(429, {"error": message}, RETRY_LATER, "client slots")
        if len(self.taken) >= self.total:
            self.make_room(client, by_client)
        slot = Slot(client, give_way)
        self.taken.add(slot)
        try:
            yield slot
        finally:
            self.taken.discard(slot)

    def make_room(self, client: str, by_client: Counter[str]) -> None:
        """End the oldest run of the client that has most, for one that has none. Raises RequestError."""
        latest = time.monotonic() - GIVE_WAY_SECONDS
        old = [slot for slot in self.taken if slot.give_way and slot.begun <= latest]
        slot = max(old, key=lambda each: (by_client[each.client], -each.begun), default=None)
        if by_client[client] or not slot or not slot.give_way:
            raise busy(f"All {self.total} slots for {self.what} are taken: try again soon", "server slots")
        self.taken.discard(slot)
        slot.give_way()


def check_rates(limiter: MovingWindowRateLimiter, rates: Rates, consume: bool, *key: str) -> Headers:
    """Test each rate, and consume one of each if `consume`: the headers of the tightest.

    Where a rate is exhausted, nothing is consumed. Raises RequestError (429).
    """
    exhausted = [rate for rate in rates if not limiter.test(rate, *key)]
    if consume and not exhausted:  # each hit succeeds, unless a request with the same store was faster
        exhausted = [rate for rate in rates if not limiter.hit(rate, *key)]
    windows = [(rate, limiter.get_window_stats(rate, *key)) for rate in exhausted or rates]
    rate, stats = min(windows, key=lambda each: (each[1].remaining, -each[1].reset_time))
    now = time.time()
    reset = max(now, stats.reset_time)  # that of a window without hits may be in the past
    values = (rate.amount, max(0, stats.remaining), math.ceil(reset))
    headers = dict(zip(RATE_HEADERS, map(str, values), strict=True))
    if exhausted:
        headers["Retry-After"] = str(max(1, math.ceil(reset - now)))
        raise RequestError(429, {"error": f"Rate limit exceeded: {rate}"}, headers, "rate limit")
    return headers


def shared_limiter(uri: str) -> Callable[[], MovingWindowRateLimiter]:
    """The limiter of a network store, made on first use where that connects. Raises SettingsError."""
    names = ("socket_timeout", "socket_connect_timeout") if uri.startswith(("redis", "valkey")) else ()
    open_store = partial(storage_from_string, uri, **dict.fromkeys(names, STORE_SECONDS))
    limiter = cache(lambda: MovingWindowRateLimiter(open_store()))
    try:
        if "+cluster:" not in uri:  # its client connects at once, and fails while the cluster is down
            limiter()
    except Exception:  # each client library has its own; it may have a part of the password
        reason = "expected a URI that its client library accepts"
        raise SettingsError(reason, RATE_LIMIT_STORAGE_URI=uri) from None
    return limiter


class RateLimits:
    """Counts requests in moving windows: in a shared store or, without one or while it fails, in memory.

    The storages are the synchronous ones of `limits`: every URI works there, and memory takes microseconds.
    """

    def __init__(self, settings: Settings, threads: Threads) -> None:
        """Raises SettingsError for a URI that cannot be used."""
        self.exempt, self.threads = settings.RATE_LIMIT_EXEMPT, threads
        self.local_storage = MemoryStorage()
        self.local = MovingWindowRateLimiter(self.local_storage)
        uri = settings.RATE_LIMIT_STORAGE_URI
        self.shared = None if uri.startswith("memory:") else shared_limiter(uri)
        self.retry_at = 0.0  # when a store that failed is queried again; 0 while it answers
        self.swept = 0.0

    async def check(self, rates: Rates, name: str, client: Client, consume: bool = False) -> Headers:
        """The headers for a request of this client, which is counted if `consume`. Raises RequestError."""
        if not rates or client.is_in(self.exempt):
            return {}
        self.sweep()
        key = (name, client.key)
        if (limiter := self.shared) and time.monotonic() >= self.retry_at:

            def query() -> Headers:
                return check_rates(limiter(), rates, consume, *key)

            try:
                headers = await self.threads.call(query, STORE_SECONDS, STORE_THREADS)
                if self.retry_at:
                    log(logging.WARNING, "The rate-limit store answers again")
                self.retry_at = 0.0
                return headers
            except RequestError:
                raise
            except Exception as error:  # each client library has its own
                if not self.retry_at:
                    message = "The rate-limit store fails: limits are kept in memory until it answers"
                    log(logging.WARNING, message, error=repr(error))
                self.retry_at = time.monotonic() + STORE_RETRY_SECONDS
        try:
            return check_rates(self.local, rates, consume, *key)
        except RuntimeError:  # the storage starts a thread that removes expired entries
            raise busy("The server has no thread left: try again soon") from None

    def sweep(self) -> None:
        """Once a minute, remove the clients whose hits have expired: `limits` keeps their empty lists."""
        now = time.time()
        if now < self.swept:  # the clock was set back: hits of the future would count for long
            self.local_storage.reset()
        elif now <= self.swept + SWEEP_SECONDS:
            return
        for key in [key for key, hits in self.local_storage.events.items() if not hits]:
            self.local_storage.clear(key)
        self.swept = now


REFUSALS = ["invalid", "target", "resolver", "rate limit", "budget", "unavailable"]
REFUSALS += ["client slots", "server slots"]


class Limits:
    """What a service limits and counts."""

    def __init__(self, settings: Settings, threads: Threads) -> None:
        """Raises SettingsError."""
        self.once, self.counters, self.rates = Once(), Counters(), RateLimits(settings, threads)
        total, per_client = settings.MAX_DIAGNOSTICS, settings.MAX_DIAGNOSTICS_PER_CLIENT
        self.commands = Slots("commands", total, per_client, threads.stopping)
        total, per_client = settings.MAX_SPEEDTESTS, settings.MAX_SPEEDTESTS_PER_CLIENT
        self.speedtests = Slots("speed tests", total, per_client, threads.stopping)
        for reason in REFUSALS:  # known samples start at 0, so that Prometheus sees their first increase
            self.counters.set("lg_refusals_total", 0, reason=reason)

    def count_refusal(self, client: Client, path: str, reason: str) -> None:
        """Count a refused request, and log it once a minute for each client, unless it was invalid."""
        self.counters.add("lg_refusals_total", 1, reason=reason)
        key = ("refusal", client.key)
        if reason != "invalid" and self.once(key, LOG_REPEAT_SECONDS):
            log(logging.INFO, "refused", path=path, client=client, reason=reason)


# ---- commands ----------------------------------------------------------------------------------------------


class Command(NamedTuple):
    """A diagnostic: its name in the API and what is run for it."""

    name: str
    argv: tuple[str, ...]  # {address} stands for the target's
    version: int  # of IP
    base_name: str  # the name of the command for IPv4
    twin: str = ""  # the same command for the other IP version, "" where that is not offered

    @property
    def tool(self) -> str:
        return Path(self.argv[0]).name

    def argv_for(self, address: IPAddress | str) -> list[str]:
        return [word.replace("{address}", str(address)) for word in self.argv]


def make_commands(settings: Settings) -> dict[str, Command]:
    """The commands that are offered, by name. Raises SettingsError."""
    lines = {name: tuple(line.split()) for name, line in BUILT_IN.items()} | dict(settings.EXTRA_COMMANDS)
    known = {f"{name}{suffix}" for name in lines for suffix in ("", "6")}
    offered = {name.lower() for name in settings.COMMANDS}
    for name in offered - known - {"*"}:
        expected = f"expected names of {', '.join(sorted(known))}, or *, not {name!r}"
        raise SettingsError(expected, COMMANDS=",".join(settings.COMMANDS))
    offered = known if "*" in offered else offered
    commands = {}
    for base, line in lines.items():
        for name, other, version in ((base, f"{base}6", 4), (f"{base}6", base, 6)):
            if name in offered:
                argv = tuple(word.replace("{version}", str(version)) for word in line)
                commands[name] = Command(name, argv, version, base, other if other in offered else "")
    return commands


def check_version(target: Target, command: Command) -> None:
    """Raises RequestError for an address of the other IP version, and names the command to use."""
    if not isinstance(target, str) and target.version != command.version:
        hint = f"use {command.twin}" if command.twin else f"{command.name} is for IPv{command.version}"
        raise validation_error(f"{target} is an IPv{target.version} address: {hint}", str(target))


# Debian's packages.
PACKAGES = {"ping": "iputils-ping", "traceroute": "traceroute", "mtr": "mtr-tiny"}
PACKAGES |= {"birdc": "bird2", "vtysh": "frr"}


def install_hint(tools: Iterable[str]) -> str | None:
    packages = [PACKAGES[tool] for tool in tools if tool in PACKAGES]
    return f"apt-get install {' '.join(packages)}" if packages else None


ToolState = Literal["ok", "forbidden", "failing"]


class Tools:
    """The programs that the commands run, and what is known of their state."""

    def __init__(self, commands: Mapping[str, Command], settings: Settings) -> None:
        # Debian keeps some tools in directories that are on root's PATH only. traceroute looks up names
        # itself and would wait 20 s for resolvers that are silent.
        path = f"{settings.PATH}:/usr/local/sbin:/usr/sbin:/sbin"
        self.environment = {"LC_ALL": "C", "PATH": path, "RES_OPTIONS": "timeout:1 attempts:1"}
        self.names = tuple(dict.fromkeys(command.argv[0] for command in commands.values()))
        extra = settings.EXTRA_COMMANDS
        tried = [each for each in commands.values() if each.base_name in BUILT_IN.keys() - extra.keys()]
        # For each tool, the first of its commands is tried: the one for IPv4 if it is offered.
        self.trials = {command.tool: command for command in reversed(tried)}
        # What the last trial of a tool on loopback found, once it has ended; an operator's command has none.
        self.states: dict[str, ToolState] = {}
        self.looked_at, self.known_faults = -math.inf, dict[str, list[str]]()

    def missing(self) -> list[str]:
        """The tools that are not installed or not executable."""
        return [tool for tool in self.names if not shutil.which(tool, path=self.environment["PATH"])]

    def faults(self) -> dict[str, list[str]]:
        """The tools with a fault, by its kind; looked for at most once a second."""
        if (now := time.monotonic()) > self.looked_at + 1:
            found = {"missing": self.missing()}
            for kind in ("forbidden", "failing"):
                tools = [tool for tool, state in self.states.items() if state == kind]
                found[kind] = sorted(set(tools).difference(found["missing"]))
            self.looked_at = now
            self.known_faults = {kind: tools for kind, tools in found.items() if tools}
        return self.known_faults


# ---- parsing what the tools print --------------------------------------------------------------------------

LINE_BYTES = 4096  # of a line that is not complete; what is longer is parsed in pieces
MAX_LOSSES = 1000  # of those that only ping's summary tells of
MAX_TRACEROUTE_HOPS = 255  # further lines are notes
MAX_ROUTERS = 128  # of one hop, as in mtr

# A tool's output becomes events as it comes, and one result at the end. The OpenAPI schemas are made from
# these types. Results have the shape of Globalping's test results. Times are in milliseconds, the `duration`
# of a run in seconds.

Status = Literal["finished", "failed"]


class Timing(TypedDict):
    rtt: float


class PingTiming(Timing):
    ttl: int


class Probe(TypedDict):
    """`address` only if it is not the hop's, `code` only if the reply has one: `!X`, `!H`, `!N`."""

    rtt: float | None
    address: NotRequired[str]
    code: NotRequired[str]


class Stats(TypedDict):
    min: float | None
    avg: float | None
    max: float | None
    total: int
    rcv: int
    drop: int
    loss: float | None


class HopStats(Stats):
    stDev: float | None
    jMin: float | None
    jAvg: float | None
    jMax: float | None


class Routers(TypedDict):
    """The fields about routers that hops of events and of results share."""

    addresses: NotRequired[list[str]]
    hostnames: NotRequired[list[str | None]]
    asn: list[int]
    network: str | None


class ResultHop(Routers):
    resolvedAddress: str | None
    resolvedHostname: str | None
    timings: list[Timing]


class MtrResultHop(ResultHop):
    stats: HopStats


class ToolResult(TypedDict):
    """The result of a tool that has no parser; the others add to it."""

    status: Status
    resolvedAddress: str
    rawOutput: str


class PingResult(ToolResult):
    resolvedHostname: str | None
    timings: list[PingTiming]
    stats: Stats


class TracerouteResult(ToolResult):
    resolvedHostname: str | None
    hops: list[ResultHop]


class MtrResult(ToolResult):
    resolvedHostname: str | None
    hops: list[MtrResultHop]


Result = PingResult | TracerouteResult | MtrResult | ToolResult


class StartEvent(TypedDict):
    """The first line: what is measured."""

    event: Literal["start"]
    command: str
    target: str
    address: str
    family: Literal[4, 6]
    time: str


class ReplyEvent(TypedDict):
    """ping: a reply. A duplicate repeats its `seq`."""

    event: Literal["reply"]
    seq: int
    ttl: int | None
    rtt: float | None


class LostEvent(TypedDict):
    """ping: no reply yet. A late reply overrides it."""

    event: Literal["lost"]
    seq: int


class HopEvent(Routers):
    """A hop, and one router that answered for it: mtr's last, traceroute's first.

    `addresses` has all routers, if there are several, and `hostnames` their names in the same order.
    """

    event: Literal["hop"]
    hop: int
    address: str | None
    hostname: str | None


class TracerouteHopEvent(HopEvent):
    """traceroute: a hop, its replies, and each of its probes."""

    timings: list[Timing]
    probes: list[Probe]


class MtrHopEvent(HopEvent):
    """mtr: a hop as it now stands."""

    stats: HopStats


class PathEvent(TypedDict):
    """mtr: the path is shorter than earlier events said. Later hops are void."""

    event: Literal["path"]
    hops: int


class NoteEvent(TypedDict):
    """A line that no other event carries in full: of the tool, or about its output."""

    event: Literal["note"]
    text: str


class EndEvent(TypedDict):
    """The last line: how the run ended, and its result."""

    event: Literal["end"]
    status: Status
    error: NotRequired[str]
    exit_status: int | None
    duration: float
    result: Result


AnyHopEvent = TracerouteHopEvent | MtrHopEvent
Event = StartEvent | ReplyEvent | LostEvent | AnyHopEvent | PathEvent | NoteEvent | EndEvent


def note(text: str) -> NoteEvent:
    return {"event": "note", "text": text}


class AutonomousSystem(NamedTuple):
    asn: list[int]  # empty where it is not known
    network: str | None


def autonomous_system(record: object) -> AutonomousSystem:
    """From a record of GeoLite2-ASN, DB-IP or RouteViews (`autonomous_system_*`), or of IPinfo."""
    columns = record if isinstance(record, dict) else {}
    number = columns.get("autonomous_system_number") or columns.get("asn")  # IPinfo has "AS64500"
    names = map(columns.get, ("autonomous_system_organization", "as_name", "name"))
    if not (match := re.fullmatch(r"(?:AS)?(\d{1,10})", str(number))):
        return AutonomousSystem([], None)
    return AutonomousSystem([int(match[1])], next((str(name) for name in names if name), None))


class AsnDatabase:
    """The autonomous systems of addresses, from a file in MaxMind's format, which is mapped into memory."""

    def __init__(self, path: str) -> None:
        """Raises SettingsError if the file, or the package for it, cannot be used."""
        try:
            import maxminddb
        except ImportError:
            raise SettingsError("install the package maxminddb", ASN_DATABASE=path) from None
        try:
            reader = maxminddb.open_database(path)
            if not any(autonomous_system(record).asn for _, record in islice(reader, 1000)):
                raise ValueError("no AS numbers in it")
        except (OSError, ValueError, maxminddb.InvalidDatabaseError) as error:
            expected = "expected a database of AS numbers in MaxMind's format (.mmdb), such as GeoLite2-ASN"
            raise SettingsError(f"{expected}: {error}", ASN_DATABASE=path) from None
        self.record = lru_cache(1000)(reader.get)

    def find(self, address: str | None) -> AutonomousSystem:
        with suppress(ValueError, RuntimeError):  # IPv6 in a database of IPv4; a damaged record
            return autonomous_system(self.record(address) if address else None)
        return autonomous_system(None)


RESULT_KEYS = {"address": "resolvedAddress", "hostname": "resolvedHostname"}


def result_hop(event: AnyHopEvent, timings: list[Timing]) -> Any:
    """The hop of a result, made from its last event."""
    kept = {key: value for key, value in event.items() if key not in ("event", "hop", "probes")}
    return {RESULT_KEYS.get(key, key): value for key, value in kept.items()} | {"timings": timings}


HOSTNAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,252}")


def hostname_of(name: str, address: str | None) -> str | None:
    """The name that a tool printed for an address; None for the address itself or what is no host name."""
    return name if name != address and HOSTNAME.fullmatch(name) else None


class OutputParser:
    """Parses what a tool writes, any bytes, into text for people, events for programs, and a result.

    This one is for tools without a parser of their own: each line is a note. Parsing a line takes constant
    time.
    """

    def __init__(self, address: IPAddress, asn_database: AsnDatabase | None) -> None:
        """`address` is the target's."""
        self.address = str(address)
        self.asn_database = asn_database
        self.buffer = b""

    def feed(self, chunk: bytes) -> tuple[bytes, list[Event]]:
        """The text and the events that this piece of output completes."""
        *lines, self.buffer = (self.buffer + chunk).split(b"\n")
        if len(self.buffer) > LINE_BYTES:
            lines, self.buffer = [*lines, self.buffer], b""
        return chunk, [event for line in lines for event in self.parse_line(line.decode("utf-8", "replace"))]

    def finish(self, complete: bool) -> tuple[bytes, list[Event]]:
        """The same for the end of the output; `complete` unless the tool was stopped or failed."""
        rest, self.buffer = self.buffer.decode("utf-8", "replace"), b""
        return b"", [*(self.parse_line(rest) if rest else ()), *self.last_events(complete)]

    def parse_line(self, line: str) -> Iterator[Event]:
        yield note(line)

    def last_events(self, complete: bool) -> Iterator[Event]:
        """Events for what is known only at the end, so that the last events agree with the result."""
        return iter(())

    def make_hop_event(self, hop: int, address: str | None, names: Mapping[str, str | None]) -> HopEvent:
        """What hop events of traceroute and mtr have in common; `names` has every router that answered."""
        asn, network = self.asn_database.find(address) if self.asn_database else autonomous_system(None)
        name = names.get(address or "")
        event = HopEvent(event="hop", hop=hop, address=address, hostname=name, asn=asn, network=network)
        if len(names) > 1:
            event |= {"addresses": list(names), "hostnames": list(names.values())}
        return event

    def has_sent(self) -> bool:
        """Whether the tool sent anything: if not, ping's exit status 1 is a failure."""
        return True

    def result(self, status: Status = "finished", raw_output: str = "") -> ToolResult:
        """What is known so far."""
        return {"status": status, "resolvedAddress": self.address, "rawOutput": raw_output}


class PingParser(OutputParser):
    """ping of iputils."""

    TIME = r"(\d{1,9}(?:\.\d{1,3})?)"
    REPLY = re.compile(
        r"(?:\[[\d.]+\] )?\d+ bytes from (\S+?)(?: \((\S+?)\))?: icmp_seq=(\d{1,6})"
        rf"(?: ttl=(\d{{1,3}}))?(?: time={TIME} ms)?((?!\d).*)"
    )
    UNANSWERED = re.compile(r"(?:\[[\d.]+\] )?no answer yet for icmp_seq=(\d{1,6})")
    ERROR = re.compile(r"From \S+(?: \(\S+\))?(?<!:) icmp_seq=(\d{1,6}) (?!Redirect|Source Quench).+")
    SUMMARY = re.compile(
        r"(\d{1,6}) packets transmitted, (\d{1,6}) received\b(?:.*?, (-?\d{1,9}(?:\.\d{1,6})?)% packet loss)?"
    )
    TIMES = re.compile(rf"rtt min/avg/max/mdev = {TIME}/{TIME}/{TIME}/[\d.]+ ms.*")
    BANNER = re.compile(r"|PING .+|--- .+ ping statistics ---")

    def __init__(self, address: IPAddress, asn_database: AsnDatabase | None) -> None:
        super().__init__(address, asn_database)
        self.hostname: str | None = None
        self.timings: list[PingTiming] = []
        self.replied: dict[int, bool] = {}  # by sequence number, of requests known to have been sent
        self.summary: tuple[int, int, float | None] | None = None
        self.times: list[float] = []

    def parse_line(self, line: str) -> Iterator[Event]:
        if match := self.REPLY.fullmatch(line):
            yield from self.reply(match)
        elif match := self.UNANSWERED.fullmatch(line):
            yield from self.mark_lost(int(match[1]))
        elif not self.BANNER.fullmatch(line):
            yield note(line)
            if match := self.ERROR.fullmatch(line):
                yield from self.mark_lost(int(match[1]))
            elif match := self.SUMMARY.match(line):
                self.summary = int(match[1]), int(match[2]), float(match[3]) if match[3] else None
            elif match := self.TIMES.fullmatch(line):
                self.times = [float(text) for text in match.groups()]

    def reply(self, match: re.Match[str]) -> Iterator[Event]:
        name, address, seq_text, ttl_text, rtt_text, remark = match.groups()
        seq, ttl = int(seq_text), int(ttl_text) if ttl_text else None
        rtt = float(rtt_text) if rtt_text else None
        if "(BAD CHECKSUM!)" in remark:  # ping counts it as lost
            yield from self.mark_lost(seq)
        else:
            self.replied[seq] = True
            if rtt is not None and ttl is not None:
                self.timings.append({"rtt": rtt, "ttl": ttl})
            yield {"event": "reply", "seq": seq, "ttl": ttl, "rtt": rtt}
        if address == self.address:
            self.hostname = hostname_of(name, address)
        if remark:  # (DUP!), (DIFFERENT ADDRESS!), (truncated), a time with too many digits
            yield note(match[0])

    def mark_lost(self, seq: int) -> Iterator[Event]:
        if seq not in self.replied:
            self.replied[seq] = False
            yield {"event": "lost", "seq": seq}

    def totals(self) -> tuple[int, int, float | None]:
        """Requests sent, replies received and the loss in percent, where ping printed it."""
        return self.summary or (max(self.replied, default=0), sum(self.replied.values()), None)

    def last_events(self, complete: bool) -> Iterator[Event]:
        for seq in range(1, 1 + min(self.totals()[0], MAX_LOSSES)):
            yield from self.mark_lost(seq)

    def has_sent(self) -> bool:
        return bool(self.replied or self.summary)

    def result(self, status: Status = "finished", raw_output: str = "") -> PingResult:
        rtts = [timing["rtt"] for timing in self.timings]
        computed = [min(rtts), round(sum(rtts) / len(rtts), 3), max(rtts)] if rtts else [None] * 3
        low, average, high = self.times or computed
        total, received, loss = self.totals()
        if loss is None and total:
            loss = round(100 - 100 * received / total, 2)
        loss = None if loss is None else min(max(loss, 0), 100)
        drop = max(total - received, 0)
        return {
            **super().result(status, raw_output),
            "resolvedHostname": self.hostname,
            "timings": self.timings,
            "stats": Stats(min=low, avg=average, max=high, total=total, rcv=received, drop=drop, loss=loss),
        }


class TracerouteParser(OutputParser):
    """Dmitry Butskoy's traceroute, which Debian has: one line per hop, with its probes in order."""

    HOP = re.compile(r" ?(\d{1,3}) ( \S.*)")
    WORD = re.compile(
        r" +(?:(?P<star>\*)"
        r"|(?P<time>-?\d{1,9}\.\d{1,3}) ms"
        r"|(?P<code>!\S*)"
        r"|(?:(?P<name>\S+) \()?(?P<address>\d+(?:\.\d+){3}|[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*)(?:%\S+?)?"
        r"(?(name)\)|))(?!\S)"
    )
    BANNER = re.compile(r"|traceroute to \S+ \(\S+\), +\d+ hops max, +\d+ byte packets")

    def __init__(self, address: IPAddress, asn_database: AsnDatabase | None) -> None:
        super().__init__(address, asn_database)
        self.hops: list[TracerouteHopEvent] = []

    def parse_line(self, line: str) -> Iterator[Event]:
        complete = bool(self.BANNER.fullmatch(line))
        if len(self.hops) < MAX_TRACEROUTE_HOPS and (match := self.HOP.fullmatch(line)):
            probes, names, complete = self.parse_probes(match[2])
            timings: list[Timing] = [{"rtt": probe["rtt"]} for probe in probes if probe["rtt"] is not None]
            common = self.make_hop_event(int(match[1]), next(iter(names), None), names)
            self.hops.append({**common, "timings": timings, "probes": probes})
            yield self.hops[-1]
        if not complete:
            yield note(line)

    def parse_probes(self, text: str) -> tuple[list[Probe], dict[str, str | None], bool]:
        """The probes of a hop, its routers with their names, and whether these are the whole of the text."""
        probes: list[Probe] = []
        names: dict[str, str | None] = {}
        position, address, complete = 0, None, True
        pending = False  # an address whose time is still to come
        while word := self.WORD.match(text, position):
            position = word.end()
            if word["address"]:
                address, pending = word["address"], True
                name = word["name"] or address
                names.setdefault(address, hostname_of(name, address))
                complete &= bool(hostname_of(name, address)) or name.partition("%")[0] == address
            elif word["code"] and probes and not pending:
                probes[-1]["code"] = word["code"]
            else:
                probe: Probe = {"rtt": float(word["time"]) if word["time"] else None}
                if address and address != next(iter(names)) and not word["star"]:
                    probe["address"] = address
                if word["code"]:
                    probe["code"] = word["code"]
                probes.append(probe)
                pending &= bool(word["star"])
        return probes, names, complete and not text[position:].strip()

    def result(self, status: Status = "finished", raw_output: str = "") -> TracerouteResult:
        names = (hop["hostname"] for hop in self.hops if hop["address"] == self.address)
        hops = [result_hop(hop, hop["timings"]) for hop in self.hops]
        common = super().result(status, raw_output)
        return {**common, "resolvedHostname": next(names, None), "hops": hops}


class MtrHop:
    """One position of an mtr run, with the arithmetic of mtr's ui/net.c: whole µs, truncated at each step."""

    def __init__(self) -> None:
        self.address: str | None = None  # the router that answered last
        self.routers: dict[str, dict[str, None]] = {}  # every router that answered, with its MPLS labels
        self.in_flight = False  # whether the last probe may still be answered
        self.times: list[int] = []
        self.sent = self.average = self.squares = self.best = self.worst = 0
        self.jitter_sum = self.jitter_best = self.jitter_worst = 0

    def set_address(self, address: str) -> None:
        self.address = address
        self.routers.setdefault(address, {})
        if len(self.routers) > MAX_ROUTERS:
            del self.routers[next(iter(self.routers))]

    def reply(self, rtt: int) -> None:
        """`rtt` is in µs."""
        self.in_flight = False
        if self.times:
            jitter = abs(rtt - self.times[-1])
            self.jitter_sum += jitter
            self.jitter_best = min(self.jitter_best, jitter) if len(self.times) > 1 else jitter
            self.jitter_worst = max(self.jitter_worst, jitter)
        self.best = min(self.best, rtt) if self.times else rtt
        self.worst = max(self.worst, rtt) if self.times else rtt
        self.times.append(rtt)
        before = self.average
        self.average = int(before + (rtt - before) / len(self.times))
        self.squares = int(self.squares + float(rtt - before) * (rtt - self.average))

    def columns(self) -> str:
        """Loss%, Snt, Last, Avg, Best, Wrst, StDev as `mtr --report` prints them; too wide ones are cut."""
        stats, last = self.stats(), self.times[-1] / 1000 if self.times else 0
        times = (last, stats["avg"], stats["min"], stats["max"], stats["stDev"])
        *cells, deviation = (f" {each or 0:5.1f}" for each in times)
        loss, sent, *cells = (each[:6] for each in (f" {stats['loss']:4.1f}%", f" {self.sent:5d}", *cells))
        return f"{loss}{sent} {''.join(cells)}{deviation}"

    def stats(self) -> HopStats:
        """Of the probes that were answered or lost."""
        total, rcv = self.sent - self.in_flight, len(self.times)
        loss = int(1000 * (100 - 100.0 * rcv / total)) / 1000 if total else 0.0
        pairs = max(rcv - 1, 1)  # of neighbouring replies
        spread = (self.best, self.average, self.worst, int(math.sqrt(self.squares / pairs)))
        times = (*spread, self.jitter_best, self.jitter_sum / pairs, self.jitter_worst)
        rounded = (round(us / 1000, 3) if self.times else None for us in times)
        low, average, high, deviation, least, mean, most = rounded
        stats = Stats(min=low, avg=average, max=high, total=total, rcv=rcv, drop=total - rcv, loss=loss)
        return {**stats, "stDev": deviation, "jMin": least, "jAvg": mean, "jMax": most}


class MtrParser(OutputParser):
    """`mtr --raw`. As text: each hop when it first answers, then the report that mtr prints.

    Lines of another form, such as errors, are notes.
    """

    FORMATS: ClassVar = {  # after the kind of line and the position, which counts from 0
        "x": re.compile(r"\d{1,9}"),  # sent: sequence number
        "h": re.compile(r"[0-9A-Fa-f:.]+"),  # the router whose reply follows, where it is another one
        "m": re.compile(r"(\d{1,10}) (\d{1,3}) (\d{1,3}) (\d{1,3})"),  # its MPLS label: label, TC, S, TTL
        "d": re.compile(r"(.*)"),  # its name
        "p": re.compile(r"(-?\d{1,10}) \d{1,9}"),  # reply: µs, sequence number
    }
    RAW = re.compile(r"([xhmdp]) (\d{1,2}) (.*)")
    TITLES = " Loss%   Snt   Last   Avg  Best  Wrst StDev"
    MAX_HOPS = 30  # -m of the built-in commands

    def __init__(self, address: IPAddress, asn_database: AsnDatabase | None) -> None:
        super().__init__(address, asn_database)
        self.hops: defaultdict[int, MtrHop] = defaultdict(MtrHop)
        self.names: dict[str, str] = {}
        self.changed: dict[int, None] = {}  # positions to send an event for, in the order of their changes
        self.events: dict[int, MtrHopEvent] = {}  # the last of each position within the path
        self.printed: set[int] = set()  # hops that are in the text
        self.opening = time.strftime("Start: %Y-%m-%dT%H:%M:%S%z\n").encode()

    def feed(self, chunk: bytes) -> tuple[bytes, list[Event]]:
        """Hop events are made once for all lines of a chunk, which bounds the work for a line."""
        events = [*super().feed(chunk)[1], *self.changes()]
        return self.render(events), events

    def finish(self, complete: bool) -> tuple[bytes, list[Event]]:
        events = super().finish(complete)[1]
        return self.render(events) + "".join(f"{line}\n" for line in self.table()).encode(), events

    def parse_line(self, line: str) -> Iterator[Event]:
        match = self.RAW.fullmatch(line)
        value = match and self.FORMATS[match[1]].fullmatch(match[3])
        if not match or not value:
            if line:
                yield note(line)
            return
        position = int(match[2])
        hop = self.hops[position]
        match match[1]:
            case "x":
                if hop.in_flight:  # the probe before is lost
                    self.changed[position] = None
                hop.sent, hop.in_flight = hop.sent + 1, True
            case "h":
                hop.set_address(value[0])
            case "m" if hop.address:
                label = "[MPLS: Lbl {} TC {} S {} TTL {}]".format(*value.groups())
                labels = hop.routers[hop.address]
                if label not in labels:
                    labels[label] = None
                    yield note(f"hop {position + 1}: {hop.address} {label}")
            case "d" if hop.address and hop.address not in self.names:
                if hostname := hostname_of(value[0], hop.address):
                    self.names[hop.address] = hostname
                    named = [at for at, each in self.hops.items() if hop.address in each.routers]
                    self.changed.update(dict.fromkeys(named))
            case "p":
                hop.reply(int(value[1]))
                self.changed[position] = None

    def changes(self) -> Iterator[Event]:
        """The events of positions that changed, within the path as it is now known."""
        length, _ = self.path()
        if void := sorted(position for position in self.events if position >= length):
            for position in void:
                del self.events[position]
            self.changed |= dict.fromkeys(void)  # in case the path grows again
            yield {"event": "path", "hops": length}
        for position in [position for position in self.changed if position < length]:
            del self.changed[position]
            hop = self.hops[position]
            names = {router: self.names.get(router) for router in hop.routers}
            event = self.make_hop_event(position + 1, hop.address, names)
            self.events[position] = {**event, "stats": hop.stats()}
            yield self.events[position]

    def path(self) -> tuple[int, str]:
        """The number of positions up to the target, and what to note on a path that ends before it.

        In raw output, an "unreachable" looks like a reply: its router seems to answer every later probe. mtr
        ends its report there. A router in a loop or behind NAT does the same, but its times grow from
        position to position. So the path ends at this router, unless at least nine of ten pairs of times
        grow. Measured share of growing pairs: a loop 1.0, a host absent from its network 0.5, a rate-limited
        "unreachable" 0.2. Otherwise the path ends one position after the last that answered, as in mtr's
        table.
        """
        answered = {position: hop for position, hop in sorted(self.hops.items()) if hop.times}
        if not answered:
            return 0, ""
        if reached := [position for position, hop in answered.items() if self.address in hop.routers]:
            return reached[0] + 1, ""
        end = max(answered)
        router = answered[end].address
        alone = takewhile(lambda hop: hop.routers.keys() == {router}, reversed(answered.values()))
        grows = [earlier < later for later, earlier in combinations([hop.best for hop in alone], 2)]
        if len(grows) < 3 or 10 * sum(grows) >= 9 * len(grows):  # three positions have three pairs
            return max(end + 1, min(end + 2, self.MAX_HOPS)), ""
        hops = [position + 1 for position, hop in answered.items() if router in hop.routers]
        answers = f"hop {hops[0]} ({router}) also answered for hops {hops[1]} to {hops[-1]}"
        return hops[0], f"{answers}: unreachable, or a loop"

    def last_events(self, complete: bool) -> Iterator[Event]:
        for position, hop in self.hops.items():
            if complete and hop.in_flight:
                hop.in_flight = False
                self.changed[position] = None
        length, ending = self.path()
        self.changed |= dict.fromkeys(sorted(set(range(length)) - self.events.keys()))
        yield from self.changes()
        if ending:
            yield note(ending)

    def render(self, events: Sequence[Event]) -> bytes:
        """Notes, and each hop when it first answers; the first time with mtr's first line."""
        lines, self.opening = [self.opening], b""
        for event in events:
            if event["event"] == "note":
                lines.append(f"{event['text']}\n".encode())
            elif event["event"] == "hop" and event["address"] and event["hop"] not in self.printed:
                self.printed.add(event["hop"])
                lines.append(f" {event['hop']:2d}.|-- {event['address']}\n".encode())
        return b"".join(lines)

    def table(self) -> Iterator[str]:
        """The lines of mtr's report, with each router once and its MPLS labels below it."""
        hops = [self.hops[position] for position in sorted(self.events)]
        mark, extra = (".", 1) if self.asn_database else (".|--", 0)
        hostname = socket.gethostname()
        width = max(map(len, [hostname, *(self.row(hop.address) for hop in hops)]))
        if self.hops:
            yield f"HOST: {hostname:{width}}{self.TITLES}"
        for number, hop in enumerate(hops, 1):
            yield f" {number:2d}{mark} {self.row(hop.address):{width + extra}}{hop.columns()}"
            for address, labels in sorted(hop.routers.items(), key=lambda item: item[0] != hop.address):
                if address != hop.address:
                    yield f"{'':{len(mark) + 4}}{self.row(address)}"
                yield from (f"       {label}" for label in labels)

    def row(self, address: str | None) -> str:
        """A router as the table has it."""
        name = f"{self.names[address]} ({address})" if address in self.names else address or "???"
        if not self.asn_database:
            return name
        asn, *_ = [*self.asn_database.find(address).asn, "???"]
        return f"AS{asn:<6} {name}"

    def result(self, status: Status = "finished", raw_output: str = "") -> MtrResult:
        hops = []
        for position, event in sorted(self.events.items()):
            hops.append(result_hop(event, [{"rtt": rtt / 1000} for rtt in self.hops[position].times]))
        common = super().result(status, raw_output)
        return {**common, "resolvedHostname": self.names.get(self.address), "hops": hops}


PARSERS: dict[str, type[OutputParser]] = {"ping": PingParser, "traceroute": TracerouteParser}


def parser_for(command: Command) -> type[OutputParser]:
    """The parser of the command's tool."""
    if command.tool == "mtr" and "--raw" in command.argv:
        return MtrParser
    return PARSERS.get(command.tool, OutputParser)


# ---- running a command -------------------------------------------------------------------------------------

OUTPUT_BYTES = 2**20  # what one command may write
UNREAD_BYTES = 2**25  # what may wait for all clients to read it
PIECE_BYTES = 2**16  # sent at a time, so that a connection buffers no more
READ_BYTES = 2**12  # read and parsed at a time: other requests wait for no more, even if lines are short
POLL_SECONDS = 0.05  # how often a tool is looked at where the kernel cannot tell that it has ended
GRACE_SECONDS = 0.5  # for a command to print its summary after SIGINT, and for what is killed to end
TRIAL_SECONDS = 3  # a tool without permission ends long before, on a busy machine too
TRIAL_REPEAT_SECONDS = 60
LOGGED_CHARS = 1000  # of what a tool printed in its trial
TRIAL_MESSAGES: dict[ToolState, str] = {
    "ok": "A tool works again",
    "forbidden": "A tool lacks the permission to send: grant NET_RAW or widen net.ipv4.ping_group_range",
    "failing": "A tool fails on loopback",
}
# Errors of ping and traceroute, and of mtr, whose mtr-packet does the sending.
DENIED = re.compile("(?i)permission denied|not permitted|privilege|failure to start mtr-packet")

Stream = tuple[Headers, AsyncGenerator[bytes]]  # the headers of a rate limit, and a body
Steps = AsyncGenerator[Headers | bytes]  # the headers first, then pieces of the body
StreamSource = AbstractAsyncContextManager[Stream]


class TransferAborted(Exception):  # noqa: N818 - not an error of the application's
    """Raised to break off an answer that has begun: its connection is reset."""


@asynccontextmanager
async def interruptible(quietly: bool = False) -> AsyncIterator[Callable[[], None]]:
    """Yields a function that cancels the body of this context, which then raises TransferAborted.

    If `quietly`, it raises nothing.
    """
    try:
        async with asyncio.timeout(None) as deadline:
            yield lambda: deadline.reschedule(0)
    except TimeoutError:
        if not deadline.expired():
            raise
        if not quietly:
            raise TransferAborted from None


async def wait_until_done(task: asyncio.Task[None]) -> None:
    """Wait until a task is done, even if this wait is cancelled."""
    try:
        await asyncio.wait((task,))
    finally:
        await asyncio.wait((task,))


def session_groups(leader: int) -> set[int]:
    """The process groups of a session that have living members, its leader and zombies excepted."""
    groups = set()
    pids = [int(each.name) for each in os.scandir("/proc") if each.name.isdigit()]
    # The youngest first: a process that exits during the search may have left a child with a higher number.
    for pid in sorted(pids, reverse=True):
        with suppress(OSError):  # it has ended
            if os.getsid(pid) == leader != pid:
                stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
                state, _, group, *_ = stat.rpartition(") ")[2].split()
                if state not in "ZX":
                    groups.add(int(group))
    return groups


class Process:
    """A tool that runs in a session of its own until the context is left."""

    def __init__(
        self, argv: Sequence[str], environment: Mapping[str, str], seconds: float, running: set[Process]
    ) -> None:
        """Start it for at most `seconds`; `running` holds it until the context is left. Raises OSError."""
        self.stopped = ""  # why it was stopped, if it was
        self.status = 0  # when it has been reaped; negative is a signal
        self.loop = asyncio.get_running_loop()
        self.changed = asyncio.Event()  # output has come, or the tool has ended
        self.tool = subprocess.Popen(
            argv,
            bufsize=0,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        assert self.tool.stdout
        self.pipe = self.tool.stdout
        os.set_blocking(self.pipe.fileno(), False)
        self.loop.add_reader(self.pipe.fileno(), self.changed.set)
        self.waiter = self.loop.create_task(self.wait())
        self.timer = self.loop.call_later(seconds, self.stop, f"stopped after {seconds} s")
        self.running = running
        running.add(self)

    async def __aenter__(self) -> Process:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.running.discard(self)  # nothing may signal it any more: its number may soon be another's
        self.timer.cancel()
        self.loop.remove_reader(self.pipe.fileno())
        self.pipe.close()
        ending = asyncio.create_task(self.end())
        await wait_until_done(ending)  # the slot is not given back before
        ending.result()

    async def end(self) -> None:
        """Kill every process of the session, and reap the tool.

        The tool is reaped last, since until then no new session can get its number. Whole groups are killed:
        a process found in one may have forked and exited by then. This returns at most GRACE_SECONDS after
        the tool has ended: at once, unless the tool runs as a user whose processes we may not signal.
        """
        self.signal(signal.SIGKILL)
        await self.waiter
        deadline = time.monotonic() + GRACE_SECONDS
        while (groups := session_groups(self.tool.pid)) and time.monotonic() < deadline:
            for group in groups:
                self.signal(signal.SIGKILL, group)
            await asyncio.sleep(0.001)
        self.status = self.tool.wait()

    async def wait(self) -> None:
        """Wait until the tool has ended, without reaping it: until then its process number is not reused."""
        with suppress(OSError, AttributeError):  # an old kernel or Python, a filter, no descriptor left
            pidfd = os.pidfd_open(self.tool.pid)
            ended = asyncio.Event()
            try:
                self.loop.add_reader(pidfd, ended.set)
                await ended.wait()
            finally:
                self.loop.remove_reader(pidfd)
                os.close(pidfd)
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while os.waitid(os.P_PID, self.tool.pid, flags) is None:  # noqa: ASYNC222 - WNOHANG
            await asyncio.sleep(POLL_SECONDS)
        self.changed.set()

    def stop(self, reason: str) -> None:
        """Send SIGINT, and SIGKILL after GRACE_SECONDS: ping prints its summary in between."""
        self.stopped = self.stopped or reason
        self.signal(signal.SIGINT)
        self.timer.cancel()
        self.timer = self.loop.call_later(GRACE_SECONDS, self.signal, signal.SIGKILL)

    def signal(self, number: int, group: int = 0) -> None:
        """Signal a whole group, the tool's by default: mtr has children, which would keep the pipe open."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group or self.tool.pid, number)

    async def output(self) -> AsyncGenerator[bytes]:
        """Chunks of output as they are written, until the tool has ended or has written too much."""
        remaining = OUTPUT_BYTES
        while True:
            self.changed.clear()
            if ended := self.waiter.done():
                self.signal(signal.SIGKILL)  # remaining children
            chunk = self.pipe.read(READ_BYTES)
            if chunk is None and not ended:
                await self.changed.wait()
                continue
            if not chunk:  # closed; or held open by a child that has left the group
                break
            if len(chunk) > remaining:
                self.stopped = self.stopped or f"output cut at {OUTPUT_BYTES // 2**20} MiB"
                yield chunk[:remaining]
                return
            remaining -= len(chunk)
            yield chunk
        self.loop.remove_reader(self.pipe.fileno())
        await asyncio.wait((self.waiter,))


class Transcript:
    """What a client reads of a run: text, or one JSON object a line for each event."""

    def __init__(self, command: Command, target: Target, parser: OutputParser, as_events: bool) -> None:
        self.command, self.target, self.parser, self.as_events = command, target, parser, as_events
        self.started = time.monotonic()
        self.raw_output = bytearray()  # what a text client reads

    def encode(self, text: bytes, events: Sequence[Event]) -> bytes:
        self.raw_output += text
        if not self.as_events:
            return text
        return b"".join(json.dumps(event, separators=(",", ":")).encode() + b"\n" for event in events)

    def start(self) -> bytes:
        address, version = self.parser.address, self.command.version
        kind = "address" if version == 4 else "IPv6 address"
        text = f"{self.target} has {kind} {address}\n" if isinstance(self.target, str) else ""
        event: StartEvent = {
            "event": "start",
            "command": self.command.name,
            "target": str(self.target),
            "address": address,
            "family": cast(Literal[4, 6], version),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        return self.encode(text.encode(), [event])

    def fault(self, process: Process) -> str:
        """What went wrong in a run that has ended; "" if nothing did."""
        if process.stopped:
            return process.stopped
        if process.status < 0:
            return f"killed by signal {-process.status}"
        # ping's 1 means that no reply came, but it exits with 1 before it has sent anything too.
        no_reply = self.command.tool == "ping" and process.status == 1 and self.parser.has_sent()
        return f"exit status {process.status}" if process.status and not no_reply else ""

    def end(self, fault: str, status: int) -> bytes:
        """The last bytes. `status` is the tool's exit status."""
        last = self.encode(*self.parser.finish(complete=not fault))
        if fault:
            newline = "" if self.raw_output.endswith(b"\n") or not self.raw_output else "\n"
            last += self.encode(f"{newline}--- {self.command.name}: {fault} ---\n".encode(), [])
        if not self.as_events:
            return last
        outcome: Status = "failed" if fault else "finished"
        event: EndEvent = {
            "event": "end",
            "status": outcome,
            "exit_status": status if status >= 0 else None,
            "duration": round(time.monotonic() - self.started, 3),
            "result": self.parser.result(outcome, self.raw_output.decode("utf-8", "replace")),
        }
        if fault:
            event["error"] = f"{self.command.name}: {fault}"
        return last + self.encode(b"", [event])


class UnreadOutput:
    """Output that clients have not read yet. Where it exceeds UNREAD_BYTES, the largest run gives way."""

    def __init__(self) -> None:
        self.sizes: dict[Callable[[], None], int] = {}  # by the function that breaks off the answer

    def add(self, give_way: Callable[[], None], size: int) -> None:
        if give_way not in self.sizes:  # it has given way
            return
        self.sizes[give_way] += size
        if sum(self.sizes.values()) > UNREAD_BYTES:
            largest = max(self.sizes, key=lambda each: self.sizes[each])
            del self.sizes[largest]
            largest()

    @asynccontextmanager
    async def run_ahead(self, steps: Steps) -> AsyncIterator[Stream]:
        """What `steps` yields, headers first. It runs to its end however slowly the client reads.

        So it gives back what it holds as soon as it can.
        """
        waiting: asyncio.Queue[Any] = asyncio.Queue()

        async def run() -> None:
            async for chunk in steps:
                waiting.put_nowait(chunk)
                self.add(give_way, len(chunk))
                await asyncio.sleep(0)  # other requests go on although the tool writes fast

        async def pieces() -> AsyncGenerator[bytes]:
            while (chunk := await waiting.get()) is not None:
                for start in range(0, len(chunk), PIECE_BYTES):
                    yield chunk[start : start + PIECE_BYTES]
                    await asyncio.sleep(0)  # others go on although this client reads as fast as we write
                self.add(give_way, -len(chunk))

        async with interruptible() as give_way, aclosing(steps):
            headers: Any = await anext(steps)
            self.sizes[give_way] = 0
            task = asyncio.create_task(run())
            task.add_done_callback(lambda _: waiting.put_nowait(None))
            try:
                yield headers, pieces()
                await task
            finally:
                self.sizes.pop(give_way, None)
                while not waiting.empty():  # else the traceback of a broken-off answer keeps it in memory
                    waiting.get_nowait()
                task.cancel()
                await wait_until_done(task)


def has_reply(event: Mapping[str, Any]) -> bool:
    """Whether this is a reply, or a hop that has answered."""
    return event["event"] == "reply" or bool(event.get("timings") or event.get("stats", {}).get("rcv"))


class Runner:
    """Runs the commands of a service."""

    def __init__(self, settings: Settings, limits: Limits, targets: Targets, tools: Tools) -> None:
        """Raises SettingsError."""
        self.settings, self.limits, self.targets, self.tools = settings, limits, targets, tools
        self.processes: set[Process] = set()
        self.unread = UnreadOutput()
        self.asn_database = AsnDatabase(settings.ASN_DATABASE) if settings.ASN_DATABASE else None

    async def measure(self, command: Command, target: Target, client: Client, as_events: bool) -> Steps:
        """Run a command: yields the headers of its rate limit, then what the client reads.

        Raises RequestError.
        """
        begun, outcome, address = time.monotonic(), "client gone", None
        rates, rate_limits = self.settings.RATE_LIMIT_DIAGNOSTICS, self.limits.rates
        with self.limits.commands.take(client.key):
            headers = await rate_limits.check(rates, command.name, client)
            try:
                if isinstance(target, str):
                    await rate_limits.check(self.settings.RATE_LIMIT_LOOKUPS, "lookup", client, consume=True)
                advice = f"check the name, or use {command.twin}" if command.twin else "check the name"
                address = await self.targets.resolve(target, command.version, advice)
                async with self.start(command, address) as process:
                    # Counted only now: a request that starts no tool costs nothing of this limit.
                    headers = await rate_limits.check(rates, command.name, client, consume=True)
                    yield headers
                    parser = parser_for(command)(address, self.asn_database)
                    transcript = Transcript(command, target, parser, as_events)
                    yield transcript.start()
                    async with aclosing(process.output()) as chunks:
                        async for chunk in chunks:
                            yield transcript.encode(*parser.feed(chunk))
                fault = transcript.fault(process)
                outcome = fault or "finished"
            except Exception as error:
                outcome = "internal error"
                if isinstance(error, RequestError):
                    error.headers = {**headers, **error.headers}
                    outcome = ""
                raise
            finally:
                if outcome:
                    seconds = time.monotonic() - begun
                    self.record(command, outcome, seconds, target=target, address=address, client=client)
        yield transcript.end(fault, process.status)

    def record(self, command: Command, outcome: str, seconds: float, **pairs: object) -> None:
        """Count a run that has ended, and log it."""
        counters = self.limits.counters
        counters.add("lg_runs_total", 1, command=command.name, outcome=outcome)
        counters.add("lg_run_seconds_total", seconds, command=command.name, outcome=outcome)
        if outcome != "client gone":
            counters.set("lg_last_run_ok", outcome == "finished", command=command.name)
        level = logging.INFO if outcome in ("finished", "client gone") else logging.WARNING
        log(level, "run", command=command.name, **pairs, outcome=outcome, seconds=f"{seconds:.1f}")

    def start(self, command: Command, address: IPAddress) -> Process:
        """The command's tool, started towards an address. Raises RequestError."""
        try:
            return self.open(command, address, self.settings.DIAGNOSTIC_TIMEOUT)
        except OSError as error:
            absent = isinstance(error, FileNotFoundError)
            if self.limits.once(("start", command.tool), LOG_REPEAT_SECONDS):
                hint = install_hint([command.tool]) if absent else None
                log(logging.ERROR, "A tool cannot be started", tool=command.tool, error=error, install=hint)
            if absent or isinstance(error, PermissionError):
                message = f"{command.tool} is not installed on this server, or may not run"
                raise busy(message, headers={}) from None
            raise busy(f"The server cannot start {command.tool} now: try again soon") from None

    def open(self, command: Command, address: IPAddress, seconds: float) -> Process:
        return Process(command.argv_for(address), self.tools.environment, seconds, self.processes)

    def stop(self) -> None:
        """Stop the commands that run: the server is about to end."""
        for process in self.processes:
            process.stop("stopped, the server is shutting down")

    async def keep_trying_tools(self) -> None:
        """Try the tools of the built-in commands; each minute those that have not measured loopback yet."""
        while True:
            await self.try_tools()
            await asyncio.sleep(TRIAL_REPEAT_SECONDS)

    async def try_tools(self) -> None:
        states = self.tools.states
        trials = [trial for tool, trial in self.tools.trials.items() if states.get(tool) != "ok"]
        async with asyncio.TaskGroup() as group:  # waits for all trials, even if it is cancelled
            for trial in trials:
                group.create_task(self.try_tool(trial))

    async def try_tool(self, command: Command) -> None:
        """Let a tool measure loopback, and keep and log what is wrong with it."""
        try:
            error = await self.trial_error(command)
        except FileNotFoundError:
            return  # missing is not failing
        except OSError as failure:  # its file has capabilities that this process may not have
            error = str(failure)
        lines = error.split("\n")
        denied = next(filter(DENIED.search, lines), "")
        state: ToolState = "forbidden" if denied else "failing" if error else "ok"
        before, self.tools.states[command.tool] = self.tools.states.get(command.tool, "ok"), state
        if state != before and not self.limits.commands.stopping.is_set():
            last = (denied or lines[-1])[:LOGGED_CHARS] or None
            log(logging.WARNING, TRIAL_MESSAGES[state], tool=command.tool, error=last)

    async def trial_error(self, command: Command) -> str:
        """What a tool that does not measure loopback printed, or how it ended; empty where it measures it.

        Raises OSError where it cannot be started.
        """
        loopback = ipaddress.ip_address("127.0.0.1" if command.version == 4 else "::1")
        parser, output = parser_for(command)(loopback, None), bytearray()
        async with self.open(command, loopback, TRIAL_SECONDS) as process:
            async for chunk in process.output():
                output += chunk
                if any(map(has_reply, parser.feed(chunk)[1])):
                    return ""
                await asyncio.sleep(0)  # requests go on although the tool writes fast
        printed = output.decode(errors="replace").strip() or process.stopped
        return printed or f"exit status {process.status}, and no reply from {loopback}"


# ---- connections -------------------------------------------------------------------------------------------

MAX_CONNECTIONS = 4000  # of all clients: 40 MiB idle, 210 MiB with the largest incomplete requests
MAX_CONNECTIONS_PER_CLIENT = 100  # proxies excepted; a browser opens 6 to a server
RESERVED_FILES = 200  # descriptors for lookups, the store, the log and what the tools' start needs
FILES_PER_COMMAND = 3  # of a running command: its pipe, its pidfd, and /proc when it ends
REQUEST_HEADER_SECONDS = 10  # within which the header of a request must be complete
IDLE_SECONDS = 75  # a connection is kept for its next request; proxies keep theirs for 60 s
# Bounds of what is parsed for a request, since h11 costs time per line: these take 0.3 ms, at worst 1 ms.
HEADER_BYTES, HEADER_LINES = 2**14, 100
CHUNKED_BYTES, CHUNKED_LINES = 2**13, 66  # the lines of 32 chunks and of the body's end
PIPELINED_BYTES = 4096  # kept of further requests while one is answered
BODY_BYTES = 4096  # of a body that is read
BODY_SECONDS = 10  # within which it must be complete
LINGER_SECONDS = 5  # for the rest of a body after its answer
STALL_SECONDS = 120  # the kernel drops a peer that accepts no data for so long; slow readers pause for 30 s
STOP_SECONDS = 3  # uvicorn's time limit for requests to end at the shutdown; ours end earlier
FORWARDED_HOPS = 32  # the last entries of X-Forwarded-For that are parsed: a header has room for thousands
ADDRESS_CHARS = 64  # longer texts are cut before they are parsed as an address, and cached
CLOSE = (b"connection", b"close")
HEADER_END = re.compile(rb"\n\r?\n")
ABSOLUTE_FORM = re.compile(rb"(?i)\Ahttps?://[^/?#]*")  # of a request target; its path follows
ADDRESS_WITH_PORT = re.compile(r"\[(?P<bracketed>[^\]]*)\](?::\d+)?|(?P<ipv4>[^:]*):\d+")
PREFIX = re.compile(r"(?:/[A-Za-z0-9._~-]+)+", re.ASCII)  # of paths; people paste it into shells
UNTRUSTED_PROXY = (
    "X-Forwarded-For and X-Real-IP are ignored from a peer that is not in FORWARDED_ALLOW_IPS: if it is your "
    "proxy, add its address there, or all its clients share one rate limit"
)
# The answer to a request that cannot be parsed, which reaches no endpoint.
REFUSAL = """\
HTTP/1.1 {status.value} {status.phrase}\r
Content-Type: application/json\r
Content-Length: {length}\r
Cache-Control: no-store\r
Connection: close\r
\r
{body}"""
NO_LINGER = struct.pack("ii", 1, 0)  # for SO_LINGER: closing discards unsent data and sends RST
# The application receives this in place of a large body, whose bytes are counted and not kept.
ZEROS = memoryview(bytes(2**20))


@lru_cache(1000)
def parse_address(text: str) -> IPAddress | None:
    """The address in a text: IPv6 without its zone, IPv4 if it is mapped into IPv6; None for other texts."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0] if ":" in text else text)
    except ValueError:
        return None
    return (address.version == 6 and address.ipv4_mapped) or address


def parse_forwarded(text: str) -> IPAddress | None:
    """The address in an entry of X-Forwarded-For: with or without brackets, with or without a port."""
    text = text.strip()[:ADDRESS_CHARS]
    if match := ADDRESS_WITH_PORT.fullmatch(text):
        text = match["bracketed"] or match["ipv4"] or ""
    return parse_address(text)


def peer_address(request: Request) -> IPAddress:
    """The address that is connected; 0.0.0.0 for a Unix socket, under `uvicorn --factory lg:create_app`."""
    peer = parse_address(request.client.host[:ADDRESS_CHARS]) if request.client else None
    return peer or ipaddress.IPv4Address(0)


class Proxies:
    """Who a client is: what trusted proxies name, and nothing that clients name themselves."""

    def __init__(self, settings: Settings, once: Once) -> None:
        self.once = once
        self.is_trusted = lru_cache(1000)(partial(is_in, prefixes=settings.FORWARDED_ALLOW_IPS))

    def client(self, request: Request) -> Client:
        """Who is limited, logged and shown as `your_ip`: the peer, or the client that a trusted proxy names.

        That is the rightmost address of X-Forwarded-For that is not a trusted proxy's: the client can forge
        everything to the left of it. X-Real-IP counts where there is no X-Forwarded-For.
        """
        peer, headers = peer_address(request), request.headers
        forwarded = ",".join(headers.getlist("x-forwarded-for")) or headers.get("x-real-ip", "")
        if not forwarded:
            return Client(peer)
        addresses = map(parse_forwarded, reversed(forwarded.split(",")[-FORWARDED_HOPS:]))
        if self.is_trusted(peer):
            named = next((each for each in addresses if not self.is_trusted(each)), peer)
            return Client(named or peer, named is not None)
        # Under `uvicorn --factory lg:create_app`, uvicorn may have put the client in the peer's place.
        if peer not in addresses and self.once("untrusted proxy", math.inf):
            log(logging.WARNING, UNTRUSTED_PROXY, peer=peer)
        return Client(peer)

    def named_by_proxy(self, request: Request, header: str) -> str:
        """A header of a trusted proxy; "" from others."""
        return request.headers.get(header, "") if self.is_trusted(peer_address(request)) else ""

    def scheme(self, request: Request) -> str:
        """`http` or `https`: what a trusted proxy names, else the connection's own."""
        forwarded = self.named_by_proxy(request, "x-forwarded-proto").lower()
        return forwarded if forwarded in ("http", "https") else request.scope["scheme"]

    def prefix(self, request: Request) -> str:
        """The path that a trusted proxy has stripped: `/lg`, or ""."""
        prefix = self.named_by_proxy(request, "x-forwarded-prefix").rstrip("/")
        return prefix if PREFIX.fullmatch(prefix) else ""


class Exchange:
    """One request and its answer, as ASGI and the connection see them."""

    def __init__(self, connection: Connection, header: bytes) -> None:
        """Raises h11.RemoteProtocolError."""
        self.connection, self.http = connection, h11.Connection(h11.SERVER)
        self.http.receive_data(header)
        self.request = cast(h11.Request, self.http.next_event())  # the header is complete
        headers = dict(self.request.headers)
        self.chunked = b"transfer-encoding" in headers
        if self.chunked and b"content-length" in headers:  # proxies differ on which of them counts
            raise h11.RemoteProtocolError("Send Content-Length or Transfer-Encoding, not both")
        self.length = self.to_come = int(headers.get(b"content-length", 0))
        # What the application has not received: bytes of a small body, or the number of a large one's.
        self.body, self.counted = bytearray(), 0
        # Of a body in chunks: bytes and lines that were parsed, and bytes of the body among them.
        self.parsed = self.lines = self.received = 0
        self.complete = not (self.chunked or self.length)  # the body has come
        self.ended = False  # the answer
        self.header = b""  # of the answer, until it is written
        self.gone = False  # the client
        self.receivable = asyncio.Event()  # something that the application has not been told
        if self.complete:
            self.receivable.set()

    # The request

    def feed(self, data: memoryview) -> memoryview:
        """Take what belongs to the body, and return what follows it. Raises h11.RemoteProtocolError."""
        self.receivable.set()
        if self.chunked:
            return memoryview(self.feed_chunks(bytes(data)))
        mine = data[: self.to_come]
        self.to_come -= len(mine)
        self.complete = not self.to_come
        if self.length > BODY_BYTES:  # a large one is counted: no endpoint keeps it
            self.counted += len(mine)
        else:
            self.body += mine
        return data[len(mine) :]

    def feed_chunks(self, data: bytes) -> bytes:
        piece = data[: CHUNKED_BYTES - self.parsed]
        if self.ended or not piece:  # the answer is over, or all that is parsed has come
            return b""
        self.parsed += len(piece)
        self.lines += piece.count(b"\n")
        if self.lines > CHUNKED_LINES:
            raise h11.RemoteProtocolError("too many chunks")
        self.http.receive_data(piece)
        while isinstance(event := self.http.next_event(), h11.Data):
            self.body += event.data
            self.received += len(event.data)
        self.complete = isinstance(event, h11.EndOfMessage)
        if self.parsed == CHUNKED_BYTES and not self.complete and self.received <= BODY_BYTES:
            raise h11.RemoteProtocolError("too much between the chunks")
        return self.http.trailing_data[0] + data[len(piece) :] if self.complete else b""

    def scope(self) -> Scope:
        path, _, query = ABSOLUTE_FORM.sub(b"", self.request.target).partition(b"?")
        path = path or b"/"
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": self.request.http_version.decode(),
            "client": self.connection.client[:2],
            "scheme": "http",
            "method": self.request.method.decode(),
            "path": unquote(path.decode()),
            "raw_path": path,
            "query_string": query,
            "headers": list(self.request.headers),
        }

    async def receive(self) -> Message:
        if not self.gone and self.http.they_are_waiting_for_100_continue and self.to_come == self.length:
            self.write(h11.InformationalResponse(status_code=100, headers=[], reason="Continue"))
        await self.receivable.wait()
        if self.gone or self.ended:
            return {"type": "http.disconnect"}
        counted = ZEROS[: self.counted]
        self.counted -= len(counted)
        body = counted or bytes(self.body)
        self.body.clear()
        if not self.counted:
            self.receivable.clear()
        return {"type": "http.request", "body": body, "more_body": self.counted > 0 or not self.complete}

    # The answer

    async def run(self) -> None:
        """Let the application answer, then tell the connection."""
        try:
            await self.connection.config.loaded_app(self.scope(), self.receive, self.send)
        except TransferAborted:
            if not self.gone:  # its socket may be closed
                self.connection.reset()
        except Exception:
            logger.exception(logfmt(msg="An answer failed", path=self.request.target.decode()))
        if not (self.ended or self.gone):  # else the connection is kept, closed or lingering
            self.connection.transport.close()

    async def send(self, message: Message) -> None:
        if self.gone:
            return
        if message["type"] == "http.response.start":
            headers = [*self.connection.server_state.default_headers, *message["headers"]]
            # While the body is still coming, the connection closes after the answer: see linger.
            headers += [] if self.complete else [CLOSE]
            status = HTTPStatus(message["status"])
            response = h11.Response(status_code=status, headers=headers, reason=status.phrase)
            self.header = self.http.send(response) or b""  # written with the first piece of the body
            log(logging.DEBUG, "request", target=self.request.target.decode(), status=int(status))
            return
        data = h11.Data(data=b"" if self.request.method == b"HEAD" else message.get("body", b""))
        self.connection.transport.write(self.header + (self.http.send(data) or b""))
        self.header = b""
        if message.get("more_body"):
            await self.connection.writable.wait()
        else:  # without waiting: an answer that nobody reads has ended
            self.write(h11.EndOfMessage())
            self.ended = True
            self.receivable.set()
            self.connection.next_request()

    def write(self, event: h11.Event) -> None:
        self.connection.transport.write(self.http.send(event) or b"")


class Connections:
    """The connections of a service, with the bounds of their number, and what they share."""

    def __init__(self, settings: Settings, proxies: Proxies) -> None:
        self.proxies = proxies
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        reserved = RESERVED_FILES + FILES_PER_COMMAND * settings.MAX_DIAGNOSTICS
        self.limit = max(8, min(MAX_CONNECTIONS, files - reserved))
        self.per_client: Counter[str] = Counter()
        self.waiting: dict[Connection, None] = {}  # those without a request being answered, the longest first
        # The receive buffer of all connections: its contents are used before another connection is read.
        # A buffer for each read, allocated and then shrunk by asyncio, would fragment the memory.
        self.buffer = memoryview(bytearray(2**18))

    def add(self, connection: Connection) -> None:
        """Admit a connection or reset it, or reset another that has waited longest in its place."""
        peer = parse_address(connection.client[0]) if connection.client else None  # None: it has left already
        connection.key = rate_limit_key(peer) if peer else ""
        self.per_client[connection.key] += 1
        self.waiting[connection] = None
        too_many = self.per_client[connection.key] > MAX_CONNECTIONS_PER_CLIENT
        if not peer or (too_many and not self.proxies.is_trusted(peer)):
            connection.reset()
        elif len(connection.server_state.connections) > self.limit:
            next(iter(self.waiting)).reset()

    def remove(self, connection: Connection) -> None:
        self.waiting.pop(connection, None)
        self.per_client[connection.key] -= 1
        if not self.per_client[connection.key]:
            del self.per_client[connection.key]


class Connection(asyncio.BufferedProtocol):
    """A client's connection: HTTP/1.1 by h11, with a bound for everything that a client may send.

    uvicorn makes one for each. Reading is never paused, so that a client that leaves is noticed at once.
    """

    def __init__(
        self, config: uvicorn.Config, server_state: ServerState, app_state: dict[str, Any], _loop: object
    ) -> None:
        self.config, self.server_state, self.loop = config, server_state, asyncio.get_running_loop()
        self.connections: Connections = app_state["connections"]
        self.key = ""  # of the client
        self.exchange: Exchange | None = None
        self.unparsed = bytearray()  # the header of the next request, as far as it has come
        self.timer: asyncio.TimerHandle  # closes the connection when it has waited too long
        self.closing = False  # after the current answer; what is read is discarded
        self.writable = asyncio.Event()
        self.writable.set()

    def close_in(self, seconds: float) -> None:
        self.timer.cancel()
        self.timer = self.loop.call_later(seconds, self.transport.close)

    # What asyncio and uvicorn call

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(0)  # so that `writable` means that everything has been written
        self.timer = self.loop.call_later(REQUEST_HEADER_SECONDS, transport.close)
        self.client = transport.get_extra_info("peername")
        self.server_state.connections.add(cast(Any, self))
        self.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.timer.cancel()
        self.server_state.connections.discard(cast(Any, self))
        self.connections.remove(self)
        self.leave()

    def eof_received(self) -> None:
        """Treat a half-closed connection as closed: here, a client that has left looks the same."""
        self.leave()
        if self.exchange and not self.exchange.ended:  # close() would wait until a slow reader has read all
            self.transport.abort()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()
        if self.exchange and self.exchange.ended:
            self.next_request()

    def shutdown(self) -> None:
        """Close after the answer in progress, if there is one."""
        self.closing = True
        if not self.exchange:
            self.transport.close()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.connections.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.feed(self.connections.buffer[:nbytes])

    # The requests, one after another

    def feed(self, data: memoryview) -> None:
        """Take the rest of the current request's body, then the header of the next request."""
        exchange = self.exchange
        try:
            if exchange and not exchange.complete:
                data = exchange.feed(data)
                if exchange.complete:
                    self.connections.waiting.pop(self, None)
                if exchange.complete and exchange.ended:
                    self.next_request()
            if not self.closing:
                self.parse_header(data)
        except h11.RemoteProtocolError:
            self.refuse()

    def parse_header(self, data: memoryview) -> None:
        """Begin the next exchange where its header has come. Raises h11.RemoteProtocolError."""
        first = not self.unparsed
        self.unparsed += data
        if self.exchange:
            if len(self.unparsed) > PIPELINED_BYTES:  # the rest ends in the middle of a request
                self.closing = True
                self.unparsed.clear()
            return
        self.unparsed = self.unparsed.lstrip(b"\r\n")  # empty lines are ignored (RFC 9112, 2.2)
        if not self.unparsed:
            return
        end = HEADER_END.search(self.unparsed)
        length = end.end() if end else len(self.unparsed)
        if length > HEADER_BYTES or self.unparsed.count(b"\n", 0, length) > HEADER_LINES:
            self.refuse(431, f"A header has at most {HEADER_BYTES // 1024} KiB and {HEADER_LINES} lines")
        elif end:
            self.begin(length)
        elif self.unparsed[0] <= 0x20:  # no method: HTTPS, for example
            self.refuse()
        elif first:
            self.close_in(REQUEST_HEADER_SECONDS)

    def begin(self, length: int) -> None:
        header, rest = bytes(self.unparsed[:length]), bytes(self.unparsed[length:])
        self.unparsed.clear()
        self.exchange = exchange = Exchange(self, header)
        self.timer.cancel()
        if exchange.complete or exchange.length > BODY_BYTES:  # else it may still be displaced
            self.connections.waiting.pop(self, None)
        task = self.loop.create_task(exchange.run())
        self.server_state.tasks.add(task)
        task.add_done_callback(self.server_state.tasks.discard)
        if rest:
            self.feed(memoryview(rest))

    def next_request(self) -> None:
        """After an answer that has been written: await the next request, or the rest of a body, or close."""
        assert self.exchange
        self.connections.waiting[self] = None
        if not self.writable.is_set() or self.transport.is_closing():
            return
        if not self.exchange.complete:
            self.linger()
        elif self.closing or self.exchange.http.our_state is not h11.DONE:
            self.transport.close()
        else:
            self.exchange = None
            self.close_in(IDLE_SECONDS)
            if kept := self.unparsed:
                self.unparsed = bytearray()
                self.feed(memoryview(kept))

    def linger(self) -> None:
        """Send no more, and discard what comes for a while: a reset could destroy the last answer."""
        self.closing = True
        self.close_in(LINGER_SECONDS)
        with suppress(OSError):  # the client has reset the connection
            self.transport.write_eof()

    def refuse(self, status: int = 400, message: str = "Invalid HTTP request received.") -> None:
        """Answer what cannot be parsed; also a body that turns out to be malformed in mid-answer."""
        self.leave()
        if self.exchange and self.exchange.http.our_state is not h11.SEND_RESPONSE:
            self.transport.abort()
            return
        self.exchange = None
        body = json.dumps({"detail": message})
        answer = REFUSAL.format(status=HTTPStatus(status), length=len(body), body=body)
        self.transport.write(answer.encode())
        self.linger()

    def leave(self) -> None:
        """Tell the request that is being answered that its client is gone."""
        self.writable.set()
        if self.exchange:
            self.exchange.gone = True
            self.exchange.receivable.set()

    def reset(self) -> None:
        self.connections.waiting.pop(self, None)
        self.leave()
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        self.transport.abort()


async def read_body(request: Request) -> bytes:
    """The body of a small request. Raises RequestError when it is too large or too slow."""
    message = f"The body is larger than {BODY_BYTES} bytes: send the target alone"
    too_large = RequestError(413, {"detail": message})
    if int(request.headers.get("content-length", 0)) > BODY_BYTES:
        raise too_large
    body = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > BODY_BYTES:
                    raise too_large
    except TimeoutError:
        raise RequestError(408, {"detail": f"The body did not come within {BODY_SECONDS} s"}) from None
    return body


class StreamedResponse(Response):
    """An answer whose body is an async generator, and which ends when the client leaves.

    `source` is an async context manager that yields further headers and the body. It is left on every path,
    and what it raises on entering becomes the answer. Starlette's StreamingResponse does not close its
    generator.
    """

    def __init__(self, source: StreamSource, headers: Headers) -> None:
        self.source, self.fixed_headers = source, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with interruptible(quietly=True) as leave:

            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                leave()

            watcher = asyncio.create_task(watch())
            try:
                await self.stream(send)
            finally:
                watcher.cancel()

    async def stream(self, send: Send) -> None:
        async with self.source as (headers, chunks), aclosing(chunks):
            self.init_headers({**self.fixed_headers, **headers})
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": b"", "more_body": True})  # the header goes now
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


# ---- speed tests -------------------------------------------------------------------------------------------

BLOCK = bytes(2**21)  # larger ones are no faster, and delay the answers of others
UPLOAD_BYTES = 2**30
UPLOAD_STALL_SECONDS = 30  # after which an upload that brings nothing has lost its client
UPLOAD_SECONDS = 120  # after which an upload is answered with what has come
# The name of a test in a query, as sent: Starlette would parse the whole query, which takes up to 20 ms.
UPLOAD_TEST = re.compile(rb"(?:^|&)test=([^&]{,64})")
DAY_SECONDS = 86400


class Size(NamedTuple):
    """A download, or an upload: its name, its bytes, its rates, and the test that it belongs to."""

    name: str
    length: int
    rates: Rates
    test: bytes = b""  # the name that the client gave it


def make_sizes(settings: Settings) -> dict[str, Size]:
    """The downloads that are offered, by name."""
    sizes = [Size("100M", 100 * 2**20, settings.RATE_LIMIT_SPEEDTEST)]
    sizes += [Size("1G", 2**30, settings.RATE_LIMIT_SPEEDTEST)]
    sizes += [Size("10G", 10 * 2**30, settings.RATE_LIMIT_SPEEDTEST_10G)]
    return {size.name: size for size in sizes if settings.MAX_SPEEDTESTS}


CountBytes = Callable[[int], None]


class Budget:
    """What all speed tests together may move on a day (UTC), in bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit  # 0 is none
        self.day, self.used = 0, 0

    def used_today(self) -> int:
        if (day := int(time.time() // DAY_SECONDS)) != self.day:
            self.day, self.used = day, 0
        return self.used

    def check(self, length: int, reserved: int) -> None:
        """Raises RequestError where `length` does not fit beside what running transfers may still move."""
        used = self.used_today()
        if not self.limit or used + reserved + length <= self.limit:
            return
        if used + length <= self.limit:  # a transfer that runs may give back enough
            raise busy("The speed tests that run may use up today's budget: try again soon", "budget")
        midnight = {"Retry-After": str(math.ceil(DAY_SECONDS - time.time() % DAY_SECONDS))}
        message = "Today's budget of speed tests is used up: it begins anew at midnight UTC"
        if length > self.limit:
            message = "This is more than this server's budget of speed tests for a day: choose a smaller one"
        raise busy(message, "budget", midnight)


class Upload(TypedDict):
    """What an upload has brought; `mbps` is null if `seconds` is 0."""

    bytes: int
    seconds: float
    mbps: float | None


def measured(length: int, seconds: float) -> Upload:
    mbps = round(length * 8 / 1e6 / seconds, 3) if seconds else None
    return {"bytes": length, "seconds": round(seconds, 6), "mbps": mbps}


class SpeedTests:
    """The downloads and uploads of a service."""

    def __init__(self, settings: Settings, limits: Limits) -> None:
        self.limits = limits
        # Only one download writes a block in each iteration of the event loop. Otherwise a line of a command,
        # which takes three iterations to its client, would wait for three blocks of every download.
        self.turn = asyncio.Lock()
        self.budget = Budget(settings.SPEEDTEST_GIB_PER_DAY * 2**30)
        for direction in ("download", "upload"):
            limits.counters.set("lg_speedtest_bytes_total", 0, direction=direction)

    @asynccontextmanager
    async def transfer(self, size: Size, client: Client) -> AsyncIterator[tuple[Headers, CountBytes]]:
        """Hold a slot, and log what was moved: yields the rate limit's headers, and counts bytes.

        Raises RequestError, or TransferAborted where it has given way.
        """
        slots, direction = self.limits.speedtests, "upload" if size.name == "upload" else "download"
        async with interruptible() as give_way:
            with slots.take(client.key, give_way) as slot:
                self.budget.check(size.length, sum(each.length - each.moved for each in slots.taken))
                slot.length, slot.test = size.length, size.test
                name = f"speedtest {size.name}"
                headers = await self.limits.rates.check(size.rates, name, client, consume=True)
                begun, outcome = time.monotonic(), "broken off"

                def count(moved: int) -> None:
                    slot.moved += moved
                    self.budget.used = self.budget.used_today() + moved
                    self.limits.counters.add("lg_speedtest_bytes_total", moved, direction=direction)

                try:
                    yield headers, count
                    outcome = "finished"
                finally:
                    outcome = outcome if slot in slots.taken else "gave way"
                    pairs = {"size": size.name, "client": client, "outcome": outcome, "bytes": slot.moved}
                    log(logging.INFO, "speedtest", **pairs, seconds=f"{time.monotonic() - begun:.1f}")

    @asynccontextmanager
    async def download(self, size: Size, client: Client) -> AsyncIterator[Stream]:
        """The headers of the rate limit, and `size.length` zero bytes in blocks. Raises RequestError."""

        async def blocks() -> AsyncGenerator[bytes]:
            rest = size.length
            while block := BLOCK[:rest]:
                async with self.turn:
                    await asyncio.sleep(0)
                yield block
                rest -= len(block)
                count(len(block))

        async with self.transfer(size, client) as (headers, count):
            yield headers, blocks()

    def upload_so_far(self, test: bytes) -> Upload:
        """What the running uploads of a test have brought; zeros where none runs, or `test` is empty.

        The page asks for this because a browser counts the bytes that it has handed to the system, not those
        that have arrived.
        """
        now = time.monotonic()
        uploads = [slot for slot in self.limits.speedtests.taken if test and slot.test == test]
        begun = min((slot.begun for slot in uploads), default=now)
        return measured(sum(slot.moved for slot in uploads), now - begun)

    async def receive_upload(self, request: Request, size: Size, client: Client) -> tuple[Upload, Headers]:
        """Receive and discard an upload. Returns its measurement and the headers of the rate limit.

        After UPLOAD_SECONDS it is measured by what has come by then. Raises RequestError, ClientDisconnect,
        or TransferAborted where it has given way.
        """
        loop = asyncio.get_running_loop()
        begun = first = last = loop.time()
        received = 0
        async with self.transfer(size, client) as (headers, count), aclosing(request.stream()) as chunks:
            try:
                async with asyncio.timeout(UPLOAD_STALL_SECONDS) as deadline:
                    async for chunk in chunks:
                        last = loop.time()
                        first = first if received else last
                        received += len(chunk)
                        count(len(chunk))
                        deadline.reschedule(min(last + UPLOAD_STALL_SECONDS, begun + UPLOAD_SECONDS))
            except TimeoutError:
                if loop.time() < begun + UPLOAD_SECONDS:
                    message = f"No byte came for {UPLOAD_STALL_SECONDS} s"
                    raise RequestError(408, {"detail": message}, headers) from None
        return measured(received, last - first), headers


# ---- endpoints ---------------------------------------------------------------------------------------------

TEXT_TYPE, EVENTS_TYPE = "text/plain; charset=utf-8", "application/x-ndjson"
JSON_TYPE, HTML_TYPE = "application/json", "text/html; charset=utf-8"
# A cache in front must not hand one client's answer to another.
NO_STORE = {"Cache-Control": "no-store"}
NO_TRANSFORM = {"Cache-Control": "no-store, no-transform"}
NO_SNIFF = {"X-Content-Type-Options": "nosniff"}
STREAM_HEADERS = {**NO_TRANSFORM, **NO_SNIFF, "X-Accel-Buffering": "no", "Vary": "Accept"}
PAGE_HEADERS = {**NO_SNIFF, "Cache-Control": "no-cache", "Referrer-Policy": "no-referrer"}
PAGE_HEADERS |= {"Vary": "Accept, Accept-Encoding"}
HOST = re.compile(r"[a-z0-9._-]+(:\d+)?|\[[0-9a-f:.]+\](:\d+)?", re.ASCII | re.IGNORECASE)
ACCEPTS_GZIP = re.compile(r"(?i)\bgzip\b(?!\s*;\s*q=0(?:\.0*)?\s*(?:,|$))")
# Name, type and help, as in Prometheus' text format.
METRICS = """
    lg_info gauge Version and place of this server; the value is always 1.
    lg_tool_up gauge Whether a tool is installed and works on loopback: 1 or 0.
    lg_runs_total counter Commands that have ended, by outcome as in the log.
    lg_run_seconds_total counter Seconds that these commands took.
    lg_last_run_ok gauge Whether the last run of a command finished without a fault: 1 or 0.
    lg_refusals_total counter Requests refused.
    lg_speedtest_bytes_total counter Bytes of speed tests.
    lg_speedtest_budget_bytes gauge Bytes that speed tests may move on a day (UTC), if bounded.
    lg_speedtest_budget_used_bytes gauge Bytes that speed tests have moved today (UTC).
    lg_slots gauge Commands and speed tests that may run at once.
    lg_slots_taken gauge Commands and speed tests that run now.
    lg_connections gauge Open connections.
"""
USAGE = """\
Looking glass: {location}, {facility}

{diagnostics}{about} information and API:

{speedtests}    curl {base}/network/info
    curl {base}/health
    curl {base}/openapi.json

In a browser: {base}/ has the page, {base}/docs the API.
Rate limits for each client: {limits}.
"""
DIAGNOSTICS_USAGE = """\
Measure the network from here, with a host name or an address as the target:

{commands}
The same for programs, one JSON object per line:

    curl -N -H "Accept: application/x-ndjson" -d target=example.com {base}/lookingglass/{command}

"""
SPEEDTESTS_USAGE = """\
    curl -o /dev/null {base}/speedtest/100M
    head -c 100M /dev/zero | curl --data-binary @- {base}/speedtest/upload
"""


def json_response(content: object, status: int = 200, headers: Headers | None = None) -> Response:
    return JSONResponse(content, status, {**NO_STORE, **(headers or {})})


def entity_tag(body: bytes) -> str:
    return f'"{sha256(body).hexdigest()[:32]}"'


class Place(TypedDict):
    """Where this server is."""

    location: str
    map_url: str
    facility: str
    facility_url: str
    looking_glass_ipv4: str
    looking_glass_ipv6: str


class NetworkInfo(Place):
    """Where this server is, and who asks."""

    your_ip: str


def make_place(settings: Settings) -> Place:
    return {
        "location": settings.NETWORK_LOCATION,
        "map_url": settings.NETWORK_MAP_URL,
        "facility": settings.NETWORK_FACILITY,
        "facility_url": settings.NETWORK_FACILITY_URL,
        "looking_glass_ipv4": settings.NETWORK_IPV4,
        "looking_glass_ipv6": settings.NETWORK_IPV6,
    }


class Health(TypedDict):
    """Whether the tools work. `forbidden`: no permission to send; `failing`: failed on loopback."""

    status: Literal["ok", "degraded"]
    missing: NotRequired[list[str]]
    forbidden: NotRequired[list[str]]
    failing: NotRequired[list[str]]


class Service:
    """A looking glass: its parts, and what its routes answer."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError."""
        self.settings, self.place, self.stopping = settings, make_place(settings), asyncio.Event()
        self.commands, self.sizes = make_commands(settings), make_sizes(settings)
        if not self.commands and not self.sizes:
            raise SettingsError("expected a command or speed tests to offer", COMMANDS="", MAX_SPEEDTESTS=0)
        threads = Threads(self.stopping)
        self.limits = Limits(settings, threads)
        self.tools = Tools(self.commands, settings)
        self.targets = Targets(settings, threads)
        self.runner = Runner(settings, self.limits, self.targets, self.tools)
        self.proxies = Proxies(settings, self.limits.once)
        self.connections = Connections(settings, self.proxies)
        self.speedtests = SpeedTests(settings, self.limits)
        self.rates_text = rate_limits_text(settings, self.commands, self.sizes)
        page, policy = make_page(settings, self.commands, self.sizes)
        headers = {**PAGE_HEADERS, "Content-Security-Policy": policy}
        plain, compressed = page.encode(), gzip.compress(page.encode(), mtime=0)
        self.page = {  # by Content-Encoding, with its headers
            "": (plain, {**headers, "ETag": entity_tag(plain)}),
            "gzip": (compressed, {**headers, "ETag": entity_tag(compressed), "Content-Encoding": "gzip"}),
        }
        for name in self.commands:
            self.limits.counters.set("lg_runs_total", 0, command=name, outcome="finished")

    @cached_property
    def description(self) -> str:
        """The description of the API as JSON, made on the first request for it."""
        description = describe_api(self.settings, self.commands, self.sizes)
        return json.dumps(description, separators=(",", ":"))

    def log_warnings(self) -> None:
        """Log what an operator should change."""
        settings, warn = self.settings, partial(log, logging.WARNING)
        if missing := self.tools.missing():
            message = "Tools are missing: their commands answer 503 until they are installed"
            warn(message, missing=" ".join(missing), install=install_hint(missing))
        if hidden := settings.EXTRA_COMMANDS.keys() - {each.base_name for each in self.commands.values()}:
            message = "Extra commands are not offered: COMMANDS does not name them"
            warn(message, commands=" ".join(sorted(hidden)))
        if settings.CORS_CREDENTIALS and "*" in settings.CORS_ORIGINS:
            warn("CORS_CREDENTIALS has no effect while CORS_ORIGINS is *: list the origins instead")
        if self.connections.limit < MAX_CONNECTIONS:
            message = "The limit for open files (ulimit -n) allows few connections"
            warn(message, connections=self.connections.limit, wanted=MAX_CONNECTIONS)
        limit = self.speedtests.budget.limit
        if limit and (large := [size.name for size in self.sizes.values() if size.length > limit]):
            message = "SPEEDTEST_GIB_PER_DAY is smaller than downloads that are offered: they answer 503"
            warn(message, downloads=" ".join(large))

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[dict[str, object]]:
        """Log the limits and what needs the operator's attention; try the tools while the service runs."""
        slots = {"commands": self.limits.commands} if self.commands else {}
        slots |= {"speedtests": self.limits.speedtests} if self.sizes else {}
        log(logging.INFO, "limits", rates=self.rates_text, **slots)
        self.log_warnings()
        # The shared store is queried, so that its failure is logged at the start.
        rates, nobody = (limits.parse("1/minute"),), Client(ipaddress.IPv4Address(0))
        jobs = self.runner.keep_trying_tools(), self.limits.rates.check(rates, "start", nobody)
        background = asyncio.gather(*jobs, return_exceptions=True)
        yield {"connections": self.connections}
        background.cancel()
        with suppress(asyncio.CancelledError):
            await background

    def stop(self) -> None:
        """Start nothing any more, and stop the commands that run."""
        self.stopping.set()
        self.runner.stop()

    # Measurements

    async def run_command(self, command: Command, request: Request) -> Response:
        target = parse_target(parse_body(await read_body(request)))
        check_version(target, command)
        as_events = EVENTS_TYPE in request.headers.get("accept", "").lower()
        headers = STREAM_HEADERS | {"Content-Type": EVENTS_TYPE if as_events else TEXT_TYPE}
        if as_events:  # after an abort, browsers may read on for 5 s to reuse the connection
            headers["Connection"] = "close"
        client = self.proxies.client(request)
        steps = self.runner.measure(command, target, client, as_events)
        return StreamedResponse(self.runner.unread.run_ahead(steps), headers)

    async def download(self, size: Size, request: Request) -> Response:
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(size.length),
            "Content-Disposition": f"attachment; filename=speedtest_{size.name}.bin",
            **NO_TRANSFORM,
            "Timing-Allow-Origin": "*",
        }
        if request.method == "HEAD":
            return Response(headers=headers)
        return StreamedResponse(self.speedtests.download(size, self.proxies.client(request)), headers)

    async def upload(self, request: Request) -> Response:
        headers = {"Timing-Allow-Origin": "*"}
        named = UPLOAD_TEST.search(request.scope["query_string"])
        test = named[1] if named else b""
        if request.method != "POST":
            return json_response(self.speedtests.upload_so_far(test), headers=headers)
        length = int(request.headers.get("content-length", -1))  # the parser has checked its form
        if length < 0:
            raise RequestError(411, {"detail": "Send Content-Length: an upload without it is not accepted"})
        if length > UPLOAD_BYTES:
            raise RequestError(413, {"detail": f"An upload has at most {UPLOAD_BYTES} bytes"})
        client = self.proxies.client(request)
        size = Size("upload", length, self.settings.RATE_LIMIT_SPEEDTEST, test)
        try:
            answer, rate_headers = await self.speedtests.receive_upload(request, size, client)
        except TransferAborted:
            raise busy("This upload was stopped to make room for another client: try again soon") from None
        return json_response(answer, headers={**headers, **rate_headers})

    # About this server

    async def health(self, request: Request) -> Response:
        faults = self.tools.faults()
        return json_response({"status": "degraded", **faults} if faults else {"status": "ok"})

    async def network_info(self, request: Request) -> Response:
        info: NetworkInfo = {**self.place, "your_ip": str(self.proxies.client(request))}
        return json_response(info)

    async def metrics(self, request: Request) -> Response:
        if not self.proxies.client(request).is_in(self.settings.METRICS_ALLOW_IPS):
            raise HTTPException(404)
        counters, budget = self.limits.counters, self.speedtests.budget
        place = {"location": self.settings.NETWORK_LOCATION, "facility": self.settings.NETWORK_FACILITY}
        counters.set("lg_info", 1, version=VERSION, **place)
        faulty = {tool for tools in self.tools.faults().values() for tool in tools}
        for tool in self.tools.names:
            counters.set("lg_tool_up", tool not in faulty, tool=tool)
        if budget.limit:
            counters.set("lg_speedtest_budget_bytes", budget.limit)
            counters.set("lg_speedtest_budget_used_bytes", budget.used_today())
        for kind, slots in (("command", self.limits.commands), ("speedtest", self.limits.speedtests)):
            counters.set("lg_slots", slots.total, kind=kind)
            counters.set("lg_slots_taken", len(slots.taken), kind=kind)
        counters.set("lg_connections", self.connections.per_client.total())
        lines = []
        for name, kind, description in (row.split(maxsplit=2) for row in METRICS.strip().split("\n")):
            lines += [f"# HELP {name} {description}", f"# TYPE {name} {kind}", *counters.samples(name)]
        return PlainTextResponse("\n".join([*lines, ""]), 200, NO_STORE, "text/plain; version=0.0.4")

    async def front(self, request: Request) -> Response:
        """The page for browsers, the usage for others."""
        if "text/html" not in request.headers.get("accept", "").lower():
            return self.usage(request)
        encoding = "gzip" if ACCEPTS_GZIP.search(request.headers.get("accept-encoding", "")) else ""
        body, headers = self.page[encoding]
        tags = request.headers.get("if-none-match", "")
        if headers["ETag"] in tags or tags.strip() == "*":  # no other tag can contain one with its quotes
            return Response(status_code=304, headers=headers)
        return HTMLResponse(body, headers=headers)

    def base_url(self, request: Request) -> str:
        """The address of this server as the client wrote it, if people may paste that into a shell."""
        host = request.headers.get("host", "")
        if not HOST.fullmatch(host):
            host = f"localhost:{self.settings.PORT}"
        return f"{self.proxies.scheme(request)}://{host}{self.proxies.prefix(request)}"

    def usage(self, request: Request) -> Response:
        base, names = self.base_url(request), list(self.commands)
        line = f"    curl -N -d target=example.com {base}/lookingglass/"
        commands = "".join(f"{line}{name}\n" for name in names)
        example = "mtr" if "mtr" in names else names[0] if names else ""
        text = USAGE.format(
            base=base,
            location=self.settings.NETWORK_LOCATION,
            facility=self.settings.NETWORK_FACILITY,
            diagnostics=DIAGNOSTICS_USAGE.format(base=base, commands=commands, command=example) * bool(names),
            about="Speed tests, server" if self.sizes else "Server",
            speedtests=SPEEDTESTS_USAGE.format(base=base) * bool(self.sizes),
            limits=self.rates_text,
        )
        return PlainTextResponse(text, headers={**NO_STORE, "Vary": "Accept"})

    async def openapi(self, request: Request) -> Response:
        text = self.description
        if prefix := self.proxies.prefix(request):
            text = text.replace(SERVERS.format("/"), SERVERS.format(prefix))
        return Response(text, headers=NO_STORE, media_type=JSON_TYPE)

    # Errors

    async def answer_refused(self, request: Request, error: RequestError) -> Response:
        client = self.proxies.client(request)
        self.limits.count_refusal(client, request.scope["path"], error.reason)
        return json_response(error.body, error.status, error.headers)

    async def answer_failed(self, request: Request, error: Exception) -> Response:
        return json_response({"detail": "Internal Server Error"}, 500)  # the connection logs the traceback

    async def answer_unrouted(self, request: Request, error: HTTPException) -> Response:
        """The router's 404 and 405; redirects a path with a slash at its end to the one without."""
        path, query = request.scope["path"].removesuffix("/"), request.scope["query_string"].decode()
        paths = {route.path for route in request.app.routes}
        if error.status_code == 404 and path != request.scope["path"] and path in paths:
            location = f"../{path.rpartition('/')[2]}" + (f"?{query}" if query else "")
            return Response(status_code=307, headers={**NO_STORE, "Location": location})
        return json_response({"detail": error.detail}, error.status_code, error.headers)


# ---- OpenAPI -----------------------------------------------------------------------------------------------

Schema = dict[str, Any]


class TargetRequest(TypedDict):
    """What to measure. The same as a form (`target=…`) is accepted too."""

    target: str


class Target6Request(TargetRequest):
    """The same for a command over IPv6."""


class Problem(TypedDict):
    """Why a target is not measured; `msg` tells a person what to do."""

    type: str
    loc: list[str]
    msg: str
    input: object


class ValidationError(TypedDict):
    """The target is missing, invalid or not allowed."""

    detail: list[Problem]


class Detail(TypedDict):
    """Why a request is refused."""

    detail: str


class Busy(TypedDict):
    """Why a request is refused for now."""

    error: str


SCHEMAS: list[Any] = [*typing.get_args(Event), *typing.get_args(Result), Upload, NetworkInfo, Health]
SCHEMAS += [TargetRequest, Target6Request, Problem, ValidationError, Detail, Busy]
OBJECT = {"type": "object", "additionalProperties": False}
SCALARS = {str: "string", int: "integer", float: "number", type(None): "null"}
EXAMPLES = json.loads("""[
  {"event": "start", "command": "mtr", "target": "target.lg.example", "address": "198.51.100.254",
   "family": 4, "time": "2026-11-22T19:58:41Z"},
  {"event": "reply", "seq": 1, "ttl": 60, "rtt": 28.4},
  {"event": "lost", "seq": 2},
  {"event": "hop", "hop": 2, "address": "198.51.100.6", "hostname": "core1.ams.lg.example", "asn": [64500],
   "network": "Example", "timings": [{"rtt": 5.7}], "probes": [{"rtt": 5.7}, {"rtt": null}, {"rtt": null}]},
  {"event": "hop", "hop": 2, "address": "198.51.100.6", "hostname": "core1.ams.lg.example", "asn": [64500],
   "network": "Example", "stats": {"min": 5.962, "avg": 6.577, "max": 7.193, "stDev": 0.87, "jMin": 1.231,
   "jAvg": 1.231, "jMax": 1.231, "total": 2, "rcv": 2, "drop": 0, "loss": 0}},
  {"event": "path", "hops": 4},
  {"event": "note", "text": "From 198.51.100.6 icmp_seq=3 Destination Net Unreachable"},
  {"event": "end", "status": "failed", "error": "traceroute: stopped after 60 s", "exit_status": null,
   "duration": 60, "result": {"status": "failed", "resolvedAddress": "198.51.100.66",
   "resolvedHostname": null, "hops": [], "rawOutput": ""}}
]""")
TYPES = {cls.__name__: {JSON_TYPE: cls} for cls in SCHEMAS} | {
    "json": {JSON_TYPE: object},
    "html": {HTML_TYPE: str},
    "front": {TEXT_TYPE: str, HTML_TYPE: str},
    "stream": {TEXT_TYPE: str, EVENTS_TYPE: Event},
    "bytes": {"application/octet-stream": object},
}
# Method, path, operationId, tag, request's body, what is answered, statuses of errors; then the summary.
OPERATIONS = """
    post /lookingglass/{name} {name} LookingGlass - stream 408,413,422,429,503 {0.tool} over IPv{0.version}
    get  /speedtest/{name} speedtest_{name} SpeedTest - bytes 429,503 {0.length} zero bytes
    head /speedtest/{name} speedtest_{name}_headers SpeedTest - bytes - {0.length} zero bytes: headers alone
    post /speedtest/upload upload SpeedTest bytes Upload 408,411,413,429,503 Measures and discards the body
    get  /speedtest/upload upload_so_far SpeedTest - Upload - What the uploads of a test have brought so far
    get  /network/info network_info Network - NetworkInfo - Where this is, and who you are
    get  /health health Network - Health - Whether the tools work
    get  / front Network - front - How to use it; for browsers, the page
    get  /openapi.json openapi Network - json - This description
    get  /docs docs Network - html - This description in Swagger UI
    get  /redoc redoc Network - html - This description in ReDoc
"""
# Status, the body's type, headers; then when.
ERRORS = """
    408 Detail - The body did not come in time, or an upload stalled.
    411 Detail - An upload without Content-Length.
    413 Detail - The body is too large.
    422 ValidationError - The target is missing, invalid or not allowed.
    429 Busy Retry-After,{limits} Over the rate limit, or all slots of the client are in use.
    503 Busy Retry-After No free slot or budget, or a tool that is not installed or may not run.
"""
SERVERS = '"servers":[{{"url":"{}"}}]'  # as it stands in the description's JSON
HEADER_MEANINGS = {"Retry-After": "Seconds to wait before the next try."} | RATE_HEADERS


def schema_of(hint: Any, inside: bool = True) -> Schema:
    """The JSON schema of a type hint; a named type is a reference where it stands inside another."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if inside and hint in SCHEMAS:
        return {"$ref": f"#/components/schemas/{hint.__name__}"}
    if typing.is_typeddict(hint):
        hints = typing.get_type_hints(hint, include_extras=True)
        required = [name for name, each in hints.items() if typing.get_origin(each) is not NotRequired]
        properties = {name: schema_of(each) for name, each in hints.items()}
        text = {"description": cleandoc(hint.__doc__)} if hint.__doc__ else {}
        return OBJECT | {"properties": properties, "required": required} | text
    if origin is NotRequired:
        return schema_of(arguments[0])
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is list:
        return {"type": "array", "items": schema_of(arguments[0])}
    if not arguments:
        return {"type": SCALARS[hint]} if hint in SCALARS else {}
    if SCALARS.keys() >= set(arguments):
        return {"type": [SCALARS[each] for each in arguments]}
    return {"anyOf": [schema_of(each) for each in arguments]}


def content(kind: str) -> Schema:
    """The schemas of a body by media type."""
    return {media_type: {"schema": schema_of(hint)} for media_type, hint in TYPES[kind].items()}


def response(when: str, kind: str, headers: Iterable[str] = ()) -> Schema:
    """A response: when it comes, its bodies' schemas by media type, its headers by name."""
    meanings = {name: HEADER_MEANINGS[name] for name in headers if name in HEADER_MEANINGS}
    integer_schema = {"schema": {"type": "integer"}}
    described = {name: {"description": text, **integer_schema} for name, text in meanings.items()}
    return {"description": when, "content": content(kind)} | ({"headers": described} if described else {})


def describe_errors() -> dict[str, Schema]:
    """The responses of the table, by status."""
    rows = ERRORS.format(limits=",".join(RATE_HEADERS)).strip().split("\n")
    errors = (row.split(maxsplit=3) for row in rows)
    return {status: response(when, kind, headers.split(",")) for status, kind, headers, when in errors}


def operations(offers: Mapping[str, Mapping[str, object]]) -> dict[str, dict[str, Schema]]:
    """The operations of the table by path and method: each once, or for each that is offered at its path."""
    errors, paths = describe_errors(), defaultdict[str, dict[str, Schema]](dict)
    for row in OPERATIONS.strip().split("\n"):
        for key, offer in offers.get(row.split()[1], {"": None}).items():
            columns = row.format(offer, name=key).split(maxsplit=7)
            method, path, name, tag, body, kind, statuses, summary = columns
            responses = {"200": response(summary, kind, RATE_HEADERS if "429" in statuses else ())}
            responses |= {status: errors[status] for status in statuses.split(",") if status in errors}
            operation = {"operationId": name, "tags": [tag], "summary": summary, "responses": responses}
            operation |= {"requestBody": {"content": content(body)}} if body in TYPES else {}
            paths[path][method] = operation
    return paths


def rate_limits_text(settings: Settings, commands: Iterable[str], sizes: Iterable[str]) -> str:
    parts = [f"{describe_rates(settings.RATE_LIMIT_DIAGNOSTICS)} for each command"] if commands else []
    if sizes:
        parts.append(f"{describe_rates(settings.RATE_LIMIT_SPEEDTEST)} for each speed test")
        parts.append(f"{describe_rates(settings.RATE_LIMIT_SPEEDTEST_10G)} for the 10G download")
    return ", ".join(parts)


def describe_api(settings: Settings, commands: Mapping[str, Command], sizes: Mapping[str, Size]) -> Schema:
    """The description of this API in OpenAPI 3.1, made from the tables and types that it runs on."""
    targets = {4: TargetRequest.__name__, 6: Target6Request.__name__}
    offers = {"/lookingglass/{name}": commands, "/speedtest/{name}": sizes}
    paths = operations({**offers, "/speedtest/upload": {"": None} if sizes else {}})
    examples = zip(typing.get_args(Event), EXAMPLES, strict=True)
    events = {cls.__name__: {"summary": cls.__doc__, "value": event} for cls, event in examples}
    limit = describe_rates(settings.RATE_LIMIT_DIAGNOSTICS)
    for name, command in commands.items():
        post, argv = paths[f"/lookingglass/{name}"]["post"], " ".join(command.argv_for("ADDRESS"))
        post["description"] = f"Runs `{argv}`, at most {settings.DIAGNOSTIC_TIMEOUT} s. Limit: {limit}."
        post["responses"]["200"]["content"][EVENTS_TYPE]["examples"] = events
        post["requestBody"] = {"required": True, "content": content(targets[command.version])}
    for upload in paths.get("/speedtest/upload", {}).values():
        upload["parameters"] = [{"name": "test", "in": "query", "schema": {"type": "string"}}]
    schemas = {cls.__name__: schema_of(cls, inside=False) for cls in SCHEMAS}
    for version, name in targets.items():
        forms = [{"format": f"ipv{version}"}, {"pattern": f"^(?:{HOST_NAME.pattern})$"}]
        target = {"type": "string", "anyOf": forms, "examples": ["example.com"]}
        schemas[name] |= {"properties": {"target": target}, "additionalProperties": True}
    names = list(dict.fromkeys(each.base_name for each in commands.values()))
    names += ["speed tests"] if sizes else []
    description = f"{', '.join(names)}, from {settings.NETWORK_LOCATION}. "
    description += f"Limits for each client: {rate_limits_text(settings, commands, sizes)}."
    info = {"title": "Looking glass", "version": VERSION, "description": description}
    return {
        "openapi": "3.1.0",
        "info": {**info, "license": {"name": "MIT", "identifier": "MIT"}},
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {"schemas": schemas},
    }


API_DOCS_FILES = {  # of each viewer, from a CDN
    "docs": """\
<link rel="stylesheet" href="https://cdn.jsdelivr.net/npm/swagger-ui-dist@5.35.0/swagger-ui.css"
 integrity="sha384-WlYgdmXYOOBWL5apwjDEZwN+U3HmXSSu5R6V5aGxEcf7z+KuRNwBhoxKVN1i3D5I" crossorigin>
<script defer src="https://cdn.jsdelivr.net/npm/swagger-ui-dist@5.35.0/swagger-ui-bundle.js"
 integrity="sha384-gjRm0bEPMeTmMh5jT2cHccIwCUZSTd8YC+j0d0sXw0MdGEfScduGpSyF3ZSSLkX9" crossorigin></script>
""",
    "redoc": """\
<script defer src="https://cdn.jsdelivr.net/npm/redoc@2.5.4/bundles/redoc.standalone.js"
 integrity="sha384-w447zOpYfw/1Tv/5AK9NfHTlQIqE3RVR6KY62jCyy9zNDgO64cMwGGP1Fj0zJVf5" crossorigin></script>
""",
}
API_DOCS = {  # what their pages run
    "docs": "SwaggerUIBundle({ url: 'openapi.json', dom_id: '#viewer' })",
    "redoc": "Redoc.init('openapi.json', {}, document.getElementById('viewer'))",
}


def script_hash(script: str) -> str:
    """The source expression for an inline script or style in a content security policy."""
    return f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'"


async def api_docs(name: str, request: Request) -> Response:
    """A page that shows the description with files from a CDN; its policy allows no other sources."""
    run = f"addEventListener('DOMContentLoaded', () => {API_DOCS[name]});"
    sources = " ".join(re.findall('"(https:.*?)"', API_DOCS_FILES[name]))
    policy = f"default-src 'none'; script-src {script_hash(run)} {sources}; "
    policy += f"style-src 'unsafe-inline' {sources}; "
    policy += "img-src 'self' data:; connect-src 'self'; worker-src blob:; base-uri 'none'; "
    policy += "form-action 'none'; frame-ancestors 'none'"
    html = f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Looking glass: the API</title>
{API_DOCS_FILES[name]}<script>{run}</script>
<div id="viewer">
<p>The description of this API is <a href="openapi.json">openapi.json</a>. The viewer for it is loaded from
cdn.jsdelivr.net, and has not been loaded: it needs JavaScript, and access to that host.</p>
</div>
</html>
"""
    return HTMLResponse(html, headers={"Content-Security-Policy": policy})


# ---- routes and app ----------------------------------------------------------------------------------------


def make_routes(service: Service) -> list[Route]:
    """The Route table; what is not offered has no route."""
    commands, sizes = service.commands.items(), service.sizes.items()
    return [
        Route("/", service.front),
        Route("/health", service.health),
        Route("/network/info", service.network_info),
        # /lookingglass/ping, /lookingglass/ping6, /lookingglass/traceroute, /lookingglass/traceroute6,
        # /lookingglass/mtr, /lookingglass/mtr6, and those of EXTRA_COMMANDS
        *(
            Route(f"/lookingglass/{name}", partial(service.run_command, each), methods=["POST"])
            for name, each in commands
        ),
        # /speedtest/100M, /speedtest/1G, /speedtest/10G
        *(Route(f"/speedtest/{name}", partial(service.download, size)) for name, size in sizes),
        *([Route("/speedtest/upload", service.upload, methods=["GET", "POST"])] if sizes else []),
        Route("/metrics", service.metrics),
        Route("/openapi.json", service.openapi),
        Route("/docs", partial(api_docs, "docs")),
        Route("/redoc", partial(api_docs, "redoc")),
    ]


def create_app(settings: Settings | None = None) -> Starlette:
    """The application, with these settings or those of `.env` and the environment. Raises SettingsError."""
    settings = settings or load_settings()
    service = Service(settings)
    cors = Middleware(
        CORSMiddleware,
        allow_origins=settings.CORS_ORIGINS,
        allow_methods=settings.CORS_METHODS,
        allow_headers=settings.CORS_HEADERS,
        allow_credentials=settings.CORS_CREDENTIALS and "*" not in settings.CORS_ORIGINS,
        allow_private_network=True,
        expose_headers=["Retry-After", *RATE_HEADERS],
    )
    handlers: dict[Any, Any] = {
        RequestError: service.answer_refused,
        HTTPException: service.answer_unrouted,
        ClientDisconnect: service.answer_failed,  # nobody reads it
        Exception: service.answer_failed,
    }
    app = Starlette(False, make_routes(service), [cors], handlers, lifespan=service.lifespan)
    app.router.redirect_slashes = False  # the client's Host would be in Location: see answer_unrouted
    app.state.service = service
    return app


# ---- serving -----------------------------------------------------------------------------------------------

LOG_LINES = 1000  # length of the queue
LOG_SECONDS = 1  # time to write it at the end
ACCEPTED_AT_ONCE = 16  # asyncio accepts a burst before any is counted: it must fit into RESERVED_FILES
BACKLOG = 2048  # what the kernel keeps of a burst


class Server(uvicorn.Server):
    """uvicorn's server, which stops the commands before it waits for requests to end."""

    def __init__(self, config: uvicorn.Config, service: Service, sockets: list[socket.socket]) -> None:
        super().__init__(config)
        self.service, self.sockets = service, sockets

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(self.sockets)
        for each in self.sockets:
            each.listen(BACKLOG)
        notify_systemd()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ignore further signals: the shutdown takes a few seconds at most."""
        if not self.should_exit:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop the commands first: uvicorn would cancel their requests before these have ended cleanly."""
        log(logging.INFO, "stopping")
        self.service.stop()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=2 * GRACE_SECONDS)
        asyncio.get_running_loop().call_later(GRACE_SECONDS, self.drop)
        await super().shutdown(self.sockets)
        for handler in logging.getLogger().handlers:
            handler.flush()  # uvicorn then raises the signal again, which ends the process without cleanup

    def drop(self) -> None:
        """Abort what is still open: downloads, unread answers, incomplete requests."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def notify_systemd() -> None:
    """Tell systemd that a unit with Type=notify has started (sd_notify(3))."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, suppress(OSError):
            notify.sendto(b"READY=1", re.sub("^@", "\0", address))  # an abstract name


def make_server(settings: Settings, sockets: list[socket.socket]) -> Server:
    """A server on listening sockets; its `run` serves. It touches no signal, limit or log of the process.

    Raises SettingsError.
    """
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        http=cast(Any, Connection),
        loop="asyncio",
        ws="none",
        workers=1,
        log_config=None,
        proxy_headers=False,  # Proxies does that
        server_header=False,
        backlog=ACCEPTED_AT_ONCE,
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    return Server(config, app.state.service, sockets)


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets for the addresses of `host`, or where it is empty for all, IPv4 and IPv6. Raises OSError."""
    sockets = []
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, *_, address in dict.fromkeys(found):  # /etc/hosts may list one twice
        try:
            listening = socket.create_server(address, family=family)
        except OSError as error:
            if host or error.errno != errno.EAFNOSUPPORT:
                raise
            continue  # a machine without IPv6
        # Connections inherit both. asyncio sets TCP_NODELAY only where a socket names its protocol; without,
        # the second write of an answer waits for the client's delayed acknowledgement: 40 ms.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The kernel drops a peer that accepts no data; our closing would wait for it.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALL_SECONDS * 1000)
        sockets.append(listening)
    return sockets


class Logfmt(logging.Formatter):
    """A record as one line of key=value pairs."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")
        message = record.getMessage()  # ours are pairs already
        line = logfmt(time=moment, level=record.levelname.lower())
        line += f" {message}" if record.name == logger.name else f" {logfmt(msg=message)}"
        traceback = self.formatException(record.exc_info) if record.exc_info else None
        return f"{line} {logfmt(traceback=traceback)}".rstrip()


class LogHandler(logging.handlers.QueueHandler):
    """Writes the log in a thread of its own: a log that nobody reads does not hold up the service."""

    def __init__(self) -> None:
        self.lines: queue.Queue[logging.LogRecord] = queue.Queue(LOG_LINES)
        super().__init__(self.lines)
        self.dropped = 0
        threading.Thread(target=self.write, daemon=True).start()

    def write(self) -> None:
        """Write the lines to the descriptor of stderr.

        A write through `sys.stderr` that blocks would hold its lock, for which the process waits at exit.
        """
        while True:
            line = self.lines.get().getMessage()
            with suppress(OSError, AttributeError):  # a full disk, a pipe without a reader, closed
                os.write(sys.stderr.fileno(), f"{line}\n".encode())
            self.lines.task_done()

    def enqueue(self, record: logging.LogRecord) -> None:
        super().enqueue(record)
        if (dropped := self.dropped) and not self.lines.full():
            self.dropped -= dropped
            log(logging.WARNING, "log lines dropped", lines=dropped)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        self.dropped += 1  # the queue is full, or the record cannot be formatted

    def flush(self) -> None:
        """Wait a moment for what is still to be written."""
        deadline = time.monotonic() + LOG_SECONDS
        while self.lines.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.01)


def configure_logging(settings: Settings) -> None:
    handler = LogHandler()
    handler.setFormatter(Logfmt())
    logging.basicConfig(handlers=[handler], level=settings.LOG_LEVEL.upper())
    if settings.LOG_LEVEL.lower() != "debug":  # uvicorn logs what is of no use to an operator
        logging.getLogger("uvicorn").setLevel(logging.ERROR)


def log_unknown_settings() -> None:
    """Log each name in `.env` that is no setting, with the setting nearest to it."""
    names = [row.name for row in fields(Settings)]
    for unknown in sorted(read_env_file().keys() - names):
        nearest = next(iter(get_close_matches(unknown.upper(), names, 1, 0.8)), None)
        log(logging.WARNING, "A name in .env is not a setting", name=unknown, nearest=nearest)


def serve(settings: Settings) -> None:
    configure_logging(settings)
    try:
        sockets = listen(settings.HOST, settings.PORT)
    except (OSError, UnicodeError) as error:
        reason = f"expected an address of this machine and a port that is free and may be used ({error})"
        fault = SettingsError(reason, HOST=settings.HOST, PORT=settings.PORT)
        raise SystemExit(f"lg.py: {fault}") from None  # not EX_CONFIG: the address may come later
    server = make_server(settings, sockets)
    place = {"location": settings.NETWORK_LOCATION, "facility": settings.NETWORK_FACILITY}
    host = f"[{settings.HOST}]" if ":" in settings.HOST else settings.HOST or "*"
    log(logging.INFO, "started", version=VERSION, **place, listening=f"{host}:{settings.PORT}")
    log_unknown_settings()
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # a closed terminal ends the commands too
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    with suppress(KeyboardInterrupt):
        server.run()


def check(settings: Settings) -> None:
    """Print what a start with these settings would warn of; a shared store is not asked."""
    logging.basicConfig(stream=sys.stdout, format="%(levelname)s: %(message)s", level=logging.WARNING)
    service = Service(settings)
    log_unknown_settings()
    service.log_warnings()
    asyncio.run(service.runner.try_tools())
    print("lg.py: these settings can be used")


HELP = """\
usage: lg.py [check | --help | --version]

Serves a looking glass: ping, traceroute, mtr and speed tests over HTTP.

  check       print what the settings and the tools lack, and exit
  -h, --help  print this text and exit
  --version   print the version and exit

Settings come from the environment and from .env beside lg.py: see .env.example.
"""


def main() -> None:
    match sys.argv[1:]:
        case []:
            action = serve
        case ["check"]:
            action = check
        case ["-h" | "--help"]:
            print(HELP, end="")
            sys.exit(os.EX_OK)
        case ["--version"]:
            print(f"lg.py {VERSION}")
            sys.exit(os.EX_OK)
        case unknown:
            print(f"{HELP}\nlg.py: unknown arguments: {shlex.join(unknown)}", file=sys.stderr)
            sys.exit(2)
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    # The parent may have left it ignored: the kernel would reap the tools before we do.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        action(load_settings())
    except SettingsError as error:
        print(f"lg.py: {error}", file=sys.stderr)
        sys.exit(os.EX_CONFIG)


# ---- the page ----------------------------------------------------------------------------------------------

TITLES = {"ping": "Ping", "traceroute": "Traceroute", "mtr": "MTR"}
MAX_STREAMS = 4  # of one speed test: what these do not fill, more would not
PAGE_ICON = (  # where no logo is set, so that browsers do not ask for /favicon.ico
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E"
    "%3Cpath d='M1 9h3l2-6 4 11 2-5h3' fill='none' stroke='%230a58c2' stroke-width='2'/%3E%3C/svg%3E"
)


def page_tools(commands: Mapping[str, Command], sizes: Mapping[str, Size]) -> list[dict[str, Any]]:
    """The tabs of the page: each command once, for one IP version or both, and the speed test."""
    tools: dict[str, dict[str, Any]] = {}
    for command in commands.values():
        name, argv = command.base_name, command.argv
        drawn = parser_for(command) is not OutputParser
        count = re.search(r" -c ?(\d{1,9})\b", " ".join(argv))
        probes = int(count[1]) if drawn and count else 10
        title, kind = TITLES.get(name, name.upper()), command.tool if drawn else "text"
        tab = {"id": name, "title": title, "kind": kind, "tool": argv[0], "probes": probes, "versions": []}
        tools.setdefault(name, tab)["versions"].append(command.version)
    speed = {"id": "speedtest", "title": "Speed test", "kind": "speed", "tool": "", "versions": [4]}
    return [*tools.values(), *([speed] if sizes else [])]


def make_page(
    settings: Settings, commands: Mapping[str, Command], sizes: Mapping[str, Size]
) -> tuple[str, str]:
    """The HTML document, the same for every visitor, and the value of its Content-Security-Policy."""
    tools, links = page_tools(commands, sizes), [*settings.PAGE_LINKS, {"name": "API", "url": "docs"}]
    others = [place for place in settings.LOCATIONS if place["name"] != settings.NETWORK_LOCATION]
    style = STYLE + (f":root {{ --mark: {settings.PAGE_COLOR}; }}\n" if settings.PAGE_COLOR else "")
    logo = f'<img src="{settings.PAGE_LOGO}" alt="">' if settings.PAGE_LOGO else ""
    streams = [rate.amount // 2 for rate in settings.RATE_LIMIT_SPEEDTEST]  # the next test has the rest
    setup = {
        "tools": tools,
        "places": [{"name": settings.NETWORK_LOCATION, "url": "", "info": make_place(settings)}, *others],
        "sizes": [f"speedtest/{name}" for name in [*sizes][::-1]],
        "streams": min(MAX_STREAMS, settings.MAX_SPEEDTESTS_PER_CLIENT - 1, *streams),
        "seconds": settings.DIAGNOSTIC_TIMEOUT,
    }
    page = PAGE.format(
        style=style,
        script=SCRIPT,
        setup=json.dumps(setup, separators=(",", ":")).replace("<", "\\u003c"),
        location=escape(settings.NETWORK_LOCATION),
        operator=escape(settings.PAGE_TITLE or "Looking glass"),
        icon=settings.PAGE_LOGO or PAGE_ICON,
        brand=logo + (f"<b>{escape(settings.PAGE_TITLE)}</b>\n" if settings.PAGE_TITLE else ""),
        links="\n".join(f'<a href="{escape(each["url"])}">{escape(each["name"])}</a>' for each in links),
        command=next(iter(commands), ""),
        buttons="\n".join(f'<button formaction="lookingglass/{each}">{each}</button>' for each in commands),
        about="\n".join(ABOUT[tool["id"]] for tool in tools if tool["id"] in ABOUT),
    )
    sources = " ".join(["'self'", *(f"{place['url']}/" for place in settings.LOCATIONS)])
    policy = f"default-src 'none'; script-src {script_hash(SCRIPT)}; style-src {script_hash(style)}; "
    policy += f"connect-src {sources}; img-src data:; form-action 'self'; base-uri 'none'; "
    policy += "frame-ancestors " + (" ".join(settings.FRAME_ANCESTORS) or "'none'") + "; "
    return page, policy + "require-trusted-types-for 'script'; trusted-types 'none'"


# The first view: what each test answers, for those that are offered.
ABOUT = {
    "ping": """<section><h2>Ping</h2>
<p>Does it answer, how fast, and how steadily? 15 packets, 15 seconds.</p>
<svg class="sketch" viewBox="0 0 240 48">
<path d="M4 26L28 22L52 30L76 18L100 26M144 24L168 28L192 20L216 26L236 22"/>
<path class="lost" d="M122 8V40"/></svg></section>""",
    "traceroute": """<section><h2>Traceroute</h2>
<p>Which way do packets take? The routers between here and the target.</p>
<svg class="sketch" viewBox="0 0 240 48">
<path class="grid" d="M20 24H220"/><circle cx="20" cy="24" r="6"/><circle cx="80" cy="24" r="6"/>
<circle class="open" cx="150" cy="24" r="5"/><circle cx="220" cy="24" r="6"/></svg></section>""",
    "mtr": """<section><h2>MTR</h2>
<p>Where are packets lost or delayed? Ten rounds over the whole way.</p>
<svg class="sketch" viewBox="0 0 240 48">
<path class="tiles" d="M0 12H240M0 36H240"/><path class="tiles lost" d="M96 36H118"/></svg></section>""",
    "speedtest": """<section><h2>Speed test</h2>
<p>How fast is your line to this place, and does it stay responsive under load? 18 seconds.</p>
<svg class="sketch" viewBox="0 0 240 48"><path class="curve" d="M4 46L24 6H118V46Z"/>
<path class="curve upload" d="M124 46L144 22H236V46Z"/></svg></section>""",
}

STYLE = """\
/* Colours, by the visitor's scheme. --mark is PAGE_COLOR where it is set: of lines, bars and marks, never of text. */
:root {
	color-scheme: light dark;
	--page: #f5f7fa; --card: #fff; --line: #e0e5eb; --text: #17202b; --dim: #536070;
	--accent: #0a58c2; --bad: #b3241c; --fair: #8a5a00; --good: #1b7a4a; --mark: var(--accent);
	font: max(1rem, 0.8rem + 0.25vw) / 1.4 system-ui, sans-serif;
	font-variant-numeric: tabular-nums;
	overflow-wrap: anywhere;
	overflow-y: scroll;
	background: var(--page);
	color: var(--text);
}
@media (prefers-color-scheme: dark) {
	:root {
		--page: #0d1117; --card: #171f28; --line: #2b3541; --text: #e8eef5; --dim: #a6b2c0;
		--accent: #7ab8ff; --bad: #ffa198; --fair: #e5b567; --good: #62d596;
	}
}

* { box-sizing: border-box; margin: 0; padding: 0; border: 0 solid var(--line); font: inherit; color: inherit; }
[hidden], :is(p, div):empty { display: none !important; }
body > * { padding: 0.75rem max(0.75rem, 50% - 36rem); }
header, .card { background: var(--card); border-bottom-width: 1px; }
header img { height: 1.75rem; }
h1, h2, b { font-weight: 600; color: var(--text); }
h1, #results > :first-child h2 { font-size: 1.5rem; line-height: 1.3; }
a, .link { color: var(--accent); text-decoration: underline; }
small, th, nav, section p, .dim, .link, .copy, .chip, #offer { font-size: 0.85rem; }
small, th, section p, .dim, #offer { color: var(--dim); }
h2.bad, .bad { color: var(--bad); }
pre, code, .copy { font-family: monospace; }
pre, code { display: block; overflow: auto; }
code { white-space: nowrap; }
button, summary, label { background: none; cursor: pointer; }
:focus-visible, :focus-visible + span { outline: 2px solid var(--accent); outline-offset: 2px; }
.hush, [type="radio"] { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden; }
.row { display: flex; flex-wrap: wrap; align-items: center; gap: 0.5rem 0.75rem; }
nav, .end, #mine { margin-inline-start: auto; }

main, #form, #results, #plain { display: grid; gap: 0.75rem; grid-template-columns: minmax(0, 1fr); }
main { padding-bottom: 50vh; }
#place { min-height: 4rem; }
.card { container-type: inline-size; border-width: 1px; border-radius: 0.5rem; padding: 0.75rem 1rem; }
.card > * + * { margin-top: 0.75rem; }
#form { padding-top: 0; }
#form > * { margin-top: 0; }
#tabs { border-bottom-width: 1px; gap: 0 1.25rem; margin: 0 -1rem; padding: 0 1rem; }
#tabs span { display: block; padding: 0.75rem 0; color: var(--dim); }
#tabs :checked + span { padding-bottom: calc(0.75rem - 2px); border-bottom: 2px solid var(--mark); color: var(--text); font-weight: 600; }
.chip { display: block; padding: calc(0.1rem + 1px) 0.75rem; border: 1px solid var(--dim); border-radius: 1rem; }
:checked + .chip { padding: 0.1rem calc(0.75rem - 1px); border: 2px solid var(--accent); color: var(--accent); }
#ask, #offer { flex: 9 15rem; min-width: 0; }
.choices { min-height: 1.8rem; }
#from { flex-wrap: nowrap; align-items: baseline; }
#from > small { flex: none; }
input, select, #run, #plain button { min-height: 2.75rem; padding: 0 0.75rem; background: var(--card); border: 1px solid var(--dim); border-radius: 0.5rem; }
input { width: 100%; }
[aria-invalid] { border: 2px solid var(--bad); }
select { flex: 1 0 9rem; max-width: 9.5rem; }
#run { flex: 1 8rem; min-width: 10.2rem; max-width: 14rem; font-weight: 600; }
#run:not(.stop) { background: var(--accent); border-color: var(--accent); color: var(--card); }

#about { display: grid; margin-top: 0.75rem; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: 1rem; }
section { display: grid; grid-template-rows: auto 1fr auto; gap: 0.5rem; border-top-width: 2px; padding: 0.75rem 0; }
#results > :first-child > summary { display: block; }
table { width: 100%; border-collapse: collapse; table-layout: fixed; }
tr { border-bottom-width: 1px; }
th, td { padding: 0.25rem 0.5rem; text-align: end; white-space: nowrap; }
.at { width: 3.4rem; }
.name, th.range { text-align: start; }
.name > * { overflow: hidden; text-overflow: ellipsis; }
.name:focus, .name span { white-space: normal; }
td.name small { display: block; min-height: 1.2rem; }
th span + span { float: right; }

svg { display: block; width: 100%; height: 1.1rem; overflow: visible; fill: var(--mark); stroke: none; }
line, path { stroke: var(--mark); stroke-width: 2px; vector-effect: non-scaling-stroke; }
.grid { stroke: var(--line); }
.spread, .tiles:not(.lost), [aria-disabled] { opacity: 0.5; }
.lost { fill: var(--bad); stroke: var(--bad); }
rect.lost { stroke: none; }
.upload { --mark: var(--good); fill: var(--good); }
.curve { fill-opacity: 0.15; }
.curve.idle { stroke: none; }
.latency { fill: none; stroke: var(--dim); }
.sketch path:not(.curve) { fill: none; }
.open { fill: var(--page); stroke: var(--dim); stroke-width: 2px; }
.tiles { stroke-width: 18px; stroke-dasharray: 22 2; vector-effect: none; }
.plot svg { height: 7rem; border-width: 1px 0; }
.sketch, .latency svg { height: 3rem; }
.phases { display: grid; grid-template-columns: 2fr 8fr 8fr; }
.speed[open] h2:not(.bad) { display: none; }
.figures { gap: 0.5rem 1rem; align-items: flex-end; }
.figures p { flex: 0 1 8.5rem; white-space: nowrap; }
.speed .figures p { flex-basis: auto; margin-inline-end: 1rem; min-width: 8.5rem; }
.figures small { display: block; }
.figures b { font-size: 1.25rem; }
.speed .figures b { font-size: 2rem; }
.speed .figures :first-child b { font-size: 3rem; }
.speed .figures .grade { padding: 0 1rem; min-width: 0; border-radius: 0.5rem; background: var(--good); color: var(--card); font-size: 2rem; font-weight: 600; }
.grade.C { background: var(--fair); }
.grade.D, .grade.F { background: var(--bad); }

@container (min-width: 52rem) {
	th { width: 4.4rem; }
	th.name { width: auto; }
	th.range { width: 20%; }
	th.strip { width: 8.5rem; }
}
@container (max-width: 52rem) {
	tr { display: grid; grid-template-columns: 2.7rem 1fr 1fr 4.2rem; }
	th, td { width: auto; padding: 0.15rem 0.25rem; }
	.at { grid-row: span 2; width: auto; }
	.name { grid-column: span 2; }
	.range, .strip, .loss { order: 1; }
	.best, .worst { display: none; }
	.sub { min-height: 2.4rem; }
}
@media (max-width: 30rem) {
	:is(.ping, .traceroute, .mtr) h2 { min-height: 2.6em; }
	.sub { min-height: 3.6rem; }
	#tabs { gap: 0 0.9rem; }
	#run, select { min-width: 0; max-width: none; }
	#results > :first-child h2 { font-size: 1.25rem; }
}
@media print { #form { display: none; } }
"""  # noqa: E501

PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="description" content="Network tests from {location}">
<title>{operator} · {location}</title>
<link rel="icon" href="{icon}">
<style>{style}</style>
<header class="row">{brand}<span class="dim">Looking glass</span><nav class="row">{links}</nav></header>
<main>
<div id="place"><h1>{location}</h1></div>
<form id="form" class="card" method="post" action="lookingglass/{command}">
<fieldset id="tabs" class="row" aria-label="Test"></fieldset>
<div class="row">
<label id="ask"><span class="hush">Target</span><input name="target" required
inputmode="url" spellcheck="false" autocapitalize="off" placeholder="Host name, address or URL"
aria-describedby="fault"></label>
<select name="version" aria-label="IP version" hidden></select>
<button id="run">Run</button>
<div id="offer"></div>
</div>
<p class="bad" id="fault" role="alert"></p>
<div class="row choices"><div id="from" class="row"></div><div id="mine"></div></div>
<div id="plain"><p>Charts need JavaScript and a browser from 2023 on (Chrome 109, Firefox 115, Safari 16).
Without them these buttons show each test as text.</p><p class="row">{buttons}</p></div>
</form>
<div id="about">{about}</div>
<div id="results"></div>
</main>
<output id="status" class="hush"></output>
<script type="application/json" id="setup">{setup}</script>
<script>{script}</script>
</html>
"""

SCRIPT = r"""
// The form asks, a run grows by events (`reduce`), `draw` draws all of the page from the runs. What strangers wrote
// becomes text, never markup: `fill` knows no HTML. In an older browser the form stays as it was sent.

if (!CSS.supports("container-type: inline-size")) throw new Error("This browser is from before 2023")

const $ = (id) => document.getElementById(id)
const {tools: TOOLS, places: PLACES, sizes: SIZES, streams: STREAMS, seconds} = JSON.parse($("setup").textContent)
const SECOND = 1000
const PATIENCE = (Math.max(seconds, 30) + 10) * SECOND // of a whole test: nothing else shows that a network is gone
const [IDLE, LOAD, RAMP] = [2 * SECOND, 8 * SECOND, 2 * SECOND] // the ramp of a load is not counted in its rate
const PHASES = {idle: 0, download: IDLE, upload: IDLE + LOAD} // where each begins in the charts
const GRADES = [
	["A+", 5, "The line stays responsive while it is full."],
	["A", 30, "Calls and games stay smooth while the line is full."],
	["B", 60, "Calls stay smooth while the line is full; games may lag."],
	["C", 200, "Video calls may stutter while the line is full."],
	["D", 400, "Calls stutter and pages are slow while the line is full."],
	["F", Infinity, "Calls break off and pages hang while the line is full."],
] // by the latency that load adds, in ms: Waveform's limits

// Elements

/** Describes an element: name and classes, what is set on it (`on…` are properties), what stands in it. */
function h(tag, ...content) {
	const set = content[0]?.constructor === Object && !content[0].tag ? content.shift() : {}
	return {tag, set, content}
}

const made = new WeakMap() // what each node was made as
const xmlns = (name) => `http://www.w3.org/${/svg|path|rect|circle|line/.test(name) ? "2000/svg" : "1999/xhtml"}`

/** Makes what stands in `node` as described. Only what differs is touched: focus, selection and presses stay (WebKit
 * loses a click when a button's text is written while it is pressed), and a text of many lines is appended to. */
function fill(node, ...content) {
	const wanted = content.flat(9).filter((each) => each || each === 0)
	for (const [i, each] of wanted.entries()) {
		const {tag = "", set: {key = "", ...set} = {}, content} = each
		const [name, ...classes] = tag.split(".")
		const words = name ? "" : `${each}`
		const isSame = ({data}) => name || data === words || (words.includes("\n") && words.startsWith(data))
		const known = [...node.childNodes].slice(i).find((child) => made.get(child) === name + key && isSame(child))
		const child = known ?? (name ? document.createElementNS(xmlns(name), name) : document.createTextNode(words))
		made.set(child, name + key)
		if (node.childNodes[i] !== child) node.insertBefore(child, node.childNodes[i] ?? null)
		if (name) fill(dress(child, {class: classes.join(" "), ...set}), content)
		else if (child.data !== words) child.appendData(words.slice(child.data.length))
	}
	while (node.childNodes.length > wanted.length) node.lastChild.remove()
}

function dress(node, set) {
	for (const [name, value] of Object.entries(set))
		if (name.startsWith("on")) node[name] = value
		else if (!value && value !== 0) node.removeAttribute(name)
		else if (node.getAttribute(name) !== `${value}`) node.setAttribute(name, value)
	return node
}

// Numbers

const digits = (value) => (value >= 0 && value < 1e9 ? value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0) : "–")
const ms = (value) => `${digits(value)}\u00a0ms`
const sum = (values) => values.reduce((total, each) => total + each, 0)
const median = (values) => [...values].sort((a, b) => a - b)[Math.ceil(values.length / 2) - 1]
const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`
const isRunning = ({status}) => status === "running"
const sentences = (...parts) => parts.filter(Boolean).join(" ")
const clockTime = (time) => new Date(time).toISOString().slice(11, 19)

function roundUp(value) {
	const step = 10 ** Math.floor(Math.log10(value)) / 2
	return +(Math.ceil(value / step) * step).toPrecision(2)
}

function waitInWords(until) {
	const wait = Math.max(0, Math.ceil((until - Date.now()) / SECOND))
	if (wait < 100) return `${wait} s`
	return wait < 6000 ? `${Math.ceil(wait / 60)} min` : `${Math.ceil(wait / 3600)} h`
}

// Network: knows nothing of the document

const sleep = (time) => new Promise((resolve) => setTimeout(resolve, time))

/** What a network does is `lost`; every other exception is the script's own. */
function lost() {
	throw Object.assign(new Error("lost"), {lost: true})
}

async function request({url}, path, options) {
	const answer = await fetch(url + path, {cache: "no-store", ...options}).catch(lost)
	if (answer.ok) return answer
	const {error, detail} = await answer.json().catch(() => ({}))
	const said = text(error ?? detail?.[0]?.msg ?? detail) || `The server answered with ${answer.status}.`
	const wait = Number(answer.headers.get("Retry-After"))
	throw Object.assign(new Error(said), {status: answer.status, until: Date.now() + wait * SECOND})
}

const ask = async (place, path, signal = AbortSignal.timeout(5 * SECOND)) =>
	(await request(place, path, {signal})).json().catch(lost)

async function* chunks(stream) {
	const reader = stream.getReader()
	for (;;) {
		const {done, value} = await reader.read().catch(lost)
		if (done) return
		yield value
	}
}

async function diagnose({place, command, target}, signal, emit) {
	const headers = {Accept: "application/x-ndjson"}
	const body = new URLSearchParams({target})
	const answer = await request(place, `lookingglass/${command}`, {method: "POST", headers, body, signal})
	let buffer = ""
	for await (const chunk of chunks(answer.body.pipeThrough(new TextDecoderStream()))) {
		const lines = (buffer + chunk).split("\n")
		buffer = lines.pop()
		for (const line of lines) {
			const event = await new Response(line).json().catch(lost)
			emit(event)
			if (event?.event === "end") return
		}
	}
	lost()
}

/** One measurement of latency, with what the server answered. */
async function sample(place, path, signal) {
	const begun = performance.now()
	const answer = await ask(place, path, signal)
	const timing = performance.getEntriesByName(place.url + path).at(-1)
	const {requestStart, responseStart} = {...timing?.toJSON()}
	performance.clearResourceTimings()
	return {...answer, rtt: requestStart ? responseStart - requestStart : performance.now() - begun}
}

async function download(place, path, signal, add) {
	const answer = await request(place, path, {signal})
	for await (const chunk of chunks(answer.body)) add(chunk.length)
}

function upload(size, place, path, signal) {
	const block = new Uint8Array(2 ** 20)
	const body = new Blob(Array(Math.ceil(size / block.length)).fill(block))
	return request(place, path, {method: "POST", body, signal})
}

/** Moves bytes by `move` along `paths` (the next where one is refused) until the clock ends it, and returns how many.
 * The clock starts with the first byte that arrived: a browser may take seconds to prepare a body. Bytes are the
 * server's count where it has one, since a browser counts what it has handed to the system. */
async function phase(name, {place, path, time, move, paths = []}, signal, now, emit) {
	const over = new AbortController()
	const end = () => over.abort()
	signal.addEventListener("abort", end)
	let [moved, begun] = [0, 0]
	const add = (more) => (moved += more)
	async function watch() {
		while (!over.signal.aborted) {
			const {rtt, bytes = moved, seconds} = await sample(place, path, signal)
			moved = Math.max(moved, bytes)
			if (!begun && (bytes || !move)) start(now() - (seconds ?? 0) * SECOND)
			if (begun) emit({event: "sample", phase: name, at: seconds ? begun + seconds * SECOND : now(), rtt, bytes: moved})
			await sleep(SECOND / 10)
		}
	}
	function start(at) {
		begun = at
		setTimeout(end, time)
		if (move) widen(1, 0)
	}
	async function stream(i) {
		const fault = await move(place, paths[i], over.signal, add).catch((error) => error)
		if (fault?.until && paths[i + 1]) return stream(i + 1)
		if (fault instanceof Error && !over.signal.aborted) throw fault
	}
	async function widen(streams, fastest) {
		const before = moved
		await sleep(SECOND)
		if (streams >= STREAMS || over.signal.aborted || (fastest && moved - before <= 1.1 * fastest)) return
		stream(0).catch(() => {})
		widen(streams + 1, moved - before) // as long as each makes the load faster
	}
	emit({event: "phase", phase: name})
	await Promise.all([move && stream(0).finally(end), watch()])
	if (signal.aborted) lost()
	return moved
}

async function speedTest({place}, signal, emit) {
	const begun = performance.now()
	const now = () => performance.now() - begun
	await ask(place, "health")
	emit({event: "start", address: new URL(place.url).hostname, time: new Date().toISOString()})
	const run = (name, more) => phase(name, {place, path: "health", time: LOAD, ...more}, signal, now, emit)
	await run("idle", {time: IDLE})
	const moved = await run("download", {move: download, paths: SIZES})
	const path = `speedtest/upload?test=${Math.random()}`
	const size = Math.min(2 ** 30, Math.max(2 ** 24, 2 * moved)) // what is prepared and not sent costs time
	await run("upload", {path, move: upload.bind(null, size), paths: [path]})
	emit({event: "end", status: "finished", duration: now() / SECOND})
}

// Runs. Another place could send anything: what comes is made a text, a number or a list here, once.

const text = (value) => (value == null || typeof value === "object" ? "" : String(value))
const list = (value) => (Array.isArray(value) ? value.slice(0, 1000) : [])
const count = (value) => Math.min(Math.max(0, Math.trunc(value) || 0), 1000)
const rttOf = (value) => (typeof value === "number" ? value : null)

function counted(hop) {
	const times = hop.rtts.filter((rtt) => rtt != null)
	return {...hop, times, lost: hop.rtts.length - times.length}
}
const NO_HOP = counted({address: "", name: "", more: [], codes: [], rtts: []})

function newRun(place, tool, target, command) {
	const asked = {place, tool, target, command, status: "running", error: "", refused: 0, until: 0}
	return {...asked, address: "", time: "", duration: 0, hops: [], notes: [], phases: {}, result: null}
}

const put = (items, index, item, gap) =>
	Array.from({length: Math.max(items.length, count(index + 1))}, (_, i) => (i === index ? item : (items[i] ?? gap)))

/** The events of mtr hold sums: the probes since the last event are what these grew by. */
function grown({rtts, times, lost}, {rcv, drop, avg}) {
	const back = count(rcv) - times.length
	const added = (length, value) => Array(Math.max(0, length)).fill(value)
	return [...rtts, ...added(count(drop) - lost, null), ...added(back, (avg * rcv - sum(times)) / back)]
}

function hopOf(before, {address, hostname, addresses, hostnames, asn, network, stats, timings, probes = timings}) {
	const named = list(addresses).map((each, i) => [each, list(hostnames)[i]])
	const others = named.filter(([each]) => each !== address).map(([each, name]) => (name ? `${name} (${each})` : each))
	const numbers = list(asn).map((each) => `AS${text(each)}`)
	const codes = [...new Set(list(probes).map((probe) => text(probe?.code)))].filter(Boolean)
	const name = text(hostname) || text(address)
	return counted({
		address: text(address),
		name,
		more: [sentences(...numbers, text(network)), name === address ? "" : address, ...others, ...codes].filter(text),
		codes,
		rtts: stats ? grown(before, stats) : list(probes).map((probe) => rttOf(probe?.rtt)),
	})
}

function probed({hops: [hop = NO_HOP], address}, seq, rtt) {
	if (hop.rtts[seq - 1] != null) return {} // a late reply overrides a loss, never the other way
	return {hops: [counted({...hop, address, name: address, rtts: put(hop.rtts, seq - 1, rtt, null)})]}
}

const REDUCERS = {
	__proto__: null,
	start: (_, {address, time}) => ({address: text(address), time: text(time)}),
	reply: (run, {seq, rtt}) => probed(run, seq, rttOf(rtt)),
	lost: (run, {seq}) => probed(run, seq, null),
	hop: ({hops}, {hop: at, ...hop}) => ({hops: put(hops, at - 1, hopOf(hops[at - 1] ?? NO_HOP, hop), NO_HOP)}),
	path: ({hops}, event) => ({hops: hops.slice(0, count(event.hops))}),
	note: ({notes}, event) => ({notes: [...notes, text(event.text)]}),
	phase: ({phases}, {phase}) => ({phases: {...phases, [phase]: []}}),
	sample: ({phases}, {phase, ...sample}) => ({phases: {...phases, [phase]: [...phases[phase], sample]}}),
	end: ({hops}, {status, error, duration, result}) => ({
		status: text(status),
		error: text(error),
		duration: +duration || 0,
		hops: hops.slice(0, result?.hops?.length),
		result,
	}),
}

const reduce = (run, event) => ({...run, ...REDUCERS[text(event?.event)]?.(run, event)})

// Words

const lossOf = ({lost, rtts}) => (rtts.length ? `${+((100 * lost) / rtts.length).toFixed(1)} %` : "–")
const outputOf = ({result, notes}) => text(result?.rawOutput) || notes.join("\n")
const titleOf = ({tool, target}, where) => `${tool.title} · ${where}${target && ` → ${target}`}`
/** Loss is red where it carries on: every later hop that answers loses too. */
const carriesOn = (hops, i) => hops.slice(i).every(({times, lost}) => !times.length || lost)

function reached({hops, address}) {
	const last = hops.at(-1) ?? NO_HOP
	return last.times.length && [last.address, ...last.more].includes(address) ? last : NO_HOP
}

/** Each note once, with its number: "15 × From 198.51.100.6 Packet filtered". Ping's own summary is in the text. */
function notesOf({notes}) {
	const plain = notes.map((note) => note.replace(/ icmp_seq=\d+/, "")).filter((note) => !/^\d+ packets|^rtt/.test(note))
	const times = (note) => plain.filter((each) => each === note).length
	return [...new Set(plain)].map((note) => (times(note) > 1 ? `${times(note)} × ${note}` : note))
}

function lossInWords(hops) {
	const losing = [...hops.keys()].filter((i) => hops[i].lost && hops[i].times.length)
	const first = losing.find((i) => carriesOn(hops, i))
	const limited = losing.filter((i) => !carriesOn(hops, i)).map((i) => i + 1)
	const rest = `What hop${limited[1] ? "s" : ""} ${limited.join(", ")} lose${limited[1] ? "" : "s"} does not carry on: `
	const begins = first >= 0 && `Loss begins at hop ${first + 1}.`
	return [begins, limited[0] && `${rest}such routers probably limit their answers.`]
}

function jitterInWords(times) {
	const steps = times.slice(1).map((time, i) => Math.abs(time - times[i]))
	return steps[0] >= 0 && `From one reply to the next it changes by ${ms(median(steps))} (jitter).`
}

/** Head, further sentences, and whether this is bad. */
function pathVerdict(run) {
	const {hops, tool, target} = run
	const {times, lost, rtts} = reached(run)
	const isPath = tool.kind !== "ping"
	if (times.length) {
		const head = `${ms(median(times))}, ${lost || "none"} of ${plural(rtts.length, "probe")} lost`
		if (!isPath) return [head, [jitterInWords(times)], lost]
		return [head, [`Reached in ${plural(hops.length, "hop")}.`, ...lossInWords(hops)], lost]
	}
	if (isRunning(run)) return ["Waiting for an answer", []]
	const [, router, reason] =
		/^From (\S+) icmp_seq=\d+ (.+)/.exec(run.notes.findLast((note) => /^From /.test(note))) ?? []
	const marked = hops.find(({codes}) => codes.some((code) => code.startsWith("!")))
	const {name, codes} = marked ?? {name: router, codes: [reason]}
	if (name) return [`${name} refuses packets to ${target}`, [`Its answer: ${codes[0]}.`], true]
	const at = hops.findLastIndex((hop) => hop.times.length)
	const last = isPath && at >= 0 && `The last router that answers is ${hops[at].name}, hop ${at + 1}.`
	return [`No answer from ${target}`, [last, "The target, or a firewall on the way, may not answer."], true]
}

const rate = (from, to, least) => ((to.bytes - from.bytes) * 8e-3) / Math.max(least, to.at - from.at) // Mbit/s
const rates = (samples) =>
	samples.map((each) => rate(samples.findLast(({at}) => at <= each.at - SECOND) ?? samples[0], each, SECOND))

/** A phase has figures when it was completed, the test a grade. While it runs, the last second's rate stands. */
function speedFigures({phases, status}) {
	const names = Object.keys(phases)
	const [idle, download, upload] = Object.keys(PHASES).map((name, i) => {
		const samples = phases[name] ?? []
		const done = samples[0] && (status === "finished" || i < names.length - 1)
		if (!done) return {mbps: status === "running" ? rates(samples).at(-1) : undefined}
		const last = samples.at(-1)
		const from = samples.find(({at}) => at >= samples[0].at + RAMP && at <= last.at - SECOND) ?? samples[0]
		return {done, mbps: rate(from, last, 1), rtt: median(samples.map(({rtt}) => rtt))}
	})
	const added = Math.max(0, Math.max(download.rtt, upload.rtt) - idle.rtt)
	const [grade, , meaning] = (status === "finished" && GRADES.find(([, most]) => added < most)) || []
	const rtts = {"while downloading": download, "while uploading": upload, idle}
	const known = Object.entries(rtts).filter(([, {rtt}]) => rtt >= 0)
	const latency = known.map(([when, {rtt}]) => `${ms(rtt)} ${when}`).join(", ")
	return {idle, download, upload, latency, grade, meaning}
}

function speedVerdict(run) {
	const {download, upload, grade, meaning} = speedFigures(run)
	if (isRunning(run)) return [`Measuring ${Object.keys(run.phases).at(-1) ?? ""}`, []]
	const figure = ({done, mbps}, way) => done && `${digits(mbps)}\u00a0Mbit/s ${way}`
	const head = [figure(download, "down"), figure(upload, "up")].filter(Boolean).join(", ")
	return [head || "Nothing was measured", [grade && `Grade ${grade}: ${meaning}`]]
}

function verdict(run) {
	const {status, error, until, address, tool, duration} = run
	const kinds = {speed: speedVerdict, text: () => [isRunning(run) ? "Running" : "Done", []]}
	const [head, sub, bad] = (kinds[tool.kind] ?? pathVerdict)(run)
	if (status === "failed") {
		const before = address && tool.kind !== "text" && `Before: ${head}.`
		return {head: error, sub: sentences(before, until && `Again from ${clockTime(until)} UTC.`), bad: true}
	}
	const took = duration >= 1 && tool.kind !== "speed" && `Took ${Math.round(duration)} s.`
	return {head, sub: sentences(...sub, took, status === "stopped" && "Stopped."), bad}
}

/** Of all places: those that measured are counted, those that could not are named. */
function verdictOfAll({runs, target, tool}) {
	if (!runs[1]) return verdict(runs[0])
	const failed = runs.filter(({status}) => status === "failed")
	const measured = runs.length - failed.length
	const heard = runs.filter((run) => !failed.includes(run) && (tool.kind === "text" || reached(run).address)).length
	const all = ["no place", "the one place", "both places"][measured] ?? `all ${measured} places`
	const places = heard === measured ? all : `${heard} of ${plural(measured, "place")}`
	const [down, others] = [failed.filter(({place}) => place.down), failed.filter(({place}) => !place.down)]
	const are = down.length > 1 ? "are" : "is"
	const names = down[0] && `; ${down.map(({place}) => place.name).join(" and ")} ${are} down`
	const subject = tool.kind === "text" ? "Output from" : `${target} answers`
	const head = sentences(subject, places, failed[0] && measured > 0 && "that measured") + (names || "")
	const sub = sentences(...others.map(({place, error}) => `${place.name} did not measure: ${error}`))
	return {head, sub, bad: !runs.some(isRunning) && (!measured || heard < measured)}
}

// Pictures. Lengths are percents of a drawing that is never stretched: dots are round in all engines.

const percent = (value) => `${+value.toFixed(2)}%`
const drawing = (look, label, ...shapes) => h(`svg.${look}`, {role: "img", "aria-label": label}, shapes)
const stretched = (...paths) => h("svg", {viewBox: "0 0 100 100", preserveAspectRatio: "none"}, paths)
const line = (look, x1, y1, x2, y2) =>
	h(`line.${look}`, {x1: percent(x1), y1: percent(y1), x2: percent(x2), y2: percent(y2)})
const dot = (x, y) => h("circle", {cx: percent(x), cy: percent(y), r: 4})
const block = (look, x, width, set) => h(`rect.${look}`, {x: percent(x), width: percent(width), rx: 2, ...set})
const plot = (high, low, picture) => h("div.plot", h("small", high), picture, h("small", low))
const range = (times) => `${ms(Math.min(...times))} to ${ms(Math.max(...times))}`
const values = (rtts) => rtts.map((rtt) => (rtt == null ? "lost" : digits(rtt))).join(" ") || "none"
const figure = (name, value, unit) => h("p", h("small", name), h("b", value), ` ${unit}`)

function drawPing(hop, slots) {
	const {rtts, times, lost} = hop
	const [high, low] = [Math.max(...times), Math.min(...times) * 0.9]
	const x = (i) => (100 * i + 50) / slots
	const y = (rtt) => 92 - (84 * (rtt - low)) / (high - low || 1)
	const shapes = rtts.map((rtt, i) => {
		const before = rtts[i - 1]
		if (rtt == null) return line("lost", x(i), 0, x(i), 100)
		return [before != null && line("", x(i - 1), y(before), x(i), y(rtt)), dot(x(i), y(rtt))]
	})
	const grid = line("grid", 0, y(median(times)), 100, y(median(times)))
	return [
		plot(ms(high), digits(low), drawing("", `Probes in ms: ${values(rtts)}`, grid, shapes)),
		h(
			"div.row.figures",
			figure("Loss", lossOf(hop), `${lost} of ${rtts.length}`),
			figure("Best", digits(Math.min(...times)), "ms"),
			figure("Median", digits(median(times)), "ms"),
			figure("Worst", digits(Math.max(...times)), "ms"),
		),
	]
}

function drawRange(times, top) {
	const x = (time) => (100 * time) / top
	const from = x(Math.min(...times))
	const spread = () => block("spread", from, x(Math.max(...times)) - from, {y: "25%", height: "50%"})
	const mark = () => line("", x(median(times)), 0, x(median(times)), 100)
	return drawing("", times[0] ? range(times) : "none", line("grid", 0, 50, 100, 50), times[0] && [spread(), mark()])
}

/** A block for each probe, red where it was lost, the darker the longer it took. */
function drawStrip(rtts, slots) {
	const least = Math.min(...rtts.filter((rtt) => rtt != null))
	const probes = rtts.map((rtt, i) => {
		const opacity = rtt == null ? 1 : (1 - 6 / (8 + rtt - least)).toFixed(2)
		return block(rtt == null ? "lost" : "", (100 * i) / slots, 85 / slots, {height: "100%", opacity})
	})
	return drawing("", values(rtts), probes)
}

/** The one table, of the hops of a path or of places. A row without probes was silent. */
function drawTable(at, name, rows, {top, slots}) {
	const heads = {at, name, range: [h("span", "0"), h("span", {key: top}, ms(top))], strip: "Probes", loss: "Loss"}
	const titles = Object.entries({...heads, median: "Median", best: "Best", worst: "Worst"})
	const cellsOf = ({at, name, more, bad, rtts, times, lost}) => ({
		at,
		name: [h("div", name), h("small", more)],
		range: drawRange(times, top),
		strip: drawStrip(rtts, slots),
		loss: h(bad && rtts.length ? "b.bad" : "span", lossOf({rtts, lost})),
		median: digits(median(times)),
		best: digits(Math.min(...times)),
		worst: digits(Math.max(...times)),
	})
	const body = rows.map((row) => {
		const cells = Object.entries(row.rtts ? cellsOf(row) : {at: row.at, name: h("span.dim", row.name)})
		const set = {tabindex: 0, colspan: !row.rtts && 7} // of a name: a click or Tab unfolds it
		const tds = cells.map(([look, cell]) => h(`td.${look}`, look === "name" ? {...set} : {}, cell))
		return h("tr", {key: row.key}, tds)
	})
	const ths = titles.map(([look, title]) => h(`th.${look}`, title))
	return h("table", h("thead", h("tr", ths)), h("tbody", body))
}

/** While a test runs, no hop is drawn beyond the first whose answer may still come: rows stay where they are. */
function rowsOf({hops, status}) {
	const open = hops.findIndex(({rtts}) => !rtts.length)
	const end = status === "running" && open >= 0 ? open : hops.length
	const rows = []
	for (let i = 0; i < end; i++) {
		const first = i + 1
		while (!hops[i].address && i + 1 < end && !hops[i + 1].address) i++
		const at = first > i ? first : `${first}–${i + 1}`
		const {address, more, lost} = hops[i]
		if (address) rows.push({...hops[i], key: first, at, more: more.join(" · "), bad: lost && carriesOn(hops, i)})
		else rows.push({key: `${first} silent`, at, name: "no reply"})
	}
	return rows
}

function scaleOf({runs, tool}) {
	const hops = runs.flatMap((run) => run.hops)
	const top = roundUp(Math.max(0.1, ...hops.flatMap(({times}) => times)))
	return {top, slots: Math.max(tool.kind === "traceroute" ? 3 : tool.probes, ...hops.map(({rtts}) => rtts.length))}
}

function drawSpeed(run) {
	const {download, upload, latency, grade} = speedFigures(run)
	const chart = (unit, look, valuesOf, foot) => {
		const phases = Object.entries(run.phases).map(([name, samples]) => [name, samples, valuesOf(samples)])
		const top = roundUp(Math.max(1, ...phases.flatMap(([, , values]) => values)))
		const curves = phases.map(([name, samples, values]) => {
			const x = ({at}) => ((PHASES[name] + at - samples[0].at) / (IDLE + 2 * LOAD)) * 100
			const points = samples.map((each, i) => `${x(each).toFixed(2)} ${(100 - (100 * values[i]) / top).toFixed(2)}`)
			const closed = foot && samples[0] ? `V100H${x(samples[0])}Z` : ""
			return h(`path.${look}.${name}`, {key: name, d: points[0] && `M${points.join("L")}${closed}`})
		})
		return plot(`${top} ${unit}`, "0", h(`div.${look}`, drawing("", `${unit} over time`, stretched(curves))))
	}
	const names = Object.keys(PHASES).map((name) => h("span", name))
	const byLimits = grade && h("small", " Graded by Waveform's limits for bufferbloat.")
	return [
		h(
			"div.row.figures",
			figure("Download", digits(download.mbps), "Mbit/s"),
			figure("Upload", digits(upload.mbps), "Mbit/s"),
			grade && h(`p.grade.${grade[0]}`, {"aria-label": `Grade ${grade}`}, grade),
		),
		h("p", latency ? `Latency: ${latency}.` : "Latency: …", byLimits),
		chart("Mbit/s", "curve", rates, true),
		chart("ms", "latency", (samples) => samples.map(({rtt}) => rtt), false),
		h("p.phases.dim", names),
	]
}

function drawRun(run, scale) {
	const {tool, hops} = run
	const isPing = tool.kind === "ping"
	const output = h("pre", {tabindex: 0}, outputOf(run))
	if (tool.kind === "speed") return drawSpeed(run)
	if (tool.kind === "text") return output
	return [
		isPing && hops[0]?.times[0] && drawPing(hops[0], scale.slots),
		!isPing && hops[0] && drawTable("Hop", "Router", rowsOf(run), scale),
		notesOf(run).map((note) => h("p.dim", note)),
		!isRunning(run) && h("details", h("summary.link", "Text"), output),
	]
}

function drawAll({runs, tool}, scale) {
	const rows = runs.map((run) => {
		const {head, sub, bad} = verdict(run)
		const {place, hops, status} = run
		const said = place.down
			? "No answer: it is down or cannot be reached."
			: sentences(head, bad && status === "failed" && sub)
		const [hop, more] = [reached(run), h(bad ? "span.bad" : "span", said)]
		return {...hop, key: place.name, at: hop.address && hops.length, name: place.name, more, bad}
	})
	const details = (run) => h("details", {key: run.place.name}, h("summary", run.place.name), drawRun(run, scale))
	return [
		tool.kind !== "text" && drawTable("Hops", "Place", rows, scale),
		runs.filter(({address}) => address).map(details),
	]
}

const COPIES = {
	text(run) {
		const {head, sub} = verdict(run)
		const from = `${run.place.url} · ${run.time} · ${run.address}`
		const latency = run.tool.kind === "speed" && `Latency: ${speedFigures(run).latency}.`
		return [titleOf(run, run.place.name), from, head, sub, latency, outputOf(run)].filter(Boolean).join("\n")
	},
	JSON: (run) => JSON.stringify(run.result ?? (run.hops[0] ? run.hops : speedFigures(run)), null, 2),
	curl({place, command, target, tool}) {
		if (tool.kind === "speed") return `curl -o /dev/null ${place.url}speedtest/1G`
		return `curl -N -d 'target=${target.replace(/[^\w.:-]/g, encodeURIComponent)}' ${place.url}lookingglass/${command}`
	},
	link: (_, test) => test.link,
}

/** The old way, which also works without HTTPS. */
function copy(content) {
	document.oncopy = (event) => {
		event.preventDefault()
		event.clipboardData.setData("text/plain", content)
	}
	document.execCommand("copy")
	document.oncopy = null
	update({copied: content, said: "Copied"})
	setTimeout(() => update({copied: ""}), 2 * SECOND)
}

function copyButton(label, look, content) {
	const said = state.copied && state.copied === content() ? "Copied" : label
	return h(`button.${look}`, {type: "button", key: label, onclick: () => copy(content())}, said)
}

// The page

const state = {fault: "", invalid: false, said: "", copied: "", tests: [], limits: new Map(), running: null}
const update = (more = {}) => Object.assign(state, more, {changed: true})
const form = $("form")

/** What was pasted without what is not its host: scheme, user, port, path, quotes, a comma at the end. */
function hostOf(pasted) {
	const bare = pasted.trim().replace(/^["'<‹“„«\s]+|["'>›”“»,;\s]+$/g, "")
	if (/^[^/]+\/\d+$/.test(bare)) return bare // a network, which the server refuses in its own words
	return /^(?:\w+:?\/\/)?(?:[^/@]*@)?(\[[^\]]*\]|[\da-f]*:[\da-f:.]+|[^/:?#]+)/i.exec(bare)?.[1] ?? bare
}

function query() {
	const {command, version, target, at} = Object.fromEntries(new FormData(form))
	const tool = TOOLS.find(({id}) => id === command)
	const places = at === "all" ? PLACES : [PLACES[at] ?? PLACES[0]]
	const host = tool.kind === "speed" ? "" : hostOf(target)
	const parts = {command, target: host, version: +version && version, at: places[1] ? "all" : at > 0 && places[0].name}
	const link = `${PLACES[0].url}?${new URLSearchParams(Object.entries(parts).filter(([, value]) => value))}`
	return {tool, places, version, target: host, link}
}

const myVersion = () => (PLACES[0].info?.your_ip?.includes(":") ? 6 : 4)

/** The version of an address; for a name the visitor's own first, then the other. */
function commandsFor({tool: {id, versions}, target, version}) {
	const literal = /^\[?[\da-f]*:/i.test(target) ? 6 : /^\d+(\.\d+){3}$/.test(target) ? 4 : 0
	const wanted = literal || +version
	const order = (wanted ? [wanted] : [myVersion(), 10 - myVersion()]).filter((each) => versions.includes(each))
	return (order[0] ? order : versions.slice(0, 1)).map((each) => (each === 6 ? `${id}6` : id))
}

const noAnswer = ({name}) => `No answer from ${name}: it is down or cannot be reached.`

/** What is known of a place before a test, and whether it keeps the test from being run. */
function warning({name, down, health, info}, command, {id, tool, title}) {
	const version = command === id ? 4 : 6
	if (down) return {text: noAnswer({name})}
	if (list(health?.missing).includes(tool)) return {text: `${title} cannot run at ${name} now.`, blocks: true}
	if (!tool || info?.[`looking_glass_ipv${version}`] || !info?.[`looking_glass_ipv${10 - version}`]) return {text: ""}
	return {text: `${name} has no IPv${version} address of its own: this test may fail there.`}
}

/** What the form has to say, whether that keeps the test from being run, and until when. */
function message(asked) {
	const {tool, places} = asked
	const [place, more] = places
	const [command] = commandsFor(asked)
	const {until, text} = state.limits.get(place.url + command) ?? {}
	if (more && tool.kind === "speed") return {text: "Choose one place: a speed test fills one line.", blocks: true}
	if (!more && until > Date.now()) return {text, until, blocks: true}
	if (state.fault || more) return {text: state.fault}
	return warning(place, command, tool)
}

function drawTest(test) {
	const {runs, id, tool} = test
	const {head, sub, bad} = verdictOfAll(test)
	const title = titleOf(test, runs[1] ? "all places" : runs[0].place.name)
	const [done, scale] = [!runs.some(isRunning), scaleOf(test)]
	const tab = `${done ? head : "…"} · ${title}`
	if (test === state.tests[0] && document.title !== tab) document.title = tab
	const when = `${runs[1] || tool.kind === "speed" ? "" : `${runs[0].address} · `}${runs[0].time.slice(11, 19)} UTC`
	const copyOf = (name) => [...new Set(runs.map((run) => COPIES[name](run, test)))].join("\n")
	const copies = Object.keys(COPIES).map((name) => copyButton(name, "link", () => copyOf(name)))
	const summary = h("summary", h("b", title), " ", h("small", when), h(bad ? "h2.bad" : "h2", head))
	const explained = runs[1] || !runs[0].hops[0] ? h("p.dim", sub) : h("p.dim.sub", sub || "\u00a0")
	const result = [explained, runs[1] ? drawAll(test, scale) : drawRun(runs[0], scale)]
	const foot = done && h("p.row", h("small", "Copy as"), copies)
	return h(`details.card.${tool.kind}`, {key: id}, summary, result, foot)
}

const radio = (name, value, look, label) =>
	h("label", {key: value}, h("input", {type: "radio", name, value}), h(`span.${look}`, label))
const anchor = (name, url) => (/^https?:/i.test(url) ? h("a", {key: name, href: url}, name) : name)

function drawPlace({info = {}, name}) {
	const addresses = [info.looking_glass_ipv4, info.looking_glass_ipv6].filter(Boolean)
	const tests = addresses.map((address) => copyButton(address, "copy", () => address))
	const where = [anchor(info.facility, info.facility_url), info.map_url && anchor("Map", info.map_url)]
	const about = h("div.row.dim", where, tests[0] && h("span.row.end", "Test addresses", tests))
	fill($("place"), h("h1", info.location || name), about)
}

function drawChoices() {
	const option = (value, label) => h("option", {key: value, value}, label)
	const named = ({name, down}) => (down ? [h("s", name), h("span.hush", " is down")] : name)
	const chips = [...PLACES.map((place, i) => radio("at", i, "chip", named(place))), radio("at", "all", "chip", "all")]
	const tabs = TOOLS.map(({id, title}) => radio("command", id, "", title))
	const mine = PLACES[0].info?.your_ip
	function fillIn() {
		form.target.value = mine
		form.oninput()
	}
	fill($("tabs"), tabs)
	fill(form.version, [option("auto", `Auto (IPv${myVersion()})`), option(4, "IPv4"), option(6, "IPv6")])
	fill($("from"), PLACES[1] && [h("small", "From"), h("fieldset.row", {"aria-label": "From"}, chips)])
	fill($("mine"), mine && h("button.link", {type: "button", onclick: fillIn}, `My address, ${mine}`))
}

function draw() {
	state.changed = false
	drawChoices()
	const asked = query()
	const {tool, places} = asked
	const [place] = places
	const {text, blocks, until} = message(asked)
	const [speed, busy] = [tool.kind === "speed", state.running]
	const wait = until ? ` in ${waitInWords(until)}` : ""
	const files = [...SIZES].reverse().map((path) => [" ", h("a", {key: path, href: place.url + path}, path.slice(10))])
	const [newest, ...earlier] = state.tests
	drawPlace(place)
	dress($("ask"), {hidden: speed})
	dress(form.version, {hidden: speed || !TOOLS.some(({versions}) => versions[1])})
	dress($("mine"), {hidden: speed})
	dress(form.target, {required: !speed, "aria-invalid": state.invalid})
	dress($("run"), {class: busy && "stop", type: busy ? "button" : "submit", "aria-disabled": !busy && blocks})
	fill($("run"), busy ? "Stop" : `${speed ? "Start speed test" : `Run ${tool.title}`}${wait}`)
	fill($("fault"), text)
	fill($("status"), state.said)
	fill($("offer"), speed && ["18 s, up to 2 GB at 1 Gbit/s. Files:", files, h("code", COPIES.curl({place, tool}))])
	dress($("about"), {hidden: newest})
	fill($("results"), newest && drawTest(newest), earlier[0] && h("h2", "Earlier"), earlier.map(drawTest))
}

/** Follows one run of a test to its end: a name in Auto has a second command. */
async function follow(test, i) {
	const {tool, target, runs, control} = test
	const faults = []
	const change = (more) => {
		runs[i] = {...runs[i], ...more}
		if (runs[i].address) show(test)
		update()
	}
	const emit = (event) => change(reduce(runs[i], event))
	for (const command of commandsFor(test)) {
		runs[i] = newRun(runs[i].place, tool, target, command)
		const work = tool.kind === "speed" ? speedTest : diagnose
		const fault = await work(runs[i], control.signal, emit).catch((error) => error)
		if (!fault) return
		faults.unshift(fault)
		if (fault.status !== 422) break
	}
	if (control.signal.aborted && !control.signal.reason?.lost) return change({status: "stopped"})
	change({status: "failed", ...failure(runs[i], faults)})
}

/** Why a run failed, in words, and until when it would again. */
function failure({place, command, address, tool, target}, [{message, status, until, lost}, first]) {
	let error = status ? message : `The page failed: ${message}`
	if (lost) error = address ? `The connection to ${place.name} was lost.` : noAnswer(place)
	if (status === 404) error = `${place.name} does not offer ${tool.title}.`
	if (status === 422 && first && first.message !== message)
		error = `${target} has no IPv4 and no IPv6 address that may be measured here: check the name.`
	if (!(until > Date.now())) return {error, refused: status}
	state.limits.set(place.url + command, {until, text: error})
	return {error, refused: status, until}
}

function show(test) {
	if (state.tests.includes(test)) return
	state.tests = [test, ...state.tests].slice(0, 6) // five earlier ones stay
	draw()
	const card = $("results").firstChild
	card.open = true
	if (card.getBoundingClientRect().top > innerHeight / 2) card.scrollIntoView()
}

async function begin(asked) {
	const runs = asked.places.map((place) => newRun(place, asked.tool, asked.target))
	const test = {...asked, runs, control: new AbortController(), id: Math.random()}
	const patience = setTimeout(() => test.control.abort({lost: true}), PATIENCE)
	update({running: test, fault: "", invalid: false, said: `${asked.tool.title} is running`})
	PLACES.forEach(check)
	await Promise.all(runs.map((_, i) => follow(test, i)))
	clearTimeout(patience)
	update({running: null})
	const {refused, error, until, phases} = runs.find((run) => run.refused === 422) ?? runs[0]
	if (runs[1] && refused !== 422) show(test)
	// A test that was refused is not shown, and leaves what was there before.
	if (refused && !runs[1] && !phases.upload) state.tests = state.tests.filter((each) => each !== test)
	const {head, sub} = verdictOfAll(test)
	if (state.tests.includes(test)) return update({said: sentences(`${head}.`, sub)})
	update({fault: until ? "" : error, invalid: refused === 422, said: ""})
	if (state.invalid) form.target.focus()
}

async function check(place) {
	const [health, info] = await Promise.all(["health", "network/info"].map((path) => ask(place, path))).catch(() => [])
	const known = Object.entries(info ?? place.info ?? {}).map(([key, value]) => [key, text(value)])
	Object.assign(place, {health, info: Object.fromEntries(known), down: !info})
	update()
}

const remember = () => history.replaceState(null, "", query().link)

function submit(event) {
	event.preventDefault()
	const asked = query()
	if (state.running || message(asked).blocks) return
	form.target.value = asked.target || form.target.value
	remember()
	begin(asked)
	draw()
}

/** The form is filled from `/?command=…&target=…&version=…&at=…`; `command` may name the version too. */
function fillForm({command = "", target = "", version, at}) {
	const known = TOOLS.find(({id}) => id === command) ?? TOOLS.find(({id}) => `${id}6` === command)
	form.command.value = (known ?? TOOLS[0]).id
	form.target.value = target
	form.version.value = known && known.id !== command ? 6 : /^[46]$/.test(version) ? version : "auto"
	const named = PLACES.findIndex(({name}) => name === at)
	if (PLACES[1]) form.at.value = at === "all" ? at : Math.max(0, named)
}

function start() {
	for (const place of PLACES) place.url = new URL(place.url ? `${place.url}/` : "./", document.baseURI).href
	const bare = ({url}) => url.replace(/^https?:|[?#].*/g, "")
	PLACES.splice(1, PLACES.length, ...PLACES.slice(1).filter((place) => bare(place) !== bare(PLACES[0])))
	drawChoices()
	fillForm(Object.fromEntries(new URLSearchParams(location.search)))
	form.oninput = () => update({fault: "", invalid: false})
	form.onchange = remember
	form.onsubmit = submit
	$("run").onclick = (event) => {
		if (event.detail > 1)
			event.preventDefault() // a double click is one
		else state.running?.control.abort()
	}
	document.onkeydown = ({key}) => {
		if (key === "Escape") state.running?.control.abort()
	}
	PLACES.forEach(check)
	setInterval(() => state.changed && draw(), SECOND / 20)
	setInterval(() => state.limits.size && update(), SECOND) // the countdown
	draw()
	$("plain").remove()
}

start()
"""  # noqa: E501


if __name__ == "__main__":
    main()
