"""The network as people have it: proxies, certificates, netrc, keys, addresses, open files.

Each is tried on preflight and requests alike, since a run does both.
"""

from __future__ import annotations

import datetime
import ipaddress
import resource
import socket
import ssl
import subprocess

import pytest
from aiohttp import web

from fabe_ds import network
from fabe_ds.errors import UsageError
from fabe_ds.providers.ollama import OllamaProvider
from tests.support.server import Call, ModelServer, error, openai_run

DEAD = "http://127.0.0.1:9"


def records(box, count: int = 3) -> None:
    box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(count)])


@pytest.mark.parametrize(
    "environment",
    [
        {"http_proxy": DEAD, "no_proxy": "127.0.0.0/8"},
        {"http_proxy": DEAD, "no_proxy": "127.0.0.1:PORT"},
        {"ALL_PROXY": "socks5://127.0.0.1:9"},
        {"http_proxy": DEAD},
        {"HTTP_PROXY": DEAD, "HTTPS_PROXY": DEAD},
        {"all_proxy": DEAD},
    ],
)
def test_G5_this_machine_is_reached_direct(box, server, environment):
    records(box)
    port = server.root.rsplit(":", 1)[1]
    given = {name: value.replace("PORT", port) for name, value in environment.items()}
    assert box.fabe(*openai_run(server), **given).code == 0
    assert len(server.calls) == 3


def run_at(url: str) -> list[str]:
    run = ["run", "--input", "data.jsonl", "--instruction", "x", "--provider", "openai"]
    return [*run, "--model", "m", "--base-url", url]


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"HTTP_PROXY": DEAD}, "HTTP_PROXY=http://127.0.0.1:9"),
        ({"http_proxy": "http://u:secret@127.0.0.1:9"}, "http_proxy=http://127.0.0.1:9"),
        ({"ALL_PROXY": "socks5://127.0.0.1:9"}, "only http proxies are spoken to"),
        ({"all_proxy": "127.0.0.1:9"}, "all_proxy=http://127.0.0.1:9"),
    ],
)
def test_a_dead_proxy_is_named(box, environment, says):
    records(box)
    ended = box.fabe(*run_at("http://model.example:8000/v1"), **environment)
    assert (ended.code, ended.err.count("\n")) == (1, 1)
    assert says in ended.err
    assert "NO_PROXY" in ended.err
    assert "secret" not in ended.err
    doctor = box.fabe("doctor", **environment)
    assert next(iter(environment)).upper() in doctor.out
    assert "secret" not in doctor.out


def test_a_proxy_that_works_is_used_for_all(box):
    """An http proxy is sent the whole address; ours answers for the host itself."""
    seen = []

    async def handle(request: web.Request) -> web.Response:
        seen.append((request.method, str(request.url)))
        if request.method == "GET":
            return web.json_response({"data": []})
        message = {"content": "y"}
        return web.json_response({"choices": [{"message": message, "finish_reason": "stop"}]})

    class Proxy(ModelServer):
        async def _start(self) -> None:
            app = web.Application()
            app.router.add_route("*", "/{tail:.*}", handle)
            await self._listen(app)

    with Proxy() as proxy:
        records(box)
        ended = box.fabe(*run_at("http://model.example:8000/v1"), http_proxy=proxy.root)
        assert ended.code == 0, ended
    assert len(seen) == 4
    assert {url.split("/v1")[0] for _, url in seen} == {"http://model.example:8000"}


def test_netrc_is_never_read(box, server):
    server.key = "sk-real"
    netrc = box.write("netrc", "machine 127.0.0.1 login bob password pw\n")
    netrc.chmod(0o600)
    records(box)
    ended = box.fabe(*openai_run(server), NETRC=str(netrc), OPENAI_API_KEY="sk-real")
    assert ended.code == 0, ended
    assert not any("Basic" in call.headers["Authorization"] for call in server.calls)


@pytest.mark.parametrize("key", ["sk-real\n", "sk-real\r\n", " sk-real "])
def test_white_space_around_a_key_is_none_of_it(box, server, key):
    server.key = "sk-real"
    records(box)
    assert box.fabe(*openai_run(server), OPENAI_API_KEY=key).code == 0


@pytest.mark.parametrize("key", ["\u201csk-real\u201d", '"sk-real"', "sk real", "sk-ré"])
def test_a_key_that_is_none_is_one_line(box, server, key):
    records(box)
    ended = box.fabe(*openai_run(server), OPENAI_API_KEY=key, PYTHONUTF8="1")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "OPENAI_API_KEY: the key holds a character that no key has" in ended.err
    assert "real" not in ended.err
    assert not server.calls


def test_a_user_in_the_address_goes_before_the_key(box):
    async def behave(call: Call) -> web.StreamResponse | None:
        given = call.headers.get("Authorization", "")
        return None if given == "Basic dTpwQHc=" else error(401, given)

    with ModelServer(behave) as server:
        records(box)
        url = server.url.replace("http://", "http://u:p%40w@")
        ended = box.fabe(*openai_run(server, "--base-url", url), OPENAI_API_KEY="k")
        assert ended.code == 0, ended
    left = b"".join(p.read_bytes() for p in box.path.rglob("*") if p.is_file())
    assert b"p%40w" not in left


@pytest.mark.parametrize("name", ["OPENAI_BASE_URL", "OPENAI_API_BASE"])
def test_the_address_in_the_environment_is_read(box, server, name):
    records(box)
    run = [part for part in openai_run(server) if part not in ("--base-url", server.url)]
    ended = box.fabe(*run, **{name: server.url})
    assert ended.code == 0, ended
    assert f"{name}: asking {server.url}" in ended.err
    assert len(server.calls) == 3
    assert box.report()["config"]["base_url"] == server.url
    assert box.fabe("retry", "outputs.run.json").code == 0  # without the variable
    flag = box.fabe(*openai_run(server), **{name: "http://127.0.0.1:9/v1"})
    assert flag.code == 0, flag  # a flag goes before it


def test_OLLAMA_HOST_is_read(box, server):
    records(box)
    port = server.root.rsplit(":", 1)[1]
    run = ["run", "--input", "data.jsonl", "--instruction", "x", "--provider", "ollama"]
    ended = box.fabe(*run, "--model", "llama3", OLLAMA_HOST=f"0.0.0.0:{port}")
    assert ended.code == 0, ended


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:11434"),
        ("box:8080", "http://box:8080"),
        (":8080", "http://127.0.0.1:8080"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("http://box", "http://box"),
        ("https://box:1/x", "https://box:1/x"),
        ("::1", "http://[::1]:11434"),
        ("[::]:99", "http://[::1]:99"),
    ],
)
def test_OLLAMA_HOST_as_ollama_reads_it(text, url):
    assert OllamaProvider.base_url_of(text) == url


@pytest.mark.parametrize("provider", ["openai", "ollama"])
def test_no_provider_sends_a_key_in_the_open(box, provider, monkeypatch):
    records(box)
    run = ["run", "--input", "data.jsonl", "--instruction", "x", "--model", "m", "--api-key", "k"]
    ended = box.fabe(*run, "--provider", provider, "--base-url", "http://8.8.8.8/v1")
    assert (ended.code, ended.err.count("\n")) == (1, 1)
    assert "the key would be sent unencrypted" in ended.err


@pytest.mark.parametrize(
    ("host", "addresses", "private"),
    [
        ("gpu.corp.example", ["10.1.2.3"], True),
        ("gpu.corp.example", ["10.1.2.3", "8.8.8.8"], False),
        ("gpu.tailnet.example", ["100.64.0.7"], True),
        ("api.example.com", ["8.8.8.8"], False),
        ("nowhere.example", None, False),
        ("gpu", None, True),
        ("10.0.0.7", None, True),
        ("fd00::1", None, True),
        ("8.8.8.8", None, False),
    ],
)
def test_an_internal_name_is_known_by_its_address(monkeypatch, host, addresses, private):
    def resolve(name, *_, **__):
        if addresses is None:
            raise socket.gaierror
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 0)) for a in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert network.is_private(host) is private


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A CA's file, and a server's certificate and key."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("tls")
    now = datetime.datetime.now(datetime.UTC)

    def made(name, issuer, key, signer, *extensions):
        built = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )
        for extension, critical in extensions:
            built = built.add_extension(extension, critical)
        return built.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def named(text):
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = made(named("ca"), named("ca"), ca_key, ca_key, (x509.BasicConstraints(True, None), True))
    alternative = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    leaf = made(named("server"), named("ca"), key, ca_key, (alternative, False))
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (folder / "ca.pem").write_bytes(ca)
    (folder / "server.pem").write_bytes(leaf + private)
    return folder


class SecureServer(ModelServer):
    """The same over TLS."""

    pem = ""

    async def _listen(self, app: web.Application) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.pem)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=context).start()
        self._port = self._runner.addresses[0][1]

    @property
    def root(self) -> str:
        return f"https://127.0.0.1:{self._port}"


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "CURL_CA_BUNDLE"])
def test_one_set_of_certificates_for_all(box, certificate, variable):
    server = SecureServer()
    server.pem = str(certificate / "server.pem")
    with server:
        records(box)
        refused = box.fabe(*openai_run(server))
        assert (refused.code, refused.err.count("\n")) == (1, 1)
        assert "certificate is not accepted" in refused.err
        assert "SSL_CERT_FILE or REQUESTS_CA_BUNDLE" in refused.err
        trusted = {variable: str(certificate / "ca.pem")}
        assert box.fabe(*openai_run(server), **trusted).code == 0
        doctor = box.fabe("doctor", "--base-url", server.url, **trusted)
        assert doctor.code == 0, doctor
        wrong = box.fabe(*openai_run(server, "--no-resume"), **{variable: "gone.pem"})
        assert (wrong.code, wrong.err.count("\n")) == (2, 1)
        assert f"{variable}=gone.pem" in wrong.err


def test_a_folder_of_certificates(box, certificate, tmp_path):
    ca = (certificate / "ca.pem").read_bytes()
    hashed = subprocess.run(
        ["openssl", "x509", "-hash", "-noout"], input=ca, capture_output=True, check=True
    )
    (tmp_path / "certs").mkdir()
    (tmp_path / "certs" / f"{hashed.stdout.decode().strip()}.0").write_bytes(ca)
    server = SecureServer()
    server.pem = str(certificate / "server.pem")
    with server:
        records(box)
        ended = box.fabe(*openai_run(server), SSL_CERT_DIR=str(tmp_path / "certs"))
        assert ended.code == 0, ended


def test_few_open_files_are_no_server_that_is_gone(box):
    with ModelServer(latency=0.05) as server:
        records(box, 300)
        process = subprocess.run(
            ["bash", "-c", f"ulimit -n 90 && exec {box_command(server)}"],
            cwd=box.path,
            env=box.environment,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert process.returncode == 0, process.stderr
        assert "ulimit -n" in process.stderr
        assert server.most_in_flight <= 60
        assert len(server.calls) == 300


def box_command(server: ModelServer) -> str:
    from tests.conftest import COMMAND

    return " ".join(map(str, [*COMMAND, *openai_run(server, "--concurrency", 200)]))


def test_the_soft_limit_is_raised(monkeypatch):
    raised = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    assert network.allow_open_files(200, 48) == 200
    assert raised == [(248, 4096)]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://u:p@h:1/v1/", "http://h:1/v1"),
        ("https://h/v1?api-version=2&code=s", "https://h/v1?api-version=2&code=..."),
        ("bob:hunter2@proxy:3128", "proxy:3128"),
        ("http://u:p@h:99999/v1?key=s", "http://h:99999/v1"),
        ("socks5://u:p@h:1", "socks5://h:1"),
        ("localhost,10.0.0.0/8", "localhost,10.0.0.0/8"),
    ],
)
def test_what_is_shown_of_an_address(url, shown):
    assert network.without_secrets(url) == shown


@pytest.mark.parametrize("key", ["", " ", None])
def test_no_key_is_no_key(key):
    assert network.clean_key(key, "x") is None


def test_a_wrong_character_is_named():
    with pytest.raises(UsageError, match=r"--api-key: .*\(’\)"):
        network.clean_key("sk’1", "--api-key")


@pytest.mark.parametrize("given", ["", "/v1", "/v1/v1"])
def test_an_address_beside_the_servers_is_named(box, server, given):
    box.lines("data.jsonl", [{"code": "x"}])
    run = [*openai_run(server)[:-1], f"{server.root}{given}"]
    ended = box.fabe(*run)
    if given == "/v1":
        assert ended.code == 0
        return
    assert ended.code == 1
    assert f"--base-url {server.url}\n" in ended.err
    assert server.calls == []


def test_the_environment_goes_over_a_file_and_a_flag_over_both(box, server):
    box.lines("data.jsonl", [{"code": "x"}])
    box.write("how.yaml", f"base_url: {server.root}/file/v1\n")
    run = openai_run(server)[:-2]
    dry = box.fabe(*run, "--config", "how.yaml", "--dry-run")
    assert "/file/v1/chat/completions" in dry.out
    environment = {"OPENAI_BASE_URL": f"{server.root}/environment/v1"}
    dry = box.fabe(*run, "--config", "how.yaml", "--dry-run", **environment)
    assert "/environment/v1/chat/completions" in dry.out
    dry = box.fabe(
        *run, "--config", "how.yaml", "--base-url", server.url, "--dry-run", **environment
    )
    assert f"{server.url}/chat/completions" in dry.out
