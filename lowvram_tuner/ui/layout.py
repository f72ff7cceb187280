"""The page: the top line, three tabs, one clock."""

from __future__ import annotations

import gradio as gr

from lowvram_tuner.ui.desk import Desk
from lowvram_tuner.ui.runs_tab import RunsTab
from lowvram_tuner.ui.train_tab import TrainTab

TICK_S = 1.0


def build(desk: Desk) -> gr.Blocks:
    """The whole page over one desk."""
    with gr.Blocks(title="LowVRAM Tuner", analytics_enabled=False, fill_width=True) as page:
        header = gr.HTML("", elem_id="header")
        timer = gr.Timer(TICK_S)
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Train", id="train", elem_id="tab-train") as train_tab:
                train = TrainTab(desk, header)
            with gr.Tab("Runs", id="runs", elem_id="tab-runs") as runs_tab:
                runs = RunsTab(desk)
        train.wire(page, timer)
        runs.wire(runs_tab, [train_tab])
    return page
