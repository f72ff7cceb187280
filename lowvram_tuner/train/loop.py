"""A run from beginning to end: data, plan, load, fit check, training, proof that it learned. Read it top to bottom.

An optimizer step adds up `gradient_accumulation_steps` micro-batches, weighted by their trained tokens: every token counts
the same whichever micro-batch it lies in. The order of examples depends on the seed and the epoch alone, so a resumed run
continues exactly where the checkpoint stood.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from transformers import set_seed

from lowvram_tuner.config import ConfigError, TrainConfig
from lowvram_tuner.console import duration
from lowvram_tuner.data.packing import Batches, collate
from lowvram_tuner.data.prepare import Prepared, prepare
from lowvram_tuner.lora.adapter import save_adapter
from lowvram_tuner.memory.plan import GB
from lowvram_tuner.models.source import load_tokenizer
from lowvram_tuner.train import checkpoints
from lowvram_tuner.train.answers import Questions
from lowvram_tuner.train.base_model import Stopped, with_base_model
from lowvram_tuner.train.divergence import Divergence
from lowvram_tuner.train.evaluate import held_out_losses, target_counts
from lowvram_tuner.train.events import Reporter
from lowvram_tuner.train.guard import Guard
from lowvram_tuner.train.optimizer import learning_rate
from lowvram_tuner.train.passes import in_passes, parts, splits
from lowvram_tuner.train.progress import Progress
from lowvram_tuner.train.run_dir import RunDir
from lowvram_tuner.train.session import Session, build_to_fit, free_memory, less, make_plan, memory_now, rebuild
from lowvram_tuner.train.step import Batch, to_batch, to_batches

T = TypeVar("T")


def run_training(config: TrainConfig, run: RunDir, reporter: Reporter, resume: bool = False) -> dict[str, Any]:
    """Trains a run in its folder. Returns the JSON keys of the command `train`."""
    set_seed(config.seed)  # dropout's masks
    try:
        config = with_base_model(config, run, reporter)
    except Stopped as stopped:
        reporter.status("stopped", f"Stopped while the model was {stopped}; what is done of it is kept.")
        return {"status": "stopped"}
    reporter.status("preparing", "Reading the data.")
    tokenizer = load_tokenizer(config.model)
    prepared = prepare(config, tokenizer, lambda what, done, total, unit: reporter.status("preparing", f"{what}.", done, total, unit))
    reporter.status("preparing", "Loading the model.")
    session = build_to_fit(config, _loading(reporter))
    return _Run(config, run, reporter, tokenizer, prepared, session).train(resume)


class _Run:
    """The state of one `run_training` call."""

    def __init__(self, config: TrainConfig, run: RunDir, reporter: Reporter, tokenizer: Any, prepared: Prepared, session: Session) -> None:
        self.config, self.run, self.reporter, self.prepared, self.tokenizer = config, run, reporter, prepared, tokenizer
        self.session, self.progress, self.loss, self.started = session, Progress(), None, time.monotonic()
        self.batches = Batches(
            prepared.train, config.micro_batch_size, config.max_seq_length, config.seed, config.packing
        )  # fmt: skip
        self.steps_per_epoch = self.batches.steps_per_epoch(config.gradient_accumulation_steps)
        self.total = config.max_steps or max(1, math.ceil(config.num_epochs * self.steps_per_epoch))
        tenth = max(1, self.total // 10)
        self.eval_every, self.save_every = config.eval_steps or tenth, config.save_steps or tenth
        self.split = 1  # passes that a micro-batch is cut into when the card is too full for it in one
        self.guard, self.divergence = Guard(), Divergence(config, session.adapter.parameters.dtype)
        self.held_out_tokens = target_counts(prepared.held_out)
        self.questions = Questions(prepared.prompts, tokenizer)
        self.answers: dict[int, list[dict[str, str]]] = {}  # by step
        self.released = -1  # the step at which graphs gave their memory back
        self.saved: int | None = None  # the step whose state the newest checkpoint holds
        self.kept = 0  # the step whose adapter the run keeps

    @property
    def pass_config(self) -> TrainConfig:
        """The config as the current plan knows it: the size of one pass."""
        return in_passes(self.config, self.split)

    def train(self, resume: bool) -> dict[str, Any]:
        self.reporter.planned(self.total, self.session.plan.process_bytes)
        self._check_fit()
        if resume:
            self._resume()
        if not self.progress.history:
            self._evaluate()
        self.reporter.status("training", "Training.")
        status = self._steps()
        self._save(final=True)
        if status == "stopped":
            self.reporter.status("stopped", f"Stopped and saved at step {self.progress.step}. Resume continues from here.")
        else:
            self._surviving(self._prove)
            self.reporter.status("finished", "Finished. Chat with it, or compare it with the base.")
        return self._result(status)

    def _steps(self) -> str:
        """Runs optimizer steps until the end, a stop, or no more improvement. Returns the status."""
        upcoming = group = None
        while self.progress.step < self.total:
            if self.reporter.stop_requested():
                return "stopped"
            if group is None:
                upcoming = self._micro_batches()
                group = next(upcoming)
            begin = time.perf_counter()
            try:
                norm, total, targets = self._optimize(group)
            except torch.OutOfMemoryError:
                group = None
            if group is None:
                self._make_room()
                continue
            following = next(upcoming)  # collated while the card works
            self.loss = float(total) / targets
            session = self.session
            self._stepped(group, targets, float(norm), time.perf_counter() - begin)
            if self.divergence.look(self.progress.step, self.loss):
                self._give_up()
            ended = self._checks()
            group = following if self.session is session else None  # a new plan may cut the passes differently
            if ended:
                return "finished"
        return "finished"

    def _optimize(self, group: list[Batch]) -> tuple[torch.Tensor, torch.Tensor, int]:
        """One optimizer step over a group of micro-batches: (gradient norm, summed loss, trained tokens)."""
        optimizer = self.session.optimizer
        targets = sum(b.counted for b in group)
        total = torch.zeros((), device=self.session.device)
        together = self.session.plan.together
        for begin in range(0, len(group), together):
            total += self.session.step.accumulate(group[begin : begin + together], optimizer.loss_scale / targets)
        norm = optimizer.step(learning_rate(self.config, self.progress.step, self.total))
        return norm, total, targets

    def _micro_batches(self) -> Iterator[list[Batch]]:
        """Groups of micro-batches, one group a step, from where `progress` stands on and without end."""
        config, epoch, position = self.config, self.progress.epoch, self.progress.position
        full = self.pass_config.micro_batch_size * config.max_seq_length
        captured = self.session.device.type == "cuda"
        pad_to = full if captured and config.packing else max(16, full // 4) if captured else 1  # few shapes: few graphs
        while True:
            plan = self.batches.epoch(epoch)
            while position < len(plan):
                flats = []
                micro_batches = plan[position : position + config.gradient_accumulation_steps]
                for micro_batch in (part for whole in micro_batches for part in parts(whole, self.split)):
                    flat = collate(self.prepared.train, micro_batch, config.max_seq_length, pad_to)
                    if flat.targets:
                        flats.append(flat)
                group = to_batches(flats, self.session.device, config.max_seq_length, self.session.plan.together)
                position += config.gradient_accumulation_steps
                ended = position >= len(plan)
                if group:
                    group[-1].after = (epoch + 1, 0) if ended else (epoch, position)
                    yield group
            epoch, position = epoch + 1, 0

    def _stepped(self, group: list[Batch], targets: int, norm: float, seconds: float) -> None:
        """Moves the progress on and reports the step."""
        p = self.progress
        rate = learning_rate(self.config, p.step, self.total)
        p.step += 1
        p.epoch, p.position = group[-1].after
        p.tokens += targets
        tokens = sum(b.tokens for b in group)
        now, peak = memory_now(self.session.device, self.session.plan.budget.context_bytes)
        self.seconds = seconds if p.step < 3 else 0.9 * getattr(self, "seconds", seconds) + 0.1 * seconds
        self.reporter.step(
            p.step, epoch=p.step / self.steps_per_epoch, loss=self.loss, learning_rate=rate, grad_norm=norm, tokens=tokens,
            tokens_per_s=tokens / seconds, step_s=seconds, eta_s=(self.total - p.step) * self.seconds,
            vram_now_bytes=now, vram_peak_bytes=peak,
        )  # fmt: skip
        self._watch(seconds, tokens, now)

    def _give_up(self) -> None:
        """Ends a run whose loss stays no number, with the best adapter that it had; without held-out checks none is known."""
        kept = None
        if checkpoints.best(self.run.checkpoints):
            self._evaluate()  # by which the adapter of now loses
            self._save_adapter()
            kept = self.kept
        raise self.divergence.error(self.progress.step, kept)

    def _checks(self) -> bool:
        """Held-out check, checkpoint and answers when they are due. Returns True when patience has run out."""
        p = self.progress
        due = p.step % self.eval_every == 0 or p.step == self.total
        best = due and self._evaluate()
        if best or p.step % self.save_every == 0 or p.step == self.total:
            self._save(best)
            self._ask()
        if self.config.patience and p.since_best >= self.config.patience:
            self.reporter.note(f"Stopped at step {p.step}: no improvement in {p.since_best} checks.")
            return True
        return False

    def _evaluate(self) -> bool:
        """The held-out check of this step. True where the adapter is the best so far."""
        p = self.progress
        if not self.held_out_tokens.sum():
            return False
        held_out, device = self.prepared.held_out, self.session.device
        losses = self._surviving(lambda: held_out_losses(_inner(self.session.step), held_out, self.pass_config, device))
        best = p.checked(losses, self.held_out_tokens)
        if not p.step:
            self.divergence.require_base(p.history[-1][1])
        self.saved = None  # the newest checkpoint does not know of this check
        self.reporter.evaluated(p.step, p.history[-1][1])
        return best

    def _save(self, best: bool = False, final: bool = False) -> None:
        """Writes a checkpoint, and at the end the adapter: the best one when held-out losses tell."""
        p = self.progress
        self.reporter.status("saving", f"Saving step {p.step}.")
        path = self.run.checkpoints / f"step-{p.step}"
        if self.saved != p.step:
            tensors, numbers = self.session.state()
            meta = {
                "progress": vars(p), "optimizer": numbers, "random": checkpoints.random_state(tensors),
                "config": self.config.to_dict(), "fingerprint": self.prepared.fingerprint,
            }  # fmt: skip
            checkpoints.save(path, tensors, meta)
            self.saved = p.step
            self.reporter.checkpointed(p.step, path)
        if best:
            checkpoints.mark_best(path, p.best_loss)
        checkpoints.prune(self.run.checkpoints, self.config.keep_checkpoints)
        if final:
            self._save_adapter()
        else:
            self.reporter.status("training", "Training.")

    def _save_adapter(self) -> None:
        """The run's adapter folder, with the tokenizer and its chat template, for other programs; a worse last state gives way
        to the best checkpoint."""
        champion = checkpoints.best(self.run.checkpoints)
        last = self.progress.history[-1][1] if self.progress.history else None
        self.kept = self.progress.step
        if champion and last is not None and not champion[1] >= last:  # a last loss that is no number loses too
            tensors, meta = checkpoints.load(champion[0])
            self.session.restore(tensors, meta["optimizer"])
            self.kept = meta["progress"]["step"]
            self.reporter.note(f"The adapter is that of {champion[0].name}, where the held-out loss was lowest.")
        save_adapter(self.session.adapter, self.run.adapter, self.session.loaded.source.public_id)
        self.tokenizer.save_pretrained(self.run.adapter)

    def _resume(self) -> None:
        path = checkpoints.newest_valid(self.run.checkpoints, self.reporter.note)
        if path is None:
            self.reporter.note("No checkpoint yet; starting from the beginning.")
            return
        tensors, meta = checkpoints.load(path)
        checkpoints.require_same_run(meta, self.config, self.prepared.fingerprint)
        self.session.restore(tensors, meta["optimizer"])
        checkpoints.set_random_state(meta["random"], tensors)
        self.progress = Progress(**meta["progress"])
        self.saved = self.progress.step

    def _check_fit(self) -> None:
        """One worst-case micro-batch, forward and backward, before the real run; its gradients are thrown away."""
        self.reporter.status("checking", "Checking the fit: one step with the longest examples.")
        seconds = self._surviving(self._worst_case)
        steps = self.total * self.pass_config.gradient_accumulation_steps
        peak = memory_now(self.session.device, self.session.plan.budget.context_bytes)[1]
        spare = (self.session.plan.budget.limit_bytes - peak) / GB
        self.reporter.note(f"It fits with {max(spare, 0):.1f} GB to spare. About {duration(seconds * steps)} at most.")
        self.reporter.planned(self.total, self.session.plan.process_bytes)

    def _worst_case(self) -> float:
        """Seconds of one pass of the longest examples, as many going through the layers together as will."""
        config = self.pass_config
        begin = time.perf_counter()
        lengths = [len(self.prepared.train[i].input_ids) for i in range(min(len(self.prepared.train), 512))]
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        rows = [[longest]] * config.micro_batch_size
        full = config.micro_batch_size * config.max_seq_length
        flat = collate(self.prepared.train, rows, config.max_seq_length, full if self.session.device.type == "cuda" else 1)
        batch = to_batch(flat, self.session.device, config.max_seq_length)
        together = self.session.plan.together
        _inner(self.session.step).accumulate([batch] * together, torch.zeros((), device=self.session.device))
        self.session.adapter.gradients.zero_()
        if self.session.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / together

    def _surviving(self, work: Callable[[], T]) -> T:
        """`work()`; when the card runs out of memory in it, again with more room until it passes."""
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                pass  # the traceback holds what the pass had allocated: let go of it before anything is built anew
            self._make_room()

    def _make_room(self) -> None:
        """The memory of the captured passes, which nothing else can use; if that was not enough a leaner plan."""
        if self.released != self.progress.step and self.session.step.release():
            self.session.adapter.gradients.zero_()
        else:
            self._make_leaner()
        self.released = self.progress.step

    def _make_leaner(self, limit: int | None = None, why: str = "The card ran out of memory; going on with a leaner plan.") -> None:
        """Saves, and goes on under a plan for less: in spite of the old one the card is too full."""
        self.reporter.note(why)
        self.session.adapter.gradients.zero_()
        if self.progress.step:
            self._save()
        choices, words = splits(self.config, self.split), self.session.plan.words
        self.session = rebuild(self.session, choices.values(), limit or less(self.session.plan), _loading(self.reporter))
        self.split = next(k for k, config in choices.items() if config == self.session.config)
        if self.session.plan.words != words:
            self.reporter.note(f"The plan is now: {'; '.join(self.session.plan.words)}.")
        self.guard.begin()
        self.reporter.planned(self.total, self.session.plan.process_bytes)
        self.reporter.status("training", "Training.")

    def _watch(self, seconds: float, tokens: int, own_bytes: int) -> None:
        """Has the guard look at the step just done; when other programs took memory, makes room if a plan can."""
        trouble = self.guard.look(seconds, tokens, own_bytes)
        if trouble is None:
            return
        if trouble.limit_bytes is None:
            self.reporter.note(trouble.text)
        elif self._has_plan(trouble.limit_bytes):
            self._make_leaner(trouble.limit_bytes, f"{trouble.text} Going on with a leaner plan, which makes room for them.")
        else:
            self.reporter.note(f"{trouble.text} Close them to be fast again: no plan is small enough to make room.")

    def _has_plan(self, limit: int) -> bool:
        try:
            make_plan(splits(self.config, self.split).popitem()[1], limit)
        except ConfigError:
            return False
        return True

    def _ask(self) -> None:
        """The questions answered by the adapter as it is; without the memory for it the run goes on without these answers."""
        while True:
            try:
                return self._answer(self.progress.step)
            except torch.OutOfMemoryError:
                pass
            if not self.session.step.release():
                return self.reporter.note(f"The questions were not asked at step {self.progress.step}: the card has no room for the answers.")

    def _answer(self, step: int) -> None:
        """Asks base and adapter the same questions. step: whose adapter it is."""
        config, loaded = self.pass_config, self.session.loaded
        try:
            rows = self.questions.ask(self.session.adapter.model, config.micro_batch_size * config.max_seq_length)
        finally:
            if loaded.ring is not None:
                loaded.ring.reset()  # transformers' forward leaves layers in the slots that a replayed graph does not know of
            if self.session.device.type == "cuda":
                free_memory()
        self.answers[step] = rows
        self.reporter.compared(step, rows)

    def _prove(self) -> None:
        """The same questions answered by the base and by the adapter that is kept, and what the held-out losses say."""
        if next(reversed(self.answers), None) != self.kept:
            self.reporter.status("checking", "Asking the base and the adapter the same questions.")
            self._answer(self.kept)
        same = [row["base"] == row["adapter"] for row in self.answers[self.kept]]
        self.reporter.verdict(*self.progress.verdict(self.held_out_tokens, same, self.steps_per_epoch))

    def _result(self, status: str) -> dict[str, Any]:
        state = self.reporter.state()
        device = self.session.device
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else state.get("vram_peak_bytes") or 0
        return {
            "run_dir": str(self.run.path), "adapter_dir": str(self.run.adapter), "status": status, "steps": self.progress.step,
            "train_loss": self.loss, "eval_loss": self.progress.history[-1][1] if self.progress.history else None,
            "peak_allocated_gb": peak / GB, "predicted_peak_gb": self.session.plan.peak_bytes / GB,
        }  # fmt: skip


def _inner(step: Any) -> Any:
    """The step itself, without the graphs around it."""
    return getattr(step, "step", step)


def _loading(reporter: Reporter) -> Any:
    return lambda what, done, total: reporter.status("preparing", "Loading the model.", int(done), int(total), "layers")
