"""``python -m examples.text2sql.train``."""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.text2sql.train.trainer import train

parser = argparse.ArgumentParser(prog="python -m examples.text2sql.train")
parser.add_argument("--out", type=Path, default=Path("out/text2sql-model"), help="folder to write")
parser.add_argument("--steps", type=int, default=3000, help="batches of at most 3,072 tokens")
parser.add_argument("--seed", type=int, default=0, help="of weights and pairs")
parser.add_argument("--start", type=Path, help="folder of a model to go on with")
parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
parser.add_argument("--fall", type=int, default=0, help="last batches, of falling learning rate")
parser.add_argument("--threads", type=int, default=1, help="of torch")
args = parser.parse_args()

import torch  # noqa: E402 - after a look at what was asked

torch.set_num_threads(args.threads)
train(args.out, args.steps, args.seed, args.start, args.rate, args.fall)
