"""The data as the page shows it: one line under the control, and a preview with every token as it is trained on.

Pure functions over what `data.preview` answers. All text of the data is escaped: it is looked at, never run.
"""

from __future__ import annotations

from html import escape
from typing import Any

from lowvram_tuner.config import DEMO_DATASET
from lowvram_tuner.data.names import ROLES
from lowvram_tuner.data.report import problem_words
from lowvram_tuner.ui.words import count

Answer = dict[str, Any]
_PROBLEMS_SHOWN = 40


def words_html(dataset: str, missing: str, answer: Answer | None, busy: bool = False) -> str:
    """The line under the control: "312 rows · chat · 41,200 tokens"."""
    if missing:
        return f'<p class="quiet warn">{escape(missing)}</p>'
    if answer is None:
        demo = "The demo's own data: a character with a story."
        waiting = demo if dataset == DEMO_DATASET else "" if busy else "Reading the data …"
        return f'<p class="quiet">{waiting}</p>'
    if answer.get("error"):
        return f'<p class="quiet warn">{escape(answer["error"])}</p>'
    report, more = answer["report"], "" if answer["complete"] else "at least "
    parts = [f"{more}{count(report['kept'], 'row')}", report["format"], f"{more}{count(report['tokens'], 'token')}"]
    parts += [f"{count(report[k], 'row')} {word}" for k, word in (("dropped", "dropped"), ("truncated", "cut"), ("split", "split")) if report.get(k)]
    return f'<p class="quiet{" warn" if report.get("dropped") else ""}">{escape(" · ".join(p for p in parts if p))}</p>'


def facts_html(answer: Answer | None, missing: str = "", busy: bool = False) -> str:
    """Counts and files, or why there are none."""
    if answer is None:
        text = missing or ("A run is in progress; the data is looked at again afterwards." if busy else "Reading the data …")
        return f'<p class="quiet{" warn" if missing else ""}">{escape(text)}</p>'
    failed = f'<p class="quiet warn">{escape(answer["error"])}</p>' if answer.get("error") else ""
    return f"{failed}{_facts(answer)}{_files(answer['files'])}" if "report" in answer else failed


def lengths_html(answer: Answer | None, limit: Any) -> str:
    """The histogram of the rows' lengths; bars beyond the sequence length `limit` are striped."""
    report = (answer or {}).get("report") or {}
    bins = report.get("histogram") or {}
    counts, edges = bins.get("counts") or [], bins.get("edges") or []
    if not any(counts):
        return '<p class="quiet">The lengths of the rows appear here.</p>'
    most, limit = max(counts), limit if isinstance(limit, (int, float)) else float("inf")
    bars = "".join(
        f'<i{" class=over" if edges[i] >= limit else ""} style="height:{100 * n / most:.0f}%" '
        f'title="{edges[i]:,} to {edges[i + 1]:,} tokens: {count(n, "row")}"></i>'
        for i, n in enumerate(counts)
    )
    said = f"Lengths of the rows: {edges[0]:,} to {edges[-1]:,} tokens, the longest has {report['longest']:,}"
    beyond = f" Striped: longer than {limit:,}." if edges[-2] >= limit else ""
    return (
        f'<h4>Lengths</h4><div class="lengths" role="img" aria-label="{said}">{bars}</div>'
        f'<p class="lengths-axis"><span>{edges[0]:,}</span><span>{edges[-1]:,} tokens</span></p>'
        f'<p class="quiet">Highest bar: {count(most, "row")}. Longest row: {count(report["longest"], "token")}.{beyond}</p>'
    )


def problems_html(answer: Answer | None) -> str:
    """What is wrong or special, by line, with reason and count."""
    problems = ((answer or {}).get("report") or {}).get("problems") or []
    if not problems:
        return f'<p class="quiet">{"No problems found." if answer else "Problems appear here by line."}</p>'
    items = "".join(f"<li>{escape(problem_words(p))}</li>" for p in problems[:_PROBLEMS_SHOWN])
    rest = len(problems) - _PROBLEMS_SHOWN
    return f'<h4>Problems</h4><ul class="notes">{items}{f"<li>and {rest:,} more kinds</li>" if rest > 0 else ""}</ul>'


def rows_html(answer: Answer | None) -> str:
    """Rows as tokens, with a key to the colours."""
    if answer is None or not answer.get("rows"):
        return '<p class="quiet">The rows appear here once the data has been read; a number beyond the last row shows none.</p>'
    key = (
        '<p class="quiet token-key"><span class="t on">learned</span> <span class="t">read only</span> '
        '<span class="t sp">special token</span></p>'
    )
    several = len(answer.get("files") or []) > 1
    return f'{key}<ol class="examples">{"".join(_row(r, several) for r in answer["rows"])}</ol>'


def report_of(answer: Answer | None) -> Answer | None:
    """What the Start button and the estimate of steps need; counts only when all rows were read."""
    if answer is None:
        return None
    if answer.get("error"):
        return {"error": answer["error"]}
    return answer["report"] if answer["complete"] else None


def suggested_length(answer: Answer | None, current: Any) -> int:
    """The sequence length that the rows read so far ask for; 0 when it is the present one or not known."""
    length = ((answer or {}).get("report") or {}).get("suggested_max_seq_length") or 0
    return length if length and length != current else 0


def _facts(answer: Answer) -> str:
    """What became of the rows, as a list of figures."""
    report = answer["report"]
    items = [("rows read", f"{report['rows']:,}" + ("" if answer["complete"] else " so far, there are more"))]
    items += [("kept", f"{report['kept']:,}"), ("dropped", f"{report['dropped']:,}")]
    items += [("cut to the length", f"{report['truncated']:,}"), ("split into several", f"{report.get('split', 0):,}")]
    items += [("duplicates, kept", f"{report.get('duplicates', 0):,}")]
    items += [("tokens", f"{report['tokens']:,}"), ("of them learned", f"{report['trained_tokens']:,}")]
    if answer.get("held_out") is not None:
        items += [("held out to measure", count(answer["held_out"], "example"))]
    return f'<dl class="facts">{"".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in items)}</dl>'


def _files(files: list[Answer]) -> str:
    items = []
    for f in files:
        if f.get("error"):
            items.append(f'<li class="warn"><b>{escape(f["name"])}</b>: {escape(f["error"])}</li>')
            continue
        roles = ", ".join(f"{ROLES.get(role, role).lower()} from “{column}”" for role, column in f["roles"].items())
        weight = f.get("weight", 1)
        text = f"{f['layout']}" + (f"; {roles}" if roles else "") + (f"; {weight:g} times an epoch" if weight != 1 else "")
        items.append(f"<li><b>{escape(f['name'])}</b>: {escape(text)}</li>")
    return f'<ul class="notes">{"".join(items)}</ul>'


def _row(row: Answer, named: bool) -> str:
    """One row; `named`: with its file, where there are several."""
    facts = [f"Row {row['row']:,}", row["file"] if named else "", f"line {row['line']:,}" if row.get("line") else "", count(row["length"], "token") if row["length"] else ""]
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
