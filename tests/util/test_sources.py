"""Image sources: distinction of paths and URLs, and removal of user names and passwords from URLs."""

from __future__ import annotations

import pytest

from paddlemix_qwenvl_plugin.util.sources import is_address, is_data_url, without_password


@pytest.mark.parametrize(
    "source",
    ["http://a/b.png", "HTTPS:a", "ftp://a", "s3+x://a", "file:///a", "data:image/png;base64,AA", "DATA:,a"],
)
def test_addresses(source: str) -> None:
    assert is_address(source)
    assert is_data_url(source) == (source.lower().startswith("data:"))


@pytest.mark.parametrize(
    "source",
    [
        "",
        "a.png",
        "data",
        "data/a.png",
        r"C:\a.png",
        "C:/a.png",
        "a:b.png",
        "./http://a",
        "://a",
        " http://a",
    ],
)
def test_paths(source: str) -> None:
    assert not is_address(source)
    assert not is_data_url(source)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("https://me:secret@host/a@b.png", "https://host/a@b.png"),
        ("s3+x://me@host", "s3+x://host"),
        ("http://host/a?b=me@x", "http://host/a?b=me@x"),
        ("me@host.png", "me@host.png"),
    ],
)
def test_without_password(source: str, expected: str) -> None:
    assert without_password(source) == expected
