"""Records of models of transformers (5.23): our own forward of the same weights, and what their routers really did."""

import json
import sys
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from torch import Tensor

from moe.config import AttentionConfig, ExpertsConfig, ModelConfig, RouterConfig
from moe.data.prepare import HeldOut, PreparedCorpus
from moe.data.tokenizer import train_bpe
from moe.errors import UserError
from moe.model.transformer import Transformer
from moe.study.imported import FAMILIES, REFUSED, import_record, softmax_then_top_k, top_k_then_softmax
from moe.study.record import Record
from moe.study.recording import record_validation
from moe.study.storage import read_record

LAYERS, WIDTH, HEADS, KV_HEADS, EXPERTS, D_FF, VOCABULARY = 2, 32, 4, 2, 6, 24, 64
LENGTH = 8

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": D_FF,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
LOCAL = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
PLAIN = {"num_experts": EXPERTS, "num_experts_per_tok": 3}
NARROW = {"moe_intermediate_size": D_FF}
SHARED = {"shared_expert_intermediate_size": D_FF}
LINEAR = {f"linear_{name}": 2 for name in ("num_key_heads", "num_value_heads")}

SETTINGS: dict[str, dict[str, Any]] = {
    "mixtral": LOCAL,
    "minimax": LOCAL | {"head_dim": 8, "layer_types": ["full_attention", "linear_attention"], "block_size": 16},
    "olmoe": PLAIN | {"rms_norm_eps": 1e-6},
    "flex_olmo": PLAIN | {"norm_topk_prob": True},
    "qwen2_moe": PLAIN | NARROW | SHARED | {"mlp_only_layers": [0]},
    "qwen3_moe": PLAIN | NARROW | {"head_dim": 8, "norm_topk_prob": True},
    "qwen3_next": PLAIN
    | NARROW
    | SHARED
    | LINEAR
    | {"head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    | {"layer_types": ["full_attention", "linear_attention"]},
    "jamba": PLAIN
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0},
    "gpt_oss": LOCAL | {"head_dim": 8},
    "granitemoe": LOCAL | {"logits_scaling": 4.0},
    "granitemoeshared": LOCAL | {"shared_intermediate_size": D_FF, "logits_scaling": 2.0},
}


def their_model(family: str, **changes: Any) -> Any:
    """A tiny model of theirs whose weights are wide enough that tokens differ."""
    config = transformers.AutoConfig.for_model(family, **COMMON | SETTINGS[family] | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25, generator=generator)
            else:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def documents_of(lengths: Mapping[str, list[int]], seed: int = 0) -> dict[str, list[list[int]]]:
    generator = np.random.default_rng(seed)
    return {
        domain: [generator.integers(1, VOCABULARY, length).tolist() for length in many]
        for domain, many in lengths.items()
    }


def imported(model: Any, documents: Mapping[str, Any], folder: Path, **options: Any) -> Record:
    model.save_pretrained(folder / "model")
    import_record(folder / "model", documents, folder / "theirs", sequence_length=LENGTH, **options)
    return read_record(folder / "theirs")


# ----------------------------------------------------------------------------------------- our forward of their weights


def our_model(theirs: Any, *, qk_norm: str, normalise: bool) -> Transformer:
    """Our transformer with the weights of Mixtral or OLMoE."""
    config = theirs.config
    ours = Transformer(
        ModelConfig(
            vocab_size=VOCABULARY,
            n_layers=LAYERS,
            d_model=WIDTH,
            max_seq=32,
            norm_eps=config.rms_norm_eps,
            tie_embeddings=False,
            attention=AttentionConfig(
                n_heads=HEADS,
                n_kv_heads=KV_HEADS,
                head_dim=WIDTH // HEADS,
                qk_norm=qk_norm,
                rope_theta=config.rope_parameters["rope_theta"],
            ),
            experts=ExpertsConfig(n_experts=EXPERTS, d_ff=D_FF, backend="reference"),
            router=RouterConfig(top_k=config.num_experts_per_tok, normalise=normalise),
        )
    )
    names = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    for block in range(LAYERS):
        mine, other = f"blocks.{block}", f"model.layers.{block}"
        for part, their_part in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
            names[f"{mine}.attention.{part}"] = f"{other}.self_attn.{their_part}_proj"
        if qk_norm == "full":
            names[f"{mine}.attention.query_norm"] = f"{other}.self_attn.q_norm"
            names[f"{mine}.attention.key_norm"] = f"{other}.self_attn.k_norm"
        names[f"{mine}.attention_norm"] = f"{other}.input_layernorm"
        names[f"{mine}.feed_forward_norm"] = f"{other}.post_attention_layernorm"
        names[f"{mine}.feed_forward.router"] = f"{other}.mlp.gate"
    state = theirs.state_dict()
    table = {f"{mine}.weight": state[f"{other}.weight"] for mine, other in names.items()}
    for block in range(LAYERS):
        mine, other = f"blocks.{block}.feed_forward.experts", f"model.layers.{block}.mlp.experts"
        table[f"{mine}.w_in"], table[f"{mine}.w_out"] = state[f"{other}.gate_up_proj"], state[f"{other}.down_proj"]
    assert len(table) == len(state), "every tensor of theirs has its place"
    ours.load_state_dict(table)
    return ours


@pytest.mark.parametrize(
    ("family", "qk_norm", "normalise"), [("olmoe", "full", False), ("mixtral", "none", True)], ids=["olmoe", "mixtral"]
)
def test_an_imported_record_is_that_of_our_own_forward_of_the_same_weights(
    family: str, qk_norm: str, normalise: bool, tmp_path: Path
) -> None:
    theirs = their_model(family)
    # Three windows and one token, so that no window is moved back here or short there.
    documents = documents_of({"prose": [3 * LENGTH + 1], "code": [2 * LENGTH + 1]})
    corpus = PreparedCorpus(
        folder=Path(),
        shares={"prose": Fraction(1, 2), "code": Fraction(1, 2)},
        tokenizer=train_bpe(["a"], 260),  # its end of text is 0, which no document has
        train={},
        validation={
            domain: HeldOut(names=("text",), documents=(b"text",), stream=np.array(only[0], np.uint16))
            for domain, only in documents.items()
        },
        manifest={},
    )

    record_validation(
        our_model(theirs, qk_norm=qk_norm, normalise=normalise), corpus, tmp_path / "ours", sequence_length=LENGTH
    )
    from_theirs, from_ours = imported(theirs, documents, tmp_path), read_record(tmp_path / "ours")

    assert from_ours.n_tokens == 5 * LENGTH
    for name in ("token_id", "target_id", "predicted_id", "position", "sequence", "domain"):
        np.testing.assert_array_equal(getattr(from_theirs, name), getattr(from_ours, name), name)
    np.testing.assert_allclose(from_theirs.loss, from_ours.loss, rtol=1e-5, atol=1e-5)
    assert from_theirs.blocks == from_ours.blocks == ("0", "1")
    for mine, other in zip(from_ours.layers, from_theirs.layers, strict=True):
        np.testing.assert_array_equal(mine.selected, other.selected)
        np.testing.assert_allclose(mine.weights, other.weights, rtol=1e-5, atol=1e-5)
        # A float16 below 1 is within 2.4e-4 of what it rounds.
        np.testing.assert_allclose(mine.scores, other.scores, rtol=0, atol=5e-4)
        assert len(np.unique(mine.selected)) == EXPERTS, "every expert is chosen by some token"
    assert from_theirs.domains == ("prose", "code")


# ----------------------------------------------------------------------------------------- what their routers handed on


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_record_says_what_the_experts_were_given(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Ids and weights as the module ``experts`` got them, block by block, to the bit."""
    # A document of 11 tokens is a sequence of 8 and one of 2; one of 1 has nothing to predict.
    documents = documents_of({"prose": [11, 1, LENGTH + 1], "code": [5]})

    found = imported(their_model(family).to(dtype), documents, tmp_path)

    # Loaded again, because .to(bfloat16) also rounds the rotary frequencies.
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    given: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            block = int(name.split("layers.")[1].split(".")[0])
            module.register_forward_pre_hook(
                lambda _, arguments, block=block: given.setdefault(block, []).append(arguments[1:3])
            )
    losses, predicted = [], []
    sequences = [documents["prose"][0][:9], documents["prose"][0][8:], documents["prose"][2], documents["code"][0]]
    for ids in map(torch.tensor, sequences):
        with torch.no_grad():
            logits = model(ids[None, :-1], use_cache=False).logits[0].float()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none"))
        predicted.append(logits.argmax(-1))
    exact = dtype == torch.float32
    np.testing.assert_allclose(found.loss, torch.cat(losses), rtol=0, atol=1e-5 if exact else 0.05)
    if exact:
        np.testing.assert_array_equal(found.predicted_id, torch.cat(predicted))
    assert found.blocks == tuple(str(block) for block in sorted(given))
    assert found.sequence.tolist() == [0] * 8 + [1] * 2 + [2] * 8 + [3] * 4
    assert found.position.tolist() == [*range(8), *range(2), *range(8), *range(4)]
    for layer in found.layers:
        selected = torch.cat([ids for ids, _ in given[layer.block]])
        weights = torch.cat([weights for _, weights in given[layer.block]]).float()
        np.testing.assert_array_equal(layer.selected, selected)
        np.testing.assert_array_equal(layer.weights, weights)
        np.testing.assert_allclose(layer.scores.astype(np.float32).sum(1), 1, atol=5e-3)
        assert not layer.dropped.any()
    assert found.source == str(tmp_path / "model")


def test_dense_blocks_are_counted(tmp_path: Path) -> None:
    found = imported(their_model("qwen2_moe"), documents_of({"prose": [9]}), tmp_path)

    assert found.blocks == ("1",)


def test_the_two_rules_on_paper() -> None:
    """e^0 : e^ln2 : e^ln5 = 1 : 2 : 5, in all 8."""
    logits = torch.tensor([[1.0, 5.0, 2.0]]).log()

    raw = softmax_then_top_k(logits, 2, normalise=False)
    shares = softmax_then_top_k(logits, 2, normalise=True)
    chosen = top_k_then_softmax(logits, 2)

    for decision in (raw, shares, chosen):
        torch.testing.assert_close(decision.scores, torch.tensor([[1 / 8, 5 / 8, 2 / 8]]))
        assert decision.selected.tolist() == [[1, 2]]
    torch.testing.assert_close(raw.weights, torch.tensor([[5 / 8, 2 / 8]]))
    torch.testing.assert_close(shares.weights, torch.tensor([[5 / 7, 2 / 7]]))
    torch.testing.assert_close(chosen.weights, torch.tensor([[5 / 7, 2 / 7]]))


# ----------------------------------------------------------------------------------------------------------------- text


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 40 words and letters, as a folder of theirs has it, that begins a text with <s>."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<unk>": 0, "<s>": 1, "▁the": 2, "▁ship": 3, "sails": 4}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>").save_pretrained(
        folder
    )


def test_text_is_encoded_by_the_folders_tokenizer_as_the_model_expects_it(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "model")

    found = imported(their_model("mixtral"), {"sea": ["the ship the ship"]}, tmp_path, scores=False)

    assert found.token_id.tolist() == [1, 2, 3, 2]
    assert found.target_id.tolist() == [2, 3, 2, 3]
    assert [found.text_of(token) for token in (1, 2, 3, 4, 5, 63)] == ["<s>", " the", " ship", "sails", "<5>", "<63>"]
    assert found.layers[0].scores is None


def test_ids_need_no_tokenizer_and_text_does(tmp_path: Path) -> None:
    found = imported(their_model("mixtral"), {"prose": [[3, 4]]}, tmp_path)

    assert found.vocabulary is None
    with pytest.raises(UserError, match="has no tokenizer to encode text with: give token ids"):
        import_record(tmp_path / "model", {"prose": ["a text"]}, tmp_path / "again", sequence_length=LENGTH)


# ----------------------------------------------------------------------------------------------------------- refusals


def refused(checkpoint: Path, out: Path, documents: Mapping[str, Any] | None = None, length: int = LENGTH) -> str:
    with pytest.raises(UserError) as caught:
        import_record(
            checkpoint, {"prose": [[1, 2, 3]]} if documents is None else documents, out, sequence_length=length
        )
    assert not out.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    their_model("mixtral").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", [*REFUSED, "llama4_text", "gpt2"])
def test_a_family_whose_choice_is_not_in_its_logits_is_refused_by_name(family: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))

    message = refused(tmp_path, tmp_path / "out")

    assert f"the family {family} {REFUSED.get(family, 'is not one whose rule is known here')}" in message


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    assert "has no config.json" in refused(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text("{")
    assert "transformers cannot load it" in refused(tmp_path, tmp_path / "out")


def test_code_in_the_folder_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))

    assert "transformers cannot load it" in refused(tmp_path, tmp_path / "out")


def test_a_pickle_is_not_loaded(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    torch.save(their_model("mixtral").state_dict(), tmp_path / "pytorch_model.bin")

    assert "transformers cannot load it" in refused(tmp_path, tmp_path / "out")


def test_weights_that_are_missing_are_not_made_up(checkpoint: Path, tmp_path: Path) -> None:
    state = their_model("mixtral").state_dict()
    del state["model.layers.1.mlp.gate.weight"]
    their_model("mixtral").save_pretrained(tmp_path / "model", state_dict=state)

    message = refused(tmp_path / "model", tmp_path / "out")

    assert "1 tensors of the model are not in its files, as model.layers.1.mlp.gate.weight" in message


def test_what_cannot_be_recorded_is_said_before_anything_is_loaded(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    assert "takes 1 to 32" in refused(checkpoint, out, length=33)
    assert "no document of two tokens or more" in refused(checkpoint, out, {"prose": [[1]], "code": []})
    assert "domain code: has token ids outside the model's 0 to 63" in refused(
        checkpoint, out, {"prose": [[1, 2]], "code": [[1, 64]]}
    )


def test_an_existing_folder_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists; remove it"):
        import_record(checkpoint, {"prose": [[1, 2]]}, tmp_path, sequence_length=LENGTH)


def test_without_transformers_one_line_says_how_to_get_it(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)

    assert "pip install transformers" in refused(checkpoint, tmp_path / "out")
