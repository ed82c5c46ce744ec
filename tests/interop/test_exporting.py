"""A run becomes a folder that transformers reads: imported weights come out as they were, a run generates alike."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from moe import presets
from moe.config import ModelConfig
from moe.data.tokenizer import Tokenizer
from moe.errors import UserError
from moe.inference.generate import generate
from moe.inference.sampling import Sampling
from moe.interop.exporting import export_huggingface
from moe.interop.importing import Source
from moe.interop.shards import Shards
from moe.training import checkpoint
from moe.training.run_folder import RunFolder

Make = Callable[..., Any]

GREEDY = Sampling(temperature=0.0)


def tensors(folder: Path) -> dict[str, Tensor]:
    return dict(iter(Shards.open(folder)))


def model_config(preset: str | None = None, **settings: Any) -> ModelConfig:
    """Three layers of width 32 with four experts, and ``settings`` over that."""
    shape: dict[str, Any] = {
        "d_model": 32,
        "n_layers": 3,
        "attention": {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8},
        "experts": {"n_experts": 4, "d_ff": 24},
    }
    for key, value in settings.items():
        shape[key] = {**shape.get(key, {}), **value} if isinstance(value, dict) else value
    return presets.model_config(preset or "mixtral", **shape)


# -------------------------------------------------------------------------------------------------------- out as it was


def test_what_was_imported_comes_out_as_it_was(case: str, checkpoint_of: Make, imported: Make, tmp_path: Path) -> None:
    folder = checkpoint_of(case)

    family = export_huggingface(imported(folder), tmp_path / "out")

    before, after = tensors(folder), tensors(tmp_path / "out")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name
    theirs, ours = Source.open(folder), Source.open(tmp_path / "out")
    assert family is ours.family is theirs.family
    assert ours.model == theirs.model


def test_a_large_model_is_written_in_several_files(checkpoint_of: Make, imported: Make, tmp_path: Path) -> None:
    folder = checkpoint_of("qwen3_moe")
    run = imported(folder)

    export_huggingface(run, tmp_path / "out", shard_bytes=20_000)

    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert files[-1].name == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    assert len(files) > 3
    assert all(len(load_file(file)) == 1 or file.stat().st_size < 25_000 for file in files)
    assert tensors(tmp_path / "out").keys() == tensors(folder).keys()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


# ------------------------------------------------------------------------------------------ what was trained, generates

RUNS: Mapping[str, tuple[ModelConfig, str]] = {
    "the default": (model_config(), "mixtral"),
    "untied, wide heads": (model_config(tie_embeddings=False, attention={"head_dim": 16}), "mixtral"),
    "OLMoE": (model_config("olmoe", attention={"qk_norm": "full"}), "olmoe"),
    "Qwen3": (model_config("qwen3", attention={"qk_norm": "head"}), "qwen3_moe"),
    "dense layers": (
        model_config(n_layers=4, attention={"qk_norm": "head"}, experts={"every": 2}, feed_forward={"d_ff": 40}),
        "qwen3_moe",
    ),
    "Qwen2": (model_config("qwen2", attention={"bias": True}, shared={"d_ff": 40}), "qwen2_moe"),
    "one expert a token": (model_config("switch"), "qwen2_moe"),
    "raw probabilities": (model_config("olmoe", experts={"first_dense": 1}), "qwen2_moe"),
    "sigmoid": (model_config("loss_free"), "glm4_moe"),
    "DeepSeek-V3": (
        model_config(
            "deepseek_v3",
            experts={"n_experts": 8, "first_dense": 1},
            router={"n_groups": 4, "top_groups": 2, "top_k": 3},
        ),
        "glm4_moe",
    ),
    "dense twin": (model_config(dense_twin=True), "llama"),
    "dense twin, biased": (
        model_config(dense_twin=True, attention={"bias": True}, feed_forward={"bias": True}),
        "llama",
    ),
    "dense twin, normed": (model_config(dense_twin=True, attention={"qk_norm": "head"}), "qwen3"),
}


@pytest.mark.parametrize("name", RUNS)
def test_transformers_generates_what_the_run_does(
    name: str, run_of: Make, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Greedily, 64 tokens, token for token, from two prompts of different lengths."""
    config, architecture = RUNS[name]
    run: RunFolder = run_of(config)

    family = export_huggingface(run, tmp_path / "out")

    assert family.name == architecture
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", padding_side="left")
    texts = ["the ship sleeps under", "the dog"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    written = theirs.generate(
        **{key: batch[key] for key in ("input_ids", "attention_mask")}, max_new_tokens=64, do_sample=False
    )
    end = run.tokenizer().end_of_text
    prompts = [[end, *run.tokenizer().encode(text)] for text in texts]
    ours = generate(run.load_model(), prompts, 64, GREEDY, stop=end)
    for our_row, row in zip(ours, written[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
        assert row[: len(our_row)] == our_row
        assert len(our_row) == 64 or row[len(our_row)] == end
    assert len({token for row in ours for token in row}) > 10, "there is something to get wrong"


def test_experts_that_nothing_of_theirs_can_be_are_told(run_of: Make, tmp_path: Path) -> None:
    """Every architecture, and what stands in its way."""
    run = run_of(model_config("top_p", router={"threshold": 0.5}))

    with pytest.raises(UserError, match="ours: no architecture of transformers represents this run") as refusal:
        export_huggingface(run, tmp_path / "out")

    lines = str(refusal.value).splitlines()
    assert (
        "  mixtral: model.router.selection is top_p, and mixtral has top_k; "
        "model.router.threshold is 0.5, and mixtral has null; model.router.normalise is false, and mixtral has true"
    ) in lines
    assert "  llama: the model has mixtures in layers 0 to 2, and llama no mixtures" in lines
    assert not (tmp_path / "out").exists()


REFUSED: Mapping[str, tuple[ModelConfig, str]] = {
    "norm": (model_config(norm="layernorm"), "mixtral: model.norm is layernorm, and mixtral has rmsnorm"),
    "activation": (
        model_config(feed_forward={"activation": "gelu"}),
        "mixtral: model.feed_forward.activation is gelu, and mixtral has swiglu",
    ),
    "bias of the router": (
        model_config("gpt_oss"),
        "mixtral: model.router.bias is true, and mixtral has false",
    ),
    "special experts": (model_config("longcat"), "mixtral: model.special.copy is 8, and mixtral has 0"),
    "scale": (model_config(router={"scale": 2.0}), "mixtral: model.router.scale is 2.0, and mixtral has 1.0"),
    "capacity": (
        model_config(router={"capacity": {"factor": 1.0, "in_evaluation": True}}),
        "mixtral: model.router.capacity.factor is 1.0, and mixtral has null",
    ),
    "shared, not gated": (
        model_config("deepseek_moe"),
        "qwen2_moe: model.shared.gated is false, and qwen2_moe has true",
    ),
    "selection bias": (
        model_config(router={"selection_bias": "sign"}),
        r"mixtral: mixtral has no tensor for blocks.0.feed_forward.router.selection_bias \(and 2 more\)",
    ),
    "biases of experts": (
        model_config(feed_forward={"bias": True}),
        "mixtral: model.feed_forward.bias is true, and mixtral has false",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_option_that_has_no_place_there_is_named(what: str, run_of: Make, tmp_path: Path) -> None:
    config, line = REFUSED[what]

    with pytest.raises(UserError, match=f"  {line}"):
        export_huggingface(run_of(config), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_acts_in_training_alone_does_not_stand_in_the_way(run_of: Make, tmp_path: Path) -> None:
    """Noise, jitter, a capacity in training: a mixture with them computes what one without them does, afterwards."""
    run = run_of(
        model_config(
            router={"jitter": 0.1, "noise": "shazeer", "second_choice": 0.5, "capacity": {"factor": 1.0}}, dropout=0.1
        )
    )

    export_huggingface(run, tmp_path / "out")

    ids = torch.arange(40)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
        ours, _ = run.load_model()(ids)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


def test_a_bias_that_has_no_place_there_must_be_zeros(run_of: Make, tmp_path: Path) -> None:
    """Qwen2-MoE has biases on queries, keys and values, and none on the output; training moves ours away from zero."""
    run = run_of(model_config("qwen2", attention={"bias": True}, shared={"d_ff": 24}))
    model = run.load_model()
    with torch.no_grad():
        model.blocks[1].attention.output.bias[3] = 0.5
    checkpoint.save(run.checkpoints_path, 8, model, None, {"tokens": 0}, keep=1)

    with pytest.raises(
        UserError,
        match=r"qwen2_moe: qwen2_moe has no tensor for blocks.1.attention.output.bias, which is not all zeros",
    ):
        export_huggingface(run, tmp_path / "out")


# ------------------------------------------------------------------------------------------------------------ the files


def test_the_tokenizer_reads_a_text_as_the_run_does(run_of: Make, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """What spells a special token is text, and a text begins with the token that ends one."""
    export_huggingface(run_of(model_config()), tmp_path / "out")

    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the ship<|endoftext|>sings  Käse"
    assert theirs(text).input_ids == [tokenizer.end_of_text, *tokenizer.encode(text)]
    assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.eos_token_id == tokenizer.end_of_text
    assert isinstance(theirs, PreTrainedTokenizerFast)


def test_settings_are_in_the_words_of_both_versions(run_of: Make, tmp_path: Path) -> None:
    """transformers 5 calls some settings otherwise, and 4.57 would leave what it does not know at its defaults."""
    export_huggingface(
        run_of(model_config("qwen3", attention={"qk_norm": "head", "rope_theta": 5e5})), tmp_path / "out"
    )

    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["num_experts"] == written["num_local_experts"] == 4
    assert written["rope_theta"] == 5e5
    assert written["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e5}
    assert written["torch_dtype"] == written["dtype"] == "float32"
    # A token to pad with would be kept from being trained on.
    assert "pad_token_id" not in written
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["tokenizer_class"] == (
        "PreTrainedTokenizerFast"
    )


def test_half_the_size_in_bfloat16_but_for_a_selection_bias(run_of: Make, tmp_path: Path) -> None:
    run = run_of(model_config("loss_free"))

    export_huggingface(run, tmp_path / "out", dtype="bf16")

    written = tensors(tmp_path / "out")
    bias = "model.layers.0.mlp.gate.e_score_correction_bias"
    assert written[bias].dtype == torch.float32
    assert {tensor.dtype for name, tensor in written.items() if "correction_bias" not in name} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.state_dict()[bias], run.load_model().blocks[0].feed_forward.router.selection_bias)


def test_a_place_that_is_taken_is_not_touched(run_of: Make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    with pytest.raises(UserError, match="out: exists; remove it, or choose another place"):
        export_huggingface(run_of(model_config()), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_checkpoint_of_another_configuration_is_refused(run_of: Make, tmp_path: Path) -> None:
    run = run_of(model_config())
    other = run_of(model_config(experts={"d_ff": 40}), "other")
    run.write_config(other.config())

    with pytest.raises(UserError, match=r"experts.w_in is \[4, 48, 32\], and by .*config.yaml should be \[4, 80, 32\]"):
        export_huggingface(run, tmp_path / "out")


def test_a_damaged_checkpoint_is_not_exported(run_of: Make, tmp_path: Path) -> None:
    run = run_of(model_config())
    [path] = run.checkpoints_path.glob("*/model.safetensors")
    stored = load_file(path)
    stored["embedding.weight"][0, 0] += 1
    save_file(stored, path)

    with pytest.raises(UserError, match=r"every checkpoint here .* is damaged"):
        export_huggingface(run, tmp_path / "out")
