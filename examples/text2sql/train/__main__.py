"""``python -m examples.text2sql.train``."""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.text2sql.train.trainer import RATE, train


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m examples.text2sql.train")
    parser.add_argument("--out", type=Path, default=Path("out/text2sql-model"), help="to write")
    parser.add_argument("--steps", type=int, default=4000, help="batches of about 3,000 tokens")
    parser.add_argument("--minutes", type=float, help="how long to train, instead of steps")
    parser.add_argument("--fall", type=float, default=0.5, help="last share, of falling rate")
    parser.add_argument("--seed", type=int, default=0, help="of weights and pairs")
    parser.add_argument("--start", type=Path, help="folder of a model to go on with")
    parser.add_argument("--rate", type=float, default=RATE, help="learning rate")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    train(args.out, args.steps, args.seed, args.start, args.rate, args.minutes, args.fall)


if __name__ == "__main__":
    main()
