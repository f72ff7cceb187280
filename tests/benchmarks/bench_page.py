"""Times the page as a user meets it: `python tests/benchmarks/bench_page.py [--json]`. Nothing is asserted here.

Prints seconds from `python app.py` to the first answered page (and the processor's own, which other programs do not
lengthen as much) and to a usable one in a browser, the UI process' memory after
that, and milliseconds from a change of a control to a changed gauge. Needs Chromium and the package playwright for all but
the first figure.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
BROWSER = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
CHANGES = 12

# Resolves with the milliseconds from the press to the first change of the gauge's text or widths.
_ANSWER_MS = """
([selector, value]) => new Promise((done) => {
  const gauge = document.querySelector('#vram-gauge');
  const seen = new MutationObserver(() => { seen.disconnect(); done(performance.now() - start); });
  seen.observe(gauge, { childList: true, subtree: true, characterData: true, attributes: true });
  const input = document.querySelector(selector);
  const start = performance.now();
  if (input.type === 'radio') { input.click(); return; }
  Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(input, value);
  input.dispatchEvent(new Event('input', { bubbles: true }));
  input.dispatchEvent(new Event('pointerup', { bubbles: true }));
  input.dispatchEvent(new Event('change', { bubbles: true }));
})
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as runs:
        port = free_port()
        address, begun = f"http://127.0.0.1:{port}/", time.perf_counter()
        app = subprocess.Popen([sys.executable, "app.py", "--no-browser", "--port", str(port), "--runs", runs], cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            figures = {"page_s": answered(address, begun)}
            figures["page_cpu_s"] = sum(psutil.Process(app.pid).cpu_times()[:2])
            figures |= in_browser(address, begun)
            figures["rss_mb"] = psutil.Process(app.pid).memory_info().rss / 1e6
        finally:
            app.terminate()
            app.wait()
    figures = {k: round(v, 2) for k, v in figures.items()}
    print(json.dumps(figures) if options.json else "\n".join(f"{k:18} {v}" for k, v in figures.items()))
    return 0


def answered(address: str, begun: float) -> float:
    """Seconds until the page's HTML was served."""
    while True:
        try:
            with urllib.request.urlopen(address, timeout=5) as page:
                page.read()
                return time.perf_counter() - begun
        except OSError:
            time.sleep(0.02)


def in_browser(address: str, begun: float) -> dict[str, float]:
    """Seconds until Start can be pressed, and how long the gauge takes to answer."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return {}
    if not chromium:
        return {}
    with sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=chromium, args=list(BROWSER))
        page = browser.new_page(viewport={"width": 1366, "height": 768})
        page.goto(address)
        page.wait_for_selector("#start:not([disabled])", timeout=60_000)
        usable = time.perf_counter() - begun
        time.sleep(2)
        answers = []
        for i in range(CHANGES):
            answers.append(page.evaluate(_ANSWER_MS, ["#bits input[value='16']" if i % 2 == 0 else "#bits input[value='4']", ""]))
            time.sleep(0.35)
        for i in range(CHANGES):
            answers.append(page.evaluate(_ANSWER_MS, ["#batch-size input[type=range]", str(9 + i)]))
            time.sleep(0.35)
        browser.close()
    return {"usable_s": usable, "gauge_median_ms": statistics.median(answers), "gauge_worst_ms": max(answers)}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
