"""The data as the page shows it: one line under the control, and a preview with every token as it is trained on.

Pure functions over what `data.preview` answers. All text of the data is escaped: it is looked at, never run.
"""

from __future__ import annotations

from html import escape
from typing import Any

from lowvram_tuner.config import DEMO_DATASET
from lowvram_tuner.ui.words import count

Answer = dict[str, Any]
_PROBLEMS_SHOWN = 40


def words_html(dataset: str, missing: str, answer: Answer | None) -> str:
    """The line under the control: "312 rows · chat · 41,200 tokens"."""
    if missing:
        return f'<p class="quiet warn">{escape(missing)}</p>'
    if answer is None:
        waiting = "The demo's own data: a character with a story." if dataset == DEMO_DATASET else "Reading the data …"
        return f'<p class="quiet">{waiting}</p>'
    if answer.get("error"):
        return f'<p class="quiet warn">{escape(answer["error"])}</p>'
    report, more = answer["report"], "" if answer["complete"] else "at least "
    parts = [f"{more}{count(report['kept'], 'row')}", report["format"], f"{more}{count(report['tokens'], 'token')}"]
    parts += [f"{count(report[k], 'row')} {k}" for k in ("dropped", "truncated") if report.get(k)]
    return f'<p class="quiet{" warn" if report.get("dropped") else ""}">{escape(" · ".join(p for p in parts if p))}</p>'


def preview_html(answer: Answer | None) -> str:
    """Counts, files, lengths, problems by line, and rows as tokens."""
    if answer is None:
        return '<p class="quiet">The rows appear here once the data has been read.</p>'
    failed = f'<p class="quiet warn">{escape(answer["error"])}</p>' if answer.get("error") else ""
    if "report" not in answer:
        return failed
    report = answer["report"]
    key = (
        '<p class="quiet token-key"><span class="t on">learned</span> <span class="t">read only</span> '
        '<span class="t sp">special token</span></p>'
    )
    rows = "".join(_row(r) for r in answer["rows"])
    body = f'{key}<ol class="examples">{rows}</ol>' if rows else ""
    return f"{failed}{_facts(answer)}{_files(answer['files'])}{_problems(report['problems'])}{_lengths(report)}{body}"


def report_of(answer: Answer | None) -> Answer | None:
    """What the Start button and the estimate of steps need; counts only when all rows were read."""
    if answer is None:
        return None
    if answer.get("error"):
        return {"error": answer["error"]}
    return answer["report"] if answer["complete"] else None


def suggested_length(answer: Answer | None, current: Any) -> int:
    """The sequence length that the data asks for; 0 when it is the present one or not known."""
    length = ((answer or {}).get("report") or {}).get("suggested_max_seq_length") or 0
    return length if length and length != current and answer["complete"] else 0


def _facts(answer: Answer) -> str:
    report = answer["report"]
    read = f"{count(report['rows'], 'row')} read" + ("" if answer["complete"] else " so far, the file goes on")
    parts = [f"{read}: {report['kept']:,} kept, {report['dropped']:,} dropped, {report['truncated']:,} cut"]
    parts += [f"{count(report['duplicates'], 'duplicate')} kept"] if report.get("duplicates") else []
    parts += [f"{report['trained_tokens']:,} of {count(report['tokens'], 'token')} are learned"]
    if answer.get("held_out") is not None:
        parts += [f"{count(answer['held_out'], 'example')} held out to measure with"]
    return f"<p>{escape('; '.join(parts))}.</p>"


def _files(files: list[Answer]) -> str:
    items = []
    for f in files:
        if f.get("error"):
            items.append(f'<li class="warn"><b>{escape(f["name"])}</b>: {escape(f["error"])}</li>')
            continue
        roles = ", ".join(f"{role} from “{column}”" for role, column in f["roles"].items())
        text = f"{f['layout']}" + (f"; {roles}" if roles else "")
        items.append(f"<li><b>{escape(f['name'])}</b>: {escape(text)}</li>")
    hint = '<p class="quiet">Wrong column? Name it under More, Columns, as role=column.</p>' if files else ""
    return f'<ul class="notes">{"".join(items)}</ul>{hint}'


def _row(row: Answer) -> str:
    facts = [f"Row {row['row']:,}", f"line {row['line']:,}" if row.get("line") else "", count(row["length"], "token") if row["length"] else ""]
    facts += ["cut"] if row["truncated"] else []
    facts += ["held out"] if row["held_out"] else []
    head = f"<h4>{escape(' · '.join(f for f in facts if f))}</h4>"
    notes = "".join(f'<p class="quiet warn">{escape(n)}</p>' for n in row["notes"])
    if row["problem"]:
        return f'<li>{head}<p class="quiet bad">Not used: {escape(row["problem"])}</p><p class="tokens" dir="auto">{_visible(row["raw"])}</p></li>'
    parts = "".join(f'<p class="tokens" dir="auto">{"".join(_piece(*p) for p in part)}</p>' for part in row["parts"])
    rest = row["length"] - row["shown"]
    more = f'<p class="quiet">and {count(rest, "token")} more</p>' if rest > 0 else ""
    return f"<li>{head}{notes}{parts}{more}</li>"


def _piece(text: str, trained: bool, special: bool) -> str:
    return f'<span class="t{" on" if trained else ""}{" sp" if special else ""}">{_visible(text)}</span>'


def _visible(text: str) -> str:
    return escape(text).replace("\n", "⏎<br>")


def _problems(problems: list[Any]) -> str:
    if not problems:
        return ""
    items = "".join(f"<li>{escape(_problem(p))}</li>" for p in problems[:_PROBLEMS_SHOWN])
    rest = len(problems) - _PROBLEMS_SHOWN
    return f'<h4>Problems</h4><ul class="notes">{items}{f"<li>and {rest:,} more kinds</li>" if rest > 0 else ""}</ul>'


def _problem(problem: Answer) -> str:
    """One kind of problem: where it stands first, what it is, how often."""
    where = " ".join(filter(None, [problem.get("file", ""), f"line {problem['line']:,}" if problem.get("line") else ""]))
    often = f" ({problem['count']:,} times)" if problem.get("count", 1) > 1 else ""
    fate = "" if problem.get("dropped", True) else " Kept."
    return f"{where}: {problem['reason']}{often}{fate}".lstrip(": ")


def _lengths(report: Answer) -> str:
    bins = report.get("histogram") or {}
    counts, edges = bins.get("counts") or [], bins.get("edges") or []
    if not any(counts):
        return ""
    most = max(counts)
    bars = "".join(
        f'<i style="height:{100 * n / most:.0f}%" title="{edges[i]:,} to {edges[i + 1]:,} tokens: {count(n, "row")}"></i>' for i, n in enumerate(counts)
    )
    said = f"Lengths of the rows: {edges[0]:,} to {edges[-1]:,} tokens, the longest has {report['longest']:,}"
    return (
        f'<h4>Lengths</h4><div class="lengths" role="img" aria-label="{said}">{bars}</div>'
        f'<p class="quiet">{edges[0]:,} to {edges[-1]:,} tokens; the longest row has {report["longest"]:,}.</p>'
    )
