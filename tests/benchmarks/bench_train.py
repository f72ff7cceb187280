"""This program and its peers side by side on one card: memory, step time, samples a second, load time, kernels.

    python tests/benchmarks/bench_train.py --list                        # the cases, no card needed
    python tests/benchmarks/bench_train.py --out train.json --minutes 9  # as many as fit, in the order of ORDER;
                                                                         # the same command again goes on where it ended
    ... --only 8B unsloth: --alpaca FILE                                 # cases with one of these names or parts of names
    ... --peers none                                                     # or: unsloth, hf, liger; default all that can be imported
    ... --again                                                          # measure what is in the file already, too
    python tests/benchmarks/bench_train.py --out train.json --show       # the table of what is there, no card needed
    ... --show --readme                                                  # and into the README between its markers

Every case is a process of its own, and its result is in the file before the next one starts. What each must reach stands in
`train_cases.py`. Compare only figures of one card. A folder of random 16-bit weights (8B: 16 GB) is made where a case reads a
checkpoint, and removed after the last case that needs it; --keep and --models DIR leave it for the next command.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from measured_table import Results, into_readme, table, told  # noqa: E402
from train_cases import ALPACA, FOLDER, ORDER, PEERS, Case, PeerCase  # noqa: E402

from lowvram_tuner.hardware.card import read_card  # noqa: E402
from lowvram_tuner.hardware.measured import measured  # noqa: E402
from lowvram_tuner.memory.budget import GB  # noqa: E402

ROW_STEPS = 40  # of a peer on real rows, whose lengths differ
SKIPPED_STEPS = 6  # of ours there: the first passes run eagerly and capture graphs


# running -----------------------------------------------------------------------------------------------------------------


class Bench:
    """Measures cases one after the other into a file, until a time."""

    def __init__(self, args: argparse.Namespace, results: Results) -> None:
        self.args, self.results = args, results
        self.until = time.time() + 60 * args.minutes
        self.scratch = Path(tempfile.mkdtemp(prefix="bench-train-"))
        self.models = args.models or self.scratch / "models"

    def run(self, order: list[Case | PeerCase]) -> None:
        for n, case in enumerate(order):
            name = case.key
            if time.time() + 60 * case.minutes > self.until:
                print(f"{name}: left for later, it takes about {case.minutes:.1f} min", file=sys.stderr, flush=True)
                continue
            begin = time.time()
            result = self._peer(case) if isinstance(case, PeerCase) else self._ours(case)
            self.results[name] = result | {"minutes": round((time.time() - begin) / 60, 2)}
            write(self.args.out, self.results)
            print(f"{name}: {told(result)}", file=sys.stderr, flush=True)
            if reads_folder(case) and not any(reads_folder(c) and c.model == case.model for c in order[n + 1 :]) and not self.args.keep:
                shutil.rmtree(self._folder(case.model), ignore_errors=True)

    def close(self) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _ours(self, case: Case) -> dict[str, Any]:
        options = list(case.options)
        if case.cap_gb:
            options += ["--vram-gb", f"{case.cap_gb + self._context_gb():.3f}"]
        shown = ["python", "-m", "lowvram_tuner", case.command, *({FOLDER: "FOLDER", ALPACA: "FILE"}.get(o, o) for o in options)]
        if FOLDER in options and (problem := self._make(case.model)):
            return {"error": problem}
        filled = [{FOLDER: str(self._folder(case.model)), ALPACA: str(self.args.alpaca)}.get(o, o) for o in options]
        if case.command == "train":
            filled += ["--output-dir", str(self.scratch / f"runs-{len(self.results)}")]
        result = child([sys.executable, "-m", "lowvram_tuner", case.command, "--json", *filled], case.minutes)
        if "error" not in result and case.command == "train":
            result |= samples(Path(result["run_dir"]))
        if result.get("peak_allocated_gb") and "load_peak_gb" in result:
            result["load_of_peak"] = result["load_peak_gb"] / result["peak_allocated_gb"]
        return result | {"command": " ".join(shown)}

    def _peer(self, case: PeerCase) -> dict[str, Any]:
        if problem := self._make(case.model):
            return {"error": problem}
        steps = ROW_STEPS if case.what == "rows" else 10
        shown = [case.peer, str(self._folder(case.model)), "--batch", str(case.batch), "--length", str(case.length), "--steps", str(steps)]
        shown += ["--what", case.what, *(["--data", str(self.args.alpaca)] if case.what == "rows" else [])]
        script = str(Path(__file__).parent / "peers.py")
        return child([sys.executable, script, *shown, "--runs", str(self.scratch / "peer-runs")], case.minutes)

    def _context_gb(self) -> float:
        """What CUDA itself takes on this card, measured once."""
        card = read_card()
        if card and not measured(card.uuid):
            code = "import torch; from lowvram_tuner.hardware.card import read_card; from lowvram_tuner.memory.calibrate import measure;"
            subprocess.run([sys.executable, "-c", f"{code} measure(read_card(), torch.bfloat16)"], cwd=ROOT, timeout=120, check=False)
        return measured(card.uuid).get("context_bytes", 450e6) / GB if card else 0.45

    def _folder(self, model: str) -> Path:
        return self.models / model.split("/")[-1]

    def _make(self, model: str) -> str:
        """Makes the model's folder unless it is there; returns what went wrong, or ""."""
        text = ["--text", str(self.args.alpaca)] if self.args.alpaca else []
        command = [sys.executable, str(Path(__file__).parent / "random_checkpoint.py"), model, str(self._folder(model)), *text]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        return "" if done.returncode == 0 else f"no folder of random weights: {last_line(done.stderr)}"


def child(command: list[str], minutes: float) -> dict[str, Any]:
    """The last JSON object that a command prints; {"error": its last words} when it fails or takes too long."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60 * (3 * minutes + 1), check=False)
    except subprocess.TimeoutExpired as error:
        return {"error": f"it took more than {error.timeout:.0f} s"}
    if done.returncode != 0:
        return {"error": last_line(done.stderr)}
    objects = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(objects[-1]) if objects else {"error": f"it printed no JSON object but: {last_line(done.stdout)[:200]}"}


def last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip()[:20000] if lines else "no output"


def samples(run: Path) -> dict[str, Any]:
    """Examples a second of a finished epoch, from its events: those of the median step."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = [e["step_s"] for e in events if e["kind"] == "step"]
    if len(seconds) <= SKIPPED_STEPS:
        return {"error": f"{len(seconds)} steps are too few to tell a speed"}
    cache = next((run.parent / "cache").glob("*/meta.json"), None)
    kept = json.loads(cache.read_text(encoding="utf-8"))["report"]["kept"] if cache else 0
    step_s = median(seconds[SKIPPED_STEPS:])
    return {"samples_per_s": kept / len(seconds) / step_s, "step_ms": step_s * 1e3, "rows": kept}


# choosing and keeping ----------------------------------------------------------------------------------------------------


def reads_folder(case: Case | PeerCase) -> bool:
    return isinstance(case, PeerCase) or FOLDER in case.options


def names(text: str, name: str) -> bool:
    """Whether a text of --only is a case's name or, being no whole name itself, a part of it."""
    return text == name or (text in name and all(text != case.key for case in ORDER))


def chosen(args: argparse.Namespace, results: Results) -> list[Case | PeerCase]:
    """What is to be measured: named, not done yet, of a peer that is here, with the data it needs. Says what is not."""
    there = {peer: missing(peer) for peer in PEERS}
    allowed = list(PEERS) if args.peers == ["all"] else [p for p in args.peers if p != "none"]
    for peer in allowed:
        if there[peer]:
            print(f"{PEERS[peer][0]} is left out: {', '.join(there[peer])} cannot be imported", file=sys.stderr)
    found = []
    for case in ORDER:
        name = case.key
        done = name in results and "error" not in results[name]
        if (args.only and not any(names(text, name) for text in args.only)) or (done and not args.again):
            continue
        if isinstance(case, PeerCase) and (case.peer not in allowed or there[case.peer]):
            continue
        if not args.alpaca and (ALPACA in getattr(case, "options", ()) or getattr(case, "what", "") == "rows"):
            print(f"{name}: left out, give the examples with --alpaca FILE", file=sys.stderr)
            continue
        found.append(case)
    return found


def missing(peer: str) -> list[str]:
    return [name for name in PEERS[peer][1] if importlib.util.find_spec(name) is None]


def read(path: Path) -> Results:
    return json.loads(path.read_text(encoding="utf-8"))["results"] if path.is_file() else {}


def write(path: Path, results: Results) -> None:
    """All results so far, replaced at once, so that an end in the middle loses nothing."""
    card = read_card()
    told_card = {"name": card.name, "driver": card.driver, "total_gb": card.total_bytes / GB} if card else before(path)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"card": told_card, "results": results}, indent=1), encoding="utf-8")
    temporary.replace(path)


def before(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")).get("card") if path.is_file() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench_train.json"), help="where results are kept and gone on with")
    parser.add_argument("--only", "--cases", nargs="*", default=[], help="names or parts of names of cases")
    parser.add_argument("--peers", nargs="*", default=["all"], choices=["all", "none", *PEERS])
    parser.add_argument("--minutes", type=float, default=120.0, help="start nothing that would end after so many minutes")
    parser.add_argument("--alpaca", type=lambda p: Path(p).resolve(), help="a file of Alpaca rows, for the cases on real lengths")
    parser.add_argument("--models", type=Path, help="where folders of random weights are made; default a temporary folder")
    parser.add_argument("--keep", action="store_true", help="keep these folders")
    parser.add_argument("--again", action="store_true", help="measure what is in the file already, too")
    parser.add_argument("--list", action="store_true", help="name the cases and end")
    parser.add_argument("--show", action="store_true", help="print the table of the file and end")
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    args = parser.parse_args()
    if args.list:
        print("\n".join(f"{case.minutes:4.1f} min  {case.key}" for case in ORDER))
        return
    results = read(args.out)
    if not args.show:
        if read_card() is None:
            sys.exit("error: this measures a CUDA card, and none is here; --show prints what was measured.")
        bench = Bench(args, results)
        try:
            bench.run(chosen(args, results))
        finally:
            bench.close()
    print(table(results))
    if args.readme:
        file = ROOT / "README.md"
        file.write_text(into_readme(file.read_text(encoding="utf-8"), table(results)), encoding="utf-8")


if __name__ == "__main__":
    main()
