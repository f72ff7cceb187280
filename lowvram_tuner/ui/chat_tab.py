"""The Chat tab: one resident model, with what it learned or as it was, or both side by side from one question.

The conversation of a browser's tab is a list of turns; each conversation that a model sees is made from it, so that in a
comparison base and adapter each remember their own answers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from lowvram_tuner.chat.client import ChatClient, ChatError, ChatStatus
from lowvram_tuner.chat.sampling import MOST_TOKENS, Sampling
from lowvram_tuner.chat.target import WEIGHTS, Target, target_of_model, target_of_run
from lowvram_tuner.config import DEMO_MODEL, ConfigError, TrainConfig
from lowvram_tuner.train.lock import Busy
from lowvram_tuner.ui.desk import Desk
from lowvram_tuner.ui.words import number, short_model

QUIET = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
DRAW_S = 0.06  # pieces that come faster are shown together
TARGETS = 50  # newest runs offered
UNTRAINED = f"model:{DEMO_MODEL}"


@dataclass(frozen=True)
class Turn:
    """One question and its answers; `base` is None when the turn was not a comparison."""

    asked: str
    answer: str = ""
    base: str | None = None


@dataclass(frozen=True)
class Wish:
    """How a question is to be answered."""

    target: str
    adapter: bool
    compare: bool
    system: str
    sampling: dict[str, Any]
    device: str | None


def messages(turns: list[Turn], of_base: bool) -> list[dict[str, str]]:
    """The conversation as one of the two saw it, the open question last."""
    found: list[dict[str, str]] = []
    for turn in turns:
        found.append({"role": "user", "content": turn.asked})
        answer = turn.base if of_base and turn.base is not None else turn.answer
        if turn is not turns[-1]:
            found.append({"role": "assistant", "content": answer})
    return found


def shown(turns: list[Turn], of_base: bool = False) -> list[dict[str, str]]:
    """The turns as a chatbot shows them."""
    found = []
    for turn in turns:
        text = turn.base if of_base else turn.answer
        if text is None:
            continue
        found += [{"role": "user", "content": turn.asked}, {"role": "assistant", "content": text or "…"}]
    return found


class ChatTab:
    """Builds the tab inside the caller's `gr.Tab` and wires it. One `client` serves every browser tab."""

    def __init__(self, desk: Desk, client: ChatClient | None = None) -> None:
        self.desk = desk
        self.client = client or ChatClient(desk.root)
        self.timer = gr.Timer(1, active=False)
        self.turns = gr.State([])
        self.sent = gr.State("")
        with gr.Column(elem_classes="card", elem_id="chat"):
            self._top()
            with gr.Row(elem_id="chat-logs"):
                look = {"height": "max(240px, calc(100vh - 330px))", "buttons": ["copy"], "layout": "bubble", "feedback_options": None,
                        "latex_delimiters": [], "allow_file_downloads": False, "allow_tags": False}  # fmt: skip
                self.log = gr.Chatbot(label="With what it learned", show_label=False, elem_id="chat-log", placeholder="Ask something.", **look)
                self.base_log = gr.Chatbot(label="The base model", elem_id="chat-log-base", visible=False, placeholder="The same questions, answered without the adapter.", **look)
            self._bottom()

    def _top(self) -> None:
        with gr.Row(elem_id="chat-top", equal_height=True):
            self.target = gr.Dropdown([(short_model(DEMO_MODEL), UNTRAINED)], value=None, label="Talk to", elem_id="chat-target", interactive=True, scale=2)
            self.adapter = gr.Checkbox(True, label="With what it learned", elem_id="chat-adapter", interactive=False, scale=0, min_width=190)
            self.compare = gr.Checkbox(False, label="Side by side with the base", elem_id="chat-compare", interactive=False, scale=0, min_width=220)
            self.cpu = gr.Checkbox(False, label="Answer on the processor", elem_id="chat-cpu", interactive=True, visible=False, scale=0, min_width=200)
        self.status = gr.HTML("", elem_id="chat-status")

    def _bottom(self) -> None:
        defaults = Sampling()
        with gr.Row(elem_id="chat-row", equal_height=True):
            self.input = gr.Textbox(show_label=False, label="Your message", placeholder="Your message; Enter sends, Shift+Enter makes a new line", lines=1, max_lines=6,
                                    elem_id="chat-input", interactive=True, scale=1, max_length=200_000)  # fmt: skip
            self.send = gr.Button("Send", variant="primary", size="md", elem_id="chat-send", scale=0, min_width=90)
            self.stop = gr.Button("Stop", variant="stop", size="md", elem_id="chat-stop", scale=0, min_width=90, interactive=False)
            self.retry = gr.Button("Try again", size="md", elem_id="chat-retry", scale=0, min_width=110)
            self.clear = gr.Button("Clear", size="md", elem_id="chat-clear", scale=0, min_width=80)
        with gr.Accordion("More", open=False, elem_id="chat-more"):
            self.system = gr.Textbox(label="System prompt", info="Empty: the one that the run was trained with.", lines=2, elem_id="chat-system", interactive=True)
            with gr.Row():
                self.temperature = gr.Slider(0, 2, value=defaults.temperature, step=0.05, label="Temperature", elem_id="chat-temperature", interactive=True,
                                             info="0 always takes the likeliest word; higher is more varied.")  # fmt: skip
                self.top_p = gr.Slider(0.05, 1, value=defaults.top_p, step=0.05, label="Top-p", elem_id="chat-top-p", interactive=True,
                                       info="Only words from the likeliest share of this size are taken.")  # fmt: skip
                self.longest = gr.Number(defaults.max_new_tokens, label="Longest answer (tokens)", minimum=1, maximum=MOST_TOKENS, step=64, elem_id="chat-max-tokens", interactive=True)

    # events ------------------------------------------------------------------------------------------------------------

    def wire(self, tab: gr.Tab, others: list[gr.Tab]) -> None:
        """Connects the controls; the status line is kept up to date only while the tab is open."""
        about = [self.target, self.adapter, self.compare, self.system, self.temperature, self.top_p, self.longest, self.cpu]
        fills = [self.turns, self.log, self.base_log, self.input, self.send, self.stop, self.status, self.sent]
        ways = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": 4, "trigger_mode": "once", "preprocess": False}
        gr.on([self.send.click, self.input.submit], self.asked, [self.input, self.turns, *about], fills, **ways)
        self.retry.click(self.again, [self.turns, *about], fills, **ways)
        self.stop.click(self.client.stop, None, None, **QUIET)
        gr.on([self.clear.click, self.log.clear, self.base_log.clear], lambda: ([], [], []), None, [self.turns, self.log, self.base_log], **QUIET)
        self.compare.change(lambda on: [gr.update(visible=bool(on)), gr.update(show_label=bool(on))], self.compare, [self.base_log, self.log], **QUIET)
        self.target.change(self.chosen, self.target, [self.turns, self.log, self.base_log, self.adapter, self.compare], preprocess=False, **QUIET)
        tick = [[self.sent], [self.status, self.cpu, self.sent]]
        tab.select(lambda value: [self.targets(value), gr.Timer(active=True)], self.target, [self.target, self.timer], preprocess=False, **QUIET)
        for other in others:
            other.select(lambda: gr.Timer(active=False), None, self.timer, **QUIET)
        self.timer.tick(self.tick, *tick, trigger_mode="once", **QUIET)

    def targets(self, value: str | None) -> Any:
        """The dropdown's choices: runs that have an adapter, the newest first, then the untrained demo model."""
        choices = self._choices()
        return gr.update(choices=choices, value=self._preferred(value, choices))

    def _choices(self) -> list[tuple[str, str]]:
        rows = self.desk.table()[:TARGETS]
        found = [(_run_label(r), f"run:{r['id']}") for r in rows if (self.desk.root / r["id"] / "adapter" / WEIGHTS).is_file()]
        return [*found, (f"{short_model(DEMO_MODEL)}, untrained", UNTRAINED)]

    def _preferred(self, value: str | None, choices: list[tuple[str, str]]) -> str:
        """A choice once made; before that what a warm worker already holds, else the newest run."""
        known, held = [v for _, v in choices], self.client.status().target
        warm = f"run:{Path(held.adapter).parent.name}" if held and held.adapter else UNTRAINED if held else ""
        return next(v for v in (value, warm, known[0]) if v in known)

    def chosen(self, target: Any) -> list[Any]:
        """Another target begins another conversation; without an adapter there is nothing to switch or to compare."""
        trained = str(target).startswith("run:")
        return [[], [], [], gr.update(interactive=trained), gr.update(interactive=trained, **({} if trained else {"value": False}))]

    def chat_with(self, run_id: object) -> Any:
        """The dropdown set to a run, whose model starts loading at once."""
        run = self.desk.run(run_id)
        with contextlib.suppress(Busy, ConfigError, OSError):  # asking says what is in the way; here the tab only opens
            self.client.open(target_of_run(run))
        return {**self.targets(None), "value": f"run:{run.id}"}

    def tick(self, sent: str) -> list[Any]:
        """The status line, and the offer of the processor while training holds the card."""
        blocked = self.client.blocked_by()
        html = status_html(self.client.status(), blocked.name if blocked else "", self.client.tokens_per_s, self.client.note)
        mark = f"{bool(blocked)}{html}"
        if mark == sent:
            return [gr.skip(), gr.skip(), gr.skip()]
        return [html, gr.update(visible=bool(blocked)), mark]

    def asked(self, text: Any, turns: list[Turn], *about: Any) -> Iterator[list[Any]]:
        """A question: its answer, piece by piece."""
        question = str(text or "").strip()
        if not question:
            yield [gr.skip()] * 8
            return
        yield from self._answer([*turns, Turn(question)], about)

    def again(self, turns: list[Turn], *about: Any) -> Iterator[list[Any]]:
        """The last question once more."""
        if not turns:
            yield [gr.skip()] * 8
            return
        yield from self._answer([*turns[:-1], Turn(turns[-1].asked)], about)

    def _answer(self, turns: list[Turn], about: tuple[Any, ...]) -> Iterator[list[Any]]:
        """Updates of the tab while one question is answered; whatever goes wrong ends as a sentence in the status line."""
        problem = ""
        yield self._page(turns, busy=True, clear=True)
        try:
            wish = self._wish(*about)
            self.client.open(self._target(wish), wish.device)
            for grown in self._answers(turns, wish):
                turns = grown
                yield self._page(turns, busy=True)
        except (Busy, ChatError, ConfigError, OSError) as error:
            problem = str(error)
        if problem and not turns[-1].answer:
            asked, turns = turns[-1].asked, turns[:-1]
            yield self._page(turns, busy=False, problem=problem, text=asked)
            return
        yield self._page(turns, busy=False, problem=problem)

    def _answers(self, turns: list[Turn], wish: Wish) -> Iterator[list[Turn]]:
        """The turns, their last answer growing; in a comparison the adapter's first, then the base's."""
        *before, last = turns
        for text in self._stream(messages(turns, of_base=False), wish, wish.adapter or wish.compare):
            last = replace(last, answer=text, base="" if wish.compare else None)
            yield [*before, last]
        if wish.compare:
            for text in self._stream(messages([*before, last], of_base=True), wish, False):
                yield [*before, replace(last, base=text)]

    def _stream(self, conversation: list[dict[str, str]], wish: Wish, adapter: bool) -> Iterator[str]:
        """The answer so far, at most every `DRAW_S`, and once more when it is whole."""
        text, drawn = "", 0.0
        for piece in self.client.stream(conversation, adapter=adapter, system=wish.system, **wish.sampling):
            text += piece
            if time.monotonic() - drawn >= DRAW_S:
                drawn = time.monotonic()
                yield text
        yield text

    def _wish(self, target: Any, adapter: Any, compare: Any, system: Any, temperature: Any, top_p: Any, longest: Any, cpu: Any) -> Wish:
        if longest is None:
            raise ConfigError("Longest answer is empty; give a number of tokens.")
        sampling = {"temperature": temperature, "top_p": top_p, "max_new_tokens": longest}
        Sampling(**sampling)
        blocked = self.client.blocked_by() is not None
        device = "cpu" if cpu and blocked else None
        target = self._preferred(target, self._choices())
        return Wish(target, bool(adapter), bool(compare), str(system or ""), sampling, device)

    def _target(self, wish: Wish) -> Target:
        if wish.target == UNTRAINED:
            return target_of_model(TrainConfig(model=DEMO_MODEL))
        return target_of_run(self.desk.run(wish.target.removeprefix("run:")))

    def _page(self, turns: list[Turn], busy: bool, problem: str = "", clear: bool = False, text: str = "") -> list[Any]:
        """Updates in the order of `fills`."""
        status = status_html(self.client.status(), "", self.client.tokens_per_s, self.client.note, problem)
        field = gr.update(value=text) if clear or text else gr.skip()
        mark = status if problem else ""
        return [turns, shown(turns), shown(turns, True), field, gr.update(interactive=not busy), gr.update(interactive=busy), status, mark]


def status_html(status: ChatStatus, blocked_by: str, tokens_per_s: float, note: str = "", problem: str = "") -> str:
    """Who answers, how fast, and what is in the way. Pure."""
    kind, parts = status.state, []
    if problem:
        return f'<p class="quiet bad" role="alert">{escape(problem)}</p>'
    if kind in ("ready", "answering") and status.target:
        target = status.target
        parts = [f"{'Answering' if kind == 'answering' else 'Ready'}: {short_model(target.model) if target.label in ('', target.model) else target.label}", f"{target.bits}-bit"]
        parts += ["on the processor"] if status.device == "cpu" else []
        parts += [f"{number(tokens_per_s)} tokens/s"] if tokens_per_s else []
    elif kind == "loading":
        done = f" {100 * status.progress[0] / status.progress[1]:.0f} %" if status.progress and status.progress[1] else ""
        parts = [f"Loading: {status.message.rstrip('.')}{done}"]
    elif kind == "failed":
        return f'<p class="quiet bad">{escape(status.message)}</p>'
    elif blocked_by:
        parts = [f"Training ({blocked_by}) holds the card. Wait until it ends, or let the processor answer, which is slow."]
    else:
        parts = [status.message or "The model loads with your first message."]
    return f'<p class="quiet">{escape(" · ".join([*parts, *([note] if note else [])]))}</p>'


def _run_label(row: dict[str, Any]) -> str:
    config, state = row["config"], row["state"]
    model = f" · {short_model(config.model)} · {config.bits}-bit" if config else ""
    return f"{state['name']} · step {state.get('step') or 0:,}{model}"
