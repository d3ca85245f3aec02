# SPDX-License-Identifier: MIT
"""A looking glass: streamed ping, traceroute and mtr from this server, and speed tests.

`python lg.py` starts the server; `python lg.py health` prints the health of the running one.
Each chapter uses only what is above it.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import http.client
import ipaddress
import json
import logging
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
from functools import cache, lru_cache, partial
from hashlib import sha256
from html import escape
from importlib.util import find_spec
from inspect import cleandoc
from io import StringIO
from itertools import islice, pairwise
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Literal, NamedTuple, NotRequired, TypedDict, TypeVar, cast
from urllib.parse import parse_qs
from weakref import WeakValueDictionary

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
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

VERSION = "1.0.0"

log = logging.getLogger("lg")

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
Headers = Mapping[str, str]
T = TypeVar("T")


# ---- settings ----------------------------------------------------------------------------------------------

# In the notation of EXTRA_COMMANDS: NAME is the command for IPv4, NAME6 the one for IPv6.
BUILT_IN = {
    "ping": "ping -{version} -n -O -c 15 -W 2 -s 56 {address}",
    "traceroute": "traceroute -{version} -q 3 -w 3,3,10 -m 30 {address}",
    "mtr": "mtr -{version} --raw -e -c 10 -i 1 -G 1 -Z 2 -m 30 {address}",
}
BUILT_IN_COMMANDS = [name + suffix for name in BUILT_IN for suffix in ("", "6")]
LOGO_BYTES = 2**16  # the logo is embedded in every page
BOOLEANS = {"true": True, "yes": True, "on": True, "1": True}
BOOLEANS |= {"false": False, "no": False, "off": False, "0": False}
# As a content security policy writes it: without a syntax for IPv6 addresses.
ORIGIN = re.compile(r"https?://[A-Za-z0-9*._-]+(?::\d+)?", re.ASCII)
LOCATION_URL = re.compile(rf"({ORIGIN.pattern}(?:/[A-Za-z0-9._~%-]+)*)/?", re.ASCII)
LINK_URL = re.compile(r"((?:https?://|mailto:)[^\s<>\"]+)")
CORS_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#\s]+")
NODES = r"(?:.*@)?[^,@/]+:\d{1,5}(?:,[^,@/]+:\d{1,5})*/?"
# memcached has no moving window.
STORE = re.compile(rf"(memory|redis|valkey|mongodb)(?:\+cluster://{NODES}|s?(?:\+(?!cluster)[a-z]+)?://.*)")
STORE_PACKAGES = {"memory": "limits", "redis": "redis", "valkey": "valkey", "mongodb": "pymongo"}
SVG = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:svg|[?!].*?<svg)\b", re.DOTALL)

Rates = tuple[limits.RateLimitItem, ...]
Link = dict[str, str]  # with the keys name and url
Parser = Callable[[str], T]  # raises ValueError("expected …") for a text that cannot be used


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


def choice(*options: str) -> Parser[str]:
    def parse(value: str) -> str:
        if value.lower() not in options:
            raise ValueError(f"expected {', '.join(options[:-1])} or {options[-1]}, not {value!r}")
        return value.lower()

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


def network(value: str) -> IPNetwork:
    with suppress(ValueError):
        return ipaddress.ip_network("" if "%" in value else value)  # a zone matches no client and no target
    hint = ""
    with suppress(ValueError):
        hint = f": did you mean {ipaddress.ip_network(value.partition('%')[0], strict=False)}?"
    raise ValueError(f"expected an address or a network like 192.0.2.0/24, not {value!r}{hint}")


def proxy(value: str) -> IPNetwork:
    if value == "*" or not (parsed := network(value)).prefixlen:
        raise ValueError(f"expected proxies' addresses, not {value!r}: any client could forge its address")
    return parsed


def rates(value: str) -> Rates:
    with suppress(ValueError):
        parsed = () if value.lower() == "off" else tuple(limits.parse_many(value))
        if all(rate.amount for rate in parsed):
            return parsed
    raise ValueError("expected rates like 2/minute;30/hour, or off")


def storage_uri(value: str) -> str:
    if not (match := STORE.fullmatch(value)):
        raise ValueError("expected a URI of memory, redis, valkey or mongodb, like redis://HOST:6379")
    if not find_spec(package := STORE_PACKAGES[match[1]]):
        raise ValueError(f"expected the Python package {package}: pip install {package}")
    return value


def json_links(url_pattern: re.Pattern[str], example: str) -> Parser[tuple[Link, ...]]:
    """A JSON list of objects with `name` and `url`; other keys are ignored.

    `url_pattern` matches a whole URL, of which its group 1 is kept.
    """

    def parse_entry(entry: Any) -> Link:
        with suppress(LookupError, TypeError, ValueError, AttributeError):
            if entry["name"].strip().encode() and (url := url_pattern.fullmatch(entry["url"])):
                return {"name": entry["name"], "url": url[1]}
        raise ValueError(f"expected entries like {example}, not {json.dumps(entry)}")

    def parse(value: str) -> tuple[Link, ...]:
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
    taken = {*BUILT_IN_COMMANDS, "speedtest"}  # speedtest is a tab of the page
    for name, line in pairs:
        if not re.fullmatch("[a-z0-9-]+", name):
            raise ValueError(f"expected names of the characters a-z, 0-9 and -, not {name!r}")
        if taken & {name, f"{name}6"}:
            raise ValueError(f"expected another name than {name!r}: it or {name}6 is taken")
        with suppress(AttributeError, ValueError):
            commands[name] = tuple(shlex.split(line))
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
    except OSError as error:
        raise ValueError(f"expected a file that can be read ({error.strerror})") from None
    kind = "png" if image.startswith(b"\x89PNG\r\n\x1a\n") else "svg+xml" if SVG.match(image) else ""
    if not kind or len(image) > LOGO_BYTES:
        raise ValueError(f"expected an SVG or PNG file of at most {LOGO_BYTES // 1024} KiB")
    return f"data:image/{kind};base64,{b64encode(image).decode()}"


def setting(default: str, parse: Parser[T]) -> T:
    """A row of Settings. An empty value means the default, unless `parse` accepts it."""
    row: T = field(metadata={"default": default, "parse": parse})
    return row


words = comma_separated(str)
networks = comma_separated(network)
origins = comma_separated(matching(ORIGIN, "origins like https://www.example.com"))
cors_origins = comma_separated(matching(CORS_ORIGIN, "* or origins like https://www.example.com"))
built_in_commands = comma_separated(choice(*BUILT_IN_COMMANDS))
links = json_links(LINK_URL, '{"name": "Terms", "url": "https://www.example.com/terms"}')
locations = json_links(LOCATION_URL, '{"name": "Amsterdam", "url": "https://ams-lg.example.com"}')


@dataclass(frozen=True)
class Settings:
    """What an operator chooses, with its default; .env.example says what each does."""

    HOST: str = setting("", str)
    PORT: int = setting("8000", integer(1, 65535))
    LOG_LEVEL: str = setting("info", choice("critical", "error", "warning", "info", "debug"))
    FORWARDED_ALLOW_IPS: tuple[IPNetwork, ...] = setting("127.0.0.1,::1", comma_separated(proxy))
    NETWORK_LOCATION: str = setting("Unknown Location", str)
    NETWORK_FACILITY: str = setting("Unknown Facility", str)
    NETWORK_MAP_URL: str = setting("", str)
    NETWORK_FACILITY_URL: str = setting("", str)
    NETWORK_IPV4: str = setting("", str)
    NETWORK_IPV6: str = setting("", str)
    CORS_ORIGINS: tuple[str, ...] = setting("*", cors_origins)
    CORS_METHODS: tuple[str, ...] = setting("*", words)
    CORS_HEADERS: tuple[str, ...] = setting("*", words)
    CORS_CREDENTIALS: bool = setting("false", boolean)
    RATE_LIMIT_DIAGNOSTICS: Rates = setting("2/minute", rates)
    RATE_LIMIT_SPEEDTEST: Rates = setting("2/minute", rates)
    RATE_LIMIT_SPEEDTEST_10G: Rates = setting("1/minute", rates)
    RATE_LIMIT_LOOKUPS: Rates = setting("20/minute", rates)
    RATE_LIMIT_EXEMPT: tuple[IPNetwork, ...] = setting("", networks)
    RATE_LIMIT_STORAGE_URI: str = setting("memory://", storage_uri)
    MAX_DIAGNOSTICS: int = setting("20", integer(1, 10000))
    MAX_DIAGNOSTICS_PER_CLIENT: int = setting("4", integer(1, 10000))
    MAX_SPEEDTESTS: int = setting("20", integer(0, 10000))
    MAX_SPEEDTESTS_PER_CLIENT: int = setting("4", integer(1, 10000))
    DIAGNOSTIC_TIMEOUT: int = setting("60", integer(1, 3600))
    TARGET_ALLOW: tuple[IPNetwork, ...] = setting("127.0.0.0/8,::1/128", networks)
    TARGET_DENY: tuple[IPNetwork, ...] = setting("", networks)
    COMMANDS: tuple[str, ...] = setting(",".join(BUILT_IN_COMMANDS), built_in_commands)
    EXTRA_COMMANDS: Mapping[str, tuple[str, ...]] = setting("{}", extra_commands)
    ASN_DATABASE: str = setting("", str)
    METRICS_ALLOW_IPS: tuple[IPNetwork, ...] = setting("127.0.0.1,::1", networks)
    PAGE_TITLE: str = setting("", str)
    PAGE_LOGO: str = setting("", logo)
    PAGE_COLOR: str = setting("", matching("(?:#[0-9A-Fa-f]{6})?", "a colour like #0a7cff"))
    PAGE_LINKS: tuple[Link, ...] = setting("", links)
    LOCATIONS: tuple[Link, ...] = setting("[]", locations)
    FRAME_ANCESTORS: tuple[str, ...] = setting("", origins)


SETTING_NAMES = [row.name for row in fields(Settings)]


def settings_error(reason: str, **values: object) -> SystemExit:
    """The one line that is printed when these settings stop the start."""
    named = ", ".join(f"{name}={str(value)!r}" for name, value in values.items())
    return SystemExit(f"lg.py: {named} cannot be used: {reason}")


def load_settings(environment: Mapping[str, str | None]) -> Settings:
    """Settings from the texts in `environment`. Raises SystemExit for the first that cannot be used."""
    values = {}
    for row in fields(Settings):
        default, parse = row.metadata["default"], row.metadata["parse"]
        value = (environment.get(row.name, default) or "").strip()
        if quoted := re.fullmatch(r"(['\"])(.*)\1", value, re.DOTALL):  # `docker run --env-file` keeps quotes
            value = quoted[2]
        try:
            value.encode()  # raises for bytes that are not UTF-8
            values[row.name] = parse(value)
        except UnicodeEncodeError:
            raise settings_error("expected UTF-8", **{row.name: value}) from None
        except ValueError as error:
            if value:
                raise settings_error(str(error), **{row.name: value}) from None
            values[row.name] = parse(default)
    return Settings(**values)


def read_env_file(path: Path) -> Mapping[str, str | None]:
    """The settings in a `.env` file, if there is one. Raises SystemExit where it cannot be used."""
    try:
        content = path.read_text("utf-8-sig")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeError) as error:
        raise SystemExit(f"lg.py: {path} cannot be used: expected a text file ({error})") from None
    for binding in parse_stream(StringIO(content)):
        if binding.error or (binding.key and binding.value is None):
            line = f"{path}, line {binding.original.line}"
            raise SystemExit(f"lg.py: {line}: expected NAME=value, not {binding.original.string.strip()!r}")
    return dotenv_values(stream=StringIO(content))


def unknown_settings(names: Iterable[str]) -> Iterator[str]:
    """A line for each name that is no setting, with the setting nearest to it."""
    for name in names:
        if name not in SETTING_NAMES:
            nearest = get_close_matches(name.upper(), SETTING_NAMES, 1, 0.5)
            yield f"{name} in .env is not a setting" + "".join(f": did you mean {word}?" for word in nearest)


def parse_command_line(arguments: Sequence[str]) -> str:
    """What to do: "serve" or "health". --help, --version and mistakes end the program here."""
    parser = argparse.ArgumentParser(
        "lg.py",
        description="Serve a looking glass: ping, traceroute, mtr and speed tests over HTTP.",
        epilog="Settings come from the environment and from .env beside lg.py: see .env.example.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lg.py {VERSION}")
    parser.add_argument("command", nargs="?", choices=["health"], help="health asks the running server")
    return parser.parse_args(arguments).command or "serve"


# Before the settings are read, so that --help works whatever they are.
ACTION = parse_command_line(sys.argv[1:]) if __name__ == "__main__" else ""
ENV_FILE = read_env_file(Path(__file__).with_name(".env"))
SETTINGS = load_settings({**ENV_FILE, **os.environ})


# ---- targets -----------------------------------------------------------------------------------------------

RESOLVE_SECONDS = 5
RETRY_LATER = {"Retry-After": "5"}  # where no slot is free: commands end at different times, after about 15 s
# Limits on the threads of the whole process, abandoned ones included: a resolver may take minutes to give up.
# Lookups stop first, which leaves threads for the shared store.
LOOKUP_THREADS, STORE_THREADS = 100, 200

IPV4 = re.compile(r"(?:(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)(?:\.(?!$)|$)){4}", re.ASCII)
IPV6 = re.compile(r"\[[0-9A-Fa-f:.]{2,45}\]|[0-9A-Fa-f:.]{2,45}")
LABEL = r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)"
# A last label that makes resolvers read a name as an IPv4 address.
NUMERIC = r"(?:[0-9]+|0[xX][0-9A-Fa-f]*)\.?$"
NAME = re.compile(rf"(?=.{{1,253}}\.?$)(?!(?:.*\.)?{NUMERIC}){LABEL}(?:\.{LABEL})*\.?")

# Longest prefix wins, as in a routing table. From the IANA Special-Purpose Address Registries (RFC 6890)
# with multicast, the IPv6 global unicast space (RFC 4291) and the former 6to4 relays (RFC 7526) added.
PUBLIC = {
    "0.0.0.0/0": True,
    "0.0.0.0/8": False,  # this network
    "10.0.0.0/8": False,  # private
    "100.64.0.0/10": False,  # carrier-grade NAT
    "127.0.0.0/8": False,  # loopback
    "169.254.0.0/16": False,  # link-local
    "172.16.0.0/12": False,  # private
    "192.0.0.0/24": False,  # protocol assignments, of which
    "192.0.0.9/32": True,  # Port Control Protocol anycast
    "192.0.0.10/32": True,  # TURN anycast
    "192.0.2.0/24": False,  # documentation
    "192.88.99.0/24": False,  # 6to4 relays
    "192.168.0.0/16": False,  # private
    "198.18.0.0/15": False,  # benchmarking
    "198.51.100.0/24": False,  # documentation
    "203.0.113.0/24": False,  # documentation
    "224.0.0.0/4": False,  # multicast
    "240.0.0.0/4": False,  # reserved, broadcast
    "::/0": False,
    "2000::/3": True,  # global unicast, of which
    "2001::/23": False,  # protocol assignments (Teredo, benchmarking, ORCHID), of which
    "2001:1::1/128": True,  # Port Control Protocol anycast
    "2001:1::2/128": True,  # TURN anycast
    "2001:1::3/128": True,  # DNS-SD service registration anycast
    "2001:3::/32": True,  # AMT
    "2001:4:112::/48": True,  # AS112
    "2001:20::/28": True,  # ORCHIDv2
    "2001:30::/28": True,  # drone remote identification
    "2001:db8::/32": False,  # documentation
    "2002::/16": False,  # 6to4
    "3fff::/20": False,  # documentation
}
ROUTES = sorted(
    ((ipaddress.ip_network(prefix), public) for prefix, public in PUBLIC.items()),
    key=lambda route: -route[0].prefixlen,
)
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052
COMPATIBLE = ipaddress.IPv6Network("::/96")  # RFC 4291, deprecated


class RequestError(Exception):
    """A refused request: status, JSON body and headers of the answer, and the reason for the metrics."""

    def __init__(
        self, status: int, body: Mapping[str, object], headers: Headers | None = None, reason: str = "invalid"
    ) -> None:
        super().__init__(status, body)
        self.status, self.body, self.headers, self.reason = status, body, dict(headers or {}), reason


def validation_error(
    message: str, value: object, kind: str = "value_error", reason: str = "invalid"
) -> RequestError:
    """422 for the field `target`, in FastAPI's shape; `message` tells a person what to do."""
    error = {"type": kind, "loc": ["body", "target"], "msg": message, "input": value}
    return RequestError(422, {"detail": [error]}, reason=reason)


def parse_form(text: str) -> dict[str, str | list[str]]:
    """The fields of a URL-encoded form; a field that is sent several times is a list."""
    form = parse_qs(text, keep_blank_values=True)
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
    return target


def parse_target(text: str) -> IPAddress | str:
    """The address that `text` is, or the host name in ASCII. Raises RequestError for anything else.

    `[2001:db8::1]` and `2001:db8::1` are the same; `bücher.example` becomes `xn--bcher-kva.example` (UTS 46).
    """
    if IPV4.fullmatch(text):
        return ipaddress.IPv4Address(text)
    if ":" in text and IPV6.fullmatch(text):
        with suppress(ValueError):
            return ipaddress.IPv6Address(text.strip("[]"))
    name = text
    if not text.isascii() and len(text) <= 253:
        with suppress(UnicodeError):
            name = idna.encode(text, uts46=True).decode("ascii")
    if not NAME.fullmatch(name):
        expected = (
            "an IPv4 address like 192.0.2.1, an IPv6 address like 2001:db8::1 or a name like example.com"
        )
        raise validation_error(f"Not a target: use {expected}", text)
    return name


def is_public(address: IPAddress) -> bool:
    """Whether this is a public unicast address, or the NAT64 form of one."""
    if address in NAT64:
        return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return next(public for network, public in ROUTES if address in network)


def embedded_ipv4(address: IPAddress) -> list[IPAddress]:
    """The IPv4 addresses inside an IPv6 address: mapped, compatible, NAT64, 6to4, Teredo."""
    if address.version == 4:
        return []
    low = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    embedded = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    embedded += [low for network in (NAT64, COMPATIBLE) if address in network and int(address) > 1]
    return [each for each in embedded if each]


def is_allowed(address: IPAddress) -> bool:
    """Whether this address may be measured: public or in TARGET_ALLOW, and not in TARGET_DENY."""
    candidates = (address, *embedded_ipv4(address))
    if any(each in network for each in candidates for network in SETTINGS.TARGET_DENY):
        return False
    return is_public(address) or any(address in network for network in SETTINGS.TARGET_ALLOW)


SHUTTING_DOWN = asyncio.Event()  # set when the server begins to stop: nothing is started any more


def shutting_down() -> RequestError:
    """The answer to a request that would start something while the server stops."""
    body = {"error": "The server is shutting down: try again in a moment"}
    return RequestError(503, body, RETRY_LATER, "unavailable")


async def run_in_thread(function: Callable[[], T], seconds: float, threads: int) -> T:
    """What a blocking function returns, called in a thread of its own.

    Raises TimeoutError after `seconds`, RuntimeError beyond `threads`, RequestError when the server stops.
    asyncio's pool has few threads, which slow names or a dead store would all occupy, and the loop waits for
    them when it closes. A thread that is late here is abandoned.
    """
    if threading.active_count() > threads:
        raise RuntimeError("too many threads")
    outcome: Future[T] = Future()
    outcome.set_running_or_notify_cancel()  # so that nothing but the thread completes it

    def call() -> None:
        try:
            outcome.set_result(function())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    result, stop = asyncio.wrap_future(outcome), asyncio.create_task(SHUTTING_DOWN.wait())
    try:
        await asyncio.wait((result, stop), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if result.done():
            return result.result()
        raise shutting_down() if stop.done() else TimeoutError()
    finally:
        result.cancel()
        stop.cancel()


async def resolve(target: IPAddress | str, version: int) -> IPAddress:
    """The address to measure: of a name, the first of this version that is allowed. Raises RequestError."""
    if not isinstance(target, str):
        if not is_allowed(target):
            message = f"{target} may not be measured here: use a different, public address"
            raise validation_error(message, str(target), reason="target")
        return target
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    lookup = partial(socket.getaddrinfo, target.encode("ascii"), None, family, socket.SOCK_STREAM)
    # The same whether there is no address or none is allowed: otherwise anybody could list internal names.
    message = f"{target} has no IPv{version} address that may be measured here: check the name"
    try:
        for *_, sockaddr in await run_in_thread(lookup, RESOLVE_SECONDS, LOOKUP_THREADS):
            address = ipaddress.ip_address(str(sockaddr[0]).partition("%")[0])
            if is_allowed(address):
                return address
    except TimeoutError:
        message = f"{target} was not resolved within {RESOLVE_SECONDS} s: try again, or use an address"
    except (OSError, RuntimeError) as error:
        if getattr(error, "errno", None) not in (socket.EAI_NONAME, socket.EAI_NODATA):
            message = f"{target} cannot be resolved now: try again, or use an address"
    raise validation_error(message, target, reason="target")


# ---- limits ------------------------------------------------------------------------------------------------

STORE_SECONDS = 2  # time limit of a query to the shared store
STORE_RETRY_SECONDS = 30  # pause before a store that has failed is queried again
SWEEP_SECONDS = 60  # how often clients without a recent request are removed from memory
LOG_REPEAT_SECONDS = 60  # one refusal of each client, and one failure of each tool, is logged in this time
MAX_LOGGED_CLIENTS = 1000  # clients whose refusals are logged in this time
RATE_HEADERS = {  # with what they mean
    "X-RateLimit-Limit": "Requests allowed.",
    "X-RateLimit-Remaining": "Requests left.",
    "X-RateLimit-Reset": "When one more is allowed, in epoch seconds.",
}


def rate_limit_key(client: IPAddress) -> str:
    """The key under which a client is limited: its IPv4 address, or the /64 of its IPv6 address."""
    return str(client) if client.version == 4 else str(ipaddress.IPv6Network((client, 64), strict=False))


def describe_rates(rates: Rates) -> str:
    """Rates in English: `2 per minute and 30 per 2 hours`."""
    texts = [f"{rate}s" if rate.multiples > 1 else f"{rate}".replace(" 1 ", " ") for rate in rates]
    return " and ".join(texts) or "none"


class Slots:
    """Limits how many run at once, in all and for each client; `what` names them in errors."""

    def __init__(self, what: str, total: int, per_client: int) -> None:
        self.what, self.total, self.per_client = what, total, per_client
        self.taken: Counter[str] = Counter()

    def __str__(self) -> str:
        return f"{self.total} at once, {self.per_client} per client"

    @contextmanager
    def take(self, client: str) -> Iterator[None]:
        """Hold a slot. Raises RequestError where none is free."""
        if SHUTTING_DOWN.is_set():
            raise shutting_down()
        if self.taken[client] >= self.per_client:
            message = f"You may run {self.per_client} {self.what} at once: wait until one has ended"
            raise RequestError(429, {"error": message}, RETRY_LATER, "client slots")
        if self.taken.total() >= self.total:
            message = f"All {self.total} slots for {self.what} are taken: try again soon"
            raise RequestError(503, {"error": message}, RETRY_LATER, "server slots")
        self.taken[client] += 1
        try:
            yield
        finally:
            self.taken -= Counter((client,))  # which also removes the key of a client that has none left


DIAGNOSTICS = Slots("commands", SETTINGS.MAX_DIAGNOSTICS, SETTINGS.MAX_DIAGNOSTICS_PER_CLIENT)
SPEEDTESTS = Slots("speed tests", SETTINGS.MAX_SPEEDTESTS, SETTINGS.MAX_SPEEDTESTS_PER_CLIENT)


def count(limiter: MovingWindowRateLimiter, rates: Rates, consume: bool, *key: str) -> Headers:
    """Consume one of each rate, or only test them; returns the headers of the tightest.

    Raises RequestError (429), and consumes nothing, where a rate is exhausted.
    """
    exhausted = [rate for rate in rates if not limiter.test(rate, *key)]
    if consume and not exhausted:  # each hit succeeds, unless another server with the same store was faster
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


class Limits:
    """Counts requests in moving windows: in a shared store or, without one or while it fails, in memory.

    The storages are the synchronous ones of `limits`: every URI works there, and memory takes microseconds.
    """

    def __init__(self, uri: str) -> None:
        """Raises SystemExit for a URI that cannot be used."""
        self.entries = MemoryStorage()
        self.memory = MovingWindowRateLimiter(self.entries)
        self.shared: Callable[[], MovingWindowRateLimiter] | None = None
        self.retry_at = 0.0  # when a store that failed is queried again; 0 while it answers
        self.swept = 0.0
        if uri.startswith("memory:"):
            return
        names = ("socket_timeout", "socket_connect_timeout") if uri.startswith(("redis", "valkey")) else ()
        open_store = partial(storage_from_string, uri, **dict.fromkeys(names, STORE_SECONDS))
        self.shared = cache(lambda: MovingWindowRateLimiter(open_store()))
        try:
            if "+cluster:" not in uri:  # whose client connects at once, and fails while the cluster is down
                self.shared()
        except Exception as error:  # each client library has its own
            raise settings_error(str(error) or repr(error), RATE_LIMIT_STORAGE_URI=uri) from None

    async def count(self, rates: Rates, name: str, client: IPAddress, consume: bool = True) -> Headers:
        """The headers for a request of this client, which is counted if `consume`. Raises RequestError."""
        if not rates or any(client in network for network in SETTINGS.RATE_LIMIT_EXEMPT):
            return {}
        self.sweep()
        arguments = (rates, consume, name, rate_limit_key(client))
        if (shared := self.shared) and time.monotonic() >= self.retry_at:
            with suppress(ConnectionError):
                return await self.ask_shared(lambda: count(shared(), *arguments))
        try:
            return count(self.memory, *arguments)
        except RuntimeError:  # the storage starts a thread that removes expired entries
            message = "The server has no thread left: try again soon"
            raise RequestError(503, {"error": message}, RETRY_LATER, "unavailable") from None

    async def ask_shared(self, operation: Callable[[], Headers]) -> Headers:
        """Raises RequestError, or ConnectionError when the store fails. Failure and recovery are logged."""
        try:
            headers = await run_in_thread(operation, STORE_SECONDS, STORE_THREADS)
        except RequestError:
            self.note_recovery()
            raise
        except Exception as error:  # each client library has its own
            if not self.retry_at:
                store = "The rate-limit store fails: limits are kept in memory until it answers"
                log.warning(store, {"error": repr(error)})
            self.retry_at = time.monotonic() + STORE_RETRY_SECONDS
            raise ConnectionError from error
        self.note_recovery()
        return headers

    async def probe(self) -> None:
        """Query the shared store at the start, so that a failure is logged before the first request."""
        if shared := self.shared:
            with suppress(ConnectionError, RequestError):
                await self.ask_shared(lambda: count(shared(), (limits.parse("1/minute"),), False, "start"))

    def note_recovery(self) -> None:
        if self.retry_at:
            log.warning("The rate-limit store answers again")
        self.retry_at = 0.0

    def sweep(self) -> None:
        """Once a minute, remove the clients whose hits have expired: `limits` keeps their empty lists."""
        now = time.time()
        if now < self.swept:  # the clock was set back: hits of the future would count for long
            self.entries.reset()
        elif now <= self.swept + SWEEP_SECONDS:
            return
        for key in [key for key, hits in self.entries.events.items() if not hits]:
            self.entries.clear(key)
        self.swept = now


LIMITS = Limits(SETTINGS.RATE_LIMIT_STORAGE_URI)


# Prometheus' text format knows these three escapes alone, and rejects the others of JSON.
LABEL_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def sample(name: str, **labels: str) -> str:
    """A time series in Prometheus' text format. No client chooses the value of a label."""
    pairs = ",".join(f'{label}="{value.translate(LABEL_ESCAPES)}"' for label, value in labels.items())
    return f"{name}{{{pairs}}}"


REFUSAL_REASONS = ("invalid", "target", "rate limit", "client slots", "server slots", "unavailable")
# Counters by sample. Those that are known start at 0, so that Prometheus sees their first increase.
COUNTERS: defaultdict[str, float] = defaultdict(float)
COUNTERS |= dict.fromkeys((sample("lg_refusals_total", reason=reason) for reason in REFUSAL_REASONS), 0.0)
LOGGED_REFUSALS: dict[str, float] = {}  # when a refusal of each client was last logged


def count_refusal(client: IPAddress, path: str, reason: str) -> None:
    """Count a refused request, and log it, at most once a minute for each client."""
    COUNTERS[sample("lg_refusals_total", reason=reason)] += 1
    now, key = time.monotonic(), rate_limit_key(client)
    while LOGGED_REFUSALS and (oldest := next(iter(LOGGED_REFUSALS.items())))[1] + LOG_REPEAT_SECONDS < now:
        del LOGGED_REFUSALS[oldest[0]]
    if reason != "invalid" and key not in LOGGED_REFUSALS and len(LOGGED_REFUSALS) < MAX_LOGGED_CLIENTS:
        LOGGED_REFUSALS[key] = now
        log.info("refused", {"path": path, "client": client, "reason": reason})


# ---- commands ----------------------------------------------------------------------------------------------


class Command(NamedTuple):
    """A diagnostic: its name in the API and what is run for it."""

    name: str
    argv: tuple[str, ...]  # {address} stands for the target's
    version: int  # of IP

    @property
    def tool(self) -> str:
        return Path(self.argv[0]).name

    @property
    def ok_statuses(self) -> tuple[int, ...]:
        """Exit statuses that are results rather than faults: ping's 1 means that no reply came."""
        return (0, 1) if self.tool == "ping" else (0,)

    def argv_for(self, address: IPAddress | str) -> list[str]:
        return [word.replace("{address}", str(address)) for word in self.argv]


def make_command(name: str, argv: Sequence[str], version: int) -> Command:
    words = tuple(word.replace("{version}", str(version)) for word in argv)
    return Command(f"{name}6" if version == 6 else name, words, version)


ARGVS = {name: tuple(line.split()) for name, line in BUILT_IN.items()} | dict(SETTINGS.EXTRA_COMMANDS)
COMMANDS = {
    command.name: command
    for name, argv in ARGVS.items()
    for command in (make_command(name, argv, 4), make_command(name, argv, 6))
    if name not in BUILT_IN or command.name in SETTINGS.COMMANDS
}
COUNTERS |= {sample("lg_runs_total", command=name, outcome="finished"): 0 for name in COMMANDS}
NEEDED_TOOLS = tuple(dict.fromkeys(command.argv[0] for command in COMMANDS.values()))
# Debian's packages.
PACKAGES = {
    "ping": "iputils-ping",
    "traceroute": "traceroute",
    "mtr": "mtr-tiny",
    "birdc": "bird2",
    "vtysh": "frr",
}

# Debian keeps some tools in directories that are on root's PATH only.
ENVIRONMENT = {"LC_ALL": "C", "PATH": os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"}


def check_version(target: IPAddress | str, command: Command) -> None:
    """Raises RequestError for an address of the other IP version, and names the command to use."""
    if not isinstance(target, str) and target.version != command.version:
        other = f"{command.name}6" if command.version == 4 else command.name.removesuffix("6")
        hint = f"use {other}" if other in COMMANDS else f"{command.name} is for IPv{command.version}"
        raise validation_error(f"{target} is an IPv{target.version} address: {hint}", str(target))


FORBIDDEN: set[str] = set()  # tools that were found to lack the permission to send
UNSUITABLE: set[tuple[str, float] | None] = set()  # tools that reject our options, such as BusyBox's


def find_program(tool: str) -> tuple[str, float] | None:
    """The file of a tool, and when it was changed."""
    path = shutil.which(tool, path=ENVIRONMENT["PATH"])
    return (path, Path(path).stat().st_mtime) if path else None


def missing_tools() -> list[str]:
    """The tools that are not installed, not executable or unsuitable; looked for at most once a second."""
    return find_missing_tools(int(time.monotonic()))


@lru_cache(1)
def find_missing_tools(second: int) -> list[str]:
    return [tool for tool in NEEDED_TOOLS if find_program(tool) in {None, *UNSUITABLE}]


def install_hint(tools: Sequence[str]) -> str | None:
    packages = [PACKAGES[tool] for tool in tools if tool in PACKAGES]
    return f"apt-get install {' '.join(packages)}" if packages else None


# ---- parsing what the tools print --------------------------------------------------------------------------

LINE_BYTES = 4096  # a longer line is parsed in pieces
MAX_PROBES = 1000  # upper bound for the losses taken from a summary

# A tool's output becomes events as it comes, and one result at the end. The OpenAPI schemas are made from
# these types. Results have the shape of Globalping's test results. Times are in milliseconds.

Status = Literal["finished", "failed"]


class Timing(TypedDict):
    rtt: float


class PingTiming(Timing):
    ttl: int


class Probe(TypedDict):
    """`address` where it is not the hop's, `code` where the reply has one: `!X`, `!H`, `!N`."""

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


class ResultHop(TypedDict):
    resolvedAddress: str | None
    resolvedHostname: str | None
    addresses: NotRequired[list[str]]
    timings: list[Timing]


class MtrResultHop(ResultHop):
    asn: list[int]
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


class HopEvent(TypedDict):
    """A hop and the router that answered: mtr's last, traceroute's first. `addresses` are all, if several."""

    event: Literal["hop"]
    hop: int
    address: str | None
    addresses: NotRequired[list[str]]
    hostname: str | None
    asn: list[int]
    network: str | None


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
    """A line of the tool that no other event carries in full."""

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
    asn: int | None = None
    network: str | None = None


def autonomous_system(record: object) -> AutonomousSystem:
    """From a record of GeoLite2-ASN, DB-IP or RouteViews (`autonomous_system_*`), or of IPinfo."""
    fields = record if isinstance(record, dict) else {}
    number = fields.get("autonomous_system_number") or fields.get("asn")  # IPinfo has "AS64500"
    names = map(fields.get, ("autonomous_system_organization", "as_name", "name"))
    if not (match := re.fullmatch(r"(?:AS)?(\d{1,10})", str(number))):
        return AutonomousSystem()
    return AutonomousSystem(int(match[1]), next((str(name) for name in names if name), None))


def open_asn_database(path: str) -> Callable[[str], object]:
    """The lookup function of a database, which is mapped into memory. Raises SystemExit if unusable."""
    try:
        import maxminddb
    except ImportError:
        raise settings_error("install the package maxminddb", ASN_DATABASE=path) from None
    try:
        reader = maxminddb.open_database(path)
        if not any(autonomous_system(record).asn for _, record in islice(reader, 1000)):
            raise ValueError("no AS numbers in it")
    except (OSError, ValueError, maxminddb.InvalidDatabaseError) as error:
        expected = "expected a database of AS numbers in MaxMind's format (.mmdb), such as GeoLite2-ASN"
        raise settings_error(f"{expected}: {error}", ASN_DATABASE=path) from None
    return reader.get


ASN_LOOKUP = open_asn_database(SETTINGS.ASN_DATABASE) if SETTINGS.ASN_DATABASE else None


@lru_cache(1000)
def find_as(address: str | None) -> AutonomousSystem:
    with suppress(ValueError, RuntimeError):  # IPv6 in a database of IPv4; a damaged record
        if ASN_LOOKUP and address:
            return autonomous_system(ASN_LOOKUP(address))
    return AutonomousSystem()


def hop_event(hop: int, addresses: Sequence[str], address: str | None, hostname: str | None) -> HopEvent:
    """What the hop events of traceroute and mtr have in common."""
    asn, network = find_as(address)
    asns = [] if asn is None else [asn]
    event = HopEvent(event="hop", hop=hop, address=address, hostname=hostname, asn=asns, network=network)
    if len(addresses) > 1:
        event["addresses"] = list(addresses)
    return event


def result_hop(event: HopEvent, timings: list[Timing]) -> ResultHop:
    address, hostname = event["address"], event["hostname"]
    hop: ResultHop = {"resolvedAddress": address, "resolvedHostname": hostname, "timings": timings}
    if "addresses" in event:
        hop["addresses"] = event["addresses"]
    return hop


HOSTNAME = re.compile(r"[A-Za-z0-9._-]{1,253}")


def hostname_of(name: str, address: str | None) -> str | None:
    """The name that a tool printed for an address; None for the address itself and for unsafe characters."""
    return name if name != address and HOSTNAME.fullmatch(name) else None


class OutputParser:
    """Parses what a tool writes, any bytes, into text for people, events for programs, and a result.

    This one is for tools without a parser of their own: each line is a note.
    """

    def __init__(self, address: IPAddress) -> None:
        """`address` is the target's."""
        self.address = str(address)
        self.buffer = b""

    def feed(self, chunk: bytes) -> tuple[bytes, list[Event]]:
        """The text and the events that this piece of output completes."""
        *lines, self.buffer = (self.buffer + chunk).split(b"\n")
        if len(self.buffer) > LINE_BYTES:
            lines, self.buffer = [*lines, self.buffer], b""
        events = [event for line in lines for event in self.parse_line(line.decode("utf-8", "replace"))]
        return self.text(chunk, events), events

    def finish(self, complete: bool) -> tuple[bytes, list[Event]]:
        """The same for the end of the output; `complete` unless the tool was stopped or failed."""
        rest, self.buffer = self.buffer, b""
        events = list(self.parse_line(rest.decode("utf-8", "replace"))) if rest else []
        events += self.last_events(complete)
        return self.text(b"", events), events

    def text(self, chunk: bytes, events: Sequence[Event]) -> bytes:
        """What a person reads: the tool's own output, unless a parser has a better form."""
        return chunk

    def parse_line(self, line: str) -> Iterator[Event]:
        yield note(line)

    def last_events(self, complete: bool) -> Iterator[Event]:
        """Events for what is known only at the end, so that the last events agree with the result."""
        return iter(())

    def has_sent(self) -> bool:
        """Whether the tool sent anything. If not, an exit status other than 0 is a failure."""
        return True

    def result(self, status: Status = "finished", raw_output: str = "") -> ToolResult:
        """What is known so far."""
        return {"status": status, "resolvedAddress": self.address, "rawOutput": raw_output}


class PingParser(OutputParser):
    """ping of iputils, and of BusyBox and inetutils, whose sequence numbers start at 0."""

    TIME = r"(\d{1,9}(?:\.\d{1,3})?)"
    REPLY = re.compile(
        r"(?:\[[\d.]+\] )?\d+ bytes from (\S+?)(?: \((\S+?)\))?: (?:icmp_)?seq=(\d{1,6})"
        rf"(?: ttl=(\d{{1,3}}))?(?: time={TIME} ms)?((?!\d).*)"
    )
    UNANSWERED = re.compile(r"(?:\[[\d.]+\] )?no answer yet for icmp_seq=(\d{1,6})")
    ERROR = re.compile(r"From \S+(?: \(\S+\))?(?<!:) icmp_seq=(\d{1,6}) (?!Redirect|Source Quench).+")
    SUMMARY = re.compile(r"(\d{1,6}) packets transmitted, (\d{1,6}) (?:packets )?received\b(.*)")
    LOSS = re.compile(r", (-?\d{1,9}(?:\.\d{1,6})?)% packet loss")
    TIMES = re.compile(rf"(?:rtt|round-trip) min/avg/max\S* = {TIME}/{TIME}/{TIME}(?:/[\d.]+)? ms.*")
    BANNER = re.compile(r"|PING .+|--- .+ ping statistics ---")

    def __init__(self, address: IPAddress) -> None:
        super().__init__(address)
        self.hostname: str | None = None
        self.timings: list[PingTiming] = []
        self.first, self.sent = 1, 0  # the first sequence number; requests known to have been sent
        self.received: set[int] = set()
        self.lost: set[int] = set()
        self.summary: tuple[int, int, float | None] | None = None
        self.times: list[float] = []

    def parse_line(self, line: str) -> Iterator[Event]:
        if match := self.REPLY.fullmatch(line):
            yield from self.reply(match)
        elif match := self.UNANSWERED.fullmatch(line):
            yield from self.mark_lost(int(match[1]))
        elif match := self.ERROR.fullmatch(line):
            yield note(line)
            yield from self.mark_lost(int(match[1]))
        elif match := self.SUMMARY.match(line):
            yield note(line)
            loss = self.LOSS.search(match[3])
            self.summary = int(match[1]), int(match[2]), float(loss[1]) if loss else None
            self.sent = max(self.sent, self.summary[0])
        elif not self.BANNER.fullmatch(line):
            if match := self.TIMES.fullmatch(line):
                self.times = [float(text) for text in match.groups()]
            yield note(line)

    def reply(self, match: re.Match[str]) -> Iterator[Event]:
        name, address, seq, ttl_text, rtt_text, remark = match.groups()
        ttl, rtt = int(ttl_text) if ttl_text else None, float(rtt_text) if rtt_text else None
        self.count(int(seq))
        self.received.add(int(seq))
        if address == self.address:
            self.hostname = hostname_of(name, address)
        if rtt is not None and ttl is not None:
            self.timings.append({"rtt": rtt, "ttl": ttl})
        yield {"event": "reply", "seq": int(seq), "ttl": ttl, "rtt": rtt}
        if remark:  # (DUP!), (DIFFERENT ADDRESS!), (truncated), a time with too many digits
            yield note(match[0])

    def count(self, seq: int) -> None:
        self.first = min(self.first, seq)
        self.sent = max(self.sent, seq - self.first + 1)

    def mark_lost(self, seq: int) -> Iterator[Event]:
        self.count(seq)
        if seq not in self.received | self.lost:
            self.lost.add(seq)
            yield {"event": "lost", "seq": seq}

    def last_events(self, complete: bool) -> Iterator[Event]:
        for seq in range(self.first, self.first + min(self.sent, MAX_PROBES)):
            yield from self.mark_lost(seq)

    def has_sent(self) -> bool:
        return bool(self.sent or self.summary)

    def result(self, status: Status = "finished", raw_output: str = "") -> PingResult:
        rtts = [timing["rtt"] for timing in self.timings]
        computed = [min(rtts), round(sum(rtts) / len(rtts), 3), max(rtts)] if rtts else [None] * 3
        low, average, high = self.times or computed
        total, received, loss = self.summary or (self.sent, len(self.received), None)
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
    BANNER = re.compile(r"|traceroute to .+ hops max, .+ byte packets")

    def __init__(self, address: IPAddress) -> None:
        super().__init__(address)
        self.hops: list[ResultHop] = []

    def parse_line(self, line: str) -> Iterator[Event]:
        match = self.HOP.fullmatch(line)
        if not match:
            if not self.BANNER.fullmatch(line):
                yield note(line)
            return
        names: dict[str, str | None] = {}
        probes, complete = self.parse_probes(match[2], names)
        address = next(iter(names), None)
        hostname = names[address] if address else None
        timings: list[Timing] = [{"rtt": probe["rtt"]} for probe in probes if probe["rtt"] is not None]
        event = hop_event(int(match[1]), list(names), address, hostname)
        yield {**event, "timings": timings, "probes": probes}
        self.hops.append(result_hop(event, timings))
        if not complete:
            yield note(line)

    def parse_probes(self, text: str, names: dict[str, str | None]) -> tuple[list[Probe], bool]:
        """The probes of a hop, and whether the whole line was parsed. Adds the routers' names to `names`."""
        probes: list[Probe] = []
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
        return probes, complete and not text[position:].strip()

    def result(self, status: Status = "finished", raw_output: str = "") -> TracerouteResult:
        names = (hop["resolvedHostname"] for hop in self.hops if hop["resolvedAddress"] == self.address)
        common = super().result(status, raw_output)
        return {**common, "resolvedHostname": next(names, None), "hops": self.hops}


class MtrHop:
    """One position of an mtr run, with the arithmetic of mtr's ui/net.c: whole µs, truncated at each step."""

    def __init__(self) -> None:
        self.addresses: list[str] = []  # every router that answered
        self.address: str | None = None  # the last one
        self.first_labels: dict[str, list[str]] = {}  # MPLS labels of each router's first reply
        self.labels: list[str] = []  # MPLS labels that came with the last change of router
        self.sent = self.average = self.squares = 0
        self.in_flight = False  # whether the last probe may still be answered
        self.times: list[int] = []

    def set_address(self, address: str) -> None:
        self.address, self.labels = address, []
        if address not in self.addresses:
            self.addresses.append(address)
            self.first_labels[address] = self.labels

    def reply(self, time: int) -> None:
        self.in_flight = False
        self.times.append(time)
        before = self.average
        self.average = int(before + (time - before) / len(self.times))
        self.squares = int(self.squares + float(time - before) * (time - self.average))

    def deviation(self) -> int:
        return int(math.sqrt(self.squares / (len(self.times) - 1))) if len(self.times) > 1 else 0

    def completed(self) -> int:
        """How many probes were answered or lost."""
        return self.sent - self.in_flight

    def loss(self) -> float:
        completed = self.completed()
        return int(1000 * (100 - 100.0 * len(self.times) / completed)) / 1000 if completed else 0.0

    def columns(self) -> str:
        """Loss%, Snt, Last, Avg, Best, Wrst, StDev as `mtr --report` prints them; too wide ones are cut."""
        last, best, worst = (self.times[-1], min(self.times), max(self.times)) if self.times else (0, 0, 0)
        times = [f" {each / 1000:5.1f}" for each in (last, self.average, best, worst, self.deviation())]
        loss, sent, *cells = (each[:6] for each in (f" {self.loss():4.1f}%", f" {self.sent:5d}", *times[:-1]))
        return f"{loss}{sent} {''.join(cells)}{times[-1]}"

    def stats(self) -> HopStats:
        low = average = high = deviation = least = mean = most = None
        if times := self.times:
            jitters = [abs(after - before) for before, after in pairwise(times)] or [0]
            spread = (min(times), self.average, max(times), self.deviation())
            jitter = (min(jitters), sum(jitters) / len(jitters), max(jitters))
            low, average, high, deviation, least, mean, most = (round(us / 1000, 3) for us in spread + jitter)
        total, rcv, loss = self.completed(), len(times), self.loss()
        stats = Stats(min=low, avg=average, max=high, total=total, rcv=rcv, drop=total - rcv, loss=loss)
        return {**stats, "stDev": deviation, "jMin": least, "jAvg": mean, "jMax": most}


class MtrParser(OutputParser):
    """`mtr --raw`. As text: each hop when it first answers, then mtr's own report.

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

    def __init__(self, address: IPAddress) -> None:
        super().__init__(address)
        self.hops: defaultdict[int, MtrHop] = defaultdict(MtrHop)
        self.names: dict[str, str] = {}
        self.changed: set[int] = set()  # positions to send an event for
        self.reported: set[int] = set()  # positions whose events are valid
        self.printed: set[int] = set()  # hops that are in the text
        self.labels: set[str] = set()  # MPLS labels that have a note
        self.start = time.strftime("Start: %Y-%m-%dT%H:%M:%S%z\n").encode()

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
                    self.changed.add(position)
                hop.sent, hop.in_flight = hop.sent + 1, True
            case "h":
                hop.set_address(value[0])
            case "m":
                hop.labels.append("[MPLS: Lbl {} TC {} S {} TTL {}]".format(*value.groups()))
                label = f"hop {position + 1}: {hop.address} {hop.labels[-1]}"
                if label not in self.labels:
                    self.labels.add(label)
                    yield note(label)
            case "d" if hop.address:
                self.set_name(hop.address, value[0])
            case "p":
                hop.reply(int(value[1]))
                self.changed.add(position)
        yield from self.changes()

    def set_name(self, address: str, name: str) -> None:
        """Record the name of an address, for every position at which it answers."""
        if hostname := hostname_of(name, address):
            self.names[address] = hostname
            self.changed.update(at for at, hop in self.hops.items() if hop.address == address)

    def changes(self) -> Iterator[Event]:
        """The events of positions that changed, within the path as it is now known."""
        length = self.path_length()
        if void := {position for position in self.reported if position >= length}:
            self.reported -= void
            self.changed |= void  # in case the path grows again
            yield {"event": "path", "hops": length}
        due = {position for position in self.changed if position < length}
        self.changed -= due
        self.reported |= due
        for position in sorted(due):
            yield {**self.hop_event(position), "stats": self.hops[position].stats()}

    def path_length(self) -> int:
        """The number of positions up to the target, else up to a router that answers for all later ones.

        A router that returns "unreachable" does so at each position from its own on; raw output does not mark
        it. Otherwise the path ends one position after the last that answered, as in mtr's table.
        """
        answered = sorted(position for position, hop in self.hops.items() if hop.address)
        if not answered:
            return 0
        for position in answered:
            if self.hops[position].address == self.address:
                return position + 1
        last = end = answered[-1]
        for position in reversed(answered):
            if self.hops[position].address != self.hops[last].address:
                break
            end = position
        return end + 1 if end < last else max(last + 1, min(last + 2, self.MAX_HOPS))

    def hop_event(self, position: int) -> HopEvent:
        hop = self.hops[position]
        return hop_event(position + 1, hop.addresses, hop.address, self.names.get(hop.address or ""))

    def last_events(self, complete: bool) -> Iterator[Event]:
        for position, hop in self.hops.items():
            if complete and hop.in_flight:
                hop.in_flight = False
                self.changed.add(position)
        self.changed.update(set(range(self.path_length())) - self.reported)
        yield from self.changes()

    def text(self, chunk: bytes, events: Sequence[Event]) -> bytes:
        lines, self.start = [self.start], b""
        for event in events:
            if event["event"] == "note":
                lines.append(f"{event['text']}\n".encode())
            elif event["event"] == "hop" and event["address"] and event["hop"] not in self.printed:
                self.printed.add(event["hop"])
                lines.append(f" {event['hop']:2d}.|-- {event['address']}\n".encode())
        return b"".join(lines)

    def finish(self, complete: bool) -> tuple[bytes, list[Event]]:
        text, events = super().finish(complete)
        return text + "".join(f"{line}\n" for line in self.table()).encode(), events

    def host(self, address: str | None) -> str:
        if address in self.names:
            return f"{self.names[address]} ({address})"
        return address or "???"

    def table(self) -> Iterator[str]:
        """The lines of mtr's report, or of `mtr -z` if there is an AS database.

        These are mtr 0.95's own habits: `-z` prints a further router twice, and without `-z` the labels of a
        hop's only router are not printed.
        """
        hops = [self.hops[position] for position in range(self.path_length())]
        host, asn_width = socket.gethostname(), 9 if ASN_LOOKUP else 0
        width = max(map(len, [host, *(self.host(hop.address) for hop in hops)]))
        if hops:
            yield f"HOST: {host:{width + asn_width}}{self.TITLES}"
        width += bool(asn_width)
        for number, hop in enumerate(hops, 1):
            lead = f" {number:2d}. {self.as_column(hop.address)}" if asn_width else f" {number:2d}.|-- "
            yield f"{lead}{self.host(hop.address):{width}}{hop.columns()}"
            for index, address in enumerate(hop.addresses):
                if address == hop.address:
                    continue
                yield f"        {self.host(address):{width}}"
                yield from (f"       {label}" for label in (hop.labels if index == 1 else ()))
                if asn_width:
                    yield f"     {self.as_column(address)}{self.host(address)}"
                yield from (f"       {label}" for label in hop.first_labels[address])
            if asn_width and len(hop.addresses) == 1:
                yield from (f"       {label}" for label in hop.labels)

    def as_column(self, address: str | None) -> str:
        asn = find_as(address).asn
        return f"AS{'???' if asn is None else asn:<7}"

    def result(self, status: Status = "finished", raw_output: str = "") -> MtrResult:
        hops: list[MtrResultHop] = []
        for position in range(self.path_length()):
            hop, event = self.hops[position], self.hop_event(position)
            shared = result_hop(event, [{"rtt": time / 1000} for time in hop.times])
            hops.append({**shared, "asn": event["asn"], "stats": hop.stats()})
        common = super().result(status, raw_output)
        return {**common, "resolvedHostname": self.names.get(self.address), "hops": hops}


PARSERS: dict[str, type[OutputParser]] = {"ping": PingParser, "traceroute": TracerouteParser}


def parser_for(command: Command) -> type[OutputParser]:
    """The parser of the command's tool."""
    if command.tool == "mtr" and "--raw" in command.argv:
        return MtrParser
    return PARSERS.get(command.tool, OutputParser)


class Transcript:
    """What a client reads of a run: text, or one JSON object a line for each event."""

    def __init__(
        self, command: Command, target: IPAddress | str, address: IPAddress, as_events: bool
    ) -> None:
        self.command, self.target, self.address, self.as_events = command, target, address, as_events
        self.parser = parser_for(command)(address)
        self.started = time.monotonic()
        self.raw_output = bytearray()  # what a text client reads

    def encode(self, text: bytes, events: Sequence[Event]) -> bytes:
        self.raw_output += text
        if not self.as_events:
            return text
        return b"".join(json.dumps(event, separators=(",", ":")).encode() + b"\n" for event in events)

    def start(self) -> bytes:
        kind = "address" if self.address.version == 4 else "IPv6 address"
        text = f"{self.target} has {kind} {self.address}\n" if isinstance(self.target, str) else ""
        event: StartEvent = {
            "event": "start",
            "command": self.command.name,
            "target": str(self.target),
            "address": str(self.address),
            "family": self.address.version,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        return self.encode(text.encode(), [event])

    def output(self, chunk: bytes) -> bytes:
        return self.encode(*self.parser.feed(chunk))

    def status_fault(self, status: int) -> str:
        """The fault where nothing was sent: BusyBox' ping exits with 1 for a bad option too."""
        return f"exit status {status}" if status and not self.parser.has_sent() else ""

    def end(self, fault: str, status: int | None) -> bytes:
        """The last bytes. `fault` is what went wrong, if anything; `status` is the tool's exit status."""
        last = self.encode(*self.parser.finish(complete=not fault))
        if fault:
            newline = "" if self.raw_output.endswith(b"\n") or not self.raw_output else "\n"
            last += self.encode(f"{newline}--- {self.command.name}: {fault} ---\n".encode(), [])
        outcome: Status = "failed" if fault else "finished"
        event: EndEvent = {
            "event": "end",
            "status": outcome,
            "exit_status": status,
            "duration": round(time.monotonic() - self.started, 3),
            "result": self.parser.result(outcome, self.raw_output.decode("utf-8", "replace")),
        }
        if fault:
            event["error"] = f"{self.command.name}: {fault}"
        return last + self.encode(b"", [event])


# ---- running a command -------------------------------------------------------------------------------------

OUTPUT_BYTES = 2**20  # what one command may write
READ_BYTES = 2**16  # the capacity of a pipe
POLL_SECONDS = 0.1  # how often a silent command is checked
GRACE_SECONDS = 0.5  # for a command to print its summary after SIGINT
PROBE_SECONDS = 3  # a tool without permission ends long before, on a busy machine too
# Errors of ping (iputils, BusyBox, GNU inetutils) and of mtr, whose mtr-packet does the sending.
DENIED = re.compile(r"(?i).*(?:permission denied|not permitted|privilege|failure to start mtr-packet).*")
# Errors of BusyBox and GNU inetutils for options that only the expected programs have.
REFUSED = re.compile(r"(?i).*(?:(?:invalid|unrecognized|unknown) option|invalid number).*")


class Process:
    """A tool that runs in a session of its own until the context is left."""

    running: ClassVar[set[Process]] = set()

    def __init__(self, command: Command, address: IPAddress, seconds: float) -> None:
        """Start it towards `address`, for at most `seconds`. Raises OSError."""
        self.command = command
        self.fault = ""  # why the run failed, if it did
        self.loop = asyncio.get_running_loop()
        self.readable = asyncio.Event()
        self.tool = subprocess.Popen(
            command.argv_for(address),
            bufsize=0,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
            start_new_session=True,
        )
        assert self.tool.stdout
        self.pipe = self.tool.stdout
        os.set_blocking(self.pipe.fileno(), False)
        self.loop.add_reader(self.pipe.fileno(), self.readable.set)
        self.timer = self.loop.call_later(seconds, self.stop, f"stopped after {seconds} s")
        self.running.add(self)

    def stop(self, reason: str) -> None:
        """Send SIGINT, and SIGKILL after GRACE_SECONDS: ping prints its summary in between."""
        self.fault = self.fault or reason
        self.signal(signal.SIGINT)
        self.timer.cancel()
        self.timer = self.loop.call_later(GRACE_SECONDS, self.signal, signal.SIGKILL)

    def signal(self, number: int) -> None:
        """Signal the whole group: mtr has children, which would live on and keep the pipe open."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.tool.pid, number)

    def has_ended(self) -> bool:
        """Whether the tool has exited. Not reaped yet, it keeps the number of its group for `__aexit__`."""
        return os.waitid(os.P_PID, self.tool.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    async def output(self) -> AsyncGenerator[bytes]:
        """Chunks of output as they are written, until the tool has ended or has written too much."""
        remaining = OUTPUT_BYTES
        while True:
            if ended := self.has_ended():
                self.signal(signal.SIGKILL)  # remaining children
            chunk = self.pipe.read(READ_BYTES)
            if chunk is None and not ended:  # nothing to read yet
                self.readable.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await self.readable.wait()
                continue
            if not chunk:  # closed; or held open by a child that has left the group
                break
            if len(chunk) > remaining:
                self.fault = self.fault or f"output cut at {OUTPUT_BYTES // 2**20} MiB"
                yield chunk[:remaining]
                return
            remaining -= len(chunk)
            yield chunk
        self.loop.remove_reader(self.pipe.fileno())
        while not self.has_ended():
            await asyncio.sleep(POLL_SECONDS / 10)

    async def __aenter__(self) -> Process:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Kill the group, reap the tool and close the pipe."""
        self.running.discard(self)
        self.timer.cancel()
        self.loop.remove_reader(self.pipe.fileno())
        self.pipe.close()
        self.signal(signal.SIGKILL)
        await asyncio.shield(asyncio.create_task(self.reap()))  # a cancelled run leaves no zombie either
        status = self.tool.returncode
        if not self.fault and status not in self.command.ok_statuses:
            self.fault = f"exit status {status}" if status >= 0 else f"killed by signal {-status}"

    async def reap(self) -> None:
        while self.tool.poll() is None:
            await asyncio.sleep(0.001)


@lru_cache(100)
def log_start_failure(tool: str, error: str, hint: str | None, minute: int) -> None:
    """Log it once a minute: no rate limit counts the requests that repeat it."""
    log.error(f"{tool} cannot be started", {"error": error, "install": hint})


def start(command: Command, address: IPAddress) -> Process:
    """The command's tool, started towards an address. Raises RequestError."""
    if SHUTTING_DOWN.is_set():
        raise shutting_down()
    try:
        return Process(command, address, SETTINGS.DIAGNOSTIC_TIMEOUT)
    except OSError as error:
        hint = install_hint([command.tool]) if isinstance(error, FileNotFoundError) else None
        log_start_failure(command.tool, str(error), hint, int(time.monotonic() / LOG_REPEAT_SECONDS))
        if isinstance(error, (FileNotFoundError, PermissionError)):
            message = f"{command.tool} is not installed on this server, or may not run"
            raise RequestError(503, {"error": message}, reason="unavailable") from None
        message = f"The server cannot start {command.tool} now: try again soon"
        raise RequestError(503, {"error": message}, RETRY_LATER, "unavailable") from None


@dataclass(frozen=True)
class Diagnosis:
    """A run of a command: what was asked for, and what becomes known as it goes on."""

    command: Command
    target: IPAddress | str
    client: IPAddress
    as_events: bool
    headers: asyncio.Future[Headers]  # of the rate limit, once the tool runs
    output: asyncio.Queue[bytes | None]  # what the client reads; None is the end

    async def run(self) -> None:
        """Take a slot, resolve the target, run the tool, log the run. Raises RequestError."""
        command, target, client = self.command, self.target, self.client
        with DIAGNOSTICS.take(rate_limit_key(client)):
            begun, address = time.monotonic(), None
            headers = await LIMITS.count(SETTINGS.RATE_LIMIT_DIAGNOSTICS, command.name, client, consume=False)
            try:
                if isinstance(target, str):
                    await LIMITS.count(SETTINGS.RATE_LIMIT_LOOKUPS, "lookup", client)
                address = await resolve(target, command.version)
                async with start(command, address) as process:
                    # Charged now, since what starts no tool costs nothing.
                    headers = await LIMITS.count(SETTINGS.RATE_LIMIT_DIAGNOSTICS, command.name, client)
                    self.headers.set_result(headers)
                    transcript = Transcript(command, target, address, self.as_events)
                    self.output.put_nowait(transcript.start())
                    async with aclosing(process.output()) as chunks:
                        async for chunk in chunks:
                            self.output.put_nowait(transcript.output(chunk))
                            await asyncio.sleep(0)  # other requests go on although the tool writes fast
            except RequestError as error:
                error.headers = {**headers, **error.headers}
                raise
            except asyncio.CancelledError:
                self.record(address, "client gone", time.monotonic() - begun)
                raise
            status = process.tool.returncode
            fault = process.fault or transcript.status_fault(status)
            self.record(address, fault or "finished", time.monotonic() - begun)
        self.output.put_nowait(transcript.end(fault, status if status >= 0 else None))

    def record(self, address: IPAddress | None, outcome: str, seconds: float) -> None:
        """Count a run that has ended, and log it."""
        labels = {"command": self.command.name, "outcome": outcome}
        COUNTERS[sample("lg_runs_total", **labels)] += 1
        COUNTERS[sample("lg_run_seconds_total", **labels)] += seconds
        level = logging.INFO if outcome in ("finished", "client gone") else logging.WARNING
        pairs = {"command": self.command.name, "target": self.target, "address": address}
        pairs |= {"client": self.client, "outcome": outcome, "seconds": f"{seconds:.1f}"}
        log.log(level, "run", pairs)

    async def chunks(self) -> AsyncGenerator[bytes]:
        while (chunk := await self.output.get()) is not None:
            yield chunk


@asynccontextmanager
async def diagnosis(
    command: Command, target: IPAddress | str, client: IPAddress, as_events: bool
) -> AsyncIterator[tuple[Headers, AsyncGenerator[bytes]]]:
    """Run a command: the headers of its rate limit, and what the client reads. Raises RequestError.

    It runs in a task of its own, which frees the slot and the process when the tool has ended, however slowly
    the client reads. Text that waits to be read is bounded by OUTPUT_BYTES, events by a multiple of it.
    """
    headers: asyncio.Future[Headers] = asyncio.get_running_loop().create_future()
    diagnosis = Diagnosis(command, target, client, as_events, headers, asyncio.Queue())
    run = asyncio.create_task(diagnosis.run())
    run.add_done_callback(lambda _: diagnosis.output.put_nowait(None))
    try:
        await asyncio.wait((run, headers), return_when=asyncio.FIRST_COMPLETED)
        if not headers.done():
            await run
        yield headers.result(), diagnosis.chunks()
        await run
    finally:
        run.cancel()
        await asyncio.wait((run,))


async def probe_tool(command: Command) -> None:
    """Run a command on loopback, and log and keep what is wrong with its tool."""
    tool, loopback = command.tool, ipaddress.ip_address("127.0.0.1" if command.version == 4 else "::1")
    try:
        async with Process(command, loopback, PROBE_SECONDS) as process, aclosing(process.output()) as chunks:
            output = b"".join([chunk async for chunk in chunks]).decode(errors="replace")
    except OSError as error:  # its file has capabilities that this process may not have
        output = str(error) if find_program(tool) else ""
    if line := DENIED.search(output):
        FORBIDDEN.add(tool)
        hint = "grant NET_RAW (Docker: --cap-add NET_RAW) or widen net.ipv4.ping_group_range"
        log.warning(f"{tool} lacks the permission to send: {hint}", {"error": line[0]})
    elif line := REFUSED.search(output):
        UNSUITABLE.add(find_program(tool))
        pairs = {"install": install_hint([tool]), "error": line[0]}
        log.warning(f"{tool} is not the program that is expected here", pairs)


async def probe_tools() -> None:
    """Probe each tool of the built-in commands once."""
    built_in = [command for command in COMMANDS.values() if command.name in BUILT_IN_COMMANDS]
    commands = {command.tool: command for command in reversed(built_in)}
    await asyncio.gather(*map(probe_tool, commands.values()))


# ---- connections -------------------------------------------------------------------------------------------

MAX_CONNECTIONS = 4000  # of all clients: about 40 MiB, and the kernel's buffers
MAX_CONNECTIONS_PER_CLIENT = 100  # proxies excepted; a browser opens 6 to a server
RESERVED_FILES = 200  # descriptors for commands, lookups, the store and the log
REQUEST_HEADER_SECONDS = 10  # within which the header of a request must be complete
PARSED_BYTES = 2**16  # parsed of one request: h11 needs 60 ms for as much in one-byte chunks
BODY_BYTES = 4096  # of a body that is read
BODY_SECONDS = 10  # within which it must be complete
LINGER_SECONDS = 5  # for the rest of a body after its answer
STALL_SECONDS = 30  # after which a peer that takes or sends nothing is dropped
STOP_SECONDS = 3  # uvicorn's time limit for requests to end at the shutdown; ours end earlier
ADDRESS_CHARS = 64  # the longest text that is parsed, and cached, as an address: one with its zone is shorter
FRAMING = {b"content-length", b"transfer-encoding"}  # the headers that give the length of a body
CLOSE = (b"connection", b"close")
ADDRESS_WITH_PORT = re.compile(r"\[(?P<bracketed>[^\]]*)\](?::\d+)?|(?P<ipv4>[^:]*):\d+")
NO_LINGER = struct.pack("ii", 1, 0)  # for SO_LINGER: closing discards unsent data and sends RST
# The receive buffer of all connections: its contents are used before another connection is read.
RECEIVE_BUFFER = memoryview(bytearray(2**18))
# The application receives this in place of a large body, whose bytes are counted and not kept.
ZEROS = memoryview(bytes(2**20))


class TransferAborted(Exception):  # noqa: N818 - not an error of the application's
    """Raised to break off an answer that has begun: its connection is reset."""


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


@lru_cache(1000)
def is_trusted_proxy(peer: IPAddress | None) -> bool:
    return peer is not None and any(peer in network for network in SETTINGS.FORWARDED_ALLOW_IPS)


UNTRUSTED_PROXIES: list[IPAddress] = []  # the first only


def warn_of_untrusted_proxy(peer: IPAddress) -> None:
    UNTRUSTED_PROXIES.append(peer)
    log.warning(
        "X-Forwarded-For and X-Real-IP are ignored from a peer that is not in FORWARDED_ALLOW_IPS: if it "
        "is your proxy, add its address there, or all its clients share one rate limit",
        {"peer": peer},
    )


def peer_address(request: Request) -> IPAddress:
    """The address that is connected; 0.0.0.0 for a Unix socket, under `uvicorn lg:app`."""
    peer = parse_address(request.client.host[:ADDRESS_CHARS]) if request.client else None
    return peer or ipaddress.IPv4Address(0)


def client_address(request: Request) -> IPAddress:
    """Who is limited, logged and shown as `your_ip`: the peer, or the client that a trusted proxy names.

    That is the rightmost address of X-Forwarded-For that is no trusted proxy, else X-Real-IP: the entries to
    the left of it were sent by the client.
    """
    peer = peer_address(request)
    forwarded = ",".join(request.headers.getlist("x-forwarded-for"))
    real_ip = request.headers.get("x-real-ip", "")
    if is_trusted_proxy(peer):
        entries = map(parse_forwarded, reversed(forwarded.split(",")))
        client = next((address for address in entries if not is_trusted_proxy(address)), None)
        return client or parse_forwarded(real_ip) or peer
    named = (*forwarded.split(","), real_ip)
    # Under `uvicorn lg:app`, uvicorn may have put the client in the peer's place.
    if (forwarded or real_ip) and not UNTRUSTED_PROXIES and peer not in map(parse_forwarded, named):
        warn_of_untrusted_proxy(peer)
    return peer


def client_scheme(request: Request) -> str:
    """`http` or `https`: what a trusted proxy names, else the connection's own."""
    forwarded = request.headers.get("x-forwarded-proto", "").lower()
    trusted = is_trusted_proxy(peer_address(request))
    return forwarded if trusted and forwarded in ("http", "https") else request.url.scheme


@cache
def max_connections() -> int:
    """MAX_CONNECTIONS, or as many as the limit for open files allows."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(8, min(MAX_CONNECTIONS, files - RESERVED_FILES))


def declared_length(headers: Iterable[tuple[bytes, bytes]]) -> int | None:
    """The Content-Length, whose form the parser has checked; None where there is none."""
    return next((int(value) for name, value in headers if name == b"content-length"), None)


class Connection(H11Protocol, asyncio.BufferedProtocol):
    """A client's connection: uvicorn's protocol with a bound for everything that a client may send.

    Reading is never paused, so that a client that leaves is noticed at once. Of what is read, PARSED_BYTES
    are parsed for a request, including what follows it. The rest of a body with a Content-Length of more than
    BODY_BYTES is counted: no endpoint keeps it. Anything else is discarded.
    """

    per_client: ClassVar[Counter[str]] = Counter()
    cycle: RequestResponseCycle | None  # type: ignore[assignment]  # of the request in progress, or the last

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.application, self.app = self.app, cast(Any, self.answer)
        self.key = ""  # of the client in `per_client`
        self.parsed = 0  # bytes parsed since the last answer
        self.to_count = 0  # bytes of the body that have not come yet and will not be parsed
        self.counted = 0  # bytes that were not parsed and that the application has not received yet

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.header_timer = self.loop.call_later(REQUEST_HEADER_SECONDS, transport.close)
        peer = parse_address(self.client[0]) if self.client else None  # None: it has left already
        if peer:
            self.key = rate_limit_key(peer)
            self.per_client[self.key] += 1
        too_many = self.per_client[self.key] > MAX_CONNECTIONS_PER_CLIENT and not is_trusted_proxy(peer)
        if not peer or too_many or len(self.connections) > max_connections():
            self.reset()

    def connection_lost(self, exc: Exception | None) -> None:
        self.header_timer.cancel()
        if self.key:
            self.per_client[self.key] -= 1
            if not self.per_client[self.key]:
                del self.per_client[self.key]
        super().connection_lost(exc)

    def eof_received(self) -> None:
        """Treat a half-closed connection as closed: to the receiver, both look the same."""
        self.disconnect()

    def disconnect(self) -> None:
        """Tell the application that the client is gone."""
        if self.cycle:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self.flow.resume_writing()

    def reset(self) -> None:
        self.disconnect()
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        self.transport.abort()

    def is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def get_buffer(self, sizehint: int) -> memoryview:
        return RECEIVE_BUFFER

    def buffer_updated(self, nbytes: int) -> None:
        start = 0
        while start < nbytes:
            end = min(nbytes, start + (self.to_count or PARSED_BYTES - self.parsed))
            if self.to_count:
                self.count(end - start)
            elif start < end:
                self.parsed += end - start
                self.data_received(bytes(RECEIVE_BUFFER[start:end]))
            else:
                self.discard()
                return
            start = end

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.header_timer.cancelled() and not self.is_answering():
            self.header_timer = self.loop.call_later(REQUEST_HEADER_SECONDS, self.transport.close)

    def handle_events(self) -> None:
        previous = self.cycle
        super().handle_events()
        self.flow.resume_reading()
        if self.cycle and self.cycle is not previous:
            self.header_timer.cancel()
            length = declared_length(self.cycle.scope["headers"])
            if self.cycle.more_body and length and length > BODY_BYTES:
                self.to_count = length - len(self.cycle.body)
                self.parsed = PARSED_BYTES  # what follows the body before its answer is not parsed either

    def count(self, nbytes: int) -> None:
        """Take bytes of a body without parsing them, and wake the application."""
        assert self.cycle
        self.to_count -= nbytes
        self.counted += nbytes
        self.cycle.more_body = self.to_count > 0
        self.cycle.message_event.set()

    def discard(self) -> None:
        """Close after the current answer: the discarded bytes may end in the middle of a request."""
        if self.cycle and self.is_answering():
            self.cycle.keep_alive = False
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Also called for a body that turns out to be malformed while the application runs."""
        answering = self.is_answering()
        self.disconnect()
        if answering and self.cycle and self.cycle.response_started:
            self.transport.abort()
        else:
            body = json.dumps({"detail": msg})
            header = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close"
            self.transport.write(f"HTTP/1.1 400 Bad Request\r\n{header}\r\n\r\n{body}".encode())
            self.transport.close()

    def on_response_complete(self) -> None:
        if self.conn.their_state is h11.SEND_BODY:  # its parser has not seen the counted body
            self.conn = h11.Connection(h11.SERVER)
        self.parsed, self.counted = len(self.conn.trailing_data[0]), 0
        super().on_response_complete()

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application for a request of this connection."""
        try:
            if {name for name, _ in scope["headers"]} >= FRAMING:  # proxies differ on which of them counts
                body = {"detail": "Send Content-Length or Transfer-Encoding, not both"}
                await JSONResponse(body, 400, {"Connection": "close"})(scope, receive, send)
            elif self.cycle and (self.cycle.more_body or self.counted):
                await self.answer_with_body(self.cycle, scope, receive, send)
            else:
                await self.application(scope, receive, send)
        except TransferAborted:
            self.reset()

    async def answer_with_body(
        self, cycle: RequestResponseCycle, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Run the application while the request's body is still coming.

        When it answers before the body is complete, the connection is closed afterwards, but not at once: the
        client's system could throw away an answer that is followed by a reset (RFC 9112, 9.6).
        """

        async def receive_body() -> Message:
            message = await receive()
            if message["type"] == "http.request" and self.counted:
                if not message["body"]:
                    message["body"] = ZEROS[: self.counted]
                    self.counted -= len(message["body"])
                message["more_body"] = cycle.more_body or self.counted > 0
                if self.counted:
                    cycle.message_event.set()
            return message

        async def send_and_close(message: Message) -> None:
            if cycle.more_body and message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], CLOSE]}
            elif cycle.more_body and not message.get("more_body"):
                await send({**message, "more_body": True})
                with suppress(TimeoutError):
                    async with asyncio.timeout(LINGER_SECONDS):
                        while cycle.more_body and (await receive())["type"] == "http.request":
                            pass
                message = {"type": "http.response.body"}
            await send(message)

        await self.application(scope, receive_body, send_and_close)


async def read_body(request: Request) -> bytes:
    """The body of a small request. Raises RequestError when it is too large or too slow."""
    message = f"The body is larger than {BODY_BYTES} bytes: send the target alone"
    too_large = RequestError(413, {"detail": message})
    if (declared_length(request.scope["headers"]) or 0) > BODY_BYTES:
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


Exchange = AbstractAsyncContextManager[tuple[Headers, AsyncGenerator[bytes]]]


class StreamedResponse(Response):
    """An answer whose body is an async generator, and which ends when the client leaves.

    `exchange` is an async context manager that yields further headers and the body. It is left on every path,
    and what it raises on entering becomes the answer. Starlette's StreamingResponse does not close its
    generator.
    """

    def __init__(self, exchange: Exchange, headers: Headers) -> None:
        self.exchange, self.fixed_headers = exchange, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(None) as connected:  # expires when the client leaves

                async def watch() -> None:
                    while (await receive())["type"] != "http.disconnect":
                        pass
                    connected.reschedule(0)

                watcher = asyncio.create_task(watch())
                try:
                    await self.stream(send)
                finally:
                    watcher.cancel()
        except TimeoutError:
            if not connected.expired():
                raise

    async def stream(self, send: Send) -> None:
        async with self.exchange as (headers, chunks), aclosing(chunks):
            self.init_headers({**self.fixed_headers, **headers})
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await asyncio.sleep(0)  # other requests go on although this client reads as fast as we write
        await send({"type": "http.response.body", "body": b""})


class Server(uvicorn.Server):
    """uvicorn's server, which stops the commands before it waits for requests to end."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ignore further signals: the shutdown takes a few seconds at most."""
        if not self.should_exit:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        log.info("stopping")
        SHUTTING_DOWN.set()
        for process in Process.running:
            process.stop("stopped, the server is shutting down")
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=2 * GRACE_SECONDS)
        asyncio.get_running_loop().call_later(GRACE_SECONDS, self.drop)
        await super().shutdown(sockets)

    def drop(self) -> None:
        """Abort what is still open: downloads, unread answers, incomplete requests."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


# ---- speed tests -------------------------------------------------------------------------------------------

# Pages of zeros that are never written share one page of memory. From Python 3.12 on, asyncio keeps a view of
# what waits to be sent; before, it copies it.
BLOCK = bytes(2**23 if sys.version_info >= (3, 12) else 2**21)
MIN_BYTES_PER_SECOND = 2**16  # average that a transfer must reach: a trickle holds no slot
UPLOAD_BYTES = 2**30
UPLOAD_SECONDS = 120  # after which an upload is answered with what has come
UPLOAD_TEST_CHARS = 64  # of a test's name


class Size(NamedTuple):
    """A download: its name, its bytes and its rates."""

    name: str
    length: int
    rates: Rates


SIZES = {
    size.name: size
    for size in (
        Size("100M", 100 * 2**20, SETTINGS.RATE_LIMIT_SPEEDTEST),
        Size("1G", 2**30, SETTINGS.RATE_LIMIT_SPEEDTEST),
        Size("10G", 10 * 2**30, SETTINGS.RATE_LIMIT_SPEEDTEST_10G),
    )
    if SETTINGS.MAX_SPEEDTESTS
}
if not COMMANDS and not SIZES:
    raise settings_error("expected a command or speed tests to offer", COMMANDS="", MAX_SPEEDTESTS=0)
DOWNLOADED, UPLOADED = (sample("lg_speedtest_bytes_total", direction=each) for each in ("download", "upload"))
COUNTERS |= {DOWNLOADED: 0, UPLOADED: 0}


def log_speedtest(size: str, client: IPAddress, outcome: str, length: int, seconds: float) -> None:
    pairs = {"size": size, "client": client, "outcome": outcome, "bytes": length, "seconds": f"{seconds:.1f}"}
    log.info("speedtest", pairs)


@asynccontextmanager
async def download(size: Size, client: IPAddress) -> AsyncIterator[tuple[Headers, AsyncGenerator[bytes]]]:
    """The headers of the rate limit, and `size.length` zero bytes in blocks.

    Raises RequestError, or TransferAborted when the client takes less than MIN_BYTES_PER_SECOND.
    """
    with SPEEDTESTS.take(rate_limit_key(client)):
        headers = await LIMITS.count(size.rates, f"speedtest {size.name}", client)
        loop = asyncio.get_running_loop()
        begun, sent, outcome = loop.time(), 0, "broken off"

        async def blocks() -> AsyncGenerator[bytes]:
            nonlocal sent
            while block := BLOCK[: size.length - sent]:
                deadline.reschedule(begun + (sent + len(BLOCK)) / MIN_BYTES_PER_SECOND)
                yield block
                sent += len(block)
                COUNTERS[DOWNLOADED] += len(block)

        try:
            async with asyncio.timeout(None) as deadline:
                yield headers, blocks()
            outcome = "finished"
        except TimeoutError:
            outcome = "too slow"
            raise TransferAborted from None
        finally:
            log_speedtest(size.name, client, outcome, sent, loop.time() - begun)


class Upload(TypedDict):
    """What an upload has brought; `mbps` is null where that took no time."""

    bytes: int
    seconds: float
    mbps: float | None


@dataclass
class UploadTest:
    """What the uploads of one speed test have brought so far."""

    begun: float  # by the event loop's clock
    length: int = 0


# Those with uploads that run, by the name that the client gave its test.
UPLOAD_TESTS: WeakValueDictionary[str, UploadTest] = WeakValueDictionary()


def measured(length: int, seconds: float) -> Upload:
    mbps = round(length * 8 / 1e6 / seconds, 3) if seconds else None
    return {"bytes": length, "seconds": round(seconds, 6), "mbps": mbps}


def upload_so_far(test: str) -> Upload:
    """What the running uploads of a test have brought; zeros where none runs.

    The page asks for this because a browser counts the bytes that it has handed to the system, not those that
    have arrived.
    """
    now = asyncio.get_running_loop().time()
    upload_test = UPLOAD_TESTS.get(test) or UploadTest(now)
    return measured(upload_test.length, now - upload_test.begun)


async def receive_upload(
    chunks: AsyncIterator[bytes], client: IPAddress, test: str
) -> tuple[Upload, Headers]:
    """Receive and discard an upload. Returns its measurement and the headers of the rate limit.

    The upload ends after UPLOAD_SECONDS, or after STALL_SECONDS if it is slower than MIN_BYTES_PER_SECOND. It
    is measured by what has come by then. Raises RequestError, or ClientDisconnect.
    """
    with SPEEDTESTS.take(rate_limit_key(client)):
        headers = await LIMITS.count(SETTINGS.RATE_LIMIT_SPEEDTEST, "speedtest upload", client)
        loop = asyncio.get_running_loop()
        begun = first = last = loop.time()
        length, outcome = 0, "broken off"
        upload_test = UPLOAD_TESTS.setdefault(test, UploadTest(begun)) if test else UploadTest(begun)
        try:
            async with asyncio.timeout(STALL_SECONDS) as deadline:
                async for chunk in chunks:
                    last = loop.time()
                    first = first if length else last
                    length += len(chunk)
                    upload_test.length += len(chunk)
                    COUNTERS[UPLOADED] += len(chunk)
                    if last - begun > STALL_SECONDS and length < MIN_BYTES_PER_SECOND * (last - begun):
                        break
                    deadline.reschedule(min(last + STALL_SECONDS, begun + UPLOAD_SECONDS))
            outcome = "finished"
        except TimeoutError:
            if loop.time() < begun + UPLOAD_SECONDS:
                message = f"No byte came for {STALL_SECONDS} s"
                raise RequestError(408, {"detail": message}, headers) from None
            outcome = "finished"
        finally:
            log_speedtest("upload", client, outcome, length, loop.time() - begun)
    return measured(length, last - first), headers


# ---- endpoints ---------------------------------------------------------------------------------------------

TEXT_TYPE, EVENTS_TYPE = "text/plain; charset=utf-8", "application/x-ndjson"
JSON_TYPE, FORM_TYPE = "application/json", "application/x-www-form-urlencoded"
STREAM_HEADERS = {
    "Cache-Control": "no-store, no-transform",
    "X-Accel-Buffering": "no",
    "X-Content-Type-Options": "nosniff",
    "Vary": "Accept",
}
PLACE = {"location": SETTINGS.NETWORK_LOCATION, "facility": SETTINGS.NETWORK_FACILITY}


async def diagnostic(command: Command, request: Request) -> Response:
    target = parse_target(parse_body(await read_body(request)))
    check_version(target, command)
    as_events = EVENTS_TYPE in request.headers.get("accept", "").lower()
    headers = STREAM_HEADERS | {"Content-Type": EVENTS_TYPE if as_events else TEXT_TYPE}
    if as_events:  # after an abort, browsers may read on for 5 s to reuse the connection
        headers["Connection"] = "close"
    return StreamedResponse(diagnosis(command, target, client_address(request), as_events), headers)


async def speedtest(size: Size, request: Request) -> Response:
    headers = {
        "Content-Type": "application/octet-stream",
        "Content-Length": str(size.length),
        "Content-Disposition": f"attachment; filename=speedtest_{size.name}.bin",
        "Cache-Control": "no-store, no-transform",
        "Timing-Allow-Origin": "*",
    }
    if request.method == "HEAD":
        return Response(headers=headers)
    return StreamedResponse(download(size, client_address(request)), headers)


async def upload(request: Request) -> Response:
    headers = {"Cache-Control": "no-store", "Timing-Allow-Origin": "*"}
    test = request.query_params.get("test", "")[:UPLOAD_TEST_CHARS]
    if request.method != "POST":
        return JSONResponse(upload_so_far(test), headers=headers)
    length = declared_length(request.scope["headers"])
    if length is None:
        raise RequestError(411, {"detail": "Send Content-Length: an upload without it is not accepted"})
    if length > UPLOAD_BYTES:
        raise RequestError(413, {"detail": f"An upload has at most {UPLOAD_BYTES} bytes"})
    async with aclosing(request.stream()) as chunks:
        answer, rate_headers = await receive_upload(chunks, client_address(request), test)
    return JSONResponse(answer, headers={**headers, **rate_headers})


async def health(request: Request) -> Response:
    faults = {"missing": missing_tools(), "forbidden": sorted(FORBIDDEN)}
    found = {name: tools for name, tools in faults.items() if tools}
    return JSONResponse({"status": "degraded", **found} if found else {"status": "ok"})


def location_info(client: IPAddress) -> dict[str, str]:
    return {
        "location": SETTINGS.NETWORK_LOCATION,
        "map_url": SETTINGS.NETWORK_MAP_URL,
        "facility": SETTINGS.NETWORK_FACILITY,
        "facility_url": SETTINGS.NETWORK_FACILITY_URL,
        "looking_glass_ipv4": SETTINGS.NETWORK_IPV4,
        "looking_glass_ipv6": SETTINGS.NETWORK_IPV6,
        "your_ip": str(client),
    }


async def network_info(request: Request) -> Response:
    return JSONResponse(location_info(client_address(request)))


METRICS = {  # by name: the type and the help of Prometheus' text format
    "lg_info": ("gauge", "Version and place of this server; the value is always 1."),
    "lg_runs_total": ("counter", "Commands that have ended, by outcome as in the log."),
    "lg_run_seconds_total": ("counter", "Seconds that these commands took."),
    "lg_refusals_total": ("counter", "Requests refused."),
    "lg_speedtest_bytes_total": ("counter", "Bytes of speed tests."),
    "lg_slots": ("gauge", "Commands and speed tests that may run at once."),
    "lg_slots_taken": ("gauge", "Commands and speed tests that run now."),
    "lg_connections": ("gauge", "Open connections."),
}


async def metrics(request: Request) -> Response:
    if not any(client_address(request) in network for network in SETTINGS.METRICS_ALLOW_IPS):
        raise HTTPException(404)
    samples = COUNTERS | {sample("lg_info", version=VERSION, **PLACE): 1}
    samples["lg_connections"] = Connection.per_client.total()
    for kind, slots in (("command", DIAGNOSTICS), ("speedtest", SPEEDTESTS)):
        samples[sample("lg_slots", kind=kind)] = slots.total
        samples[sample("lg_slots_taken", kind=kind)] = slots.taken.total()
    lines = []
    for name, (kind, description) in METRICS.items():
        lines += [f"# HELP {name} {description}", f"# TYPE {name} {kind}"]
        lines += [f"{key} {value:.15g}" for key, value in samples.items() if key.partition("{")[0] == name]
    return PlainTextResponse("\n".join([*lines, ""]), media_type="text/plain; version=0.0.4")


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
HOST = re.compile(r"[a-z0-9._-]+(:\d+)?|\[[0-9a-f:.]+\](:\d+)?", re.ASCII | re.IGNORECASE)


def rate_limits_text() -> str:
    parts = [f"{describe_rates(SETTINGS.RATE_LIMIT_DIAGNOSTICS)} for each command"] if COMMANDS else []
    if SIZES:
        parts.append(f"{describe_rates(SETTINGS.RATE_LIMIT_SPEEDTEST)} for each speed test")
        parts.append(f"{describe_rates(SETTINGS.RATE_LIMIT_SPEEDTEST_10G)} for the 10G download")
    return ", ".join(parts)


def offers() -> str:
    """What is measured here, in English: `ping, traceroute, mtr and speed tests`."""
    names = [name for name, command in COMMANDS.items() if command.version == 4 or name[:-1] not in COMMANDS]
    *others, last = [*names, "speed tests"] if SIZES else names
    return f"{', '.join(others)} and {last}" if others else last


def base_url(request: Request) -> str:
    """The address of this server as the client wrote it, if people may paste that into a shell."""
    host = request.headers.get("host", "")
    if not HOST.fullmatch(host):
        host = f"localhost:{SETTINGS.PORT}"
    return f"{client_scheme(request)}://{host}"


async def usage(request: Request) -> Response:
    base = base_url(request)
    lines = "".join(f"    curl -N -d target=example.com {base}/lookingglass/{name}\n" for name in COMMANDS)
    example = "mtr" if "mtr" in COMMANDS else next(iter(COMMANDS), "")
    text = USAGE.format(
        base=base,
        **PLACE,
        diagnostics=DIAGNOSTICS_USAGE.format(base=base, commands=lines, command=example) if COMMANDS else "",
        about="Speed tests, server" if SIZES else "Server",
        speedtests=SPEEDTESTS_USAGE.format(base=base) if SIZES else "",
        limits=rate_limits_text(),
    )
    return PlainTextResponse(text, headers={"Vary": "Accept"})


async def answer_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    count_refusal(client_address(request), request.scope["path"], error.reason)
    try:
        return JSONResponse(error.body, error.status, error.headers)
    except (ValueError, RecursionError):  # the client's input, which is echoed, cannot be written as JSON
        detail = cast(list[dict[str, object]], error.body["detail"])
        body = {"detail": [{**each, "input": None} for each in detail]}
        return JSONResponse(body, error.status, error.headers)


async def answer_disconnected(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # the client is gone, and reads nothing


async def answer_internal_error(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": "Internal Server Error"}, 500)  # uvicorn logs the traceback


# ---- OpenAPI -----------------------------------------------------------------------------------------------

Schema = dict[str, Any]
SCALARS = {str: "string", int: "integer", float: "number", type(None): "null"}
COMPONENTS = {each.__name__: each for union in (Event, Result) for each in typing.get_args(union)}
STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}


def array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def enum(*values: object) -> Schema:
    return {"enum": list(values)}


def object_schema(properties: Mapping[str, Schema], optional: Sequence[str] = ()) -> Schema:
    """An object with these properties and no others."""
    required = [name for name in properties if name not in optional]
    schema = {"type": "object", "properties": dict(properties), "required": required}
    return schema | {"additionalProperties": False}


def typed_dict_schema(cls: type) -> Schema:
    hints = typing.get_type_hints(cls, include_extras=True)
    optional = [name for name, hint in hints.items() if typing.get_origin(hint) is NotRequired]
    schema = object_schema({name: schema_of(hint) for name, hint in hints.items()}, optional)
    return schema | ({"description": cleandoc(cls.__doc__)} if cls.__doc__ else {})


def schema_of(hint: Any) -> Schema:
    """The JSON schema of a type hint, for those that events and results are made of."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in COMPONENTS.values():
        return {"$ref": f"#/components/schemas/{hint.__name__}"}
    if typing.is_typeddict(hint):
        return typed_dict_schema(hint)
    if origin is NotRequired:
        return schema_of(arguments[0])
    if origin is Literal:
        return enum(*arguments)
    if origin is list:
        return array(schema_of(arguments[0]))
    if not arguments:
        return {"type": SCALARS[hint]}
    if SCALARS.keys() >= set(arguments):
        return {"type": [SCALARS[each] for each in arguments]}
    return {"anyOf": [schema_of(each) for each in arguments]}


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
DETAIL, ERROR = object_schema({"detail": STRING}), object_schema({"error": STRING})
INVALID = object_schema({"type": STRING, "loc": array(STRING), "msg": STRING, "input": {}})
ERROR_RESPONSES = {  # status: when, and the body's schema
    408: (f"The body did not come within {BODY_SECONDS} s, or an upload stalled.", DETAIL),
    411: ("An upload without Content-Length.", DETAIL),
    413: (f"The body is larger than {BODY_BYTES} bytes, or {UPLOAD_BYTES} of an upload.", DETAIL),
    422: (
        "No target, or none that can or may be measured: `msg` says why.",
        object_schema({"detail": array(INVALID)}),
    ),
    429: ("Over the rate limit, or all slots of the client are in use.", ERROR),
    503: ("No free slot, or a tool that is not installed or may not run.", ERROR),
}
HEADER_MEANINGS = {"Retry-After": "Seconds to wait before the next try."} | RATE_HEADERS


def response(when: str, content: Mapping[str, Schema], headers: Iterable[str] = ()) -> Schema:
    """A response: when it comes, its bodies' schemas by media type, its headers by name."""
    described = {name: {"description": HEADER_MEANINGS[name], "schema": INTEGER} for name in headers}
    bodies = {media_type: {"schema": schema} for media_type, schema in content.items()}
    return {"description": when, "content": bodies} | ({"headers": described} if described else {})


def operation(summary: str, success: Schema, errors: Sequence[int] = (), **more: Any) -> Schema:
    """An operation with its 200 response and the statuses of its errors."""
    responses = {"200": success}
    for status in errors:
        when, schema = ERROR_RESPONSES[status]
        headers = HEADER_MEANINGS if status == 429 else ("Retry-After",) if status == 503 else ()
        responses[str(status)] = response(when, {JSON_TYPE: schema}, headers)
    return {"summary": summary, "responses": responses, **more}


def command_operation(command: Command) -> Schema:
    forms = [
        {"type": "string", "format": f"ipv{command.version}"},
        {"type": "string", "pattern": f"^(?:{NAME.pattern})$"},
    ]
    target = {"description": "An address or a host name.", "anyOf": forms, "examples": ["example.com"]}
    body = {"schema": {"type": "object", "properties": {"target": target}, "required": ["target"]}}
    argv = " ".join(command.argv_for("ADDRESS"))
    output = "The output of the tool as it comes: text, or with `Accept` one event a line."
    success = response(output, {TEXT_TYPE: STRING, EVENTS_TYPE: schema_of(Event)}, RATE_HEADERS)
    examples = zip(typing.get_args(Event), EXAMPLES, strict=True)
    success["content"][EVENTS_TYPE]["examples"] = {
        cls.__name__: {"summary": cls.__doc__, "value": event} for cls, event in examples
    }
    return operation(
        f"{command.tool} over IPv{command.version}",
        success,
        (408, 413, 422, 429, 503),
        description=f"Runs `{argv}`, at most {SETTINGS.DIAGNOSTIC_TIMEOUT} s. "
        f"Limit: {describe_rates(SETTINGS.RATE_LIMIT_DIAGNOSTICS)}.",
        operationId=command.name,
        requestBody={"required": True, "content": dict.fromkeys((JSON_TYPE, FORM_TYPE), body)},
    )


def speedtest_operations(size: Size) -> dict[str, Schema]:
    summary = f"{size.length} zero bytes"
    bytes_response = response("The bytes.", {"application/octet-stream": {}}, RATE_HEADERS)
    get = operation(summary, bytes_response, (429, 503), operationId=f"speedtest_{size.name}")
    get["description"] = f"Limit: {describe_rates(size.rates)}."
    return {"get": get, "head": operation(f"{summary}: the headers", {"description": "The headers alone."})}


def upload_operations() -> dict[str, Schema]:
    content = {JSON_TYPE: typed_dict_schema(Upload)}
    test = {"name": "test", "in": "query", "schema": STRING}
    test["description"] = f"A name for this test, of at most {UPLOAD_TEST_CHARS} characters."
    post = operation(
        "Takes bytes, keeps nothing, measures how fast they came",
        response("The speed, from the first byte to the last.", content, RATE_HEADERS),
        (408, 411, 413, 429, 503),
        description=f"Limit: {describe_rates(SETTINGS.RATE_LIMIT_SPEEDTEST)}.",
        operationId="speedtest_upload",
        parameters=[test],
        requestBody={"content": {"application/octet-stream": {"schema": {}}}},
    )
    summary = "What the running uploads of a test have brought so far"
    get = operation(summary, response("Zeros where none runs.", content), parameters=[test])
    return {"get": get, "post": post}


def get_operation(summary: str, content: Mapping[str, Schema]) -> Schema:
    return {"get": operation(summary, response("The answer.", content))}


def openapi() -> Schema:
    """The description of this API in OpenAPI 3.1, made from the tables and types that it runs on."""
    location = object_schema(dict.fromkeys(location_info(ipaddress.IPv4Address(0)), STRING))
    tools = array(STRING)
    states = {"status": enum("ok", "degraded"), "missing": tools, "forbidden": tools}
    health = object_schema(states, ("missing", "forbidden"))
    page = {"text/html; charset=utf-8": STRING}
    description = f"{offers().capitalize()} from {SETTINGS.NETWORK_LOCATION}. "
    description += f"Limits for each client: {rate_limits_text()}."
    info = {"title": "Looking glass", "version": VERSION, "description": description}
    return {
        "openapi": "3.1.0",
        "info": {**info, "license": {"name": "MIT", "identifier": "MIT"}},
        "paths": {
            **{f"/lookingglass/{name}": {"post": command_operation(each)} for name, each in COMMANDS.items()},
            **{f"/speedtest/{name}": speedtest_operations(size) for name, size in SIZES.items()},
            **({"/speedtest/upload": upload_operations()} if SIZES else {}),
            "/network/info": get_operation("Where this is, and who you are", {JSON_TYPE: location}),
            "/health": get_operation("Whether the tools are there", {JSON_TYPE: health}),
            "/": get_operation("How to use it; with `Accept`, the page", {TEXT_TYPE: STRING, **page}),
            "/openapi.json": get_operation("This description", {JSON_TYPE: {}}),
            "/docs": get_operation("This description in Swagger UI", page),
            "/redoc": get_operation("This description in ReDoc", page),
        },
        "components": {"schemas": {name: typed_dict_schema(cls) for name, cls in COMPONENTS.items()}},
    }


@cache
def openapi_json() -> bytes:
    return json.dumps(openapi(), separators=(",", ":")).encode()


async def describe_api(request: Request) -> Response:
    return Response(openapi_json(), media_type=JSON_TYPE)


CDN = "https://cdn.jsdelivr.net/npm/"
API_DOCS: dict[str, tuple[str, dict[str, str]]] = {  # the script of each page, and the files it loads
    "docs": (
        "SwaggerUIBundle({ url: 'openapi.json', dom_id: '#viewer' })",
        {
            "swagger-ui-dist@5.35.0/swagger-ui.css": (
                "sha384-WlYgdmXYOOBWL5apwjDEZwN+U3HmXSSu5R6V5aGxEcf7z+KuRNwBhoxKVN1i3D5I"
            ),
            "swagger-ui-dist@5.35.0/swagger-ui-bundle.js": (
                "sha384-gjRm0bEPMeTmMh5jT2cHccIwCUZSTd8YC+j0d0sXw0MdGEfScduGpSyF3ZSSLkX9"
            ),
        },
    ),
    "redoc": (
        "Redoc.init('openapi.json', {}, document.getElementById('viewer'))",
        {
            "redoc@2.5.4/bundles/redoc.standalone.js": (
                "sha384-w447zOpYfw/1Tv/5AK9NfHTlQIqE3RVR6KY62jCyy9zNDgO64cMwGGP1Fj0zJVf5"
            )
        },
    ),
}
DOCS_TAGS = {
    "css": '<link rel="stylesheet" href="{}" integrity="{}" crossorigin="anonymous">\n',
    "js": '<script defer src="{}" integrity="{}" crossorigin="anonymous"></script>\n',
}


def script_hash(script: str) -> str:
    """The source expression for an inline script or style in a content security policy."""
    return f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'"


async def api_docs(name: str, request: Request) -> Response:
    """A page that shows the description with files from a CDN; its policy allows no other sources."""
    call, files = API_DOCS[name]
    tags = "".join(DOCS_TAGS[path.rpartition(".")[2]].format(CDN + path, files[path]) for path in files)
    run = f"addEventListener('DOMContentLoaded', () => {call});"
    sources = " ".join(CDN + path for path in files)
    policy = f"default-src 'none'; script-src {script_hash(run)} {sources}; "
    policy += f"style-src 'unsafe-inline' {sources}; "
    policy += "img-src 'self' data:; connect-src 'self'; worker-src blob:; base-uri 'none'; "
    policy += "form-action 'none'; frame-ancestors 'none'"
    html = f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Looking glass: the API</title>
{tags}<script>{run}</script>
<div id="viewer">
<p>The description of this API is <a href="openapi.json">openapi.json</a>. The viewer for it is loaded from
{CDN.split("/")[2]}, and has not been loaded: it needs JavaScript, and access to that host.</p>
</div>
</html>
"""
    return HTMLResponse(html, headers={"Content-Security-Policy": policy})


@cache
def front_page() -> tuple[str, Headers]:
    page, policy = make_page(SETTINGS, COMMANDS, SIZES)
    return page, {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Vary": "Accept",
    }


async def front(request: Request) -> Response:
    """The page for browsers, the usage for others."""
    if "text/html" not in request.headers.get("accept", "").lower():
        return await usage(request)
    page, headers = front_page()
    return HTMLResponse(page, headers=headers)


# ---- routes and app ----------------------------------------------------------------------------------------


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Log the limits and everything that needs the operator's attention."""
    for line in unknown_settings(ENV_FILE):
        log.warning(line)
    slots = {"commands": DIAGNOSTICS if COMMANDS else None, "speedtests": SPEEDTESTS if SIZES else None}
    log.info("limits", {"rates": rate_limits_text(), **slots})
    if missing := missing_tools():
        pairs = {"missing": " ".join(missing), "install": install_hint(missing)}
        log.warning("Tools are missing: their commands answer 503 until they are installed", pairs)
    if SETTINGS.CORS_CREDENTIALS and "*" in SETTINGS.CORS_ORIGINS:
        log.warning("CORS_CREDENTIALS has no effect while CORS_ORIGINS is *: list the origins instead")
    probes = asyncio.gather(probe_tools(), LIMITS.probe())
    yield
    probes.cancel()
    with suppress(asyncio.CancelledError):
        await probes


routes = [
    Route("/", front, middleware=[Middleware(GZipMiddleware)]),
    Route("/health", health),
    Route("/network/info", network_info),
    Route("/openapi.json", describe_api),
    *(Route(f"/{name}", partial(api_docs, name)) for name in API_DOCS),
    *(
        Route(f"/lookingglass/{name}", partial(diagnostic, command), methods=["POST"])
        for name, command in COMMANDS.items()
    ),
    *(Route(f"/speedtest/{name}", partial(speedtest, size)) for name, size in SIZES.items()),
    *([Route("/speedtest/upload", upload, methods=["GET", "POST"])] if SIZES else []),
    Route("/metrics", metrics),
]


async def answer_http_exception(request: Request, error: Exception) -> Response:
    """Answers the router's 404 and 405; redirects a path with a trailing slash to the route without it."""
    assert isinstance(error, HTTPException)
    path, query = request.scope["path"].rstrip("/"), request.url.query
    if error.status_code == 404 and path != request.scope["path"] and path in {each.path for each in routes}:
        return Response(status_code=307, headers={"Location": f"{path}?{query}" if query else path})
    return JSONResponse({"detail": error.detail}, error.status_code, error.headers)


app = Starlette(
    routes=routes,
    middleware=[
        Middleware(
            CORSMiddleware,
            allow_origins=SETTINGS.CORS_ORIGINS,
            allow_methods=SETTINGS.CORS_METHODS,
            allow_headers=SETTINGS.CORS_HEADERS,
            allow_credentials=SETTINGS.CORS_CREDENTIALS and "*" not in SETTINGS.CORS_ORIGINS,
            expose_headers=["Retry-After", *RATE_HEADERS],
        )
    ],
    exception_handlers={
        RequestError: answer_request_error,
        HTTPException: answer_http_exception,
        ClientDisconnect: answer_disconnected,
        Exception: answer_internal_error,
    },
    lifespan=lifespan,
)
app.router.redirect_slashes = False  # the client's Host would be in Location: see answer_http_exception


# ---- serving -----------------------------------------------------------------------------------------------

LOG_LINES = 1000  # length of the queue
LOG_SECONDS = 1  # time to write it at the end
HEALTH_SECONDS = 5  # time limit of `lg.py health`


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets for the addresses of `host`, or where it is empty for all, IPv4 and IPv6. Raises OSError."""
    sockets = []
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, *_, address in found:
        try:
            listening = socket.create_server(address, family=family)
        except OSError as error:
            if host or error.errno != errno.EAFNOSUPPORT:
                raise
            continue  # a machine without IPv6
        # Connections inherit both. asyncio sets TCP_NODELAY only where a socket names its protocol; without,
        # the second write of an answer waits for the client's delayed acknowledgement: 40 ms.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The kernel drops a peer that takes nothing, as no closing of ours could.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALL_SECONDS * 1000)
        sockets.append(listening)
    return sockets


class Logfmt(logging.Formatter):
    """A record as one line of key=value pairs: log.info("run", {"command": "ping"}) adds command=ping."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")
        pairs: dict[str, object] = {"time": moment, "level": record.levelname.lower()}
        pairs |= {"msg": record.getMessage(), **(record.args if isinstance(record.args, Mapping) else {})}
        pairs["traceback"] = self.formatException(record.exc_info) if record.exc_info else None
        return " ".join(f"{key}={self.quote(value)}" for key, value in pairs.items() if value is not None)

    def quote(self, value: object) -> str:
        text = str(value)
        if text.isprintable() and re.fullmatch(r'[^\s"=\\]+', text):
            return text
        return json.dumps(text, ensure_ascii=not text.isprintable())


class LogHandler(logging.Handler):
    """Writes the log in a thread of its own: a log that nobody reads does not hold up the service."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: queue.Queue[str] = queue.Queue(LOG_LINES)
        self.dropped = 0
        threading.Thread(target=self.write, daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.lines.put_nowait(self.format(record) + "\n")
        except queue.Full:
            self.dropped += 1

    def write(self) -> None:
        while True:
            line = self.lines.get()
            if dropped := self.dropped:
                self.dropped -= dropped
                arguments = ("lg", logging.WARNING, "", 0, "log lines dropped", ({"lines": dropped},), None)
                line += self.format(logging.LogRecord(*arguments)) + "\n"
            data = line.encode(errors="backslashreplace")
            with suppress(OSError):  # a full disk, a pipe without a reader
                while data:
                    data = data[os.write(2, data) :]
            self.lines.task_done()

    def close(self) -> None:
        """Wait a moment for what is still to be written."""
        deadline = time.monotonic() + LOG_SECONDS
        while self.lines.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.01)
        super().close()


def configure_logging() -> None:
    handler = LogHandler()
    handler.setFormatter(Logfmt())
    logging.basicConfig(handlers=[handler], level=SETTINGS.LOG_LEVEL.upper())
    if SETTINGS.LOG_LEVEL != "debug":  # uvicorn warns of every malformed request: anybody could fill the disk
        logging.getLogger("uvicorn").setLevel(logging.ERROR)


def own_address() -> str:
    """Where this server is reached from its own machine."""
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(SETTINGS.HOST, SETTINGS.HOST)  # noqa: S104


def serve() -> None:
    configure_logging()
    try:
        sockets = listen(SETTINGS.HOST, SETTINGS.PORT)
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise settings_error("expected a port that is not in use", PORT=SETTINGS.PORT) from None
        reason = f"expected an address of this machine and a port that this user may use ({error})"
        raise settings_error(reason, HOST=SETTINGS.HOST, PORT=SETTINGS.PORT) from None
    config = uvicorn.Config(
        app,
        http=Connection,
        loop="asyncio",
        ws="none",
        workers=1,
        log_config=None,
        access_log=SETTINGS.LOG_LEVEL == "debug",
        proxy_headers=False,  # client_address does that
        server_header=False,
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    host = f"[{own_address()}]" if ":" in own_address() else own_address()
    log.info("started", {"version": VERSION, **PLACE, "url": f"http://{host}:{SETTINGS.PORT}/"})
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    # The parent may have left it ignored: the kernel would reap the tools before we do.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # a closed terminal ends the commands too
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    with suppress(KeyboardInterrupt):
        Server(config).run(sockets)


def ask_health() -> None:
    """Print what /health of the server with these settings answers. Raises SystemExit where none does."""
    connection = http.client.HTTPConnection(own_address(), SETTINGS.PORT, timeout=HEALTH_SECONDS)
    try:
        connection.request("GET", "/health")
        print(connection.getresponse().read().decode())
    except (OSError, UnicodeError, http.client.HTTPException) as error:
        raise SystemExit(f"No answer from {own_address()} port {SETTINGS.PORT}: {error}") from None


def main() -> None:
    ask_health() if ACTION == "health" else serve()


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
        name, argv = command.name.removesuffix("6") if command.version == 6 else command.name, command.argv
        drawn = command.tool in TITLES and (command.tool != "mtr" or "--raw" in argv)
        probes = int(argv[argv.index("-c") + 1]) if drawn and "-c" in argv[:-1] else 10
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
    here = {"location": settings.NETWORK_LOCATION, "facility": settings.NETWORK_FACILITY}
    here |= {"map_url": settings.NETWORK_MAP_URL, "facility_url": settings.NETWORK_FACILITY_URL}
    here |= {"looking_glass_ipv4": settings.NETWORK_IPV4, "looking_glass_ipv6": settings.NETWORK_IPV6}
    setup = {
        "tools": tools,
        "places": [{"name": settings.NETWORK_LOCATION, "url": "", "info": here}, *others],
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

function hopOf(before, {address, hostname, addresses, asn, network, stats, timings, probes = timings}) {
	const others = list(addresses).filter((each) => each !== address)
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
	if (hop.rtts[seq - 1]) return {} // a late reply overrides a loss, never the other way
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
	const known = Object.entries(rtts).filter(([, {rtt}]) => rtt)
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
	const heads = {at, name, range: [h("span", "0"), h("span", ms(top))], strip: "Probes", loss: "Loss"}
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
	fill($("place"), h("h1", info.location ?? name), about)
}

function drawChoices() {
	const option = (value, label) => h("option", {key: value, value}, label)
	const options = [option("auto", `Auto (IPv${myVersion()})`), option(4, "IPv4"), option(6, "IPv6")]
	const named = ({name, down}) => (down ? [h("s", name), h("span.hush", " is down")] : name)
	const chips = [...PLACES.map((place, i) => radio("at", i, "chip", named(place))), radio("at", "all", "chip", "all")]
	const tabs = TOOLS.map(({id, title}) => radio("command", id, "", title))
	const mine = PLACES[0].info?.your_ip
	function fillIn() {
		form.target.value = mine
		form.oninput()
	}
	fill($("tabs"), tabs)
	fill(form.version, options)
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
	Object.assign(place, {health, info: info ?? place.info, down: !info})
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
