"""The page over workers that only pretend, so that a browser test takes seconds: `python fake_page.py serve ROOT PORT`.

Everything else is the product's own: supervisor, lock, run folders, chat client, guard. With FAKE_CARD=1 a 6 GB card is seen.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path

EVIL = '<img src=x onerror="window.pwned=1"><script>window.pwned=1</script><img src="http://evil.example/seen.png">'
STEP_S = float(os.environ.get("FAKE_STEP_S", "0.02"))


def training(config, run, reporter, resume):
    """A run whose loss falls. It waits at step 40 while ROOT/.hold is there, and fails at step 12 when the seed is 13."""
    total = config.max_steps or 60
    first = 1 + max((int(p.name[5:]) for p in run.checkpoints.glob("step-*")), default=0) if resume else 1
    for done in range(6):
        reporter.status("preparing", "Loading layers.", done, 6, "layers")
        time.sleep(STEP_S)
    reporter.status("checking", "One worst-case step is measured.")
    reporter.planned(total, 1_300_000_000)
    reporter.status("training", "Training.")
    for step in range(first, total + 1):
        loss = 3 * math.exp(-step / 20) + 0.4
        reporter.step(step, epoch=step / total, loss=loss, learning_rate=1e-3, tokens_per_s=512.0, step_s=STEP_S, eta_s=(total - step) * STEP_S,
                      vram_now_bytes=1_200_000_000, vram_peak_bytes=1_250_000_000)  # fmt: skip
        if step % 10 == 0:
            reporter.evaluated(step, loss + 0.1)
            _checkpoint(run, reporter, step)
        if config.seed == 13 and step == 12:
            raise MemoryError("CUDA out of memory")
        while step == 40 and (run.path.parent / ".hold").exists() and not reporter.stop_requested():
            time.sleep(STEP_S)
        if reporter.stop_requested():
            reporter.status("saving", "Writing a checkpoint.")
            _checkpoint(run, reporter, step)
            reporter.status("stopped", f"Stopped at step {step}.")
            return {"status": "stopped"}
        time.sleep(STEP_S)
    rows = [{"prompt": f"Wer bist du? {EVIL}", "base": "我是一个助手。", "adapter": "I keep the lighthouse of Port Tallow."}]
    reporter.compared(total, rows)
    reporter.verdict("learned", "The held-out loss fell from 3.3 to 0.6.")
    run.adapter.mkdir(exist_ok=True)
    (run.adapter / "adapter_model.safetensors").write_bytes(b"")
    return {"status": "finished"}


def _checkpoint(run, reporter, step):
    path = run.checkpoints / f"step-{step}"
    path.mkdir(exist_ok=True)
    (path / "manifest.json").write_text(json.dumps({}))
    reporter.checkpointed(step, path)


class Parrot:
    """Answers with who it is and what it was told, word by word; "forever" goes on until it is stopped."""

    tokens, tokens_per_s, dropped, stopped_early = 0, 21.0, 0, False

    def stream(self, messages, *, adapter, system, stop, temperature, top_p, max_new_tokens):
        text = messages[-1]["content"]
        words = ["and on"] * 2000 if text == "forever" else [*text.split(), EVIL, "![](http://evil.example/seen-too.png)", f"({len(messages)} messages)"]
        yield "adapter:" if adapter else "base:"
        for word in words:
            if stop.is_set():
                self.stopped_early = True
                return
            time.sleep(0.01)
            yield f" {word}"


def load(target, device, progress):
    for done in range(4):
        progress("loading layers", done, 4)
        time.sleep(0.05)
    return Parrot()


def probe():
    """Two rows, one of them hostile."""
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["config"]["dataset"].endswith("empty.jsonl"):
            print(json.dumps({"error": "empty.jsonl holds no rows; give a file with examples."}), flush=True)
            continue
        first = asked["first"]
        report = {"format": "messages", "rows": 2, "kept": 2, "dropped": 0, "truncated": 0, "duplicates": 0, "tokens": 60, "trained_tokens": 20, "longest": 40,
                  "histogram": {"edges": [0, 20, 40], "counts": [1, 1]}, "suggested_max_seq_length": 64,
                  "problems": [{"line": 7, "reason": f"field 'text' is empty {EVIL}", "count": 3, "dropped": True, "file": "data.jsonl"}]}  # fmt: skip
        pieces = [["<|im_start|>", False, True], [f"Grüße, 你好 {EVIL}\n", False, False], ["Keeper", True, False]]
        row = {"row": first, "line": first, "file": "data.jsonl", "problem": None, "raw": "", "notes": [], "length": 40, "trained": 20,
               "truncated": False, "held_out": False, "parts": [pieces], "shown": 40}  # fmt: skip
        files = [{"name": EVIL, "columns": ["messages"], "roles": {"messages": "messages"}, "layout": "chat", "error": None}]
        print(json.dumps({"complete": True, "report": report, "error": None, "held_out": 0, "files": files, "rows": [row]}), flush=True)


def serve(root, port):
    from lowvram_tuner.ui.quick_start import import_gradio

    os.environ["GRADIO_TEMP_DIR"] = str(Path(root) / ".uploads")
    import_gradio()
    from lowvram_tuner.chat.client import ChatClient
    from lowvram_tuner.hardware.card import Card
    from lowvram_tuner.train.supervisor import Supervisor
    from lowvram_tuner.ui import desk, serve
    from lowvram_tuner.ui.data_check import DataCheck

    if os.environ.get("FAKE_CARD"):
        desk.read_card = lambda: Card("NVIDIA GeForce RTX 3060 Laptop GPU", 6_441_000_000, 5_741_000_000, 700_000_000, "580.65.06", (8, 6), 0, "GPU-1")
    me = (sys.executable, __file__)
    real = desk.Desk(root, Supervisor(Path(root).resolve(), (*me, "train")))
    serve.serve(root, port=int(port), browser=False, desk=real, client=ChatClient(real.root, (*me, "chat")), check=DataCheck() if os.environ.get("REAL_DATA") else DataCheck((*me, "probe")))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    kind, *rest = sys.argv[1:]
    if kind == "train":
        from lowvram_tuner.train import worker

        sys.exit(worker.main(rest, training=training))
    if kind == "chat":
        from lowvram_tuner.chat import worker

        sys.exit(worker.main(rest, load=load))
    if kind == "probe":
        sys.exit(probe())
    sys.exit(serve(*rest))
