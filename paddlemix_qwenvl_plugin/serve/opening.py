"""Construction of a Service from the settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

from prometheus_client import disable_created_metrics

from paddlemix_qwenvl_plugin.runtime.adapters import split_adapters
from paddlemix_qwenvl_plugin.runtime.predictor import QwenVL
from paddlemix_qwenvl_plugin.serve import demo_model
from paddlemix_qwenvl_plugin.serve.admission import SlotQueue
from paddlemix_qwenvl_plugin.serve.engine_api import EngineClient, ModelSettings
from paddlemix_qwenvl_plugin.serve.engine_client import ProcessEngineClient
from paddlemix_qwenvl_plugin.serve.images import WorkerImageLoader
from paddlemix_qwenvl_plugin.serve.metrics import Metrics
from paddlemix_qwenvl_plugin.serve.service import Admission, Service
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings
from paddlemix_qwenvl_plugin.util.errors import UsageError


def open_service(
    settings: ServeSettings,
    say: Callable[[str], None],
    engine: Optional[EngineClient] = None,
    admission: Optional[Admission] = None,
    metrics: Optional[Metrics] = None,
) -> Service:
    """Open the configuration and tokenizer and create the service. Its engine is not started.

    Args:
        say: called with each progress line.
        engine: default: a client that starts the engine as a child process.
        admission: default: a queue in this process.
        metrics: default: a new object. A front on a cluster (cluster/serve/front.py) passes its own of all three.

    Raises:
        UsageError, QwenVLError: see model_settings and QwenVL.from_exported; or the picture label is invalid, or an
            adapter has the model's name.
    """
    engine_settings = model_settings(settings, say)
    adapters = engine_settings.adapters
    # On the CPU, regardless of the engine's device: this process uses only the configuration and the tokenizer.
    model = QwenVL.from_exported(
        engine_settings.first_model_path, engine_settings.second_model_path, settings.model_name_or_path
    )
    if settings.picture_label is not None:
        model.tokenizer.picture_label = settings.picture_label
    # The demo model is trained on both prompt formats; its configuration does not record that.
    is_chat = settings.demo or model.is_chat
    model_name = settings.served_model_name or ("qwen-vl-chat" if is_chat else "qwen-vl")
    if model_name in adapters:
        raise UsageError(
            f"--adapter {model_name}={adapters[model_name]}: the model has that name; name the adapter differently"
        )
    # Otherwise each counter and each histogram has an additional metric, its creation time.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    metrics = metrics or Metrics()
    return Service(
        settings=settings,
        engine=engine or ProcessEngineClient(engine_settings),
        tokenizer=model.tokenizer,
        config=model.config,
        is_chat=is_chat,
        model_name=model_name,
        adapters=tuple(adapters),
        images=WorkerImageLoader(settings, model.config.visual.image_size),
        admission=admission
        or SlotQueue(
            settings.max_running,
            settings.max_waiting,
            settings.waiting_timeout,
            settings.max_per_key,
            metrics.queued,
        ),
        metrics=metrics,
    )


def model_settings(settings: ServeSettings, say: Callable[[str], None]) -> ModelSettings:
    """Settings of the engine process, also of those on a cluster (cluster/serve/engine.py).

    With `settings.demo`, the demo model is exported unless it was exported before.

    Raises:
        UsageError: an adapter is not NAME=FOLDER, two have the same name, or the cache folder cannot be created.
        QwenVLError: the demo model cannot be exported.
    """
    adapters = split_adapters(settings.adapter)
    vision, language = settings.first_model_path, settings.second_model_path
    if settings.demo:
        vision, language = demo_model.demo_stages(say)
    assert vision is not None  # check_model (start.py) has refused settings that name no model
    assert language is not None
    return ModelSettings(
        first_model_path=vision,
        second_model_path=language,
        model_name_or_path=settings.model_name_or_path,
        device=settings.device,
        gpu_memory=settings.gpu_memory,
        verify=settings.verify,
        adapters={name: str(folder) for name, folder in adapters.items()},
    )
