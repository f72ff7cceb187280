"""Gradio started lightly is still Gradio."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()


def test_components_work_and_no_stub_is_written():
    said = run(
        "from lowvram_tuner.ui.quick_start import import_gradio\n"
        "import sys; before = list(sys.meta_path)\n"
        "gradio = import_gradio()\n"
        "assert sys.meta_path == before and import_gradio() is gradio\n"
        "import gradio.component_meta as meta\n"
        "print(meta.create_or_modify_pyi.__name__, sys.modules.get('pyarrow', 'absent'))\n"
        "print(gradio.Slider(1, 9, value=4).value, gradio.Dataframe([[1]]).value['data'])\n"
    )
    assert said == ["<lambda> absent", "4 [[1]]"]


def test_what_is_left_out_comes_back():
    said = run(
        "from lowvram_tuner.ui.quick_start import import_gradio, without_applications\n"
        "import_gradio()\n"
        "from gradio.routes import App\n"
        "import gradio as gr\n"
        "make = App.create_app\n"
        "with without_applications():\n"
        "    with gr.Blocks() as page:\n"
        "        gr.Textbox()\n"
        "print(page.app, App.create_app is make)\n"
        "try:\n"
        "    with without_applications():\n"
        "        raise KeyError\n"
        "except KeyError:\n"
        "    print(App.create_app is make)\n"
    )
    assert said == ["None True", "True"]
