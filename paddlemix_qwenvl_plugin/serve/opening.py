"""Construction of a Service from the settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from prometheus_client import disable_created_metrics

from paddlemix_qwenvl_plugin.runtime.adapters import split_adapters
from paddlemix_qwenvl_plugin.runtime.predictor import QwenVL
from paddlemix_qwenvl_plugin.serve import demo_model
from paddlemix_qwenvl_plugin.serve.admission import SlotQueue
from paddlemix_qwenvl_plugin.serve.engine_api import ModelSettings
from paddlemix_qwenvl_plugin.serve.engine_client import ProcessEngineClient
from paddlemix_qwenvl_plugin.serve.images import WorkerImageLoader
from paddlemix_qwenvl_plugin.serve.metrics import Metrics
from paddlemix_qwenvl_plugin.serve.service import Service
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings
from paddlemix_qwenvl_plugin.util.errors import UsageError


def open_service(settings: ServeSettings, say: Callable[[str], None]) -> Service:
    """Open the configuration and tokenizer and create the service; its engine is not started.

    Raises:
        UsageError, QwenVLError: see QwenVL.from_exported.
    """
    vision, language = settings.first_model_path, settings.second_model_path
    adapters = split_adapters(settings.adapter)
    if settings.demo:
        vision, language = demo_model.demo_stages(say)
    assert vision is not None
    assert language is not None
    # On the CPU regardless of the engine's device: only its configuration and tokenizer are used.
    model = QwenVL.from_exported(vision, language, settings.model_name_or_path)
    if settings.picture_label is not None:
        model.tokenizer.picture_label = settings.picture_label
    # The demo model is trained on both prompt formats; its configuration does not record that.
    is_chat = settings.demo or model.is_chat
    name = settings.served_model_name or ("qwen-vl-chat" if is_chat else "qwen-vl")
    if name in adapters:
        raise UsageError(
            f"--adapter {name}={adapters[name]}: the model has that name; name the adapter differently"
        )
    disable_created_metrics()  # type: ignore[no-untyped-call]  # no creation time for each counter
    metrics = Metrics()
    return Service(
        settings=settings,
        engine=ProcessEngineClient(_model_settings(settings, vision, language, adapters)),
        tokenizer=model.tokenizer,
        config=model.config,
        is_chat=is_chat,
        model_name=name,
        adapters=tuple(adapters),
        images=WorkerImageLoader(settings, model.config.visual.image_size),
        admission=SlotQueue(
            settings.max_running,
            settings.max_waiting,
            settings.waiting_timeout,
            settings.max_per_key,
            metrics.queued,
        ),
        metrics=metrics,
    )


def _model_settings(
    settings: ServeSettings, vision: Path, language: Path, adapters: dict[str, Path]
) -> ModelSettings:
    return ModelSettings(
        first_model_path=vision,
        second_model_path=language,
        model_name_or_path=settings.model_name_or_path,
        device=settings.device,
        gpu_memory=settings.gpu_memory,
        verify=settings.verify,
        adapters={name: str(folder) for name, folder in adapters.items()},
    )
