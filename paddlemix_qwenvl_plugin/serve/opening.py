"""From settings to a service: the model's files, the engine, the images, the queue."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from prometheus_client import disable_created_metrics

from paddlemix_qwenvl_plugin.runtime.predictor import QwenVL
from paddlemix_qwenvl_plugin.serve import demo_model
from paddlemix_qwenvl_plugin.serve.admission import SlotQueue
from paddlemix_qwenvl_plugin.serve.engine_api import ModelSettings
from paddlemix_qwenvl_plugin.serve.engine_client import ProcessEngineClient
from paddlemix_qwenvl_plugin.serve.images import WorkerImageLoader
from paddlemix_qwenvl_plugin.serve.metrics import Metrics
from paddlemix_qwenvl_plugin.serve.service import Service
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings


def open_service(settings: ServeSettings, say: Callable[[str], None]) -> Service:
    """What request handlers share; its engine is not started.

    Raises:
        UsageError, QwenVLError: see QwenVL.from_exported.
    """
    vision, language = settings.first_model_path, settings.second_model_path
    if settings.demo:
        vision, language = demo_model.demo_stages(say)
    assert vision is not None
    assert language is not None
    # On a CPU, whatever the engine's device is: only the configuration and the tokenizer are wanted of it.
    model = QwenVL.from_exported(vision, language, settings.model_name_or_path)
    if settings.picture_label is not None:
        model.tokenizer.picture_label = settings.picture_label
    # The demo model knows both forms, and its folder does not say so.
    is_chat = settings.demo or model.is_chat
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a time beside every counter, which nobody asks for
    metrics = Metrics()
    return Service(
        settings=settings,
        engine=ProcessEngineClient(_of_engine(settings, vision, language)),
        tokenizer=model.tokenizer,
        config=model.config,
        is_chat=is_chat,
        model_name=settings.served_model_name or ("qwen-vl-chat" if is_chat else "qwen-vl"),
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


def _of_engine(settings: ServeSettings, vision: Path, language: Path) -> ModelSettings:
    return ModelSettings(
        first_model_path=vision,
        second_model_path=language,
        model_name_or_path=settings.model_name_or_path,
        device=settings.device,
        gpu_memory=settings.gpu_memory,
        verify=settings.verify,
    )
