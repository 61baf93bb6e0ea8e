"""Native initialisation against transformers' own indexer, its fp8 arithmetic and hand-written files."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from data_gen.backbones.deepseek_v4_hooks import csa_layers
from data_gen.core.errors import InputError
from data_gen.core.rope import Rope
from indexer_train.config import IndexerConfig, TrainConfig
from indexer_train.formats.native import dequantise, initialise, read_native
from indexer_train.training.trainer import train

HIDDEN, RANK, HEADS, WIDTH = 48, 20, 4, 32
CSA = [1, 3]
"""Backbone layers of the CSA ordinals 0 and 1."""
ROPE = Rope(dims=16, theta=160000, positions=4096, factor=16)


@pytest.fixture(scope="module")
def model():
    kinds = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"] * 2
    torch.manual_seed(0)
    config = DeepseekV4Config(
        vocab_size=64, hidden_size=HIDDEN, moe_intermediate_size=16, num_hidden_layers=4, num_attention_heads=4,
        head_dim=32, q_lora_rank=RANK, num_experts_per_tok=2, n_routed_experts=4, o_groups=2, o_lora_rank=16,
        index_n_heads=HEADS, index_head_dim=WIDTH, index_topk=4, sliding_window=16, initializer_range=0.3,
        layer_types=[kinds[0], kinds[1], kinds[2], kinds[1]], num_hash_layers=1, max_position_embeddings=4096,
        qk_rope_head_dim=16, rope_parameters={"rope_type": "yarn", "factor": 16.0, "beta_fast": 32, "beta_slow": 1,
                                              "original_max_position_embeddings": 65536},
    )  # fmt: skip
    return DeepseekV4ForCausalLM(config).to(torch.bfloat16).eval()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture
def small(make_indexer):
    def make(layers=(0, 1), heads=HEADS, rank=RANK, **spec):
        sizes = {"hidden": HIDDEN, "key_width": WIDTH, "rope": ROPE} | spec
        return make_indexer(layers=layers, shape={"heads": heads, "rank": rank}, **sizes)

    return make


@pytest.fixture
def small_checkpoint(tmp_path):
    """A folder with one quantised CSA layer's tensors, some of them changed."""

    def make(change):
        tensors = {"wq_a.weight": torch.ones(RANK, HIDDEN), "q_norm.weight": torch.ones(RANK),
                   "indexer.wq_b.weight": torch.ones(HEADS * WIDTH, RANK),
                   "indexer.weights_proj.weight": torch.ones(HEADS, HIDDEN)}  # fmt: skip
        tensors = {f"layers.1.attn.{name}": value for name, value in (tensors | change).items()}
        save_file(tensors, tmp_path / "model.safetensors")
        config = {"model_type": "deepseek_v4", "quantization_config": {"weight_block_size": [16, 32]}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return make


def parts(model, ordinal):
    """The four weights of a CSA layer, from the loaded module."""
    attention = model.model.layers[CSA[ordinal]].self_attn
    indexer = attention.compressor.indexer
    return {
        "wq_a": attention.q_a_proj.weight.float(),
        "q_norm": attention.q_a_norm.weight.float(),
        "wq_b": indexer.q_b_proj.weight.float(),
        "weights_proj": indexer.scorer.weights_proj.weight.float(),
    }


def same(ours, expected):
    for name, value in expected.items():
        assert torch.equal(getattr(ours, name), value), name


def test_a_sharded_checkpoint_gives_the_native_scores(pocket, make_indexer, tmp_path):
    """Of trained weights, on what they read in a document."""
    model, info = pocket.backbone.model, pocket.backbone.info
    model.save_pretrained(tmp_path, max_shard_size="2MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    sizes = {"hidden": info.hidden, "key_width": info.key_width, "rope": info.rope}
    key = "mean_pre_rope"  # transformers' keys: rotated, neither Hadamard nor fp8
    indexer = make_indexer(layers=info.full_layers, shape={"heads": 16, "rank": 96}, key=key, **sizes)
    initialise(indexer, tmp_path)
    ids, hidden, keys, scores = pocket.tokens(pocket.documents("multi_key", 300, 1)[0]), [], [], []
    hooks = []
    for layer in csa_layers(model):
        block = model.get_decoder().layers[layer]
        hooks.append(block.input_layernorm.register_forward_hook(lambda _, __, output: hidden.append(output[0])))

        def scored(_, inputs, output):
            keys.append(inputs[1][0])
            scores.append(output[0])

        hooks.append(block.self_attn.compressor.indexer.scorer.register_forward_hook(scored))
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    features = {"input_features": torch.stack(hidden, dim=1), "positions": torch.arange(len(ids))}
    queries = indexer.query_encoder(features)["sentence_embedding"]
    logits = indexer.layer_logits(queries, torch.stack(keys, dim=1).flatten(1)).detach()
    theirs = torch.stack(scores)
    assert logits.shape == theirs.shape == (3, 300, 75) and float(theirs.std()) > 0.5
    torch.testing.assert_close(logits, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-4)


def test_only_the_needed_shards_are_opened(model, checkpoint, tmp_path):
    weight_map = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    needed = re.compile(r"layers\.3\.attn\.(wq_a|q_norm|indexer\.wq_b|indexer\.weights_proj)\.weight")
    files = {file for name, file in weight_map.items() if needed.search(name)}
    for file in {*files, "model.safetensors.index.json"}:
        (tmp_path / file).write_bytes((checkpoint / file).read_bytes())
    assert len(list(tmp_path.iterdir())) < len(list(checkpoint.iterdir())) - 4
    same(read_native(tmp_path, [1])[1], parts(model, 1))
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        read_native(tmp_path, [0])


@pytest.mark.parametrize("prefix", ["", "model."])
def test_names_of_transformers_modules_and_one_file(model, tmp_path, prefix):
    names = {"wq_a": "self_attn.q_a_proj", "q_norm": "self_attn.q_a_norm",
             "wq_b": "self_attn.compressor.indexer.q_b_proj",
             "weights_proj": "self_attn.compressor.indexer.scorer.weights_proj"}  # fmt: skip
    tensors = {f"{prefix}layers.{layer}.{names[part]}.weight": value.bfloat16().contiguous()
               for ordinal, layer in enumerate(CSA) for part, value in parts(model, ordinal).items()}  # fmt: skip
    save_file(tensors | {f"{prefix}layers.0.self_attn.q_a_proj.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    for ordinal, found in read_native(tmp_path, [0, 1]).items():
        same(found, parts(model, ordinal))


def quantised(weight, block, kind):
    """(fp8 weight, scales, the exact product) by blocks, written out."""
    rows, columns = (-(-size // step) for size, step in zip(weight.shape, block, strict=True))
    values, exact = torch.zeros_like(weight), torch.zeros_like(weight, dtype=torch.float64)
    scales = torch.zeros(rows, columns)
    for r in range(rows):
        for c in range(columns):
            place = (slice(r * block[0], (r + 1) * block[0]), slice(c * block[1], (c + 1) * block[1]))
            scale = weight[place].abs().max() / 448
            scales[r, c] = scale if kind == torch.float32 else 2.0 ** torch.ceil(torch.log2(scale))
            values[place] = (weight[place] / scales[r, c]).to(torch.float8_e4m3fn).float()
            exact[place] = values[place].double() * scales[r, c].double()
    stored = scales if kind == torch.float32 else scales.to(torch.float8_e8m0fnu)
    return values.to(torch.float8_e4m3fn), stored.view(torch.uint8) if kind == torch.uint8 else stored, exact.float()


@pytest.mark.parametrize("kind", [torch.float32, torch.float8_e8m0fnu, torch.uint8], ids=["fp32", "ue8m0", "bytes"])
@pytest.mark.parametrize("suffix", ["scale", "weight_scale_inv"])
def test_fp8_with_block_scales(model, tmp_path, kind, suffix):
    names = {"wq_a": "attn.wq_a", "q_norm": "attn.q_norm", "wq_b": "attn.indexer.wq_b",
             "weights_proj": "attn.indexer.weights_proj"}  # fmt: skip
    tensors, expected = {}, {}
    for part, value in parts(model, 0).items():
        name = f"layers.1.{names[part]}"
        if part in ("wq_a", "wq_b"):
            tensors[f"{name}.weight"], tensors[f"{name}.{suffix}"], expected[part] = quantised(value, (16, 32), kind)
        else:  # norms and head weights ship in bf16
            tensors[f"{name}.weight"], expected[part] = value.bfloat16(), value
    index = {name: f"model-0000{1 + place % 2}-of-00002.safetensors" for place, name in enumerate(sorted(tensors))}
    for file in set(index.values()):
        save_file({name: tensors[name].contiguous() for name in tensors if index[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(InputError, match="weight_block_size"):
        read_native(tmp_path, [0])
    config = {"model_type": "deepseek_v4", "quantization_config": {"weight_block_size": [16, 32]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    same(read_native(tmp_path, [0])[0], expected)
    config["quantization_config"]["weight_block_size"] = [8, 32]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="for blocks of"):
        read_native(tmp_path, [0])


def test_fp8_arithmetic_is_transformers_own():
    weight, scale, _ = quantised(
        torch.randn(64, 96, generator=torch.Generator().manual_seed(4)), (32, 32), torch.float32
    )
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    assert torch.equal(dequantise("here", weight, scale, [32, 32]), theirs)


def layer_files(folder, ordinals, heads, rank, hidden=HIDDEN, width=WIDTH):
    """The release's extracted files, fp32."""
    folder.mkdir()
    found = {}
    for ordinal in ordinals:
        generator = torch.Generator().manual_seed(ordinal)
        found[ordinal] = {
            "wq_a.weight": torch.randn(rank, hidden, generator=generator),
            "q_norm.weight": torch.randn(rank, generator=generator),
            "indexer.wq_b.weight": torch.randn(heads * width, rank, generator=generator),
            "indexer.weights_proj.weight": torch.randn(heads, hidden, generator=generator),
        }
        save_file(found[ordinal], folder / f"layer_{2 * ordinal + 2:02d}.safetensors")
    return found


def test_the_releases_layer_files_fill_the_leading_block(tmp_path, small):
    files = layer_files(tmp_path / "weights", [3, 10], heads=2, rank=6)
    indexer, untouched = small(layers=(3, 10)), small(layers=(3, 10))
    initialise(indexer, tmp_path / "weights")
    for ordinal, tensors in files.items():
        encoder = indexer.query_encoder.encoders[str(ordinal)]
        drawn = untouched.query_encoder.encoders[str(ordinal)]
        for name, rows, columns in [("wq_a", 6, HIDDEN), ("wq_b", 2 * WIDTH, 6), ("weights_proj", 2, HIDDEN)]:
            ours, before = getattr(encoder, name).weight, getattr(drawn, name).weight
            key = name if name == "wq_a" else f"indexer.{name}"
            assert torch.equal(ours[:rows, :columns], tensors[f"{key}.weight"])
            assert torch.equal(ours[rows:], before[rows:]) and torch.equal(ours[:, columns:], before[:, columns:])
        assert torch.equal(encoder.q_norm.weight[:6], tensors["q_norm.weight"])
        assert torch.equal(encoder.q_norm.weight[6:], drawn.q_norm.weight[6:])


def test_training_starts_from_it_and_is_seeded(tmp_path, v4_store):
    files = layer_files(tmp_path / "weights", [10, 12], heads=2, rank=6, hidden=24, width=128)
    shape = IndexerConfig(heads=3, rank=8, distance_bumps=0, scale=False, slot=False, bias=True, join="max")
    settings = {"loss": "focal", "epochs": 1, "golden": 3, "learning_rate": 1e-12, "validation_every": 3,
                "eval_epochs": 1, "windows_per_document": 8}  # fmt: skip
    config = TrainConfig(**settings, init=str(tmp_path / "weights"))
    trained = [train(v4_store, shape, config, tmp_path / name) for name in "ab"]
    encoder = trained[0].query_encoder.encoders["12"]
    torch.testing.assert_close(encoder.wq_a.weight[:6].cpu(), files[12]["wq_a.weight"])
    assert encoder.wq_a.weight[6:].abs().max() > 0
    for name, value in trained[0].state_dict().items():
        assert torch.equal(value, trained[1].state_dict()[name]), name
    with pytest.raises(InputError, match="more than the recipe's"):
        train(v4_store, shape.model_copy(update={"heads": 1}), config, tmp_path / "c")
    with pytest.raises(InputError, match="neither a safetensors checkpoint"):
        train(v4_store, shape, config.model_copy(update={"init": str(tmp_path)}), tmp_path / "d")


def test_what_is_not_there_is_named(checkpoint, tmp_path, small):
    with pytest.raises(InputError, match=r"has 2 CSA layers, ordinals 0..1; \[2\]"):
        read_native(checkpoint, [0, 2])
    with pytest.raises(InputError, match="hidden and key width are"):
        initialise(small(hidden=HIDDEN + 1), checkpoint)
    tensors = load_file(next(checkpoint.glob("*.safetensors")))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="is it a checkpoint of DeepSeek-V4, or with DSA"):
        read_native(tmp_path, [0])
    layer_files(tmp_path / "weights", [10], heads=2, rank=6)
    with pytest.raises(InputError, match=r"layer_26.safetensors: cannot be read"):
        read_native(tmp_path / "weights", [10, 12])
    (tmp_path / "weights" / "layer_26.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match=r"layer_26.safetensors: cannot be read"):
        read_native(tmp_path / "weights", [12])


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("model.safetensors.index.json", "{", "not JSON"),
        ("model.safetensors.index.json", "[" * 100_000, "not JSON"),
        ("model.safetensors.index.json", "[]", "holds no JSON object"),
        ("model.safetensors.index.json", "{}", "not the index"),
        ("model.safetensors.index.json", '{"weight_map": null}', "not the index"),
        ("model.safetensors.index.json", '{"weight_map": {"layers.1.attn.indexer.wq_b.weight": 3}}', "not the index"),
        ("config.json", "[]", "holds no JSON object"),
        ("config.json", "nonsense", "not JSON"),
        ("config.json", '{"quantization_config": "fp8"}', r"not \[rows, columns\]"),
        ("config.json", '{"quantization_config": {"weight_block_size": 128}}', r"not \[rows, columns\]"),
        ("config.json", '{"quantization_config": {"weight_block_size": [128]}}', r"not \[rows, columns\]"),
        ("config.json", '{"quantization_config": {"weight_block_size": [0, 128]}}', r"not \[rows, columns\]"),
        ("config.json", '{"quantization_config": {"weight_block_size": [16.0, 32]}}', r"not \[rows, columns\]"),
    ],
)
def test_json_of_another_kind_is_named(small_checkpoint, file, text, reason):
    folder = small_checkpoint({})
    (folder / file).write_text(text)
    with pytest.raises(InputError, match=f"{file}: .*{reason}") as caught:
        read_native(folder, [0])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"wq_a.weight": torch.ones(20, 48).to(torch.float8_e5m2)}, "wq_a is torch.float8_e5m2"),
        ({"wq_a.weight": torch.ones(20, 48).to(torch.float8_e4m3fnuz)}, "wq_a is torch.float8_e4m3fnuz"),
        ({"wq_a.weight": torch.ones(20, 48, dtype=torch.int8)}, "wq_a is torch.int8"),
        ({"indexer.weights_proj.weight": torch.ones(0, 48)}, r"weights_proj is torch.float32 \[0, 48\]"),
        ({"q_norm.weight": torch.ones(20).double()}, "q_norm is torch.float64"),
        ({"wq_a.weight": torch.ones(20, 48).to(torch.float8_e4m3fn)}, "scale tensor beside it"),
        *(
            ({"wq_a.weight": torch.ones(20, 48).to(torch.float8_e4m3fn), "wq_a.scale": scale}, reason)
            for scale, reason in [
                (torch.ones(2, 2, dtype=torch.int32), "scales are torch.int32"),
                (torch.ones(2, 2).half(), "scales are torch.float16"),
                (torch.ones(2, 2).to(torch.float8_e4m3fn), "scales are torch.float8_e4m3fn"),
                (torch.ones(4), r"scales \[4\] for blocks of"),
                (torch.full((2, 2), torch.inf), "NaN or infinity"),
                (torch.full((2, 2), 255, dtype=torch.uint8), "NaN or infinity"),
            ]
        ),
        ({"q_norm.weight": torch.ones(20).to(torch.float8_e4m3fn), "q_norm.scale": torch.ones(2)}, "scales .2. for bl"),
    ],
)
def test_weights_of_another_kind_are_named(small_checkpoint, change, reason):
    with pytest.raises(InputError, match=reason) as caught:
        read_native(small_checkpoint(change), [0])
    assert "\n" not in str(caught.value)
