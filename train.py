"""Train a mixture-of-experts language model: ``python train.py [CONFIG] [--section.key value ...]``.

Without a configuration this trains ``configs/toy.yaml``. A stopped run goes on with ``python train.py --resume RUN``.
"""

import sys
from pathlib import Path

from moe.study.recording import record_sample
from moe.training.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], default_config=Path(__file__).parent / "configs" / "toy.yaml", recorder=record_sample))
