"""Where the page is served, and to whom."""

import logging
import socket
import sys
import urllib.request

import pytest

from saelens_ext.serve.server import address_of, check_installed, listen


def test_a_port_in_use_is_said_with_the_remedy():
    with listen(port=0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ValueError, match=f"Port {port} of 127.0.0.1 is in use: give another, --port={port + 1}, or"
        ):
            listen(port=port)


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none_is_refused(port):
    with pytest.raises(ValueError, match=f"port must be 0 .* to 65535, got {port}"):
        listen(port=port)


@pytest.mark.parametrize("host", ["example.org", "", "127.0.0.1:80", "192.0.2.1"])
def test_an_address_that_is_not_this_machines_is_refused(host):
    with pytest.raises(
        ValueError, match=f"{host!r}" if host != "192.0.2.1" else "Port 0 of 192.0.2.1 cannot be opened"
    ):
        listen(host, 0)


def test_only_this_machine_is_served_unless_asked_for(caplog):
    with caplog.at_level(logging.WARNING), listen(port=0) as found:
        assert found.getsockname()[0] == "127.0.0.1" and not caplog.records
    with listen("0.0.0.0", 0) as found:
        assert "Whoever reaches 0.0.0.0 can read with this model, without a password" in caplog.text


def test_an_ipv6_address_is_written_in_brackets():
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    with listen("::1", 0) as found:
        assert address_of(found).startswith("http://[::1]:")


def test_the_page_is_served(address):
    with urllib.request.urlopen(address) as answer:
        assert b"A &lt;b&gt;tiny&lt;/b&gt; model" in answer.read()
        assert "server" not in answer.headers


def test_a_package_that_is_not_installed_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ImportError, match=r"needs the package uvicorn: pip install 'saelens-ext\[serve\]'"):
        check_installed()
