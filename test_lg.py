# SPDX-License-Identifier: MIT
"""The looking glass, tested as it is used: on real sockets, with the real tools.

`python -m pytest test_lg.py` runs what this machine can; the rest is skipped with the reason, or fails
where LG_TEST_REQUIRE_ALL is set. Stand-ins for the tools, first on PATH, do what the real ones will not do
on demand; a stand-in for the resolver answers for names. Packets go to loopback and to `.ci/hops` alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import importlib.util
import ipaddress
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import secrets
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import timeit
from base64 import b64encode
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, cast, get_args
from unittest.mock import AsyncMock, Mock, patch
from urllib.parse import quote

import httpx
import jsonschema  # type: ignore[import-untyped]
import limits
import openapi_spec_validator
import pytest
import uvicorn
from dotenv import dotenv_values
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from playwright.sync_api import Browser, Page, Route, sync_playwright
from starlette.types import Message, Receive, Scope, Send

import lg

sys.path.insert(0, str(Path(__file__).parent / ".ci"))

from browsers import (
    PATIENCE,
    Chromium,
    Engine,
    Firefox,
    NamespaceTransport,
    WebKit,
    in_network_of,
    open_page,
    shifts,
    until,
)

HERE = Path(__file__).parent
HOPS, HOPS_NAME = HERE / ".ci" / "hops", f"test{os.getpid()}-"
TARGET4, TARGET6 = "198.51.100.254", "2001:db8::254"
T = TypeVar("T")
SOON = 5.0  # where what must come would come by itself later
DEFAULTS = lg.load_settings({})
COMMANDS, SIZES = lg.make_commands(DEFAULTS), lg.make_sizes(DEFAULTS)
DESCRIPTION = lg.describe_api(DEFAULTS, COMMANDS, SIZES)


def lacking(what: str) -> NoReturn:
    """Skip a test, or fail it where all shall run."""
    reason = f"This machine lacks {what}."
    if os.environ.get("LG_TEST_REQUIRE_ALL"):
        pytest.fail(reason)
    pytest.skip(reason)


def outcome(coroutine: Coroutine[Any, Any, T]) -> T:
    """What it returns, in a thread of its own: where a browser is driven, this one has a loop already."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


# ---- the server under test ---------------------------------------------------------------------------------

# Loaded into a server's process: answers for names with addresses.
SITE = r"""
import json, os, socket, time

names = json.loads(os.environ["LG_TEST_NAMES"])
real_getaddrinfo = socket.getaddrinfo

def getaddrinfo(host, port, family=0, *rest, **more):
    if not isinstance(host, bytes):  # not a target's name
        return real_getaddrinfo(host, port, family, *rest, **more)
    answer = names.get(host.decode().rstrip(".").lower(), names.get("*", []))
    if answer == "hang":
        time.sleep(3600)
    found = [address for address in answer if (":" in address) == (family == socket.AF_INET6)]
    if not found:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return [(family, socket.SOCK_STREAM, 6, "", (address, 0)) for address in found]

socket.getaddrinfo = getaddrinfo
"""


FEW_FILES = re.compile(r".*The limit for open files \(ulimit -n\) allows few connections.*\n")


def free_port() -> int:
    """A port below those that the system gives to outgoing connections, which could take it meanwhile."""
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with socket.socket(socket.AF_INET6) as probe, contextlib.suppress(OSError):
            probe.bind(("::", port))
            return port


# Starts the server with other values for module constants, so that a test need not wait for a long limit.
WITH_CONSTANTS = """
import lg
for name, value in {constants}.items():
    assert hasattr(lg, name), name
    setattr(lg, name, value)
lg.main()
"""


def write_script(path: Path, script: str) -> None:
    """Put it there at once: a file that is being written cannot be started."""
    new = path.with_suffix(".new")
    new.write_text(script)
    new.chmod(0o755)
    new.replace(path)


class Server:
    """A looking glass on a free port, with these settings and stand-ins, as a client sees it.

    `names` stands in for the resolver. `constants` of the module have other values, so that a test need not
    wait for a long limit.
    """

    process: subprocess.Popen[bytes]  # of a SpawnedServer
    pid = os.getpid()
    prefix: tuple[str, ...] = ()

    def __init__(
        self,
        folder: Path,
        tools: Mapping[str, str] = {},
        names: Mapping[str, object] = {},
        constants: Mapping[str, float] = {},
        **environment: str,
    ) -> None:
        self.folder, self.names, self.constants = folder, names, constants
        self.port = int(environment.setdefault("PORT", str(free_port())))
        (folder / "bin").mkdir(exist_ok=True)
        for tool, script in tools.items():
            self.stand_in(tool, script)
        self.environment = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "RATE_LIMIT_DIAGNOSTICS": "off",
            "RATE_LIMIT_LOOKUPS": "off",
            "RATE_LIMIT_SPEEDTEST": "off",
            "RATE_LIMIT_SPEEDTEST_10G": "off",
            **environment,
        }
        self.http = self.client()

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", timeout=PATIENCE, trust_env=False, **options
        )

    def stand_in(self, tool: str, script: str) -> None:
        write_script(self.folder / "bin" / tool, script)

    def run(self, command: str, target: str = "", **options: Any) -> httpx.Response:
        target = target or ("::1" if command.endswith("6") else "127.0.0.1")
        return self.http.post(f"/lookingglass/{command}", json={"target": target}, **options)

    def connect(
        self, family: int = socket.AF_INET, receive_bytes: int = 0, source: str = ""
    ) -> socket.socket:
        with in_network_of(self.pid) if self.prefix else contextlib.nullcontext():
            connection = socket.socket(family)
        if source:
            connection.bind((source, 0))
        if receive_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.settimeout(PATIENCE)
        connection.connect(("::1" if family == socket.AF_INET6 else "127.0.0.1", self.port))
        return connection

    def send(self, request: bytes, **options: Any) -> socket.socket:
        """A connection on which these bytes were sent, and nothing read yet."""
        connection = self.connect(**options)
        connection.sendall(request)
        return connection

    def begin(self, command: str = "ping", target: str = "127.0.0.1", **options: Any) -> socket.socket:
        """A connection on which a command was asked for, and nothing read yet."""
        body = json.dumps({"target": target}).encode()
        header = f"POST /lookingglass/{command} HTTP/1.1\r\nHost: lg\r\nContent-Length: {len(body)}\r\n\r\n"
        return self.send(header.encode() + body, **options)

    def answer_seconds(self) -> float:
        """How long /health takes on a new connection."""
        begun = time.monotonic()
        answer = left(self.send(b"GET /health HTTP/1.1\r\nHost: lg\r\nConnection: close\r\n\r\n"))
        assert answer.startswith(b"HTTP/1.1 200 ")
        return time.monotonic() - begun

    def idle(self) -> bool:
        """Whether none of this server's stand-ins runs."""
        return not running(f"{self.folder}/bin/")

    def has_reaped(self) -> bool:
        return self.pid not in [parent for parent, _, line in processes().values() if not line]

    @property
    def log(self) -> str:
        """Without the warning of a machine where few files may be open."""
        return FEW_FILES.sub("", (self.folder / "log").read_text(errors="replace"))


class LocalServer(Server):
    """A service in a thread of this process. Its log has what this thread logs at level info and above.

    Its tools are not tried at the start, unless `trials` asks for that: stand-ins would fail.
    """

    def __init__(self, folder: Path, trials: bool = False, **options: Any) -> None:
        super().__init__(folder, **options)
        self.patches = contextlib.ExitStack()
        for name, value in self.constants.items():
            self.patches.enter_context(patch.object(lg, name, value))
        self.lookups = list[str]()
        settings = lg.load_settings(self.environment)
        self.server = lg.make_server(settings, lg.listen(settings.HOST, settings.PORT))
        self.server.service.targets.getaddrinfo = self.getaddrinfo
        if not trials:
            self.server.service.tools.trials = {}
        self.go_on = threading.Event()  # for lookups that wait
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.handler = logging.FileHandler(folder / "log")
        self.handler.setFormatter(lg.Logfmt())
        self.handler.addFilter(lambda record: record.thread == self.thread.ident)
        logging.getLogger("lg").setLevel(logging.INFO)
        logging.getLogger("lg").addHandler(self.handler)
        self.thread.start()
        until(lambda: self.server.started or not self.thread.is_alive())
        assert self.server.started

    def getaddrinfo(self, host: bytes, port: None, family: int, kind: int) -> list[Any]:
        """Answers for names with addresses, or as a word says."""
        name = host.decode()
        self.lookups.append(name)
        answer: Any = self.names.get(name.rstrip(".").lower(), self.names.get("*", []))
        if answer in ("hang", "wait"):
            self.go_on.wait()
            answer = ["127.0.0.1"]
        if answer == "fail":
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        found = [address for address in answer if (":" in address) == (family == socket.AF_INET6)]
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(family, kind, 6, "", (address, 0)) for address in found]

    def close(self) -> None:
        self.go_on.set()
        self.http.close()
        self.server.should_exit = True
        self.thread.join(PATIENCE)
        self.patches.close()
        assert not self.thread.is_alive()
        logging.getLogger("lg").removeHandler(self.handler)
        self.handler.close()


class SpawnedServer(Server):
    """`python lg.py` in a process of its own: for signals, the log, memory, faults, other module constants.

    With a `prefix`, a command that starts it in another network namespace, it has the real resolver; clients
    made here connect to it there.
    """

    def __init__(
        self,
        folder: Path,
        prefix: tuple[str, ...] = (),
        command: tuple[str, ...] = (sys.executable, "lg.py"),
        descriptors: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(folder, **options)
        if self.constants:
            command = (sys.executable, "-c", WITH_CONSTANTS.format(constants=dict(self.constants)))
        if descriptors:
            command = ("sh", "-c", f'ulimit -n {descriptors}; exec "$@"', "sh", *command)
        self.prefix = prefix
        if not prefix:
            (folder / "sitecustomize.py").write_text(SITE)
            self.environment |= {"PYTHONPATH": str(folder), "LG_TEST_NAMES": json.dumps(self.names)}
        with (folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, *command],
                cwd=HERE,
                env=self.environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        self.pid = self.process.pid
        if prefix:
            self.http = self.client(transport=NamespaceTransport(self.pid))
        try:
            until(self.answers)
        except BaseException:
            self.process.kill()
            raise

    def answers(self) -> bool:
        assert self.process.poll() is None, self.log
        try:
            health = self.http.get("/health")
        except httpx.TransportError:
            return False
        assert health.status_code == 200, self.log
        return True

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))  # noqa: PTH208

    def stop(self) -> int:
        """The status with which it ends after SIGTERM."""
        self.process.terminate()
        self.process.send_signal(signal.SIGCONT)  # a failed test may leave it stopped
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        self.stop()
        assert "Traceback" not in self.log, self.log


def make(folder: Path, **options: Any) -> Any:
    """A server in this process, or in one of its own where `spawned` or else another option asks for that."""
    needed = options.keys() & {"prefix", "command", "constants", "descriptors"}
    return (SpawnedServer if options.pop("spawned", needed) else LocalServer)(folder, **options)


def processor_seconds(pid: int) -> float:
    fields_of = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields_of[11]) + int(fields_of[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> float:
    """MiB."""
    return int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0]) / 1024


Start = Callable[..., Any]


@pytest.fixture
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts servers for one test."""
    servers: list[Any] = []

    def start(**options: Any) -> Any:
        servers.append(make(tmp_path_factory.mktemp("server"), **options))
        return servers[-1]

    yield start
    for server in servers:
        until(server.has_reaped)
        server.close()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts one server for all tests that want these settings, and that leave it as they found it."""
    servers: dict[str, Any] = {}  # or what was raised by the start, which is not tried again

    def start(**options: Any) -> Any:
        key = json.dumps(options, sort_keys=True)
        if key not in servers:
            try:
                servers[key] = make(tmp_path_factory.mktemp("shared"), **options)
            except BaseException as failure:
                servers[key] = failure
        if isinstance(servers[key], BaseException):
            raise servers[key]
        return servers[key]

    yield start
    for server in servers.values():
        if not isinstance(server, BaseException):
            server.close()


Once = Callable[[str, Callable[[], Any]], Any]
Alone = Callable[[], contextlib.AbstractContextManager[None]]


@pytest.fixture(scope="session")
def common_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all the processes that run the tests."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@contextlib.contextmanager
def locked(path: Path, exclusively: bool = True) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if exclusively else fcntl.LOCK_SH)
        yield


@pytest.fixture(scope="session")
def once(common_folder: Path) -> Once:
    """Makes a value that JSON can hold once, for all processes that run the tests."""

    def get(name: str, make: Callable[[], Any]) -> Any:
        path = common_folder / f"{name}.json"
        with locked(path.with_suffix(".lock")):
            if not path.exists():
                path.write_text(json.dumps(make()))
            return json.loads(path.read_text())

    return get


@pytest.fixture(scope="session")
def alone(common_folder: Path) -> Alone:
    """While a session's fixture is in this context, no test of another process runs: for what is measured."""

    @contextlib.contextmanager
    def keep_others_waiting() -> Iterator[None]:
        with locked(common_folder / "queue"), locked(common_folder / "running"):
            yield

    return keep_others_waiting


@pytest.fixture(autouse=True)
def beside_others(common_folder: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        with locked(common_folder / "queue", exclusively=False):
            stack.enter_context(locked(common_folder / "running", exclusively=False))
        yield


@pytest.fixture(autouse=True)
def no_answer_fails(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Notices what a service in this process logs with a traceback."""
    yield
    assert [record.exc_text for record in caplog.get_records("call") if record.exc_info] == []


@pytest.fixture(scope="session", autouse=True)
def stand_ins_are_what_runs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Refuses to run where the real tools would run in place of stand-ins, with every address allowed."""
    folder = tmp_path_factory.mktemp("stand-in")
    write_script(folder / "ping", ECHO)
    line = ["env", f"PATH={folder}:{os.environ['PATH']}", "ping", "-V"]
    printed = subprocess.check_output(line, stdin=subprocess.DEVNULL)
    if not printed.startswith(b"argv -V\n"):
        pytest.fail(f"A stand-in for a tool is not what runs in {folder}: choose another with --basetemp")


@pytest.fixture(scope="session", autouse=True)
def hangup_reaches_processes() -> None:
    """Under nohup it is ignored, and what is ignored would be inherited; a handler is not."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)


TOOLS = ("ping", "traceroute", "mtr")


def every_tool(script: str) -> dict[str, str]:
    return dict.fromkeys(TOOLS, script)


NAMES = {
    "here.example": ["127.0.0.2", "::1"],
    "mixed.example": ["10.0.0.1", "127.0.0.9", "127.0.0.10"],
    "example.com": ["127.0.0.1", "::1"],
    "xn--bcher-kva.example": ["127.0.0.1"],
    "v6.example": ["::1"],
    "inside.example": ["10.0.0.1"],
    "broken.example": "fail",
}


@pytest.fixture(scope="session")
def echo(shared: Start) -> Any:
    """A server for the tests that need no settings of their own; its tools print how they were started."""
    return shared(names=NAMES, tools=every_tool(ECHO))


class Gate:
    """What a stand-in waits for until the test opens it; `wait` is a line for its script."""

    def __init__(self, path: Path) -> None:
        self.path, self.wait = path, f"while [ ! -e '{path}' ]; do sleep 0.01; done\n"

    def open(self) -> None:
        self.path.touch()


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


def processes() -> dict[int, tuple[int, int, str]]:
    """pid → parent, process group and command line; a zombie has no command line."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            _, parent, group, *_ = (path / "stat").read_text().rpartition(") ")[2].split()
            line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found[int(path.name)] = (int(parent), int(group), line)
    return found


def running(text: str) -> list[int]:
    """The processes whose command line contains this text."""
    return [pid for pid, (_, _, line) in processes().items() if text in line]


def group_of(address: str) -> int:
    """The process group of the tool that measures this address, once it runs."""
    return os.getpgid(until(lambda: running(f" {address} "))[0])


def members(group: int) -> list[int]:
    """The living members of a process group; zombies wait for the server, or for this machine's init."""
    return [pid for pid, (_, its, line) in processes().items() if its == group and line]


def lone_address() -> str:
    """A random loopback address, by which a test finds the processes that it started."""
    return f"127.{secrets.randbelow(254) + 1}.{secrets.randbelow(256)}.{secrets.randbelow(254) + 1}"


def received(connection: socket.socket, last: bytes) -> bytes:
    """What is read from a connection, up to these bytes, or to its end."""
    answer = b""
    while not answer.endswith(last) and (chunk := connection.recv(65536)):
        answer += chunk
    return answer


def left(connection: socket.socket) -> bytes:
    """What is read from a connection, to its end."""
    chunks = []
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(65536):
            chunks.append(chunk)
    return b"".join(chunks)


ECHO = r"""#!/bin/sh
echo argv "$@"
echo environment $(tr '\0' ' ' < /proc/$$/environ)
echo stdin $(wc -c < /proc/$$/fd/0)
read -r _ _ _ _ _ session _ < /proc/$$/stat
echo leads its session: $((session == $$))
"""
ENDLESS = "#!/bin/sh\necho begun\nwhile :; do echo line; sleep 0.02; done\n"
SILENT = "#!/bin/sh\nwhile :; do sleep 1000; done\n"
STUBBORN = "#!/bin/sh\ntrap '' INT TERM HUP PIPE\necho begun\nwhile :; do sleep 0.05; done\n"
FORKING = "#!/bin/sh\necho begun\nsleep 1000 &\nsleep 1000 &\nwait\n"


# ---- the six diagnostics -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("ping", "-4 -n -O -c 15 -W 2 -s 56 127.0.0.1"),
        ("ping6", "-6 -n -O -c 15 -W 2 -s 56 ::1"),
        ("traceroute", "-4 -q 3 -w 3,3,10 -m 30 127.0.0.1"),
        ("traceroute6", "-6 -q 3 -w 3,3,10 -m 30 ::1"),
        ("mtr", "-4 --raw -e -c 10 -i 1 -G 1 -Z 2 -m 30 127.0.0.1"),
        ("mtr6", "-6 --raw -e -c 10 -i 1 -G 1 -Z 2 -m 30 ::1"),
    ],
)
def test_command_runs_its_tool_with_fixed_arguments_and_the_address(
    echo: Server, command: str, arguments: str
) -> None:
    assert f"argv {arguments}\n" in echo.run(command).text


def test_tool_has_a_minimal_environment_no_input_and_a_session_of_its_own(serve: Start) -> None:
    server = serve(command=shell("exec < lg.py"), tools={"ping": ECHO})
    path = f"{server.environment['PATH']}:/usr/local/sbin:/usr/sbin:/sbin"
    assert server.run("ping").text.splitlines()[1:] == [
        f"environment LC_ALL=C PATH={path} RES_OPTIONS=timeout:1 attempts:1",
        "stdin 0",
        "leads its session: 1",
    ]


def test_stream_has_headers_against_caching_and_buffering(echo: Server) -> None:
    headers = echo.run("ping").headers
    assert {name: headers[name] for name in ("Content-Type", *lg.STREAM_HEADERS)} == {
        "Content-Type": "text/plain; charset=utf-8",
        "Cache-Control": "no-store, no-transform",
        "X-Accel-Buffering": "no",
        "X-Content-Type-Options": "nosniff",
        "Vary": "Accept, Origin",
    }


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b'{"target": "127.0.0.1"}', "application/json"),
        (b'{"target": "127.0.0.1"}', "application/x-www-form-urlencoded"),
        (b'\xef\xbb\xbf {"target": "127.0.0.1", "count": 1000, "argv": ["-f"]}', "text/plain"),
        (b"target=127.0.0.1", "application/x-www-form-urlencoded"),
        (b"target=127%2E0.0.1&count=1000", "application/json"),
    ],
)
def test_body_is_json_or_a_form_regardless_of_content_type(
    echo: Server, body: bytes, content_type: str
) -> None:
    response = echo.http.post("/lookingglass/ping", content=body, headers={"Content-Type": content_type})
    assert response.text.startswith("argv -4 -n -O -c 15 -W 2 -s 56 127.0.0.1\n")


@pytest.mark.parametrize(
    ("command", "name", "line"),
    [
        ("ping", "Here.Example.", "Here.Example. has address 127.0.0.2"),
        ("ping6", "here.example", "here.example has IPv6 address ::1"),
        ("mtr6", "here.example", "here.example has IPv6 address ::1"),
        ("ping", "mixed.example", "mixed.example has address 127.0.0.9"),  # the first that is allowed
        ("ping", "Bücher.example", "xn--bcher-kva.example has address 127.0.0.1"),
    ],
)
def test_address_of_a_name_is_printed_and_measured(echo: Server, command: str, name: str, line: str) -> None:
    start = "Start: .*\n" if command == "mtr6" else ""
    assert re.match(rf"{line}\n{start}argv .* {line.split()[-1]}\n", echo.run(command, name).text)


def test_output_is_streamed_as_written_before_its_line_is_complete(serve: Start, gate: Gate) -> None:
    server = serve(tools={"traceroute": f"#!/bin/sh\nprintf ' 1  gw '\n{gate.wait}echo '1.0 ms'\n"})
    with server.http.stream("POST", "/lookingglass/traceroute", data={"target": "127.0.0.1"}) as response:
        chunks = response.iter_bytes()
        assert next(chunks) == b" 1  gw "
        gate.open()
        assert b"".join(chunks) == b"1.0 ms\n"


@pytest.mark.parametrize(
    ("command", "script", "text"),
    [
        ("ping", "exit 0", ""),
        ("ping", "echo '1 packets transmitted, 0 received'; exit 1", "1 packets transmitted, 0 received\n"),
        ("ping", "echo gone; exit 1", "gone\n--- ping: exit status 1 ---\n"),  # without having sent anything
        ("ping", "echo no answer yet for icmp_seq=1; exit 2", r"no .*\n--- ping: exit status 2 ---\n"),
        ("ping", "printf bad; exit 2", "bad\n--- ping: exit status 2 ---\n"),
        ("ping", "exit 3", "--- ping: exit status 3 ---\n"),
        ("ping", "echo bad >&2; kill -9 $$", "bad\n--- ping: killed by signal 9 ---\n"),
        ("traceroute6", "exit 1", "--- traceroute6: exit status 1 ---\n"),
        ("mtr", "echo mtr: no; exit 1", r"Start: \S+\nmtr: no\n--- mtr: exit status 1 ---\n"),
    ],
)
def test_closing_line_is_printed_only_for_a_fault(serve: Start, command: str, script: str, text: str) -> None:
    server = serve(tools={command.removesuffix("6"): f"#!/bin/sh\n{script}\n"})
    assert re.fullmatch(text, server.run(command).text)


# The same in the small internet of .ci/hops, with the real tools.


@pytest.fixture(scope="session")
def hops() -> Iterator[tuple[str, ...]]:
    """The prefix that runs a command on the first host of a small internet of this process's own."""
    if os.geteuid() != 0:
        lacking("root, for network namespaces")
    for tool in ("ip", "nft", *TOOLS):
        if not shutil.which(tool):
            lacking(f"the command {tool}")
    prefix = ("env", f"HOPS={HOPS_NAME}", str(HOPS))
    if subprocess.run([*prefix, "up"], check=False).returncode:
        subprocess.run([*prefix, "down"], check=False)
        lacking("permission to make network namespaces")
    yield (*prefix, "exec")
    subprocess.run([*prefix, "down"], check=True)


IN_HOPS = {
    "TARGET_ALLOW": "127.0.0.0/8,::1,198.51.100.0/24,2001:db8::/32",
    "MAX_DIAGNOSTICS_PER_CLIENT": "20",
}


@pytest.fixture(scope="session")
def in_hops(hops: tuple[str, ...], shared: Start) -> Any:
    return shared(prefix=hops, **IN_HOPS)


Transcripts = Mapping[str, str]  # command and host → text


@pytest.fixture(scope="session")
def transcripts(in_hops: Server, once: Once) -> Transcripts:
    """The output of each command for each host, all run at once."""
    runs = [f"{command} {host}" for command in COMMANDS for host in ("target", "hole")]

    def text(run: str) -> str:
        return in_hops.run(*f"{run}.lg.example".split(), timeout=99).text

    def run_all() -> Transcripts:
        with ThreadPoolExecutor(len(runs)) as pool:
            return dict(zip(runs, pool.map(text, runs), strict=True))

    return cast(Transcripts, once("transcripts", run_all))


def targets(command: str) -> tuple[str, str]:
    """The address of .ci/hops' target for a command, and what a name's line calls it."""
    return (TARGET6, "IPv6 address") if command.endswith("6") else (TARGET4, "address")


@pytest.mark.parametrize("command", COMMANDS)
def test_output_starts_with_the_resolved_address(transcripts: Transcripts, command: str) -> None:
    address, kind = targets(command)
    assert transcripts[f"{command} target"].startswith(f"target.lg.example has {kind} {address}\n")


@pytest.mark.parametrize("command", ["ping", "ping6"])
def test_ping_prints_replies_and_a_summary(transcripts: Transcripts, command: str) -> None:
    text, (address, _) = transcripts[f"{command} target"], targets(command)
    assert "\n15 packets transmitted, " in text
    assert len(re.findall(rf"^64 bytes from {address}: icmp_seq=\d+ ttl=60 time=", text, re.M)) > 5


@pytest.mark.parametrize("command", ["ping", "ping6"])
def test_ping_without_a_reply_prints_each_loss_and_a_summary(transcripts: Transcripts, command: str) -> None:
    losses = "".join(f"no answer yet for icmp_seq={n}\n" for n in range(1, 15))
    summary = r"15 packets transmitted, 0 received, 100% packet loss, time \d+ms\n+"
    pattern = rf"hole.*\nPING .*\n{losses}\n--- .* ping statistics ---\n{summary}"
    assert re.fullmatch(pattern, transcripts[f"{command} hole"])


@pytest.mark.parametrize("command", ["traceroute", "traceroute6"])
def test_traceroute_prints_each_hop_and_one_that_is_silent(transcripts: Transcripts, command: str) -> None:
    lines = transcripts[f"{command} target"].splitlines()[2:]
    assert [re.findall(r"^ *\d+|[a-z0-9.]+\.example", line) for line in lines[:4]] == [
        [" 1", "gw.pop.lg.example"],
        [" 2", "core1.ams.lg.example"],
        [" 3"],
        [" 4", "core2.fra.lg.example"],
    ]
    assert " target.lg.example " in lines[-1]


@pytest.mark.parametrize("command", ["traceroute", "traceroute6"])
def test_traceroute_stops_after_30_hops(transcripts: Transcripts, command: str) -> None:
    assert transcripts[f"{command} hole"].endswith("\n30  * * *\n")


@pytest.mark.parametrize("command", ["mtr", "mtr6"])
def test_mtr_prints_each_hop_when_it_first_answers(transcripts: Transcripts, command: str) -> None:
    live = transcripts[f"{command} target"].partition("HOST: ")[0]
    hops = {int(hop): host for hop, host in re.findall(r"^ *(\d+)\.\|-- (\S+)", live, re.M)}
    # Where its first reply at 5 was lost, the target has answered beyond.
    beyond = {hop for hop, host in hops.items() if hop > 5 and host == targets(command)[0]}
    assert hops.keys() - beyond == {1, 2, 4, 5}


@pytest.mark.parametrize("command", ["mtr", "mtr6"])
def test_mtr_ends_with_the_table_of_its_report(transcripts: Transcripts, command: str) -> None:
    header, *rows = transcripts[f"{command} target"].partition("HOST: ")[2].splitlines()
    assert header.split()[1:] == ["Loss%", "Snt", "Last", "Avg", "Best", "Wrst", "StDev"]
    assert [row.split()[0] for row in rows] == ["1.|--", "2.|--", "3.|--", "4.|--", "5.|--"]
    assert [row.split()[1] == "???" for row in rows] == [False, False, True, False, False]
    assert targets(command)[0] in rows[4]


# ---- what the tools print ----------------------------------------------------------------------------------


def recorded(name: str) -> str:
    return (HERE / ".ci" / "recorded" / name).read_text()


# The first five are recorded: in .ci/hops (three cycles of mtr, shortened), and of mtr 0.96 with the stand-in
# for mtr-packet that stands below. The others are typed after the tools' sources.
RECORDED = {
    "ping, a loss": recorded("ping"),
    "ping6, nothing comes back": recorded("ping6"),
    "traceroute": recorded("traceroute"),
    "mtr": recorded("mtr"),
    "mtr, version 0.96": recorded("mtr-0.96"),
    "ping, unreachable": """\
From 198.51.100.2 icmp_seq=1 Destination Host Unreachable
From 198.51.100.2 icmp_seq=2 Destination Net Unreachable
3 packets transmitted, 0 received, +2 errors, 100% packet loss, time 2030ms
pipe 2
""",
    "ping, duplicates, a late reply, a redirect and a source quench": """\
From 198.51.100.2 icmp_seq=1 Redirect Host(New nexthop: 198.51.100.3)
From 198.51.100.2: icmp_seq=1 Source Quench
64 bytes from 198.51.100.254: icmp_seq=1 ttl=60 time=1.00 ms
64 bytes from 198.51.100.254: icmp_seq=1 ttl=60 time=1.50 ms (DUP!)
no answer yet for icmp_seq=2
64 bytes from 198.51.100.254: icmp_seq=3 ttl=60 time=2.00 ms
64 bytes from 198.51.100.254: icmp_seq=2 ttl=60 time=1003 ms
3 packets transmitted, 3 received, +1 duplicates, 0% packet loss, time 2003ms
rtt min/avg/max/mdev = 1.000/335.333/1003.000/472.0 ms, pipe 2
""",
    # killed before it printed its summary, and before it printed that 3 to 5 were lost
    "ping, cut off": """\
64 bytes from 198.51.100.254: icmp_seq=1 ttl=60 time=1.00 ms
no answer yet for icmp_seq=2
64 bytes from 198.51.100.254: icmp_seq=6 ttl=60 time=3.00 ms
64 bytes fr""",
    "ping, no route": "ping: connect: Network is unreachable\n",
    "ping, remarks": """\
64 bytes from r2.lg.example (198.51.100.6): icmp_seq=1 ttl=60 time=1.15 ms (DIFFERENT ADDRESS!)
56 bytes from 198.51.100.254: icmp_seq=2 ttl=60 (truncated)
64 bytes from 198.51.100.254: icmp_seq=3 ttl=60 time=2.50 ms\t(same route)
64 bytes from 198.51.100.254: icmp_seq=4 ttl=60 time=9223372036854775 ms
4 packets transmitted, 4 received, 0% packet loss, time 3004ms
rtt min/avg/max/mdev = 1.150/1.825/2.500/0.675 ms
""",
    # iputils 20240905
    "ping, bad checksums": """\
64 bytes from 198.51.100.254: icmp_seq=1 ttl=60 time=20.1 ms
64 bytes from 198.51.100.254: icmp_seq=1 ttl=60 time=20.1 ms (BAD CHECKSUM!)
64 bytes from 198.51.100.254: icmp_seq=2 ttl=60 time=20.2 ms (BAD CHECKSUM!)
no answer yet for icmp_seq=2
64 bytes from 198.51.100.254: icmp_seq=3 ttl=60 time=20.3 ms
3 packets transmitted, 2 received, +2 corrupted, 33.3333% packet loss, time 2003ms
""",
    # iputils counts each answer of a broadcast group
    "ping, more replies than requests": """\
64 bytes from 198.51.100.254: icmp_seq=1 ttl=60 time=1.00 ms
1 packets transmitted, 15 received, -1400% packet loss, time 0ms
""",
    "ping, times of day and a name": """\
[1732562400.123456] 64 bytes from gw.lg.example (198.51.100.254): icmp_seq=1 ttl=60 time=1.00 ms
[1732562402.123456] no answer yet for icmp_seq=2
""",
    "traceroute6, several routers at a hop, addresses without names, a zone": """\
 1  fe80::1%eth0 (fe80::1%eth0)  0.500 ms  0.400 ms  0.300 ms
 2  2001:db8:0:2::2 (2001:db8:0:2::2)  1.000 ms r2.lg.example (2001:db8:0:2::3)  2.000 ms *
10  target.lg.example (2001:db8::254)  9.000 ms  9.100 ms  9.200 ms
""",
    "traceroute, unreachables, losses and addresses alone": """\
 1  gw.pop.lg.example (198.51.100.2)  1.000 ms !N  1.100 ms !N  1.200 ms
 2  r2.lg.example (198.51.100.6)  2.000 ms !H * r2.lg.example (198.51.100.6)  2.200 ms !X
 3  r3.lg.example (198.51.100.10)  3.000 ms !<13>  3.000 ms !F-1400  3.200 ms
 4  198.51.100.2  1.000 ms 198.51.100.3  1.100 ms *
 5  * 198.51.100.254 (198.51.100.254)  1227.896 ms *
""",
    "traceroute, an extension, names that are none, and cut off": """\
 1  gw.pop.lg.example (198.51.100.2) <MPLS:L=16004,E=0,S=1,T=1>  1.000 ms  1.100 ms  1.200 ms
 2  <img/src=x/onerror=alert(1)> (198.51.100.2)  1.000 ms  1.100 ms  1.200 ms
 3  . (198.51.100.2)  1.000 ms  1.100 ms  1.200 ms
 4  * core1.ams.lg.example (198.51.100.6)  2.0""",
    "traceroute, no route": "connect: Network is unreachable\n",
}
MTR_TYPED = {  # with "; " for most ends of lines
    "mtr6, a hop that changes, and an error": """\
x 0 33000; h 0 2001:db8:0:1::2; p 0 1000 33000; x 1 33001; h 1 2001:db8:0:2::2; p 1 2000 33001
d 1 r2.lg.example; mtr: Unexpected mtr-packet error; x 1 33002; h 1 2001:db8:0:2::3; p 1 3000 33002
d 1 r3.lg.example
""",
    "mtr, names and labels": """\
x 0 33000; h 0 198.51.100.2; m 0 16004 0 1 1; h 0 198.51.100.2; m 0 16004 0 1 1; p 0 1000 33000
x 1 33001; h 1 198.51.100.254; p 1 -512 33001; x 2 33002; h 2 198.51.100.254; p 2 2100 33002
x 0 33003; d 0 <img/src=x/onerror=alert(1)>; p 0 1100 33003; x 1 33004; d 1 198.51.100.254
p 1 2200 33004; d 2 target.lg.example; x 0 33005; h 0 198.51.100.3; m 0 16005 0 1 1
h 0 198.51.100.3; m 0 16005 0 1 1; d 0 .; p 0 1200 33005
""",
}
RECORDED |= {name: text.replace("; ", "\n") for name, text in MTR_TYPED.items()}

Probe = tuple[int, str, float]  # hop, router or "" for none, milliseconds


def mtr_raw(*probes: Probe) -> str:
    """`mtr --raw` of these probes in this order."""
    lines: list[str] = []
    last: dict[int, str] = {}
    for number, (hop, router, ms) in enumerate(probes, 33000):
        lines.append(f"x {hop - 1} {number}")
        if router and last.get(hop) != router:
            lines += 2 * [f"h {hop - 1} {router}"]
            last[hop] = router
        if router:
            lines.append(f"p {hop - 1} {ms * 1000:.0f} {number}")
    return "".join(f"{line}\n" for line in lines)


def probes_of(router: str, first: int, times: Iterable[float], step: int = 1) -> list[Probe]:
    """One reply at each position from the first on."""
    return [(hop, router, ms) for hop, ms in zip(itertools.count(first, step), times)]


GW, CORE1, CORE2, CORE3 = "198.51.100.2", "198.51.100.6", "198.51.100.14", "198.51.100.22"
START = [(1, GW, 1.0), (2, CORE1, 3.0)]
ABSENT = [1100, 471, 24, 980, 533, 96, 1020, 377, 610, 45, 870, 290, 730]  # each second hop, ms


class MtrPath(NamedTuple):
    probes: list[Probe]  # after START
    rows: list[list[str]]  # the routers of each row after those of START, the latest first
    beyond: str = ""  # the hops for which the router of the last row answered too, as a note tells


PATHS = {
    "a routing loop": MtrPath(
        [(hop, CORE1 * (hop % 2 == 0), 3.5 + 2 * hop) for hop in range(3, 29)],
        [*([["???"], [CORE1]] * 13), ["???"]],
    ),
    "the same address three times behind NAT": MtrPath(
        [*probes_of(CORE2, 3, [40, 50, 60]), *probes_of("", 6, [0] * 5)], [[CORE2], [CORE2], [CORE2], ["???"]]
    ),
    "times that grow in nine of ten pairs": MtrPath(
        probes_of(CORE2, 3, [40, 50, 60, 80, 70]), [*([[CORE2]] * 5), ["???"]]
    ),
    "times that grow in eight of ten pairs": MtrPath(
        probes_of(CORE2, 3, [40, 60, 50, 80, 70]), [[CORE2]], "4 to 7"
    ),
    "two routers at three hops": MtrPath(
        [*probes_of(CORE3, 3, [9, 8, 9]), *probes_of(CORE2, 3, [9, 8, 9])], [*([[CORE2, CORE3]] * 3), ["???"]]
    ),
    "the same address twice": MtrPath(probes_of(CORE2, 3, [9, 8]), [[CORE2], [CORE2], ["???"]]),
    "a router that returns unreachable": MtrPath(
        probes_of(CORE2, 3, [9, 8.5, 9.5, 8, 9.1, 8.8, 9.3, 8.9]), [[CORE2]], "4 to 10"
    ),
    "unreachable, limited to one a second": MtrPath(
        [(3, CORE2, 9), *probes_of("", 4, [0] * 10), *probes_of(CORE2, 14, [9.2, 8.9, 9.4])],
        [[CORE2]],
        "14 to 16",
    ),
    "a host that is absent from the last network": MtrPath(
        probes_of(CORE2, 5, ABSENT, step=2), [["???"], ["???"], [CORE2]], "7 to 29"
    ),
    "a route withdrawn in mid-run": MtrPath(
        [
            *[(3, CORE2, 9), *probes_of(TARGET4, 4, [12, 12, 12])],
            *[(3, CORE2, 9), (4, TARGET4, 12), *probes_of(CORE2, 3, [9, 9, 8, 9, 8, 9, 8])],
        ],
        [[CORE2], [CORE2, TARGET4]],
    ),
    "a route withdrawn before the target answered": MtrPath(
        [
            *[(3, CORE2, 9), (4, CORE3, 12), (5, "198.51.100.30", 12)],
            *[(3, CORE2, 9), (4, CORE2, 9), (5, "", 0), *probes_of(CORE2, 6, [9, 8, 9, 8])],
        ],
        [[CORE2]],
        "4 to 9",
    ),
    "the target at 6, then at 4": MtrPath(
        [(3, "", 0), (5, CORE2, 5), (6, TARGET4, 6), (4, TARGET4, 4)], [["???"], [TARGET4]]
    ),
}
RECORDED |= {f"mtr, {name}": mtr_raw(*START, *path.probes) for name, path in PATHS.items()}
RECORDED["mtr, nothing answers"] = mtr_raw(*probes_of("", 1, [0] * 5))


def parser_of(command: str, address: str = "", database: lg.AsnDatabase | None = None) -> lg.OutputParser:
    command_line = COMMANDS.get(command, lg.Command(command, (command,), 4, command))
    address = address or (TARGET6 if command_line.version == 6 else TARGET4)
    return lg.parser_for(command_line)(ipaddress.ip_address(address), database)


class Parsed(NamedTuple):
    parser: Any
    text: str
    events: list[dict[str, Any]]

    @property
    def notes(self) -> list[str]:
        return [event["text"] for event in self.events if event["event"] == "note"]

    @property
    def hops(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == "hop"]

    @property
    def result(self) -> dict[str, Any]:
        return cast(dict[str, Any], self.parser.result())

    @property
    def live(self) -> str:
        """What mtr's text has before the table."""
        return self.text.partition("HOST: ")[0]

    @property
    def table(self) -> list[str]:
        return table_of(self.text)


def table_of(text: str) -> list[str]:
    """The lines of mtr's table, without the white space at their ends."""
    return [line.rstrip() for line in text.partition("HOST: ")[2].splitlines()]


def parse_output(
    command: str, output: bytes, complete: bool = True, piece: int = 7, **options: Any
) -> Parsed:
    """An output through the parser of a command, in pieces of so many bytes."""
    parser = parser_of(command, **options)
    pieces = [parser.feed(output[at : at + piece]) for at in range(0, len(output), piece)]
    pieces.append(parser.finish(complete))
    events = [cast(dict[str, Any], event) for _, events in pieces for event in events]
    return Parsed(parser, b"".join(text for text, _ in pieces).decode(errors="surrogateescape"), events)


def parse(name: str, complete: bool = True, **options: Any) -> Parsed:
    """A recorded output through its parser."""
    return parse_output(name.partition(",")[0], RECORDED[name].encode(), complete, **options)


def brief(events: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Events as tuples of their values, without their kind and the statistics of mtr."""
    return [tuple(value for key, value in event.items() if key not in ("stats", "event")) for event in events]


# Of each reply its seq, TTL and time, of each loss its seq; then the statistics.
PINGS: dict[str, tuple[list[tuple[Any, ...]], tuple[float | None, ...]]] = {
    "ping, a loss": ([(1, 60, 32.1), (2,), (3, 60, 32.5)], (32.1, 32.3, 32.5, 3, 2, 1, 33.3333)),
    "ping6, nothing comes back": ([(1,), (2,), (3,)], (None, None, None, 3, 0, 3, 100)),
    "ping, unreachable": ([(1,), (2,), (3,)], (None, None, None, 3, 0, 3, 100)),
    "ping, duplicates, a late reply, a redirect and a source quench": (
        [(1, 60, 1.0), (1, 60, 1.5), (2,), (3, 60, 2.0), (2, 60, 1003.0)],
        (1, 335.333, 1003, 3, 3, 0, 0),
    ),
    "ping, cut off": ([(1, 60, 1.0), (2,), (6, 60, 3.0), (3,), (4,), (5,)], (1, 2, 3, 6, 2, 4, 66.67)),
    "ping, no route": ([], (None, None, None, 0, 0, 0, None)),
    "ping, remarks": (
        [(1, 60, 1.15), (2, 60, None), (3, 60, 2.5), (4, 60, None)],
        (1.15, 1.825, 2.5, 4, 4, 0, 0),
    ),
    "ping, bad checksums": ([(1, 60, 20.1), (2,), (3, 60, 20.3)], (20.1, 20.2, 20.3, 3, 2, 1, 33.3333)),
    "ping, more replies than requests": ([(1, 60, 1.0)], (1, 1, 1, 1, 15, 0, 0)),
    "ping, times of day and a name": ([(1, 60, 1.0), (2,)], (1, 1, 1, 2, 1, 1, 50)),
}


@pytest.mark.parametrize("name", PINGS)
def test_ping_replies_and_losses_are_events(name: str) -> None:
    events = [event for event in parse(name).events if event["event"] != "note"]
    assert [(event["event"], *values) for event, values in zip(events, brief(events), strict=True)] == [
        ("lost" if len(each) == 1 else "reply", *each) for each in PINGS[name][0]
    ]


@pytest.mark.parametrize("name", PINGS)
def test_the_result_of_ping(name: str) -> None:
    events, stats = PINGS[name]
    assert parse(name).result == {
        "status": "finished",
        "resolvedAddress": TARGET6 if name.startswith("ping6,") else TARGET4,
        "resolvedHostname": "gw.lg.example" if "name" in name else None,
        "timings": [{"rtt": each[2], "ttl": each[1]} for each in events if len(each) > 1 and each[2]],
        "stats": dict(zip(("min", "avg", "max", "total", "rcv", "drop", "loss"), stats, strict=True)),
        "rawOutput": "",
    }


def test_losses_that_only_the_summary_of_ping_tells_of_are_bounded() -> None:
    summary = b"999999 packets transmitted, 0 received, 100% packet loss, time 0ms\n"
    events = parse_output("ping", summary).events
    assert [event["event"] for event in events] == ["note"] + ["lost"] * lg.MAX_LOSSES


TRACEROUTES: dict[str, list[tuple[Any, ...]]] = {  # of each hop its number, address, name and probes
    "traceroute": [
        (1, "198.51.100.2", "gw.pop.lg.example", [2.959, 2.933, 2.906]),
        (2, "198.51.100.6", "core1.ams.lg.example", [6.202, 6.177, 6.106]),
        (3, None, None, [None, None, None]),
        (4, "198.51.100.14", "core2.fra.lg.example", [None, 17.132, 15.696]),
        (5, "198.51.100.254", "target.lg.example", [29.599, 29.598, 31.944]),
    ],
    "traceroute6, several routers at a hop, addresses without names, a zone": [
        (1, "fe80::1", None, [0.5, 0.4, 0.3]),
        (2, "2001:db8:0:2::2", None, [1, {"rtt": 2, "address": "2001:db8:0:2::3"}, None]),
        (10, "2001:db8::254", "target.lg.example", [9, 9.1, 9.2]),
    ],
    "traceroute, unreachables, losses and addresses alone": [
        (1, "198.51.100.2", "gw.pop.lg.example", [{"rtt": 1, "code": "!N"}, {"rtt": 1.1, "code": "!N"}, 1.2]),
        (2, "198.51.100.6", "r2.lg.example", [{"rtt": 2, "code": "!H"}, None, {"rtt": 2.2, "code": "!X"}]),
        (
            3,
            "198.51.100.10",
            "r3.lg.example",
            [{"rtt": 3, "code": "!<13>"}, {"rtt": 3, "code": "!F-1400"}, 3.2],
        ),
        (4, "198.51.100.2", None, [1, {"rtt": 1.1, "address": "198.51.100.3"}, None]),
        (5, "198.51.100.254", None, [None, 1227.896, None]),
    ],
    "traceroute, an extension, names that are none, and cut off": [
        (1, "198.51.100.2", "gw.pop.lg.example", []),
        (2, "198.51.100.2", None, [1, 1.1, 1.2]),
        (3, "198.51.100.2", None, [1, 1.1, 1.2]),
        (4, "198.51.100.6", "core1.ams.lg.example", [None]),
    ],
    "traceroute, no route": [],
}


@pytest.mark.parametrize("name", TRACEROUTES)
def test_each_hop_of_traceroute_is_an_event_with_its_probes(name: str) -> None:
    assert [
        (
            *(event["hop"], event["address"], event["hostname"]),
            [probe if len(probe) > 1 else probe["rtt"] for probe in event["probes"]],
        )
        for event in parse(name).hops
    ] == TRACEROUTES[name]


def result_hop(event: dict[str, Any]) -> dict[str, Any]:
    """The hop of a result that belongs to a hop's event."""
    event = {key: value for key, value in event.items() if key not in ("event", "hop", "probes")}
    return {"resolvedAddress": event.pop("address"), "resolvedHostname": event.pop("hostname"), **event}


@pytest.mark.parametrize("name", TRACEROUTES)
def test_the_result_of_traceroute_has_the_hops_of_its_events(name: str) -> None:
    parsed = parse(name)
    assert parsed.result["hops"] == [result_hop(event) for event in parsed.hops]


def test_the_result_of_traceroute_has_the_name_of_the_target() -> None:
    assert parse("traceroute").result["resolvedHostname"] == "target.lg.example"


def test_several_routers_of_a_traceroute_hop_are_its_addresses_with_their_names() -> None:
    _, second, _ = parse("traceroute6, several routers at a hop, addresses without names, a zone").hops
    assert second["addresses"] == ["2001:db8:0:2::2", "2001:db8:0:2::3"]
    assert second["hostnames"] == [None, "r2.lg.example"]


CARRIED = {  # the lines that need no note: other events carry them, or they are headings
    "ping": r"|PING .+|--- .+ ping statistics ---|(\[[\d.]+\] )?no answer yet for icmp_seq=\d+"
    r"|(\[[\d.]+\] )?\d+ bytes from \S+( \S+)?: icmp_seq=\d+ ttl=\d+ time=\d{1,9}(\.\d+)? ms",
    "traceroute": r"|traceroute to .+ packets"
    r"| ?\d+ ( +(\*|[\w-][\w.:%-]* \([\w.:%]+\)|\d+(\.\d+){3}|[\d.]+ ms|![^ ]*))+",
    "mtr": r"|[xhpmd] \d{1,2} .+",
}


def uncarried(command: str, output: str) -> list[str]:
    """The lines of an output that need a note."""
    pattern = re.compile(CARRIED[command.removesuffix("6")], re.ASCII)
    return [line for line in output.split("\n") if not pattern.fullmatch(line)]


@pytest.mark.parametrize("name", [*PINGS, *TRACEROUTES])
def test_lines_of_ping_and_traceroute_that_no_event_carries_in_full_are_notes(name: str) -> None:
    assert parse(name).notes == uncarried(name.partition(",")[0], RECORDED[name])


def test_the_hops_of_mtr_are_events_as_they_stand() -> None:
    assert [
        (event["hop"], event["address"], event["stats"]["rcv"], event["stats"]["drop"])
        for event in parse("mtr").events
    ] == [
        (1, "198.51.100.2", 1, 0),
        (3, "198.51.100.254", 1, 0),
        (1, "198.51.100.2", 2, 0),
        (2, None, 0, 1),
        (1, "198.51.100.2", 3, 0),
        (2, None, 0, 2),
        (3, "198.51.100.254", 1, 1),
        (3, "198.51.100.254", 2, 1),
        (2, None, 0, 3),
    ]


def test_the_text_of_mtr_has_each_hop_when_it_first_answers() -> None:
    live = r"Start: \S+\n  1\.\|-- 198\.51\.100\.2\n  3\.\|-- 198\.51\.100\.254\n"
    assert re.fullmatch(live, parse("mtr").live)


def test_hops_that_answer_within_one_chunk_stand_in_the_text_in_their_order() -> None:
    output = mtr_raw((2, CORE1, 3), (3, CORE2, 9), (1, GW, 1)).encode()
    live = parse_output("mtr", output, piece=len(output)).live
    assert re.findall(r"^ +(\d)\.", live, re.M) == ["2", "3", "1"]


NO_TIMES = dict.fromkeys(("min", "avg", "max", "stDev", "jMin", "jAvg", "jMax"))


def test_the_result_of_mtr_has_the_statistics_of_a_router_and_of_a_silent_hop() -> None:
    times = dict(zip(NO_TIMES, (2.622, 2.697, 2.827, 0.112, 0.022, 0.102, 0.183), strict=True))
    assert [hop["stats"] for hop in parse("mtr").result["hops"][:2]] == [
        times | {"total": 3, "rcv": 3, "drop": 0, "loss": 0},
        NO_TIMES | {"total": 3, "rcv": 0, "drop": 3, "loss": 100},
    ]


def test_the_result_of_mtr_has_the_times_of_each_hop() -> None:
    timings = [[each["rtt"] for each in hop["timings"]] for hop in parse("mtr").result["hops"]]
    assert timings == [[2.827, 2.644, 2.622], [], [32.91, 35.493]]


def test_an_mtr_that_was_stopped_counts_no_loss_for_probes_in_flight() -> None:
    hops = parse("mtr", complete=False).result["hops"]
    assert [(hop["stats"]["total"], hop["stats"]["drop"]) for hop in hops] == [(3, 0), (2, 2), (3, 1)]


@pytest.mark.parametrize("name", PATHS)
def test_the_path_of_mtr_ends_where_the_network_does(name: str) -> None:
    routers = [hop["resolvedAddress"] or "???" for hop in parse(f"mtr, {name}").result["hops"]]
    assert routers == [GW, CORE1, *(row[0] for row in PATHS[name].rows)]


@pytest.mark.parametrize("name", PATHS)
def test_the_table_of_mtr_has_each_router_of_a_hop_once(name: str) -> None:
    shown = [row.rpartition("|-- ")[2].split()[0] for row in parse(f"mtr, {name}").table[1:]]
    assert shown == [GW, CORE1, *itertools.chain(*PATHS[name].rows)]


@pytest.mark.parametrize("name", PATHS)
def test_a_router_that_answers_for_hops_beyond_its_own_has_a_note_before_the_table(name: str) -> None:
    path = PATHS[name]
    note = f"hop {2 + len(path.rows)} ({CORE2}) also answered for hops {path.beyond}: unreachable, or a loop"
    parsed = parse(f"mtr, {name}")
    assert parsed.notes == ([note] if path.beyond else [])
    assert not path.beyond or parsed.live.endswith(f"\n{note}\n")


def test_the_table_of_an_mtr_without_an_answer_is_its_head() -> None:
    parsed = parse("mtr, nothing answers")
    titles = "Loss%   Snt   Last   Avg  Best  Wrst StDev"
    assert (parsed.table, parsed.result["hops"]) == ([f"{socket.gethostname()} {titles}"], [])


def test_the_routers_of_an_mtr_hop_are_its_addresses_with_their_names_as_they_come() -> None:
    parsed = parse("mtr6, a hop that changes, and an error")
    second = [event for event in parsed.hops if event["hop"] == 2][-1], parsed.result["hops"][1]
    routers, names = ["2001:db8:0:2::2", "2001:db8:0:2::3"], ["r2.lg.example", "r3.lg.example"]
    assert [(each["addresses"], each["hostnames"]) for each in second] == 2 * [(routers, names)]


def test_an_error_of_mtr_is_a_note_and_stands_in_the_text() -> None:
    parsed = parse("mtr6, a hop that changes, and an error")
    assert parsed.notes == ["mtr: Unexpected mtr-packet error"]
    assert "\nmtr: Unexpected mtr-packet error\n" in parsed.text


def test_a_path_that_gets_shorter_is_an_event() -> None:
    events = parse("mtr, the target at 6, then at 4").events
    assert [event.get("hop", f"path of {event.get('hops')}") for event in events] == [
        *(1, 2, 5, 6, "path of 4", 4, 3)
    ]


def test_a_hop_that_belongs_to_the_path_again_has_an_event_again() -> None:
    parser = parser_of("mtr")
    paths = [*START, *probes_of(CORE2, 3, [9, 10])], [(5, CORE2, 8)], [(6, CORE3, 12)]
    fed = [cast(Any, parser.feed(mtr_raw(*probes).encode())[1]) for probes in paths]
    assert [[event.get("hop", "path") for event in events] for events in fed] == [
        *([1, 2, 3, 4], ["path"], [5, 4, 6])
    ]


def last_hops(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The hops that a client of events has at the end, as a result has them."""
    drawn: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["event"] == "hop":
            drawn[event["hop"]] = result_hop(event)
        elif event["event"] == "path":
            drawn = {hop: each for hop, each in drawn.items() if hop <= event["hops"]}
    assert list(range(1, len(drawn) + 1)) == sorted(drawn)
    return [drawn[hop] for hop in sorted(drawn)]


def without_times(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [{key: value for key, value in hop.items() if key != "timings"} for hop in result["hops"]]


@pytest.mark.parametrize("piece", [7, 10_000])
@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("name", [name for name in RECORDED if name.startswith("mtr")])
def test_the_last_events_of_mtr_agree_with_its_result(name: str, complete: bool, piece: int) -> None:
    parsed = parse(name, complete, piece=piece)
    assert last_hops(parsed.events) == without_times(parsed.result)


def test_a_name_that_mtr_prints_late_and_beyond_the_target_is_the_targets() -> None:
    assert parse("mtr, names and labels").result["resolvedHostname"] == "target.lg.example"


def test_only_a_host_name_is_the_name_of_an_address() -> None:
    names, others = ["a" * 253, "_r1.lg.example"], ["a" * 254, "gw.lg.example\n", "<img/src=x>", ".", TARGET4]
    assert [lg.hostname_of(name, TARGET4) for name in names + others] == names + [None] * len(others)


def test_a_negative_time_is_a_reply() -> None:
    second = parse("mtr, names and labels").result["hops"][1]
    assert second["timings"] == [{"rtt": -0.512}, {"rtt": 2.2}]
    assert (second["stats"]["min"], second["stats"]["drop"]) == (-0.512, 0)


def test_an_mpls_label_of_a_router_is_a_note_once() -> None:
    labels = [(f"198.51.100.{n}", f"[MPLS: Lbl 1600{n + 2} TC 0 S 1 TTL 1]") for n in (2, 3)]
    assert parse("mtr, names and labels").notes == [f"hop 1: {router} {label}" for router, label in labels]


def test_the_table_of_mtr_has_the_labels_of_each_router_below_it_and_no_name_that_is_none() -> None:
    rows = parse("mtr, names and labels").table[1:]
    assert [re.sub(r" +\d+\.\d%.+", "", row) for row in rows] == [
        "  1.|-- 198.51.100.3",
        "       [MPLS: Lbl 16005 TC 0 S 1 TTL 1]",
        "        198.51.100.2",
        "       [MPLS: Lbl 16004 TC 0 S 1 TTL 1]",
        "  2.|-- target.lg.example (198.51.100.254)",
    ]


def test_a_hop_keeps_as_many_routers_as_mtr() -> None:
    output = mtr_raw(*((1, f"10.0.0.{n}", 1.0) for n in range(200))).encode()
    addresses = parse_output("mtr", output).result["hops"][0]["addresses"]
    assert addresses == [f"10.0.0.{n}" for n in range(72, 200)]


def test_each_line_of_another_tool_is_a_note() -> None:
    output = "BIRD 2.0.12 ready.\n\nTable master4:\n198.51.100"
    assert parse_output("birdc", output.encode()).notes == output.split("\n")


@pytest.mark.parametrize(
    ("argv", "parser"),
    [
        ("ping -c 1 {address}", lg.PingParser),
        ("/usr/bin/ping -c 1 {address}", lg.PingParser),
        ("traceroute -T -p 443 {address}", lg.TracerouteParser),
        ("mtr --raw {address}", lg.MtrParser),
        ("mtr --raw -T -P 443 {address}", lg.MtrParser),
        ("mtr --report {address}", lg.OutputParser),
        ("dig -x {address}", lg.OutputParser),
    ],
)
def test_the_parser_is_chosen_by_the_tool(argv: str, parser: type[lg.OutputParser]) -> None:
    assert lg.parser_for(lg.Command("name", tuple(argv.split()), 4, "name")) is parser


PATTERNS = [
    *(lg.PingParser.REPLY, lg.PingParser.SUMMARY, lg.PingParser.TIMES),
    *(lg.TracerouteParser.HOP, lg.MtrParser.RAW),
]
RECORDED_LINES = sorted({line for text in RECORDED.values() for line in text.encode().splitlines()})
OUTPUT = st.lists(
    st.one_of(
        st.binary(max_size=200),
        st.text(max_size=200).map(str.encode),
        st.builds(  # without one of its bytes, or whole
            lambda line, at: line[:at] + line[at + 1 :], st.sampled_from(RECORDED_LINES), st.integers(0, 100)
        ),
        st.sampled_from(PATTERNS).flatmap(st.from_regex).map(lambda text: text.encode(errors="replace")),
        st.integers(1, 5000).map(lambda length: b"x" * length),
    ).map(lambda line: line + b"\n")
).map(b"".join)
any_output = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


@given(
    tool=st.sampled_from(["ping", "traceroute", "mtr", "other"]),
    output=OUTPUT,
    complete=st.booleans(),
    piece=st.integers(1, 10_000),
)
@any_output
def test_the_parsers_accept_any_bytes_and_produce_json(
    tool: str, output: bytes, complete: bool, piece: int
) -> None:
    parsed = parse_output(tool, output, complete, piece)
    json.dumps([parsed.events, parsed.result], allow_nan=False)
    assert tool == "mtr" or parsed.text == output.decode(errors="surrogateescape")


@given(
    tool=st.sampled_from(list(CARRIED)),
    lines=st.lists(st.sampled_from(RECORDED_LINES) | st.binary(max_size=60)),
)
@any_output
def test_each_line_is_carried_by_an_event_or_is_a_note(tool: str, lines: list[bytes]) -> None:
    output = b"".join(line + b"\n" for line in lines)
    notes = parse_output(tool, output, piece=len(output) + 1).notes
    assert Counter(uncarried(tool, output.decode(errors="replace"))) - Counter(notes) == Counter()


def test_a_line_without_end_does_not_grow_in_memory() -> None:
    parser = parser_of("ping")
    for _ in range(100):
        parser.feed(bytes(1000))
    assert len(parser.buffer) <= lg.LINE_BYTES


PING_REPLY = "64 bytes from 198.51.100.254: icmp_seq={n} ttl=60 time=1.00 ms\n"
CRAFTED = {  # lines of which each differs from the ones before
    "ping, losses": "no answer yet for icmp_seq={n}\n",
    "ping, replies": PING_REPLY,
    "ping, duplicates": PING_REPLY.replace("{n}", "1").replace(" ms", " ms (DUP!)"),
    "ping, bad checksums": PING_REPLY.replace(" ms", " ms (BAD CHECKSUM!)"),
    "traceroute, probes on one line": " 1.000 ms 198.51.100.{byte}",
    "traceroute, hops": " 1  198.51.100.2  1.000 ms\n",
    "mtr, one hop": "x 0 {n}\np 0 {n} {n}\n",
    "mtr, ever smaller times": "p 9 -{n} {n}\n",
    "mtr, routers": "h 0 2001:db8::{n:x}\np 0 10 {n}\n",
    "mtr, names": "h {position} 2001:db8::{n:x}\nd {position} r{n}\np {position} 10 {n}\n",
    "mtr, labels": "h 0 198.51.100.2\nm 0 {n} 0 0 1\n",
    "mtr, one router at each hop": "h {position} 198.51.100.2\np {position} -{n} {n}\n",
}


def crafted(name: str, size: int) -> bytes:
    start = " 1  198.51.100.2 " if "one line" in name else ""
    lines = (CRAFTED[name].format(n=n, byte=n % 250, position=n % 100) for n in range(1, size // 8))
    return (start + "".join(itertools.islice(lines, size // len(next(lines)) + 1))).encode()[:size]


@pytest.mark.parametrize("name", CRAFTED)
def test_parsing_a_line_takes_constant_time(name: str) -> None:
    def seconds(size: int) -> float:
        """Of processor time without garbage collection, for the fastest of three."""
        output = crafted(name, size)

        def run() -> None:
            parser = parser_of(name.partition(",")[0])
            for at in range(0, size, 1000):
                parser.feed(output[at : at + 1000])
            parser.finish(complete=True)

        return min(timeit.repeat(run, timer=time.thread_time, repeat=3, number=1))

    assert seconds(2**19) < 8 * seconds(2**17)  # 4 times; 16 where a line takes as long as there were lines


def test_traceroute_has_255_hops_at_most() -> None:
    parsed = parse_output("traceroute", b" 1  *\n" * 1000)
    assert (len(parsed.hops), len(parsed.result["hops"]), len(parsed.notes)) == (255, 255, 745)


def test_output_is_parsed_4_kib_at_a_time() -> None:
    """Other requests go on in between: as events, 64 KiB of empty lines took 0.2 s."""

    async def largest() -> int:
        argv = ("head", "-c", "100000", "/dev/zero")
        async with lg.Process(argv, {"PATH": os.defpath}, PATIENCE, set()) as process:
            return max([len(chunk) async for chunk in process.output()])

    assert outcome(largest()) == 4096


def test_lines_that_arrive_together_make_one_event_for_a_hop() -> None:
    output = crafted("mtr, names", 2**20)
    assert len(parse_output("mtr", output, piece=2**16).events) <= 16 * 101


# The table at the end, against that of mtr itself. Both runs of mtr get the same answers, from a stand-in for
# mtr-packet, and names from .ci/hops.

PACKET = f'''#!{sys.executable}
"""Answers as mtr-packet does, with routers, times and losses that depend on the seed and the probe alone."""
import json, os, random, sys
path, in_order, sure, loss, loop, seed = json.loads(os.environ["ANSWERS"])
sent = {{}}
for line in sys.stdin:
    token, command, *rest = line.split()
    if command == "check-support":
        print(token, "feature-support support ok", flush=True)
        continue
    options = dict(zip(rest[::2], rest[1::2]))
    ttl = int(options["ttl"])
    count = sent[ttl] = sent.get(ttl, 0) + 1  # of its own: runs differ in how far beyond the target they send
    draw = random.Random(f"{{seed}} {{ttl}} {{count}}")
    choices, answer = path[min(ttl, len(path)) - 1], "no-reply none"
    if choices and (count <= sure or draw.random() >= loss):
        answer = choices[min(count, len(choices)) - 1] if in_order else draw.choice(choices)
    kind, address, *labels = (f"ttl-expired {{answer}}" if answer[0].isdigit() else answer).split()
    if address == "none":
        print(token, kind, flush=True)
        continue
    family = "ip-6" if ":" in address else "ip-4"
    time = draw.randrange(*draw.choice([(-900, 1000), (1, 100_000), (1, 20_000_000)]))
    time = 5000 * ttl + time % 1000 if loop else time
    print(token, kind, family, address, "round-trip-time", time, *labels, flush=True)
'''
REPLY = f"reply {TARGET4}"
TABLES: dict[str, list[list[str]]] = {  # what answers at each position
    "reached": [[GW], [], [CORE2], [REPLY]],
    "no names": [["198.51.100.3"], [], ["198.51.100.7"], ["reply 198.51.100.250"]],
    "not reached": [[GW], [CORE1], [], []],
    "nothing answers": [[], []],
    "long addresses": [
        ["2001:db8:0:1::2"],
        [],
        ["2001:db8:ffff:ffff:ffff:ffff:ffff:1"],
        [f"reply {TARGET6}"],
    ],
    "several routers": [[GW], ["198.51.100.5", "198.51.100.7", "198.51.100.8"], [REPLY]],
    "labels": [
        [f"{GW} mpls 16004,0,1,1"],
        ["198.51.100.5 mpls 3,0,0,1,8,2,1,9", "198.51.100.7", "198.51.100.8 mpls 16005,7,1,255"],
        [f"{CORE1} mpls 1,0,1,1", f"{CORE1} mpls 2,0,1,1"],
        [REPLY],
    ],
    "unreachable": [[GW], [f"no-route {CORE1}"]],
    "unreachable, IPv6": [["2001:db8:0:1::2"], ["no-route 2001:db8:0:1::9"]],
    "unreachable without an address": [[GW], ["no-route none"]],
    "unreachable at the end": [[GW], [], ["198.51.100.7"], ["no-route 198.51.100.9"]],
    "a loop": [[GW], *([[CORE1], []] * 14), [CORE1]],
    "a long name": [["198.51.100.100"], ["198.51.100.100", "198.51.100.5"], [REPLY]],
    "a path that changes": [
        [GW],
        ["198.51.100.5", "198.51.100.7"],
        ["198.51.100.10", "198.51.100.10", REPLY],
        [CORE2],
        [REPLY],
    ],
}


def table_target(name: str) -> str:
    path = str(TABLES[name])
    if reply := re.search(r"reply ([\w.:]+)", path):
        return reply[1]
    return TARGET6 if ":" in path else TARGET4


@pytest.fixture(scope="session")
def tables(hops: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """For each of TABLES what mtr prints with --raw and with --report."""
    packet, runs = tmp_path_factory.mktemp("mtr") / "packet", {}
    write_script(packet, PACKET)
    environment = {"LC_ALL": "C", "PATH": os.environ["PATH"], "MTR_PACKET": str(packet)}
    for name, path in TABLES.items():
        in_order, loop = name == "a path that changes", name == "a loop"
        sure = 0 if name == "no names" else 2  # mtr looks names up meanwhile
        loss = 0 if "unreachable" in name or loop else 0.2
        answers = {"ANSWERS": json.dumps([path, in_order, sure, loss, loop, secrets.randbelow(1000)])}
        target = table_target(name)
        line = [*hops, *f"mtr -{6 if ':' in target else 4} -e -c 5 -i 1 -G 1 -Z 2 -m 30".split()]
        runs[name] = [
            subprocess.Popen(
                [*line, *how, target], env=environment | answers, stdout=subprocess.PIPE, text=True
            )
            for how in (["--raw"], ["--report", "--report-wide", "--show-ips"])
        ]
    return {name: [each.communicate()[0] for each in pair] for name, pair in runs.items()}


def without_labels(table: list[str]) -> list[str]:
    """A table without MPLS labels, of which mtr leaves some out."""
    return [line for line in table if "[MPLS" not in line]


@pytest.mark.parametrize("name", TABLES)
def test_the_table_is_that_of_mtr_to_the_last_digit(tables: Mapping[str, list[str]], name: str) -> None:
    raw, report = tables[name]
    ours = parse_output("mtr", raw.encode(), address=table_target(name)).table
    assert without_labels(ours) == without_labels(table_of(report)) != []


def test_the_table_is_that_of_mtr_0_96(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "vm")
    assert without_labels(parse("mtr, version 0.96").table) == table_of(recorded("mtr-0.96-report"))


# ---- the event stream --------------------------------------------------------------------------------------

NDJSON = {"Accept": "application/x-ndjson"}


def run_events(server: Server, *arguments: str, **options: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.run(*arguments, headers=NDJSON, **options).iter_lines()]


def printing(text: str) -> str:
    """A stand-in that prints this."""
    return f"#!/bin/sh\ncat <<'END'\n{text}END\n"


@pytest.fixture(scope="session")
def losing(shared: Start) -> Server:
    tools = {"ping": printing(RECORDED["ping, a loss"])}
    return cast(Server, shared(tools=tools, names={"*": ["127.0.0.1"]}))


def test_events_are_sent_as_json_lines_that_nothing_caches(losing: Server) -> None:
    headers = losing.run("ping", headers=NDJSON).headers
    assert headers["Content-Type"] == "application/x-ndjson"
    assert headers["Cache-Control"] == "no-store, no-transform"
    assert "Accept" in headers["Vary"]


def test_events_are_one_json_object_per_line(losing: Server) -> None:
    start, *events, end = run_events(losing, "ping", "a.example")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", start.pop("time"))
    run = {"command": "ping", "target": "a.example", "address": "127.0.0.1", "family": 4}
    assert start == {"event": "start", **run}
    assert brief(events[:3]) == [(1, 60, 32.1), (2,), (3, 60, 32.5)]
    assert (end["event"], end["status"], end["exit_status"]) == ("end", "finished", 0)
    assert end["duration"] >= 0


def test_the_raw_output_of_a_result_is_what_a_client_of_text_reads(losing: Server) -> None:
    raw = run_events(losing, "ping", "a.example")[-1]["result"]["rawOutput"]
    assert raw == f"a.example has address 127.0.0.1\n{RECORDED['ping, a loss']}"
    assert raw == losing.run("ping", "a.example").text


@pytest.mark.parametrize("accept", [None, "*/*", "application/json", "text/plain", "text/html, */*;q=0.8"])
def test_clients_that_do_not_ask_for_events_get_text(echo: Server, accept: str | None) -> None:
    response = echo.run("ping", headers={"Accept": accept} if accept else {})
    assert response.headers["Content-Type"] == "text/plain; charset=utf-8"


def test_the_end_event_of_a_failed_run_has_the_error_and_a_partial_result(serve: Start) -> None:
    raw = RECORDED["mtr"].partition("x 0 33007")[0]
    tools = {"mtr": f"{printing(raw)}sleep 1000\n", "traceroute": "#!/bin/sh\nexit 2\n"}
    server = serve(tools=tools, DIAGNOSTIC_TIMEOUT="1")
    end = run_events(server, "mtr")[-1]
    assert (end["status"], end["error"], end["exit_status"]) == ("failed", "mtr: stopped after 1 s", None)
    assert end["result"]["hops"][0]["resolvedAddress"] == "198.51.100.2"
    assert end["result"]["rawOutput"].endswith("\n--- mtr: stopped after 1 s ---\n")
    end = run_events(server, "traceroute")[-1]
    assert (end["status"], end["error"], end["exit_status"]) == ("failed", "traceroute: exit status 2", 2)
    assert end["result"]["hops"] == []


def test_an_event_is_sent_as_soon_as_its_line_is_written(serve: Start, gate: Gate) -> None:
    script = f"#!/bin/sh\necho '64 bytes from 127.0.0.1: icmp_seq=1 ttl=60 time=1.0 ms'\n{gate.wait}"
    server = serve(tools={"ping": script})
    request = {"data": {"target": "127.0.0.1"}, "headers": NDJSON}
    with server.http.stream("POST", "/lookingglass/ping", **request) as response:
        lines = response.iter_lines()
        assert [json.loads(next(lines))["event"] for _ in range(2)] == ["start", "reply"]
        gate.open()
        assert [json.loads(line)["event"] for line in lines] == ["end"]


# The real tools in .ci/hops, towards the hosts that its manual lists.

PATH_ENDS = {"target": 5, "closed": 2, "absent": 5, "limited": 2, "gone": 5, "lost": 2}  # of mtr
NOTED_HOPS = {"closed": ["2"], "absent": ["5"], "limited": ["2"], "lost": ["2"]}  # that answer for others
REAL_RUNS = [
    *(f"{command}-target" for command in ("ping", "ping6", "traceroute", "traceroute6")),
    *(f"{command}-closed" for command in ("ping", "traceroute", "traceroute6")),
    *("ping-twice", "ping6-twice", "traceroute-pair"),
    *(f"{command}-{host}" for command in ("mtr", "mtr6") for host in (*PATH_ENDS, "pair")),
    *("mtr-loop", "mtr6-loop"),  # last, when few packets are under way: a loop is recognised by its times
]
Runs = Mapping[str, list[dict[str, Any]]]


@pytest.fixture(scope="session")
def real_runs(in_hops: Server, once: Once) -> Runs:
    """The events of each of REAL_RUNS, as many at once as the server admits."""

    def ask(run: str) -> list[dict[str, Any]]:
        command, _, host = run.partition("-")
        return run_events(in_hops, command, f"{host}.lg.example", timeout=99)

    def ask_all() -> Runs:
        with ThreadPoolExecutor(int(IN_HOPS["MAX_DIAGNOSTICS_PER_CLIENT"])) as pool:
            return dict(zip(REAL_RUNS, pool.map(ask, REAL_RUNS), strict=True))

    return cast(Runs, once("real-runs", ask_all))


real_mtr = pytest.mark.parametrize("command", ["mtr", "mtr6"])


@pytest.mark.parametrize("run", REAL_RUNS)
def test_a_real_run_is_valid_for_openapi_and_its_result_for_globalping(real_runs: Runs, run: str) -> None:
    command = run.partition("-")[0]
    content = DESCRIPTION["paths"][f"/lookingglass/{command}"]["post"]["responses"]["200"]["content"]
    events = {"type": "array", "items": content[lg.EVENTS_TYPE]["schema"]}
    jsonschema.validate(real_runs[run], events | {"components": DESCRIPTION["components"]})
    jsonschema.validate(real_runs[run][-1]["result"], GLOBALPING[command.removesuffix("6")])


@pytest.mark.parametrize("command", COMMANDS)
def test_the_result_of_a_real_run_has_the_address_of_its_target(real_runs: Runs, command: str) -> None:
    assert real_runs[f"{command}-target"][-1]["result"]["resolvedAddress"] == targets(command)[0]


@real_mtr
@pytest.mark.parametrize("host", PATH_ENDS)
def test_the_path_of_a_real_mtr_ends_where_the_network_does(real_runs: Runs, command: str, host: str) -> None:
    result = real_runs[f"{command}-{host}"][-1]["result"]
    rows = re.findall(r"^ *(\d+)\.\|--", result["rawOutput"].partition("HOST")[2], re.M)
    assert [len(result["hops"]), int(rows[-1])] == [PATH_ENDS[host]] * 2


@real_mtr
@pytest.mark.parametrize("host", [*PATH_ENDS, "loop"])
def test_a_real_mtr_has_a_note_on_a_router_that_answers_for_others(
    real_runs: Runs, command: str, host: str
) -> None:
    notes = [event["text"] for event in real_runs[f"{command}-{host}"] if event["event"] == "note"]
    pattern = r"hop (\d+) \([0-9a-f.:]+\) also answered for hops \d+ to \d+: .+"
    assert [re.sub(pattern, r"\1", note) for note in notes] == NOTED_HOPS.get(host, [])


@real_mtr
def test_a_real_mtr_shows_the_hops_of_a_loop(real_runs: Runs, command: str) -> None:
    hops = real_runs[f"{command}-loop"][-1]["result"]["hops"]
    assert [hops[position]["resolvedHostname"] for position in (3, 5, 7)] == ["core2.fra.lg.example"] * 3
    assert len(hops) > 20


@real_mtr
def test_a_real_mtr_keeps_the_target_whose_route_was_withdrawn(real_runs: Runs, command: str) -> None:
    result = real_runs[f"{command}-gone"][-1]["result"]
    core1 = {"mtr": CORE1, "mtr6": "2001:db8:0:2::2"}[command]
    assert result["hops"][-1]["addresses"] == [result["resolvedAddress"], core1]
    assert result["hops"][-1]["resolvedAddress"] == core1


@real_mtr
def test_real_mtr_hops_have_the_names_of_their_routers(real_runs: Runs, command: str) -> None:
    hops = real_runs[f"{command}-target"][-1]["result"]["hops"]
    names = ["gw.pop.lg.example", "core1.ams.lg.example", None, "core2.fra.lg.example", "target.lg.example"]
    assert [hop["resolvedHostname"] for hop in hops] == names


@real_mtr
def test_a_real_mtr_shows_both_routers_of_a_hop(real_runs: Runs, command: str) -> None:
    *events, end = real_runs[f"{command}-pair"]
    routers = {"mtr": {CORE2, CORE3}, "mtr6": {"2001:db8:0:4::2", "2001:db8:0:6::2"}}[command]
    assert set(end["result"]["hops"][3]["addresses"]) == routers
    assert set([event for event in events if event.get("hop") == 4][-1]["addresses"]) == routers
    assert all(router in end["result"]["rawOutput"].partition("HOST")[2] for router in routers)


@pytest.mark.parametrize("run", [run for run in REAL_RUNS if run.startswith("mtr")])
def test_the_last_events_of_a_real_mtr_agree_with_its_result(real_runs: Runs, run: str) -> None:
    *events, end = real_runs[run]
    assert last_hops(events) == without_times(end["result"])


@pytest.mark.parametrize("command", ["traceroute", "traceroute6"])
def test_a_real_traceroute_has_the_code_of_a_router_that_filters(real_runs: Runs, command: str) -> None:
    last = [event for event in real_runs[f"{command}-closed"] if event["event"] == "hop"][-1]
    assert (last["hop"], last["hostname"]) == (2, "core1.ams.lg.example")
    assert {probe.get("code") for probe in last["probes"]} == {"!X"}


def test_a_real_traceroute_says_which_router_answered_which_probe(real_runs: Runs) -> None:
    fourth = [event for event in real_runs["traceroute-pair"] if event["event"] == "hop"][3]
    answered = [probe for probe in fourth["probes"] if probe["rtt"] is not None]
    addresses = {fourth["address"], *(probe["address"] for probe in answered if "address" in probe)}
    assert addresses == set(fourth.get("addresses", [fourth["address"]]))
    assert len(fourth["probes"]) == 3


@pytest.mark.parametrize("command", ["ping", "ping6"])
def test_real_duplicates_are_replies_and_timings(real_runs: Runs, command: str) -> None:
    *events, end = real_runs[f"{command}-twice"]
    result = end["result"]
    replies = Counter(event["seq"] for event in events if event["event"] == "reply")
    assert max(replies.values()) == 2
    assert len(result["timings"]) == replies.total() > result["stats"]["rcv"] == len(replies)


def test_a_real_ping_that_is_filtered_has_a_note_and_a_loss_for_each_error(real_runs: Runs) -> None:
    *events, end = real_runs["ping-closed"]
    notes = [event["text"] for event in events if event["event"] == "note"]
    assert any(re.fullmatch(r"From 198\.51\.100\.6 icmp_seq=\d+ Packet filtered", note) for note in notes)
    assert any("errors, 100% packet loss" in note for note in notes)
    assert [event["seq"] for event in events if event["event"] == "lost"] == list(range(1, 16))
    assert end["result"]["stats"] | {"rcv": 0, "drop": 15, "loss": 100} == end["result"]["stats"]


def test_name_servers_that_drop_queries_hold_up_neither_a_probe_nor_the_end_of_mtr(
    hops: tuple[str, ...], tmp_path: Path
) -> None:
    begun = time.monotonic()
    with (tmp_path / "raw").open("w") as raw:
        line = [*hops[:-1], "dns", *f"mtr -4 --raw -e -c 2 -i 1 -G 1 -Z 2 -m 30 {TARGET4}".split()]
        mtr = subprocess.Popen(line, stdout=raw, start_new_session=True)
        mtr.wait(PATIENCE)
        os.killpg(mtr.pid, signal.SIGKILL)  # its children wait for the name servers still, as in a real run
    assert time.monotonic() - begun < 5  # two cycles of a second, and the grace time
    assert (tmp_path / "raw").read_text().count("x 0 ") == 2


# Globalping's published schema of test results, as far as it has to do with these three.

TEXT, MAYBE_TEXT = {"type": "string"}, {"type": ["string", "null"]}
NUMBER, MAYBE_NUMBER, INTEGER = {"type": "number"}, {"type": ["number", "null"]}, {"type": "integer"}


def an_object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


def a_list(**properties: Any) -> dict[str, Any]:
    return {"type": "array", "items": an_object(**properties)}


def stats_of(*times: str) -> dict[str, Any]:
    counts = {"total": INTEGER, "rcv": INTEGER, "drop": INTEGER, "loss": NUMBER}
    return an_object(**dict.fromkeys(times, MAYBE_NUMBER), **counts)


RESOLVED = {"resolvedAddress": MAYBE_TEXT, "resolvedHostname": MAYBE_TEXT}
FINISHED = {"status": {"const": "finished"}, "rawOutput": TEXT, **RESOLVED}
HOP = {**RESOLVED, "asn": {"type": "array", "items": INTEGER}, "timings": a_list(rtt=NUMBER)}
GLOBALPING = {
    "failed": an_object(status={"const": "failed"}, rawOutput=TEXT),
    "ping": an_object(
        **FINISHED, stats=stats_of("min", "avg", "max"), timings=a_list(rtt=NUMBER, ttl=NUMBER)
    ),
    "traceroute": an_object(**FINISHED, hops=a_list(**HOP)),  # `asn` is no part of it there, but ours
    "mtr": an_object(**FINISHED, hops=a_list(**HOP, stats=stats_of(*NO_TIMES))),
}


@pytest.mark.parametrize("name", [name for name in RECORDED if "no route" not in name])
def test_a_finished_result_is_valid_for_globalping(name: str) -> None:
    jsonschema.validate(parse(name).result, GLOBALPING[name.partition(",")[0].removesuffix("6")])


@pytest.mark.parametrize("name", RECORDED)
def test_a_failed_result_is_valid_for_globalping_and_has_what_is_known(name: str) -> None:
    result = parse(name, complete=False).parser.result("failed", "text")
    jsonschema.validate(result, GLOBALPING["failed"])
    assert result.keys() == parse(name).result.keys()


# AS numbers, from a database in MaxMind's format that is written here.


def mmdb(record: object, padding: int = 0) -> bytes:
    """A record for the first routers of .ci/hops as an .mmdb file, as maxmind.github.io/MaxMind-DB has it."""

    def encode(value: object) -> bytes:
        match value:
            case dict():
                kind, size = 7, len(value)
                content = b"".join(encode(each) for pair in value.items() for each in pair)
            case []:
                kind, size, content = 11, 0, b""
            case (int(kind), int(number)):  # unsigned, of up to 16 bits (5), 32 (6) or 64 (9)
                size = (number.bit_length() + 7) // 8
                content = number.to_bytes(size, "big")
            case str():
                kind, size, content = 2, len(value), value.encode()
        size, more = (size, b"") if size < 29 else (29, bytes([size - 29]))
        head = bytes([kind << 5 | size]) if kind < 8 else bytes([size, kind - 7])
        return head + more + content

    prefixes = map(ipaddress.IPv6Network, ("::198.51.100.0/124", "2001:db8::/32"))
    networks = [f"{int(each.network_address):0128b}"[: each.prefixlen] for each in prefixes]
    nodes = sorted({bits[:length] for bits in networks for length in range(len(bits))})
    numbers = {bits: number for number, bits in enumerate(nodes)}  # the root, "", is first
    numbers |= dict.fromkeys(networks, len(nodes) + 16 + padding)
    pointers = [numbers.get(bits + bit, len(nodes)) for bits in nodes for bit in "01"]
    tree = b"".join(pointer.to_bytes(4, "big") for pointer in pointers)
    metadata = {
        "node_count": (6, len(nodes)),
        "record_size": (5, 32),
        "ip_version": (5, 6),
        "database_type": "Test-ASN",
        "languages": [],
        "binary_format_major_version": (5, 2),
        "binary_format_minor_version": (5, 0),
        "build_epoch": (9, 1),
        "description": {},
    }
    return tree + bytes(16 + padding) + encode(record) + b"\xab\xcd\xefMaxMind.com" + encode(metadata)


GEOLITE = {"autonomous_system_number": (6, 64500), "autonomous_system_organization": "Example"}
AsDatabase = Callable[..., lg.AsnDatabase]


@pytest.fixture
def as_database(tmp_path: Path) -> AsDatabase:
    if not importlib.util.find_spec("maxminddb"):
        lacking("the package maxminddb")

    def write_and_open(record: object = GEOLITE, **options: Any) -> lg.AsnDatabase:
        (tmp_path / "asn.mmdb").write_bytes(mmdb(record, **options))
        return lg.AsnDatabase(str(tmp_path / "asn.mmdb"))

    return write_and_open


@pytest.mark.parametrize(
    "record",
    [
        GEOLITE,
        {"asn": "AS64500", "as_name": "Example", "as_domain": "lg.example", "country": "NL"},
        {"asn": "AS64500", "name": "Example", "domain": "lg.example", "type": "hosting"},
    ],
    ids=["GeoLite2-ASN, DB-IP, RouteViews", "IPinfo Lite", "IPinfo ASN"],
)
def test_the_as_numbers_of_each_vendor_are_read(as_database: AsDatabase, record: object) -> None:
    addresses = ["198.51.100.6", "2001:db8::1", "192.0.2.1", "::::", None]
    found = map(as_database(record).find, addresses)
    assert list(found) == [*[([64500], "Example")] * 2, *[([], None)] * 3]


@pytest.mark.parametrize("name", ["traceroute", "mtr"])
def test_hops_of_events_and_results_have_the_as_of_their_router(
    serve: Start, as_database: AsDatabase, tmp_path: Path, name: str
) -> None:
    as_database()
    server = serve(tools={name: printing(RECORDED[name])}, ASN_DATABASE=str(tmp_path / "asn.mmdb"))
    *events, end = run_events(server, name)
    systems = {each["address"]: (each["asn"], each["network"]) for each in events if each["event"] == "hop"}
    assert (systems[GW], systems[None]) == (([64500], "Example"), ([], None))
    assert systems == {hop["resolvedAddress"]: (hop["asn"], hop["network"]) for hop in end["result"]["hops"]}


@pytest.mark.parametrize("name", ["traceroute", "mtr"])
def test_without_a_database_hops_have_no_as(name: str) -> None:
    parsed = parse(name)
    hops = [*parsed.hops, *parsed.result["hops"]]
    assert [(hop["asn"], hop["network"]) for hop in hops] == [([], None)] * len(hops)


@pytest.mark.parametrize(("number", "column"), [(64500, "AS64500  "), (4200000000, "AS4200000000 ")])
def test_the_table_of_mtr_has_the_as_before_the_name(
    as_database: AsDatabase, number: int, column: str
) -> None:
    head, *rows = parse("mtr", database=as_database({"asn": f"AS{number}"})).table
    starts = [f"  1. {column}198.51.100.2 ", "  2. AS???    ??? ", "  3. AS???    198.51.100.254 "]
    assert [row[: len(start)] for row, start in zip(rows, starts, strict=True)] == starts
    assert {len(row) for row in rows} == {len(f"HOST: {head}")}


def test_further_routers_of_a_hop_have_their_as(as_database: AsDatabase) -> None:
    table = parse("mtr, names and labels", database=as_database()).table
    assert table[3] == "     AS64500  198.51.100.2"


def test_the_text_of_traceroute_stays_its_own(as_database: AsDatabase) -> None:
    assert parse("traceroute", database=as_database()).text == RECORDED["traceroute"]


def test_an_as_database_without_the_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "maxminddb", None)
    with pytest.raises(lg.SettingsError, match="mmdb' cannot be used: install the package maxminddb"):
        lg.AsnDatabase("asn.mmdb")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("", None), ("missing.mmdb", None)),
        *(("asn.mmdb", content) for content in (b"", b"no database", mmdb({"country": "NL"}))),
    ],
    ids=["a folder", "no file", "empty", "another format", "no AS numbers"],
)
def test_an_as_database_that_cannot_be_used_stops_the_start_with_what_is_expected(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    expected = "expected a database of AS numbers in MaxMind's format (.mmdb)"
    assert f"ASN_DATABASE='{path}' cannot be used: {expected}" in start_error(ASN_DATABASE=str(path))


def test_an_as_database_is_mapped_and_not_loaded(as_database: AsDatabase) -> None:
    def own_kib() -> int:  # pages of a mapped file are the kernel's to drop
        return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0])

    before = own_kib()
    database = as_database(padding=32 * 2**20)
    assert database.find(GW).asn == [64500]
    assert own_kib() - before < 16 * 1024


# ---- the API described -------------------------------------------------------------------------------------


def test_the_description_is_valid_openapi_3_1(echo: Server) -> None:
    document = echo.http.get("/openapi.json").json()
    assert document["openapi"] == "3.1.0"
    openapi_spec_validator.validate(document)


@pytest.mark.parametrize(("cls", "event"), list(zip(get_args(lg.Event), lg.EXAMPLES, strict=True)))
def test_each_example_of_an_event_is_valid_for_its_schema(cls: type, event: object) -> None:
    schema = {"$ref": f"#/components/schemas/{cls.__name__}", "components": DESCRIPTION["components"]}
    jsonschema.validate(event, schema)


PROBE = {"rtt": {"type": ["number", "null"]}, "address": {"type": "string"}, "code": {"type": "string"}}
OBJECT = {"type": "object", "additionalProperties": False}


@pytest.mark.parametrize(
    ("hint", "schema"),
    [
        (str, {"type": "string"}),
        (float | None, {"type": ["number", "null"]}),
        (list[int], {"type": "array", "items": {"type": "integer"}}),
        (Literal[4, 6], {"enum": [4, 6]}),
        (lg.PingResult, {"$ref": "#/components/schemas/PingResult"}),
        (lg.Probe, {**OBJECT, "properties": PROBE, "required": ["rtt"]}),
    ],
)
def test_the_schema_of_a_type(hint: object, schema: dict[str, Any]) -> None:
    found = lg.schema_of(hint)
    found.pop("description", None)
    assert found == schema


OPERATIONS = {
    (path, method): operation
    for path, operations in DESCRIPTION["paths"].items()
    for method, operation in operations.items()
}
RESPONSES = {
    (path, method, status): response
    for (path, method), operation in OPERATIONS.items()
    for status, response in operation["responses"].items()
}


def test_openapi_describes_every_route_and_no_other() -> None:
    served = cast(list[Any], lg.create_app(DEFAULTS).routes)
    routes = {(route.path, method.lower()) for route in served for method in route.methods - {"HEAD"}}
    described = {(path, method) for path, method in OPERATIONS if method != "head"}
    assert described == routes - {("/metrics", "get")}  # for the operator alone


def test_each_operation_has_an_id_of_its_own() -> None:
    counted = Counter(operation["operationId"] for operation in OPERATIONS.values())
    assert set(counted.values()) == {1}


def test_operations_have_the_tags_of_the_replaced_server() -> None:
    tags = {"lookingglass": "LookingGlass", "speedtest": "SpeedTest"}
    expected = [[tags.get(path.split("/")[1], "Network")] for path, _ in OPERATIONS]
    assert [operation["tags"] for operation in OPERATIONS.values()] == expected


def json_of(schema: str) -> object:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}


@pytest.mark.parametrize(("name", "schema"), [("mtr", "TargetRequest"), ("ping6", "Target6Request")])
def test_request_of_a_command_is_json_alone_with_a_named_schema(name: str, schema: str) -> None:
    """Generators of clients write code that does not import for a body with two media types."""
    body = OPERATIONS[f"/lookingglass/{name}", "post"]["requestBody"]
    assert body == {"required": True, "content": json_of(schema)}


def test_errors_have_named_schemas() -> None:
    names = {"422": "ValidationError"} | dict.fromkeys(("408", "411", "413"), "Detail")
    names |= dict.fromkeys(("429", "503"), "Busy")
    errors = [(status, each["content"]) for (*_, status), each in RESPONSES.items() if status != "200"]
    assert {status for status, _ in errors} == names.keys()
    assert errors == [(status, json_of(names[status])) for status, _ in errors]


RATED = ("RATE_LIMIT_DIAGNOSTICS", "RATE_LIMIT_SPEEDTEST", "RATE_LIMIT_SPEEDTEST_10G")
PROMISING = {  # servers that answer with what a status stands for, by the status
    "429": {"tools": every_tool(ECHO), **dict.fromkeys(RATED, "1/hour")},
    "503": {"tools": every_tool(SILENT), "MAX_DIAGNOSTICS": "1", "MAX_SPEEDTESTS": "1"},
}
WITHIN_LIMITS = {"tools": every_tool(ECHO), **dict.fromkeys(RATED, "100/hour")}
REFUSED: dict[str, dict[str, Any]] = {  # requests, by the status
    "411": {"content": [b"chunked"]},
    "413": {"content": bytes(5000)},
    "422": {"json": {"target": "127.1"}},
}
# The others have tests of their own: 408 takes its time, and 413 of an upload a gibibyte.
PROVOKED = [key for key in RESPONSES if key[2] != "408" and key[::2] != ("/speedtest/upload", "413")]


@pytest.mark.parametrize(("path", "method", "status"), PROVOKED)
def test_every_described_response_can_be_provoked(shared: Start, path: str, method: str, status: str) -> None:
    server = shared(**PROMISING.get(status, WITHIN_LIMITS))
    target = {"target": "::1" if path.endswith("6") else "127.0.0.1"}
    request = REFUSED.get(status, {"json": target} if method == "post" else {})
    with contextlib.ExitStack() as stack:
        if status == "503" and path.endswith("/upload"):
            stack.enter_context(server.http.stream("GET", "/speedtest/10G"))
        elif status in ("429", "503"):
            stack.enter_context(server.http.stream(method, path, **request))
        answer = stack.enter_context(server.http.stream(method, path, **request))
        assert str(answer.status_code) == status
        response = RESPONSES[path, method, status]
        assert [header for header in response.get("headers", {}) if header not in answer.headers] == []
        assert answer.headers["Content-Type"] in response["content"]
    until(server.idle)


def test_a_request_body_that_does_not_arrive_is_408_and_closes(serve: Start) -> None:
    seconds = dict.fromkeys(("BODY_SECONDS", "UPLOAD_STALL_SECONDS", "LINGER_SECONDS"), 0.2)
    server = serve(constants=seconds, spawned=False)
    request = "POST {} HTTP/1.1\r\nHost: lg\r\nContent-Length: 20\r\n\r\ntarget="
    paths = [path for path, _, status in RESPONSES if status == "408"]
    connections = [server.send(request.format(path).encode()) for path in paths]
    answer = rb"(?is)HTTP/1.1 408 .*\r\nconnection: close\r\n"
    assert [bool(re.match(answer, left(each))) for each in connections] == [True] * 7


def test_openapi_states_the_configured_limits() -> None:
    settings = lg.load_settings({"RATE_LIMIT_DIAGNOSTICS": "7/minute;70/hour", "DIAGNOSTIC_TIMEOUT": "33"})
    operation = lg.describe_api(settings, COMMANDS, SIZES)["paths"]["/lookingglass/mtr"]["post"]
    run = "Runs `mtr -4 --raw -e -c 10 -i 1 -G 1 -Z 2 -m 30 ADDRESS`, at most 33 s. "
    assert operation["description"] == f"{run}Limit: 7 per minute and 70 per hour."


# In a real browser; what the pages take from the CDN comes from the npm packages of the same versions.


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Browser]]:
    """Starts Chromium, by a prefix where it shall stand elsewhere."""
    if os.environ.get("LG_TEST_BROWSER") == "off":
        pytest.skip("LG_TEST_BROWSER is off")
    if not CHROMIUM:
        lacking("Chromium")
    with sync_playwright() as playwright:

        def start(*prefix: str) -> Browser:
            program = tmp_path_factory.mktemp("chromium") / "chromium"
            program.write_text(f'#!/bin/sh\nexec {shlex.join([*prefix, str(CHROMIUM)])} "$@"\n')
            program.chmod(0o755)
            return playwright.chromium.launch(executable_path=program, args=CHROMIUM_FLAGS)

        yield start


@pytest.fixture(scope="session")
def browser(launch: Callable[..., Browser]) -> Iterator[Browser]:
    running = launch()
    yield running
    running.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that reaches nothing but this machine."""
    context = browser.new_context()
    context.route(re.compile(r"^https?://(?!127\.0\.0\.1[:/])"), lambda route: route.abort())
    yield context.new_page()
    context.close()


CDN = "https://cdn.jsdelivr.net/npm/"
AXE = "axe-core@4.14.1"


@pytest.fixture(scope="session")
def npm_packages(once: Once, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with axe and the packages that the API's pages name, as NAME@VERSION/PATH."""
    if not (npm := shutil.which("npm")):
        lacking("npm")

    def download() -> str:
        folder = tmp_path_factory.mktemp("npm")
        shown = re.findall(f"{CDN}(.+?)/", "".join(lg.API_DOCS_FILES.values()))
        for package in {*shown, AXE}:
            line = [npm, "pack", "--silent", package]
            packed = subprocess.run(line, cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
            if packed.returncode:
                lacking(f"{package} from npm")
            shutil.unpack_archive(folder / packed.stdout.split()[-1], folder / "unpacked", filter="data")
            (folder / package).parent.mkdir(exist_ok=True)
            (folder / "unpacked" / "package").rename(folder / package)
        return str(folder)

    return Path(once("npm", download))


@pytest.mark.parametrize(
    ("name", "sign"), [("docs", ".swagger-ui .opblock-post"), ("redoc", "[data-section-id]")]
)
def test_the_api_docs_render_with_cdn_files_of_the_expected_hashes(
    echo: Server, page: Page, npm_packages: Path, name: str, sign: str
) -> None:
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))

    def fulfill(route: Route) -> None:
        path = npm_packages / route.request.url.removeprefix(CDN)
        route.fulfill(path=path, headers={"Access-Control-Allow-Origin": "*"})

    page.route(f"{CDN}**", fulfill)
    page.goto(f"http://127.0.0.1:{echo.port}/{name}")
    page.wait_for_selector(sign, timeout=PATIENCE * 1000)
    assert "/lookingglass/ping" in page.content()
    assert [fault for fault in faults if "logo" not in fault] == []  # ReDoc's own logo is from elsewhere


@pytest.mark.parametrize("name", lg.API_DOCS)
def test_the_api_docs_without_the_cdn_explain_what_is_missing(echo: Server, page: Page, name: str) -> None:
    page.goto(f"http://127.0.0.1:{echo.port}/{name}")
    assert "has not been loaded" in page.inner_text("#viewer")
    page.click("#viewer a")
    assert page.url == f"http://127.0.0.1:{echo.port}/openapi.json"


HOOKS = '''
import json, schemathesis

@schemathesis.hook
def filter_body(context, body):
    """Leaves out what the description cannot tell: international names, and what is too large."""
    text = json.dumps(body, default=str, ensure_ascii=False)
    return text.isascii() and len(text) < 1000
'''


def test_schemathesis_finds_nothing(serve: Start) -> None:
    if not (schemathesis := shutil.which("schemathesis", path=str(Path(sys.executable).parent))):
        lacking("schemathesis")
    allow = {"TARGET_ALLOW": "0.0.0.0/0,::/0", "MAX_DIAGNOSTICS_PER_CLIENT": "20"}
    server = serve(tools=every_tool(ECHO), names={"*": ["127.0.0.1", "::1"]}, **allow)
    (server.folder / "hooks.py").write_text(HOOKS)
    url = f"http://127.0.0.1:{server.port}/openapi.json"
    options = "--exclude-path-regex speedtest/1 --max-examples 50 --request-timeout 30"
    same = "--generation-deterministic"  # each time
    line = [schemathesis, "run", url, "--no-color", same, *options.split()]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(server.folder)}
    done = subprocess.run(line, cwd=server.folder, env=environment, check=False)
    assert done.returncode == 0


# ---- speed tests -------------------------------------------------------------------------------------------

UPLOAD = b"POST /speedtest/upload HTTP/1.1\r\nHost: lg\r\nContent-Length: %d\r\n\r\n"
DOWNLOAD = b"GET /speedtest/10G HTTP/1.1\r\nHost: lg\r\n\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: lg\r\n\r\n"


def test_download_is_zero_bytes_of_its_length(echo: Server) -> None:
    with echo.http.stream("GET", "/speedtest/100M") as response:
        lengths = [len(chunk) for chunk in response.iter_raw() if not chunk.strip(b"\0")]
    assert sum(lengths) == 104857600


def test_one_download_writes_in_a_turn_of_the_loop_and_2_mib_at_most() -> None:
    """So a line of a command waits for one block, not for one of each download."""
    settings = lg.load_settings({"RATE_LIMIT_SPEEDTEST": "off"})

    async def written() -> list[tuple[int, int]]:
        """The turn and the length of each block of four downloads."""
        service, client, turn = lg.Service(settings), lg.Client(ipaddress.ip_address("192.0.2.1")), 0

        async def download() -> list[tuple[int, int]]:
            async with service.speedtests.download(service.sizes["100M"], client) as (_, blocks):
                return [(turn, len(block)) async for block in blocks]

        downloads = asyncio.gather(*(download() for _ in range(4)))
        while not downloads.done():
            turn += 1
            await asyncio.sleep(0)
        return [block for blocks in await downloads for block in blocks]

    turns, lengths = zip(*outcome(written()), strict=True)
    assert (len(set(turns)), set(lengths)) == (4 * 50, {2**21})


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(("size", "length"), [("100M", 104857600), ("1G", 1073741824), ("10G", 10737418240)])
def test_download_has_its_length_and_headers_for_browsers_and_proxies(
    echo: Server, method: str, size: str, length: int
) -> None:
    expected = {
        "Content-Length": str(length),
        "Content-Type": "application/octet-stream",
        "Content-Disposition": f"attachment; filename=speedtest_{size}.bin",
        "Cache-Control": "no-store, no-transform",
        "Timing-Allow-Origin": "*",
    }
    with echo.http.stream(method, f"/speedtest/{size}") as response:
        assert {name: response.headers[name] for name in expected} == expected


def begun(server: Server, size: str, client: str = "192.0.2.1", method: str = "GET") -> int:
    """The status of a download that is broken off at once."""
    with server.http.stream(method, f"/speedtest/{size}", headers={"X-Forwarded-For": client}) as response:
        return response.status_code


def test_head_costs_nothing_of_the_limit(serve: Start) -> None:
    server = serve(RATE_LIMIT_SPEEDTEST="1/hour")
    methods = ("HEAD", "HEAD", "HEAD", "GET", "GET")
    assert [begun(server, "100M", method=method) for method in methods] == [200, 200, 200, 200, 429]


def test_10g_has_a_rate_limit_of_its_own(serve: Start) -> None:
    server = serve(RATE_LIMIT_SPEEDTEST="2/hour", RATE_LIMIT_SPEEDTEST_10G="1/hour")
    sizes = ("10G", "10G", "1G", "1G", "1G")
    assert [begun(server, size) for size in sizes] == [200, 429, 200, 200, 429]


def unread_download(server: Server, client: str = "192.0.2.1") -> socket.socket:
    """A connection on which a download runs that is not read."""
    request = DOWNLOAD.replace(b"Host", b"X-Forwarded-For: %b\r\nHost" % client.encode())
    connection = server.send(request, receive_bytes=4096)
    assert connection.recv(12) == b"HTTP/1.1 200"
    return connection


def begin_upload(server: Server) -> socket.socket:
    """A connection on which the server reads an upload of 1 GiB."""
    connection = server.send(UPLOAD.replace(b"Host", b"Expect: 100-continue\r\nHost") % 2**30)
    assert received(connection, b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
    return connection


def test_client_with_all_its_transfers_running_is_429(serve: Start) -> None:
    server = serve(MAX_SPEEDTESTS_PER_CLIENT="1")
    with unread_download(server):
        assert [begun(server, "1G", client) for client in ("192.0.2.1", "192.0.2.2")] == [429, 200]


@pytest.mark.parametrize("begin", [unread_download, begin_upload])
def test_aborted_transfer_frees_its_slot(serve: Start, begin: Callable[[Server], socket.socket]) -> None:
    server = serve(MAX_SPEEDTESTS="1")
    with begin(server):
        assert begun(server, "1G") == 503
    until(lambda: begun(server, "1G") == 200)


def test_download_loses_its_slot_when_its_reader_stalls_not_when_it_is_slow(serve: Start) -> None:
    server = serve(constants={"STALL_SECONDS": 1}, spawned=False, MAX_SPEEDTESTS="1")
    with server.send(DOWNLOAD, receive_bytes=65536) as connection:
        for _ in range(15):
            assert connection.recv(100_000)
            time.sleep(0.2)
        assert begun(server, "1G") == 503
        until(lambda: begun(server, "1G") == 200)


# Giving way: all slots are taken, and a client without a transfer asks for one.


def is_reset(connection: socket.socket) -> bool:
    return connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET


def test_longest_transfer_of_the_client_that_has_most_gives_way_to_one_that_has_none(serve: Start) -> None:
    one, many, none = "192.0.2.1", "192.0.2.2", "192.0.2.3"
    server = serve(MAX_SPEEDTESTS="3", constants={"GIVE_WAY_SECONDS": 0}, spawned=False)
    downloads = [unread_download(server, client) for client in (one, many, many)]
    assert [begun(server, "1G", client) for client in (one, many)] == [503, 503]
    assert not any(map(is_reset, downloads))
    assert begun(server, "1G", none) == 200
    until(lambda: is_reset(downloads[1]))
    assert [is_reset(downloads[0]), is_reset(downloads[2])] == [False, False]
    until(lambda: f'size=10G client={many} outcome="gave way"' in server.log)


def test_no_transfer_gives_way_within_its_first_minute(serve: Start) -> None:
    server = serve(MAX_SPEEDTESTS="1")
    with unread_download(server) as download:
        answer = server.http.get("/speedtest/1G", headers={"X-Forwarded-For": "192.0.2.2"})
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        assert not is_reset(download)
    assert lg.GIVE_WAY_SECONDS == 60


def test_upload_that_gives_way_is_503(serve: Start) -> None:
    constants = {"GIVE_WAY_SECONDS": 0, "LINGER_SECONDS": 0.1}
    server = serve(MAX_SPEEDTESTS="1", constants=constants, spawned=False)
    upload = begin_upload(server)
    assert begun(server, "1G", "192.0.2.2") == 200
    assert re.match(rb"(?s)HTTP/1.1 503 .*stopped to make room for another client", left(upload))


# The budget of a day.


def used_today(server: Server) -> float:
    return scrape(server)["lg_speedtest_budget_used_bytes"]


def test_transfer_begins_only_where_its_whole_length_fits_into_the_budget(serve: Start) -> None:
    server = serve(SPEEDTEST_GIB_PER_DAY="1", RATE_LIMIT_SPEEDTEST="9/hour")
    with server.http.stream("GET", "/speedtest/1G"):
        answer = server.http.post("/speedtest/upload", content=b"x")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    assert "may use up today's budget" in answer.json()["error"]
    until(lambda: begun(server, "100M") == 200)  # what was not moved has been given back


def test_transfer_larger_than_what_is_left_of_the_budget_may_come_again_after_midnight(serve: Start) -> None:
    server, midnight = serve(SPEEDTEST_GIB_PER_DAY="1"), 20_000 * 86400
    message = "Today's budget of speed tests is used up: it begins anew at midnight UTC"
    with patch.object(time, "time", lambda: midnight - 99.5):
        server.http.post("/speedtest/upload", content=b"xyz")
        assert used_today(server) == 3
        answer = server.http.get("/speedtest/1G")
        assert (answer.status_code, answer.json()["error"]) == (503, message)
        assert answer.headers["Retry-After"] == "100"
    with patch.object(time, "time", lambda: midnight):
        assert (used_today(server), begun(server, "1G")) == (0, 200)


def test_transfer_over_midnight_counts_on_each_day_what_it_moved(serve: Start) -> None:
    server, tomorrow = serve(SPEEDTEST_GIB_PER_DAY="1"), time.time() + 86400
    connection = server.send(UPLOAD % 5 + b"xyz")
    until(lambda: used_today(server) == 3)
    with patch.object(time, "time", lambda: tomorrow):
        connection.sendall(b"zz")
        until(lambda: used_today(server) == 2)


def test_transfer_larger_than_the_budget_of_a_day_is_refused_as_such_at_no_cost(serve: Start) -> None:
    server = serve(SPEEDTEST_GIB_PER_DAY="1", RATE_LIMIT_SPEEDTEST_10G="1/hour")
    answers = [server.http.get("/speedtest/10G") for _ in range(3)]
    message = "This is more than this server's budget of speed tests for a day: choose a smaller one"
    assert [(answer.status_code, answer.json()["error"]) for answer in answers] == [(503, message)] * 3


# Uploads.


@contextlib.contextmanager
def trickling(connection: socket.socket) -> Iterator[None]:
    """Meanwhile, a byte is sent each tenth of a second; closes the connection."""

    def trickle() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection.sendall(b"x")
                time.sleep(0.1)

    with ThreadPoolExecutor(1) as pool, connection:
        pool.submit(trickle)
        yield


@pytest.mark.parametrize("framing", ["Content-Length: 10000000", "Transfer-Encoding: chunked"])
def test_early_answer_reaches_a_client_that_is_still_sending(serve: Start, framing: str) -> None:
    """If the connection were reset at once, systems other than Linux would discard the answer."""
    server = serve(constants={"LINGER_SECONDS": 1}, spawned=False)
    chunk = b"%x\r\n%b\r\n" % (10**6, bytes(10**6)) if "chunked" in framing else bytes(10**6)
    header = f"POST /lookingglass/ping HTTP/1.1\r\nHost: lg\r\n{framing}\r\n\r\n"
    answer = left(server.send(header.encode() + 10 * chunk))
    assert re.fullmatch(rb"(?is)HTTP/1.1 413 .*connection: close.*\{.*\}", answer)


def test_early_answer_frees_the_slot_at_once(serve: Start) -> None:
    server = serve(MAX_SPEEDTESTS="1", RATE_LIMIT_SPEEDTEST="1/hour")
    assert server.http.post("/speedtest/upload", content=b"x").status_code == 200
    with server.send(UPLOAD % 50_000_000) as connection:
        assert connection.recv(12) == b"HTTP/1.1 429"
        assert begun(server, "100M") == 200


def test_rest_of_a_body_is_discarded_for_a_few_seconds_only(serve: Start) -> None:
    connection = serve(constants={"LINGER_SECONDS": 0.3}, spawned=False).send(UPLOAD % (2**30 + 1))
    assert left(connection).startswith(b"HTTP/1.1 413 ")
    with pytest.raises(ConnectionError):
        until(lambda: connection.sendall(b"x"))


def test_upload_answers_bytes_seconds_and_megabits_per_second(echo: Server) -> None:
    answer = echo.http.post("/speedtest/upload", content=bytes(50_000_000)).json()
    mbps = pytest.approx(400 / answer["seconds"], rel=0.01)
    assert answer == {"bytes": 50_000_000, "seconds": answer["seconds"], "mbps": mbps}


def test_empty_upload_has_no_speed(echo: Server) -> None:
    assert echo.http.post("/speedtest/upload").json() == {"bytes": 0, "seconds": 0, "mbps": None}


def test_upload_is_timed_from_its_first_byte_to_its_last(echo: Server) -> None:
    connection = echo.send(UPLOAD % 2)
    for byte, pause in ((b"x", 1), (b"y", 0.3)):
        time.sleep(pause)
        connection.sendall(byte)
    assert 0.2 < json.loads(received(connection, b"}").partition(b"\r\n\r\n")[2])["seconds"] < 1


@pytest.mark.parametrize("length", [0, 1, 65_400, 65_536, 65_537, 200_000, 5_000_000])
def test_connection_is_used_again_at_once_after_an_upload_of_any_length(echo: Server, length: int) -> None:
    connection = echo.send(UPLOAD % length + bytes(length))
    assert b'{"bytes":%d,' % length in received(connection, b"}")
    connection.settimeout(2)
    connection.sendall(HEALTH)
    assert received(connection, b"}").endswith(b'{"status":"ok"}')


@pytest.mark.parametrize("length", [1, 65_536, 5_000_000])
def test_request_pipelined_behind_an_upload_is_answered(echo: Server, length: int) -> None:
    closing = HEALTH.replace(b"Host", b"Connection: close\r\nHost")
    answers = left(echo.send(UPLOAD % length + bytes(length) + closing))
    found = re.findall(rb'HTTP/1.1 (\d+)|"bytes":(\d+)|("status":"ok")', answers)
    assert [b"".join(each) for each in found] == [b"200", b"%d" % length, b"200", b'"status":"ok"']


@pytest.mark.parametrize(
    ("framing", "status"), [(f"Content-Length: {2**30 + 1}", 413), ("Transfer-Encoding: chunked", 411)]
)
def test_upload_over_1_gib_or_without_a_length_is_refused_before_it_is_sent(
    echo: Server, framing: str, status: int
) -> None:
    header = f"POST /speedtest/upload HTTP/1.1\r\nHost: lg\r\nExpect: 100-continue\r\n{framing}\r\n\r\n"
    assert received(echo.send(header.encode()), b"}").startswith(b"HTTP/1.1 %d " % status)


@pytest.mark.parametrize("options", ["--data-binary @zeros", "-X POST -T zeros"])
def test_curl_uploads_with_expect(echo: Server, tmp_path: Path, options: str) -> None:
    if not (curl := shutil.which("curl")):
        lacking("the command curl")
    (tmp_path / "zeros").write_bytes(bytes(5_000_000))
    url = f"{echo.http.base_url}/speedtest/upload"
    line = [curl, "-sS", *options.split(), "-H", "Expect: 100-continue", url]
    assert json.loads(subprocess.check_output(line, cwd=tmp_path))["bytes"] == 5_000_000


def test_running_uploads_of_a_test_are_counted_together(echo: Server) -> None:
    def so_far(test: str) -> Any:
        return echo.http.get(f"/speedtest/upload?test={test}").json()

    named = UPLOAD.replace(b"/upload", b"/upload?test=mine")
    sent = [(UPLOAD, 5), (named, 10), (named, 20)]
    uploads = [echo.send(header % 1000 + bytes(length)) for header, length in sent]
    until(lambda: so_far("mine")["bytes"] == 30)
    assert so_far("mine")["seconds"] > 0
    nothing = {"bytes": 0, "seconds": 0.0, "mbps": None}
    assert [so_far(test) for test in ("theirs", "")] == [nothing, nothing]
    for upload in uploads:
        upload.close()
    until(lambda: so_far("mine") == nothing)


def test_upload_at_its_time_limit_is_answered_with_what_came(serve: Start) -> None:
    connection = serve(constants={"UPLOAD_SECONDS": 0.5}, spawned=False).send(UPLOAD % 2**30)
    with trickling(connection):
        header, _, body = received(connection, b"}").partition(b"\r\n\r\n")
    assert re.match(rb"(?is)HTTP/1.1 200 .*\r\nconnection: close", header)
    assert 0 < json.loads(body)["bytes"] < 100


# ---- about this server -------------------------------------------------------------------------------------


def test_network_info_has_the_settings_and_the_address_of_the_client(serve: Start) -> None:
    assert serve(**AMSTERDAM).http.get("/network/info").json() == {
        "location": AMSTERDAM["NETWORK_LOCATION"],
        "map_url": AMSTERDAM["NETWORK_MAP_URL"],
        "facility": AMSTERDAM["NETWORK_FACILITY"],
        "facility_url": AMSTERDAM["NETWORK_FACILITY_URL"],
        "looking_glass_ipv4": AMSTERDAM["NETWORK_IPV4"],
        "looking_glass_ipv6": AMSTERDAM["NETWORK_IPV6"],
        "your_ip": "127.0.0.1",
    }


@pytest.mark.parametrize(("host", "address"), [("127.0.0.1", "127.0.0.1"), ("[::1]", "::1")])
def test_one_port_serves_ipv4_and_ipv6(echo: Server, host: str, address: str) -> None:
    info = httpx.get(f"http://{host}:{echo.port}/network/info", trust_env=False).json()
    assert info["your_ip"] == address


def test_client_that_a_proxy_does_not_name_is_limited_as_the_proxy_and_in_no_list(serve: Start) -> None:
    unnamed = {"X-Forwarded-For": "unknown"}
    server = serve(RATE_LIMIT_EXEMPT="127.0.0.1", RATE_LIMIT_SPEEDTEST="1/hour")
    uploads = [server.http.post("/speedtest/upload", headers=headers) for headers in (unnamed, unnamed, {})]
    assert [upload.status_code for upload in uploads] == [200, 429, 200]
    assert server.http.get("/metrics", headers=unnamed).status_code == 404


def test_missing_tools_are_named_by_health_and_their_commands_are_503(shared: Start) -> None:
    extra = {name: name + " {address}" for name in ("no-ping", "no-mtr")}
    server = shared(COMMANDS=",".join(extra), EXTRA_COMMANDS=json.dumps(extra))
    health, run = server.http.get("/health"), server.run("no-ping")
    degraded = {"status": "degraded", "missing": ["no-ping", "no-mtr"]}
    error = {"error": "no-ping is not installed on this server, or may not run"}
    assert (health.status_code, health.json()) == (200, degraded)
    assert (run.status_code, run.json()) == (503, error)


def test_tool_that_becomes_executable_is_used_without_a_restart(serve: Start) -> None:
    server = serve(tools={"one": ECHO}, COMMANDS="one", EXTRA_COMMANDS='{"one": "one {address}"}')
    tool = server.folder / "bin" / "one"
    tool.chmod(0o644)
    if os.access(tool, os.X_OK):
        lacking("a file system that knows execute permissions")
    assert server.run("one").status_code == 503
    until(lambda: server.http.get("/health").json() == {"status": "degraded", "missing": ["one"]})
    tool.chmod(0o755)
    assert server.run("one").status_code == 200
    until(lambda: server.http.get("/health").json() == {"status": "ok"})


WORKING_TOOLS = {  # they print what the real ones print for loopback
    "ping": "#!/bin/sh\necho '64 bytes from 127.0.0.1: icmp_seq=1 ttl=64 time=0.03 ms'\n",
    "traceroute": "#!/bin/sh\necho ' 1  localhost (127.0.0.1)  0.030 ms  0.010 ms  0.010 ms'\n",
    "mtr": "#!/bin/sh\necho x 0 33000; echo h 0 127.0.0.1; echo p 0 30 33000\n",
}
FAILING = "#!/bin/sh\necho odd; exit 2\n"


@pytest.mark.parametrize(
    ("tool", "script", "kind", "last"),
    [
        ("ping", "echo ping: not permitted >&2; exit 2", "forbidden", "ping: not permitted"),
        ("mtr", "echo mtr: Failure to start mtr-packet", "forbidden", "mtr: Failure to start mtr-packet"),
        ("mtr", "echo odd; echo mtr: mtr should not run suid", "failing", "mtr: mtr should not run suid"),
        ("ping", "printf 'a %0100000d' 0; exit 2", "failing", "a " + "0" * 998),  # a long line
        ("ping", "exit 0", "failing", "exit status 0, and no reply from 127.0.0.1"),
        ("mtr", "exec sleep 1000", "failing", "stopped after 3 s"),
    ],
)
def test_tool_that_fails_on_loopback_is_forbidden_or_failing_and_logged_with_its_last_line(
    serve: Start, tool: str, script: str, kind: str, last: str
) -> None:
    server = serve(tools=WORKING_TOOLS | {tool: f"#!/bin/sh\n{script}\n"}, trials=True)
    until(lambda: server.http.get("/health").json() == {"status": "degraded", kind: [tool]})
    assert re.findall('tool=(.*) error="(.*)"', server.log) == [(tool, last)]


def test_tool_is_tried_each_minute_until_it_has_measured_loopback(serve: Start, tmp_path: Path) -> None:
    assert lg.TRIAL_REPEAT_SECONDS == 60
    trials = tmp_path / "trials of mtr"
    tools = WORKING_TOOLS | {"ping": FAILING, "mtr": f"#!/bin/sh\necho >> '{trials}'\n"}
    server = serve(tools=tools, trials=True, constants={"TRIAL_REPEAT_SECONDS": 0.1}, spawned=False)
    until(lambda: server.http.get("/health").json().get("failing") == ["mtr", "ping"])
    server.stand_in("ping", WORKING_TOOLS["ping"])
    until(lambda: server.http.get("/health").json().get("failing") == ["mtr"])
    server.stand_in("ping", FAILING)
    enough = trials.stat().st_size + 3
    until(lambda: trials.stat().st_size >= enough)
    assert server.http.get("/health").json() == {"status": "degraded", "failing": ["mtr"]}
    messages = re.findall('msg="(.*)" tool=(?:ping|traceroute)', server.log)
    assert messages == ["A tool fails on loopback", "A tool works again"]


def test_command_whose_tool_fails_on_loopback_runs_all_the_same(serve: Start) -> None:
    server = serve(tools={"ping": FAILING}, trials=True)
    until(lambda: server.http.get("/health").json().get("failing") == ["ping"])
    assert server.run("ping").text.startswith("odd\n")


# The usage.


def test_usage_is_plain_text_that_varies_by_accept_and_fits_on_a_screen(echo: Server) -> None:
    response = echo.http.get("/")
    assert response.headers["Content-Type"].startswith("text/plain")
    assert "Accept" in response.headers["Vary"]
    commands = re.findall(r"/lookingglass/(\S+)$", response.text, re.M)
    assert commands == [*COMMANDS, "mtr"]  # the last as events
    assert len(response.text.splitlines()) <= 25


def test_lines_of_the_usage_work_when_pasted(echo: Server) -> None:
    if not shutil.which("curl"):
        lacking("the command curl")
    lines = re.findall("^    (.*)", echo.http.get("/").text, re.M)
    assert len(lines) > 10
    printed = [subprocess.check_output(f"{line} -sSf", shell=True, text=True) for line in lines]  # noqa: S602
    expected = [("argv" if "/lookingglass/" in line else "") for line in lines]
    assert [text for text, part in zip(printed, expected, strict=True) if part not in text] == []


def test_malformed_host_header_is_not_printed_into_the_usage(echo: Server) -> None:
    text = echo.http.get("/", headers={"Host": "x; rm -rf ~"}).text
    assert f"http://localhost:{echo.port}/health" in text
    assert "rm -rf" not in text


# Behind a proxy that strips a path.


@pytest.mark.parametrize(
    ("trusted", "prefix", "path"),
    [
        *(("127.0.0.1", prefix, prefix.rstrip("/")) for prefix in ("/lg", "/lg/", "/a/b.c~d_e-f")),
        *(
            ("127.0.0.1", bad, "")
            for bad in ("lg", "/lg;id", "/$(id)", "//evil.example", "/lg//x", "/lg?x", "/")
        ),
        ("192.0.2.1", "/lg", ""),
    ],
)
def test_path_that_a_trusted_proxy_strips_stands_in_the_usage_and_the_description(
    shared: Start, trusted: str, prefix: str, path: str
) -> None:
    server, headers = shared(FORWARDED_ALLOW_IPS=trusted), {"X-Forwarded-Prefix": prefix}
    base, plain = f"http://127.0.0.1:{server.port}", server.http.get("/").text
    assert plain.count(f"{base}/") > 10
    assert server.http.get("/", headers=headers).text == plain.replace(base, base + path)
    description = server.http.get("/openapi.json", headers=headers).json()
    assert description["servers"] == [{"url": path or "/"}]


@pytest.mark.parametrize("name", lg.API_DOCS)
def test_api_docs_load_the_description_relative_to_themselves(echo: Server, name: str) -> None:
    html = echo.http.get(f"/{name}").text
    assert ("'openapi.json'" in html, "'/openapi.json'" in html) == (True, False)


# Caches.


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *(("GET", path, 200) for path in ("/", "/health", "/network/info", "/metrics", "/openapi.json")),
        *((method, "/speedtest/upload", 200) for method in ("GET", "POST")),
        ("GET", "/health/", 307),
        ("POST", "/lookingglass/ping", 422),
        ("GET", "/nothing", 404),
        ("POST", "/health", 405),
    ],
)
def test_no_cache_keeps_an_answer(echo: Server, method: str, path: str, status: int) -> None:
    answer = echo.http.request(method, path)
    assert (answer.status_code, answer.headers.get("Cache-Control")) == (status, "no-store")


@pytest.mark.parametrize("request_line", [b"GET /health HTTP/9", b"GET /" + b"x" * 20_000 + b" HTTP/1.1"])
def test_no_cache_keeps_the_answer_to_a_malformed_request(echo: Server, request_line: bytes) -> None:
    answer = left(echo.send(request_line + b"\r\nHost: lg\r\n\r\n"))
    assert re.match(rb"(?is)HTTP/1.1 4\d\d .*\r\ncache-control: no-store\r\n", answer)


# The page as it is sent.

HTML = {"Accept": "text/html,application/xhtml+xml;q=0.9"}


@pytest.mark.parametrize("encoding", ["gzip", "identity"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_page_is_sent_with_a_tag_and_may_be_kept(echo: Server, encoding: str, method: str) -> None:
    headers = echo.http.request(method, "/", headers=HTML | {"Accept-Encoding": encoding}).headers
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["Cache-Control"] == "no-cache"
    assert {"Accept", "Accept-Encoding"} <= set(headers["Vary"].split(", "))
    assert headers.get("Content-Encoding", "identity") == encoding
    assert re.fullmatch(r'"[0-9a-f]{32}"', headers["ETag"])


def test_page_is_the_same_document_in_each_encoding_with_another_tag(echo: Server) -> None:
    plain, packed = (
        echo.http.get("/", headers=HTML | {"Accept-Encoding": encoding})
        for encoding in ("gzip;q=0, identity", "br, GZIP ;q=0.5")
    )
    assert (plain.text.startswith("<!doctype html>"), packed.headers["Content-Encoding"]) == (True, "gzip")
    assert plain.text == packed.text
    assert plain.headers["ETag"] != packed.headers["ETag"]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    ("known", "status"),
    [("{}", 304), ("W/{}", 304), ('"other", W/{}', 304), ("*", 304), ('"other"', 200), ("", 200)],
)
def test_page_that_is_known_is_not_sent_again(echo: Server, method: str, known: str, status: int) -> None:
    asked = HTML | {"Accept-Encoding": "gzip"}
    tag = echo.http.get("/", headers=asked).headers["ETag"]
    answer = echo.http.request(method, "/", headers=asked | {"If-None-Match": known.format(tag)})
    assert (answer.status_code, answer.headers["ETag"]) == (status, tag)
    assert bool(answer.content) == (status == 200 and method == "GET")


def test_nothing_of_a_request_stands_in_the_page(echo: Server) -> None:
    odd = HTML | {"Host": "odd.example", "X-Forwarded-For": "192.0.2.77", "X-Forwarded-Prefix": "/odd"}
    assert echo.http.get("/?target=odd", headers=odd).content == echo.http.get("/", headers=HTML).content


# Other origins.

ORIGIN = {"Origin": "https://web.example"}


def preflight(server: Server, method: str, name: str, value: str) -> httpx.Response:
    """The answer to a browser that asks whether a script may send this, with one more header."""
    asked = {"Access-Control-Request-Method": method, f"Access-Control-Request-{name}": value}
    return server.http.options("/lookingglass/ping", headers=ORIGIN | asked)


def test_preflight_of_another_origin_is_allowed_for_a_private_network_too(echo: Server) -> None:
    answer = preflight(echo, "POST", "Private-Network", "true")
    allowed = [answer.headers[f"Access-Control-Allow-{name}"] for name in ("Origin", "Private-Network")]
    assert (answer.status_code, allowed) == (200, ["*", "true"])


def test_methods_and_headers_of_other_origins_may_be_limited(shared: Start) -> None:
    server = shared(CORS_METHODS="GET", CORS_HEADERS="X-One")
    asked = [("GET", "X-One"), ("POST", "X-One"), ("GET", "X-Two")]
    answers = [preflight(server, method, "Headers", name) for method, name in asked]
    assert [answer.status_code for answer in answers] == [200, 400, 400]


def test_other_origins_may_read_errors(serve: Start) -> None:
    extra = '{"gone": "no-such-tool {address}"}'
    server = serve(tools={"ping": ECHO}, EXTRA_COMMANDS=extra, RATE_LIMIT_DIAGNOSTICS="1/hour")
    asked = [("ping", "10.0.0.1"), ("ping", "127.0.0.1"), ("ping", "127.0.0.1"), ("gone", "127.0.0.1")]
    answers = [server.run(*each, headers=ORIGIN) for each in asked]
    assert [answer.status_code for answer in answers] == [422, 200, 429, 503]
    assert [answer.headers.get("Access-Control-Allow-Origin") for answer in answers] == ["*"] * 4


def test_other_origins_may_read_the_rate_limit(echo: Server) -> None:
    exposed = echo.http.get("/network/info", headers=ORIGIN).headers["Access-Control-Expose-Headers"]
    limits = {"Retry-After", "X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset"}
    assert limits <= set(exposed.split(", "))


@pytest.mark.parametrize(
    ("origins", "allowed"),
    [
        ("*", ("*", None)),
        ("https://a.example, https://web.example", ("https://web.example", "true")),
        ("https://a.example, https://b.example", (None, "true")),  # which browsers ignore without an origin
    ],
)
def test_only_named_origins_are_allowed_to_send_credentials(
    shared: Start, origins: str, allowed: tuple[str | None, str | None]
) -> None:
    server = shared(CORS_ORIGINS=origins, CORS_CREDENTIALS="true")
    headers = server.http.get("/health", headers=ORIGIN).headers
    names = ("Access-Control-Allow-Origin", "Access-Control-Allow-Credentials")
    assert tuple(map(headers.get, names)) == allowed


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/nothing", 404, ""),
        ("POST", "/nothing", 404, ""),
        ("GET", "/lookingglass/", 404, ""),
        ("GET", "/lookingglass/ping", 405, "POST"),
        ("POST", "/health", 405, "GET, HEAD"),
        ("DELETE", "/speedtest/1G", 405, "GET, HEAD"),
    ],
)
def test_unknown_path_is_404_and_wrong_method_405_in_json_with_allow(
    echo: Server, method: str, path: str, status: int, allow: str
) -> None:
    answer = echo.http.request(method, path, content=b"target=127.0.0.1")
    assert (answer.status_code, list(answer.json())) == (status, ["detail"])
    assert set(answer.headers.get("Allow", "").split(", ")) == set(allow.split(", "))


# ---- the page ----------------------------------------------------------------------------------------------
# Browsers and servers stand on the first host of .ci/hops.

HERE4, HERE6 = "198.51.100.1", "2001:db8:0:1::1"
AMSTERDAM = {
    "NETWORK_LOCATION": "Amsterdam",
    "NETWORK_FACILITY": "AMS 7",
    "NETWORK_FACILITY_URL": "https://facility.example/ams7",
    "NETWORK_MAP_URL": "https://map.example/ams",
    "NETWORK_IPV4": HERE4,
    "NETWORK_IPV6": HERE6,
    "TARGET_ALLOW": "127.0.0.0/8,::1,198.51.100.0/24,2001:db8::/32",
    "MAX_DIAGNOSTICS_PER_CLIENT": "20",
}
SLOW_PING = """#!/bin/sh
echo "PING 127.0.0.1 (127.0.0.1) 56(84) bytes of data."
echo "64 bytes from 127.0.0.1: icmp_seq=1 ttl=60 time=10.0 ms"
echo "no answer yet for icmp_seq=2"
echo "64 bytes from 127.0.0.1: icmp_seq=3 ttl=60 time=30.0 ms"
while :; do sleep 0.05; done
"""
QUICK_PING = SLOW_PING.replace("while :; do sleep 0.05; done", "")
BAD_HOP = """#!/bin/sh
host() { printf 'h %d %s\\n' "$1" "$2"; }
sleep 0.6
for round in 0 1 2 3 4; do
  for hop in 3 2 1 0; do
    echo "x $hop 1"
    case $hop$round in
      1* | 22 | 23) ;;
      *) host $hop 198.51.100.$((hop == 3 ? 254 : hop + 1))
         echo "p $hop $((10000 * (hop + 1) + 4000 * round * (hop == 2))) 1";;
    esac
  done
  sleep 0.3
done
"""
# The real tools with fewer probes.
QUICK = {
    tool: f"""#!/bin/sh\nexec /usr/bin/{tool} $(echo "$@" | sed 's/ -c 1[05] / -c 3 /')\n"""
    for tool in ("ping", "mtr")
}
CLIPBOARD = ["clipboard-read", "clipboard-write"]

Visit = Callable[..., Page]


@pytest.fixture(scope="session")
def browser_in_hops(launch: Callable[..., Browser], hops: tuple[str, ...]) -> Iterator[Browser]:
    running = launch(*hops)
    yield running
    running.close()


@contextlib.contextmanager
def visiting(browser: Browser) -> Iterator[Visit]:
    """Opens the page of a server. Errors of the script and violations of the policy fail the test."""
    pages: list[Page] = []
    faults: list[str] = []

    def open_at(server: Server, query: str = "", host: str = "127.0.0.1", **options: Any) -> Page:
        pages.append(open_page(browser, f"http://{host}:{server.port}/{query}", faults, **options))
        return pages[-1]

    yield open_at
    for page in pages:
        page.context.close()
    assert faults == []


@pytest.fixture
def visit(browser_in_hops: Browser) -> Iterator[Visit]:
    with visiting(browser_in_hops) as open_at:
        yield open_at


def places(shared: Start, **options: Any) -> Any:
    """Amsterdam; Frankfurt is up as well, without IPv6 and extra commands, Sydney is down."""
    elsewhere = {"NETWORK_LOCATION": "Frankfurt am Main", "NETWORK_IPV6": "", "NETWORK_MAP_URL": ""}
    frankfurt = shared(**{**AMSTERDAM, **elsewhere, **options})
    port = free_port()
    ports = {"Amsterdam": port, "Frankfurt": frankfurt.port, "Sydney": free_port()}
    locations = json.dumps([{"name": name, "url": f"http://127.0.0.1:{ports[name]}/"} for name in ports])
    bgp = json.dumps({"bgp": r"printf '%s\n' {address} unicast"})
    return shared(PORT=str(port), LOCATIONS=locations, EXTRA_COMMANDS=bgp, **AMSTERDAM, **options)


@pytest.fixture(scope="session")
def amsterdam(shared: Start, hops: tuple[str, ...]) -> Any:
    """The real server with the real tools, and its other places."""
    return places(shared, prefix=hops)


@pytest.fixture(scope="session")
def quick(shared: Start, hops: tuple[str, ...]) -> Any:
    """The same with the real tools and three probes."""
    return places(shared, prefix=hops, tools=QUICK)


@pytest.fixture(scope="session")
def stand_ins(shared: Start, hops: tuple[str, ...]) -> Any:
    """A server whose ping runs until it is stopped; its traceroute prints marks, its mtr has a bad hop."""
    hop = 'echo " $n  r$n.example (198.51.100.$n)  1.000 ms  2.000 ms !N  *"; sleep 0.2'
    last = 'echo " 4  t.example (198.51.100.254)  1.000 ms  2.000 ms  *"'
    traceroute = f"#!/bin/sh\nfor n in 1 2 3; do {hop}; done\n{last}\n"
    tools = {"ping": SLOW_PING, "traceroute": traceroute, "mtr": BAD_HOP}
    return shared(prefix=hops, tools=tools, **AMSTERDAM)


@pytest.fixture
def serve_in_hops(serve: Start, hops: tuple[str, ...]) -> Start:
    return lambda **options: serve(**{**AMSTERDAM, "prefix": hops, **options})


@pytest.fixture(scope="session")
def live(browser_in_hops: Browser, amsterdam: Server) -> Iterator[Mapping[str, Page]]:
    """Pages on which the real tools have measured the target of .ci/hops, at the same time."""
    queries = {name: f"?command={name}&target=target.lg.example" for name in TOOLS}
    queries["closed"] = "?command=ping&target=closed.lg.example"
    options = {"viewport": {"width": 1280, "height": 1600}, "permissions": CLIPBOARD}
    with visiting(browser_in_hops) as visit:
        pages = {name: visit(amsterdam, query, **options) for name, query in queries.items()}
        for page in pages.values():
            page.click("#run")
        for page in pages.values():
            ended(page)
        yield pages


def text(page: Page, selector: str) -> str:
    return page.inner_text(selector).replace("\xa0", " ")


def ended(page: Page) -> str:
    """The verdict on the newest test, once it has ended."""
    page.wait_for_selector("#run:not(.stop)")
    page.wait_for_selector("#results h2", state="attached")
    return page.text_content("#results h2").replace("\xa0", " ")  # type: ignore[union-attr]


def choose(page: Page, label: str) -> None:
    page.click(f"#form label:has-text('{label}')")


def run(page: Page, tab: str = "", target: str = "") -> None:
    if tab:
        choose(page, tab)
    if target:
        page.fill("[name=target]", target)
    page.click("#run")


def rows(page: Page, table: str = "#results") -> list[str]:
    """What stands in each row of a table."""
    return [" ".join(row.inner_text().split()) for row in page.locator(f"{table} tbody tr").all()]


def answering(body: str) -> Callable[[Route], None]:
    return lambda route: route.fulfill(body=body)


def answer_with(page: Page, *events: Mapping[str, object], **more: Any) -> None:
    """Lets the page read these events in place of the server's."""
    page.route("**/lookingglass/*", answering("\n".join(map(json.dumps, stream(*events, **more))) + "\n"))


# Every engine


Engines = Callable[..., Engine]
# The programs of each, besides Chromium.
ENGINES = {"chromium": (), "firefox": ("firefox-esr",), "webkit": ("WebKitWebDriver", "xvfb-run")}


@pytest.fixture(scope="session")
def engines(launch: Callable[..., Browser], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Starts a browser of an engine, by a prefix where it shall stand elsewhere."""
    with contextlib.ExitStack() as stack:

        def start(name: str, prefix: tuple[str, ...], **options: bool) -> Engine:
            for program in ENGINES[name]:
                if not shutil.which(program):
                    lacking(f"the program {program}")
            if name == "chromium":
                return stack.enter_context(contextlib.closing(Chromium(launch(*prefix), **options)))
            kind = Firefox if name == "firefox" else WebKit
            engine = kind(tmp_path_factory.mktemp(name), prefix, **options)
            return stack.enter_context(contextlib.closing(engine))

        yield start


@pytest.fixture(scope="session", params=ENGINES)
def engine(request: pytest.FixtureRequest, engines: Engines, hops: tuple[str, ...]) -> Engine:
    return engines(request.param, hops)


def at(server: Server, query: str = "") -> str:
    return f"http://127.0.0.1:{server.port}/{query}"


def test_first_view_names_the_place_and_what_each_test_answers(engine: Engine, quick: Server) -> None:
    engine.open(at(quick))
    assert engine.text("h1") == "Amsterdam"
    titles = engine.js("[...document.querySelectorAll('#about h2')].map((each) => each.innerText)")
    assert titles == ["Ping", "Traceroute", "MTR", "Speed test"]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("name", TOOLS)
def test_command_reaches_its_target(engine: Engine, quick: Server, name: str, version: int) -> None:
    query = f"?command={name}&target=target.lg.example&version={version}"
    assert re.fullmatch(r"[\d.]+ ms, (none|\d) of 3 probes lost", engine.run(at(quick, query)))
    assert (TARGET4, TARGET6)[version == 6] in engine.text("#results summary")


@pytest.fixture
def pinging(engine: Engine, stand_ins: Server) -> Iterator[Engine]:
    """A browser that shows a ping which runs until it is stopped, after its two replies."""
    engine.begin(at(stand_ins, "?target=127.0.0.1"))
    engine.wait("document.querySelectorAll('#results circle').length === 2")
    yield engine
    engine.keys("Escape")
    engine.ended()


def test_dots_are_round(pinging: Engine) -> None:
    box = "document.querySelector('#results circle').getBoundingClientRect()"
    assert pinging.js(f"(({{ width, height }}) => [width, height])({box})") == pytest.approx([8, 8], abs=0.1)


def test_rows_grow_and_stay_where_they_are(engine: Engine, stand_ins: Server) -> None:
    engine.begin(at(stand_ins, "?command=traceroute&target=127.0.0.1"))
    first = "document.querySelector('#results tbody tr')"
    engine.wait(first)
    top = engine.js(f"({first}.mark = 1, {first}.getBoundingClientRect().top)")
    engine.ended()
    marked = f"[{first}.mark, {first}.getBoundingClientRect().top, {first}.parentNode.childNodes.length]"
    assert engine.js(marked) == [1, top, 4]


@pytest.mark.parametrize("seconds", [0.1, 0.15, 0.4, 1])
def test_press_of_any_length_counts(engine: Engine, stand_ins: Server, seconds: float) -> None:
    engine.open(at(stand_ins, "?target=127.0.0.1"))
    pressed, newest = [], "document.querySelector('#results > :first-child circle')"
    for _ in range(2):
        engine.press("#run", seconds)
        # The previous result is shown until this test begins, and below it from then on.
        engine.wait(f"document.title.startsWith('…') && {newest}")
        engine.press("#run", seconds)
        pressed.append(engine.ended())
    assert pressed == ["10.0 ms, 1 of 3 probes lost"] * 2


@pytest.mark.parametrize("how", ["Escape", "Stop"])
def test_stop_ends_the_process(engine: Engine, amsterdam: Server, how: str) -> None:
    address = lone_address()
    engine.begin(at(amsterdam, f"?target={address}"))
    group = group_of(address)
    engine.wait("document.querySelector('#results circle')")
    engine.keys("Escape") if how == "Escape" else engine.press("#run")
    until(lambda: not members(group), SOON)
    engine.ended()
    assert "Stopped." in engine.text("#results")


def test_running_page_writes_nothing_that_has_not_changed(pinging: Engine) -> None:
    written = pinging.js("""new Promise((resolve) => {
      const found = [];
      new MutationObserver((list) => found.push(...list.map(({ target }) => target.nodeName)))
        .observe(document, { childList: true, attributes: true, characterData: true, subtree: true });
      const redraw = () => document.forms[0].dispatchEvent(new Event("input"));
      setInterval(redraw, 100);
      setTimeout(() => resolve(found), 1500);
    })""")
    assert written == []


def test_refusal_counts_down_on_the_button(engine: Engine, serve_in_hops: Start) -> None:
    server = serve_in_hops(tools={"ping": QUICK_PING}, RATE_LIMIT_DIAGNOSTICS="1/6second")
    engine.run(at(server, "?target=127.0.0.1"))
    engine.press("#run")
    until(lambda: re.fullmatch(r"Run Ping in [1-6] s", engine.text("#run")))
    assert engine.text("#fault") == "Rate limit exceeded: 1 per 6 second"
    assert engine.text("#results h2") == "10.0 ms, 1 of 3 probes lost"
    engine.wait("document.querySelector('#run:not([aria-disabled])')")
    assert engine.text("#fault") == ""


def test_all_places_are_compared_and_one_is_down(engine: Engine, quick: Server) -> None:
    verdict = engine.run(at(quick, f"?command=traceroute&target={TARGET4}&at=all"))
    assert verdict == f"{TARGET4} answers both places that measured; Sydney is down"


def test_result_is_copied(engine: Engine, quick: Server) -> None:
    engine.run(at(quick, "?command=traceroute&target=target.lg.example"))
    engine.press("#results .card > p:last-child .link:last-child")
    engine.wait("document.querySelector('#status').textContent === 'Copied'")
    engine.js("(document.forms[0].target.focus(), document.forms[0].target.select())")
    engine.keys("Control+v")
    pasted = engine.js("document.querySelector('[name=target]').value")
    assert pasted == at(quick, "?command=traceroute&target=target.lg.example")


def test_reload_keeps_the_form(engine: Engine, quick: Server) -> None:
    engine.run(at(quick, "?command=traceroute&target=127.0.0.1&at=Frankfurt"))
    engine.open(engine.js("location.href"))
    form = "[...new FormData(document.forms[0])].map(([, value]) => value).join(' ')"
    assert engine.js(form) == "traceroute 127.0.0.1 auto 1"


def test_keyboard_alone_runs_a_test(engine: Engine, quick: Server) -> None:
    engine.open(at(quick))
    for _ in range(20):
        if engine.js("document.activeElement.name") == "command":
            break
        engine.keys("Tab")
    engine.keys("ArrowRight", "Tab", *"target.lg.example", "Enter")
    engine.wait("document.querySelector('#results h2')")
    assert re.fullmatch(r"[\d.]+ ms, (none|\d) of 3 probes lost", engine.ended())
    assert engine.text("#results b") == "Traceroute · Amsterdam → target.lg.example"


def test_phone_shows_all_of_a_result_in_its_width(engine: Engine, serve_in_hops: Start) -> None:
    port = str(free_port())
    server = serve_in_hops(PORT=port, FRAME_ANCESTORS=f"http://127.0.0.1:{port}", tools=QUICK)
    engine.visit(at(server, "metrics"))
    # In a frame as wide as a phone: windows are wider in most engines.
    engine.js("""new Promise((resolve) => {
      const frame = document.body.appendChild(document.createElement("iframe"));
      const src = "/?command=mtr&target=target.lg.example";
      Object.assign(frame, { src, width: 390, height: 844, onload: () => resolve(1) });
    })""")
    engine.wait("frames[0].document.querySelector('#mine button')")
    engine.js("frames[0].document.querySelector('#run').click()")
    engine.wait("frames[0].document.querySelector('#run:not(.stop)')")
    root = "frames[0].document.documentElement"
    width, needed = engine.js(f"[{root}.clientWidth, {root}.scrollWidth]")
    assert needed <= width <= 390


@pytest.mark.parametrize("name", ENGINES)
def test_dark_scheme_is_dark(engines: Engines, hops: tuple[str, ...], stand_ins: Server, name: str) -> None:
    engine = engines(name, hops, dark=True)
    engine.open(at(stand_ins))
    assert engine.js("getComputedStyle(document.documentElement).backgroundColor") == "rgb(13, 17, 23)"


@pytest.mark.parametrize("name", ENGINES)
def test_enter_runs_a_test_without_javascript(
    engines: Engines, hops: tuple[str, ...], serve_in_hops: Start, name: str
) -> None:
    server, address = serve_in_hops(tools={"ping": QUICK_PING}), lone_address()
    engine = engines(name, hops, script=False)
    engine.visit(at(server))
    engine.keys("Tab", "Tab", *address, "Enter")  # past the link to the API
    until(lambda: f"target={address} " in server.log)


# Speed tests over a wire

WIRE = 25  # Mbit/s
# By the ms that load adds: Waveform's.
GRADES = {"A+": 5, "A": 30, "B": 60, "C": 200, "D": 400, "F": math.inf}
# A wire for each engine between two namespaces; tc-tbf(8): what may pass at once, and what may wait.
WIRES = f"""
for end in 1 2; do
  ip netns add $0-$end
  ip -n $0-$end link set lo up
done
for wire in 0 1 2; do
  ip link add w$wire netns $0-1 type veth peer name w$wire netns $0-2
  for end in 1 2; do
    ip -n $0-$end addr add 10.99.$wire.$end/24 dev w$wire
    ip -n $0-$end link set w$wire up
    tc -n $0-$end qdisc add dev w$wire root tbf rate {WIRE}mbit burst 16kb latency 120ms
  done
done
"""
SAMPLE = """(() => {
  window.samples = [];
  setInterval(() => {
    const figures = [...document.querySelectorAll("#results .figures b")];
    const heading = document.querySelector("#results h2")?.textContent ?? "";
    samples.push([performance.now(), heading, ...figures.map(({ textContent }) => Number(textContent))]);
  }, 250);
})()"""


def upload_rate(log: str, client: str) -> float:
    """The Mbit/s of all uploads of a client together, by the server's log."""
    found = re.findall(rf"size=upload client={client} .*bytes=(\d+) seconds=(\S+)", log)
    return sum(int(length) for length, _ in found) * 8e-6 / max(float(seconds) for _, seconds in found)


@pytest.fixture(scope="session")
def wires(engines: Engines, once: Once, alone: Alone, shared: Start) -> Any:
    """What each engine showed during and after a speed test over a wire, and the Mbit/s of its upload."""
    name = f"lgw{os.getpid()}"
    near, far = (("ip", "netns", "exec", f"{name}-{end}") for end in (1, 2))

    def measure() -> Mapping[str, Mapping[str, Any]]:
        made = subprocess.run(["/bin/sh", "-euc", WIRES, name], capture_output=True, text=True, check=False)
        if made.returncode:
            lacking(f"root, ip and tc, for wires of limited rates: {made.stderr}")
        server = shared(prefix=near, **AMSTERDAM)
        running = [engines(each, far) for each in ENGINES]
        for wire, engine in enumerate(running):
            engine.open(f"http://10.99.{wire}.1:{server.port}/?command=speedtest")
            engine.js(SAMPLE)
        with alone():
            for engine in running:
                engine.press("#run")
            headings = [engine.ended() for engine in running]
        server.stop()
        return {
            each: {
                "samples": engine.js("samples"),
                "heading": headings[wire],
                "card": engine.text("#results"),
                "uploaded": upload_rate(server.log, f"10.99.{wire}.2"),
            }
            for wire, (each, engine) in enumerate(zip(ENGINES, running, strict=True))
        }

    try:
        return once("wires", measure)
    finally:
        delete = "ip netns del $0-1; ip netns del $0-2"
        subprocess.run(["/bin/sh", "-c", delete, name], check=False, capture_output=True)


@pytest.fixture(params=ENGINES)
def shown(request: pytest.FixtureRequest, wires: Mapping[str, Any]) -> Any:
    """The speed test of one engine."""
    return wires[request.param]


@pytest.mark.parametrize(("phase", "column"), [("download", 2), ("upload", 3)])
def test_live_figure_is_that_of_the_wire_after_two_seconds(
    shown: Mapping[str, Any], phase: str, column: int
) -> None:
    samples = [each for each in shown["samples"] if each[1] == f"Measuring {phase}" and each[column]]
    settled = [each[column] for each in samples if each[0] > samples[0][0] + 2000]
    assert len(settled) > 15
    assert median(settled) == pytest.approx(WIRE, rel=0.07)
    # What comes behind a lost packet arrives at once, and so does what a busy machine did not read in time.
    assert sum(each != pytest.approx(WIRE, rel=0.15) for each in settled) <= len(settled) / 4


def test_speed_test_agrees_with_the_log_of_the_server(shown: Mapping[str, Any]) -> None:
    down, up = re.fullmatch(r"([\d.]+) Mbit/s down, ([\d.]+) Mbit/s up", shown["heading"]).groups()  # type: ignore[union-attr]
    # The log counts as downloaded what the system has taken, of which some is not sent when the page leaves.
    assert [float(down), float(up)] == pytest.approx([WIRE, shown["uploaded"]], rel=0.1)


def test_speed_test_states_latency_in_words_and_a_grade(shown: Mapping[str, Any]) -> None:
    latency = r"Latency: ([\d.]+) ms while downloading, ([\d.]+) ms while uploading, ([\d.]+) ms idle\."
    down, up, idle = map(float, re.search(latency, shown["card"]).groups())  # type: ignore[union-attr]
    grade = next(name for name, most in GRADES.items() if max(down, up) - idle < most)
    assert idle + 5 < min(down, up)
    assert f"Grade {grade}: " in shown["card"]


def test_speed_test_is_ended_by_the_clock(shown: Mapping[str, Any]) -> None:
    times = [
        [each[0] for each in shown["samples"] if each[1] == f"Measuring {phase}"]
        for phase in ("idle", "download")
    ]
    assert [max(each) - min(each) for each in times] == pytest.approx([2000, 8000], abs=700)


# The header and the form


def test_header_has_its_links(visit: Visit, amsterdam: Server) -> None:
    links = "(all) => all.map((each) => [each.innerText, each.getAttribute('href')])"
    assert visit(amsterdam).locator("header a, #place a").evaluate_all(links) == [
        ["API", "docs"],
        ["AMS 7", "https://facility.example/ams7"],
        ["Map", "https://map.example/ams"],
    ]


@pytest.mark.parametrize(("host", "secure"), [("127.0.0.1", True), (HERE4, False)])
def test_click_on_an_address_copies_it_also_without_https(
    visit: Visit, stand_ins: Server, host: str, secure: bool
) -> None:
    page = visit(stand_ins, host=host, permissions=CLIPBOARD)
    assert page.evaluate("isSecureContext") == secure
    copied = []
    for button in page.locator("#place .copy").all():
        button.click()
        button.filter(has_text="Copied").wait_for()
        page.fill("[name=target]", "")
        page.keyboard.press("Control+V")
        copied.append(page.input_value("[name=target]"))
    assert copied == [HERE4, HERE6]


def test_operator_sets_title_logo_and_links(visit: Visit, serve_in_hops: Start, tmp_path: Path) -> None:
    logo = tmp_path / "logo.svg"
    logo.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9" onload="document.title=1">'
        "<script>parent.document.title = 'owned'</script><circle r='9'/></svg>"
    )
    links = '[{"name": "Terms <b>", "url": "https://www.example.com/terms"}]'
    page = visit(serve_in_hops(PAGE_TITLE="Example & Sons", PAGE_LOGO=str(logo), PAGE_LINKS=links))
    assert page.inner_text("header").split("\n") == ["Example & Sons", "Looking glass", "Terms <b>", "API"]
    assert page.evaluate("document.querySelector('header img').naturalWidth > 0")
    assert page.title() == "Example & Sons · Amsterdam"


def test_colour_of_an_operator_is_that_of_marks_and_never_of_text(visit: Visit, serve_in_hops: Start) -> None:
    page = visit(serve_in_hops(PAGE_COLOR="#ffee00", tools={"ping": QUICK_PING}), "?target=127.0.0.1")
    run(page)
    ended(page)
    used = """[...document.querySelectorAll("body *:not(svg *)")].flatMap((each) => {
      const { color, backgroundColor } = getComputedStyle(each);
      return [color, backgroundColor];
    })"""
    mark = page.eval_on_selector("#results circle", "(circle) => getComputedStyle(circle).fill")
    assert mark == "rgb(255, 238, 0)"
    assert mark not in page.evaluate(used)


def test_page_without_settings_shows_nothing_that_looks_broken(
    visit: Visit, serve: Start, hops: tuple[str, ...]
) -> None:
    page = visit(serve(prefix=hops, COMMANDS="ping,traceroute"))
    assert page.inner_text("#place").split("\n") == ["Unknown Location", "Unknown Facility"]
    assert page.locator("#place a, #place button").count() == 0
    assert page.is_hidden("[name=version]")
    assert page.locator("#about h2").all_inner_texts() == ["Ping", "Traceroute", "Speed test"]


def test_browsers_ask_for_no_icon(visit: Visit, quick: Server) -> None:
    page = visit(quick)
    assert page.eval_on_selector("link[rel=icon]", "({ href }) => href.slice(0, 19)") == "data:image/svg+xml,"


@pytest.mark.parametrize(("host", "version"), [("127.0.0.1", 4), ("[::1]", 6)])
def test_form_offers_the_visitors_ip_version_and_address(
    visit: Visit, stand_ins: Server, host: str, version: int
) -> None:
    page, address = visit(stand_ins, host=host), host.strip("[]")
    assert page.inner_text("[name=version] option") == f"Auto (IPv{version})"
    page.click(f"text=My address, {address}")
    assert page.input_value("[name=target]") == address


def test_link_fills_the_form_and_waits_for_a_click(visit: Visit, amsterdam: Server) -> None:
    page = visit(amsterdam, "?command=mtr6&target=target.lg.example&at=Frankfurt")
    until(lambda: page.inner_text("h1") == "Frankfurt am Main")
    form = [page.input_value(f"[name={name}]") for name in ("target", "version")]
    assert [page.input_value("[name=command]:checked"), *form] == ["mtr", "target.lg.example", "6"]
    assert page.inner_text("#run") == "Run MTR"
    assert page.locator("#results .card").count() == 0


def test_address_bar_holds_what_is_chosen(visit: Visit, amsterdam: Server) -> None:
    page = visit(amsterdam)
    page.fill("[name=target]", "target.lg.example")
    choose(page, "Traceroute")
    page.select_option("[name=version]", "6")
    choose(page, "Frankfurt")
    query = "?command=traceroute&target=target.lg.example&version=6&at=Frankfurt"
    assert page.url == f"http://127.0.0.1:{amsterdam.port}/{query}"


PASTED = {
    " https://user@www.example.com:8443/path?q=1#x ": "www.example.com",
    "http://[2001:db8::1]:80/": "[2001:db8::1]",
    "https://example.com/24": "example.com",
    "http//example.com": "example.com",
    "example.com/path": "example.com",
    "example.com:443": "example.com",
    "example.com,": "example.com",
    "“example.com”": "example.com",
    "‹2001:db8::1›": "2001:db8::1",
    "192.0.2.1:443": "192.0.2.1",
    **{unchanged: unchanged for unchanged in ("2001:db8::1", "192.0.2.0/24", "127.1", "bücher.example.")},
}


def test_host_of_a_pasted_url_is_the_target(visit: Visit, stand_ins: Server) -> None:
    page = visit(stand_ins)
    assert {pasted: page.evaluate("(pasted) => hostOf(pasted)", pasted) for pasted in PASTED} == PASTED


def test_address_decides_the_ip_version(visit: Visit, amsterdam: Server) -> None:
    page = visit(amsterdam, "?command=traceroute&version=6")
    with page.expect_request("**/lookingglass/*") as request:
        run(page, target="127.0.0.1")
    assert request.value.url.endswith("/lookingglass/traceroute")


def test_auto_falls_back_to_the_version_that_a_name_has(visit: Visit, amsterdam: Server) -> None:
    page = visit(amsterdam)
    run(page, "Traceroute", "v6.lg.example")
    ended(page)
    assert TARGET6 in text(page, "#results summary")


def test_auto_tries_both_versions_of_an_unknown_name_and_says_so(visit: Visit, quick: Server) -> None:
    page = visit(quick, "?target=nobody.lg.example")
    run(page)
    page.wait_for_selector("[name=target][aria-invalid=true]")
    said = "nobody.lg.example has no IPv4 and no IPv6 address that may be measured here: check the name."
    assert page.inner_text("#fault") == said


def test_closing_the_page_ends_the_process(visit: Visit, amsterdam: Server) -> None:
    page, address = visit(amsterdam), lone_address()
    run(page, target=address)
    group = group_of(address)
    page.wait_for_selector("#results circle")
    page.close()
    until(lambda: not members(group), SOON)


def test_enter_does_not_stop_a_running_test(visit: Visit, stand_ins: Server) -> None:
    page = visit(stand_ins)
    page.fill("[name=target]", "127.0.0.1")
    page.keyboard.press("Enter")
    page.wait_for_selector(".plot")
    page.keyboard.press("Enter")
    assert page.inner_text("#run") == "Stop"
    page.keyboard.press("Escape")
    ended(page)


def test_double_click_counts_once(visit: Visit, stand_ins: Server) -> None:
    page = visit(stand_ins, "?target=127.0.0.1")
    page.dblclick("#run")
    page.wait_for_selector(".plot")
    assert page.inner_text("#run") == "Stop"
    page.dblclick("#run")
    ended(page)
    assert (page.inner_text("#run"), page.locator("#results .card").count()) == ("Run Ping", 1)
    assert page.locator("#results pre").is_hidden()


# Runs: `reduce` with recorded streams


def stream(*events: Mapping[str, object], status: str = "finished") -> list[Mapping[str, object]]:
    start = {"event": "start", "command": "mtr", "target": "t.example", "address": "198.51.100.254"}
    end = {"event": "end", "status": status, "exit_status": 0, "duration": 9.8, "result": None}
    return [start | {"family": 4, "time": "2026-11-22T19:58:41Z"}, *events, end]


def probe(seq: int, rtt: float | None) -> dict[str, object]:
    return {"event": "lost" if rtt is None else "reply", "seq": seq, "ttl": 60, "rtt": rtt}


def hop(number: int, address: str | None, **more: object) -> dict[str, object]:
    return {"event": "hop", "hop": number, "address": address, "hostname": None, "timings": [], **more}


def mtr_hop(number: int, address: str, total: int, rcv: int, avg: float = 10.0) -> dict[str, object]:
    sums = {"min": avg, "avg": avg, "max": avg, "total": total, "rcv": rcv, "drop": total - rcv, "loss": 0}
    return hop(number, address, stats=sums)


def mtr_hops(*losses: int) -> list[dict[str, object]]:
    """The hops up to the target, each with its loss of 10 probes."""
    last = len(losses)
    return [
        mtr_hop(n, f"198.51.100.{n if n < last else 254}", 10, 10 - each) for n, each in enumerate(losses, 1)
    ]


REDUCE = """([events, kind]) => {
  const tool = { kind, title: "T", probes: 10 };
  const run = events.reduce(reduce, newRun({ name: "A", url: "" }, tool, "t.example", kind));
  return { ...run, ...verdict(run) };
}"""


def reduced(page: Page, kind: str, *events: Mapping[str, object], **more: str) -> dict[str, Any]:
    run: dict[str, Any] = page.evaluate(REDUCE, [stream(*events, **more), kind])
    return run | {"said": f"{run['head']}. {run['sub']}".replace("\xa0", " ").rstrip()}


@pytest.fixture(scope="session")
def script(browser_in_hops: Browser, stand_ins: Server) -> Iterator[Page]:
    """A page whose functions are called."""
    page = open_page(browser_in_hops, f"http://127.0.0.1:{stand_ins.port}/", [])
    yield page
    page.context.close()


NO_ANSWER = "The target, or a firewall on the way, may not answer. Took 10 s."
VERDICTS = {
    "a late reply overrides a loss": (
        "ping",
        [probe(1, None), probe(1, 20.5), probe(2, None), probe(3, 22.5)],
        "20.5 ms, 1 of 3 probes lost. From one reply to the next it changes by 2.00 ms (jitter). Took 10 s.",
    ),
    "the latency is the median": (
        "ping",
        [probe(1, 100), probe(2, 900), probe(3, 150)],
        "150 ms, none of 3 probes lost. From one reply to the next it changes by 750 ms (jitter). Took 10 s.",
    ),
    "a path event voids later hops": (
        "mtr",
        [*mtr_hops(0, 0, 0), mtr_hop(4, "198.51.100.254", 1, 1), {"event": "path", "hops": 3}],
        "10.0 ms, none of 10 probes lost. Reached in 3 hops. Took 10 s.",
    ),
    "loss that carries on is named with the hop where it begins": (
        "mtr",
        mtr_hops(0, 0, 1, 1),
        "10.0 ms, 1 of 10 probes lost. Reached in 4 hops. Loss begins at hop 3. Took 10 s.",
    ),
    "loss that ends is attributed to rate limiting, as a guess": (
        "mtr",
        mtr_hops(0, 8, 0),
        "10.0 ms, none of 10 probes lost. Reached in 3 hops. "
        "What hop 2 loses does not carry on: such routers probably limit their answers. Took 10 s.",
    ),
    "a ping without an answer": ("ping", [probe(1, None)], f"No answer from t.example. {NO_ANSWER}"),
    "a traceroute that does not reach its target": (
        "traceroute",
        [hop(2, "198.51.100.2", hostname="gw.example", timings=[{"rtt": 1.5}])],
        f"No answer from t.example. The last router that answers is gw.example, hop 2. {NO_ANSWER}",
    ),
    "an mtr that does not reach its target": (
        "mtr",
        [mtr_hop(2, "198.51.100.2", 1, 1)],
        f"No answer from t.example. The last router that answers is 198.51.100.2, hop 2. {NO_ANSWER}",
    ),
    "a router that refuses is named by its mark": (
        "traceroute",
        [hop(1, "198.51.100.6", probes=[{"rtt": 1, "code": "!X"}])],
        "198.51.100.6 refuses packets to t.example. Its answer: !X. Took 10 s.",
    ),
}


@pytest.mark.parametrize(("kind", "events", "said"), VERDICTS.values(), ids=VERDICTS)
def test_verdict_on_a_run(script: Page, kind: str, events: list[Mapping[str, object]], said: str) -> None:
    assert reduced(script, kind, *events)["said"] == said


def test_probes_of_mtr_are_derived_from_its_sums(script: Page) -> None:
    sums = [(1, 1, 10.0), (2, 1, 10.0), (3, 2, 15.0)]
    run = reduced(script, "mtr", *(mtr_hop(1, "198.51.100.254", *each) for each in sums))
    assert run["hops"][0]["rtts"] == [10, None, 20]


def test_hop_shows_its_network_further_routers_and_marks(script: Page) -> None:
    addresses = ["198.51.100.6", "198.51.100.7", "198.51.100.8"]
    names = ["core.example", "edge.example", None]
    probes = [{"rtt": 5.7}, {"rtt": None}, {"rtt": 6.1, "address": addresses[1], "code": "!X"}]
    known = {"hostname": names[0], "asn": [64500], "network": "Example", "probes": probes}
    event = hop(1, addresses[0], addresses=addresses, hostnames=names, **known)
    (found,) = reduced(script, "traceroute", event)["hops"]
    assert found["name"] == "core.example"
    further = "AS64500 Example · 198.51.100.6 · edge.example (198.51.100.7) · 198.51.100.8 · !X"
    assert found["more"] == further.split(" · ")
    assert found["rtts"] == [5.7, None, 6.1]


def speed_events(*times: int, **latencies: float) -> list[dict[str, Any]]:
    """Phases at 25 Mbit/s, each with its latency, and with samples after so many ms."""
    events: list[dict[str, Any]] = []
    for phase, rtt in latencies.items():
        events.append({"event": "phase", "phase": phase})
        known = {"event": "sample", "phase": phase, "rtt": rtt}
        events += [{**known, "at": at_ms, "bytes": at_ms * 3125} for at_ms in times]
    return events


@pytest.mark.parametrize(
    ("added", "grade"), [(4, "A+"), (29, "A"), (59, "B"), (199, "C"), (399, "D"), (400, "F")]
)
def test_bufferbloat_is_graded_by_the_latency_that_load_adds(script: Page, added: int, grade: str) -> None:
    events = speed_events(0, 4000, 8000, idle=10, download=12, upload=10 + added)
    assert reduced(script, "speed", *events)["sub"].startswith(f"Grade {grade}: ")


def test_only_a_completed_phase_has_a_figure_and_only_a_completed_test_a_grade(script: Page) -> None:
    events = speed_events(0, 4000, 8000, idle=10, download=12, upload=30)
    assert reduced(script, "speed", *events, status="stopped")["said"] == "25.0 Mbit/s down. Stopped."


def test_rate_of_a_transfer_that_ends_with_the_ramp_is_of_all_of_it(script: Page) -> None:
    events = speed_events(0, 1000, 2050, idle=1, download=1)
    assert reduced(script, "speed", *events)["said"] == "25.0 Mbit/s down."


def test_live_rate_is_that_of_the_last_second(script: Page) -> None:
    samples = [{"at": at, "bytes": at * 3125} for at in range(0, 5000, 450)]  # 25 Mbit/s, every 0.45 s
    assert script.evaluate("rates", samples)[3:] == pytest.approx([25] * 9, rel=0.01)


def test_live_rate_of_a_stalled_transfer_is_zero_a_second_later(script: Page) -> None:
    moving = [{"at": at, "bytes": at * 3125} for at in range(0, 2100, 100)]
    stalled = [{"at": at, "bytes": 6250000} for at in (2600, 3000)]
    assert script.evaluate("rates", [*moving, *stalled])[-1] == 0


# Views


@pytest.fixture
def finished(visit: Visit) -> Visit:
    """Opens a page and runs what its link describes, to the end; with events, these are the answer."""

    def open_at(server: Server, query: str, *events: Mapping[str, object], **options: Any) -> Page:
        page = visit(server, query, **options)
        if events:
            answer_with(page, *events)
        page.click("#run")
        ended(page)
        return page

    return open_at


def test_ping_plots_each_reply_and_states_the_figures(live: Mapping[str, Page]) -> None:
    page = live["ping"]
    raw = page.text_content("#results pre") or ""
    answers = re.findall(r"icmp_seq=\d+ ttl=\d+ time=[\d.]+ ms", raw)
    lost = 15 - len(answers)
    assert text(page, ".figures").split("\n")[:2] == ["Loss", f"{round(lost / 0.15, 1):g} % {lost} of 15"]
    shapes = [page.locator(f".plot {shape}").count() for shape in ("circle", "line.lost")]
    assert shapes == [len(answers), lost]
    label = page.get_attribute(".plot svg", "aria-label") or ""
    assert len(label.removeprefix("Probes in ms: ").split()) == 15
    assert shifts(page) == []


def test_filtered_ping_names_the_router_and_repeats_nothing(live: Mapping[str, Page]) -> None:
    page = live["closed"]
    assert text(page, "#results h2") == "198.51.100.6 refuses packets to closed.lg.example"
    assert page.locator("#results .plot").count() == 0
    assert page.locator("#results p.dim").all_inner_texts()[1:] == ["15 × From 198.51.100.6 Packet filtered"]


def test_traceroute_shows_names_addresses_and_times(live: Mapping[str, Page]) -> None:
    page = live["traceroute"]
    shown = [row.split() for row in rows(page)]
    assert shown[0][:3] == ["1", "gw.pop.lg.example", "198.51.100.2"]
    assert shown[2] == ["3", "no", "reply"]
    assert [len(row) for row in shown] == [8, 8, 3, 8, 8]
    assert "Reached in 5 hops." in text(page, "#results")
    assert shifts(page) == []


def test_mtr_shows_every_hop_on_one_axis(live: Mapping[str, Page]) -> None:
    page = live["mtr"]
    assert [row.split()[0] for row in rows(page)] == ["1", "2", "3", "4", "5"]
    assert re.fullmatch(r"0\s*[\d.]+ ms", text(page, "th.range"))
    assert page.locator("tbody tr:nth-child(5) .strip rect").count() == 10


def test_mtr_redraws_its_rows_in_place(visit: Visit, stand_ins: Server) -> None:
    page = visit(stand_ins, "?command=mtr&target=198.51.100.254")
    page.click("#run")
    page.wait_for_selector("tbody tr:nth-child(4)")
    page.evaluate("document.querySelectorAll('tbody tr').forEach((row, i) => (row.mark = i))")
    ended(page)
    assert page.evaluate("[...document.querySelectorAll('tbody tr')].map(({ mark }) => mark)") == [0, 1, 2, 3]
    assert rows(page) == [
        "1 198.51.100.1 0 % 10.0 10.0 10.0",
        "2 no reply",
        "3 198.51.100.3 40 % 34.0 30.0 46.0",
        "4 198.51.100.254 0 % 40.0 40.0 40.0",
    ]
    labels = page.locator("tbody .strip svg").evaluate_all("(all) => all.map((each) => each.ariaLabel)")
    assert labels[1] == "30.0 34.0 lost lost 46.0"
    assert page.locator(".loss .bad").count() == 0
    assert shifts(page) == []


def test_name_unfolded_by_keyboard_stays_so_while_mtr_runs(visit: Visit, stand_ins: Server) -> None:
    page = visit(stand_ins, "?command=mtr&target=198.51.100.254")
    page.click("#run")
    page.wait_for_selector("tbody tr")
    page.focus("tbody .name")
    assert page.evaluate("getComputedStyle(document.activeElement).whiteSpace") == "normal"
    ended(page)
    assert page.evaluate("document.activeElement.className") == "name"


def test_silent_hops_in_a_row_are_one_row(finished: Visit, stand_ins: Server) -> None:
    last = hop(5, "198.51.100.254", timings=[{"rtt": 9.5}])
    hops = [*(hop(number, None) for number in (2, 3, 4)), last]
    page = finished(stand_ins, "?command=traceroute&target=127.0.0.1", *hops)
    assert rows(page) == ["1–4 no reply", "5 198.51.100.254 0 % 9.50 9.50 9.50"]


def test_lossy_hop_is_red_only_where_the_loss_carries_on(finished: Visit, stand_ins: Server) -> None:
    page = finished(stand_ins, "?command=mtr&target=127.0.0.1", *mtr_hops(0, 8, 0, 1, 1))
    assert page.locator(".loss .bad").all_inner_texts() == ["10 %", "10 %"]


def test_extra_command_has_its_tab_in_capitals_and_shows_its_output(finished: Visit, quick: Server) -> None:
    page = finished(quick, "?command=bgp&target=127.0.0.1")
    assert page.locator("#tabs label").all_inner_texts() == ["Ping", "Traceroute", "MTR", "BGP", "Speed test"]
    assert page.inner_text("#results h2") == "Done"
    assert page.inner_text("pre") == "127.0.0.1\nunicast\n"


def test_place_that_lacks_a_command_says_so(finished: Visit, quick: Server) -> None:
    page = finished(quick, "?command=bgp&target=127.0.0.1&at=all")
    assert ended(page) == "Output from the one place that measured; Sydney is down"
    assert "Frankfurt does not offer BGP." in text(page, "#results")


def test_text_that_grows_keeps_its_selection(visit: Visit, serve_in_hops: Start, gate: Gate) -> None:
    script = f"#!/bin/sh\necho first\n{gate.wait}echo second\n"
    extra = json.dumps({"lines": "lines {address}"})
    server = serve_in_hops(EXTRA_COMMANDS=extra, tools={"lines": script})
    page = visit(server, "?command=lines&target=127.0.0.1")
    page.click("#run")
    page.wait_for_selector("pre:has-text('first')")
    pre = page.query_selector("pre")
    page.evaluate("({ firstChild }) => getSelection().setBaseAndExtent(firstChild, 0, firstChild, 5)", pre)
    gate.open()
    ended(page)
    assert page.inner_text("pre") == "first\nsecond\n"
    assert page.evaluate("getSelection().toString()") == "first"


def test_verdict_is_announced_and_in_the_title(live: Mapping[str, Page]) -> None:
    page = live["traceroute"]
    verdict = text(page, "#results h2")
    announced = page.evaluate("announced")
    assert announced[0] == "Traceroute is running"
    assert announced[1].replace("\xa0", " ").startswith(f"{verdict}. Reached in 5 hops.")
    assert page.title().replace("\xa0", " ") == f"{verdict} · Traceroute · Amsterdam → target.lg.example"


def test_result_is_copied_as_text_json_curl_and_link(live: Mapping[str, Page], amsterdam: Server) -> None:
    page, base = live["traceroute"], f"http://127.0.0.1:{amsterdam.port}/"
    copied = {}
    for name in ("text", "JSON", "curl", "link"):
        page.click(f"#results .card > p .link >> text=/^{name}$/")
        page.wait_for_selector("#results .link:has-text('Copied')")
        copied[name] = page.evaluate("navigator.clipboard.readText()")
        page.wait_for_selector("#results .link:has-text('Copied')", state="detached")
    head, where, said, _, raw, *_ = copied["text"].splitlines()
    assert head == "Traceroute · Amsterdam → target.lg.example"
    assert re.fullmatch(rf"{base} · 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ · 198.51.100.254", where)
    assert said.replace("\xa0", " ") == text(page, "#results h2")
    assert raw == "target.lg.example has address 198.51.100.254"
    assert len(json.loads(copied["JSON"])["hops"]) == 5
    assert copied["curl"] == f"curl -N -d 'target=target.lg.example' {base}lookingglass/traceroute"
    assert copied["link"] == f"{base}?command=traceroute&target=target.lg.example"


def test_last_five_earlier_tests_stay_below_as_they_are(visit: Visit, stand_ins: Server) -> None:
    page = visit(stand_ins, "?command=traceroute")
    answer_with(page)
    for n in range(7):
        run(page, target=f"192.0.2.{n}")
        page.wait_for_selector(f"#results b:has-text('192.0.2.{n}')")
        ended(page)
    titles = page.locator("#results h2 ~ details b").all_inner_texts()
    assert titles == [f"Traceroute · Amsterdam → 192.0.2.{n}" for n in range(5, 0, -1)]
    assert page.locator("#results h2 ~ details[open]").count() == 5


# Speed tests


@pytest.mark.parametrize("place", [0, 1])
def test_speed_test_says_its_duration_traffic_files_and_curl_line_beforehand(
    visit: Visit, amsterdam: Server, place: int
) -> None:
    chosen = json.loads(amsterdam.environment["LOCATIONS"])[place]
    page = visit(amsterdam, f"?command=speedtest&at={chosen['name']}")
    offer = text(page, "#offer")
    assert "18 s, up to 2 GB at 1 Gbit/s" in offer
    assert f"curl -o /dev/null {chosen['url']}speedtest/1G" in offer
    files = page.locator("#offer a").evaluate_all("(links) => links.map(({ href }) => href)")
    assert files == [f"{chosen['url']}speedtest/{size}" for size in ("100M", "1G", "10G")]


def test_speed_test_of_all_places_asks_for_one(visit: Visit, amsterdam: Server) -> None:
    page = visit(amsterdam, "?command=speedtest&at=all")
    assert page.inner_text("#fault") == "Choose one place: a speed test fills one line."
    page.click("#run", force=True)
    assert page.locator("#results .card").count() == 0


@pytest.mark.parametrize("how", ["Escape", "#run"])
def test_stopped_speed_test_ends_its_transfer_and_has_no_grade(
    visit: Visit, amsterdam: Server, how: str
) -> None:
    page, before = visit(amsterdam, "?command=speedtest"), amsterdam.log.count("speedtest")
    page.click("#run")
    until(lambda: page.text_content("#results h2 >> nth=0") == "Measuring download")
    page.keyboard.press("Escape") if how == "Escape" else page.click(how)
    assert ended(page) == "Nothing was measured"
    assert page.locator(".grade").count() == 0
    until(lambda: amsterdam.log.count("speedtest") > before, SOON)


def test_speed_test_beyond_the_limit_counts_down(visit: Visit, serve_in_hops: Start) -> None:
    limits = dict.fromkeys(("RATE_LIMIT_SPEEDTEST", "RATE_LIMIT_SPEEDTEST_10G"), "1/hour")
    page = visit(serve_in_hops(**limits), "?command=speedtest")
    for size in SIZES:
        page.evaluate("async (size) => (await fetch(`speedtest/${size}`)).body.cancel()", size)
    page.click("#run")
    until(lambda: page.inner_text("#run") == "Start speed test in 60 min")
    assert page.inner_text("#fault") == "Rate limit exceeded: 1 per 1 hour"
    assert page.locator("#results .card").count() == 0


def test_speed_test_whose_upload_is_refused_shows_its_download_and_when(
    visit: Visit, serve_in_hops: Start
) -> None:
    page = visit(serve_in_hops(), "?command=speedtest")
    said = "The budget of speed tests for today is used up"
    refused: Any = {"status": 503, "headers": {"Retry-After": "7200"}, "body": json.dumps({"error": said})}
    page.route("**/speedtest/upload**", lambda route: route.fulfill(**refused))
    page.click("#run")
    page.wait_for_selector("#results h2.bad")
    assert ended(page) == said
    assert re.search(r"Before: [\d.]+ Mbit/s down\. Again from \d\d:\d\d:\d\d UTC\.", text(page, "#results"))
    assert page.inner_text("#run") == "Start speed test in 2 h"


def test_speed_test_whose_connection_is_lost_says_so(visit: Visit, serve_in_hops: Start) -> None:
    server = serve_in_hops()
    page = visit(server, "?command=speedtest")
    page.click("#run")
    page.wait_for_selector("path.download", state="attached")
    server.process.kill()
    assert ended(page) == "The connection to Amsterdam was lost."


def test_speed_tests_that_are_off_are_not_on_the_page(serve: Start) -> None:
    answer = serve(MAX_SPEEDTESTS="0").http.get("/", headers={"Accept": "text/html"}).text
    shown = "".join(re.split("<style>.*</style>|<script>.*</script>", answer, flags=re.S))
    assert "speed" not in shown.lower()


# All places


@pytest.mark.parametrize(("name", "url"), [("Amsterdam", "https://lg.example"), ("A", "http://127.0.0.1:{}")])
def test_place_itself_stands_once_among_the_places(
    visit: Visit, serve_in_hops: Start, name: str, url: str
) -> None:
    port = str(free_port())
    here, there = {"name": name, "url": url.format(port)}, {"name": "Frankfurt", "url": "http://127.0.0.1:1"}
    page = visit(serve_in_hops(PORT=port, LOCATIONS=json.dumps([here, there])))
    assert page.evaluate("PLACES.map(({ name }) => name)") == ["Amsterdam", "Frankfurt"]


def requests_of(page: Page) -> list[str]:
    """A list to which the URL of each further request of a page is added."""
    asked: list[str] = []
    page.on("request", lambda request: asked.extend(re.findall("^http.*", request.url)))
    return asked


def test_other_place_is_asked_itself(visit: Visit, amsterdam: Server) -> None:
    page = visit(amsterdam, "?command=traceroute&target=target.lg.example")
    asked = requests_of(page)
    choose(page, "Frankfurt")
    until(lambda: page.inner_text("h1") == "Frankfurt am Main")
    assert page.locator("text=Map").count() == 0
    page.click("#run")
    ended(page)
    runs = [url for url in asked if "/lookingglass/" in url]
    assert runs == [f"{page.evaluate('PLACES[1].url')}lookingglass/traceroute"]
    assert text(page, "#results b") == "Traceroute · Frankfurt → target.lg.example"


def test_place_that_is_down_is_marked_and_so_is_its_choice(visit: Visit, amsterdam: Server) -> None:
    page = visit(amsterdam, "?command=ping&target=127.0.0.1")
    page.wait_for_selector("#from s")
    labels = [label.split() for label in page.locator("#from label").all_inner_texts()]
    assert labels == [["Amsterdam"], ["Frankfurt"], ["Sydney", "is", "down"], ["all"]]
    said = "No answer from Sydney: it is down or cannot be reached."
    choose(page, "Sydney")
    until(lambda: page.inner_text("#fault") == said)
    page.click("#run")
    page.wait_for_selector("#run:not(.stop)")
    assert page.inner_text("#fault") == said
    choose(page, "Frankfurt")
    until(lambda: page.inner_text("#fault") == "")


def test_all_places_are_compared_on_one_scale(finished: Visit, quick: Server) -> None:
    page = finished(quick, f"?command=mtr&target={TARGET4}&at=all")
    table = "#results .card > table"
    first_words = [row.split()[0:2] for row in rows(page, table)]
    assert first_words == [["5", "Amsterdam"], ["5", "Frankfurt"], ["Sydney", "No"]]
    assert page.locator(f"{table} tr:nth-child(3) .loss .bad").count() == 0
    axes = page.locator("#results th.range").all_text_contents()
    assert (len(axes), len(set(axes))) == (3, 1)


def test_limited_place_says_when_in_its_row(finished: Visit, serve_in_hops: Start) -> None:
    tools = {"ping": QUICK_PING}
    strict = serve_in_hops(tools=tools, RATE_LIMIT_DIAGNOSTICS="1/hour")
    locations = json.dumps([{"name": "Strict", "url": f"http://127.0.0.1:{strict.port}"}])
    page = finished(serve_in_hops(tools=tools, LOCATIONS=locations), "?target=127.0.0.1&at=all")
    page.click("#run")
    ended(page)
    row = rows(page, "#results .card > table")[1]
    assert re.search(r"Rate limit exceeded: 1 per 1 hour Again from \d\d:\d\d:\d\d UTC\.", row)


def test_server_without_locations_offers_no_places(visit: Visit, stand_ins: Server) -> None:
    assert visit(stand_ins).locator("#from *").count() == 0


def test_place_that_is_back_is_up_with_the_next_run(visit: Visit, serve_in_hops: Start) -> None:
    page = visit(serve_in_hops(tools={"ping": QUICK_PING}), "?target=127.0.0.1")
    page.route("**/network/info", lambda route: route.abort())
    page.click("#run")
    until(lambda: page.inner_text("#fault").startswith("No answer from Amsterdam"))
    ended(page)
    page.unroute_all()
    page.click("#run")
    until(lambda: page.inner_text("#fault") == "")
    ended(page)


# Errors


NOT_A_TARGET = "Not a target: use an address like 192.0.2.1 or 2001:db8::1, or a name like example.com"


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("127.1", NOT_A_TARGET),
        ("127.1&at=all", NOT_A_TARGET),
        ("10.0.0.1", "10.0.0.1 may not be measured here: use a different, public address"),
    ],
)
def test_rejected_target_has_the_reason_at_the_field(
    visit: Visit, amsterdam: Server, query: str, said: str
) -> None:
    page = visit(amsterdam, f"?command=ping&target={query}")
    page.click("#run")
    page.wait_for_selector("[name=target][aria-invalid=true]")
    assert page.inner_text("#fault") == said
    assert page.get_attribute("[name=target]", "aria-describedby") == "fault"
    assert page.evaluate("document.activeElement.name") == "target"
    assert page.locator("#results .card").count() == 0
    page.keyboard.type("8")
    until(lambda: page.inner_text("#fault") == "")


def test_empty_target_is_asked_for_by_the_browser(visit: Visit, stand_ins: Server) -> None:
    page = visit(stand_ins)
    page.click("#run")
    assert page.evaluate("document.activeElement.matches('[name=target]:invalid')")
    assert page.inner_text("#run") == "Run Ping"


def test_limit_is_of_one_command_and_keeps_the_focus(finished: Visit, serve_in_hops: Start) -> None:
    tools = dict.fromkeys(("ping", "mtr"), QUICK_PING)
    page = finished(serve_in_hops(tools=tools, RATE_LIMIT_DIAGNOSTICS="1/hour"), "?target=127.0.0.1")
    page.click("#run")
    page.wait_for_selector("#run[aria-disabled=true]")
    assert page.evaluate("document.activeElement.id") == "run"
    choose(page, "MTR")
    page.wait_for_selector("#run:not([aria-disabled])")
    choose(page, "Ping")
    page.wait_for_selector("#run[aria-disabled=true]")


def test_full_server_counts_down(visit: Visit, serve_in_hops: Start) -> None:
    server = serve_in_hops(tools={"ping": SLOW_PING}, MAX_DIAGNOSTICS="1")
    first, second = (visit(server, "?target=127.0.0.1") for _ in range(2))
    first.click("#run")
    first.wait_for_selector(".plot")
    second.click("#run")
    second.wait_for_selector("#run:has-text('Run Ping in ')")
    assert second.inner_text("#fault").startswith("All 1 slots")
    first.keyboard.press("Escape")
    ended(first)


def test_lost_connection_keeps_what_has_come(visit: Visit, serve_in_hops: Start) -> None:
    server = serve_in_hops(tools={"ping": SLOW_PING})
    page = visit(server, f"?target={lone_address()}")
    page.click("#run")
    page.wait_for_selector(".plot")
    server.process.kill()
    server.process.wait()
    for tool in running(f"{server.folder}/bin/"):  # those that it tried at the start as well
        os.kill(tool, signal.SIGKILL)
    assert ended(page) == "The connection to Amsterdam was lost."
    assert "Before: 10.0 ms, 1 of 3 probes lost." in text(page, "#results")
    page.click("#run")
    until(lambda: page.inner_text("#fault").startswith("No answer from Amsterdam"))
    assert page.locator("#results .plot").count() == 1


def test_silent_connection_is_given_up(visit: Visit, serve_in_hops: Start) -> None:
    server = serve_in_hops(tools={"ping": SLOW_PING})
    page, late = (visit(server, "?target=127.0.0.1") for _ in range(2))
    page.clock.install()
    late.clock.install()
    page.click("#run")
    page.clock.run_for(200)
    page.wait_for_selector(".plot")
    server.process.send_signal(signal.SIGSTOP)
    try:
        late.click("#run")
        for waiting in (page, late):
            waiting.clock.fast_forward(40_000)
            assert waiting.inner_text("#run") == "Stop"
            waiting.clock.fast_forward(40_000)
            waiting.clock.run_for(200)
        assert ended(page) == "The connection to Amsterdam was lost."
        until(lambda: late.inner_text("#fault").startswith("No answer from Amsterdam"))
    finally:
        server.process.send_signal(signal.SIGCONT)
    until(server.idle)


def test_exception_in_the_script_is_no_lost_connection(visit: Visit, stand_ins: Server) -> None:
    page = visit(stand_ins, "?target=127.0.0.1")
    page.evaluate("void (REDUCERS.start = () => undefined.address)")
    page.click("#run")
    until(lambda: page.inner_text("#fault").startswith("The page failed: "))


def test_missing_tool_is_named_before_the_click(visit: Visit, stand_ins: Server) -> None:
    page = visit(stand_ins, "?command=ping")
    page.route("**/health", answering(json.dumps({"status": "degraded", "missing": ["mtr"]})))
    page.evaluate("PLACES.forEach(check)")
    choose(page, "MTR")
    until(lambda: page.inner_text("#fault") == "MTR cannot run at Amsterdam now.")
    assert page.get_attribute("#run", "aria-disabled") == "true"
    choose(page, "Ping")
    page.wait_for_selector("#run:not([aria-disabled])")


def test_place_without_an_ip_version_warns_before_the_click(visit: Visit, amsterdam: Server) -> None:
    page = visit(amsterdam, "?command=ping&version=6&target=target.lg.example&at=Frankfurt")
    said = "Frankfurt has no IPv6 address of its own: this test may fail there."
    until(lambda: page.inner_text("#fault") == said)
    assert page.get_attribute("#run", "aria-disabled") is None


# For everyone


@pytest.fixture(scope="session")
def axe(npm_packages: Path) -> str:
    return (npm_packages / AXE / "axe.min.js").read_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(visit: Visit, quick: Server, stand_ins: Server, axe: str, scheme: str) -> None:
    found: list[str] = []

    def audit(page: Page, state: str) -> None:
        page.evaluate(axe)
        violations = page.evaluate("axe.run()")["violations"]
        found.extend(f"{state}: {each['id']}: {each['nodes'][0]['html']}" for each in violations)

    page = visit(quick, color_scheme=scheme)
    page.wait_for_selector("#from s")
    audit(page, "at first")
    run(page, "Traceroute", "127.1")
    page.wait_for_selector("[aria-invalid=true]")
    audit(page, "an invalid target")
    choose(page, "all")
    run(page, "Traceroute", "target.lg.example")
    ended(page)
    page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    audit(page, "all places")
    choose(page, "Speed test")
    choose(page, "Amsterdam")
    page.click("#run")
    page.wait_for_selector("path.download", state="attached")
    audit(page, "speed test")
    page.keyboard.press("Escape")
    ended(page)
    page = visit(stand_ins, "?target=198.51.100.254", color_scheme=scheme)
    for tab in ("Ping", "MTR"):
        run(page, tab)
        page.wait_for_selector("#results .plot" if tab == "Ping" else "#results tr")
        audit(page, f"{tab} runs")
        page.keyboard.press("Escape")
        ended(page)
    audit(page, "an earlier test")
    assert found == []


@pytest.mark.parametrize("width", [320, 390, 1024, 3840])
@pytest.mark.parametrize("name", ["traceroute", "mtr"])
def test_nothing_shifts_while_results_arrive(
    finished: Visit, stand_ins: Server, name: str, width: int
) -> None:
    size = {"width": width, "height": 1400}
    page = finished(stand_ins, f"?command={name}&target=198.51.100.254", viewport=size)
    assert shifts(page) == []


def test_scale_that_grows_shifts_nothing(finished: Visit, serve_in_hops: Start) -> None:
    lines = " 1  198.51.100.2  2.000 ms", " 2  198.51.100.6  30.000 ms", " 3  198.51.100.10  1500.000 ms"
    script = "#!/bin/sh\n" + "".join(f"echo '{line}'\nsleep 0.3\n" for line in lines)
    page = finished(serve_in_hops(tools={"traceroute": script}), "?command=traceroute&target=198.51.100.254")
    assert text(page, "th.range").endswith(" ms")
    assert shifts(page) == []


@pytest.mark.parametrize("width", [320, 1024, 3840])
def test_nothing_is_wider_than_the_screen(visit: Visit, serve_in_hops: Start, width: int) -> None:
    name = "Amsterdam Science Park, building 2, second floor, next to the stairs"
    locations = json.dumps([{"name": f"{name} too", "url": "http://127.0.0.1:1"}])
    tools = {"ping": QUICK_PING, "mtr": BAD_HOP}
    server = serve_in_hops(tools=tools, LOCATIONS=locations, NETWORK_LOCATION=name)
    page = visit(server, "?target=198.51.100.254", viewport={"width": width, "height": 800})
    widths = []
    for tab, place in (("Ping", name), ("MTR", name), ("MTR", "all"), ("Speed test", name)):
        page.click(f"#from label:has-text('{place}') >> nth=0")
        run(page, tab)
        page.wait_for_selector(f"#results b:has-text('{tab}')")
        page.keyboard.press("Escape")
        ended(page)
        widths.append(page.evaluate("document.documentElement.scrollWidth"))
    assert max(widths) <= width


def test_result_is_in_sight_on_a_phone(finished: Visit, stand_ins: Server) -> None:
    size = {"width": 360, "height": 740}
    page = finished(stand_ins, "?command=mtr&target=198.51.100.254", viewport=size)
    top = page.eval_on_selector("#results h2", "(head) => head.getBoundingClientRect().top")
    bottom = page.eval_on_selector("tbody tr:last-child", "(row) => row.getBoundingClientRect().bottom")
    assert 0 < top < bottom <= 740


def test_tabs_stand_in_one_row_and_run_fills_its_own_on_a_phone(visit: Visit, stand_ins: Server) -> None:
    page = visit(stand_ins, viewport={"width": 360, "height": 740})
    tops = page.locator("#tabs label").evaluate_all("(all) => all.map((each) => each.offsetTop)")
    assert len(set(tops)) == 1
    choose(page, "Speed test")
    page.wait_for_selector("#run:has-text('Start')")
    widths = [page.evaluate(f"document.querySelector('{each}').clientWidth") for each in ("#run", "#offer")]
    assert widths[0] == pytest.approx(widths[1], abs=4)


def test_first_row_is_in_the_upper_part_of_a_laptops_screen(live: Mapping[str, Page]) -> None:
    box = live["traceroute"].locator("tbody tr").first.bounding_box()
    assert box
    assert box["y"] < 500


def test_forced_colours_mark_the_chosen_tab_alone(visit: Visit, amsterdam: Server) -> None:
    page = visit(amsterdam)
    page.emulate_media(forced_colors="active")
    style = "(tabs) => tabs.map((each) => getComputedStyle(each).borderBottomWidth)"
    widths = page.locator("#tabs span").evaluate_all(style)
    assert widths == ["2px", *["0px"] * (len(widths) - 1)]


def test_print_leaves_the_form_out(visit: Visit, amsterdam: Server) -> None:
    page = visit(amsterdam)
    page.emulate_media(media="print")
    assert not page.is_visible("form")
    assert page.is_visible("h1")


# The outline of what has the focus; a radio button's is that of its label.
OUTLINE = """(() => {
  const focused = document.activeElement;
  return getComputedStyle(focused.type === "radio" ? focused.nextSibling : focused).outlineStyle;
})()"""


def test_what_has_the_focus_is_outlined(visit: Visit, amsterdam: Server) -> None:
    page = visit(amsterdam)
    outlines = []
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement !== document.body"):
            outlines.append(page.evaluate(OUTLINE))
    assert len(outlines) > 6
    assert set(outlines) == {"solid"}


def test_reading_starts_at_the_top(visit: Visit, stand_ins: Server) -> None:
    assert visit(stand_ins).evaluate("document.activeElement === document.body")


def test_nothing_is_animated(visit: Visit, stand_ins: Server) -> None:
    page = visit(stand_ins, "?target=127.0.0.1")
    page.click("#run")
    page.wait_for_selector(".plot")
    assert page.evaluate("document.getAnimations().length") == 0
    page.keyboard.press("Escape")
    ended(page)


def test_form_works_without_javascript(visit: Visit, amsterdam: Server) -> None:
    page = visit(amsterdam, java_script_enabled=False)
    assert page.inner_text("h1") == "Amsterdam"
    assert "Charts need JavaScript and a browser from 2023 on" in page.inner_text("#plain")
    page.fill("[name=target]", "target.lg.example")
    page.click("#plain button:has-text('traceroute') >> nth=0")
    page.wait_for_url("**/lookingglass/traceroute")
    assert "\ntraceroute to 198.51.100.254" in page.inner_text("body")


def test_sentence_for_old_browsers_stays_where_the_script_cannot_run(
    browser_in_hops: Browser, stand_ins: Server
) -> None:
    page = browser_in_hops.new_page()
    page.add_init_script("CSS.supports = () => false")
    page.goto(at(stand_ins))
    assert "Chrome 109, Firefox 115, Safari 16" in page.inner_text("#plain")
    page.close()


# Safe


def test_policy_lets_nothing_run_but_the_script_of_the_page(echo: Server) -> None:
    answer = echo.http.get("/", headers={"Accept": "text/html"})
    script, style = f"<script>{lg.SCRIPT}</script>", f"<style>{lg.STYLE}</style>"
    assert script in answer.text
    assert style in answer.text
    policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
    assert policy == {
        "default-src": "'none'",
        "script-src": lg.script_hash(lg.SCRIPT),
        "style-src": lg.script_hash(lg.STYLE),
        "connect-src": "'self'",
        "img-src": "data:",
        "form-action": "'self'",
        "base-uri": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert not re.search(r"\s(on\w+|style|src)\s*=", answer.text.replace(script, "").replace(style, ""))
    assert not re.search(r"innerHTML|insertAdjacent|document\.write|eval\(", script)


def test_hash_of_the_style_is_of_what_is_sent_with_the_operators_colour(serve: Start) -> None:
    answer = serve(PAGE_COLOR="#ffee00").http.get("/", headers={"Accept": "text/html"})
    style = re.search("<style>(.*?)</style>", answer.text, re.S)[1]  # type: ignore[index]
    assert "--mark: #ffee00" in style
    assert lg.script_hash(style) in answer.headers["Content-Security-Policy"]


def test_nothing_is_loaded_from_elsewhere(visit: Visit, amsterdam: Server) -> None:
    page = visit(amsterdam)
    asked = requests_of(page)
    page.reload()
    page.wait_for_selector("#from s")
    places = page.evaluate("PLACES.map(({ url }) => url)")
    assert set(asked) == {places[0], *(url + path for url in places for path in ("health", "network/info"))}


def test_page_under_a_path_asks_relative_to_itself(browser_in_hops: Browser, stand_ins: Server) -> None:
    page = browser_in_hops.new_page()
    asked = requests_of(page)
    page.route("**/lg/**", lambda route: route.continue_(url=route.request.url.replace("/lg/", "/")))
    page.goto(at(stand_ins, "lg/?command=traceroute&target=127.0.0.1"))
    page.click("#run")
    ended(page)
    page.close()
    paths = ("?command=traceroute&target=127.0.0.1", "health", "network/info", "lookingglass/traceroute")
    assert set(asked) == {at(stand_ins, f"lg/{path}") for path in paths}


def test_name_of_a_router_is_text(finished: Visit, stand_ins: Server) -> None:
    name = """<img/src="x"/onerror="document.title='owned'">"""
    page = finished(stand_ins, "?command=mtr&target=127.0.0.1", hop(1, "198.51.100.2", hostname=name))
    assert name in page.inner_text("tbody")
    assert page.locator("#results img").count() == 0


def test_markup_is_text_wherever_it_comes_from(visit: Visit, serve_in_hops: Start) -> None:
    markup = "</title></script><img src=x onerror=\"document.title='owned'\">{0}&amp;"
    hop = f"#!/bin/sh\ncat <<'END'\n 1  {markup} (198.51.100.1)  1.000 ms\n{markup}\nEND\n"
    tools = {"ping": f"#!/bin/sh\ncat <<'END'\n{markup}\nEND\n", "traceroute": hop}
    elsewhere = serve_in_hops(
        NETWORK_LOCATION=markup, NETWORK_FACILITY=markup, NETWORK_FACILITY_URL="javascript:alert(1)"
    )
    locations = json.dumps([{"name": f"{markup}2", "url": f"http://127.0.0.1:{elsewhere.port}"}])
    server = serve_in_hops(tools=tools, NETWORK_LOCATION=markup, NETWORK_IPV4=markup, LOCATIONS=locations)
    page = visit(server, "?command=ping&target=" + quote(markup))
    assert page.title() == f"Looking glass · {markup}"
    assert page.inner_text("h1") == markup
    assert page.input_value("[name=target]") == markup
    for tab in ("Ping", "Traceroute"):
        run(page, tab, "127.0.0.1")
        page.wait_for_selector(f"#results b:has-text('{tab}')")
        ended(page)
        assert markup in page.inner_text("#results")
    page.click("#from label >> nth=1")
    until(lambda: page.inner_text("#place .row").startswith(markup))
    assert page.locator("#place a").all_inner_texts() == ["Map"]
    page.click("#from label >> nth=2")
    page.click("#run")
    ended(page)
    assert page.locator("img").count() == 0
    assert "owned" not in page.title().replace("'owned'", "")


HOSTILE_EVENTS = r"""
{"event": "note", "text": {"textContent": "owned", "style": "position: fixed"}}
{"event": "hop", "hop": 1, "address": {"innerHTML": "<img>"}, "hostname": {"hidden": true}, "timings": []}
{"event": "hop", "hop": 1, "address": "x", "addresses": [{"onclick": "owned"}], "timings": [{"rtt": 1}]}
{"event": "hop", "hop": 1e999, "address": null, "hostname": null, "timings": [null]}
{"event": "hop", "hop": 1, "address": "x", "stats": {"rcv": 1e999, "drop": {}, "avg": "owned"}}
{"event": "reply", "seq": "1'] *", "rtt": {"style": ""}}
{"event": "path", "hops": {"length": 9}}
{"event": {"toString": 1}}
[]
null
<html>
"""


def test_facts_about_another_place_are_shown_as_text(visit: Visit, stand_ins: Server) -> None:
    """An object in the other place's JSON must not become an element of the page."""
    page = visit(stand_ins, "?command=ping")
    link = {"tag": "a", "set": {"href": "https://evil.example", "onclick": "owned"}, "content": ["owned"]}
    facts = ["location", "facility", "facility_url", "map_url", "looking_glass_ipv4", "looking_glass_ipv6"]
    info = dict.fromkeys(facts, link) | {"your_ip": "192.0.2.7"}
    page.route("**/network/info", answering(json.dumps(info)))
    page.evaluate("PLACES.forEach(check)")
    until(lambda: "192.0.2.7" in page.inner_text("#form"))
    assert page.inner_text("#place") == "Amsterdam"


@pytest.mark.parametrize("event", HOSTILE_EVENTS.strip().splitlines())
@pytest.mark.parametrize("tool", ["ping", "mtr"])
def test_malformed_event_of_another_place_does_no_harm(
    visit: Visit, stand_ins: Server, event: str, tool: str
) -> None:
    page = visit(stand_ins, f"?command={tool}&target=127.0.0.1")
    page.route("**/lookingglass/*", answering(f"{json.dumps(stream()[0])}\n{event}\n"))
    page.click("#run")
    assert ended(page) == "The connection to Amsterdam was lost."
    assert page.locator("main [style], main img").count() == 0
    assert "owned" not in page.inner_text("main")


def test_setting_names_the_sites_that_may_frame_the_page(serve: Start) -> None:
    server = serve(FRAME_ANCESTORS="https://www.example.com, http://portal.example:8080")
    policy = server.http.get("/", headers={"Accept": "text/html"}).headers["Content-Security-Policy"]
    assert "frame-ancestors https://www.example.com http://portal.example:8080;" in policy


# Small


def test_page_is_under_20_kb_compressed(echo: Server) -> None:
    browser = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    packed = echo.http.get("/", headers={**browser, "Accept-Encoding": "gzip"})
    assert packed.headers["Content-Encoding"] == "gzip"
    assert int(packed.headers["Content-Length"]) < 20_000


@pytest.mark.parametrize("accept", ["*/*", "application/json", "text/plain"])
def test_clients_other_than_browsers_get_the_usage(echo: Server, accept: str) -> None:
    answer = echo.http.get("/", headers={"Accept": accept})
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert "Accept" in answer.headers["Vary"].split(", ")


# ---- settings ----------------------------------------------------------------------------------------------


def run_lg(*arguments: str, folder: Path = HERE, **environment: Any) -> subprocess.CompletedProcess[str]:
    """`python lg.py ARGUMENTS` with these settings, ended; without the warning that few files may be open."""
    done = subprocess.run(
        [sys.executable, "lg.py", *arguments],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PORT": str(free_port()), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    done.stdout = FEW_FILES.sub("", done.stdout)
    return done


def start_error(status: int = os.EX_CONFIG, **environment: Any) -> str:
    """The one line that `python lg.py` prints when these settings stop the start."""
    done = run_lg(**environment)
    assert done.returncode == status, done.stderr
    (line,) = done.stderr.splitlines()
    return line


def settings_error(**environment: str) -> str:
    """The line with which a service refuses these settings."""
    with pytest.raises(lg.SettingsError) as stopped:
        lg.create_app(lg.load_settings(environment))
    return str(stopped.value)


# Each line: a setting, what its error says, and values that cannot be used.
BAD_SETTINGS = r"""
PORT | an integer from 1 to 65535 | 0 | 65536 | http | 8000.0 | ８０００
LOG_LEVEL | critical, error, warning, info or debug | loud
FORWARDED_ALLOW_IPS | any client could forge its address | * | 127.0.0.1,* | 127.0.0.1,0.0.0.0/0
FORWARDED_ALLOW_IPS | not '::/0': any client could forge its address | ::/0
FORWARDED_ALLOW_IPS | not 'proxy.example' | 127.0.0.1,proxy.example
FORWARDED_ALLOW_IPS | did you mean 172.18.0.0/16? | 127.0.0.1,172.18.0.1/16
FORWARDED_ALLOW_IPS | did you mean fe80::1/128? | fe80::1%eth0
CORS_ORIGINS | whole origins | https://a.example,b.example | https://*.example.com | https://a.example/path
CORS_ORIGINS | expected https://a.example, as browsers send it | https://a.example/
CORS_ORIGINS | expected https://www.example.com, as | https://a.example,https://WWW.Example.com
CORS_ORIGINS | expected https://www.example.com, as | https://www.example.com:443
CORS_ORIGINS | expected http://www.example.com, as | http://www.example.com:80
CORS_ORIGINS | expected https://xn--bcher-kva.example:8443, as | https://bücher.example:8443
CORS_METHODS | names of methods or headers, or *, not 'é' | GET,é
CORS_HEADERS | names of methods or headers, or *, not 'X: y' | X: y
CORS_CREDENTIALS | true or false | perhaps
RATE_LIMIT_DIAGNOSTICS | rates | often | 0/minute
RATE_LIMIT_SPEEDTEST | rates | 2/fortnight | 2/10000000000 minutes | 10000000000/minute
RATE_LIMIT_SPEEDTEST_10G | rates | -1/minute
RATE_LIMIT_LOOKUPS | rates | 20
RATE_LIMIT_EXEMPT | not '192.0.2.0/33' | 192.0.2.0/33
RATE_LIMIT_STORAGE_URI | a URI | redis | nowhere:// | async+redis://127.0.0.1 | memcached://127.0.0.1:1
RATE_LIMIT_STORAGE_URI | a URI | redis+cluster://127.0.0.1 | rediss+cluster://127.0.0.1:1
RATE_LIMIT_STORAGE_URI | a URI that its client library accepts | redis://127.0.0.1:port
MAX_DIAGNOSTICS | an integer from 1 to | 0
MAX_DIAGNOSTICS_PER_CLIENT | an integer | -4
MAX_SPEEDTESTS | an integer from 0 to | many
MAX_SPEEDTESTS_PER_CLIENT | an integer | 1e3
SPEEDTEST_GIB_PER_DAY | an integer from 0 to | -1
DIAGNOSTIC_TIMEOUT | an integer from 1 to 3600 | forever
TARGET_ALLOW | did you mean 10.0.0.0/8? | 10.0.0.1/8
TARGET_DENY | not 'example.com' | example.com
COMMANDS | mtr, mtr6, ping, ping6, traceroute, traceroute6, or *, not 'nmap' | ping,nmap
COMMANDS | names of commands, or * | ping;mtr
EXTRA_COMMANDS | JSON | bgp | []
EXTRA_COMMANDS | {address} among its arguments for 'bgp' | {"bgp": "birdc show"} | {"bgp": "{address}"}
EXTRA_COMMANDS | a command line | {"bgp": ["birdc", "{address}"]} | {"bgp": "birdc \"show {address}"}
EXTRA_COMMANDS | a command line | {"bgp": "birdc \u0000 {address}"} | {"bgp": "birdc \ud800 {address}"}
EXTRA_COMMANDS | {address} among its arguments for 'ping' | {"ping": "fping"}
EXTRA_COMMANDS | not 'BGP' | {"BGP": "birdc {address}"}
EXTRA_COMMANDS | not '' | {"": "birdc {address}"}
EXTRA_COMMANDS | 'ping6' | {"ping6": "fping {address}"}
EXTRA_COMMANDS | 'speedtest' | {"speedtest": "fping {address}"}
EXTRA_COMMANDS | 'bgp' | {"bgp6": "x {address}", "bgp": "x {address}"}
EXTRA_COMMANDS | 'bgp' | {"bgp": "x {address}", "bgp": "y {address}"}
METRICS_ALLOW_IPS | not 'prometheus' | prometheus
PAGE_LOGO | No such file | /nonexistent.svg
PAGE_LOGO | Is a directory | /
PAGE_COLOR | #0a7cff | blue | #123; background: url(//x)
PAGE_LINKS | javascript:alert(1) | [{"name": "Terms", "url": "javascript:alert(1)"}]
LOCATIONS | JSON like | {} | Amsterdam
LOCATIONS | not "Amsterdam" | ["Amsterdam"]
LOCATIONS | not {"name": "Amsterdam"} | [{"name": "Amsterdam"}]
LOCATIONS | entries like | [{"name": "", "url": "https://a.example"}] | [{"name": "A", "url": "a.example"}]
LOCATIONS | entries like | [{"name": "A", "url": "https://a.example; script-src *"}]
LOCATIONS | entries like | [{"name": "A", "url": "https://[::1]"}] | [{"name": "\ud800", "url": "https://a"}]
PAGE_LINKS | entries like | [{"name": "a\u0000b", "url": "https://a"}] | [{"name": "A", "url": "https://a/\udfff"}]
FRAME_ANCESTORS | not 'www.example.com' | www.example.com
FRAME_ANCESTORS | script-src | https://a.example; script-src *
"""
ODD_SETTINGS = [
    ("PAGE_LOGO", str(HERE / "lg.py"), "SVG or PNG"),
    ("LOCATIONS", "[" * 100_000, "JSON like"),
    ("NETWORK_LOCATION", "\udcff", "UTF-8"),
    ("CORS_ORIGINS", "https://\udcff.example", "UTF-8"),
    ("RATE_LIMIT_STORAGE_URI", "redis://\udcff", "UTF-8"),
    ("NETWORK_LOCATION", "a\nb", "text without control characters"),
    ("NETWORK_MAP_URL", "https://a.example/\x7f", "text without control characters"),
    ("PAGE_TITLE", "\0", "text without control characters"),
    ("HOST", "127.0.0.1\u2028x", "text without control characters"),
]
BAD_SETTINGS_ROWS = [
    (name, value, reason)
    for name, reason, *values in (line.split(" | ") for line in BAD_SETTINGS.strip().splitlines())
    for value in values
]


@pytest.mark.parametrize(("name", "value", "reason"), [*BAD_SETTINGS_ROWS, *ODD_SETTINGS])
def test_bad_setting_is_named_with_its_value_and_what_was_expected(
    name: str, value: str, reason: str
) -> None:
    line = settings_error(**{name: value})
    assert line.startswith(f"{name}={value!r} cannot be used: expected ")
    assert reason in line


@pytest.mark.parametrize(
    "uri",
    [
        "redis://:s3cretpw@127.0.0.1:port",
        "redis://:s3/cretpw@127.0.0.1:6379",
        "redis://:s3cret pw@127.0.0.1:port",
        "redis://user:s3cret@pw@127.0.0.1:port",
        "mongodb://user:s3cretpw@127.0.0.1:1",
        "nowhere://:s3cretpw@127.0.0.1",
        "redis:/:s3cretpw@127.0.0.1:6379",
        "redis://127.0.0.1:port?password=s3cretpw&db=1",
        "redis://127.0.0.1:port?password=s3'cretpw",
    ],
)
def test_password_in_a_uri_is_not_printed(uri: str) -> None:
    line = settings_error(RATE_LIMIT_STORAGE_URI=uri)
    assert re.match(rf"RATE_LIMIT_STORAGE_URI='{uri.partition(':')[0]}://(\*\*\*@)?127\.0\.0\.1", line)
    assert not re.search("s3|pw", line)


@pytest.mark.parametrize(
    ("arguments", "setting"), [((), {"PORT": "http"}), (("check",), {"COMMANDS": "nmap"})]
)
def test_bad_setting_ends_a_start_or_a_check_with_one_line_and_status_78(
    arguments: tuple[str, ...], setting: dict[str, Any]
) -> None:
    done = run_lg(*arguments, **setting)
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr == f"lg.py: {settings_error(**setting)}\n"


@pytest.mark.parametrize(
    ("host", "reason"),
    [("", "Address already in use"), ("192.0.2.77", "Cannot assign requested address"), ("a..b", "label")],
)
def test_address_that_cannot_be_bound_stops_the_start_with_status_1(
    echo: Server, host: str, reason: str
) -> None:
    """It may be free later, which EX_CONFIG would deny."""
    line = start_error(1, HOST=host, PORT=str(echo.port))
    assert re.match(f"lg.py: HOST='{host}', PORT='{echo.port}' cannot be used: .*{reason}", line)


def test_settings_that_leave_nothing_to_offer_stop_the_start() -> None:
    assert "expected a command or speed tests" in settings_error(COMMANDS="", MAX_SPEEDTESTS="0")


def test_connections_have_their_socket_options() -> None:
    wanted = {
        socket.TCP_NODELAY: 1,  # else the second write of an answer waits for 40 ms
        socket.TCP_USER_TIMEOUT: 120_000,  # readers may pause for so long
    }
    (listening,) = lg.listen("127.0.0.1", 0)
    with listening, socket.create_connection(listening.getsockname()), listening.accept()[0] as accepted:
        assert {option: accepted.getsockopt(socket.IPPROTO_TCP, option) for option in wanted} == wanted


def test_address_that_a_name_has_twice_is_listened_on_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = socket.getaddrinfo("127.0.0.1", 0, type=socket.SOCK_STREAM)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found * 2)
    (listening,) = lg.listen("twice.example", 0)
    listening.close()


def test_host_is_the_only_address_that_is_listened_on(serve: Start) -> None:
    server = serve(HOST="127.0.0.1")
    with socket.socket() as ipv4, socket.socket(socket.AF_INET6) as ipv6:
        refused = [ipv4.connect_ex(("127.0.0.2", server.port)), ipv6.connect_ex(("::1", server.port))]
    assert refused == [errno.ECONNREFUSED] * 2


def test_shared_store_without_its_package_stops_the_start_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lg, "find_spec", lambda name: None)
    line = settings_error(RATE_LIMIT_STORAGE_URI="mongodb://127.0.0.1:1")
    assert line.endswith("cannot be used: expected the Python package pymongo: pip install pymongo")


def test_env_example_lists_every_setting_with_its_default() -> None:
    listed = re.findall(r"^([A-Z0-9_]+)=(.*)$", (HERE / ".env.example").read_text(), re.M)
    defaults = {row.name: row.metadata["default"] for row in fields(lg.Settings)}
    del defaults["PATH"]  # that of every program
    assert sorted(listed) == sorted(defaults.items())


def test_env_example_as_it_is_changes_no_default() -> None:
    assert lg.load_settings(dotenv_values(HERE / ".env.example")) == DEFAULTS


ORIGINS = "https://a.example,http://a.example:8080,http://[2001:db8::1]:1234,app://shell,null"
POPS = '[{"id": 1, "name": "Amsterdam", "url": "https://ams.example.com/", "flag": "nl"}]'  # of a front end
LINKS = '[{"name": "NOC", "url": "mailto:noc@e.example"}, {"name": "A", "url": "https://e.example/t/?a#b"}]'
LISTS = ("CORS_ORIGINS", "TARGET_ALLOW", "COMMANDS", "METRICS_ALLOW_IPS", "PAGE_LINKS", "LOCATIONS")
OTHERS = ("LOG_LEVEL", "CORS_CREDENTIALS", "RATE_LIMIT_LOOKUPS", "RATE_LIMIT_STORAGE_URI", "MAX_SPEEDTESTS")


@pytest.mark.parametrize(
    ("name", "value", "parsed"),
    [
        *((name, "", "") for name in ("NETWORK_LOCATION", "PAGE_LOGO")),
        *((name, "", ()) for name in LISTS),
        *((name, "", getattr(DEFAULTS, name)) for name in OTHERS),
        *(("CORS_CREDENTIALS", word, True) for word in ("true", "True", "yes", "on", "1")),
        *(("CORS_CREDENTIALS", word, False) for word in ("false", "FALSE", "no", "off", "0")),
        ("NETWORK_LOCATION", '"Amsterdam"', "Amsterdam"),  # `docker run --env-file` keeps quotes
        ("CORS_ORIGINS", ORIGINS, tuple(ORIGINS.split(","))),
        ("LOCATIONS", POPS, ({"name": "Amsterdam", "url": "https://ams.example.com"},)),
        ("PAGE_LINKS", LINKS, tuple(json.loads(LINKS))),
        ("EXTRA_COMMANDS", "", {}),
        ("EXTRA_COMMANDS", """{"a": "b -r 'c {address}' d"}""", {"a": ("b", "-r", "c {address}", "d")}),
    ],
)
def test_value_of_a_setting_is_parsed(name: str, value: str, parsed: object) -> None:
    """Set but empty means empty for texts and lists, and the default for the rest."""
    assert getattr(lg.load_settings({name: value}), name) == parsed


@pytest.mark.parametrize(
    ("offered", "extra", "names"),
    [
        ("*", "bgp", [*COMMANDS, "bgp", "bgp6"]),
        ("*", "ping", COMMANDS),
        ("ping,BGP", "bgp", ["ping", "bgp"]),
        ("bgp6, mtr6", "bgp", ["mtr6", "bgp6"]),
        ("", "bgp", []),
    ],
)
def test_commands_offers_built_in_and_extra_ones_by_name(offered: str, extra: str, names: Any) -> None:
    settings = lg.load_settings({"COMMANDS": offered, "EXTRA_COMMANDS": f'{{"{extra}": "x {{address}}"}}'})
    assert list(lg.make_commands(settings)) == list(names)


def test_replaced_command_is_not_tried_on_loopback() -> None:
    settings = lg.load_settings({"EXTRA_COMMANDS": '{"ping": "ping -I eth1 -c none {address}"}'})
    assert set(lg.Service(settings).tools.trials) == {"traceroute", "mtr"}


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (b"\x89PNG\r\n\x1a\n...", "png"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg+xml"),
        (b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- made by hand -->\n<svg/>", "svg+xml"),
    ],
)
def test_page_logo_becomes_a_data_uri(tmp_path: Path, image: bytes, kind: str) -> None:
    (tmp_path / "logo").write_bytes(image)
    logo = lg.load_settings({"PAGE_LOGO": str(tmp_path / "logo")}).PAGE_LOGO
    assert logo == f"data:image/{kind};base64,{b64encode(image).decode()}"


@pytest.mark.parametrize("length", [2**16 + 1, 2**42], ids=["64 KiB and a byte", "more than memory holds"])
def test_page_logo_over_64_kib_is_refused(tmp_path: Path, length: int) -> None:
    (tmp_path / "logo.svg").write_bytes(b"<svg/>".ljust(2**16))
    os.truncate(tmp_path / "logo.svg", length)
    assert "at most 64 KiB" in settings_error(PAGE_LOGO=str(tmp_path / "logo.svg"))


@pytest.fixture
def env_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the module's `.env` is; the environment has no settings."""
    for row in fields(lg.Settings):
        monkeypatch.delenv(row.name, raising=False)
    monkeypatch.setattr(lg, "__file__", str(tmp_path / "lg.py"))
    return tmp_path / ".env"


def test_env_file_of_the_replaced_server_is_read(env_file: Path) -> None:
    texts = {"NETWORK_LOCATION": "Amsterdam, Netherlands", "NETWORK_FACILITY": "The Cellar"}
    texts |= {"NETWORK_MAP_URL": "https://maps.example/?q=Amsterdam,+NL", "NETWORK_IPV4": "192.0.2.1"}
    texts |= {"NETWORK_FACILITY_URL": "https://cellar.example", "NETWORK_IPV6": "2001:db8::1"}
    quoted = "".join(f'{name}="{text}"\n' for name, text in texts.items())
    env_file.write_text(f"{quoted}CORS_ORIGINS=*\nCORS_CREDENTIALS=true\nCORS_METHODS=*\nCORS_HEADERS=*\n")
    assert lg.load_settings() == lg.load_settings(texts | {"CORS_CREDENTIALS": "true"})


@pytest.mark.parametrize("value", ["Berlin", ""])
def test_environment_overrides_the_env_file(
    env_file: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    env_file.write_text("NETWORK_LOCATION=Amsterdam\n")
    monkeypatch.setenv("NETWORK_LOCATION", value)
    assert value == lg.load_settings().NETWORK_LOCATION


@pytest.mark.parametrize(
    "line", ["NETWORK_LOCATION", "NETWORK_LOCATION: Amsterdam", 'NETWORK_LOCATION="Amsterdam']
)
def test_env_file_with_a_line_that_is_no_setting_stops_the_start(env_file: Path, line: str) -> None:
    env_file.write_text(f"# Settings\nPORT=8000\n{line}\n")
    expected = f"{env_file}, line 3: expected NAME=value, not {line!r}"
    with pytest.raises(lg.SettingsError, match=re.escape(expected)):
        lg.load_settings()


def test_directory_in_place_of_the_env_file_stops_the_start(env_file: Path) -> None:
    env_file.mkdir()
    with pytest.raises(lg.SettingsError, match=r"cannot be used: expected a text file \(.*Is a directory"):
        lg.load_settings()


def test_misspelt_name_in_the_env_file_is_logged_with_the_nearest_setting(
    serve: Start, tmp_path: Path
) -> None:
    shutil.copy(HERE / "lg.py", tmp_path)
    (tmp_path / ".env").write_text("NETWORK_LOCATON=Amsterdam\n")
    server = serve(command=(sys.executable, str(tmp_path / "lg.py")))
    assert 'msg="A name in .env is not a setting" name=NETWORK_LOCATON nearest=NETWORK_LOCATION' in server.log


def test_uvicorn_serves_the_same_app(serve: Start) -> None:
    port = str(free_port())
    command = (sys.executable, "-m", "uvicorn", "--factory", "lg:create_app", "--port", port)
    server = serve(command=command, PORT=port, tools={"ping": ECHO}, RATE_LIMIT_DIAGNOSTICS="1/minute")
    assert server.run("ping").text.startswith("argv ")
    assert server.run("ping").status_code == 429
    info = server.http.get("/network/info", headers={"X-Forwarded-For": "192.0.2.9"}).json()
    assert info["your_ip"] == "192.0.2.9"


# A service is made from its settings alone.

WATCHED = """
import sys
def watch(event, arguments):
    watched = ("socket.__new__", "subprocess.Popen", "_thread.start_new_thread")
    if event in watched or event == "open" and str(arguments[0]).endswith(".env"):
        print(event, arguments)
sys.addaudithook(watch)
import lg
"""


def test_import_does_nothing_whatever_the_environment_and_the_arguments() -> None:
    line = [sys.executable, "-c", WATCHED, "--nonsense"]
    environment = {"PORT": "http", "EXTRA_COMMANDS": "[", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(line, cwd=HERE, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_two_services_in_one_process_keep_their_requests_apart(serve: Start, tmp_path: Path) -> None:
    """A receive buffer in common was seen to mix the bytes of two loops."""
    if not shutil.which("curl"):
        lacking("the command curl")
    zeros = tmp_path / "zeros"
    zeros.touch()
    os.truncate(zeros, 500_000_000)

    def use(server: Server) -> list[object]:
        line = ["curl", "-sX", "POST", "-T", str(zeros), f"{server.http.base_url}/speedtest/upload"]
        echoed, number = set(), itertools.count()
        with server.begin() as command, subprocess.Popen(line, stdout=subprocess.PIPE) as upload:
            assert command.recv(12) == b"HTTP/1.1 200"
            while upload.poll() is None:
                target = f"no target, {next(number)}"
                echoed.add(server.run("mtr", target).json()["detail"][0]["input"] == target)
            uploaded = json.loads(upload.communicate()[0])
        return [echoed, uploaded["bytes"], server.http.get("/network/info").json()["location"]]

    servers = [serve(tools={"ping": ENDLESS}, NETWORK_LOCATION=name) for name in ("first", "second")]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(use, servers))
    assert found == [[{True}, 500_000_000, "first"], [{True}, 500_000_000, "second"]]


def test_two_services_in_one_process_count_for_themselves(serve: Start) -> None:
    first, second = (serve(RATE_LIMIT_SPEEDTEST="1/hour") for _ in range(2))
    assert [begun(server, "1G") for server in (first, second, first)] == [200, 200, 429]
    second.run("ping", "no target")
    count = r'^lg_refusals_total\{reason="(?:rate limit|invalid)"\} (\d+)'
    refused = [re.findall(count, server.http.get("/metrics").text, re.M) for server in (first, second)]
    assert refused == [["0", "1"], ["1", "0"]]


# The command line.


@pytest.mark.parametrize(
    ("version", "remedy"), [((3, 11), "pip install -r requirements.txt"), ((3, 10), "Python 3.11 or later")]
)
def test_start_without_what_it_needs_ends_with_one_line(version: tuple[int, int], remedy: str) -> None:
    script = f"import runpy, sys; sys.version_info = {version}; runpy.run_path('lg.py', run_name='__main__')"
    line = [sys.executable, "-S", "-c", script]  # without packages
    done = subprocess.run(line, cwd=HERE, env={}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n"), remedy in done.stderr) == (1, 1, True)


@pytest.mark.parametrize(
    ("option", "printed"),
    [("--help", "usage: lg.py"), ("-h", "usage: lg.py"), ("--version", f"lg.py {lg.VERSION}\n")],
)
def test_help_and_version_are_printed_whatever_the_settings(option: str, printed: str) -> None:
    done = run_lg(option, PORT="http")
    assert (done.returncode, done.stdout[: len(printed)], done.stderr) == (0, printed, "")


@pytest.mark.parametrize("arguments", ["start", "--verbose", "check now", "--vers"])
def test_unknown_argument_ends_with_status_2(arguments: str) -> None:
    done = run_lg(*(words := arguments.split()), PORT="http")
    assert (done.returncode, done.stdout, words[-1] in done.stderr) == (2, "", True)


def test_check_prints_what_is_lacking_and_ends_with_0(echo: Server, tmp_path: Path) -> None:
    """Beside the service that has the port, and without a connection to the store."""
    tools = {"traceroute": "#!/bin/sh\nexit 1\n", "mtr": "#!/bin/sh\necho Operation not permitted\n"}
    for tool, script in (WORKING_TOOLS | tools).items():
        write_script(tmp_path / tool, script)
    shutil.copy(HERE / "lg.py", tmp_path)
    env = "NETWORK_LOCATON=Amsterdam\nCORS_CREDENTIALS=yes\nSPEEDTEST_GIB_PER_DAY=5\n"
    (tmp_path / ".env").write_text(env)
    with socket.create_server(("127.0.0.1", 0)) as store:
        done = run_lg(
            "check",
            folder=tmp_path,
            PORT=str(echo.port),
            PATH=f"{tmp_path}:{os.defpath}",
            COMMANDS="ping,traceroute,mtr,one",
            EXTRA_COMMANDS='{"one": "no-such-tool {address}", "two": "dig {address}"}',
            RATE_LIMIT_STORAGE_URI=f"redis+cluster://127.0.0.1:{store.getsockname()[1]}",
        )
        connected, _, _ = select.select([store], [], [], 0)
    assert (done.returncode, done.stderr, connected) == (0, "", [])
    lines = [
        r'WARNING: msg="A name in .env is not a setting" name=NETWORK_LOCATON nearest=NETWORK_LOCATION',
        r'WARNING: msg="A tool fails on loopback.*" tool=traceroute .*',
        r'WARNING: msg="A tool lacks the permission to send.* NET_RAW .*" tool=mtr .*',
        r'WARNING: msg="CORS_CREDENTIALS has no effect .*"',
        r'WARNING: msg="Extra commands are not offered: .*" commands=two',
        r'WARNING: msg="SPEEDTEST_GIB_PER_DAY is smaller .*" downloads=10G',
        r'WARNING: msg="Tools are missing: .*" missing=no-such-tool',
        r"lg\.py: these settings can be used",
    ]
    printed = sorted(done.stdout.splitlines())
    assert [line for row, line in zip(lines, printed, strict=True) if not re.fullmatch(row, line)] == []


# ---- targets -----------------------------------------------------------------------------------------------

HOSTILE = [
    # what a shell would do something with
    *("127.0.0.1;id", "127.0.0.1|id", "$(id)", "`id`", "127.0.0.1 127.0.0.2", "127.0.0.1\n", "a\nb", "a\0b"),
    *("a&b", "a'b", "a b", "a\tb", "a/b", "a\\b", "../etc/passwd", "http://example.com", "user@example.com"),
    *("example.com:80", "*.com"),
    # what a tool would take for an option
    *("-f", "--help", "-c1000000", "-.example.com", "example.-com", "example.com-"),
    # what a resolver would take for an IPv4 address
    *("127.1", "127.0.1", "2130706433", "0x7f.1", "0x7f000001", "0177.0.0.1", "0x7f.0.0.0x1", "1.2.3.4."),
    *("1.2.3.0x4", "010.0.0.1", "1.2.3.256", "1.2.3.4.5", "1.2.3", "0", "00", "0x", "1.2.3.4%1", "a.0x1F"),
    *("127.0.0.1.", "example.1"),
    # brackets, zones and almost addresses
    *("[127.0.0.1]", "[::1", "::1]", "[[::1]]", "[]", "[example.com]", "::1%lo", "fe80::1%eth0", ":", ":::"),
    *("[fe80::1%25eth0]", "1::2::3", "12345::", "::1.2.3.256", "::127.1", "::010.1.1.1", "::ffff:0x7f.1"),
    "1:2:3:4:5:6:7:8:9",
    # IPv4 in other scripts, names that look like others, what IDNA does not allow
    *("１２７.０.０.１", "127。0。0。1", "١٢٧.٠.٠.١", "①②⑦.0.0.1", "127.0.0.１", "::１", "exa​mple.com\u2028"),
    *("\ud800.example", "xn--\u00fc.example", "a\u0300.\u0300b", "\u200d.example", "☃︎.-", "例え。1"),
    # too long, or nothing
    *("", " ", ".", "..", "a..b", ".example.com", "example.com..", "a" * 64, "a" * 64 + ".example"),
    *("ü" * 300, ".".join(["a" * 63] * 4), "a." * 127 + "ab", "é" * 64 + ".example"),
]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_that_is_no_target_is_422_with_examples(text: str) -> None:
    with pytest.raises(lg.RequestError, match=r"^\(422, .*example\.com"):
        lg.parse_target(text)


LONGEST = ".".join(["a" * 63] * 3 + ["a" * 61])
NAMES_IN_ASCII = ["localhost", "Example.COM.", "_dmarc.example.com", "a--b.example", "1.example", LONGEST]
NAMES_IN_ASCII += ["0x7f.example", "1and1.com", "xn--bcher-kva.example", f"{LONGEST}."]
ADDRESSES = ("192.0.2.1", "0.0.0.0", "255.255.255.255", "::", "1:2:3:4:5:6:7:8", "2001:DB8::1")


@pytest.mark.parametrize(
    ("text", "target"),
    [
        *((name, name) for name in NAMES_IN_ASCII),
        ("bücher.example", "xn--bcher-kva.example"),
        ("BÜCHER。example", "xn--bcher-kva.example"),
        ("faß.example", "xn--fa-hia.example"),
        ("例え.テスト", "xn--r8jz45g.xn--zckzah"),
        *((address, ipaddress.ip_address(address)) for address in ADDRESSES),
        ("[2001:db8::1]", ipaddress.ip_address("2001:db8::1")),
        ("::ffff:192.0.2.1", ipaddress.ip_address("::ffff:c000:201")),
        ("1:2:3:4:5:6:7.8.9.10", ipaddress.ip_address("1:2:3:4:5:6:708:90a")),
    ],
)
def test_target_is_an_address_or_an_ascii_name(text: str, target: object) -> None:
    assert lg.parse_target(text) == target


# The IANA IPv4 and IPv6 Special-Purpose Address Registries, multicast, reserved space, and what lies outside
# global unicast: first, last and around.
NOT_PUBLIC = """
0.0.0.0 0.255.255.255 10.0.0.0 10.255.255.255 100.64.0.0 100.127.255.255 127.0.0.0 127.255.255.255
169.254.169.254 172.16.0.0 172.31.255.255 192.0.0.0 192.0.0.8 192.0.0.11 192.0.0.170 192.0.0.171 192.0.0.255
192.0.2.0 192.0.2.255 192.88.99.0 192.88.99.255 192.168.0.0 192.168.255.255 198.18.0.0 198.19.255.255
198.51.100.0 203.0.113.255 224.0.0.1 239.255.255.255 240.0.0.0 255.255.255.255
:: ::1 ::8.8.8.8 ::ffff:8.8.8.8 64:ff9b:1::1 100::1 100:0:0:1::1 2001::1
2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:1:: 2001:1::4 2001:2::1 2001:2:0:ffff:: 2001:5:: 2001:10::1
2001:1ff:ffff:: 2001:db8::1 2001:db8:ffff:: 2002:808:808::1 2002:: 3fff::1 3fff:fff:ffff:: 4000:: 5f00::1
fc00::1 fdff::1 fe80::1 febf::1 fec0::1 ff02::1 ffff::1 1fff::1 64:ff9b::10.0.0.1 64:ff9b::127.0.0.1
64:ff9b::192.88.99.1
"""
PUBLIC = """
1.0.0.0 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0 172.15.255.255
172.32.0.0 8.8.8.8 192.0.0.9 192.0.0.10 192.0.1.0 192.31.196.1 192.52.193.1 192.88.98.255 192.88.100.0
192.175.48.1 198.17.255.255 198.20.0.0 203.0.114.0 223.255.255.255 192.167.0.1
64:ff9b::8.8.8.8 2000::1 2001:1::1 2001:1::2 2001:1::3 2001:3::1 2001:4:112::1 2001:20::1 2001:30::1
2001:200::1 2001:db7:ffff:: 2001:db9:: 2003::1 2606:4700:4700::1111 2620:4f:8000::1 3ffe:ffff::1
3fff:1000::1 2a00::1
"""
SPECIAL_PURPOSE = dict.fromkeys(NOT_PUBLIC.split(), False) | dict.fromkeys(PUBLIC.split(), True)


@pytest.mark.parametrize(("address", "public"), SPECIAL_PURPOSE.items())
def test_public_addresses_are_those_outside_the_special_purpose_registries(
    address: str, public: bool
) -> None:
    assert lg.is_public(ipaddress.ip_address(address)) is public


def make_targets(**environment: str) -> lg.Targets:
    return lg.Targets(lg.load_settings(environment), lg.Threads(asyncio.Event()))


@pytest.mark.parametrize(
    ("address", "allow", "deny", "expected"),
    [
        ("10.1.2.3", "10.0.0.0/8", "", True),
        ("10.1.2.3", "10.0.0.0/8", "10.1.0.0/16", False),
        ("8.8.8.8", "", "8.8.8.0/24", False),
        ("8.8.8.8", "8.8.8.8", "8.8.8.0/24", False),
        ("127.0.0.1", "", "", False),
        ("::ffff:10.1.2.3", "10.0.0.0/8", "", False),  # TARGET_ALLOW is for the address itself
        ("64:ff9b::10.1.2.3", "10.0.0.0/8", "", False),
        ("64:ff9b::10.1.2.3", "64:ff9b::/96", "10.0.0.0/8", False),  # TARGET_DENY also for what it embeds
        ("64:ff9b::8.8.8.8", "", "8.8.8.8", False),
        ("::ffff:8.8.8.8", "::ffff:0:0/96", "8.8.8.8", False),
        ("::8.8.8.8", "::/96", "8.8.8.8", False),
        ("2002:808:808::1", "2002::/16", "", True),
        ("2002:808:808::1", "2002::/16", "8.8.8.8", False),
        ("2001:0:808:808:0:0:f7f7:f7f7", "2001::/32", "8.8.8.8", False),
        ("2a00::1", "", "::/0", False),
    ],
)
def test_target_allow_adds_to_public_addresses_and_target_deny_removes(
    address: str, allow: str, deny: str, expected: bool
) -> None:
    targets = make_targets(TARGET_ALLOW=allow, TARGET_DENY=deny)
    assert targets.is_allowed(ipaddress.ip_address(address)) is expected


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        *((socket.gaierror(number, ""), "target") for number in (socket.EAI_NONAME, socket.EAI_NODATA)),
        *((socket.gaierror(number, ""), "resolver") for number in (socket.EAI_AGAIN, socket.EAI_FAIL)),
        (lambda *_: time.sleep(1), "resolver"),
    ],
)
def test_resolver_that_fails_is_told_from_a_name_without_an_address(
    monkeypatch: pytest.MonkeyPatch, answer: object, reason: str
) -> None:
    monkeypatch.setattr(lg, "RESOLVE_SECONDS", 0.1)
    targets = make_targets()
    targets.getaddrinfo = Mock(side_effect=answer)
    with pytest.raises(lg.RequestError) as refused:
        outcome(targets.resolve("a.example", 4, "hint"))
    assert refused.value.reason == reason


@pytest.mark.parametrize(
    ("command", "target", "message"),
    [
        ("ping", "::1", "::1 is an IPv6 address: use ping6"),
        ("mtr6", "127.0.0.1", "127.0.0.1 is an IPv4 address: use mtr"),
        ("ping", "10.0.0.1", "10.0.0.1 may not be measured here: use a different, public address"),
        ("ping", "v6.example", "no IPv4 address that may be measured here: check the name, or use ping6"),
        ("mtr6", "inside.example", "no IPv6 address that may be measured here: check the name, or use mtr"),
        ("ping", "broken.example", "This server cannot look up broken.example now: try again, or use an a"),
        ("ping", "127.1", "Not a target: use an "),
    ],
)
def test_refused_target_is_422_in_the_shape_of_fastapi_with_what_to_do(
    echo: Server, command: str, target: str, message: str
) -> None:
    response = echo.run(command, target)
    assert response.status_code == 422
    [fault] = response.json()["detail"]
    assert (fault["type"], fault["loc"], fault["input"]) == ("value_error", ["body", "target"], target)
    assert message in fault["msg"]


@pytest.mark.parametrize(
    "targets",
    [
        (
            "inside.example",
            "nowhere.example",
            "v6.example",
            "denied.example",
        ),  # else one could list the first
        ("10.0.0.1", "8.8.8.8"),
    ],
    ids=["names", "addresses"],
)
def test_targets_that_may_not_be_measured_get_the_same_answer(shared: Start, targets: list[str]) -> None:
    server = shared(names={**NAMES, "denied.example": ["8.8.8.8"]}, TARGET_DENY="8.8.8.0/24")
    answers = [server.run("ping", target) for target in targets]
    assert {answer.status_code for answer in answers} == {422}
    texts = {answer.text.replace(target, "") for answer, target in zip(answers, targets, strict=True)}
    assert len(texts) == 1


@pytest.mark.parametrize(
    "body",
    [
        b'{"target": "\\t127.0.0.1 \\r\\n"}',
        b'{"target": "\xc2\xa0127.0.0.1\xe3\x80\x80"}',
        b"target=%20127.0.0.1+%0A",
        b"target= 127.0.0.1\r\n",
    ],
)
def test_blanks_around_a_target_are_removed(body: bytes) -> None:
    assert lg.parse_body(body) == "127.0.0.1"


@pytest.mark.parametrize(
    ("body", "kind", "shown"),
    [
        *((body, "missing", None) for body in (b"", b"{}", b"[]", b"host=example.com")),
        *((body, "json_invalid", None) for body in (b'{"target": ', b"\xff\xfe")),
        (b'{"target": 1}', "string_type", 1),
        (b'{"target": null}', "string_type", None),
        (b'{"target": ["127.0.0.1"]}', "string_type", ["127.0.0.1"]),
        (b'{"target": NaN}', "string_type", None),
        (b'{"target": [Infinity]}', "string_type", None),
        (b"target=127.0.0.1&target=127.0.0.2", "string_type", ["127.0.0.1", "127.0.0.2"]),
        (b'{"target": "\\ud800"}', "value_error", None),
        (b'{"a":' * 600 + b"1" + b"}" * 600, "missing", None),
        (b'{"target": ' + b"9" * 4000 + b"}", "string_type", int("9" * 4000)),
    ],
)
def test_unusable_body_is_422_and_its_target_is_echoed_where_json_can_hold_it(
    echo: Server, body: bytes, kind: object, shown: object
) -> None:
    response = echo.http.post("/lookingglass/ping", content=body)
    assert response.status_code == 422
    [fault] = response.json()["detail"]
    assert (fault["type"], fault["input"]) == (kind, shown)


def test_body_that_is_nested_too_deeply_to_be_echoed_is_422(echo: Server) -> None:
    """At some depths, which differ between Pythons, the target can be encoded but not the whole answer."""
    for depth in [*range(900, 1000), *range(1400, 1550), 2000]:
        body = b'{"target": ' + b"[" * depth + b"]" * depth + b"}"
        assert echo.http.post("/lookingglass/ping", content=body).status_code == 422


LARGEST_BODY = b'{"target": "127.0.0.1"}'.rjust(4096)


def test_body_of_4_kib_is_accepted(echo: Server) -> None:
    assert echo.http.post("/lookingglass/ping", content=LARGEST_BODY).status_code == 200


@pytest.mark.parametrize(
    "body", [LARGEST_BODY + b" ", [LARGEST_BODY, b" "], bytes(100_000)], ids=["length", "chunked", "large"]
)
def test_body_over_4_kib_is_413(echo: Server, body: bytes | list[bytes]) -> None:
    response = echo.http.post("/lookingglass/ping", content=body)
    assert response.status_code == 413
    assert "4096 bytes" in response.json()["detail"]


LITERALS = st.one_of(
    st.ip_addresses().map(str),
    st.sampled_from([*HOSTILE, *SPECIAL_PURPOSE, "127.0.0.1", "::1", "here.example", "inside.example"]),
    st.from_regex(lg.HOST_NAME, fullmatch=True),
    st.text(),
)
VALUES = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists)
BODIES = st.one_of(
    st.binary(max_size=5000),
    *(texts.map(lambda value: json.dumps({"target": value}).encode()) for texts in (LITERALS, VALUES)),
    LITERALS.map(lambda text: f"target={text}".encode(errors="replace")),
    st.text().map(lambda text: f'{{"target": {text}}}'.encode(errors="replace")),
)


@pytest.fixture(scope="session")
def recorder(shared: Start, tmp_path_factory: pytest.TempPathFactory) -> tuple[Server, Path]:
    """A server whose tools write their last argument to a file, and that file."""
    started = tmp_path_factory.mktemp("recorder") / "started"
    script = f'#!/bin/sh\nfor last; do :; done\nprintf "%s\\n" "$last" >> \'{started}\'\n'
    names = {"here.example": ["127.0.0.1", "::1"], "inside.example": ["10.0.0.1", "fd00::1"]}
    return shared(names=names, tools=every_tool(script)), started


@given(command=st.sampled_from(list(COMMANDS)), body=BODIES)
@example("ping", b"target=here.example")
@example("ping6", b"target=[::1]")
@example("ping", b"target=inside.example")
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_body_starts_a_tool_with_an_allowed_address_or_is_a_client_error(
    recorder: tuple[Server, Path], command: str, body: bytes
) -> None:
    server, started = recorder
    started.write_text("")
    response = server.http.post(f"/lookingglass/{command}", content=body)
    assert response.status_code in (200, 413, 422)
    lines = started.read_text().splitlines()
    assert len(lines) == (response.status_code == 200)
    for line in lines:
        address = ipaddress.ip_address(line)
        assert (str(address), address.version) == (line, COMMANDS[command].version)
        assert lg.is_public(address) or address.is_loopback


# ---- limits ------------------------------------------------------------------------------------------------


def statuses(server: Server, *clients: str, command: str = "ping") -> list[int]:
    """The statuses of a run for each of these clients."""
    return [server.run(command, headers={"X-Forwarded-For": client}).status_code for client in clients]


def status_and_rate(answer: httpx.Response) -> tuple[int, str, str]:
    """The status, the rate limit, and what is left of it."""
    return answer.status_code, answer.headers["X-RateLimit-Limit"], answer.headers["X-RateLimit-Remaining"]


def test_rate_limit_of_each_command_is_counted_down_to_429(serve: Start) -> None:
    server = serve(tools={"ping": ECHO, "mtr": ECHO}, RATE_LIMIT_DIAGNOSTICS="2/minute")
    first, second, refused, other = (server.run(command) for command in ("ping", "ping", "ping", "mtr"))
    assert (status_and_rate(first), status_and_rate(second)) == ((200, "2", "1"), (200, "2", "0"))
    assert (status_and_rate(refused), status_and_rate(other)) == ((429, "2", "0"), (200, "2", "1"))
    assert 0 < int(first.headers["X-RateLimit-Reset"]) - time.time() <= 61
    assert 0 < int(refused.headers["Retry-After"]) <= 60
    assert refused.json() == {"error": "Rate limit exceeded: 2 per 1 minute"}


def test_422_after_the_check_of_the_rate_limit_has_its_headers(serve: Start) -> None:
    refused = serve(RATE_LIMIT_DIAGNOSTICS="2/minute").run("ping", "10.0.0.1")
    assert status_and_rate(refused) == (422, "2", "2")


def test_refused_requests_do_not_postpone_the_next_allowed_one(serve: Start) -> None:
    server = serve(tools={"ping": ECHO}, RATE_LIMIT_DIAGNOSTICS="1/2 second")
    begun = time.time()
    assert server.run("ping").status_code == 200
    retry_at = time.time() + int(server.run("ping").headers["Retry-After"])
    asked = time.time()
    while server.run("ping").status_code == 429:
        assert asked < retry_at
        time.sleep(0.1)
        asked = time.time()
    assert time.time() - begun >= 2


def test_headers_and_the_refusal_are_of_the_tightest_of_several_rates(serve: Start) -> None:
    server = serve(tools={"ping": ECHO}, RATE_LIMIT_DIAGNOSTICS="1/second;3/hour")
    answers = (server.run("ping") for _ in itertools.count())
    *_, third = itertools.islice((each for each in answers if each.status_code == 200), 3)
    refused = next(answers)
    assert (status_and_rate(third), status_and_rate(refused)) == ((200, "3", "0"), (429, "3", "0"))
    assert refused.json() == {"error": "Rate limit exceeded: 3 per 1 hour"}
    assert int(refused.headers["Retry-After"]) > 3000


def test_without_a_rate_limit_answers_have_no_headers_of_one(echo: Server) -> None:
    answers = [echo.run("ping") for _ in range(10)]
    assert {(each.status_code, "X-RateLimit-Limit" in each.headers) for each in answers} == {(200, False)}


def test_request_that_starts_no_tool_costs_nothing_of_the_rate_limit(serve: Start) -> None:
    server = serve(tools={"ping": ECHO}, names=NAMES, RATE_LIMIT_DIAGNOSTICS="1/hour")
    targets = ("127.1", "::1", "10.0.0.1", "inside.example", "nowhere.example", "broken.example")
    refused = [server.run("ping", target) for target in targets]
    refused += [server.http.post("/lookingglass/ping", content=body) for body in (b"{", bytes(5000))]
    assert [answer.status_code for answer in refused] == [422] * 7 + [413]
    assert status_and_rate(server.run("ping")) == (200, "1", "0")


def test_tool_that_is_missing_costs_nothing_of_the_rate_limit(serve: Start) -> None:
    server = serve(PATH="/nonexistent", RATE_LIMIT_DIAGNOSTICS="1/hour")
    assert [status_and_rate(server.run("ping")) for _ in range(3)] == [(503, "1", "1")] * 3


def test_addresses_cost_nothing_of_the_limit_for_lookups(serve: Start) -> None:
    server = serve(tools={"ping": ECHO}, names=NAMES, RATE_LIMIT_LOOKUPS="1/hour")
    targets = ("127.0.0.1", "127.0.0.1", "here.example")
    assert [server.run("ping", target).status_code for target in targets] == [200, 200, 200]


def test_client_over_its_rate_limit_has_no_name_looked_up(serve: Start) -> None:
    server = serve(tools={"ping": ECHO}, names=NAMES, RATE_LIMIT_DIAGNOSTICS="1/hour")
    answers = [server.run("ping", "here.example").status_code for _ in range(3)]
    assert (answers, server.lookups) == ([200, 429, 429], ["here.example"])


@pytest.mark.parametrize(
    ("client", "status", "advice", "remaining"),
    [("127.0.0.2", 429, "wait until one has ended", "6"), ("127.0.0.3", 503, "try again soon", "7")],
)
def test_request_without_a_free_slot_is_refused_and_costs_nothing(
    serve: Start, client: str, status: int, advice: str, remaining: str
) -> None:
    slots = {"MAX_DIAGNOSTICS": "3", "MAX_DIAGNOSTICS_PER_CLIENT": "2"}
    server = serve(tools={"ping": SILENT}, RATE_LIMIT_DIAGNOSTICS="9/hour", **slots)
    held = [server.begin(source=source) for source in ("127.0.0.2", "127.0.0.2", "127.0.0.3")]
    until(lambda: slots_taken(server) == 3)
    refused = server.run("ping", headers={"X-Forwarded-For": client})
    assert (refused.status_code, advice in refused.json()["error"]) == (status, True)
    assert int(refused.headers["Retry-After"]) > 0
    for connection in held:
        connection.close()
    until(lambda: not slots_taken(server))
    server.stand_in("ping", ECHO)
    assert status_and_rate(server.run("ping", headers={"X-Forwarded-For": client})) == (200, "9", remaining)


def test_ipv6_clients_are_limited_by_their_64(serve: Start) -> None:
    server = serve(tools={"ping": ECHO}, RATE_LIMIT_DIAGNOSTICS="1/hour")
    clients = ("2001:db8:0:1::1", "2001:db8:0:1:ffff::2", "2001:db8:0:2::1", "192.0.2.1", "192.0.2.2")
    assert statuses(server, *clients) == [200, 429, 200, 200, 200]


def test_ipv6_clients_have_slots_by_their_64(serve: Start) -> None:
    server = serve(tools={"ping": SILENT, "mtr": ECHO}, MAX_DIAGNOSTICS_PER_CLIENT="1")
    body, headers = {"target": "127.0.0.1"}, {"X-Forwarded-For": "2001:db8:0:1::1"}
    with server.http.stream("POST", "/lookingglass/ping", json=body, headers=headers):
        answers = statuses(server, "2001:db8:0:1:ffff::2", "2001:db8:0:2::1", command="mtr")
    assert answers == [429, 200]


@pytest.mark.parametrize(
    ("trusted", "headers", "client"),
    [
        ("127.0.0.1", {"X-Forwarded-For": "192.0.2.9"}, "192.0.2.9"),
        # The client sent the first.
        ("127.0.0.1", {"X-Forwarded-For": "198.51.100.1, 192.0.2.9"}, "192.0.2.9"),
        ("127.0.0.0/8,10.0.0.0/8", {"X-Forwarded-For": "192.0.2.9, 10.0.0.1"}, "192.0.2.9"),
        ("127.0.0.0/8,10.0.0.0/8", {"X-Forwarded-For": "10.0.0.9, 10.0.0.1"}, "127.0.0.1"),
        ("127.0.0.1", {"X-Forwarded-For": "192.0.2.9:4711"}, "192.0.2.9"),
        ("127.0.0.1", {"X-Forwarded-For": "[2001:db8::9]:4711"}, "2001:db8::9"),
        ("127.0.0.1", {"X-Forwarded-For": "[2001:db8::9]"}, "2001:db8::9"),
        ("127.0.0.1", {"X-Forwarded-For": "2001:DB8:0::9"}, "2001:db8::9"),
        ("127.0.0.1", {"X-Forwarded-For": "::ffff:192.0.2.9"}, "192.0.2.9"),
        ("127.0.0.1", {"X-Real-IP": "192.0.2.9"}, "192.0.2.9"),
        ("127.0.0.1", {"X-Forwarded-For": "192.0.2.8", "X-Real-IP": "192.0.2.9"}, "192.0.2.8"),
        ("127.0.0.1", {"X-Forwarded-For": "127.0.0.1", "X-Real-IP": "192.0.2.9"}, "127.0.0.1"),
        ("127.0.0.1", {"X-Forwarded-For": "unknown", "X-Real-IP": "192.0.2.9"}, "127.0.0.1"),
        ("127.0.0.1", {"X-Forwarded-For": "192.0.2.9, <script>"}, "127.0.0.1"),
        ("127.0.0.1", {"X-Forwarded-For": "", "X-Real-IP": "localhost"}, "127.0.0.1"),
        ("127.0.0.1", {"X-Forwarded-For": "192.0.2.9%lo"}, "127.0.0.1"),
        ("192.0.2.1", {"X-Forwarded-For": "192.0.2.9", "X-Real-IP": "192.0.2.9"}, "127.0.0.1"),
        ("", {"X-Forwarded-For": "192.0.2.9", "X-Real-IP": "192.0.2.9"}, "127.0.0.1"),
    ],
)
def test_client_is_the_peer_or_who_a_trusted_proxy_forwards_for(
    shared: Start, trusted: str, headers: dict[str, str], client: str
) -> None:
    server = shared(FORWARDED_ALLOW_IPS=trusted)
    assert server.http.get("/network/info", headers=headers).json()["your_ip"] == client


@pytest.mark.parametrize(("trusted", "scheme"), [("127.0.0.1", "https"), ("192.0.2.1", "http")])
def test_scheme_is_taken_from_a_trusted_proxy_only(shared: Start, trusted: str, scheme: str) -> None:
    server = shared(FORWARDED_ALLOW_IPS=trusted)
    text = server.http.get("/", headers={"X-Forwarded-Proto": "https"}).text
    assert f"{scheme}://127.0.0.1:{server.port}/health" in text


def test_forged_forwarding_header_does_not_evade_the_rate_limit(serve: Start) -> None:
    server = serve(tools={"ping": ECHO}, FORWARDED_ALLOW_IPS="192.0.2.1", RATE_LIMIT_DIAGNOSTICS="1/hour")
    assert statuses(server, "192.0.2.2", "192.0.2.3", "127.0.0.1") == [200, 429, 429]


def test_untrusted_forwarding_header_is_logged_once(serve: Start) -> None:
    server = serve(tools={"ping": ECHO}, FORWARDED_ALLOW_IPS="192.0.2.1")
    for name in ("X-Forwarded-For", "X-Real-IP", "X-Forwarded-For"):
        server.http.get("/network/info", headers={name: "192.0.2.9"})
    (warning,) = [record for record in records_so_far(server) if "FORWARDED_ALLOW_IPS" in record["msg"]]
    assert (warning["level"], warning["peer"]) == ("warning", "127.0.0.1")


# Shared between servers, in a real Redis.


class Redis:
    def __init__(self, folder: Path) -> None:
        self.port, self.folder = free_port(), folder
        self.uri = f"redis://127.0.0.1:{self.port}"
        self.start()

    def start(self, *options: str) -> None:
        line = ["redis-server", "--port", str(self.port), "--save", "", "--dir", str(self.folder), *options]
        self.process = subprocess.Popen(line, stdout=subprocess.DEVNULL)
        until(self.is_up)

    def is_up(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(5) == b"+PONG"
        return False

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    if not shutil.which("redis-server"):
        lacking("the command redis-server")
    if not importlib.util.find_spec("redis"):
        lacking("the package redis")
    server = Redis(tmp_path)
    yield server
    server.stop()


def test_replicas_share_their_rate_limits_in_redis(serve: Start, redis: Redis) -> None:
    options = {"RATE_LIMIT_DIAGNOSTICS": "3/hour;100/day", "RATE_LIMIT_STORAGE_URI": redis.uri}
    servers = [serve(tools={"ping": ECHO}, **options) for _ in range(2)]
    answers = [status_and_rate(servers[number % 2].run("ping")) for number in range(5)]
    assert answers == [(200, "3", "2"), (200, "3", "1"), (200, "3", "0"), (429, "3", "0"), (429, "3", "0")]


@pytest.fixture
def with_redis(serve: Start, redis: Redis) -> Server:
    """A server that has a store and has asked it once."""
    options = {"RATE_LIMIT_DIAGNOSTICS": "2/hour", "RATE_LIMIT_STORAGE_URI": redis.uri}
    server = serve(tools={"ping": ECHO}, constants={"STORE_RETRY_SECONDS": 3}, **options)
    assert server.run("ping").status_code == 200
    return cast(Server, server)


def test_redis_that_hangs_delays_one_request_by_2_s_and_limits_are_kept_in_memory(
    with_redis: Server, redis: Redis
) -> None:
    redis.process.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    assert [with_redis.run("ping").status_code for _ in range(3)] == [200, 200, 429]
    assert 2 <= time.monotonic() - begun < 4


def test_redis_is_used_again_when_it_is_back_and_both_are_logged_once(
    with_redis: Server, redis: Redis
) -> None:
    redis.stop()
    assert [with_redis.run("ping").status_code for _ in range(3)] == [200, 200, 429]
    redis.start()  # and empty
    until(lambda: with_redis.run("ping").status_code == 200)
    log = logged(with_redis)
    assert [log.count(f"The rate-limit store {what}") for what in ("fails", "answers again")] == [1, 1]


@pytest.mark.parametrize("scheme", ["redis", "redis+cluster"])
def test_server_starts_without_its_store_and_logs_its_failure_once(
    serve: Start, redis: Redis, scheme: str
) -> None:
    redis.stop()
    uri = redis.uri.replace("redis", scheme)
    options = {"RATE_LIMIT_DIAGNOSTICS": "1/hour", "RATE_LIMIT_STORAGE_URI": uri}
    server = serve(tools={"ping": ECHO}, constants={"STORE_RETRY_SECONDS": 0}, spawned=False, **options)
    assert [server.run("ping").status_code for _ in range(2)] == [200, 429]
    assert server.log.count("The rate-limit store fails") == 1


def test_redis_cluster_is_used_when_it_is_up(serve: Start, redis: Redis) -> None:
    redis.stop()
    uri = redis.uri.replace("redis", "redis+cluster")
    options = {"RATE_LIMIT_DIAGNOSTICS": "3/hour", "RATE_LIMIT_STORAGE_URI": uri}
    constants = {"STORE_RETRY_SECONDS": 0}
    servers = [serve(tools=every_tool(ECHO), constants=constants, **options) for _ in range(2)]
    redis.start("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    with socket.create_connection(("127.0.0.1", redis.port)) as connection:
        connection.sendall(b"CLUSTER ADDSLOTSRANGE 0 16383\r\n")
        assert connection.recv(5) == b"+OK\r\n"
    until(lambda: all(server.run("mtr") and "store answers again" in server.log for server in servers))
    assert [servers[number % 2].run("ping").status_code for number in range(4)] == [200, 200, 200, 429]


# ---- the life of a process ---------------------------------------------------------------------------------

SCRIPTS = {"endless": ENDLESS, "silent": SILENT, "stubborn": STUBBORN, "forking": FORKING}
FLOODING = "#!/bin/sh\nexec yes $(printf %01000d 0)\n"
# It has a child in a group of its own, as a newer mtr has, and one that forks while it is killed.
SPREADING = """#!/bin/bash
if [ "$1" = again ]; then [ $2 = 0 ] || { sleep 0.01; "$0" again $(($2 - 1)) & }; exit; fi
set -m
"$0" again 2000 &
sleep 1000 &
"""


def session_members(leader: int) -> dict[int, int]:
    """The living members of a session, with their groups; zombies wait for the server or for init."""
    found = {}
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208
    for pid in sorted(pids, reverse=True):  # the youngest first: it may fork and exit during the search
        with contextlib.suppress(OSError):  # it has ended
            stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
            state, _, group, session, *_ = stat.rpartition(") ")[2].split()
            if int(session) == leader and state not in "ZX":
                found[pid] = int(group)
    return found


def start_run(server: Server, command: str = "ping") -> tuple[socket.socket, int]:
    """A connection on which a command runs, and the process group of its tool."""
    connection = server.begin(command, address := lone_address())
    return connection, group_of(address)


def leave(connection: socket.socket, with_reset: bool) -> None:
    if with_reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


MORE = {"line": b"\r\n", "byte": b"G", "request": HEALTH, "flood": bytes(200_000)}


@pytest.mark.parametrize("with_reset", [False, True], ids=["FIN", "RST"])
@pytest.mark.parametrize("case", [*SCRIPTS, *MORE])
def test_client_that_leaves_ends_its_processes(serve: Start, case: str, with_reset: bool) -> None:
    """Also one that has sent more, which nobody reads."""
    server = serve(tools={"ping": SCRIPTS.get(case, SILENT)})
    connection, group = start_run(server)
    connection.sendall(MORE.get(case, b""))
    server.answer_seconds()  # so that it has read the above
    leave(connection, with_reset)
    until(lambda: not members(group), SOON)


def slots_taken(server: Server) -> float:
    return scrape(server)['lg_slots_taken{kind="command"}']


@pytest.mark.parametrize("way", ["done", "client gone", "time", "output", "stop"])
def test_end_of_a_run_ends_its_session_and_frees_its_slot(serve: Start, gate: Gate, way: str) -> None:
    last = {"done": "exit", "output": "exec yes " + "x" * 1000}.get(way, "sleep 1000")
    seconds = 8 if way == "time" else 0  # a busy machine may need more than 3 s to start the tool
    limit = {"DIAGNOSTIC_TIMEOUT": str(seconds)} if seconds else {}
    tools = {"ping": SPREADING + gate.wait + last, "mtr": ECHO}
    server = serve(tools=tools, MAX_DIAGNOSTICS="1", **limit)
    connection, leader = start_run(server)
    until(lambda: len(set(session_members(leader).values()) - {leader}) == 2)
    gate.open()
    if way == "client gone":
        connection.close()
    elif way == "stop":
        server.close()
    until(lambda: not session_members(leader), SOON + seconds)
    if way != "stop":
        until(lambda: server.run("mtr").status_code == 200, SOON)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOSYS])
def test_end_of_a_tool_is_noticed_without_pidfd(
    serve: Start, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "pidfd_open", Mock(side_effect=OSError(number, os.strerror(number))))
    server = serve(tools={"ping": "#!/bin/sh\nsleep 0.2\nexit 3\n", "mtr": SILENT})
    assert server.run("ping").text == "--- ping: exit status 3 ---\n"
    connection, group = start_run(server, "mtr")
    connection.close()
    until(lambda: not members(group), SOON)


def shell(line: str) -> tuple[str, ...]:
    """The server's command, after a line of shell."""
    return ("sh", "-c", f'{line}; exec "$@"', "sh", sys.executable, "lg.py")


def test_exit_status_is_reported_where_the_parent_ignores_its_children(serve: Start) -> None:
    code = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN); import lg; lg.main()"
    server = serve(command=(sys.executable, "-c", code), tools={"ping": "#!/bin/sh\nexit 3\n"})
    assert server.run("ping").text == "--- ping: exit status 3 ---\n"


def test_server_opens_as_many_files_as_the_machine_lets_it(serve: Start, many_files: int) -> None:
    server = serve(command=shell("ulimit -S -n 300"))
    held = [server.connect() for _ in range(400)]
    assert all(map(connected, held))


def test_client_that_leaves_ends_the_generator_of_its_answer() -> None:
    """Not the garbage collector, at some time later."""
    gone, ended = asyncio.Event(), asyncio.Event()

    async def blocks() -> AsyncGenerator[bytes]:
        try:
            while True:
                yield b"block"
                gone.set()
                await asyncio.sleep(0)
        finally:
            await asyncio.sleep(0)
            ended.set()

    async def receive() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def answer() -> bool:
        source: lg.StreamSource = contextlib.nullcontext(({}, blocks()))
        await lg.StreamedResponse(source, {})({}, receive, AsyncMock())
        return ended.is_set()

    assert outcome(answer())


def test_real_mtr_leaves_no_process_behind(serve: Start) -> None:
    mtr = shutil.which("mtr")
    if not mtr or subprocess.run([mtr, "-nrc1", "127.0.0.1"], capture_output=True).returncode:
        lacking("an mtr that this user may run")
    connection, group = start_run(serve(), "mtr")
    until(lambda: len(members(group)) > 1)  # mtr-packet
    connection.close()
    until(lambda: not members(group), SOON)


def test_client_that_leaves_during_a_lookup_frees_its_slot(serve: Start) -> None:
    server = serve(tools={"ping": ECHO}, names={"slow.example": "hang"}, MAX_DIAGNOSTICS="1")
    connection = server.begin("ping", "slow.example")
    until(lambda: server.lookups == ["slow.example"])
    assert server.run("ping").status_code == 503
    connection.close()
    until(lambda: server.run("ping").status_code == 200, lg.RESOLVE_SECONDS - 1)


def test_name_that_is_not_resolved_in_time_is_422(serve: Start) -> None:
    server = serve(names={"slow.example": "hang"}, constants={"RESOLVE_SECONDS": 1})
    response = server.run("ping", "slow.example")
    assert (response.status_code, "within 1 s" in response.text) == (422, True)


def test_slow_names_delay_neither_addresses_nor_other_services(serve: Start) -> None:
    slots = dict.fromkeys(("MAX_DIAGNOSTICS", "MAX_DIAGNOSTICS_PER_CLIENT"), "150")
    names = {"slow.example": "hang", **NAMES}
    server = serve(tools={"ping": ECHO}, names=names, **slots)
    other = serve(tools={"ping": ECHO}, names=NAMES)
    held = [server.begin("ping", "slow.example") for _ in range(lg.LOOKUP_THREADS)]
    until(lambda: len(server.lookups) == len(held))
    begun = time.monotonic()
    assert server.run("ping").status_code == 200
    assert time.monotonic() - begun < lg.RESOLVE_SECONDS - 1
    refused = server.run("ping", "here.example")
    assert (refused.status_code, "cannot look up here.example now" in refused.text) == (422, True)
    assert len(server.lookups) == lg.LOOKUP_THREADS
    assert other.run("ping", "here.example").status_code == 200


def test_ping_prints_its_summary_at_the_time_limit(serve: Start) -> None:
    if not shutil.which("ping"):
        lacking("the command ping")
    text = serve(DIAGNOSTIC_TIMEOUT="2").run("ping").text
    if "Operation not permitted" in text or "exit status" in text:
        lacking("a ping that this user may run")
    assert re.search(r" packets transmitted, \d received.*\n.*\n--- ping: stopped after 2 s ---\n$", text)


@pytest.mark.parametrize("script", SCRIPTS)
def test_time_limit_ends_the_answer_and_the_processes(serve: Start, script: str) -> None:
    tool = SCRIPTS[script].replace("\n", '\necho $$ > "$0.pid"\n', 1)
    server = serve(tools={"ping": tool}, DIAGNOSTIC_TIMEOUT="1")
    assert server.run("ping").text.endswith("--- ping: stopped after 1 s ---\n")
    assert not members(int((server.folder / "bin" / "ping.pid").read_text()))


def test_output_is_cut_at_1_mib_and_the_tool_ended(shared: Start) -> None:
    text = shared(tools={"ping": FLOODING}).run("ping", address := lone_address()).text
    assert len(text.removesuffix("\n--- ping: output cut at 1 MiB ---\n")) in (2**20, 2**20 - 1)
    assert not running(address)


@pytest.mark.parametrize("setsid", ["", "setsid"], ids=["its session", "another session"])
def test_child_with_the_pipe_open_does_not_delay_the_end(serve: Start, setsid: str) -> None:
    seconds = f"{1000 + secrets.randbelow(10**6)}.5"
    server = serve(tools={"ping": f"#!/bin/sh\n{setsid} sleep {seconds} &\nsleep 0.2\necho done\n"})
    text = server.run("ping").text
    for pid in running(f"sleep {seconds}"):
        os.kill(pid, signal.SIGKILL)
    assert text == "done\n"


def test_tool_that_closes_its_output_and_runs_on_is_stopped_at_the_time_limit(serve: Start) -> None:
    script = "#!/bin/sh\necho closed\nexec >&- 2>&-\nsleep 1000\n"
    server = serve(tools={"ping": script}, DIAGNOSTIC_TIMEOUT="1")
    assert server.run("ping").text == "closed\n--- ping: stopped after 1 s ---\n"


def test_large_output_as_events_gives_way_to_other_requests(serve: Start) -> None:
    """400,000 empty lines take a second to be made events, in 7 pieces: none may hold the loop for long."""
    flood = "#!/bin/sh\nyes '' | head -c 400000\n"
    server = serve(tools={"lines": flood}, EXTRA_COMMANDS='{"lines": "lines {address}"}')
    events = {"Accept": lg.EVENTS_TYPE}
    reader = threading.Thread(target=server.run, args=("lines",), kwargs={"headers": events})
    reader.start()
    answers = 0
    while reader.is_alive():
        server.answer_seconds()
        answers += 1
    assert answers >= 4


def test_client_that_does_not_read_holds_neither_slot_nor_process(serve: Start) -> None:
    server = serve(tools={"ping": FLOODING, "mtr": ECHO}, MAX_DIAGNOSTICS="1")
    with server.begin("ping", address := lone_address(), receive_bytes=4096):
        until(lambda: 'outcome="output cut at 1 MiB"' in server.log)
        assert (running(address), server.run("mtr").status_code) == ([], 200)


def test_200_clients_that_leave_at_random_leave_no_process_descriptor_or_slot(serve: Start) -> None:
    slots = dict.fromkeys(("MAX_DIAGNOSTICS", "MAX_DIAGNOSTICS_PER_CLIENT"), "20")
    tools = {"ping": ENDLESS, "traceroute": FORKING, "mtr": STUBBORN}
    server = serve(spawned=True, tools=tools, names=NAMES, COMMANDS="ping,traceroute6,mtr", **slots)
    until(server.idle)  # the tools have been tried
    before = server.descriptors()

    def visit(number: int) -> None:
        chance = random.Random(number)  # noqa: S311
        command = chance.choice(("ping", "traceroute6", "mtr"))
        target = chance.choice(("here.example", "::1" if command == "traceroute6" else "127.0.0.1"))
        connection = server.begin(command, target)
        with contextlib.suppress(TimeoutError):
            connection.settimeout(chance.random() * 0.3 + 0.001)
            for _ in range(chance.randrange(4)):
                connection.recv(64)
        leave(connection, with_reset=chance.choice((False, True)))

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(visit, range(200)))
    until(server.idle)
    until(lambda: server.descriptors() <= before)
    until(lambda: not slots_taken(server))


@pytest.mark.parametrize(
    ("number", "status", "commands"),
    [
        (signal.SIGTERM, -signal.SIGTERM, ("ping", "mtr") * 3),
        (signal.SIGINT, 0, ("mtr",)),
        (signal.SIGHUP, -signal.SIGTERM, ("mtr",)),
    ],
    ids=["SIGTERM", "SIGINT", "SIGHUP"],
)
def test_signal_ends_a_busy_server_its_processes_and_its_answers(
    serve: Start, number: int, status: int, commands: tuple[str, ...]
) -> None:
    tools = {"ping": STUBBORN, "mtr": FORKING}
    server = serve(spawned=True, tools=tools, MAX_DIAGNOSTICS_PER_CLIENT="20")
    runs = [start_run(server, command) for command in commands]
    downloads = [unread_download(server) for _ in range(3)]
    reader = threading.Thread(target=left, args=(downloads[0],))
    reader.start()
    begun = time.monotonic()
    server.process.send_signal(number)
    assert server.process.wait(PATIENCE) == status
    assert time.monotonic() - begun < 10
    reader.join()
    assert [pid for _, group in runs for pid in members(group)] == []
    for connection, _ in runs:
        assert re.search(rb"stopped, the server is shutting down ---\n\r\n0\r\n\r\n$", left(connection))


def test_second_sigint_is_no_error(serve: Start) -> None:
    server = serve(spawned=True, tools={"ping": STUBBORN})
    connection, _ = start_run(server)
    server.process.send_signal(signal.SIGINT)
    assert b"shutting down" in left(connection)
    server.process.send_signal(signal.SIGINT)
    server.process.wait(PATIENCE)
    assert not re.search("level=error|Traceback|Cancelled", server.log), server.log


@pytest.mark.parametrize("is_found", [False, True], ids=["never", "during the stop"])
def test_stop_answers_503_to_a_request_whose_name_is_being_resolved(serve: Start, is_found: bool) -> None:
    server = serve(tools={"ping": STUBBORN}, names={"slow.example": "hang"})
    connection = server.begin("ping", "slow.example")
    until(lambda: server.lookups)
    server.server.should_exit = True
    until(lambda: "msg=stopping" in server.log)
    if is_found:
        server.go_on.set()
    assert re.match(rb"(?s)HTTP/1.1 503 .*\r\nretry-after: ", left(connection))


def test_stop_does_not_wait_for_an_incomplete_body(serve: Start) -> None:
    server = serve()
    connection = server.send(request_to("POST /lookingglass/ping", "Content-Length: 20", body=b"target="))
    server.answer_seconds()  # so that it has read the above
    begun = time.monotonic()
    server.close()
    left(connection)
    assert time.monotonic() - begun < SOON < lg.BODY_SECONDS


# ---- slow and hostile clients ------------------------------------------------------------------------------

CHUNKED = "Transfer-Encoding: chunked"


def request_to(what: str, *fields: str, body: bytes = b"") -> bytes:
    """An HTTP request: its method and path, its header fields beside that of the host, and its body."""
    return "\r\n".join([f"{what} HTTP/1.1", "Host: lg", *fields, "", ""]).encode() + body


@pytest.fixture(scope="session")
def impatient(shared: Start) -> Server:
    return cast(Server, shared(constants={"REQUEST_HEADER_SECONDS": 1, "IDLE_SECONDS": 3}))


@pytest.mark.parametrize(
    ("answered", "sent", "least", "most"),
    [
        (b"", b"", 0.5, 10),
        (b"", b"GET /health HTTP/1.1\r\nHost: lg\r\nX-", 0.5, 10),
        (HEALTH, b"GET /hea", 0, 2.5),
        (HEALTH, b"", 2.5, 10),
    ],
    ids=["silent", "partial header", "kept, partial header", "kept, idle"],
)
def test_connection_without_a_complete_header_is_closed_at_its_time_limit(
    impatient: Server, answered: bytes, sent: bytes, least: float, most: float
) -> None:
    connection = impatient.send(answered)
    received(connection, b"}" if answered else b"")
    connection.sendall(sent)
    begun = time.monotonic()
    assert left(connection) == b""
    assert least < time.monotonic() - begun < most


def test_trickled_header_does_not_extend_the_time_limit(impatient: Server) -> None:
    connection = impatient.send(b"GET /health HTTP/1.1\r\nX-Filler: ")
    with trickling(connection):
        assert left(connection) == b""


def test_idle_connection_outlives_that_of_a_proxy() -> None:
    """Otherwise a proxy, which keeps its own for 60 s, sends requests into closing connections."""
    assert lg.IDLE_SECONDS > 60


def test_client_that_sends_more_and_half_closes_during_a_lookup_is_no_error(serve: Start) -> None:
    server = serve(tools={"ping": ECHO}, names={"slow.example": "hang"})
    connection = server.begin(target="slow.example")
    until(lambda: server.lookups)
    connection.sendall(b"and more")
    connection.shutdown(socket.SHUT_WR)
    assert left(connection) == b""
    assert "level=error" not in logged(server)


@contextlib.contextmanager
def flood(server: Server, request: bytes, reading: bool) -> Iterator[None]:
    """Meanwhile, 100 connections send a request over and over, and read the answers or not."""

    def connect() -> tuple[socket.socket, memoryview]:
        connection = server.connect(source="127.0.0.2")
        connection.setblocking(False)
        return connection, memoryview(request)

    def send() -> None:
        while not ended.is_set():
            for number, (connection, rest) in enumerate(sockets):
                try:
                    with contextlib.suppress(BlockingIOError):
                        rest = rest[connection.send(rest) :] or memoryview(request)
                        sockets[number] = connection, rest
                    with contextlib.suppress(BlockingIOError):
                        if reading and not connection.recv(2**20):
                            raise ConnectionResetError
                except OSError:  # it was refused
                    connection.close()
                    with contextlib.suppress(ConnectionError):  # the server has not closed the old one yet
                        sockets[number] = connect()

    sockets, ended = [connect() for _ in range(100)], threading.Event()
    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for connection, _ in sockets:
            connection.close()


NAME = json.dumps({"target": "".join(chr(0x4E00 + 7 * number) for number in range(253))}).encode()
CHUNKS = b"1\r\nx\r\n" * 10_800
WORST = {
    "chunks of one byte": request_to("POST /health", CHUNKED, body=CHUNKS),
    "chunks of a command": request_to("POST /lookingglass/ping", CHUNKED, body=CHUNKS),
    "chunks of an upload": request_to("POST /speedtest/upload", CHUNKED, body=CHUNKS),
    "short headers": request_to("GET /health", *["a:b"] * 3000),
    "a name of one long label": request_to(
        "POST /lookingglass/ping", f"Content-Length: {len(NAME)}", body=NAME
    ),
    "the page": request_to("GET /", "Accept: text/html", "Accept-Encoding: gzip"),
    "unread answers": HEALTH * 100,
}


@pytest.mark.parametrize("name", WORST)
def test_worst_that_100_connections_can_repeat_does_not_delay_others(shared: Start, name: str) -> None:
    """In processor time of the server, which other tests do not change; it took 8.4 s to parse each chunk."""
    server = shared(spawned=True, FORWARDED_ALLOW_IPS="192.0.2.1", RATE_LIMIT_DIAGNOSTICS="1/day")
    seconds = []
    with flood(server, WORST[name], reading=name != "unread answers"):
        for _ in range(9):
            before = processor_seconds(server.process.pid)
            server.answer_seconds()
            seconds.append(processor_seconds(server.process.pid) - before)
    assert median(seconds) <= 0.15


def test_unread_answers_of_pipelined_requests_take_little_memory(serve: Start) -> None:
    server = serve(spawned=True, FORWARDED_ALLOW_IPS="192.0.2.1")
    before = resident(server.process.pid)
    with flood(server, request_to("GET /openapi.json") * 1000, reading=False):
        for _ in range(20):
            server.answer_seconds()
        assert resident(server.process.pid) - before < 10


def header_of(length: int, lines: int) -> bytes:
    """A request for /health whose header has so many bytes and lines, the empty one at its end included."""
    fields = ["a: b"] * (lines - 4)
    filler = "x: ".ljust(length - len(request_to("GET /health", *fields)) - 2, "x")
    return request_to("GET /health", *fields, filler)


def send_cut(server: Server, request: bytes, size: int) -> socket.socket:
    """A connection on which a request was sent in pieces of this size."""
    connection = server.connect()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(ConnectionError):  # it may be refused already
        for start in range(0, len(request), size):
            connection.sendall(request[start : start + size])
    return connection


CUTS = pytest.mark.parametrize("size", [2**20, 1000, 7])


@CUTS
@pytest.mark.parametrize(
    ("length", "lines", "status"),
    [(2**14, 100, 200), (2**14 + 1, 100, 431), (2**14, 101, 431), (2**20, 10, 431), (10_000, 1000, 431)],
)
def test_header_of_more_than_16_kib_or_100_lines_is_431(
    echo: Server, length: int, lines: int, status: int, size: int
) -> None:
    answer = send_cut(echo, header_of(length, lines), size).recv(65536)
    assert answer.startswith(b"HTTP/1.1 %d " % status)


@CUTS
@pytest.mark.parametrize(("chunks", "status"), [(32, 200), (33, 400)])
def test_body_in_more_than_32_chunks_is_400(echo: Server, chunks: int, status: int, size: int) -> None:
    body = b"target=127.0.0.1".ljust(chunks, b" ")
    sent = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    answer = send_cut(echo, request_to("POST /lookingglass/ping", CHUNKED, body=sent), size).recv(65536)
    assert answer.startswith(b"HTTP/1.1 %d " % status)


def test_body_in_chunks_with_more_than_4_kib_between_them_is_400(echo: Server) -> None:
    sent = b"10;%b\r\ntarget=127.0.0.1\r\n0\r\n\r\n" % bytes(9000).replace(b"\0", b"x")
    answer = echo.send(request_to("POST /lookingglass/ping", CHUNKED, body=sent)).recv(65536)
    assert answer.startswith(b"HTTP/1.1 400 ")


PING = request_to("POST /lookingglass/ping", "Content-Length: 16", body=b"target=127.0.0.1")


def test_request_is_not_parsed_while_the_answer_before_it_is_unread(serve: Start) -> None:
    server = serve(tools={"ping": SILENT})
    with server.send(DOWNLOAD + PING, receive_bytes=4096) as connection:
        assert connection.recv(12) == b"HTTP/1.1 200"
        server.answer_seconds()
        assert slots_taken(server) == 0


@pytest.mark.parametrize(("pipelined", "answers"), [(100, 101), (120, 1)])
def test_of_pipelined_requests_4_kib_are_kept(serve: Start, gate: Gate, pipelined: int, answers: int) -> None:
    server = serve(tools={"ping": f"#!/bin/sh\n{gate.wait}"})
    connection = server.begin()
    connection.sendall(HEALTH * (pipelined - 1) + request_to("GET /health", "Connection: close"))
    server.answer_seconds()  # so that it has read the above
    gate.open()
    assert left(connection).count(b"HTTP/1.1 200 OK") == answers


def connected(connection: socket.socket) -> bool:
    """Whether a request on this connection is answered, rather than the connection reset."""
    try:
        connection.sendall(HEALTH)
        return received(connection, b"}").startswith(b"HTTP/1.1 200 ")
    except ConnectionError:
        return False


def admits(server: Server, source: str) -> bool:
    """Whether a new connection from this address is kept, rather than reset."""
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    try:
        with server.connect(family, source=source) as connection:
            return connected(connection)
    except ConnectionError:  # the reset may come before `connect` has returned
        return False


@pytest.fixture
def many_files() -> Iterator[int]:
    """This process may open as many files as the machine lets it: so many."""
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    yield most
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))


def test_client_has_100_connections_and_more_are_reset(serve: Start, many_files: int) -> None:
    server, one, another = serve(FORWARDED_ALLOW_IPS="192.0.2.1"), "127.0.0.2", "127.0.0.3"
    held = [server.connect(source=one) for _ in range(100)]
    assert all(map(connected, held))
    assert [admits(server, source) for source in (one, one, one, another)] == [False, False, False, True]
    assert all(map(connected, held))
    held.pop().close()
    until(lambda: admits(server, one))


def test_burst_of_connections_leaves_descriptors(serve: Start, many_files: int) -> None:
    """They wait in the kernel's queue while the server is stopped, as they do while it is busy."""
    server = serve(descriptors=300, FORWARDED_ALLOW_IPS="192.0.2.1")
    server.process.send_signal(signal.SIGSTOP)
    burst = [server.connect(source="127.0.0.2") for _ in range(min(1000, many_files - 200))]
    server.process.send_signal(signal.SIGCONT)
    server.answer_seconds()
    assert "out of system resource" not in server.log
    del burst


def test_ipv6_clients_have_connections_by_their_64(serve: Start, hops: tuple[str, ...]) -> None:
    server = serve(prefix=hops, constants={"MAX_CONNECTIONS_PER_CLIENT": 2})
    sources = ["2001:db8:64:1::1", "2001:db8:64:1::2", "2001:db8:64:1::3", "2001:db8:64:2::1"]
    for source in sources:
        subprocess.run([*hops, "ip", "address", "replace", source, "dev", "lo"], check=True)
    held = [server.connect(socket.AF_INET6, source=source) for source in sources[:2]]
    assert all(map(connected, held))
    assert [admits(server, source) for source in sources[2:]] == [False, True]


def test_start_warns_where_few_files_may_be_open(serve: Start) -> None:
    log = (serve(descriptors=300).folder / "log").read_text()
    assert [line.endswith("connections=40 wanted=4000\n") for line in FEW_FILES.findall(log)] == [True]


def test_trusted_proxy_may_have_more_connections_than_a_client(serve: Start, many_files: int) -> None:
    server = serve(FORWARDED_ALLOW_IPS="127.0.0.9")
    held = [server.connect(source="127.0.0.9") for _ in range(150)]
    assert all(map(connected, held))


Crowd = tuple[Server, list[socket.socket]]


@pytest.fixture(
    params=[(10_000, {"MAX_CONNECTIONS": 10}), (256, {"RESERVED_FILES": 186})], ids=["bound", "files"]
)
def crowded(serve: Start, request: pytest.FixtureRequest) -> Crowd:
    """A server that may have 10 connections, and has them, from 10 addresses; the first runs a command."""
    files, constants = request.param
    server = serve(tools={"ping": ENDLESS}, constants=constants, descriptors=files, MAX_DIAGNOSTICS="20")
    server.http.close()
    running, *waiting = [server.connect(source=f"127.0.0.{number}") for number in range(2, 12)]
    running.sendall(PING)
    assert all(map(connected, waiting))
    return server, [running, *waiting]


EXPECT = "Expect: 100-continue"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"", b""),
        (b"GET /health HTTP/1.1\r\n", b""),
        (request_to("POST /lookingglass/ping", EXPECT, "Content-Length: 100"), CONTINUE),
    ],
    ids=["idle", "half a header", "no body"],
)
def test_newcomer_takes_the_place_of_the_connection_that_waited_longest(
    crowded: Crowd, sent: bytes, answer: bytes
) -> None:
    server, (_, longest, *others) = crowded
    longest.sendall(sent)
    assert received(longest, answer) == answer
    assert [admits(server, "127.0.1.1") for _ in range(2)] == [True, True]
    assert [connected(connection) for connection in (longest, *others)] == [False, *[True] * 8]


def test_connections_with_a_run_or_an_upload_are_not_reset(crowded: Crowd) -> None:
    server, (run, upload, *_) = crowded
    upload.sendall(request_to("POST /speedtest/upload", EXPECT, "Content-Length: 10000"))
    assert received(upload, CONTINUE) == CONTINUE
    assert all(admits(server, "127.0.1.1") for _ in range(20))
    upload.sendall(bytes(10_000))
    assert received(upload, b"}").startswith(b"HTTP/1.1 200 ")
    assert received(run, b"line\n\r\n").startswith(b"HTTP/1.1 200 ")


def test_thousand_idle_connections_do_not_keep_a_command_from_running(serve: Start, many_files: int) -> None:
    server = serve(spawned=True, tools={"ping": ECHO})
    idle = [server.connect() for _ in range(min(1000, many_files - 200))]  # root may be limited to 1024 files
    for connection in idle[::2]:
        connection.sendall(b"POST /lookingglass/ping HTTP/1.1\r\n")
    assert server.run("ping").status_code == 200


# What nobody reads.


def test_answer_with_most_unread_output_gives_way() -> None:
    unread = lg.UnreadOutput()

    async def steps(mib: int) -> AsyncGenerator[lg.Headers | bytes]:
        yield {}
        yield bytes(mib * 2**20)

    async def read_late(mib: int, late: asyncio.Event) -> int:
        async with unread.run_ahead(steps(mib)) as (_, pieces):
            await late.wait()
            return sum([len(piece) async for piece in pieces]) // 2**20

    async def run() -> list[int | BaseException]:
        late, sizes = asyncio.Event(), (12, 16, 10)
        readers = [asyncio.create_task(read_late(mib, late)) for mib in sizes]
        await asyncio.wait(readers, timeout=0.1)
        late.set()
        return await asyncio.gather(*readers, return_exceptions=True)

    first, most, last = outcome(run())
    assert (first, type(most), last) == (12, lg.TransferAborted, 10)


def test_run_ends_cleanly_if_its_client_leaves_while_it_gives_way() -> None:
    ended = []

    async def steps() -> AsyncGenerator[lg.Headers | bytes]:
        yield {}
        yield bytes(lg.UNREAD_BYTES + 1)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.1)  # its processes end
            ended.append(True)

    async def read() -> None:
        async with lg.interruptible(quietly=True) as leave, lg.UnreadOutput().run_ahead(steps()):
            try:
                await asyncio.sleep(PATIENCE)  # it gives way
            finally:
                asyncio.get_running_loop().call_later(0.05, leave)

    outcome(read())
    assert ended


def test_unread_runs_are_bounded_in_memory(serve: Start) -> None:
    """Of 1 MiB, the kernel takes most: so each writes 16 MiB. Without the bound, these take 300 MiB."""
    extra = json.dumps({"flood": f"yes {{address}} {'x' * 500}"})
    server = serve(constants={"OUTPUT_BYTES": 2**24}, EXTRA_COMMANDS=extra)
    before, held = resident(server.process.pid), []
    for _ in range(24):
        held.append(server.begin("flood", receive_bytes=4096))
        until(lambda: server.log.count("outcome=") == len(held))
    assert resident(server.process.pid) - before < 100  # 32 MiB, and up to 16 of the run in progress


# What is logged, and what is answered.


def logged(server: Server) -> str:
    """The log up to a line that is written now."""
    server.run("ping", target := lone_address())
    until(lambda: target in server.log)
    return str(server.log).partition(f"command=ping target={target}")[0]


MALFORMED = {
    "HTTP/0.9": b"GET /health\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": request_to("GET /health", "Host: b"),
    "a negative length": request_to("POST /lookingglass/ping", "Content-Length: -1"),
    "a long length": request_to("POST /speedtest/upload", "Content-Length: " + "9" * 5000),
    "no number for a length": request_to("POST /health", "Content-Length: x"),
    "two lengths": request_to("POST /health", "Content-Length: 1", "Content-Length: 2", body=b"x"),
    "a length and chunks, in which a request hides": request_to(
        "POST /lookingglass/ping", CHUNKED, f"Content-Length: {5 + len(HEALTH)}", body=b"0\r\n\r\n" + HEALTH
    ),
    "a bad chunk": request_to("POST /lookingglass/ping", CHUNKED, body=b"ZZ\r\n"),
    "a bad chunk from a client that does not wait": request_to(
        "POST /lookingglass/ping", CHUNKED, "Expect: 100-continue", body=b"ZZ\r\n"
    ),
    "a bad chunk that nobody needs": request_to("POST /health", CHUNKED, body=b"ZZ\r\n"),
    "an unknown coding": request_to("POST /health", "Transfer-Encoding: gzip"),
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
    "TLS with the end of a header": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "a null": b"GET /health\0 HTTP/1.1\r\nHost: lg\r\n\r\n",
}
WEBSOCKET = ["Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="]
UNUSUAL = {  # with the status of the answer
    "a long path": (404, request_to("GET /" + "x" * 16000)),
    "a path that is not UTF-8": (404, request_to("GET /%ff%fe")),
    "a URL": (200, b"GET HTTP://other:80/health?a=b HTTP/1.1\r\nHost: lg\r\n\r\n"),
    "an unclosed bracket in the host": (404, b"GET x://[ HTTP/1.1\r\nHost: [\r\n\r\n"),
    "CONNECT": (404, b"CONNECT lg:443 HTTP/1.1\r\nHost: lg\r\n\r\n"),
    "HTTP/1.0": (200, b"GET /health HTTP/1.0\r\n\r\n"),
    "HTTP/1.0, a stream": (200, PING.replace(b"HTTP/1.1\r\nHost: lg", b"HTTP/1.0")),
    "HTTP/7.7": (200, b"GET / HTTP/7.7\r\n\r\n"),
    "empty lines": (200, b"\r\n" * 1000 + HEALTH),
    "an upgrade to WebSocket": (200, request_to("GET /health", "Connection: upgrade", *WEBSOCKET)),
    "an upgrade to h2c": (200, request_to("GET /health", "Connection: upgrade", "Upgrade: h2c")),
    "a long header": (431, header_of(20_000, 100)),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_request_is_400_in_json_and_ends_the_connection(echo: Server, name: str) -> None:
    header, _, body = left(echo.send(MALFORMED[name])).partition(b"\r\n\r\n")
    assert header.startswith(b"HTTP/1.1 400 ")
    assert b"\r\nContent-Type: application/json\r\n" in header
    assert json.loads(body) == {"detail": "Invalid HTTP request received."}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_request_is_answered(echo: Server, name: str) -> None:
    status, request = UNUSUAL[name]
    assert echo.send(request).recv(65536).startswith(b"HTTP/1.1 %d " % status)
    assert echo.http.get("/health").status_code == 200


@pytest.mark.parametrize(
    "name", [*MALFORMED, "HTTP/7.7", "an upgrade to WebSocket", "an upgrade to h2c", "a long header"]
)
def test_upgrades_and_malformed_requests_are_not_logged(shared: Start, name: str) -> None:
    request = MALFORMED.get(name) or UNUSUAL[name][1]
    server = shared(spawned=True, tools=WORKING_TOOLS, FORWARDED_ALLOW_IPS="")
    before = logged(server)
    for _ in range(5):
        connection = server.send(request * 20)
        connection.shutdown(socket.SHUT_WR)
        left(connection)
    assert len(logged(server).splitlines()) == len(before.splitlines()) + 1


def test_half_closed_download_that_nobody_reads_ends_without_an_error(serve: Start) -> None:
    server = serve(tools={"ping": ECHO})
    with unread_download(server) as connection:
        assert scrape(server)["lg_connections"] == 2
        connection.shutdown(socket.SHUT_WR)
        until(lambda: scrape(server)["lg_connections"] == 1)
    until(lambda: "size=10G" in server.log)
    assert "level=error" not in logged(server)


def test_answer_in_one_piece_ends_although_nobody_reads_its_header() -> None:
    """So its connection is waiting, and gives way to others."""

    async def answer() -> bool:
        connection = Mock(writable=asyncio.Event(), server_state=Mock(default_headers=[]))
        exchange = lg.Exchange(connection, b"HEAD /health HTTP/1.1\r\nHost: lg\r\n\r\n")
        async with asyncio.timeout(1):
            await exchange.send({"type": "http.response.start", "status": 200, "headers": []})
            await exchange.send({"type": "http.response.body", "body": b""})
        return exchange.ended

    assert outcome(answer())


def test_client_that_is_gone_before_an_early_answer_is_no_error(serve: Start) -> None:
    server = serve(tools={"ping": ECHO})
    for _ in range(20):
        server.send(request_to("GET /health/", "Content-Length: 5")).close()
    assert "level=error" not in logged(server)


def test_installed_accelerators_are_not_imported(serve: Start, tmp_path: Path) -> None:
    """The bounds are made for h11 and asyncio: with httptools, a request's header would have none."""
    for package in ("httptools", "uvloop"):
        (tmp_path / f"{package}.py").write_text("raise SystemExit('imported')\n")
    server = serve(command=shell(f"PYTHONPATH={shlex.quote(str(tmp_path))}"))
    assert server.http.get("/health").status_code == 200


# Against stock uvicorn.


async def telling_app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers what it was asked, once the body has come, or before for /early."""
    if scope["type"] == "lifespan":
        await receive()
        scope["state"]["connections"] = lg.Connections(DEFAULTS, lg.Proxies(DEFAULTS, lg.Once()))
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    body, more_body = b"", scope["path"] != "/early"
    while more_body:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more_body = body + message["body"], message["more_body"]
    names = ("method", "http_version", "path", "raw_path", "query_string", "headers")
    told = {name: repr(scope[name]) for name in names} | {"body": repr(body if any(body) else len(body))}
    text = b"" if scope["path"] == "/304" else json.dumps(told).encode()
    status = 304 if scope["path"] == "/304" else 405 if scope["method"] == "CONNECT" else 200
    headers = [] if scope["path"] in ("/304", "/stream") else [(b"content-length", b"%d" % len(text))]
    headers += [(b"connection", b"close")] * (scope["path"] == "/close")
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text[:10], "more_body": True})
    await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": text[10:]})


Reply = tuple[bytes, bool]  # the answers, and whether the connection was closed


class Asking:
    """A connection to one of the two servers that are compared, and what has been received on it."""

    # Ours answers in JSON, as every error here; h11 frames stock's text by what it could parse.
    REFUSED = re.compile(
        rb"(?i)HTTP/1\.1 400 Bad Request\r\n(?:[^\r\n]+\r\n)+\r\n"
        rb'(?:1e\r\n)?(?:\{"detail": ")?Invalid HTTP request received\.(?:"\}|\r\n0\r\n\r\n)?'
    )

    def __init__(self, listening: socket.socket) -> None:
        self.connection = socket.create_connection(listening.getsockname())
        self.connection.setblocking(False)
        self.answers, self.closed = b"", False

    def send(self, piece: bytes) -> None:
        with contextlib.suppress(ConnectionError):  # it is closed already
            self.connection.sendall(piece)

    def reply(self) -> Reply:
        """What has been received so far."""
        with contextlib.suppress(BlockingIOError):  # more may come
            with contextlib.suppress(ConnectionError):
                while chunk := self.connection.recv(65536):
                    self.answers += chunk
            self.closed = True
        # Ours leaves out CONTINUE where a part of the body has come (RFC 9110, 10.1.1).
        return self.REFUSED.sub(b"HTTP/1.1 400", self.answers.replace(CONTINUE, b"")), self.closed


async def replies(rivals: list[Asking], pieces: list[list[bytes]]) -> list[Reply]:
    """The replies of both servers to their pieces, as soon as they are the same, or after two seconds."""

    async def read() -> list[Reply]:
        for _ in range(15):  # the servers read, and answer
            await asyncio.sleep(0)
        return [rival.reply() for rival in rivals]

    for step in itertools.zip_longest(*pieces, fillvalue=b""):
        for rival, piece in zip(rivals, step, strict=True):
            rival.send(piece)
        found = await read()
    deadline = time.monotonic() + 2
    while found[0] != found[1] and time.monotonic() < deadline:
        found = await read()
    for rival in rivals:
        rival.connection.close()
    return found


Ask = Callable[[list[bytes], list[bytes]], list[Reply]]


@pytest.fixture(scope="module")
def ask_both() -> Iterator[Ask]:
    """Asks our Connection and stock uvicorn's, with the same application, in one loop in a thread."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    options: Any = {"ws": "none", "log_config": None, "date_header": False, "server_header": False}
    protocols: tuple[Any, ...] = (lg.Connection, "h11")
    configs = [uvicorn.Config(telling_app, http=http, loop="asyncio", **options) for http in protocols]
    servers = [uvicorn.Server(config) for config in configs]
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        pairs = zip(servers, sockets, strict=True)
        await asyncio.gather(*(server.serve([listening]) for server, listening in pairs))

    def ask(ours: list[bytes], stock: list[bytes]) -> list[Reply]:
        asked = replies(list(map(Asking, sockets)), [ours, stock])
        return asyncio.run_coroutine_threadsafe(asked, loop).result(PATIENCE)

    with contextlib.closing(loop), ThreadPoolExecutor(1) as pool:
        pool.submit(loop.run_until_complete, serve())
        until(lambda: all(server.started for server in servers))
        yield ask
        for server in servers:
            server.should_exit = True


FIELDS = ["Expect: 100-continue", "X: y", "X:", "X: a\r\n b", "x_y: z"]
UPGRADES = [f"upgrade\r\nUpgrade: {protocol}" for protocol in ("websocket", "h2c")]
FIELDS += [f"Connection: {option}" for option in ("close", "keep-alive", *UPGRADES)]
ODD_FIELDS = ["X : y", "X: \xe9", "Connection: Close, x", ": x", "X y", "Host: b", "Expect: x"]
ODD_FIELDS += [f"Transfer-Encoding: {coding}" for coding in ("gzip", "gzip, chunked", "identity")]
LENGTHS = ["x", "-1", "+1", "1, 1", "1, 2", "1\r\nContent-Length: 1", "1\r\nContent-Length: 2", "9" * 23]
ODD_FIELDS += [f"Content-Length: {length}" for length in LENGTHS]


@st.composite
def requests(draw: st.DrawFn, odd: bool, lengths: list[int]) -> tuple[bytes, bytes]:
    """A request, and what stock uvicorn is sent for it: not what ours accepts by RFC 9112, 2.2 and 3.2.2."""

    def choose(usual: list[Any], strange: list[Any]) -> Any:
        return draw(st.sampled_from(usual + strange * odd))

    method = choose(["GET", "GET", "HEAD", "POST", "POST", "OPTIONS"], ["get", "CONNECT", "G?", "G T"])
    paths = ["/", "/", "/stream", "/304", "/close", "/a%20b?c=%00&d", "/%ff", "//x/../y"]
    path = choose(paths, ["*", "/\xe9", "lg:443", "/a#b"])
    version = choose(["HTTP/1.1"] * 7 + ["HTTP/1.0"], ["HTTP/1.2", "HTTP/2.0", "http/1.1", "HTTP/1", ""])
    fields = choose([["Host: lg"]], [[], ["host:"]])
    fields = fields + draw(st.lists(st.sampled_from(FIELDS + ODD_FIELDS * odd), max_size=3))
    body, framing = b"", draw(st.sampled_from(["none", "none", "length", "chunked"]))
    if any(field in ODD_FIELDS for field in fields):
        body, framing = draw(st.sampled_from([b"", b"x", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"])), "odd"
    if framing == "length":
        length = draw(st.sampled_from(lengths))
        body = bytes(length) if length > 100 else draw(st.sampled_from([b"\0", b"x", b"\xff"])) * length
        fields.append(f"Content-Length: {length}")
    if framing == "chunked":
        fields.append(draw(st.sampled_from(["Transfer-Encoding: chunked", "transfer-encoding: Chunked"])))
        for chunk in draw(st.lists(st.binary(min_size=1, max_size=20), max_size=4)):
            extension = draw(st.sampled_from([b"", b"", b";a=b", b" "]))
            body += b"%x%b\r\n%b\r\n" % (len(chunk), extension, chunk)
        body += b"0\r\n" + draw(st.sampled_from([b"", b"", b"T: x\r\n"])) + b"\r\n"
    newline = draw(st.sampled_from(["\r\n"] * 5 + ["\n"]))
    rest = newline.join([f" {version}", *draw(st.permutations(fields)), "", ""]).encode("latin-1") + body
    line, host, empty_lines = f"{method} {path}".encode("latin-1"), "", 0
    if not odd:  # else they may be taken for a body
        host = draw(st.sampled_from(["", "", "http://lg", "HTTPS://[::1]:443"]))
        empty_lines = draw(st.sampled_from([0, 0, 1, 2]))
    return b"\r\n" * empty_lines + f"{method} {host}{path}".encode("latin-1") + rest, line + rest


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[bytes], list[bytes]]:
    """Requests on one connection, cut anywhere, and what stock uvicorn is sent for them, in one piece."""
    odd = draw(st.booleans())
    lengths = [[0, 1, 60, 4096, 4097, 6000], *[[0, 1, 60]] * 3]  # of what is pipelined, 4 KiB are kept
    pairs = [draw(requests(odd, lengths[number])) for number in range(draw(st.integers(1, 4)))]
    ours, stock = (b"".join(each) for each in zip(*pairs, strict=True))
    if odd and len(stock) < 4096:
        for _ in range(draw(st.integers(0, 2))):
            at, to = draw(st.integers(0, len(stock))), draw(st.integers(0, 3))
            odd_byte = draw(st.sampled_from([b"", b"\0", b" ", b":", b"\x80", b"G", b"5", b",", b"\x7f"]))
            ours = stock = stock[:at] + odd_byte + stock[at + to :]
    if ours == stock:
        ours = stock = ours[: draw(st.integers(0, len(ours)))] if draw(st.booleans()) else ours
    cuts = sorted(draw(st.lists(st.integers(0, len(ours)), max_size=6)))
    return [ours[a:b] for a, b in itertools.pairwise([0, *cuts, len(ours)]) if a < b], [stock]


@given(stream=streams())
@settings(
    max_examples=int(os.environ.get("LG_TEST_EXAMPLES", "300")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
def test_connection_answers_as_stock_uvicorn_does(
    ask_both: Ask, stream: tuple[list[bytes], list[bytes]]
) -> None:
    ours, stock = ask_both(*stream)
    assert ours == stock


# What ours answers otherwise, beyond what `requests` and `Asking` leave out, and its status: it closes the
# connection, while stock answers each of the requests with 200, and keeps the connection.
DIFFERENCES = {
    # Proxies differ on which framing counts.
    "both framings": (400, request_to("POST /", "Content-Length: 5", CHUNKED, body=b"0\r\n\r\n")),
    # The work for a request is bounded.
    "a long header": (431, request_to("POST /", "X: " + "x" * 2**14)),
    "many lines": (431, request_to("POST /", *["a:b"] * 99)),
    "many chunks": (400, request_to("POST /", CHUNKED, body=b"1\r\nx\r\n" * 33 + b"0\r\n\r\n")),
    # Of what is pipelined, 4 KiB are kept.
    "much pipelined": (200, request_to("POST /") * 150),
    # The rest of the body is discarded, for a while, and the connection closed.
    "an answer before the body": (200, request_to("POST /early", "Content-Length: 9", body=b"half")),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_connection_differs_from_stock_uvicorn_where_it_is_meant_to(ask_both: Ask, name: str) -> None:
    status, request = DIFFERENCES[name]
    both = ask_both([request], [request])
    found = [(re.findall(rb"HTTP/1\.1 (\d+)", answers), closed) for answers, closed in both]
    assert found == [([b"%d" % status], True), ([b"200"] * request.count(b"POST"), False)]


# ---- faults ------------------------------------------------------------------------------------------------


def test_command_is_503_costs_nothing_and_is_logged_once_while_no_process_can_be_made(serve: Start) -> None:
    server = serve(tools={"ping": ECHO}, RATE_LIMIT_DIAGNOSTICS="100/hour")
    with patch("subprocess.Popen", side_effect=BlockingIOError(11, "Resource temporarily unavailable")):
        *_, refused = (server.run("ping") for _ in range(3))
    assert (refused.status_code, int(refused.headers["Retry-After"]) > 0) == (503, True)
    assert refused.json() == {"error": "The server cannot start ping now: try again soon"}
    assert server.run("ping").headers["X-RateLimit-Remaining"] == "99"
    assert server.log.count('msg="A tool cannot be started" tool=ping') == 1


def test_command_is_503_while_no_descriptor_is_left(serve: Start) -> None:
    server = serve(spawned=True, tools=every_tool(ECHO))
    until(server.idle)  # the tools have been tried
    assert server.run("ping").status_code == 200  # on a connection that stays
    _, most = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (server.descriptors(), most))
    assert server.run("ping").status_code == 503
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (most, most))
    assert server.run("ping").status_code == 200


def test_every_slot_has_the_descriptors_that_it_needs(serve: Start, many_files: int) -> None:
    """Beside as many connections as there can be."""
    tools, constants = {"ping": SILENT, "mtr": ECHO}, {"RESERVED_FILES": 60}
    slots = dict.fromkeys(("MAX_DIAGNOSTICS", "MAX_DIAGNOSTICS_PER_CLIENT"), "40")
    server = serve(tools=tools, descriptors=400, constants=constants, COMMANDS="ping,mtr", **slots)
    held = []
    for _ in range(20):
        held += [server.connect() for _ in range(20)]
        server.answer_seconds()  # it has accepted these, and reset others
    held += [server.begin() for _ in range(39)]
    until(lambda: len(running(f"{server.folder}/bin/ping")) == 39)
    assert server.run("mtr").status_code == 200
    for connection in held:
        connection.close()


def without_threads() -> contextlib.AbstractContextManager[object]:
    return patch("threading.Thread.start", side_effect=RuntimeError("can't start new thread"))


def test_address_is_measured_and_a_name_is_422_while_no_thread_can_be_started(serve: Start) -> None:
    server = serve(tools={"ping": ECHO}, names=NAMES)
    with without_threads():
        measured, refused = server.run("ping"), server.run("ping", "here.example")
    assert measured.text.startswith("argv ")
    assert (refused.status_code, "cannot look up here.example now" in refused.text) == (422, True)


def test_rate_limit_that_needs_a_thread_is_503_while_none_can_be_started(serve: Start) -> None:
    server = serve(tools={"ping": ECHO}, RATE_LIMIT_DIAGNOSTICS="100/hour")
    with without_threads():
        until(lambda: server.run("ping").status_code == 503)  # the thread of its start has ended
        assert "no thread left" in server.run("ping").text
    assert server.run("ping").status_code == 200


def test_full_disk_under_the_log_does_not_stop_the_service(serve: Start) -> None:
    server = serve(command=shell("exec 2>/dev/full"), tools=every_tool(ECHO))
    assert [server.run("ping").status_code for _ in range(3)] == [200, 200, 200]


@pytest.fixture
def unread_log(serve: Start, tmp_path: Path) -> Iterator[tuple[SpawnedServer, int]]:
    """A server that has logged 60 runs into a pipe that holds fewer, and the pipe, which nobody has read."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 4096)
    code = WITH_CONSTANTS.format(constants={"LOG_LINES": 5})
    command = ("sh", "-c", 'exec "$@" 2>"$0"', str(path), sys.executable, "-c", code)
    server = serve(command=command, tools=every_tool(ECHO))
    assert {server.run("ping").status_code for _ in range(60)} == {200}
    yield server, pipe
    os.close(pipe)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 0)])
def test_log_that_nobody_reads_stops_neither_the_service_nor_its_end(
    unread_log: tuple[SpawnedServer, int], number: int, status: int
) -> None:
    server, _ = unread_log
    server.process.send_signal(number)
    assert server.process.wait(PATIENCE) == status


def test_last_lines_are_written_before_a_signal_ends_the_process(serve: Start, tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    code = WITH_CONSTANTS.format(constants={"LOG_SECONDS": PATIENCE})
    server = serve(command=("sh", "-c", 'exec "$@" 2>"$0"', str(path), sys.executable, "-c", code))
    with contextlib.suppress(BlockingIOError):
        while os.write(pipe, bytes(4096)):
            pass
    server.process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        server.process.wait(1)
    text = ""

    def stop_is_logged() -> bool:
        nonlocal text
        with contextlib.suppress(BlockingIOError):
            text += os.read(pipe, 65536).decode()
        return "msg=stopping" in text

    until(stop_is_logged)
    assert server.process.wait(PATIENCE) == -signal.SIGTERM


def test_lines_that_the_log_cannot_take_are_counted(unread_log: tuple[SpawnedServer, int]) -> None:
    server, pipe = unread_log
    runs, text = 60, ""

    def each_run_is_logged_or_counted() -> bool:
        nonlocal runs, text
        with contextlib.suppress(BlockingIOError):
            text += os.read(pipe, 65536).decode()
        lost = re.findall(r'msg="log lines dropped" lines=(\d+)', text)
        if not lost:
            server.run("ping")  # after which it is logged how many were lost
            runs += 1
        return lost != [] and text.count("msg=run ") + sum(map(int, lost)) == runs

    until(each_run_is_logged_or_counted)


def test_clients_are_forgotten_when_their_hits_have_expired(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lg, "SWEEP_SECONDS", 0)
    counted = lg.RateLimits(DEFAULTS, lg.Threads(asyncio.Event()))

    def clients_after_hits(count: int) -> int:
        for number in range(count):
            client = lg.Client(ipaddress.ip_address(number))
            outcome(counted.check((limits.parse("999/second"),), "ping", client, consume=True))
        return len(counted.local_storage.events)

    assert clients_after_hits(50) == 50
    until(lambda: clients_after_hits(1) == 1)


def test_clock_that_is_set_back_an_hour_locks_nobody_out(serve: Start) -> None:
    server = serve(tools={"ping": ECHO}, RATE_LIMIT_DIAGNOSTICS="1/minute")
    assert [server.run("ping").status_code for _ in range(2)] == [200, 429]
    with patch("time.time", return_value=time.time() - 3600):
        allowed, refused = server.run("ping"), server.run("ping")
    assert (allowed.status_code, refused.status_code) == (200, 429)
    assert int(refused.headers["Retry-After"]) <= 60


# ---- the log -----------------------------------------------------------------------------------------------

PAIR = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|[^\s"=]+)(?: |$)')


def records(server: Server) -> list[dict[str, str]]:
    """The lines of the log, each of which must be logfmt: key=value pairs, with quotes where needed."""
    parsed = []
    for line in server.log.splitlines():
        pairs = PAIR.findall(line)
        assert len("".join(f"{key}={value} " for key, value in pairs)) == len(line) + 1, line
        parsed.append({key: json.loads(value) if value[0] == '"' else value for key, value in pairs})
    return parsed


def records_of(server: Server, message: str, **pairs: str) -> list[dict[str, str]]:
    """The lines with this message and these pairs, once there is one: a thread writes them."""
    wanted = {"msg": message, **pairs}.items()
    found: Any = until(lambda: [record for record in records(server) if wanted <= record.items()])
    return cast(list[dict[str, str]], found)


def records_so_far(server: Server) -> list[dict[str, str]]:
    """The lines before one that is written now."""
    server.run("ping", target := lone_address())
    records_of(server, "run", target=target)
    return [record for record in records(server) if record.get("target") != target]


def test_each_run_and_speed_test_is_one_line_in_the_log(serve: Start) -> None:
    tools = {"ping": ECHO, "traceroute": "#!/bin/sh\nexit 2\n", "mtr": ENDLESS}
    server = serve(tools=tools, names=NAMES)
    server.run("ping", "here.example", headers={"X-Forwarded-For": "192.0.2.9"})
    server.run("traceroute")
    server.begin("mtr").close()
    server.http.get("/speedtest/100M")
    server.http.post("/speedtest/upload", content=b"x" * 1000)
    until(lambda: server.log.count("\n") == 6)
    log = re.sub(r"(?m)^time=\S+ level=| seconds=\d+\.\d$", "", server.log)
    assert sorted(log.splitlines()[1:]) == [
        'info msg=run command=mtr target=127.0.0.1 address=127.0.0.1 client=127.0.0.1 outcome="client gone"',
        "info msg=run command=ping target=here.example address=127.0.0.2 client=192.0.2.9 outcome=finished",
        "info msg=speedtest size=100M client=127.0.0.1 outcome=finished bytes=104857600",
        "info msg=speedtest size=upload client=127.0.0.1 outcome=finished bytes=1000",
        "warning msg=run command=traceroute target=127.0.0.1 address=127.0.0.1 client=127.0.0.1 "
        'outcome="exit status 2"',
    ]


@pytest.mark.parametrize(("host", "shown"), [({}, "*"), ({"HOST": "127.0.0.1"}, "127.0.0.1")])
def test_start_is_logged_with_place_and_limits_and_the_stop_with_nothing_between(
    serve: Start, host: dict[str, str], shown: str
) -> None:
    place = {"NETWORK_LOCATION": "Zürich, Switzerland", "NETWORK_FACILITY": 'The "Cellar"'}
    bounds = {"RATE_LIMIT_DIAGNOSTICS": "2/minute;30/2 hours", "MAX_DIAGNOSTICS": "7"}
    server = serve(spawned=True, tools=WORKING_TOOLS, TZ="XYZ-05:45", **host, **place, **bounds)
    server.stop()
    head = re.compile(r"^time=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+05:45 level=info ", re.M)
    assert head.sub("", server.log).splitlines() == [
        f'msg=started version={lg.VERSION} location="Zürich, Switzerland" facility="The \\"Cellar\\"" '
        f"listening={shown}:{server.port}",
        'msg=limits rates="2 per minute and 30 per 2 hours for each command, none for each speed test, '
        'none for the 10G download" commands="7 at once, 4 per client" speedtests="20 at once, 4 per client"',
        "msg=stopping",
    ]


def test_percent_sign_in_a_tool_is_logged_as_it_is(serve: Start) -> None:
    server = serve(EXTRA_COMMANDS='{"x": "nice%d {address}"}')
    assert server.run("x").status_code == 503
    assert records_of(server, "A tool cannot be started", tool="nice%d", level="error")


def test_refusal_is_logged_once_a_minute_for_each_client_with_its_reason(serve: Start) -> None:
    server = serve(tools={"ping": ECHO}, names=NAMES, RATE_LIMIT_DIAGNOSTICS="1/hour")
    for client, target in [
        ("192.0.2.1", "127.0.0.1"),
        ("192.0.2.2", "10.0.0.1"),
        ("192.0.2.3", "nowhere.example"),
        ("192.0.2.4", "broken.example"),
        ("2001:db8:1:2::1", "127.0.0.1"),
        ("2001:db8:1:2::2", "127.0.0.1"),  # the same client: their /64 is the same
    ]:
        for _ in range(4):
            server.run("ping", target, headers={"X-Forwarded-For": client})
    refused = [record for record in records_so_far(server) if record["msg"] == "refused"]
    assert [(record["client"], record["reason"]) for record in refused] == [
        ("192.0.2.1", "rate limit"),
        ("192.0.2.2", "target"),
        ("192.0.2.3", "target"),
        ("192.0.2.4", "resolver"),
        ("2001:db8:1:2::1", "rate limit"),
    ]


def test_refusal_for_want_of_a_slot_is_logged(serve: Start) -> None:
    server = serve(tools={"ping": SILENT}, MAX_DIAGNOSTICS="2", MAX_DIAGNOSTICS_PER_CLIENT="1")
    held = [server.begin(source=source) for source in ("127.0.0.1", "127.0.0.2")]
    until(lambda: slots_taken(server) == 2)
    server.run("ping")
    server.run("ping", headers={"X-Forwarded-For": "192.0.2.1"})
    path = "/lookingglass/ping"
    assert records_of(server, "refused", path=path, client="127.0.0.1", reason="client slots")
    assert records_of(server, "refused", path=path, client="192.0.2.1", reason="server slots")
    del held


def test_invalid_request_is_not_logged(serve: Start) -> None:
    server = serve(tools={"ping": ECHO})
    server.run("ping", "no target at all")
    server.http.get("/nothing")
    server.http.post("/lookingglass/ping", content=b"x" * 5000)
    assert [record["msg"] for record in records_so_far(server)] == ["limits"]


def test_what_is_logged_seldom_is_bounded_in_memory_and_log() -> None:
    once = lg.Once()
    assert sum(once(number, 60) for number in range(3 * lg.LOG_KEYS)) == lg.LOG_KEYS


def test_what_is_logged_seldom_is_logged_again_after_its_time() -> None:
    once = lg.Once()
    assert [once("key", 0.01), once("key", 0.01)] == [True, False]
    until(lambda: once("key", 0.01))


def test_shared_store_that_does_not_answer_is_logged_at_the_start(serve: Start) -> None:
    if not importlib.util.find_spec("redis"):
        lacking("the package redis")
    server = serve(RATE_LIMIT_STORAGE_URI=f"redis://127.0.0.1:{free_port()}")
    until(lambda: "The rate-limit store fails" in server.log)


def test_nothing_that_a_client_sends_forges_a_line_in_the_log_at_debug_too(serve: Start) -> None:
    server = serve(spawned=True, tools=every_tool(ECHO), LOG_LEVEL="debug")
    server.run("ping", "127.0.0.1\nFORGED")
    server.run("ping", headers={"X-Forwarded-For": "192.0.2.1 FORGED", "User-Agent": "FORGED"})
    for path in ('/"quotes"=and\\backslashes%25', "/%0aFORGED", "/?x=%0d%0aFORGED"):
        status = str(server.http.get(path).status_code)
        assert records_of(server, "request", target=httpx.URL(path).raw_path.decode(), status=status)


# ---- for the operator --------------------------------------------------------------------------------------

BGP = {"bgp": "birdc -r show route for {address} all"}


def program(name: str) -> str:
    """Its path; a test that needs it is skipped where it is not installed."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") or lacking(f"the command {name}")


def notes_of(events: list[dict[str, Any]]) -> str:
    return "".join(f"{event['text']}\n" for event in events if event["event"] == "note")


@pytest.fixture(scope="session")
def extended(shared: Start) -> Server:
    """A server with extra commands, of which one is in place of a built-in one."""
    tools = {"birdc": ECHO, "tcp": ECHO, "ping": ECHO, "print": '#!/bin/sh\nprintf "%s\\n" "$@"\n'}
    extra = {
        **BGP,
        "tcp": "tcp -{version} --to={address}",
        "ping": "ping -{version} -I eth1 {address}",
        "shell": "print 'show route' $(id) {address} ; reboot",
    }
    return cast(Server, shared(tools=tools, EXTRA_COMMANDS=json.dumps(extra)))


@pytest.mark.parametrize(
    ("command", "argv"),
    [
        ("bgp", "-r show route for 127.0.0.1 all"),
        ("bgp6", "-r show route for ::1 all"),
        ("tcp", "-4 --to=127.0.0.1"),
        ("tcp6", "-6 --to=::1"),
        ("ping", "-4 -I eth1 127.0.0.1"),
        ("ping6", "-6 -I eth1 ::1"),
    ],
)
def test_extra_command_runs_for_both_ip_versions(extended: Server, command: str, argv: str) -> None:
    assert extended.run(command).text.startswith(f"argv {argv}\n")


def test_extra_command_passes_no_shell_and_each_of_its_lines_is_a_note(extended: Server) -> None:
    events, output = run_events(extended, "shell"), "show route\n$(id)\n127.0.0.1\n;\nreboot\n"
    assert notes_of(events) == output
    result = {"status": "finished", "resolvedAddress": "127.0.0.1", "rawOutput": output}
    assert events[-1]["result"] == result


def test_ping_of_an_extra_command_by_its_path_may_have_no_reply(serve: Start, tmp_path: Path) -> None:
    recorded = RECORDED["ping6, nothing comes back"]
    write_script(tmp_path / "ping", f"#!/bin/sh\ncat <<'END'\n{recorded}END\nexit 1\n")
    server = serve(EXTRA_COMMANDS=json.dumps({"far": f"{shlex.quote(str(tmp_path))}/ping {{address}}"}))
    end = run_events(server, "far6")[-1]
    assert (end["status"], end["result"]["stats"]["loss"]) == ("finished", 100)


def test_extra_command_is_refused_an_address_that_may_not_be_measured(extended: Server) -> None:
    assert extended.run("bgp", "10.0.0.1").status_code == 422


def test_extra_command_has_a_rate_limit_of_its_own(serve: Start) -> None:
    tools = {"birdc": ECHO, "ping": ECHO}
    server = serve(tools=tools, EXTRA_COMMANDS=json.dumps(BGP), RATE_LIMIT_DIAGNOSTICS="1/hour")
    answers = [server.run(command).status_code for command in ("bgp", "bgp", "ping")]
    assert answers == [200, 429, 200]


def test_extra_command_is_stopped_at_the_time_limit(serve: Start) -> None:
    server = serve(tools={"birdc": SILENT}, EXTRA_COMMANDS=json.dumps(BGP), DIAGNOSTIC_TIMEOUT="1")
    assert server.run("bgp").text == "--- bgp: stopped after 1 s ---\n"


def test_address_of_the_other_version_names_the_extra_command_to_use(extended: Server) -> None:
    assert "use bgp6" in extended.run("bgp", "::1").text


BIRD = """
router id 198.51.100.{here};
protocol device {{ }}
protocol static {{ ipv4; route 203.0.113.{here}/32 blackhole; }}
protocol static {{ ipv6; route 2001:db8:113::{here}/128 blackhole; }}
template bgp neighbour {{ local as 6450{here}; connect delay time 1; }}
protocol bgp from neighbour {{
  neighbor 198.51.100.{there} as 6450{there};
  ipv4 {{ import all; export all; }};
}}
protocol bgp from neighbour {{
  neighbor 2001:db8:0:1::{there} as 6450{there};
  ipv6 {{ import all; export all; }};
}}
"""


@pytest.fixture(scope="module")
def bgp(hops: tuple[str, ...], shared: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server beside a BIRD that learns two routes from the BIRD of its neighbour, over BGP."""
    birdc, folder = program("birdc"), tmp_path_factory.mktemp("bgp")
    birds = []
    for here, there in ((1, 2), (2, 1)):
        (folder / f"{here}.conf").write_text(BIRD.format(here=here, there=there))
        files = f"-c {here}.conf -s {here}.ctl -P {here}.pid".split()
        line = ["ip", "netns", "exec", f"{HOPS_NAME}{here - 1}", "bird", "-f", *files]
        birds.append(subprocess.Popen(line, cwd=folder))
    query = [birdc, "-s", str(folder / "1.ctl"), "-r", "show", "route"]

    def learned() -> bool:
        counted = subprocess.run([*query, "count"], capture_output=True, text=True, check=False)
        return counted.stdout.count("2 of 2 routes for 2 networks in table") == 2

    until(learned)
    extra = {
        "bgp": f"{shlex.join(query)} for {{address}} all",
        "tcp": "traceroute -{version} -T -p 443 -q 3 -w 3,3,10 -m 30 {address}",
    }
    allow = "198.51.100.0/24,203.0.113.0/24,2001:db8::/32"
    yield shared(prefix=hops, EXTRA_COMMANDS=json.dumps(extra), TARGET_ALLOW=allow)
    for bird in birds:
        bird.terminate()
        bird.wait(PATIENCE)


@pytest.mark.parametrize(
    ("command", "target", "route"),
    [("bgp", "203.0.113.2", "203.0.113.2/32"), ("bgp6", "2001:db8:113::2", "2001:db8:113::2/128")],
)
def test_route_learned_over_bgp_is_shown(bgp: Server, command: str, target: str, route: str) -> None:
    events = run_events(bgp, command, target)
    notes = notes_of(events)
    assert re.search(rf"^{route} .* \[AS64502i\]$", notes, re.M)
    assert "\tBGP.as_path: 64502\n" in notes
    assert (bgp.run(command, target).text, events[-1]["result"]["rawOutput"]) == (notes, notes)


@pytest.mark.parametrize(("command", "target"), [("tcp", TARGET4), ("tcp6", TARGET6)])
def test_trace_over_tcp_reaches_the_target_hop_by_hop(bgp: Server, command: str, target: str) -> None:
    events = run_events(bgp, command, target)
    numbers, addresses = zip(*((e["hop"], e["address"]) for e in events if e["event"] == "hop"), strict=True)
    # The fifth hop is the target; if all its answers are lost, the trace goes on until one comes.
    assert numbers == tuple(range(1, max(5, len(numbers)) + 1)) and addresses[0] and addresses[-1] == target


# Switches.


def test_commands_that_are_not_offered_are_404_and_neither_described_nor_in_the_usage(serve: Start) -> None:
    """An extra command, too, can be offered for one IP version alone."""
    tools = {"ping": ECHO, "birdc": ECHO}
    server = serve(tools=tools, EXTRA_COMMANDS=json.dumps(BGP), COMMANDS="ping,mtr6,bgp6")
    commands = ("ping", "ping6", "traceroute", "mtr", "bgp", "bgp6")
    assert [server.run(command).status_code for command in commands] == [200, 404, 404, 404, 404, 200]
    for path in ("/openapi.json", "/"):
        shown = re.findall(r"/lookingglass/(\w+)", server.http.get(path).text)
        assert set(shown) == {"ping", "mtr6", "bgp6"}


def test_tool_that_no_command_needs_is_not_missing(serve: Start) -> None:
    server = serve(PATH="/nonexistent", COMMANDS="ping")
    assert server.http.get("/health").json() == {"status": "degraded", "missing": ["ping"]}


def test_server_without_commands_offers_speed_tests_and_has_a_page(serve: Start) -> None:
    server = serve(COMMANDS="")
    usage = server.http.get("/").text
    assert ("lookingglass" in usage, "speedtest" in usage) == (False, True)
    assert server.http.get("/", headers={"Accept": "text/html"}).status_code == 200


def test_speed_tests_that_are_off_are_404_and_neither_described_nor_in_the_usage(serve: Start) -> None:
    server = serve(MAX_SPEEDTESTS="0")
    answers = [server.http.get(f"/speedtest/{size}") for size in ("100M", "1G", "10G")]
    answers.append(server.http.post("/speedtest/upload"))
    assert [answer.status_code for answer in answers] == [404] * 4
    document = server.http.get("/openapi.json").json()
    texts = json.dumps([document["info"], document["paths"]]), server.http.get("/").text
    assert [re.findall("(?i)speed ?test", text) for text in texts] == [[], []]


@pytest.mark.parametrize(
    ("settings", "offers"),
    [
        ({}, "ping, traceroute, mtr, speed tests"),
        ({"COMMANDS": "ping,mtr6,bgp", "EXTRA_COMMANDS": json.dumps(BGP)}, "ping, mtr, bgp, speed tests"),
        ({"COMMANDS": "mtr", "MAX_SPEEDTESTS": "0"}, "mtr"),
        ({"COMMANDS": ""}, "speed tests"),
    ],
)
def test_description_names_what_is_offered(serve: Start, settings: dict[str, str], offers: str) -> None:
    server = serve(NETWORK_LOCATION="Amsterdam", **settings)
    description = server.http.get("/openapi.json").json()["info"]["description"]
    assert description.startswith(f"{offers}, from Amsterdam. Limits ")


def test_client_in_rate_limit_exempt_has_no_rate_limit(serve: Start) -> None:
    server = serve(tools={"ping": ECHO}, RATE_LIMIT_DIAGNOSTICS="1/hour", RATE_LIMIT_EXEMPT="192.0.2.0/24")
    statuses = {
        client: [server.run("ping", headers={"X-Forwarded-For": client}).status_code for _ in range(3)]
        for client in ("192.0.2.1", "198.51.100.1")
    }
    assert statuses == {"192.0.2.1": [200, 200, 200], "198.51.100.1": [200, 429, 429]}


def test_client_in_rate_limit_exempt_has_slots_like_others(serve: Start) -> None:
    server = serve(tools={"ping": SILENT}, RATE_LIMIT_EXEMPT="127.0.0.0/8", MAX_DIAGNOSTICS_PER_CLIENT="1")
    held = server.begin()
    until(lambda: slots_taken(server) == 1)
    assert server.run("ping").status_code == 429
    held.close()


def test_lookups_have_a_rate_limit_of_their_own(serve: Start) -> None:
    tools = {"ping": ECHO, "mtr": ECHO}
    server = serve(tools=tools, names={"a.example": ["127.0.0.1"]}, RATE_LIMIT_LOOKUPS="2/hour")
    asked = [("ping", "a.example"), ("mtr", "b.example"), ("ping", "a.example"), ("ping", "::1")]
    assert [server.run(*each).status_code for each in asked] == [200, 422, 429, 422]


# What may not send.


def health(server: Server) -> dict[str, Any]:
    return cast(dict[str, Any], server.http.get("/health").json())


@pytest.mark.parametrize("options", [(), ("--no-new-privs",)], ids=str)
def test_real_tools_that_may_not_send_are_named_by_health_and_logged_with_what_to_grant(
    serve: Start, hops: tuple[str, ...], options: tuple[str, ...]
) -> None:
    # The small internet's ping_group_range is the kernel's default, which nobody is in.
    drop = (program("setpriv"), "--bounding-set=-net_raw", "--inh-caps=-all", *options)
    server = serve(prefix=hops, command=(*drop, sys.executable, "lg.py"))
    until(lambda: health(server).get("forbidden") == ["mtr", "ping"])
    message = "A tool lacks the permission to send: grant NET_RAW or widen net.ipv4.ping_group_range"
    assert records_of(server, message, level="warning", tool="mtr")
    assert records_of(server, message, level="warning", tool="ping")


def test_listening_does_not_wait_for_the_tools(serve: Start) -> None:
    server = serve(tools=every_tool(STUBBORN), constants={"TRIAL_SECONDS": 60})
    assert running(f"{server.folder}/bin/")


def test_tools_that_are_tried_at_the_start_leave_no_process(serve: Start) -> None:
    server = serve(tools=every_tool(SPREADING + STUBBORN), spawned=True)
    until(lambda: running(f"{server.folder}/bin/"))
    until(lambda: health(server).get("failing") == ["mtr", "ping", "traceroute"])
    until(server.idle, SOON)


def test_stop_waits_for_all_trials() -> None:
    """Otherwise a slow one would be cancelled before it has killed its processes."""
    runner, ended = lg.Service(DEFAULTS).runner, []

    async def try_tool(command: lg.Command) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05 * len(command.tool))
            ended.append(command.tool)

    async def stop() -> None:
        with patch.object(runner, "try_tool", try_tool):
            trials = asyncio.create_task(runner.try_tools())
            await asyncio.wait((trials,), timeout=0.05)
            trials.cancel()
            await asyncio.wait((trials,))

    outcome(stop())
    assert sorted(ended) == ["mtr", "ping", "traceroute"]


def test_trial_that_the_shutdown_ends_is_not_logged_as_a_fault(serve: Start) -> None:
    server = serve(tools=every_tool(SILENT), trials=True, constants={"TRIAL_SECONDS": 60}, spawned=False)
    until(lambda: running(f"{server.folder}/bin/"))
    server.close()
    assert "level=warning" not in server.log


def test_systemd_is_told_once_the_service_listens(serve: Start, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(path := str(tmp_path / "notify"))
        systemd.settimeout(PATIENCE)
        serve(spawned=True, NOTIFY_SOCKET=path)
        assert systemd.recv(100) == b"READY=1"


def test_check_works_beside_the_running_service(serve: Start) -> None:
    server = serve(tools=WORKING_TOOLS)
    checked = run_lg("check", PATH=server.environment["PATH"], PORT=str(server.port))
    assert (checked.returncode, checked.stdout) == (0, "lg.py: these settings can be used\n")


# Metrics.


def scrape(server: Server, names: str = "") -> dict[str, float]:
    """The samples of the metrics whose names begin so."""
    lines = [line for line in server.http.get("/metrics").text.splitlines() if line.startswith(names)]
    samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name.removesuffix("{}"): float(value) for name, _, value in samples}


def test_metrics_count_runs_by_outcome_and_show_whether_the_last_was_ok(serve: Start) -> None:
    server = serve(tools=every_tool("#!/bin/sh\nexit 3\n") | {"traceroute": SILENT})
    server.begin("traceroute").close()
    server.run("mtr")
    server.run("ping")
    server.stand_in("ping", "#!/bin/sh\nsleep 0.2\n")
    server.run("ping")
    server.run("ping")
    until(lambda: "client gone" in server.http.get("/metrics").text)
    counted = {name: count for name, count in scrape(server, "lg_runs_total").items() if count}
    assert counted == {
        'lg_runs_total{command="traceroute",outcome="client gone"}': 1,
        'lg_runs_total{command="mtr",outcome="exit status 3"}': 1,
        'lg_runs_total{command="ping",outcome="exit status 3"}': 1,
        'lg_runs_total{command="ping",outcome="finished"}': 2,
    }
    last = {'lg_last_run_ok{command="ping"}': 1, 'lg_last_run_ok{command="mtr"}': 0}  # and no traceroute's
    assert scrape(server, "lg_last_run_ok") == last
    assert 0.4 <= scrape(server)['lg_run_seconds_total{command="ping",outcome="finished"}'] < 10


def test_metrics_show_which_tools_work(serve: Start) -> None:
    tools = WORKING_TOOLS | {"ping": "#!/bin/sh\necho Operation not permitted; exit 2\n"}
    server = serve(tools=tools, trials=True, EXTRA_COMMANDS='{"x": "no-such-tool {address}"}')
    until(lambda: health(server).get("forbidden"))
    works = {"ping": 0, "traceroute": 1, "mtr": 1, "no-such-tool": 0}
    assert scrape(server, "lg_tool_up") == {f'lg_tool_up{{tool="{tool}"}}': up for tool, up in works.items()}


def test_metrics_count_refusals_by_reason(serve: Start) -> None:
    server = serve(tools={"ping": ECHO}, names=NAMES, RATE_LIMIT_DIAGNOSTICS="1/hour")
    for target in ("broken.example", "127.0.0.1", "127.0.0.1", "10.0.0.1", "no target"):
        server.run("ping", target)
    counted = scrape(server)
    reasons = ("resolver", "rate limit", "target", "invalid", "server slots")
    assert [counted[f'lg_refusals_total{{reason="{reason}"}}'] for reason in reasons] == [1, 2, 0, 1, 0]


@pytest.mark.parametrize(
    ("gib", "budget"),
    [
        ("0", {}),
        ("1", {"lg_speedtest_budget_bytes": 2**30, "lg_speedtest_budget_used_bytes": 100 * 2**20 + 1000}),
    ],
)
def test_metrics_count_bytes_of_speed_tests_and_show_the_budget_where_there_is_one(
    serve: Start, gib: str, budget: dict[str, float]
) -> None:
    server = serve(SPEEDTEST_GIB_PER_DAY=gib)
    server.http.get("/speedtest/100M")
    server.http.post("/speedtest/upload", content=b"x" * 1000)
    assert scrape(server, "lg_speedtest") == budget | {
        'lg_speedtest_bytes_total{direction="download"}': 100 * 2**20,
        'lg_speedtest_bytes_total{direction="upload"}': 1000,
    }


def test_metrics_show_slots_and_connections(serve: Start) -> None:
    server = serve(tools={"ping": SILENT}, MAX_DIAGNOSTICS="7")
    held = server.begin()
    until(lambda: slots_taken(server) == 1)
    counted = scrape(server)
    assert (counted['lg_slots{kind="command"}'], counted["lg_connections"]) == (7, 2)
    held.close()


def test_metrics_show_version_and_place(serve: Start) -> None:
    server = serve(NETWORK_LOCATION='Back\\slash "quoted"', NETWORK_FACILITY="The Cellar")
    labels = f'version="{lg.VERSION}",location="Back\\\\slash \\"quoted\\"",facility="The Cellar"'
    assert scrape(server, "lg_info") == {f"lg_info{{{labels}}}": 1}


def test_no_metric_has_a_label_that_a_client_chooses(serve: Start) -> None:
    names = {"chosen.example": ["127.0.0.1"]}
    server = serve(tools={"ping": ECHO}, names=names, RATE_LIMIT_DIAGNOSTICS="1/hour")
    for target in ("chosen.example", "chosen.example", "chosen target"):
        server.run("ping", target, headers={"X-Forwarded-For": "192.0.2.99", "User-Agent": "chosen"})
    server.http.get("/chosen")
    assert not re.search("chosen|192.0.2.99", server.http.get("/metrics").text)


def test_metrics_are_404_for_others_like_any_unknown_path(serve: Start) -> None:
    server = serve(METRICS_ALLOW_IPS="192.0.2.1")
    refused, unknown = server.http.get("/metrics"), server.http.get("/nothing")
    assert (refused.status_code, refused.content) == (404, unknown.content)
    assert server.http.get("/metrics", headers={"X-Forwarded-For": "192.0.2.1"}).status_code == 200


def test_metrics_pass_promtool(serve: Start) -> None:
    line = [program("promtool"), "check", "metrics"]
    place = 'Back\\slash "quoted" é'
    server = serve(tools={"ping": ECHO}, EXTRA_COMMANDS=json.dumps(BGP), NETWORK_LOCATION=place)
    server.run("ping")
    text = server.http.get("/metrics").text
    done = subprocess.run(line, input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_prometheus_scrapes_the_metrics(serve: Start, tmp_path: Path) -> None:
    server, port = serve(tools={"ping": ECHO}), free_port()
    server.run("ping")
    job = {"job_name": "lg", "static_configs": [{"targets": [f"127.0.0.1:{server.port}"]}]}
    configuration = {"global": {"scrape_interval": "1s"}, "scrape_configs": [job]}
    (tmp_path / "prometheus.yml").write_text(json.dumps(configuration))  # which is YAML too
    files = ["--config.file=prometheus.yml", "--storage.tsdb.path=data"]
    line = [program("prometheus"), *files, f"--web.listen-address=127.0.0.1:{port}"]
    prometheus = subprocess.Popen(line, cwd=tmp_path, stderr=subprocess.DEVNULL)

    def finished_runs() -> Any:
        query = {"query": 'lg_runs_total{command="ping",outcome="finished"}'}
        with contextlib.suppress(httpx.HTTPError, ValueError):  # it is not ready
            answer = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params=query, trust_env=False)
            return [sample["value"][1] for sample in answer.json()["data"]["result"]]

    try:
        assert until(finished_runs) == ["1"]
    finally:
        prometheus.terminate()
        prometheus.wait(PATIENCE)


# Clients of the replaced server.


@pytest.mark.parametrize(
    ("path", "location"),
    [
        ("/health/", "../health"),
        ("/lookingglass/ping/", "../ping"),
        ("/speedtest/100M/?a=b&c=%0a", "../100M?a=b&c=%0a"),
    ],
)
def test_trailing_slash_is_redirected_with_a_relative_path(echo: Server, path: str, location: str) -> None:
    answer = echo.http.post(path, headers={"Host": "evil.example", "X-Forwarded-Host": "evil.example"})
    assert (answer.status_code, answer.headers["Location"]) == (307, location)


@pytest.mark.parametrize(
    "path", ["/nothing/", "//evil.example/", "//evil.example/health/", "/metrics/x/", "/health//"]
)
def test_trailing_slash_of_an_unknown_path_is_404(echo: Server, path: str) -> None:
    assert echo.http.get(f"http://127.0.0.1:{echo.port}{path}").status_code == 404


def test_post_with_a_trailing_slash_is_followed_with_its_body(echo: Server) -> None:
    answer = echo.http.post("/lookingglass/ping/", json={"target": "127.0.0.1"}, follow_redirects=True)
    assert answer.text.startswith("argv ")


def test_usage_names_the_page_and_the_api(echo: Server) -> None:
    usage = echo.http.get("/").text
    assert "Speed tests, server information and API:" in usage
    assert f"http://127.0.0.1:{echo.port}/ " in usage
    assert f"http://127.0.0.1:{echo.port}/docs" in usage
