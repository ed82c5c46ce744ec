"""``python -m moe serve RUN``: an HTTP server for experiments, which OpenAI's clients can talk to."""

import socket
from collections.abc import Sequence
from pathlib import Path

from moe import config_file
from moe.config import ModelConfig
from moe.errors import UserError
from moe.inference.command import drafter_of, load, load_draft, number
from moe.inference.completions import Completions
from moe.inference.engine import Engine
from moe.inference.server.service import Service

USAGE = "python -m moe serve RUN [--host NAME] [--port N] ..."
MEANING = """\
Answer HTTP requests with the model of a run, as OpenAI's API of completions does: POST /v1/completions (streaming,
logprobs, stop, n, seed; beyond it top_k, min_p, repetition_penalty, and routing: true for the experts that each token
was predicted by), GET /v1/models, /health, and /metrics for Prometheus. There is no encryption and nobody is asked who
they are: it is for experiments. For production, export the run to Hugging Face's format and serve it with vLLM."""
FLAGS = {
    "--host NAME": "address to listen on (default 127.0.0.1, this machine alone)",
    "--port N": "port to listen on (default 8000)",
    "--batch-size N": "texts written at once (default 16)",
    "--cache-tokens N": "tokens in the cache (default: batch-size texts of max_seq, up to 4 GiB)",
    "--chunk N": "tokens of prompts read at once (default 512)",
    "--queue N": "prompts that may wait beside those being written; more are refused with status 429 (default 64)",
    "--request-bytes N": "longest body of a request (default 1048576)",
    "--request-seconds N": "longest time to answer one (default 300)",
    "--draft RUN": "guess tokens with this smaller run, or by ngrams of the text",
    "--guesses N": "tokens guessed at a time (default 4)",
    "--device NAME": "auto, cpu or cuda (default auto)",
    "--help": "show this",
}
DEFAULT_CACHE_BYTES = 4 << 30


def serve_command(arguments: Sequence[str]) -> int:
    """``python -m moe serve RUN``."""
    line = config_file.parse_flags(arguments, FLAGS)
    options = line.options
    if "--help" in options:
        print(USAGE, "", MEANING, "", *(f"  {flag:22}{meaning}" for flag, meaning in FLAGS.items()), sep="\n")
        return 0
    if line.overrides:
        raise UserError(f"--{next(iter(line.overrides))} belongs to training: a run's settings are in its folder")
    if len(line.positional) != 1:
        raise UserError(f"one run folder is needed, and {len(line.positional)} were given: {USAGE}")
    port = number(options, "--port", int, 8000, at_least=0)
    if port > 65535:
        raise UserError(f"--port is {port}, and must be from 0 to 65535")
    batch_size = number(options, "--batch-size", int, 16, at_least=1)
    chunk, guesses = number(options, "--chunk", int, 512, at_least=1), number(options, "--guesses", int, 4, at_least=1)
    waiting = number(options, "--queue", int, 64, at_least=0)
    longest_body = number(options, "--request-bytes", int, 1 << 20, at_least=1)
    seconds = number(options, "--request-seconds", float, 300.0, at_least=0.1)
    try:
        import uvicorn

        from moe.inference.server.app import Limits, build_app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "moe":
            raise
        raise UserError(f"serving needs {error.name}: pip install 'moe-lab[serve]'") from None

    path = Path(line.positional[0])
    model, tokenizer = load(path, options.get("--device", "auto"))
    draft = load_draft(options["--draft"], path, model) if "--draft" in options else None
    itemsize = model.embedding.weight.dtype.itemsize
    n_tokens = number(options, "--cache-tokens", int, default_tokens(model.config, batch_size, itemsize), at_least=1)
    drafter = drafter_of(draft, guesses, n_tokens, batch_size, chunk)
    engine = Engine(model, n_tokens=n_tokens, max_sequences=batch_size, chunk=chunk, drafter=drafter)
    service = Service(Completions(engine, tokenizer), capacity=batch_size + waiting)
    name = path.resolve().name
    app = build_app(service, name, Limits(longest_body, seconds))
    host = options.get("--host", "127.0.0.1")
    try:
        listening = socket.create_server((host, port), backlog=2048)
    except OSError as error:
        raise UserError(f"{host}:{port} cannot be listened on ({error.strerror or error}); choose another") from None
    print(f"serving {name} on http://{host}:{listening.getsockname()[1]}/v1 (Ctrl-C stops)", flush=True)
    # After a signal, answers under way have half a minute to end.
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=30)
    uvicorn.Server(config).run(sockets=[listening])
    return 0


def default_tokens(config: ModelConfig, batch_size: int, itemsize: int) -> int:
    """Room for so many texts as long as they may be, or for as much of that as 4 GiB hold, but for one of them."""
    heads, key_width, value_width = config.attention.cached
    per_token = config.n_layers * heads * (key_width + value_width) * itemsize
    return max(config.max_seq, min(batch_size * config.max_seq, DEFAULT_CACHE_BYTES // per_token))
