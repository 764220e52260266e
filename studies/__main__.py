"""Run a study; each saves what it has finished, goes on from there, and writes its tables.

python -m studies fidelity
python -m studies training
"""

from __future__ import annotations

import argparse


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m studies",
        description="What the memory formats do to training.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("study", choices=("fidelity", "training", "report"))
    parser.add_argument("--steps", type=int, default=1500, help="steps of a training run")
    parser.add_argument("--gpt-seeds", type=int, default=4, help="0 for none")
    parser.add_argument("--digits-seeds", type=int, default=6, help="0 for none")
    parser.add_argument("--workers", type=int, default=2, help="training runs at a time, one thread each")
    args = parser.parse_args()

    if args.study == "training":
        from . import training

        training.study({"gpt": args.gpt_seeds, "digits": args.digits_seeds}, args.steps, args.workers)


if __name__ == "__main__":
    main()
