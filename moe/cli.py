"""``python -m moe COMMAND``: what can be done with the folder of a run."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from moe import config_file
from moe.config import ConfigError
from moe.errors import UserError
from moe.inference.generate import generate
from moe.inference.sampling import Sampling
from moe.training.console import printable, showable
from moe.training.machine import choose_device
from moe.training.run_folder import RunFolder

Number = TypeVar("Number", int, float)

GENERATE_FLAGS = {
    "--prompt TEXT": "text to continue",
    "--prompts FILE": "texts to continue in one batch, one a line",
    "--tokens N": "new tokens per prompt (default 128, or what max_seq leaves)",
    "--temperature X": "0 is greedy (default 0.8)",
    "--top-k N": "keep the N most likely tokens (default: all)",
    "--top-p X": "keep the most likely tokens that together reach probability X (default 0.95)",
    "--seed N": "seed of the draws (default 0)",
    "--device NAME": "auto, cpu or cuda (default auto)",
    "--help": "show this",
}


def generate_command(arguments: Sequence[str]) -> None:
    """``python -m moe generate RUN --prompt TEXT``: continue a text with the model of a run."""
    usage = "python -m moe generate RUN --prompt TEXT | --prompts FILE [--tokens N] [--temperature X] ..."
    line = config_file.parse_flags(arguments, GENERATE_FLAGS)
    options = line.options
    if "--help" in options:
        print(usage, *(f"  {flag:18}{meaning}" for flag, meaning in GENERATE_FLAGS.items()), sep="\n")
        return
    if line.overrides:
        raise UserError(f"--{next(iter(line.overrides))} belongs to training: a run's settings are in its folder")
    if len(line.positional) != 1:
        raise UserError(f"one run folder is needed, and {len(line.positional)} were given: {usage}")
    prompts = _prompts(options, usage)
    tokens = _number(options, "--tokens", int, 0)
    seed = _number(options, "--seed", int, 0)
    if tokens < 0:
        raise UserError(f"--tokens is {tokens}, and must be 0 or more")
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed is {seed}, and must be from 0 to {2**32 - 1}")
    try:
        sampling = Sampling(
            temperature=_number(options, "--temperature", float, 0.8),
            top_k=_number(options, "--top-k", int, 1) if "--top-k" in options else None,
            top_p=_number(options, "--top-p", float, 0.95),
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    run = RunFolder.open(Path(line.positional[0]))
    tokenizer = run.tokenizer()
    device = options.get("--device", "auto")
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device is {device}, and must be auto, cpu or cuda")
    model = run.load_model().to(choose_device(device))  # type: ignore[arg-type]
    ids = [[tokenizer.end_of_text, *tokenizer.encode(prompt)] for prompt in prompts]
    room = model.config.max_seq - max(map(len, ids))
    try:
        written = generate(
            model,
            ids,
            tokens if "--tokens" in options else min(128, max(1, room)),
            sampling,
            seed=seed,
            stop=tokenizer.end_of_text,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    for number, (prompt, new) in enumerate(zip(prompts, written, strict=True)):
        if number:
            print("-" * 40)
        print(showable(prompt + printable(tokenizer.decode(new)), sys.stdout))


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"generate": generate_command}


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status: 0, or 2 for a mistake of the user's."""
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print("python -m moe COMMAND [--help]; commands:", *COMMANDS)
            return 0
        if arguments[0] not in COMMANDS:
            raise UserError(f"{arguments[0]} is no command; there are: {', '.join(COMMANDS)}")
        COMMANDS[arguments[0]](arguments[1:])
    except (UserError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _prompts(options: dict[str, str], usage: str) -> list[str]:
    """What to continue, from ``--prompt`` or ``--prompts``."""
    if ("--prompt" in options) == ("--prompts" in options):
        raise UserError(f"--prompt or --prompts is needed, and not both: {usage}")
    if "--prompt" in options:
        return [options["--prompt"]]
    path = Path(options["--prompts"])
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as prompts: {error}") from None
    if not lines:
        raise UserError(f"{path}: holds no prompt; write one a line")
    return lines


def _number(options: dict[str, str], flag: str, kind: type[Number], default: Number) -> Number:
    """The value of ``flag`` as a number, or ``default`` where it is not given."""
    if flag not in options:
        return default
    try:
        return kind(options[flag])
    except ValueError:
        raise UserError(f"{flag} is {options[flag]!r}, and must be a number") from None
