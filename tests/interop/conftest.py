"""Tiny random models of transformers, in folders as it writes them, and tiny runs of ours; nothing is fetched."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers

from moe.config import Config, ModelConfig, RunConfig, TrainingConfig
from moe.data.tokenizer import Tokenizer, train_bpe
from moe.interop.importing import import_checkpoint
from moe.model.transformer import Transformer
from moe.training import checkpoint
from moe.training.run_folder import RunFolder

transformers.utils.logging.disable_progress_bar()

VOCABULARY, LONGEST = 320, 128
TRUNK: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LONGEST,
}
LEFT_OUT = object()
"""a setting that the others have and this one has not"""
MIXTURE: Mapping[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}


class Case(NamedTuple):
    """A model of theirs: what its classes are called without Config and ForCausalLM, and its settings."""

    called: str
    settings: Mapping[str, Any]

    def config(self, **changes: Any) -> Any:
        settings = {**TRUNK, **self.settings, **changes}
        given = {key: value for key, value in settings.items() if value is not LEFT_OUT}
        return getattr(transformers, f"{self.called}Config")(**given)

    def model(self, **changes: Any) -> Any:
        """The model with weights that make its logits differ by about 1, every one of them drawn."""
        model = transformers.AutoModelForCausalLM.from_config(self.config(**changes)).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                drawn = torch.randn(tensor.shape, generator=generator)
                if tensor.dim() > 1:
                    tensor.copy_(drawn * (1.0 if "embed" in name else 1.5 * tensor.shape[-1] ** -0.5))
                else:
                    tensor.copy_(0.3 * drawn + (1.0 if "norm" in name else 0.0))
        return model


# Each kind of norm, bias, tie and layer pattern. Some experts are square: a transposed copy of one has the right shape
# and the wrong numbers.
CASES = {
    "mixtral": Case("Mixtral", {"num_local_experts": 4, "intermediate_size": 32, "head_dim": 16}),
    "mixtral_oblong": Case("Mixtral", {"num_local_experts": 5, "intermediate_size": 24, "rope_theta": 500.0}),
    "mixtral_tied": Case("Mixtral", {"num_local_experts": 4, "intermediate_size": 24, "tie_word_embeddings": True}),
    "olmoe": Case("Olmoe", MIXTURE | {"intermediate_size": 32}),
    "olmoe_biased": Case("Olmoe", MIXTURE | {"intermediate_size": 24, "attention_bias": True, "norm_topk_prob": True}),
    "qwen2_moe": Case("Qwen2Moe", MIXTURE | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}),
    "qwen2_moe_dense_first": Case(
        "Qwen2Moe",
        MIXTURE
        | {
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "intermediate_size": 48,
            "mlp_only_layers": [0],
            "qkv_bias": False,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe": Case("Qwen3Moe", MIXTURE | {"moe_intermediate_size": 32, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3_moe_sparse": Case(
        "Qwen3Moe",
        MIXTURE
        | {
            "moe_intermediate_size": 24,
            "head_dim": 8,
            "intermediate_size": 48,
            "decoder_sparse_step": 2,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "glm4_moe": Case(
        "Glm4Moe",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 2,
            "routed_scaling_factor": 1.5,
            "moe_intermediate_size": 16,
            "intermediate_size": 32,
            "head_dim": 16,
            "attention_bias": True,
            "use_qk_norm": True,
            "partial_rotary_factor": 1.0,
            "num_mtp_layers": 0,
        },
    ),
    "mixtral_windowed": Case("Mixtral", {"num_local_experts": 4, "intermediate_size": 24, "sliding_window": 5}),
    "glm4_moe_half_turned": Case(
        "Glm4Moe",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "moe_intermediate_size": 16,
            "intermediate_size": 32,
            "head_dim": 16,
            "num_mtp_layers": 0,
        },
    ),
    "gpt_oss": Case(
        "GptOss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 32,
            "head_dim": 16,
            "sliding_window": 5,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150.0,
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "deepseek_v3": Case(
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 32,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 32,
            "intermediate_size": 48,
            "first_k_dense_replace": 1,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150.0,
                "factor": 4.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "llama3": Case(
        "Llama",
        {
            "intermediate_size": 32,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 150.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "llama": Case("Llama", {"intermediate_size": 32, "attention_bias": True, "mlp_bias": True}),
    "llama_tied": Case("Llama", {"intermediate_size": 48, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3": Case("Qwen3", {"intermediate_size": 32, "head_dim": 16}),
    "gpt2": Case("GPT2", {"num_key_value_heads": LEFT_OUT}),
    "gpt2_untied": Case("GPT2", {"num_key_value_heads": LEFT_OUT, "n_inner": 32, "tie_word_embeddings": False}),
}


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A byte-level BPE of fewer ids than the vocabulary of the models."""
    return train_bpe(["the ship sleeps under the house and the dog sings slowly"] * 3, 300)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    """The name of each case."""
    return str(request.param)


@pytest.fixture
def model_of() -> Callable[..., Any]:
    """Makes the model of a case, with changed settings, always the same."""
    return lambda case, **changes: CASES[case].model(**changes)


Checkpoint = Callable[..., Path]


@pytest.fixture
def checkpoint_of(tmp_path: Path, tokenizer: Tokenizer) -> Checkpoint:
    """Writes the checkpoint of a case, with changed settings, into a new folder."""

    def write(case: str, *, max_shard_size: str = "5GB", **changes: Any) -> Path:
        folder = tmp_path / f"theirs-{case}"
        CASES[case].model(**changes).save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer.save(folder / "tokenizer.json")
        return folder

    return write


@pytest.fixture
def imported(tmp_path: Path) -> Callable[..., RunFolder]:
    """Imports a checkpoint into a run below the test's folder; settings are given as flags would, without dashes."""

    def read(folder: Path, settings: Mapping[str, str] | None = None, **options: Any) -> RunFolder:
        always = {"run.folder": str(tmp_path / "runs"), "training.device": "cpu", "training.precision": "fp32"}
        return import_checkpoint(folder, always | dict(settings or {}), **options)

    return read


@pytest.fixture
def run_of(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., RunFolder]:
    """Makes a run of a configuration: random weights that make the logits differ, saved as those of step 7."""

    def make(model: ModelConfig, name: str = "ours") -> RunFolder:
        config = Config(
            model=replace(model, vocab_size=VOCABULARY, max_seq=256),
            training=TrainingConfig(precision="fp32", device="cpu"),
            run=RunConfig(folder=str(tmp_path / "runs"), name=name),
        )
        run = RunFolder(tmp_path / "runs" / name)
        run.path.mkdir(parents=True)
        run.write_config(config)
        tokenizer.save(run.tokenizer_path)
        transformer = Transformer(config.model, seed=1)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for key, tensor in transformer.state_dict().items():
                if tensor.dim() > 1:
                    std = 1.0 if key == "embedding.weight" else 1.5 * tensor.shape[-1] ** -0.5
                    tensor.copy_(std * torch.randn(tensor.shape, generator=generator))
                elif not key.endswith("attention.output.bias"):
                    tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
            # Bytes that are no text by themselves are never the most likely: llama.cpp leaves them out of its answers.
            no_text = [index for index in range(VOCABULARY) if "\ufffd" in tokenizer.decode([index])]
            transformer.head.weight[no_text] = 0.0
        checkpoint.save(run.checkpoints_path, 7, transformer, None, {"tokens": 1234}, keep=1)
        return run

    return make
