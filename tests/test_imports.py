"""The dependency rules of the design, read from the imports themselves.

1. `kernels` knows only torch, triton, numpy and the standard library.
2. gradio lives in `lowvram_tuner/ui` and `app.py`; nothing else knows `ui`.
3. The page's process does not load torch at start.
4. `quant` knows neither `lora` nor `train`, and these see a quantized layer only as `QuantLinear`.
5. Importing a module does nothing but define things.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "liger_kernel", "datasets"}
LIGHT = (  # what page, planner and command line's help are made of
    "config", "presets", "bootstrap", "environment", "hardware.card", "hardware.ram", "hardware.torch_build",
    "hardware.doctor", "models.catalogue", "models.source", "memory.estimate", "memory.plan", "quant.spec", "quant.registry",
    "train.run_dir", "train.events", "train.supervisor", "chat.client",
)  # fmt: skip


@dataclass(frozen=True)
class Import:
    """One name that a file imports: `module` as written ("torch.nn", or "torch.nn.functional" for a from-import)."""

    file: str
    line: int
    module: str
    at_start: bool  # runs when the module is imported, not inside a function or for type checkers only

    @property
    def top(self) -> str:
        return self.module.split(".")[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def sources() -> list[Path]:
    """The program's own files, tests aside."""
    return [ROOT / "app.py", *sorted((ROOT / "kernels").rglob("*.py")), *sorted((ROOT / "lowvram_tuner").rglob("*.py"))]


def imports_of(path: Path) -> list[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return list(_imports(tree, str(path.relative_to(ROOT)), True))


def _imports(node: ast.AST, file: str, at_start: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(file, node.lineno, alias.name, at_start) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        package = [*Path(file).parent.parts][: len(Path(file).parent.parts) - node.level + 1] if node.level else []
        base = ".".join([*package, *([node.module] if node.module else [])])
        yield from (Import(file, node.lineno, f"{base}.{alias.name}", at_start) for alias in node.names)
    elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        for child in node.orelse:
            yield from _imports(child, file, at_start)
    else:
        inner = at_start and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from _imports(child, file, inner)


ALL = [found for path in sources() if path.exists() for found in imports_of(path)]


def within(found: Import, *folders: str) -> bool:
    return any(found.file == folder or found.file.startswith(f"{folder}/") for folder in folders)


def knows(found: Import, *packages: str) -> bool:
    return any(found.module == package or found.module.startswith(f"{package}.") for package in packages)


def listed(found: list[Import]) -> list[str]:
    return [str(one) for one in found]


def test_there_is_something_to_read():
    assert len(ALL) > 100
    assert any(within(found, "kernels") and found.top == "torch" for found in ALL)


def test_kernels_know_only_torch_triton_numpy_and_the_standard_library():
    allowed = {"torch", "triton", "numpy", "kernels"} | set(sys.stdlib_module_names)
    assert listed([found for found in ALL if within(found, "kernels") and found.top not in allowed]) == []


def test_gradio_stays_in_the_page():
    page = ("app.py", "lowvram_tuner/ui")
    assert listed([found for found in ALL if found.top in ("gradio", "gradio_client") and not within(found, *page)]) == []
    assert listed([found for found in ALL if knows(found, "lowvram_tuner.ui", "app") and not within(found, *page)]) == []


def loaded_at_start(*starts: str) -> set[str]:
    """The project files that importing the given files loads, by their module-level imports, transitively."""
    open_files, seen = list(starts), set()
    while open_files:
        file = open_files.pop()
        if file in seen:
            continue
        seen.add(file)
        for found in ALL:
            if found.file == file and found.at_start and found.top in ("lowvram_tuner", "kernels"):
                open_files += files_of(found.module)
    return seen


def files_of(module: str) -> list[str]:
    """The files that importing `module` runs: its packages' __init__ and itself, when it is a module and not a name in one."""
    parts, files = module.split("."), []
    for end in range(1, len(parts) + 1):
        base = Path(*parts[:end])
        files += [str(path) for path in (base / "__init__.py", base.with_suffix(".py")) if (ROOT / path).is_file()]
    return files


def test_the_page_loads_no_torch_at_start():
    starts = ["app.py", *(str(path.relative_to(ROOT)) for path in (ROOT / "lowvram_tuner/ui").glob("*.py"))]
    files = loaded_at_start(*starts)
    assert "lowvram_tuner/config.py" in files
    assert listed([found for found in ALL if found.file in files and found.at_start and found.top in HEAVY]) == []


def test_quant_knows_neither_lora_nor_train():
    bad = [f for f in ALL if within(f, "lowvram_tuner/quant") and knows(f, "lowvram_tuner.lora", "lowvram_tuner.train", "peft")]
    assert listed(bad) == []


def test_lora_and_train_see_a_quantized_layer_only_as_quantlinear():
    # Which quantizer a run asks for is a matter of names (registry.resolve, QuantSpec); its tensors and kernels are not.
    spec = [f"lowvram_tuner.quant.spec.{name}" for name in ("QuantError", "QuantSpec", "Scratch")]
    allowed = ("lowvram_tuner.quant.linear", "lowvram_tuner.quant.registry.resolve", *spec)
    users = ("lowvram_tuner/lora", "lowvram_tuner/train")
    bad = [f for f in ALL if within(f, *users) and knows(f, "lowvram_tuner.quant") and not knows(f, *allowed)]
    packed = ("dequant_", "reference_", "matmul_", "packing")
    bad += [f for f in ALL if within(f, *users) and f.top == "kernels" and f.module.split(".")[1].startswith(packed)]
    assert listed(bad) == []


def statements_that_act(path: Path) -> list[str]:
    """Module-level statements that call something for its effect, or change the environment."""
    found = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        loop = isinstance(node, (ast.For, ast.While, ast.With))
        setting = isinstance(node, ast.Assign) and any("environ" in ast.dump(target) for target in node.targets)
        if call or loop or setting:
            found.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)[:80]}")
    return found


def test_importing_a_module_does_nothing_by_its_source():
    assert [act for path in sources() if path.exists() for act in statements_that_act(path)] == []


def in_fresh_python(code: str) -> dict:
    """What `code`, which fills a dict named `seen`, finds in a Python of its own."""
    code = f"import json, sys\nseen = {{}}\n{code}\nprint(json.dumps(seen))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def modules(*folders: str) -> list[str]:
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if path.name != "__main__.py"]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]


def test_importing_everything_touches_no_card_no_network_and_no_logging():
    seen = in_fresh_python(f"""
import importlib, logging, socket
def refuse(*arguments):
    raise RuntimeError(f"an import opens a connection to {{arguments[1:]}}")
socket.socket.connect = refuse
import gradio, torch, transformers, peft  # what these do is theirs
before = [str(h) for h in logging.getLogger().handlers], logging.getLogger().level, torch.get_num_threads()
for name in {modules("kernels", "lowvram_tuner")!r}:
    importlib.import_module(name)
after = [str(h) for h in logging.getLogger().handlers], logging.getLogger().level, torch.get_num_threads()
seen = {{"same": before == after, "cuda": torch.cuda.is_initialized()}}
""")
    assert seen == {"same": True, "cuda": False}


def test_the_package_itself_is_light():
    seen = in_fresh_python("""
before = set(sys.modules)
import lowvram_tuner
seen["new"] = sorted({name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))
""")
    assert seen == {"new": ["lowvram_tuner"]}


def test_facts_and_plans_need_no_torch():
    present = [f"lowvram_tuner.{name}" for name in LIGHT if (ROOT / "lowvram_tuner" / f"{name.replace('.', '/')}.py").exists()]
    seen = in_fresh_python(f"""
import importlib
for name in {present!r}:
    importlib.import_module(name)
    seen[name] = sorted({HEAVY!r} & set(sys.modules))
""")
    assert seen == {name: [] for name in present}


def test_the_page_in_a_process_of_its_own_loads_no_torch():
    names = [*modules("lowvram_tuner/ui"), *(["app"] if (ROOT / "app.py").exists() else [])]
    seen = in_fresh_python(f"""
import importlib
for name in {names!r}:
    importlib.import_module(name)
seen["heavy"] = sorted({HEAVY!r} & set(sys.modules))
""")
    assert seen == {"heavy": []}


@pytest.mark.parametrize(
    ("line", "module"),
    [
        ("import torch.nn as nn", "torch.nn"),
        ("from torch import nn", "torch.nn"),
        ("from . import layers", "lowvram_tuner.train.layers"),
        ("from ..quant.linear import QuantLinear", "lowvram_tuner.quant.linear.QuantLinear"),
    ],
)
def test_the_reader_reads_every_way_to_import(line, module):
    found = list(_imports(ast.parse(line), "lowvram_tuner/train/loop.py", True))
    assert [(one.module, one.at_start) for one in found] == [(module, True)]


def test_the_reader_tells_what_runs_at_import():
    code = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a\nelse:\n    import b\n"
        "def f():\n    import c\nclass K:\n    import d\ntry:\n    import e\nexcept ImportError:\n    pass\n"
    )
    found = {one.module: one.at_start for one in _imports(ast.parse(code), "x.py", True)}
    assert found == {"typing.TYPE_CHECKING": True, "b": True, "c": False, "d": True, "e": True}
