"""Puts the page on the network, or rather keeps it off: this machine only, guarded, nothing sent anywhere."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from lowvram_tuner.chat.client import ChatClient
from lowvram_tuner.ui import theme
from lowvram_tuner.ui.data_check import DataCheck
from lowvram_tuner.ui.desk import Desk
from lowvram_tuner.ui.guard import RequestGuard, check_exposure
from lowvram_tuner.ui.layout import build
from lowvram_tuner.ui.quick_start import without_applications

MAX_UPLOAD = "4gb"  # larger data is named by its path
QUEUE_POLL_S = 0.03  # Gradio looks for queued work every millisecond, which takes 7 % of a core from the training beside it
SESSIONS = 64  # browser tabs remembered; an older one is simply sent everything again


def serve(
    runs: Path | str,
    port: int | None = None,
    auth: tuple[str, str] | None = None,
    listen: bool = False,
    share: bool = False,
    browser: bool = True,
    block: bool = True,
    desk: Desk | None = None,
    client: ChatClient | None = None,
    check: DataCheck | None = None,
) -> tuple[gr.Blocks, str]:
    """Serves the page over the runs in `runs`; returns it and its address (after it was closed, when `block`).

    `desk`, `client` and `check` are made from `runs` where they are not given.
    """
    check_exposure(listen, share, auth)
    with without_applications():
        page = build(desk or Desk(runs, local=not (listen or share)), client, check)
    _, address, _ = page.launch(
        server_name="0.0.0.0" if listen else "127.0.0.1",
        server_port=port,
        auth=auth,
        share=share,
        inbrowser=browser,
        prevent_thread_lock=True,
        app_kwargs={"middleware": [Middleware(RequestGuard, listen=listen, share=share)]},
        theme=theme.theme(),
        css_paths=[theme.CSS_FILE],
        head=theme.head(),
        footer_links=[],
        allowed_paths=[],
        max_file_size=MAX_UPLOAD,
        state_session_capacity=SESSIONS,
        ssl_verify=False,  # Gradio asks its own plain address once; this only spares it the loading of certificates
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        quiet=True,
        show_error=False,
    )
    page._queue.sleep_when_free = QUEUE_POLL_S
    print(f"LowVRAM Tuner: {address}", flush=True)
    if block:
        page.block_thread()
    return page, address
