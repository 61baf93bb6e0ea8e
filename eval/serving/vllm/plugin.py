"""Entry point `vllm.general_plugins`. Without LOOKAHEAD_BUNDLE it does nothing at all."""

# pyright: reportMissingImports=false

import functools
import os
from typing import Any

from eval.serving.vllm.settings import PREFIX


def register() -> None:
    """Called by vLLM in every process, perhaps several times."""
    if not os.environ.get(f"{PREFIX}BUNDLE"):
        return
    from vllm.engine.arg_utils import EngineArgs
    from vllm.version import __version__

    from eval.serving.vllm.checks import CONNECTOR, supported

    _once(EngineArgs, "create_engine_config", _refuse)
    if not supported(__version__):  # refused with the server's options; what is imported below may be missing
        return
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from eval.serving.vllm.blocks import register_spec

    if current_platform.is_cpu():  # it takes no CUSTOM backend, but its own may be replaced
        register_backend(AttentionBackendEnum.CPU_ATTN, "eval.serving.vllm.backend.LookaheadCPUBackend")
    else:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

        kernel = "Flash" if get_flash_attn_version() == 3 else "Triton"  # as stock vLLM on Hopper
        register_backend(AttentionBackendEnum.CUSTOM, f"eval.serving.vllm.backend_cuda.Lookahead{kernel}Backend")
    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, "eval.serving.vllm.connector", CONNECTOR)
    register_spec()
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    for runner in (CPUModelRunner, GPUModelRunner):
        _once(runner, "load_model", _attach)


def _once(owner: type, name: str, wrap: Any) -> None:
    """Replace a method by `wrap(method)`, once in a process."""
    method = getattr(owner, name)
    if not hasattr(method, "lookahead"):
        wrapped = functools.wraps(method)(wrap(method))
        wrapped.__dict__["lookahead"] = True
        setattr(owner, name, wrapped)


def _refuse(create: Any) -> Any:
    """What cannot be served is said where the server starts: in one line."""

    def create_engine_config(self: Any, usage_context: Any = None, *args: Any, **options: Any) -> Any:
        from vllm.config import KVTransferConfig
        from vllm.usage.usage_lib import UsageContext
        from vllm.version import __version__

        from data_gen.core.errors import InputError
        from eval.serving.vllm.checks import CONNECTOR, check, check_version

        try:
            check_version(__version__)
            if self.kv_transfer_config is None:  # counters and moves travel by it
                self.kv_transfer_config = KVTransferConfig(kv_connector=CONNECTOR, kv_role="kv_both")
            config = create(self, usage_context, *args, **options)
            check(config)
        except InputError as error:
            if usage_context == UsageContext.OPENAI_API_SERVER:
                raise SystemExit(f"lookahead: {error}") from None
            raise
        return config

    return create_engine_config


def _attach(load: Any) -> Any:
    """The model is there and the runner is in hand."""

    def load_model(self: Any, *args: Any, **options: Any) -> Any:
        from data_gen.core.errors import InputError
        from eval.serving.vllm.worker import attach

        result = load(self, *args, **options)
        try:
            attach(self)
        except InputError as error:  # this process ends with the one line; the server then says that it is gone
            raise SystemExit(f"lookahead: {error}") from None
        return result

    return load_model
