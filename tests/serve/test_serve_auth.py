"""Access control: API keys, hosts, origins, CORS."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any, Optional

import httpx
import pytest
from serve_service_helpers import PATH, CountingEngine, fake_app, fake_service

from paddlemix_qwenvl_plugin.serve.api_keys import ApiKeys, check_exposure, is_loopback
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings
from paddlemix_qwenvl_plugin.util.errors import UsageError

HOST = "http://127.0.0.1:8000"

NO_KEY = "No API key: send the header Authorization: Bearer KEY"
INCORRECT_KEY = "Incorrect API key"


def send(
    method: str,
    path: str,
    headers: Optional[dict[str, str]] = None,
    page: Optional[Path] = None,
    **settings: Any,
) -> httpx.Response:
    """Send a request to an app with these settings; `page` is the folder of the chat page."""
    engine = CountingEngine()
    engine.ready = True
    app = fake_app(fake_service(engine, **settings), **({"page": page} if page else {}))

    async def request_app() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=HOST) as client:
            body = {} if method == "POST" else None
            return await client.request(method, path, json=body, headers=headers)

    return asyncio.run(request_app())


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("# of Ann\nkey-of-ann\n\n  key-of-bob  \n")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("key", ["key-of-ann", "key-of-bob"])
def test_every_key_of_the_file_is_accepted(key: str, key_file: Path) -> None:
    response = send("POST", PATH, {"Authorization": f"Bearer {key}"}, api_key_file=key_file)
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("authorization", "message"),
    [
        *((value, NO_KEY) for value in (None, "", "Bearer", "Bearer ", "Basic key-of-ann", "key-of-ann")),
        ("Bearer key-of-an", INCORRECT_KEY),
        ("Bearer key-of-anna", INCORRECT_KEY),
        ("Bearer KEY-OF-ANN", INCORRECT_KEY),
        ("Bearer # of Ann", INCORRECT_KEY),
        ("Bearer key-of-ann key-of-bob", INCORRECT_KEY),
        ("Bearer kéy", INCORRECT_KEY),
    ],
)
@pytest.mark.parametrize(("method", "path"), [("POST", PATH), ("GET", "/metrics"), ("GET", "/openapi.json")])
def test_other_authorization_is_refused_with_an_openai_error(
    authorization: Optional[str], message: str, method: str, path: str, key_file: Path
) -> None:
    headers = None if authorization is None else {"Authorization": authorization.encode("latin-1")}
    response = send(method, path, headers, api_key_file=key_file)  # type: ignore[arg-type]
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == "Bearer"
    error = response.json()["error"]
    assert (error["message"], error["type"], error["code"], error["param"]) == (
        message,
        "authentication_error",
        "invalid_api_key",
        None,
    )
    assert "key-of" not in response.text


def test_which_paths_need_a_key(key_file: Path, tmp_path: Path) -> None:
    page = tmp_path / "page"
    (page / "parts").mkdir(parents=True)
    (page / "index.html").write_text("<p>page</p>")
    (page / "parts" / "app.js").write_text("1")
    for path, status in [
        ("/health/live", 200),
        ("/health/ready", 200),
        ("/", 200),
        ("/parts/app.js", 200),
        ("/parts/../../keys", 401),
        ("/parts/%2e%2e/%2e%2e/keys", 401),
        ("/parts", 401),
        ("/health", 401),
        ("/metrics", 401),
    ]:
        assert send("GET", path, page=page, api_key_file=key_file).status_code == status, path


def test_each_key_has_its_own_request_limit(key_file: Path) -> None:
    service = fake_service(CountingEngine(), api_key_file=key_file, max_per_key=1)
    app = fake_app(service)

    async def send_requests() -> None:
        await service.engine.start()
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url=HOST) as client:
            ann, bob = ({"Authorization": f"Bearer key-of-{name}"} for name in ("ann", "bob"))
            key_of_ann = ApiKeys(["key-of-ann"]).short_hash(b"key-of-ann")
            async with service.admission.slots(1, key_of_ann):
                responses = [await client.post(PATH, json={}, headers=headers) for headers in (ann, bob)]
        assert [response.status_code for response in responses] == [429, 200]
        assert responses[0].json()["error"]["type"] == "rate_limit_error"

    asyncio.run(send_requests())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no key in it; write one on each line"),
        (b"# only this\n\n", "no key in it; write one on each line"),
        (b"\xff\xfe", r"cannot be read \(not UTF-8\)"),
        (b"good\ntwo words\n", ":2: an API key is printable ASCII without spaces"),
        ("schlüssel".encode(), ":1: an API key is printable ASCII without spaces"),
    ],
)
def test_invalid_key_file(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        ApiKeys.of_file(path)


def test_missing_key_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--api_key_file .*keys: cannot be read \(No such file"):
        ApiKeys.of_file(tmp_path / "keys")


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, True), (0o604, True)])
def test_warning_if_other_users_can_read_the_key_file(
    mode: int, warned: bool, key_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key_file.chmod(mode)
    with caplog.at_level(logging.WARNING):
        ApiKeys.of_file(key_file)
    assert ("other users can read the API keys" in caplog.text) is warned


def test_no_warning_for_a_credential_of_systemd(
    key_file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Systemd gives the service's user access by an ACL, which appears as a permission of the group."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(key_file.parent))
    key_file.chmod(0o440)
    with caplog.at_level(logging.WARNING):
        ApiKeys.of_file(key_file)
    assert "other users" not in caplog.text


@pytest.mark.parametrize(
    ("address", "settings", "refused"),
    [
        ("127.0.0.1", {}, False),
        ("::1", {}, False),
        ("127.8.8.8", {}, False),
        ("0.0.0.0", {}, True),
        ("::", {}, True),
        ("192.168.1.2", {}, True),
        ("0.0.0.0", {"no_auth": True}, False),
        ("0.0.0.0", {"api_key_file": "keys"}, False),
    ],
)
def test_public_address_needs_api_keys_or_no_auth(
    address: str, settings: dict[str, Any], refused: bool
) -> None:
    if not refused:
        check_exposure(ServeSettings(host=address, **settings), address)
        return
    with pytest.raises(UsageError, match=rf"^--host {address}: .* give --api_key_file, or --no_auth"):
        check_exposure(ServeSettings(host=address, **settings), address)


@pytest.mark.parametrize(
    ("name", "loopback"),
    [
        ("localhost", True),
        ("LOCALHOST", True),
        ("app.localhost", True),
        ("127.0.0.1", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost.example.org", False),
        ("127.0.0.1.example.org", False),
        ("example.org", False),
        ("", False),
        ("0.0.0.0", False),
    ],
)
def test_is_loopback(name: str, loopback: bool) -> None:
    assert is_loopback(name) is loopback


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost:8000", 200),
        ("[::1]:8000", 200),
        ("rebound.example.org:8000", 403),
        ("rebound.example.org", 403),
        ("127.0.0.1.example.org", 403),
        ("localhost:8000@example.org", 403),
        ("", 403),
    ],
)
@pytest.mark.parametrize(("method", "path"), [("POST", PATH), ("GET", "/metrics"), ("GET", "/health/ready")])
def test_dns_rebinding(host: str, status: int, method: str, path: str, key_file: Path) -> None:
    response = send(method, path, {"Host": host})
    assert response.status_code == status
    if status == 403:
        assert response.json()["error"]["code"] == "host_not_allowed"
    # With API keys, or with no_auth, the server accepts any host name.
    bearer = {"Host": host, "Authorization": "Bearer key-of-ann"}
    assert send(method, path, bearer, api_key_file=key_file).status_code == 200
    assert send(method, path, {"Host": host}, no_auth=True).status_code == 200


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        (None, True),
        (HOST, True),
        ("https://127.0.0.1:8000", True),  # the same server behind a proxy with TLS
        ("http://chat.example.org", True),
        ("http://127.0.0.1:8001", False),
        ("http://localhost:8000", False),  # the same server under another name is another origin
        ("http://evil.example.org", False),
        ("http://chat.example.org.evil.org", False),
        ("null", False),
    ],
)
@pytest.mark.parametrize("no_auth", [False, True])
def test_requests_of_other_web_pages(origin: Optional[str], allowed: bool, no_auth: bool) -> None:
    """Without API keys. With them the origin is not checked, since another page has no key."""
    headers = {} if origin is None else {"Origin": origin}
    response = send("POST", PATH, headers, cors_origins=["http://chat.example.org"], no_auth=no_auth)
    assert response.status_code == (200 if allowed else 403)
    if not allowed:
        assert response.json()["error"]["code"] == "origin_not_allowed"
    # A GET request is answered, but without Access-Control-Allow-Origin the browser does not let the page read the
    # response.
    health = send("GET", "/health/live", headers, cors_origins=["http://chat.example.org"], no_auth=no_auth)
    assert health.status_code == 200
    allowed_origin = health.headers.get("Access-Control-Allow-Origin")
    assert allowed_origin == (origin if origin == "http://chat.example.org" else None)


def test_cors_only_for_listed_origins(key_file: Path) -> None:
    preflight = {
        "Origin": "http://chat.example.org",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    }
    for settings in ({}, {"api_key_file": key_file}):
        response = send("OPTIONS", PATH, preflight, **settings)
        assert not [name for name in response.headers if name.startswith("access-control")]
        listed = send("OPTIONS", PATH, preflight, cors_origins=["http://chat.example.org"], **settings)
        assert listed.status_code == 200
        assert listed.headers["Access-Control-Allow-Origin"] == "http://chat.example.org"
        assert "authorization" in listed.headers["Access-Control-Allow-Headers"].lower()
        assert "Access-Control-Allow-Credentials" not in listed.headers
    refused = send(
        "POST",
        PATH,
        {"Origin": "http://chat.example.org"},
        cors_origins=["http://chat.example.org"],
        api_key_file=key_file,
    )
    assert refused.status_code == 401
    # The page may read the error.
    assert refused.headers["Access-Control-Allow-Origin"] == "http://chat.example.org"
    assert json.loads(refused.content)["error"]["code"] == "invalid_api_key"
