"""The served page against a client that does not behave: other hosts and origins, foreign paths, made-up calls."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from pathlib import Path

import pytest
from served_page import Served

from lowvram_tuner.train.run_dir import list_runs

ROOT = Path(__file__).resolve().parents[2]


def ask(served, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of one request whose Host is the page's unless another is given."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    sent = {"Host": f"127.0.0.1:{served.port}", **{k.replace("_", "-"): v for k, v in headers.items()}}
    connection.putrequest(method, path, skip_host=True)
    for name, value in sent.items():
        connection.putheader(name, value)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    found = answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    connection.close()
    return found


def config(served) -> dict:
    return json.loads(ask(served, "GET", "/config")[2])


def call(served, fn_index: int, data: list, **headers: str) -> tuple[int, dict[str, str], bytes]:
    body = json.dumps({"data": data, "fn_index": fn_index, "session_hash": "test"}).encode()
    return ask(served, "POST", "/gradio_api/run/predict", body, Content_Type="application/json", **headers)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "10.1.2.3", ""])
@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("GET", "/config"), ("POST", "/gradio_api/queue/join"), ("GET", "/gradio_api/startup-events")])
def test_a_rebound_name_gets_nothing(served, host, method, path):
    status, _, body = ask(served, method, path, b"{}" if method == "POST" else None, Host=host)
    assert status == 403
    assert b"gradio" not in body


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", "http://127.0.0.1:1"])
@pytest.mark.parametrize("path", ["/gradio_api/run/predict", "/gradio_api/queue/join", "/gradio_api/upload", "/login", "/gradio_api/component_server"])
def test_another_origin_may_not_post(served, origin, path):
    status, headers, _ = ask(served, "POST", path, b"{}", Origin=origin, Content_Type="text/plain")
    assert status == 403
    if "evil" in origin:
        assert "access-control-allow-origin" not in headers


def test_another_origin_gets_no_permission_in_advance(served):
    _, headers, _ = ask(served, "OPTIONS", "/gradio_api/queue/join", Origin="http://evil.example", Access_Control_Request_Method="POST")
    assert "access-control-allow-origin" not in headers


def test_the_page_itself_is_answered(served):
    status, headers, body = ask(served, "GET", "/")
    assert status == 200 and b"LowVRAM Tuner" in body
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy and "http" not in policy
    assert headers["x-content-type-options"] == "nosniff"


def test_nothing_of_the_page_points_elsewhere(served):
    body = ask(served, "GET", "/")[2].decode()
    for elsewhere in ("fonts.googleapis", "cdnjs", "cdn.jsdelivr", "unpkg", "googletagmanager"):
        assert elsewhere not in body
    page = config(served)
    assert page["analytics_enabled"] is False
    assert not page.get("footer_links")


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd", "/proc/self/environ", "../../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "{root}/.form.json", "{root}/secret.txt",
        "{root}/.uploads/../secret.txt", "{project}/app.py", "app.py", "file:///etc/passwd", "http://evil.example/x",
    ],
)  # fmt: skip
@pytest.mark.parametrize("route", ["/gradio_api/file=", "/file=", "/static/", "/assets/", "/custom_component/", "/gradio_api/stream/"])
def test_files_of_this_machine_are_not_served(served, route, path):
    served.root.mkdir(exist_ok=True)
    (served.root / "secret.txt").write_text("the secret")
    name = path.format(root=served.root, project=ROOT).replace(" ", "%20").replace("ü", "%C3%BC")
    status, _, body = ask(served, "GET", route + name)
    assert status != 200 or b"<title>" in body, body[:200]
    assert b"root:" not in body and b"the secret" not in body and b"def main" not in body


def test_an_uploaded_page_is_not_run(served):
    page = b"<script>alert(1)</script>"
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="../../evil.html"\r\nContent-Type: text/html\r\n\r\n' + page + b"\r\n--x--\r\n"
    status, _, answer = ask(served, "POST", "/gradio_api/upload", body, Content_Type="multipart/form-data; boundary=x")
    assert status == 200
    where = Path(json.loads(answer)[0])
    assert where.is_relative_to(served.root / ".uploads")
    status, headers, _ = ask(served, "GET", f"/gradio_api/file={str(where).replace(' ', '%20').replace('ü', '%C3%BC')}")
    if status == 200:
        assert headers["content-disposition"].startswith("attachment") or headers["content-type"].startswith("application/octet-stream")


HOSTILE = ["../../etc", "/etc/passwd", "<script>alert(1)</script>", "\x00", "20200101-000000-abcd", 10**400, -1, None, [], {"path": "/etc/passwd"}, True]


def test_made_up_calls_change_nothing(served):
    """Every handler of the page, called directly with nonsense: no run appears, no file is touched, the page lives."""
    (served.root / "20200101-000000-abcd").mkdir(exist_ok=True)  # looks like a run's id but is none
    before = sorted(p.name for p in served.root.iterdir() if p.name not in (".form.json", ".uploads", ".lock"))
    for dependency in config(served)["dependencies"]:
        for value in HOSTILE:
            status, _, body = call(served, dependency["id"], [value] * len(dependency["inputs"]))
            assert status in (200, 400, 403, 404, 422, 500), status
            assert b"root:" not in body and b"Traceback" not in body
    after = sorted(p.name for p in served.root.iterdir() if p.name not in (".form.json", ".uploads", ".lock"))
    assert after == before
    assert list_runs(served.root) == []
    assert ask(served, "GET", "/")[0] == 200


def test_no_call_is_offered_by_name(served):
    page = json.loads(ask(served, "GET", "/gradio_api/info")[2])
    assert page["named_endpoints"] == {}
    assert [d["api_name"] for d in config(served)["dependencies"] if d["api_visibility"] != "private"] == []


def test_the_page_never_loads_torch(tmp_path):
    """Building and serving the page, planning, listing runs and opening a chat client: all without torch."""
    code = f"""
import sys, urllib.request
from lowvram_tuner.ui.quick_start import import_gradio
import_gradio()
from lowvram_tuner.ui.serve import serve
page, address = serve({str(tmp_path)!r}, browser=False, block=False)
assert b"LowVRAM Tuner" in urllib.request.urlopen(address).read()
page.close()
print(sorted(m for m in ("torch", "transformers", "triton", "peft", "datasets", "pyarrow") if m in sys.modules), "gradio" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().splitlines()[-1] == "[] True", done.stderr[-2000:]


@pytest.mark.parametrize("flags", [["--listen"], ["--share"], ["--listen", "--auth", "anna"]])
def test_an_open_page_without_a_password_is_refused(flags):
    done = subprocess.run([sys.executable, "app.py", "--no-browser", *flags], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "--auth" in done.stderr


def test_a_taken_port_is_said_in_a_line(served, tmp_path):
    command = [sys.executable, "app.py", "--no-browser", "--port", str(served.port), "--runs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: the page cannot be served on port {served.port}")
    assert "Traceback" not in done.stderr


def test_a_password_is_asked_for(tmp_path):
    class Guarded(Served):
        def command(self) -> list[str]:
            return [sys.executable, str(ROOT / "app.py"), "--no-browser", "--listen", "--auth", "anna:quiet:otter", "--port", str(self.port), "--runs", str(self.root)]

    page = Guarded(tmp_path)
    try:
        assert ask(page, "GET", "/config")[0] == 401
        assert call(page, 0, [])[0] == 401
        form = {"Content_Type": "application/x-www-form-urlencoded"}
        assert ask(page, "POST", "/login", b"username=anna&password=wrong", **form)[0] == 400
        status, headers, _ = ask(page, "POST", "/login", b"username=anna&password=quiet%3Aotter", **form)
        assert status == 200
        cookie = headers["set-cookie"].split(";")[0]
        assert ask(page, "GET", "/config", Cookie=cookie)[0] == 200
        assert ask(page, "GET", "/config", Cookie=cookie, Host="evil.example")[0] == 403
        assert ask(page, "GET", "/config", Cookie=cookie, Host=f"192.168.0.9:{page.port}")[0] == 200
    finally:
        page.close()
