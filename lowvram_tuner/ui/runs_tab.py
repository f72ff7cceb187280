"""The Runs tab: every run in one table; choose one to act on it, two to compare their curves."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from html import escape
from typing import Any

import gradio as gr

from lowvram_tuner.config import ConfigError
from lowvram_tuner.train.lock import Busy
from lowvram_tuner.train.repeat import command_line
from lowvram_tuner.train.run_dir import FINAL, RunDir
from lowvram_tuner.ui.desk import Desk, config_of
from lowvram_tuner.ui.run_view import answers_html, notes_html
from lowvram_tuner.ui.runs_view import compare_html, table_html
from lowvram_tuner.ui.words import situation

QUIET = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

# Rows are boxes to tick: at most two, remembered by run and not by place, because the table grows at its top.
_PICK_JS = """
const chosen = new Set();
const show = () => element.querySelectorAll('input[data-run]').forEach((box) => { box.checked = chosen.has(box.dataset.run); });
element.addEventListener('change', (event) => {
  const run = event.target.dataset.run;
  if (!run) return;
  if (event.target.checked) chosen.add(run); else chosen.delete(run);
  while (chosen.size > 2) chosen.delete(chosen.values().next().value);
  show();
  trigger('select', {runs: [...chosen]});
});
watch('value', show);
"""


class RunsTab:
    """Builds the tab inside the caller's `gr.Tab` and wires it. `chat_with(run_id)`'s updates are the caller's."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.timer = gr.Timer(2, active=False)
        self.sent = gr.State("")
        self.chosen = gr.State([])
        with gr.Column(elem_classes="card"):
            self.table = gr.HTML("", elem_id="runs-table", js_on_load=_PICK_JS)
        self.hint = gr.HTML("", elem_id="runs-hint")
        with gr.Column(elem_classes="card", elem_id="run-card", visible=False) as self.card:
            self.title = gr.HTML("", elem_id="run-card-title")
            with gr.Row(elem_id="run-actions", visible=False) as self.actions:
                self.chat = gr.Button("Chat", size="sm", variant="primary", elem_id="run-chat", scale=0, min_width=90)
                self.resume = gr.Button("Resume", size="sm", elem_id="run-resume", scale=0, min_width=90)
                self.folder = gr.Button("Open folder", size="sm", elem_id="run-folder", scale=0, min_width=110, visible=desk.local)
            self.said = gr.HTML("", elem_id="run-said")
            self.curves = gr.HTML("", elem_id="run-curves")
            with gr.Accordion("Name, command line, delete", open=False, elem_id="run-manage", visible=False) as self.manage:
                with gr.Row(equal_height=True):
                    self.name = gr.Textbox(label="Name", max_length=80, elem_id="run-name", interactive=True)
                    self.rename = gr.Button("Rename", size="sm", elem_id="run-rename", scale=0, min_width=90)
                self.command = gr.Textbox(label="The command that repeats this run", lines=2, interactive=False, buttons=["copy"], elem_id="run-command")
                with gr.Row(equal_height=True):
                    self.confirm = gr.Textbox(label="Type the run's name to delete it for good", elem_id="run-confirm", interactive=True)
                    self.delete = gr.Button("Delete", size="sm", variant="stop", elem_id="run-delete", scale=0, min_width=90)
            self.answers = gr.HTML("", elem_id="run-answers")

    @property
    def shown(self) -> list[gr.components.Component]:
        """What a choice of runs fills."""
        return [self.card, self.actions, self.manage, self.title, self.curves, self.answers, self.name, self.command, self.resume, self.chat, self.said, self.confirm]

    def wire(self, tab: gr.Tab, others: list[gr.Tab]) -> None:
        """Connects the table and its buttons. The table is kept up to date only while its tab is open."""
        fill = [self.table, self.hint, self.sent]
        tab.select(lambda sent: [*self.tick(sent), gr.Timer(active=True)], self.sent, [*fill, self.timer], **QUIET)
        for other in others:
            other.select(lambda: gr.Timer(active=False), None, self.timer, **QUIET)
        self.timer.tick(self.tick, self.sent, fill, trigger_mode="once", **QUIET)
        self.table.select(self.select, None, [self.chosen, *self.shown], **QUIET)
        act = [self.said, self.table, self.sent, self.chosen, *[c for c in self.shown if c is not self.said]]
        self.resume.click(self.resume_pressed, self.chosen, act, trigger_mode="once", **QUIET)
        self.rename.click(self.rename_pressed, [self.chosen, self.name], act, **QUIET)
        self.delete.click(self.delete_pressed, [self.chosen, self.confirm], act, trigger_mode="once", **QUIET)
        self.folder.click(self.folder_pressed, self.chosen, self.said, **QUIET)

    def tick(self, sent: str) -> list[Any]:
        """The table, when it differs from the one on the page."""
        html = self._table()
        if html == sent:
            return [gr.skip(), gr.skip(), gr.skip()]
        hint = '<p class="quiet">Tick one run to see and use it, two to compare their curves.</p>' if self.desk.runs() else ""
        return [html, hint, html]

    def select(self, event: gr.EventData) -> list[Any]:
        """Runs were ticked or unticked in the table."""
        wanted = event._data.get("runs", []) if isinstance(event._data, dict) else []
        return self._chosen([w for w in wanted if isinstance(w, str)][:2])

    def _chosen(self, ids: list[str]) -> list[Any]:
        runs = self._existing(ids)
        one = runs[0] if len(runs) == 1 else None
        return [[r.id for r in runs], *self._card(runs, one)]

    def _card(self, runs: list[RunDir], one: RunDir | None) -> list[Any]:
        """Updates for `shown`."""
        if not runs:
            return [gr.update(visible=False), *[gr.skip()] * 11]
        stories = [(r.name, self.desk.stories.of(r)) for r in runs]
        curves, visible = compare_html(stories), gr.update(visible=one is not None)
        if one is None:
            title = " and ".join(f"<b>{escape(r.name)}</b>" for r in runs)
            return [gr.update(visible=True), visible, visible, f'<p class="run-title">{title}</p>', curves, "", *[gr.skip()] * 4, "", ""]
        story, state = stories[0][1], one.state()
        title = f'<p class="run-title"><b>{escape(one.name)}</b>{"" if one.name == one.id else f" {escape(one.id)}"}</p><p class="situation {escape(state["status"])}">{escape(situation(state))}</p>'
        below = answers_html(story.rows, story.verdict, story.rows_step, story.answers) + notes_html(story.notes)
        return [
            gr.update(visible=True), visible, visible, title, curves, below, one.name, _command(one),
            gr.update(interactive=state["status"] in ("stopped", "failed")),
            gr.update(interactive=state["status"] in FINAL and one.adapter.is_dir()), "", "",
        ]  # fmt: skip

    def resume_pressed(self, ids: list[str]) -> list[Any]:
        return self._act(ids, lambda run: self.desk.resume(run.id) and "It goes on; the Train tab shows it.")

    def rename_pressed(self, ids: list[str], name: str) -> list[Any]:
        def rename(run: RunDir) -> str:
            self.desk.rename(run.id, name or "")
            return "Renamed."

        return self._act(ids, rename)

    def delete_pressed(self, ids: list[str], typed: str) -> list[Any]:
        return self._act(ids, lambda run: f"{self.desk.delete(run.id, typed or '')} is deleted.")

    def folder_pressed(self, ids: list[str]) -> str:
        """Opens the folder on this computer's desktop, or says where it is."""
        runs = self._existing(ids)
        if not runs:
            return _said("That run does not exist any more.", bad=True)
        opened = self.desk.local and open_folder(str(runs[0].path))
        return _said(f"{'Opened' if opened else 'The folder is'} {runs[0].path}")

    def _act(self, ids: list[str], action: Callable[[RunDir], str]) -> list[Any]:
        bad = False
        try:
            text = action(self.desk.run(ids[0] if len(ids) == 1 else None))
        except (Busy, ConfigError, OSError) as error:
            text, bad = str(error), True
        self.desk.refresh()
        html = self._table()
        chosen, *card = self._chosen(ids)
        said = self.shown.index(self.said)
        return [_said(text, bad), html, html, chosen, *card[:said], *card[said + 1 :]]

    def _table(self) -> str:
        return table_html(self.desk.table())

    def _existing(self, ids: list[str]) -> list[RunDir]:
        found = {r.id: r for r in self.desk.runs()}
        return [found[i] for i in ids if i in found]


def open_folder(path: str) -> bool:
    """Shows a folder in the desktop's file manager; False where there is none."""
    if sys.platform == "win32":
        os.startfile(path)
        return True
    if sys.platform != "darwin" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False
    try:
        subprocess.Popen(["open" if sys.platform == "darwin" else "xdg-open", path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except OSError:
        return False
    return True


def _command(run: RunDir) -> str:
    config = config_of(run)
    return command_line(config) if config else ""


def _said(text: str, bad: bool = False) -> str:
    return f'<p class="quiet{" bad" if bad else ""}" role="status">{escape(text)}</p>'
