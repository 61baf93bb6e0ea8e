"""What the install brings, and what a server refuses when it starts."""

import json
import os
import socket
import subprocess
import sys
from importlib.metadata import distribution
from types import SimpleNamespace

import pytest

from data_gen.core.errors import InputError
from eval.serving.vllm.checks import check_options
from eval.serving.vllm.plugin import register
from indexer_train.formats.bundle import export_bundle, load_scorer
from indexer_train.scorer import Scorer
from tests.eval.serving.vllm.conftest import ENGINE, ROOT, Server

pytest.importorskip("vllm", reason="make test-vllm runs it")

TRAINING = (
    "transformers",
    "sentence_transformers",
    "datasets",
    "accelerate",
    "pyarrow",
    "wandb",
    "matplotlib",
    "typer",
)


def python(code: str, **environment: str) -> str:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("LOOKAHEAD_")}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=plain | environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_install_brings_no_training_packages():
    needs = {need.split(">")[0] for need in distribution("lookahead-serving").requires}
    assert needs == {"torch", "numpy", "safetensors", "pydantic"}
    code = (
        "import eval.serving.vllm.worker, eval.serving.vllm.checks, sys; print(*{m.split('.')[0] for m in sys.modules})"
    )
    assert not set(python(code).split()) & {*TRAINING, "vllm"}
    names = [point.name for point in distribution("lookahead-serving").entry_points]
    assert names == ["lookahead"]


def test_pip_finds_nothing_missing_for_it():
    check = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    # Installed in place, pip also sees what the whole distribution wrote into the tree.
    assert not [line for line in check.stdout.splitlines() if line.startswith("lookahead-serving")]


def test_without_a_bundle_nothing_happens():
    code = "from eval.serving.vllm.plugin import register; import sys; register(); print('vllm' in sys.modules)"
    assert python(code).strip() == "False"


@pytest.fixture(scope="module")
def configure(models):
    """configure(model, bundle, **engine options): vLLM's own configuration, refused or not, with the plugin loaded."""
    os.environ.update(ENGINE)
    os.environ["LOOKAHEAD_BUNDLE"] = str(models / "qwen3-bundle")
    register()
    register()  # vLLM may call it again
    from vllm.engine.arg_utils import EngineArgs

    def run(model="qwen3", bundle=None, lookahead=None, **options):
        settings = {"bundle": str(models / f"{bundle or model}-bundle")} | (lookahead or {})
        options = {"block_size": 16, "max_model_len": 1024, "dtype": "float32", "enforce_eager": True} | options
        args = EngineArgs(model=str(models / model), additional_config={"lookahead": settings}, **options)
        return args.create_engine_config()

    yield run
    del os.environ["LOOKAHEAD_BUNDLE"]


@pytest.mark.parametrize("model", ["qwen3", "gemma3", "smollm2"])
def test_its_own_model_is_served(configure, model):
    assert configure(model).kv_transfer_config.kv_connector == "LookaheadConnector"


def test_a_compiled_model_serves_no_bundle_of_other_layers(configure, models, tmp_path):
    """The engine keeps it by this value; the bundle's folder stays the same when it is exported again."""
    spec, values = load_scorer(models / "qwen3-bundle").spec, []
    for layers in ([0, 2], [1, 2], [0, 2]):
        other = spec.model_copy(update={"layers": layers})
        export_bundle(SimpleNamespace(spec=other, query_encoder=Scorer(other)), tmp_path / "bundle")
        values.append(configure(lookahead={"bundle": str(tmp_path / "bundle")}).compute_hash())
    assert values[0] == values[2] != values[1]


@pytest.mark.parametrize(
    "options, said",
    [
        ({"block_size": 32}, r"chunks have 16 tokens, but the cache's blocks 32; start with --block-size 16"),
        ({"model": "smollm2", "bundle": "qwen3"}, "the indexer reads hidden states of 64"),
        ({"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}, "pipeline parallelism: not supported"),
        ({"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}, "tensor parallelism: not supported"),
        ({"data_parallel_size": 2}, "data parallelism: not supported"),
        (
            {"hf_overrides": {"layer_types": ["linear_attention"] + 2 * ["full_attention"]}},
            "layers of linear_attention",
        ),
        ({"kv_offloading_size": 1.0}, "KV transfer to or from other caches: not supported"),
        ({"kv_cache_dtype": "fp8"}, "a KV cache in fp8: not supported"),
        ({"enable_lora": True}, "LoRA adapters: not supported"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative decoding: not supp"),
        ({"model": "gemma3", "disable_hybrid_kv_cache_manager": True}, "sliding layers without the hybrid KV cache"),
        ({"model": "gemma3", "lookahead": {"host_gib": 1.0}}, "host_gib: cold blocks of models with sliding layers"),
        ({"lookahead": {"budget": 0.1, "threshold": 0.0}}, "budget and threshold: give only one"),
        ({"lookahead": {"full_above": 2.0, "cap": 20}}, "fallback: the bundle serves a budget"),
        ({"lookahead": {"cap": 3}}, "cap: 3 chunks cannot hold the 5 protected ones"),
        ({"lookahead": {"bundle": "/nowhere"}}, "/nowhere: no bundle there"),
        ({"lookahead": {"trace": "/nowhere/trace"}}, "trace: /nowhere/trace: No such file or directory; name a file"),
    ],
)
def test_refusals(configure, options, said):
    with pytest.raises(InputError, match=said) as error:
        configure(**options)
    assert "\n" not in str(error.value)


def test_other_kv_connectors_would_share_sparse_keys_with_dense_traffic(configure):
    from vllm.config import KVTransferConfig

    other = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    with pytest.raises(InputError, match="KV transfer to or from other caches: not supported"):
        configure(kv_transfer_config=other)


def test_the_second_model_runner_is_refused(configure, monkeypatch):
    """What a GPU's configuration says of itself; a CPU's never does."""
    config = configure()
    monkeypatch.setattr(type(config), "use_v2_model_runner", True)
    with pytest.raises(InputError, match=r"the second model runner \(without .*=0\): not supported"):
        check_options(config)


def test_a_gpus_own_backend_would_read_everything(configure):
    config = configure()
    config.device_config = SimpleNamespace(device_type="cuda")
    custom, stock = SimpleNamespace(name="CUSTOM"), SimpleNamespace(name="FLASH_ATTN")
    config.attention_config.backend = custom
    check_options(config)
    for backend, kinds in ((None, {}), (stock, {}), (custom, {"full_attention": stock})):
        config.attention_config.backend, config.attention_config.backend_per_kind = backend, kinds
        with pytest.raises(InputError, match=r"a stock attention backend \(without --attention-backend CUSTOM\)"):
            check_options(config)


@pytest.mark.parametrize("version", ["0.25.1", "0.31.0", "1.0.0"])
def test_other_versions_are_refused(configure, monkeypatch, version):
    monkeypatch.setattr("vllm.version.__version__", version)
    with pytest.raises(InputError, match=rf"vLLM {version}: the plugin needs one from 0.26 on"):
        configure()


def test_host_memory_needs_the_block_managers(configure, monkeypatch):
    """As vLLM before 0.30, which lends a connector none."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    monkeypatch.delattr(KVConnectorBase_V1, "bind_kv_cache_manager")
    assert configure(lookahead={})
    with pytest.raises(InputError, match="host_gib: this vLLM does not lend its block manager"):
        configure(lookahead={"host_gib": 1.0})


def other_bundle(source, folder, **changes):
    """Random weights for a spec with changes."""
    spec = load_scorer(source).spec.model_copy(update=changes)
    export_bundle(SimpleNamespace(spec=spec, query_encoder=Scorer(spec)), folder)
    return folder


def test_sliding_layers_are_no_layers_of_an_indexer(configure, models, tmp_path):
    bundle = other_bundle(models / "gemma3-bundle", tmp_path, layers=[0, 5])
    with pytest.raises(InputError, match=r"the indexer reads layers \[0\], which have no full attention"):
        configure("gemma3", lookahead={"bundle": str(bundle)})


def test_another_models_bundle_is_refused_in_one_line(models, tmp_path):
    """The server itself: exit 1, one line, no traceback."""
    bundle = other_bundle(models / "qwen3-bundle", tmp_path / "bundle", backbone="0123456789abcdef")
    server = Server(tmp_path, models / "qwen3", bundle)
    assert server.process.wait(300) == 1
    log = server.log.read_text()
    (line,) = [line for line in log.splitlines() if " lookahead: " in line]
    assert "is for a model with fingerprint 0123456789abcdef" in line
    assert "Traceback" not in log


def test_the_example_serves(models):
    """examples/serve_with_vllm.sh: a completion, and what was read for it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [ROOT / "examples/serve_with_vllm.sh", models / "qwen3", models / "qwen3-bundle"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
    environment = os.environ | ENGINE | {"PYTHON": sys.executable, "PORT": str(port)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    (answer,) = [line for line in result.stdout.splitlines() if line.startswith("{")]
    assert json.loads(answer)["usage"]["completion_tokens"] > 2
    lines = [line for line in result.stdout.splitlines() if line.startswith("lookahead:")]
    figures = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines}
    assert 0 < figures["lookahead:read_total"] < figures["lookahead:made_total"]
