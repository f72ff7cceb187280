"""The page's look: one accent, the system's own fonts, small text, light and dark."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

HERE = Path(__file__).parent
CSS_FILE = HERE / "page.css"
_ACCENT = gr.themes.Color(
    c50="#eef5fc", c100="#d8e8f8", c200="#b4d2f1", c300="#84b5e7", c400="#5296da", c500="#2f7bc9", c600="#1f63aa",
    c700="#1a508a", c800="#194470", c900="#183a5e", c950="#10253e", name="accent",
)  # fmt: skip
_SANS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Noto Sans CJK SC", "Helvetica", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Consolas", "Liberation Mono", "Noto Sans Mono", "monospace"]


def theme() -> gr.themes.Base:
    """Gradio's plain theme with our accent and less air."""
    return gr.themes.Base(
        primary_hue=_ACCENT,
        secondary_hue=_ACCENT,
        neutral_hue="zinc",
        text_size="sm",
        spacing_size="sm",
        radius_size="sm",
        font=_SANS,
        font_mono=_MONO,
    ).set(
        body_background_fill="#f4f4f5",
        body_background_fill_dark="#141416",
        block_background_fill="#ffffff",
        block_background_fill_dark="#1d1d20",
        block_border_color_dark="#333338",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_title_text_weight="600",
        input_background_fill="#ffffff",
        input_background_fill_dark="#26262a",
        input_border_width="1px",
        input_border_color="#c9c9cf",
        input_border_color_dark="#4a4a52",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="#ffffff",
    )


def head() -> str:
    """The page's own script, inline: it keeps panels open and explains controls."""
    return f"<script>\n{(HERE / 'page.js').read_text(encoding='utf-8')}\n</script>"
