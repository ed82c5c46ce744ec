"""A run as a GGUF file computes in llama.cpp what it computes here: greedy tokens, and every log-probability."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe import presets
from moe.config import ModelConfig
from moe.data.tokenizer import Tokenizer
from moe.errors import UserError
from moe.inference.generate import generate
from moe.inference.sampling import Sampling
from moe.interop.gguf_file import export_gguf
from moe.training import checkpoint
from moe.training.run_folder import RunFolder

gguf = pytest.importorskip("gguf")

Make = Callable[..., Any]

NEW_TOKENS = 24


def model_config(preset: str | None = None, **settings: Any) -> ModelConfig:
    """Three layers of width 32 with four experts, and ``settings`` over that."""
    shape: dict[str, Any] = {
        "d_model": 32,
        "n_layers": 3,
        "attention": {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8},
        "experts": {"n_experts": 4, "d_ff": 32},
    }
    for key, value in settings.items():
        shape[key] = {**shape.get(key, {}), **value} if isinstance(value, dict) else value
    return presets.model_config(preset or "mixtral", **shape)


RUNS: Mapping[str, tuple[ModelConfig, str]] = {
    "the default": (model_config(), "llama with experts"),
    "untied, wide heads": (model_config(tie_embeddings=False, attention={"head_dim": 16}), "llama with experts"),
    "OLMoE": (model_config("olmoe", attention={"qk_norm": "full", "n_kv_heads": 4}), "olmoe"),
    "Qwen3": (model_config("qwen3", attention={"qk_norm": "head", "head_dim": 16}), "qwen3moe"),
    "Qwen2": (model_config("qwen2", attention={"bias": True}, shared={"d_ff": 40}), "qwen2moe"),
    "one expert a token": (model_config("switch"), "glm4moe"),
    "dense layers first": (model_config(experts={"first_dense": 1}, feed_forward={"d_ff": 48}), "glm4moe"),
    "shared experts": (model_config("deepseek_moe", shared={"n_experts": 2}), "glm4moe"),
    "sigmoid": (model_config("loss_free", attention={"bias": True}), "glm4moe"),
    "DeepSeek-V3": (
        model_config(
            "deepseek_v3",
            attention={"qk_norm": "head"},
            experts={"n_experts": 8, "first_dense": 1},
            router={"n_groups": 4, "top_groups": 2, "top_k": 3},
        ),
        "glm4moe",
    ),
    "dense twin": (model_config(dense_twin=True), "llama"),
    "dense twin, biased": (
        model_config(dense_twin=True, attention={"bias": True}, feed_forward={"bias": True}),
        "llama",
    ),
    "dense twin, normed": (model_config(dense_twin=True, attention={"qk_norm": "head"}), "qwen3"),
}


# ------------------------------------------------------------------------------------------------------------ llama.cpp


@contextmanager
def llama_cpp(path: Path) -> Iterator[Any]:
    """The file in llama.cpp, one thread, keys and values kept in float32."""
    x = pytest.importorskip("xllamacpp")
    settings = x.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = 256, 1, False, -1
    settings.cpuparams.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = x.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = x.Server(settings)
    yield server
    del server


def greedy(server: Any, prompt: list[int], n_tokens: int) -> tuple[list[int], Tensor]:
    """What llama.cpp writes after ``prompt``, and at each place the log-probability of every token, [n, V]."""
    answer = server.handle_completions(
        {
            "prompt": prompt,
            "n_predict": n_tokens,
            "temperature": 0.0,
            "n_probs": 320,
            "post_sampling_probs": False,
            "cache_prompt": False,
            "ignore_eos": False,
        }
    )
    content = answer["choices"][0]["logprobs"]["content"]
    found = torch.full((len(content), 320), float("nan"), dtype=torch.float64)
    for place, entry in enumerate(content):
        for token in entry["top_logprobs"]:
            found[place, token["id"]] = token["logprob"]
    return [entry["id"] for entry in content], found


@pytest.mark.parametrize("name", RUNS)
def test_llama_cpp_computes_what_the_run_does(name: str, run_of: Make, tmp_path: Path) -> None:
    """Every log-probability to 1e-4 with a float32 cache, over a greedy continuation."""
    config, architecture = RUNS[name]
    run: RunFolder = run_of(config)

    family = export_gguf(run, tmp_path / "model.gguf")

    assert family.name == architecture
    tokenizer, model = run.tokenizer(), run.load_model()
    prompt = [tokenizer.end_of_text, *tokenizer.encode("the ship sleeps under the dog")]
    with llama_cpp(tmp_path / "model.gguf") as server:
        written, theirs = greedy(server, prompt, NEW_TOKENS)
    [ours] = generate(model, [prompt], NEW_TOKENS, Sampling(temperature=0.0), stop=tokenizer.end_of_text)
    assert written[: len(ours)] == ours
    assert len(ours) > 5
    with torch.no_grad():
        logits, _ = model(torch.tensor([prompt + ours[:-1]]))
    log_probabilities = logits[0, len(prompt) - 1 :].double().log_softmax(dim=-1)
    assert log_probabilities.std() > 0.5, "there is something to get wrong"
    torch.testing.assert_close(theirs[: len(ours)], log_probabilities, atol=1e-4, rtol=0)


def test_llama_cpp_reads_a_text_as_the_run_does(run_of: Make, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A prompt as text gives what its ids give, the token that begins a text included."""
    export_gguf(run_of(model_config()), tmp_path / "model.gguf")
    text = "the ship's dog   sings Käse\n\n under 1234 it's"

    with llama_cpp(tmp_path / "model.gguf") as server:
        from_ids, _ = greedy(server, [tokenizer.end_of_text, *tokenizer.encode(text)], 8)
        from_text, _ = greedy(server, text, 8)  # type: ignore[arg-type]

    assert from_text == from_ids


def test_an_imported_checkpoint_goes_to_llama_cpp(
    checkpoint_of: Make, imported: Make, model_of: Make, tmp_path: Path
) -> None:
    """All the way from transformers: Mixtral with its own names, square experts and 16 to a head."""
    export_gguf(imported(checkpoint_of("mixtral")), tmp_path / "model.gguf")
    prompt = [7, 3, 250, 11, 42]

    with llama_cpp(tmp_path / "model.gguf") as server:
        written, theirs = greedy(server, prompt, 4)

    with torch.no_grad():
        logits = model_of("mixtral")(torch.tensor([prompt + written[:-1]])).logits
    expected = logits[0, len(prompt) - 1 :].double().log_softmax(dim=-1)
    torch.testing.assert_close(theirs, expected, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------------------- the file


def fields(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def test_the_metadata_is_that_of_the_configuration(run_of: Make, tmp_path: Path) -> None:
    export_gguf(run_of(model_config(attention={"rope_theta": 5e5})), tmp_path / "model.gguf")

    found = fields(tmp_path / "model.gguf")
    expected = {
        "general.architecture": "llama",
        "general.name": "ours",
        "llama.block_count": 3,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 32,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.expert_count": 4,
        "llama.expert_used_count": 2,
        "llama.rope.freq_base": 5e5,
        "llama.context_length": 256,
        "llama.vocab_size": 320,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert not any("(" in key for key in found), "what the tensors say is not written"


def test_weights_are_those_of_the_run(run_of: Make, tmp_path: Path) -> None:
    """Experts as one stack, gates and values apart; rows of queries in pairs that are neighbours."""
    run = run_of(model_config())
    ours = run.load_model().state_dict()

    export_gguf(run, tmp_path / "model.gguf")

    theirs = {
        tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors
    }
    stack = ours["blocks.1.feed_forward.experts.w_in"]
    assert torch.equal(theirs["blk.1.ffn_gate_exps.weight"], stack[:, :32])
    assert torch.equal(theirs["blk.1.ffn_up_exps.weight"], stack[:, 32:])
    rows = [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(theirs["blk.1.attn_q.weight"][:8], ours["blocks.1.attention.query.weight"][rows])
    assert "output.weight" not in theirs, "tied to the embedding"


def test_in_bfloat16_routers_and_norms_stay_float32(run_of: Make, tmp_path: Path) -> None:
    export_gguf(run_of(model_config()), tmp_path / "model.gguf", dtype="bf16")

    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.ffn_gate_exps.weight"] == kinds["token_embd.weight"] == "BF16"
    assert kinds["blk.0.ffn_gate_inp.weight"] == kinds["blk.0.attn_norm.weight"] == "F32"
    with llama_cpp(tmp_path / "model.gguf") as server:
        written, _ = greedy(server, [1, 2, 3], 3)
    assert len(written) == 3


# ------------------------------------------------------------------------------------------------------------- refusals


def test_what_llama_cpp_cannot_be_is_told(run_of: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no architecture of llama.cpp represents this run") as refusal:
        export_gguf(run_of(model_config(n_layers=4, experts={"every": 2})), tmp_path / "model.gguf")

    lines = str(refusal.value).splitlines()
    assert "  glm4moe: the model has mixtures in layers 1, 3, and glm4moe mixtures in layers 0 to 3" in lines
    assert not (tmp_path / "model.gguf").exists()


def test_a_bias_on_the_output_of_attention_must_be_zeros(run_of: Make, tmp_path: Path) -> None:
    run = run_of(model_config("loss_free", attention={"bias": True}))
    model = run.load_model()
    with torch.no_grad():
        model.blocks[2].attention.output.bias[0] = 1.0
    checkpoint.save(run.checkpoints_path, 8, model, None, {}, keep=1)

    with pytest.raises(
        UserError, match=r"glm4moe has no tensor for blocks.2.attention.output.bias, which is not all z"
    ):
        export_gguf(run, tmp_path / "model.gguf")


def test_a_tokenizer_that_llama_cpp_has_not_is_refused(run_of: Make, tmp_path: Path) -> None:
    run = run_of(model_config())
    content = json.loads(run.tokenizer_path.read_text())
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, content["pre_tokenizer"]]}
    run.tokenizer_path.write_text(json.dumps(content))

    with pytest.raises(UserError, match=r"llama.cpp has no such tokenizer: it splits text into words by a rule"):
        export_gguf(run, tmp_path / "model.gguf")


def test_without_the_package_the_remedy_is_told(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)

    with pytest.raises(UserError, match=r"--to gguf needs the package gguf, .*: pip install -e '.\[gguf\]'"):
        export_gguf(run_of(model_config()), tmp_path / "model.gguf")
