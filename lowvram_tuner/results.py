"""The results of commands as people read them; `--json` prints the same dicts whole."""

from __future__ import annotations

from typing import Any

from lowvram_tuner.console import duration

Result = dict[str, Any]


def show_lines(result: Result) -> None:
    """'key: value' lines."""
    for key, value in result.items():
        print(f"{key}: {_readable(value)}")


def show_plan(result: Result) -> None:
    """Whether it fits, every part, and how the run would go about it."""
    from lowvram_tuner.memory.plan import COMPONENT_LABELS

    print(f"Planned for {result['planned_for']}.")
    parts = {COMPONENT_LABELS[name]: size for name, size in result["components"].items() if size}
    for label, size in {**parts, "the process": result["predicted_process_gb"]}.items():
        print(f"  {label:<20}{size:7.2f} GB")
    words = [word for word in result["plan"]["words"] if word != result["planned_for"]]
    if result["fits"]:
        print(f"It fits: {', '.join(words)}. One step of the optimizer: about {duration(result['predicted_step_s'])}.")
        return
    print(*words, *(f"This would fit: {remedy}." for remedy in result["remedies"]))


def show_bench(result: Result) -> None:
    """The figures, and of the plan what it decided; the profile has its own table, and what was not measured no line."""
    show_lines({k: v["words"] if k == "plan" else v for k, v in result.items() if k != "profile" and (v or v is False)})


def show_quantized(result: Result) -> None:
    """Where it is, what it took, the weight that suffered most, those that needed help, and the next step."""
    layers = result["layers"]
    print(f"Written to {result['output']} in {duration(result['seconds'])}; it took at most {result['peak_allocated_gb']:.2f} GB.")
    worst = max(layers, key=lambda layer: layer["error"])
    print(f"{len(layers)} weights; the largest error, {worst['error']:.2%}, is that of {worst['name']}.")
    if helped := [layer["name"] for layer in layers if layer["damping"]]:
        print(f"{len(helped)} needed more damping: {', '.join(helped)}.")
    print(f"Train on it: python -m lowvram_tuner train --model {result['output']}")


def show_data(result: Result) -> None:
    """Counts, then what each file's columns hold, then the problems, a line each."""
    from lowvram_tuner.data.report import problem_words

    aside = ("problems", "columns", "histogram")
    show_lines({k: v for k, v in result.items() if k not in aside})
    for file, roles in result["columns"].items():
        print(f"{file}: {', '.join(f'{role} from {column!r}' for role, column in roles.items())}")
    for problem in result["problems"]:
        print(f"- {problem_words(problem)}")


def show_nothing(result: Result) -> None:
    """Of commands that have said everything already."""


def _readable(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_readable(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_readable(v) for v in value) or "none"
    return str(value)
