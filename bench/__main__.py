"""``python -m bench``."""

import sys

if __name__ == "__main__":
    try:
        import typer  # noqa: F401
    except ImportError:
        sys.exit(
            'python -m bench needs typer: pip install "fused_optim[bench]" (bench/gpu_check.py does not)'
        )
    from bench.cli import app

    app()
