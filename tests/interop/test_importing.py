"""A checkpoint of transformers becomes a run that computes the same; whatever is not as it should be is named."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from moe.data.batches import Batches
from moe.data.tokenizer import Tokenizer
from moe.errors import UserError
from moe.interop.shards import INDEX, SINGLE
from moe.model.cache import KVCache
from moe.training import checkpoint
from moe.training.command import main
from moe.training.metrics import read_metrics
from moe.training.run_folder import RunFolder

Make = Callable[..., Any]


def tokens(rows: int = 3, length: int = 24) -> Tensor:
    return torch.randint(0, 320, (rows, length), generator=torch.Generator().manual_seed(2))


def padded(length: int = 24) -> Tensor:
    """False for padding: five places on the left of the first row, seven on the right of the second."""
    mask = torch.ones(3, length, dtype=torch.bool)
    mask[0, :5] = False
    mask[1, -7:] = False
    return mask


# --------------------------------------------------------------------------------------------------------- same numbers


def test_logits_are_theirs_with_padding_on_either_side(
    case: str, model_of: Make, checkpoint_of: Make, imported: Make
) -> None:
    ids, mask = tokens(), padded()

    ours, _ = imported(checkpoint_of(case)).load_model()(ids, mask)

    with torch.no_grad():
        # Without them GPT-2 there would count padding too.
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        theirs = model_of(case)(ids, attention_mask=mask.long(), position_ids=positions).logits
    assert theirs[mask].std() > 0.3, "there is something to get wrong"
    torch.testing.assert_close(ours[mask], theirs[mask], atol=1e-5, rtol=1e-5)


def test_decoding_from_the_cache_gives_their_logits(
    case: str, model_of: Make, checkpoint_of: Make, imported: Make
) -> None:
    """Twelve tokens at once, then four one by one; one of the prompts is shorter, and padded on the left."""
    ids, mask = tokens(rows=2, length=16), torch.ones(2, 16, dtype=torch.bool)
    mask[0, :3] = False
    model, ours = model_of(case), imported(checkpoint_of(case)).load_model()
    cache = KVCache(ours.config, 2, 16, torch.device("cpu"))
    past, start = None, 0

    for end in (12, 13, 14, 15, 16):
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, start:end]
        with torch.no_grad():
            our_logits, _ = ours(ids[:, start:end], mask[:, start:end], cache)
            output = model(
                ids[:, start:end],
                attention_mask=mask[:, :end].long(),
                position_ids=positions,
                past_key_values=past,
                use_cache=True,
            )
        torch.testing.assert_close(our_logits[:, -1], output.logits[:, -1], atol=1e-5, rtol=1e-5)
        past, start = output.past_key_values, end


def test_a_checkpoint_in_many_files_gives_the_same_run_as_in_one(checkpoint_of: Make, imported: Make) -> None:
    """Files of 20 kB, in which the experts of one layer do not stand together."""
    whole = imported(checkpoint_of("mixtral_oblong"))
    folder = checkpoint_of("mixtral_oblong", max_shard_size="20KB")
    (folder / SINGLE).unlink()
    assert len(list(folder.glob("*.safetensors"))) > 3

    sharded = imported(folder, {"run.name": "sharded"})

    one, many = (run.load_model().state_dict() for run in (whole, sharded))
    assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_without_loss(checkpoint_of: Make, imported: Make, dtype: torch.dtype) -> None:
    folder = checkpoint_of("qwen3")
    halves = {name: tensor.to(dtype) for name, tensor in load_file(folder / SINGLE).items()}
    save_file(halves, folder / SINGLE)

    model = imported(folder).load_model()

    assert model.head.weight.dtype == torch.float32
    assert torch.equal(model.head.weight, halves["lm_head.weight"].float())


def test_a_tied_head_that_is_stored_all_the_same_is_passed_over(checkpoint_of: Make, imported: Make) -> None:
    """As in the files of Qwen3-0.6B."""
    folder = checkpoint_of("llama_tied")
    stored = load_file(folder / SINGLE)
    save_file(stored | {"lm_head.weight": stored["model.embed_tokens.weight"].clone()}, folder / SINGLE)

    model = imported(folder).load_model()

    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.head.weight, stored["model.embed_tokens.weight"])


def test_a_tied_head_that_is_another_matrix_is_refused(checkpoint_of: Make, imported: Make) -> None:
    folder = checkpoint_of("llama_tied")
    stored = load_file(folder / SINGLE)
    save_file(stored | {"lm_head.weight": stored["model.embed_tokens.weight"] + 1}, folder / SINGLE)

    with pytest.raises(UserError, match=r"lm_head.weight is not model.embed_tokens.weight, .* tie_word_embeddings"):
        imported(folder)


def test_frequencies_that_old_files_hold_are_passed_over(checkpoint_of: Make, imported: Make) -> None:
    folder = checkpoint_of("llama")
    frequencies = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(3)}
    save_file(load_file(folder / SINGLE) | frequencies, folder / SINGLE)

    imported(folder)


# --------------------------------------------------------------------------------------------------------- a run folder


def test_the_run_has_what_a_run_has(checkpoint_of: Make, imported: Make, tokenizer: Tokenizer) -> None:
    folder = checkpoint_of("olmoe")

    run = imported(folder, {"run.name": "mine", "training.optimizer.lr": "1e-4", "model.balance.load_balance": "0.02"})

    config = run.config()
    assert config.run.name == "mine"
    assert config.training.optimizer.lr == 1e-4
    assert config.model.balance.load_balance == 0.02
    assert config.model.vocab_size == 320
    assert run.tokenizer().encode("the ship") == tokenizer.encode("the ship")
    assert json.loads((run.path / "source.json").read_text())["family"] == "olmoe"
    assert sorted(path.name for path in run.path.parent.iterdir()) == ["mine"], "nothing is left beside it"


def test_weights_can_be_kept_in_bfloat16(checkpoint_of: Make, imported: Make) -> None:
    """All but what decides where a token goes, and gains."""
    run = imported(checkpoint_of("qwen3_moe"), {"training.weight_dtype": "bf16", "training.precision": "bf16"})

    stored = load_file(checkpoint.newest(run.checkpoints_path, print).folder / checkpoint.MODEL)
    assert stored["blocks.0.feed_forward.experts.w_in"].dtype == torch.bfloat16
    assert stored["blocks.0.feed_forward.router.weight"].dtype == torch.float32
    assert stored["norm.weight"].dtype == torch.float32


def test_settings_that_decide_what_is_computed_are_the_checkpoints(checkpoint_of: Make, imported: Make) -> None:
    with pytest.raises(
        UserError, match=r"it would be another model: model.router.top_k is 1, and the checkpoint has 2"
    ):
        imported(checkpoint_of("olmoe"), {"model.router.top_k": "1"})


def test_the_vocabulary_must_hold_the_tokenizer(checkpoint_of: Make, imported: Make, tokenizer: Tokenizer) -> None:
    folder = checkpoint_of("llama", vocab_size=290)

    with pytest.raises(UserError, match=rf"vocab_size is 290, but tokenizer.json has {tokenizer.size} ids"):
        imported(folder)


def test_a_run_that_exists_is_not_touched(checkpoint_of: Make, imported: Make) -> None:
    folder = checkpoint_of("llama")
    run: RunFolder = imported(folder)
    before = run.config_path.stat().st_mtime_ns

    with pytest.raises(UserError, match="theirs-llama: exists"):
        imported(folder)
    assert run.config_path.stat().st_mtime_ns == before


def test_with_a_corpus_training_goes_on_from_the_weights(
    checkpoint_of: Make, imported: Make, model_of: Make, tmp_path: Path
) -> None:
    """Its tokens are those of the model's own tokenizer, and the first loss is that of the weights as they came."""
    (tmp_path / "text").mkdir()
    for number in range(60):
        parts = ["the ship sleeps", "the dog sings", "under the house", "slowly"]
        text = " ".join(parts[number % 4 :] + parts[: number % 4])
        (tmp_path / "text" / f"{number}.txt").write_text(f"{text} {number}")
    (tmp_path / "corpus.yaml").write_text("- {domain: prose, kind: files, include: text/*.txt}\n")
    settings = {
        "data.corpus": str(tmp_path / "corpus.yaml"),
        "data.cache": str(tmp_path / "cache"),
        "data.sequence_length": "16",
        "data.validation_bytes": "200",
        "training.steps": "2",
        "training.batch_size": "4",
    }

    run = imported(checkpoint_of("mixtral"), settings, with_text=True)

    moved = RunFolder(run.path.rename(tmp_path / "moved"))
    corpus = moved.corpus(moved.config().data, lambda line: pytest.fail(line))
    batch = Batches(corpus.train, corpus.shares, sequence_length=16, batch_size=4, seed=0).rows(0, 0, 4)
    with torch.no_grad():
        logits = model_of("mixtral")(batch.tokens).logits
    assert main(["--resume", str(moved.path)], tmp_path / "none.yaml") == 0
    first = next(row for row in read_metrics(moved.metrics_path) if row["kind"] == "train")
    assert first["step"] == 1
    assert first["lm_loss"] == pytest.approx(
        cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).item(), abs=1e-5
    )
    assert checkpoint.newest(moved.checkpoints_path, print).step == 2


# ------------------------------------------------------------------------------------------------- refused: config.json

REFUSED: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    "family": (
        "llama",
        {"model_type": "gpt_neox"},
        r"model_type is 'gpt_neox', which is none of those known here: mix",
    ),
    "no family": ("llama", {"model_type": None}, r"model_type is None"),
    "task": (
        "llama",
        {"architectures": ["LlamaForSequenceClassification"]},
        r"architectures is \['LlamaForSequenceClassification'\], and must be LlamaForCausalLM",
    ),
    "code": ("llama", {"auto_map": {"AutoModel": "evil.Model"}}, "auto_map names code of its own, which is not run"),
    "quantised": ("llama", {"quantization_config": {"bits": 4}}, "quantization_config says that the weights are"),
    "missing": ("llama", {"hidden_size": None}, "hidden_size is not given"),
    "wrong type": ("llama", {"hidden_size": "32"}, "hidden_size is '32', and must be a whole number"),
    "true as a number": ("llama", {"num_hidden_layers": True}, "num_hidden_layers is True, and must be a whole number"),
    "not finite": ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, and must be a number"),
    "activation": ("llama", {"hidden_act": "gelu"}, "hidden_act is gelu, and the gate of our experts is silu"),
    "scaled rotation": (
        "llama",
        {"rope_parameters": {"rope_type": "longrope", "factor": 4.0}},
        "rope_parameters.rope_type is longrope, a scaling that our model has not",
    ),
    "scaled rotation, as in transformers 4": (
        "llama",
        {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_scaling.rope_type is dynamic",
    ),
    "scaled rotation of no context": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        "rope_parameters.original_max_position_embeddings is not given, and yarn needs it",
    ),
    "a pattern of windows": (
        "gpt_oss",
        {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
        "layer_types is",
    ),
    "MXFP4": (
        "gpt_oss",
        {"quantization_config": {"quant_method": "mxfp4"}},
        "quantization_config says that the weights are quantised",
    ),
    "windows of Qwen": ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window is true"),
    "kinds of layers": (
        "qwen3",
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "layer_types has sliding_attention, and our model has full attention alone",
    ),
    "width of a head": (
        "olmoe",
        {"head_dim": 16},
        "head_dim is 16, and must be hidden_size over num_attention_heads, 8",
    ),
    "no mixture": ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}, "mlp_only_layers leaves no layer a mixture"),
    "pattern of layers": (
        "qwen3_moe",
        {"mlp_only_layers": [1]},
        r"mlp_only_layers is \[1\], and our model has dense layers at the start",
    ),
    "two answers": ("olmoe", {"num_local_experts": 8}, "num_local_experts is 8, but num_experts is 4"),
    "one expert, normalised": ("mixtral", {"num_experts_per_tok": 1}, "router.normalise is true with top_k 1"),
    "tokens ahead": ("glm4_moe", {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers is 1, and our model pred"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_our_model_cannot_be_is_refused_by_its_key(
    what: str, checkpoint_of: Make, imported: Make, tmp_path: Path
) -> None:
    case, changes, message = REFUSED[what]
    folder = checkpoint_of(case)
    settings = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(settings))

    with pytest.raises(UserError, match=rf"theirs-{case}.config.json: {message}"):
        imported(folder)
    assert not (tmp_path / "runs").exists(), "nothing is written"


def test_a_key_that_decides_nothing_is_told(checkpoint_of: Make, imported: Make) -> None:
    folder, said = checkpoint_of("llama"), list[str]()
    settings = json.loads((folder / "config.json").read_text()) | {"mood": "good"}
    (folder / "config.json").write_text(json.dumps(settings))

    imported(folder, say=said.append)

    assert said[0] == f"{folder}/config.json: mood is not read: models of the family llama do not depend on it"
    assert len(said) == 2, "and nothing else of what transformers writes is unknown"


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"'])
def test_a_config_that_is_none(checkpoint_of: Make, imported: Make, text: str) -> None:
    folder = checkpoint_of("llama")
    (folder / "config.json").write_text(text)

    with pytest.raises(UserError, match=r"config.json: (cannot be read|must hold settings)"):
        imported(folder)


def test_a_folder_that_is_no_model(tmp_path: Path, imported: Make) -> None:
    with pytest.raises(UserError, match=r"nowhere: is no folder of a transformers model: it has no config.json"):
        imported(tmp_path / "nowhere")


def test_without_a_tokenizer_nothing_could_be_read(checkpoint_of: Make, imported: Make) -> None:
    folder = checkpoint_of("llama")
    (folder / "tokenizer.json").unlink()

    with pytest.raises(UserError, match=r"has no tokenizer.json, without which .*save_pretrained"):
        imported(folder)


# ----------------------------------------------------------------------------------------------------- refused: tensors


def altered(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    stored = load_file(folder / SINGLE)
    change(stored)
    save_file(stored, folder / SINGLE)
    return folder


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w2.weight"

ALTERED: Mapping[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (
        lambda stored: stored.pop(EXPERT),
        rf"theirs-mixtral_oblong: has no tensor {EXPERT}, which a mixtral model has",
    ),
    "extra": (
        lambda stored: stored.update({"model.layers.7.x": torch.ones(1)}),
        "theirs-mixtral_oblong: has a tensor model.layers.7.x, which a mixtral model has not",
    ),
    "transposed": (
        lambda stored: stored.update({EXPERT: stored[EXPERT].T.contiguous()}),
        rf"{SINGLE}: {EXPERT} is \[24, 32\], and by config.json should be \[32, 24\]",
    ),
    "quantised": (
        lambda stored: stored.update({EXPERT: stored[EXPERT].to(torch.int8)}),
        rf"{SINGLE}: {EXPERT} is stored as I8; only F32, BF16, F16 are weights",
    ),
    "several": (
        lambda stored: [stored.pop(EXPERT.replace("w2", name)) for name in ("w1", "w3")],
        r"experts.2.w1.weight \(and 1 more\)",
    ),
}


@pytest.mark.parametrize("what", ALTERED)
def test_a_tensor_that_is_not_as_it_should_be_is_named(
    what: str, checkpoint_of: Make, imported: Make, tmp_path: Path
) -> None:
    change, message = ALTERED[what]
    folder = altered(checkpoint_of("mixtral_oblong"), change)

    with pytest.raises(UserError, match=message):
        imported(folder)
    assert not (tmp_path / "runs").exists(), "nothing is written"


def test_pickles_are_not_opened(checkpoint_of: Make, imported: Make) -> None:
    folder = checkpoint_of("llama")
    (folder / SINGLE).rename(folder / "pytorch_model.bin")

    with pytest.raises(UserError, match="holds its weights as pickles, which can run code and are not opened"):
        imported(folder)


def test_a_full_disk_is_told_before_a_tensor_is_read(
    checkpoint_of: Make, imported: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Writing to a file in memory that the disk has no room for would end the process."""

    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)

    with pytest.raises(UserError, match=r"No space left on device; choose another --run.folder"):
        imported(checkpoint_of("llama"))
    assert not list((tmp_path / "runs").iterdir())


def test_an_import_that_fails_on_the_way_leaves_nothing(checkpoint_of: Make, imported: Make, tmp_path: Path) -> None:
    """The second file is cut off behind its header, which only reading its tensors shows."""
    folder = checkpoint_of("llama", max_shard_size="20KB")
    last = sorted(folder.glob("model-*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-100])

    with pytest.raises(UserError, match=rf"{last.name}: cannot be read as safetensors .*download it again"):
        imported(folder)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
    assert (folder / INDEX).exists()
