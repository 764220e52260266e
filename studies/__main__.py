"""Run a study, then write the tables and plots of docs/formats.md.

python -m studies fidelity     what second moments keep, ours and others'
python -m studies training     losses in every format; goes on from the runs that are finished
python -m studies report       tables and plots alone
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
    parser.add_argument("--elements", type=int, default=1024, help="fidelity: of each scenario")
    parser.add_argument("--steps", type=int, default=1500, help="training: of each run")
    parser.add_argument("--gpt-seeds", type=int, default=16, help="training: 0 for none")
    parser.add_argument("--digits-seeds", type=int, default=8, help="training: 0 for none")
    parser.add_argument("--workers", type=int, default=2, help="training: runs at a time, one thread each")
    args = parser.parse_args()

    from . import fidelity, report, training

    if args.study == "fidelity":
        fidelity.study(args.elements)
    if args.study == "training":
        training.study({"gpt": args.gpt_seeds, "digits": args.digits_seeds}, args.steps, args.workers)
    report.write()


if __name__ == "__main__":
    main()
