"""``python -m moe generate RUN``: continue texts with the model of a run, to the terminal or into a file."""

import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from tqdm import tqdm

from moe import config_file
from moe.config import ModelConfig
from moe.data.tokenizer import Tokenizer
from moe.errors import UserError
from moe.inference.completions import Completions, Piece
from moe.inference.engine import Engine, Request
from moe.inference.prompts import Prompt, read_prompts, written_whole
from moe.inference.sampling import Sampling
from moe.inference.speculative import Drafter, DraftModel, NGrams
from moe.model.transformer import Transformer
from moe.training.console import printable, showable
from moe.training.machine import choose_device
from moe.training.run_folder import RunFolder

Number = TypeVar("Number", int, float)

USAGE = "python -m moe generate RUN --prompt TEXT | --prompts FILE [--tokens N] [--temperature X] ..."
FLAGS = {
    "--prompt TEXT": "text to continue",
    "--prompts FILE": 'texts to continue, one a line; in a .jsonl file strings, or objects with a "prompt"',
    "--out FILE": "write a line of JSON for each prompt here, and show a bar",
    "--tokens N": "new tokens per prompt (default 128, or what max_seq leaves)",
    "--temperature X": "0 is greedy (default 0.8)",
    "--top-k N": "keep the N most likely tokens (default: all)",
    "--top-p X": "keep the most likely tokens that together reach probability X (default 0.95)",
    "--min-p X": "keep tokens with at least X times the probability of the most likely one (default: all)",
    "--repetition-penalty X": "divide the logits of tokens that the text holds by X (default 1)",
    "--stop TEXT": 'end before this text; several as a JSON list: \'["one", "two"]\'',
    "--samples N": "continuations of each prompt (default 1)",
    "--seed N": "seed of the draws (default 0)",
    "--probabilities": "show each token with its probability under the model",
    "--experts": "show each token with the experts that it was predicted by, layer by layer",
    "--draft RUN": "guess tokens with this smaller run, or by ngrams of the text: the same text, sooner",
    "--guesses N": "tokens guessed at a time (default 4)",
    "--batch-size N": "continuations written at once (default 16)",
    "--chunk N": "tokens of prompts read at once (default 512)",
    "--device NAME": "auto, cpu or cuda (default auto)",
    "--help": "show this",
}
DEFAULT_TOKENS = 128


def generate_command(arguments: Sequence[str]) -> int:
    """``python -m moe generate RUN --prompt TEXT``."""
    line = config_file.parse_flags(arguments, FLAGS)
    options = line.options
    if "--help" in options:
        print(USAGE, *(f"  {flag:24}{meaning}" for flag, meaning in FLAGS.items()), sep="\n")
        return 0
    if line.overrides:
        raise UserError(f"--{next(iter(line.overrides))} belongs to training: a run's settings are in its folder")
    if len(line.positional) != 1:
        raise UserError(f"one run folder is needed, and {len(line.positional)} were given: {USAGE}")
    prompts = _prompts(options)
    tokens = number(options, "--tokens", int, 0, at_least=0)
    n_samples, batch_size = _count(options, "--samples", 1), _count(options, "--batch-size", 16)
    guesses, chunk, seed = _count(options, "--guesses", 4), _count(options, "--chunk", 512), seed_of(options)
    if "--guesses" in options and "--draft" not in options:
        raise UserError("--guesses is of tokens that a --draft guesses, and none is given")
    stop = _stop(options)
    try:
        sampling = Sampling(
            temperature=number(options, "--temperature", float, 0.8),
            top_k=number(options, "--top-k", int, 1) if "--top-k" in options else None,
            top_p=number(options, "--top-p", float, 0.95),
            min_p=number(options, "--min-p", float, 0.0) or None,
            repetition_penalty=number(options, "--repetition-penalty", float, 1.0),
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    out = Path(options["--out"]) if "--out" in options else None
    if out is not None and out.exists():
        raise UserError(f"{out}: exists; choose another --out")
    path = Path(line.positional[0])
    model, tokenizer = load(path, options.get("--device", "auto"))
    draft = load_draft(options["--draft"], path, model) if "--draft" in options else None
    longest = model.config.max_seq
    requests = []
    for row, prompt in enumerate(prompts):
        ids = tokenizer.prompt_ids(prompt.text)
        new = tokens if "--tokens" in options else min(DEFAULT_TOKENS, max(1, longest - len(ids)))
        if len(ids) + new > longest:
            place = f"line {row + 1}: " if len(prompts) > 1 else ""
            raise UserError(f"{place}a prompt of {len(ids)} tokens and {new} new ones do not fit max_seq = {longest}")
        request = Request(
            ids,
            new,
            sampling,
            seed=(seed << 20) + row,
            n=n_samples,
            stop=tokenizer.end_of_text,
            with_experts="--experts" in options,
        )
        requests.append(request)
    # Room for as many of the longest as are written at once.
    at_once = max(n_samples, min(batch_size, n_samples * len(requests)))
    n_tokens = at_once * max(len(request.prompt) + request.max_new_tokens for request in requests)
    drafter = drafter_of(draft, guesses, n_tokens, at_once, chunk)
    engine = Engine(model, n_tokens=n_tokens + 16 * at_once, max_sequences=at_once, chunk=chunk, drafter=drafter)
    completions = Completions(engine, tokenizer)
    if note := competition(completions.engine.model.config):
        print(note, file=sys.stderr)

    def show_token(piece: Piece) -> str:
        return _token_line(piece, completions, "--probabilities" in options, "--experts" in options)

    in_detail = "--probabilities" in options or "--experts" in options
    if out is None:
        _to_terminal(completions, prompts, requests, stop, show_token if in_detail else None)
    else:
        _to_file(completions, prompts, requests, stop, out, with_tokens=in_detail)
    if "--draft" in options:
        told = completions.engine.statistics
        share = f"{told.acceptance:.1%} of {told.guessed:,} guessed tokens were kept"
        print(f"{share}; {told.new_tokens:,} tokens in {told.steps:,} steps", file=sys.stderr)
    return 0


def load(path: Path, device: str) -> tuple[Transformer, Tokenizer]:
    """The model of the run in ``path``, on its device, and its tokenizer; raises UserError."""
    run = RunFolder.open(path)
    tokenizer = run.tokenizer()
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device is {device}, and must be auto, cpu or cuda")
    on = choose_device(device)  # type: ignore[arg-type]
    return run.load_model().to(on), tokenizer


def load_draft(draft: str, path: Path, model: Transformer) -> Transformer | Literal["ngrams"]:
    """What ``--draft`` names; raises UserError where its tokens are not those of the run in ``path``."""
    if draft == "ngrams":
        return "ngrams"
    run, guessed_for = RunFolder.open(Path(draft)), RunFolder.open(path)
    if run.tokenizer_path.read_bytes() != guessed_for.tokenizer_path.read_bytes():
        raise UserError(f"--draft {draft}: its tokens are not those of {path}; both need the same tokenizer.json")
    drafting = run.load_model()
    if drafting.config.vocab_size != model.config.vocab_size:
        raise UserError(
            f"--draft {draft}: model.vocab_size is {drafting.config.vocab_size}, and must be that of {path}, "
            f"{model.config.vocab_size}"
        )
    return drafting.to(model.embedding.weight.device)


def drafter_of(
    draft: Transformer | Literal["ngrams"] | None, guesses: int, n_tokens: int, at_once: int, chunk: int
) -> Drafter | None:
    """Who guesses for an engine with ``n_tokens`` in its cache."""
    if draft is None or draft == "ngrams":
        return None if draft is None else NGrams(guesses)
    # Guesses need room of their own until they are kept or not, and a last block is rarely full.
    n_blocks = -(-(n_tokens + at_once * (guesses + 16)) // 16)
    return DraftModel(draft, guesses, n_blocks, chunk=chunk)


# ------------------------------------------------------------------------------------------------------------ to where


@dataclass
class _Answer:
    """What is known of one continuation of one prompt."""

    pieces: list[Piece] = field(default_factory=list)
    finished: bool = False


def _to_terminal(
    completions: Completions,
    prompts: Sequence[Prompt],
    requests: Sequence[Request],
    stop: Sequence[str],
    show_token: Callable[[Piece], str] | None,
) -> None:
    """Print each continuation as it comes; those that are written beside it wait for their turn."""
    order = [(row, sample) for row, request in enumerate(requests) for sample in range(request.n)]
    answers = {key: _Answer() for key in order}
    turn, shown = 0, 0

    def say(text: str) -> None:
        print(showable(text, sys.stdout), end="", flush=True)

    def begin(turn: int) -> None:
        prompt = prompts[order[turn][0]].text
        say(f"{'-' * 40}\n" * bool(turn) + prompt + "\n" * (show_token is not None))

    begin(0)
    for row, piece in _run(completions, requests, stop):
        answer = answers[row, piece.event.sample]
        answer.pieces.append(piece)
        answer.finished = piece.finish is not None
        while turn < len(order):
            current = answers[order[turn]]
            for one in current.pieces[shown:]:
                say(show_token(one) if show_token is not None else printable(one.text))
            shown = len(current.pieces)
            if not current.finished:
                break
            say("\n" * (show_token is None))
            current.pieces.clear()
            turn, shown = turn + 1, 0
            if turn < len(order):
                begin(turn)


def _to_file(
    completions: Completions,
    prompts: Sequence[Prompt],
    requests: Sequence[Request],
    stop: Sequence[str],
    out: Path,
    *,
    with_tokens: bool,
) -> None:
    """Write a line for each prompt, in their order."""
    answers: dict[tuple[int, int], _Answer] = {}
    unfinished = [request.n for request in requests]
    next_row = 0
    with written_whole(out) as stream, tqdm(total=len(prompts), unit="prompt", disable=None, leave=False) as bar:
        for row, piece in _run(completions, requests, stop):
            answers.setdefault((row, piece.event.sample), _Answer()).pieces.append(piece)
            unfinished[row] -= piece.finish is not None
            while next_row < len(prompts) and not unfinished[next_row]:
                own = [answers.pop((next_row, sample)).pieces for sample in range(requests[next_row].n)]
                said = [_as_json(pieces, completions, with_tokens) for pieces in own]
                prompt = prompts[next_row]
                line = {"prompt": prompt.text, **prompt.also, "completions": said}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
                stream.flush()
                next_row += 1
                bar.update()
            bar.set_postfix(tokens=completions.engine.statistics.new_tokens, refresh=False)
    print(f"{len(prompts):,} prompts continued: {out}")


def _run(completions: Completions, requests: Sequence[Request], stop: Sequence[str]) -> Iterable[tuple[int, Piece]]:
    """The pieces of all requests with their places in the list, as they come; few wait in the engine at a time."""
    waiting = deque(enumerate(requests))
    row_of: dict[int, int] = {}
    engine = completions.engine
    while waiting or engine.busy:
        while waiting and engine.n_waiting < engine.max_sequences:
            row, request = waiting.popleft()
            row_of[completions.submit(request, stop)] = row
        for piece in completions.step():
            yield row_of[piece.event.request], piece


def _as_json(pieces: Sequence[Piece], completions: Completions, with_tokens: bool) -> dict[str, Any]:
    said: dict[str, Any] = {"text": "".join(piece.text for piece in pieces), "finish": pieces[-1].finish}
    if with_tokens:
        said["tokens"] = [
            {
                "id": event.token,
                "text": completions.tokenizer.decode([event.token]),
                "log_probability": event.log_probability,
                **({"experts": event.experts} if event.experts else {}),
            }
            for event in (piece.event for piece in pieces)
            if event.token is not None
        ]
    return said


def _token_line(piece: Piece, completions: Completions, probabilities: bool, experts: bool) -> str:
    """One line of a token: its text, its probability, and its experts with a bar between layers."""
    event = piece.event
    if event.token is None:
        return ""
    columns = [f"{completions.tokenizer.decode([event.token])!r:24}"]
    if probabilities:
        columns.append(f"{2.718281828459045**event.log_probability:6.4f}")
    if experts:
        columns.append(" | ".join(" ".join(f"{expert:2}" for expert in layer) for layer in event.experts))
    return "  ".join(columns).rstrip() + "\n"


# --------------------------------------------------------------------------------------------------------------- flags


def _prompts(options: Mapping[str, str]) -> list[Prompt]:
    """What to continue, from ``--prompt`` or ``--prompts``."""
    if ("--prompt" in options) == ("--prompts" in options):
        raise UserError(f"--prompt or --prompts is needed, and not both: {USAGE}")
    return [Prompt(options["--prompt"])] if "--prompt" in options else read_prompts(Path(options["--prompts"]))


def _stop(options: Mapping[str, str]) -> tuple[str, ...]:
    """The texts of ``--stop``."""
    text = options.get("--stop")
    if text is None:
        return ()
    stop: Any = [text]
    if text.startswith("["):
        try:
            stop = json.loads(text)
        except ValueError as error:
            raise UserError(f"--stop begins with [ and is no list in JSON ({error})") from None
    if not isinstance(stop, list) or not all(isinstance(one, str) and one for one in stop):
        raise UserError(f"--stop is {text!r}, and must be a text, or texts in a JSON list, none of them empty")
    return tuple(stop)


def competition(model: ModelConfig) -> str | None:
    """What to know of text from ``model``, if tokens compete for its experts in evaluation; None if they do not."""
    router, says = model.router, []
    if not router.is_batch_independent(training=False):
        says.append("the other prompts have a say in how each goes on")
    if not router.is_causal(training=False):
        says.append("validation saw later tokens, which are not there while text is written")
    if not model.moe_layers or not says:
        return None
    return f"note: tokens compete for this router's experts: {', and '.join(says)}"


def seed_of(options: Mapping[str, str]) -> int:
    """The value of ``--seed``, 0 where it is not given."""
    seed = number(options, "--seed", int, 0)
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed is {seed}, and must be from 0 to {2**32 - 1}")
    return seed


def _count(options: Mapping[str, str], flag: str, default: int) -> int:
    return number(options, flag, int, default, at_least=1)


def number(
    options: Mapping[str, str], flag: str, kind: type[Number], default: Number, at_least: Number | None = None
) -> Number:
    """The value of ``flag`` as a number, or ``default`` where it is not given."""
    if flag not in options:
        return default
    try:
        value = kind(options[flag])
    except ValueError:
        raise UserError(f"{flag} is {options[flag]!r}, and must be a {'whole ' * (kind is int)}number") from None
    if at_least is not None and value < at_least:
        raise UserError(f"{flag} is {value}, and must be {at_least} or more")
    return value
