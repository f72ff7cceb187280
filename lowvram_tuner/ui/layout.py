"""The page: the top line, four tabs, one clock."""

from __future__ import annotations

import gradio as gr

from lowvram_tuner.chat.client import ChatClient
from lowvram_tuner.config import ConfigError
from lowvram_tuner.ui.chat_tab import ChatTab
from lowvram_tuner.ui.data_check import DataCheck
from lowvram_tuner.ui.data_panel import DataPanel
from lowvram_tuner.ui.desk import Desk
from lowvram_tuner.ui.runs_tab import RunsTab
from lowvram_tuner.ui.train_tab import QUIET, TrainTab

TICK_S = 1.0


def build(desk: Desk, client: ChatClient | None = None, check: DataCheck | None = None) -> gr.Blocks:
    """The whole page over one desk, one chat and one reader of data."""
    with gr.Blocks(title="LowVRAM Tuner", analytics_enabled=False, fill_width=True) as page:
        header = gr.HTML("", elem_id="header")
        timer = gr.Timer(TICK_S)
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Train", id="train", elem_id="tab-train") as train_tab:
                train = TrainTab(desk, header, DataPanel(desk, check))
            with gr.Tab("Data", id="data", elem_id="tab-data") as data_tab:
                train.build_data()
            with gr.Tab("Chat", id="chat", elem_id="tab-chat") as chat_tab:
                chat = ChatTab(desk, client)
            with gr.Tab("Runs", id="runs", elem_id="tab-runs") as runs_tab:
                runs = RunsTab(desk)
        train.wire(page, timer)
        chat.wire(chat_tab, [train_tab, data_tab, runs_tab])
        runs.wire(runs_tab, [train_tab, data_tab, chat_tab])
        train.form.look_button.click(lambda: gr.Tabs(selected="data"), None, tabs, **QUIET)

        def chat_with(run_id: str | None) -> list:
            try:
                return [gr.Tabs(selected="chat"), chat.chat_with(run_id), gr.Timer(active=True)]
            except ConfigError:
                return [gr.skip(), gr.skip(), gr.skip()]

        opened = [tabs, chat.target, chat.timer]
        train.chat_button.click(lambda: chat_with(run.id if (run := desk.current()) else None), None, opened, **QUIET)
        runs.chat.click(lambda ids: chat_with(ids[0] if len(ids) == 1 else None), runs.chosen, opened, **QUIET)
    return page
