"""Who may talk to the page: decisions over headers here, a real server and client in test_server.py."""

from __future__ import annotations

import pytest

from lowvram_tuner.ui.guard import RequestGuard, check_exposure, parse_auth

PAGE = "127.0.0.1:7860"


def refused(guard: RequestGuard, method: str = "GET", **headers: str) -> bool:
    return guard.refusal({k.replace("_", "-"): [v] for k, v in headers.items()}, method) is not None


@pytest.fixture
def guard() -> RequestGuard:
    return RequestGuard(app=None)


@pytest.mark.parametrize("host", [PAGE, "localhost:7860", "[::1]:7860", "127.0.0.1", "LOCALHOST", "127.9.9.9:1"])
def test_this_machine_may_be_addressed(guard, host):
    assert not refused(guard, host=host)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:7860", "localhost.evil.example", "127.0.0.1.evil.example", "192.168.1.7:7860", "10.0.0.1", "",
        "evil.example@127.0.0.1", "127.0.0.1:7860/x", "127.0.0.1:port", "[::1", "0x7f000001", "2130706433", "my-page.gradio.live",
    ],
)  # fmt: skip
def test_other_names_and_addresses_are_refused(guard, host):
    assert refused(guard, host=host)


def test_no_host_and_two_hosts_are_refused(guard):
    assert guard.refusal({}, "GET")
    assert guard.refusal({"host": [PAGE, PAGE]}, "GET")


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:3000", "http://localhost:7860", "https://127.0.0.1", "file://"])
def test_other_origins_are_refused(guard, origin):
    assert refused(guard, "POST", host=PAGE, origin=origin)


def test_the_page_itself_and_programs_may_post(guard):
    assert not refused(guard, "POST", host=PAGE, origin=f"http://{PAGE}", sec_fetch_site="same-origin")
    assert not refused(guard, "POST", host=PAGE)


def test_a_link_may_be_followed_but_nothing_embedded(guard):
    link = {"host": PAGE, "sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate", "sec_fetch_dest": "document"}
    assert not refused(guard, "GET", **link)
    assert refused(guard, "POST", **link)
    assert refused(guard, "GET", **{**link, "sec_fetch_dest": "iframe"})
    assert refused(guard, "GET", host=PAGE, sec_fetch_site="cross-site", sec_fetch_mode="no-cors", sec_fetch_dest="image")
    assert refused(guard, "GET", host=PAGE, sec_fetch_site="same-site", sec_fetch_mode="cors", sec_fetch_dest="empty")


def test_listening_lets_addresses_in_but_no_foreign_names():
    guard = RequestGuard(app=None, listen=True)
    assert not refused(guard, host="192.168.1.7:7860")
    assert refused(guard, host="evil.example:7860")


def test_sharing_lets_the_tunnel_in():
    guard = RequestGuard(app=None, share=True)
    assert not refused(guard, host="abc.gradio.live")
    assert refused(guard, host="gradio.live.evil.example")


@pytest.mark.parametrize(("listen", "share"), [(True, False), (False, True)])
def test_an_open_page_needs_a_password(listen, share):
    with pytest.raises(ValueError, match="--auth user:password"):
        check_exposure(listen, share, None)
    check_exposure(listen, share, ("anna", "otter"))


def test_auth_is_a_name_and_a_password():
    assert parse_auth("anna:quiet:otter") == ("anna", "quiet:otter")
    assert parse_auth(None) is None
    for text in ("anna", "anna:", ":otter", ""):
        with pytest.raises(ValueError, match="name and a password"):
            parse_auth(text)
