"""What `bench_train.py` measured, as the README's table: each case with what it must reach, the peers, and the commands."""

from __future__ import annotations

from typing import Any

from train_cases import ORDER, PEERS, Must, PeerCase

BEGIN, END = "<!-- measured -->", "<!-- /measured -->"
Results = dict[str, dict[str, Any]]

UNITS = {
    "step_ms": ("{:,.0f} ms", 1), "tokens_per_s": ("{:,.0f} tokens/s", 1), "samples_per_s": ("{:.1f} samples/s", 1),
    "decode_tokens_per_s": ("{:,.0f} tokens/s", 1),
    "peak_allocated_gb": ("{:.2f} GB allocated", 1), "process_gb": ("{:.2f} GB process", 1), "load_s": ("{:.1f} s to load", 1),
    "gpu_busy_share": ("{:.0f} % busy", 100), "load_of_peak": ("load peak {:.2f} of training's", 1), "loss_last": ("loss {:.1f}", 1),
}  # fmt: skip


def words(metric: str, value: float) -> str:
    text, factor = UNITS[metric]
    return text.format(value * factor)


def told(result: dict[str, Any]) -> str:
    """A result in one line."""
    if "error" in result:
        return f"failed: {result['error'][-300:]}"
    return ", ".join(words(m, result[m]) for m in UNITS if isinstance(result.get(m), (int, float)) and m != "loss_last")


def must_words(must: Must, results: Results) -> str:
    if must.metric == "loss_last":
        return "trains"
    sign = "≤" if must.relation == "<=" else "≥"
    if not must.against:
        return f"{sign} {words(must.metric, must.limit)}"
    bound = must.bound(results)
    reached = "not measured here" if bound is None else words(must.metric, bound)
    return f"{sign} {must.limit:g} × {must.against} ({reached})"


def table(results: Results) -> str:
    """The README's table: every case of ours with what it must reach, then the peers, then the commands, numbered alike."""
    lines = ["| | case | must | measured here | kept |", "|---|---|---|---|---|"]
    commands, peers = [], ["| peer | allocated | process | step | busy | kernels | tokens/s |", "|---|---|---|---|---|---|---|"]
    for case in ORDER:
        result = results.get(case.key)
        if result is None:
            continue
        if isinstance(case, PeerCase):
            peers.append(peer_row(case, result))
            continue
        held = [must.held(result, results) for must in case.musts]
        kept = "no" if False in held or "error" in result else "yes" if None not in held else "open"
        shown = told({m.metric: result.get(m.metric) for m in case.musts}) if "error" not in result else told(result)
        extra = "" if "process_gb" not in result or "process" in shown else f", {words('process_gb', result['process_gb'])}"
        step = "" if "step_ms" not in result or " ms" in shown else f", {words('step_ms', result['step_ms'])}"
        wanted = "; ".join(must_words(m, results) for m in case.musts) + (f" ({case.published})" if case.published else "")
        commands.append(result.get("command", ""))
        lines.append(f"| {len(commands)} | {case.name} | {wanted} | {(shown + extra + step).lstrip(', ')} | {kept} |")
    numbered = [f"{n}. `{command}`" for n, command in enumerate(commands, 1) if command]
    return "\n".join([*lines, "", *([*peers, ""] if len(peers) > 2 else []), *numbered])


def peer_row(case: PeerCase, result: dict[str, Any]) -> str:
    if "error" in result:
        return f"| {case.key} | {told(result)} | | | | | |"
    forms = (
        ("peak_allocated_gb", "{:.2f} GB"), ("process_gb", "{:.2f} GB"), ("step_ms", "{:,.0f} ms"), ("gpu_busy_share", "{:.0%}"),
        ("kernels", "{:,}"), ("tokens_per_s", "{:,.0f}"),
    )  # fmt: skip
    cells = [form.format(result[k]) if k in result else "" for k, form in forms]
    if case.what != "train":
        metric = {"rows": "samples_per_s", "decode": "decode_tokens_per_s"}[case.what]
        cells[-1] = words(metric, result[metric])
    return f"| {PEERS[case.peer][0]}, {case.key.split(': ')[1]} | {' | '.join(cells)} |"


def into_readme(text: str, measured_text: str) -> str:
    """The README with what stands between its markers replaced. ValueError when it has none."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the README needs one {BEGIN} and one {END} to say where the table belongs.")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{measured_text}\n{END}{rest.split(END)[1]}"
