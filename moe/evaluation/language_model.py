"""The model of a run as lm-evaluation-harness wants it: log-likelihoods of text and text that it writes itself.

Text is encoded, cut to fit and scored as the harness does for an exported run (its ``--model hf``), so that both have
the same scores: a context begins with an end of text, as documents do in training, and one that is longer than the
window loses its beginning. What differs is only how the work is laid out: requests that read the same tokens (the
choices of a question, where each is one token) are read once, and batches are of like lengths. The one exception is a
whole text (``loglikelihood_rolling``): there ``--model hf`` also scores the end of text that its tokenizer puts first.

This file needs the extra ``evaluate``.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from moe.config import Precision
from moe.data.tokenizer import Tokenizer
from moe.errors import UserError
from moe.inference.generate import generate
from moe.inference.sampling import Sampling
from moe.model.transformer import Transformer
from moe.training.head_loss import BLOCK_BYTES
from moe.training.machine import autocast

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""(context and continuation as text, their tokens)"""

NEW_TOKENS = 256
"""written at most where a task sets no limit: what the harness gives every model"""
FIRST_BLOCK = 16
"""tokens written before the first look for a string to stop at; each further block is twice as long"""


class RunLM(TemplateLM):  # type: ignore[misc]
    """A :class:`~moe.model.transformer.Transformer` and its tokenizer behind the harness's interface.

    ``max_length`` tokens are read at once (None: as many as the model can), ``batch_size`` sequences together, in
    ``precision``. ``say`` takes a line about what a task asks for and does not get. The model should be in evaluation
    mode.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        batch_size: int = 32,
        precision: Precision = "fp32",
        say: Callable[[str], object] = lambda line: None,
    ) -> None:
        super().__init__()
        self.model, self._tokenizer, self._precision, self._say = model, tokenizer, precision, say
        self.max_length = max_length or model.config.max_seq
        self.batch_size = batch_size
        self._device = model.embedding.weight.device
        self._said: set[str] = set()

    @property
    def eot_token_id(self) -> int:
        """The end of text, which every context begins with."""
        return self._tokenizer.end_of_text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of ``string`` after an end of text, which ``add_special_tokens=False`` leaves out."""
        begin = [] if add_special_tokens is False else [self.eot_token_id]
        return begin + self._tokenizer.encode(string)

    def tok_decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``."""
        return self._tokenizer.decode(tokens)

    # ---------------------------------------------------------------------------------------------------- likelihood

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether greedy decoding would write it) of each continuation after its context."""
        # The harness's own bars are drawn whether or not somebody looks at a terminal.
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[tuple[float, bool]]:
        """:meth:`loglikelihood` of tokens. Raises UserError for a continuation without any, or longer than fits."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for index, (text, context, continuation) in enumerate(requests):
            if not continuation:
                raise UserError(
                    f"{text and text[1]!r} adds no token to what stands before it: end the context at a word, or begin "
                    "the continuation with a space"
                )
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens does not fit the {self.max_length} that the model "
                    "reads at once (--sequence-length)"
                )
            rows.setdefault(tuple((context + continuation)[-(self.max_length + 1) : -1]), []).append(index)
        answers: list[tuple[float, bool] | None] = [None] * len(requests)
        with self._bar("likelihoods", len(requests)) as bar:
            for some in self._batches(list(rows)):
                hidden = self._hidden(some)
                for row, read in enumerate(some):
                    of_row = rows[read]
                    found = self._answers(hidden[row, : len(read)], [requests[index][2] for index in of_row])
                    for index, answer in zip(of_row, found, strict=True):
                        answers[index] = answer
                        if (text := requests[index][0]) is not None:
                            self.cache_hook.add_partial("loglikelihood", text, answer)
                    bar.update(len(of_row))
        return [answer for answer in answers if answer is not None]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """The log-probability in nats of each whole text after an end of text.

        A text longer than the window is cut into windows that score each token once; the last one is moved back to be
        full, so that its tokens have context.
        """
        windows: list[Request] = []
        owner: list[int] = []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(tokens, self.eot_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owner.append(index)
        totals = [0.0] * len(requests)
        for index, (nats, _) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
            totals[index] += nats
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _batches(self, rows: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Longest first, so that padding is little and what does not fit memory shows at once."""
        ordered = sorted(rows, key=lambda row: (-len(row), row))
        for first in range(0, len(ordered), self.batch_size):
            yield ordered[first : first + self.batch_size]

    @torch.no_grad()
    def _hidden(self, rows: Sequence[Sequence[int]]) -> Float[Tensor, "B S D"]:
        """What the head multiplies for ``rows``, padded on the right; padding is neither attended to nor routed."""
        length = max(map(len, rows))
        tokens = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=self._device)
        real = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows], device=self._device)
        # Compiled for training's shapes, blocks would be compiled again for each length here.
        with autocast(self._device, self._precision), torch.compiler.set_stance("force_eager"):
            hidden, _ = self.model.hidden(tokens, mask=None if bool(real.all()) else real)
        return hidden

    @torch.no_grad()
    def _answers(self, hidden: Float[Tensor, "S D"], continuations: Sequence[list[int]]) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy) of continuations that all end one token after the last of ``hidden``.

        Never more than a block of logits is held.
        """
        longest = max(map(len, continuations))
        targets = torch.full((len(continuations), longest), -1, device=self._device)
        for row, continuation in enumerate(continuations):
            targets[row, longest - len(continuation) :] = torch.tensor(continuation, device=self._device)
        nats = torch.zeros(len(continuations), dtype=torch.float64, device=self._device)
        greedy = torch.ones(len(continuations), dtype=torch.bool, device=self._device)
        at_once = max(1, BLOCK_BYTES.get(self._device.type, 64 << 20) // (4 * self.model.head.weight.shape[0]))
        for rows, wanted in zip(
            torch.split(hidden[len(hidden) - longest :], at_once), torch.split(targets, at_once, dim=1), strict=True
        ):
            with autocast(self._device, self._precision):
                logits: Tensor = self.model.head(rows)
            log_probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
            counts = wanted >= 0
            own = log_probabilities.gather(1, wanted.t().clamp(min=0)).t().double()
            nats += own.masked_fill(~counts, 0.0).sum(dim=1)
            greedy &= ((log_probabilities.argmax(dim=-1)[None] == wanted) | ~counts).all(dim=1)
        return list(zip(nats.tolist(), greedy.tolist(), strict=True))

    # ---------------------------------------------------------------------------------------------------- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """What the model writes after each context, up to the first of its strings to stop at or an end of text.

        Greedy, unless the task sets ``do_sample`` and a temperature (``top_k`` and ``top_p`` then count too; other
        settings are said and left out). No more is written than half of the window, so that a context has the rest;
        one that is longer loses its beginning.
        """
        written: list[str | None] = [None] * len(requests)
        wanted: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            wanted.setdefault(repr(request.args[1]), []).append(index)
        with self._bar("generation", len(requests)) as bar:
            for indices in wanted.values():
                until, n_tokens, sampling = self._generation_settings(requests[indices[0]].args[1])
                room = self.max_length - n_tokens
                contexts = {index: self.tok_encode(requests[index].args[0])[-room:] for index in indices}
                ordered = sorted(indices, key=lambda index: -len(contexts[index]))
                for first in range(0, len(ordered), self.batch_size):
                    some = ordered[first : first + self.batch_size]
                    texts = self._write([contexts[index] for index in some], until, n_tokens, sampling)
                    for index, text in zip(some, texts, strict=True):
                        written[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    bar.update(len(some))
        return [text for text in written if text is not None]

    def _write(self, contexts: list[list[int]], until: list[str], n_tokens: int, sampling: Sampling) -> list[str]:
        """The text after each context. It is written in blocks: a text that has come to its end takes no further part.

        A block reads again what there is, which costs little beside tokens that nobody wants.
        """
        new: list[list[int]] = [[] for _ in contexts]
        going = list(range(len(contexts)))
        done, block = 0, FIRST_BLOCK
        while going and done < n_tokens:
            block = min(block, n_tokens - done)
            with autocast(self._device, self._precision):
                more = generate(
                    self.model,
                    [contexts[row] + new[row] for row in going],
                    block,
                    sampling,
                    seed=done,
                    stop=self.eot_token_id,
                )
            still = []
            for row, tokens in zip(going, more, strict=True):
                new[row] += tokens
                ended = len(tokens) < block or any(stop in self.tok_decode(new[row]) for stop in until)
                if not ended:
                    still.append(row)
            going, done, block = still, done + block, 2 * block
        return [_cut(self.tok_decode(tokens), until) for tokens in new]

    def _generation_settings(self, given: dict[str, Any]) -> tuple[list[str], int, Sampling]:
        """(strings to stop at, new tokens, how they are drawn)."""
        settings = normalize_gen_kwargs(given, NEW_TOKENS)
        until = [
            stop
            for stop in handle_stop_sequences(settings.pop("until", None), eos=self.tok_decode([self.eot_token_id]))
            if stop
        ]
        n_tokens = int(settings.pop("max_gen_toks"))
        most = max(1, self.max_length // 2)
        if n_tokens > most:
            self._say_once(
                f"a task wants up to {n_tokens} new tokens; {most} are written, half of what the model reads at once"
            )
        do_sample = bool(settings.pop("do_sample", False))
        temperature = float(settings.pop("temperature", 0.0) or 0.0)
        top_k, top_p = settings.pop("top_k", None), settings.pop("top_p", None)
        if settings:
            self._say_once(f"left out of a task's generation settings: {', '.join(sorted(settings))}")
        if not do_sample:
            return until, min(n_tokens, most), Sampling(temperature=0.0)
        try:
            sampling = Sampling(temperature=temperature, top_k=top_k or None, top_p=top_p or None)
        except ValueError as error:
            raise UserError(f"a task's generation settings: {error}") from None
        return until, min(n_tokens, most), sampling

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._say(line)

    @staticmethod
    def _bar(what: str, total: int) -> Any:
        """Only a terminal sees it."""
        return tqdm(total=total, desc=what, unit="request", leave=False, disable=None)


def _cut(text: str, until: Sequence[str]) -> str:
    """``text`` up to the first place where one of ``until`` stands."""
    return text[: min([len(text), *(text.find(stop) for stop in until if stop in text)])]
