"""Gradio, started in half the time.

Two things cost Gradio 6 most of its import: every component class renders a `.pyi` stub for editors and compares it with
the one on disk (half of it), and pandas imports pyarrow, which no component of this page uses. Both are left out here.
Measured on two slow cores: 5.5 s as it comes, 1.9 s so; 34 MB less. And a page's web application is made three times,
when its description begins, ends and is launched, of which only the last is used: 0.3 s less. If a later Gradio does none of
this, nothing happens.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_STUB_WRITER = "gradio.component_meta"


def import_gradio() -> ModuleType:
    """Gradio, with everything it needs at run time. Call it before anything else imports gradio."""
    if "gradio" in sys.modules:
        return sys.modules["gradio"]
    finder, hidden = _WithoutStubs(), "pyarrow" not in sys.modules
    sys.meta_path.insert(0, finder)
    if hidden:
        sys.modules["pyarrow"] = None  # type: ignore[assignment]  # an import of it says "not installed"
    try:
        import gradio
    finally:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
        if hidden:
            del sys.modules["pyarrow"]
    return gradio


@contextmanager
def without_applications() -> Iterator[None]:
    """Inside, a page is described without its web application being made; launching it makes the one that serves."""
    from gradio.routes import App

    make = App.__dict__.get("create_app")
    if make is not None:
        App.create_app = staticmethod(lambda *_, **__: None)
    try:
        yield
    finally:
        if make is not None:
            App.create_app = make


class _WithoutStubs(MetaPathFinder):
    """Finds gradio's stub writer as usual, and once it is loaded takes its one effect away."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != _STUB_WRITER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if hasattr(module, "create_or_modify_pyi"):
                module.create_or_modify_pyi = lambda *_, **__: None

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
