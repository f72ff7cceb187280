"""The page of LowVRAM Tuner: `python app.py [--port N] [--listen --auth user:password] [--no-browser]`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main(argv: list[str] | None = None) -> int:
    """Serves the page until it is interrupted. Exit 2 for flags that cannot be used."""
    parser = argparse.ArgumentParser(description="Fine-tune language models on the GPU you have.")
    parser.add_argument("--port", type=int, default=None, help="port of the page (default: the first free one from 7860)")
    parser.add_argument("--listen", action="store_true", help="let other machines open the page; needs --auth")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask for this name and password")
    parser.add_argument("--share", action="store_true", help="a public link through Gradio's tunnel; needs --auth")
    parser.add_argument("--no-browser", action="store_true", help="do not open the browser")
    parser.add_argument("--runs", type=Path, default=HERE / "runs", help="folder where runs are kept (default: runs)")
    args = parser.parse_args(argv)

    from lowvram_tuner.ui import guard

    try:
        auth = guard.parse_auth(args.auth)
        guard.check_exposure(args.listen, args.share, auth)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    os.environ["GRADIO_TEMP_DIR"] = str(args.runs.resolve() / ".uploads")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

    from lowvram_tuner.ui.quick_start import import_gradio

    import_gradio()
    from lowvram_tuner.ui.serve import serve

    try:
        serve(args.runs, port=args.port, auth=auth, listen=args.listen, share=args.share, browser=not args.no_browser)
    except OSError as error:
        where = f"port {args.port}" if args.port else "any port from 7860 on"
        print(f"error: the page cannot be served on {where} ({error.strerror or 'it is taken'}); choose another with --port.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
