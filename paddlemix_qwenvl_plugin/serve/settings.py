"""Settings of the server as a typed object."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Optional

from pydantic import BeforeValidator, Field
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

ENVIRONMENT_PREFIX = "QWENVL_SERVE_"


def _split(value: object) -> object:
    """Split a comma-separated list, the form of a list in an environment variable and in a flag."""
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    return value


Texts = Annotated[list[str], NoDecode, BeforeValidator(_split)]


class ServeSettings(BaseSettings):
    """Settings of `qwenvl serve`.

    Each field is a flag (`--max_waiting`), an environment variable (`QWENVL_SERVE_MAX_WAITING`) and a key of the YAML
    file of `--config`; the first of these that is given counts (settings_sources.py).
    """

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX, env_ignore_empty=True, extra="forbid", frozen=True, allow_inf_nan=False
    )

    # Model
    first_model_path: Annotated[Optional[Path], Field(description="Exported vision stage (prefix).")] = None
    second_model_path: Annotated[Optional[Path], Field(description="Exported language stage (prefix).")] = (
        None
    )
    model_name_or_path: Annotated[
        Optional[Path], Field(description="Tokenizer folder; default: the language stage's folder.")
    ] = None
    demo: Annotated[bool, Field(description="Serve the bundled demo model.")] = False
    device: Annotated[str, Field(description="cpu, gpu or gpu:N.")] = "cpu"
    gpu_memory: Annotated[
        float,
        Field(
            gt=0, le=1, description="Share that the KV cache may take of the GPU memory left by the weights."
        ),
    ] = 0.9
    verify: Annotated[bool, Field(description="Verify all files of the stages first.")] = False
    picture_label: Annotated[Optional[str], Field(description="Text before an image, {} for its number.")] = (
        None
    )
    adapter: Annotated[
        Texts,
        Field(description="LoRA adapters as NAME=FOLDER; a request chooses one by its name as the model."),
    ] = []
    served_model_name: Annotated[
        Optional[str],
        Field(description="Name of the model in the API; default: qwen-vl-chat or qwen-vl."),
    ] = None

    # Network
    host: Annotated[str, Field(description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="Port to listen on; 0: any free port.")] = 8000
    reuse_port: Annotated[
        bool, Field(description="Let a second server listen on the same port (SO_REUSEPORT).")
    ] = False
    api_key_file: Annotated[Optional[Path], Field(description="File with one API key per line.")] = None
    no_auth: Annotated[bool, Field(description="Allow non-loopback addresses without API keys.")] = False
    cors_origins: Annotated[Texts, Field(description="Allowed origins of other web pages.")] = []
    page: Annotated[bool, Field(description="Serve the web page at /.")] = True

    # Load
    max_running: Annotated[int, Field(ge=1, le=256, description="Maximum of concurrent completions.")] = 64
    max_waiting: Annotated[
        int, Field(ge=0, description="Maximum of waiting requests; more are refused with 429.")
    ] = 256
    max_per_key: Annotated[
        Optional[int],
        Field(ge=1, description="Maximum of concurrent completions per API key; default: no limit."),
    ] = None
    waiting_timeout: Annotated[float, Field(gt=0, description="Timeout for a slot, in seconds.")] = 60.0
    running_timeout: Annotated[
        float, Field(gt=0, description="Timeout for the computation of a request, in seconds.")
    ] = 600.0
    body_timeout: Annotated[
        float, Field(gt=0, description="Timeout for receiving a request's body, in seconds.")
    ] = 60.0
    send_timeout: Annotated[
        float, Field(gt=0, description="Timeout for a client that does not read its response, in seconds.")
    ] = 30.0
    shutdown_timeout: Annotated[
        float, Field(ge=0, description="Timeout for running requests after SIGTERM, in seconds.")
    ] = 30.0
    max_prompt_tokens: Annotated[
        Optional[int], Field(ge=1, description="Maximum tokens of a prompt; default: the model's context.")
    ] = None
    max_new_tokens: Annotated[
        int, Field(ge=1, description="Maximum tokens of a completion that a request may set.")
    ] = 2048
    default_max_new_tokens: Annotated[
        int, Field(ge=1, description="Maximum tokens of a completion if a request sets none.")
    ] = 512
    max_choices: Annotated[int, Field(ge=1, le=128, description="Maximum completions of a request (n).")] = 8
    max_body_bytes: Annotated[int, Field(ge=1024, description="Maximum bytes of a request's body.")] = (
        32 * 2**20
    )
    max_held_bytes: Annotated[
        int, Field(ge=1024, description="Maximum bytes of the bodies of all unanswered requests.")
    ] = 2**30

    # Ray cluster, with --ray
    min_replicas: Annotated[int, Field(ge=1, description="Minimum of engine replicas.")] = 1
    max_replicas: Annotated[
        Optional[int], Field(ge=1, description="Maximum of engine replicas; default: the minimum.")
    ] = None
    replica_cpus: Annotated[float, Field(gt=0, description="CPUs that an engine replica reserves.")] = 1.0
    replica_gpus: Annotated[
        Optional[float],
        Field(
            ge=0, description="GPUs, or a share of one, of an engine replica; default: 1 with --device gpu."
        ),
    ] = None
    min_fronts: Annotated[int, Field(ge=1, description="Minimum of front replicas.")] = 2

    # Images
    max_images: Annotated[int, Field(ge=0, description="Maximum images of a request.")] = 8
    max_image_bytes: Annotated[int, Field(ge=1, description="Maximum bytes of an encoded image.")] = (
        20 * 2**20
    )
    max_image_pixels: Annotated[int, Field(ge=1, description="Maximum pixels of an image.")] = 64_000_000
    image_timeout: Annotated[
        float, Field(gt=0, description="Timeout for downloading an image, and for decoding it, in seconds.")
    ] = 10.0
    image_workers: Annotated[int, Field(ge=1, le=64, description="Processes that decode images.")] = 2
    image_hosts: Annotated[
        Texts,
        Field(description="Allowed hosts of image downloads; *.example.org for subdomains. Default: none."),
    ] = []

    # Logs
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Field(description="Minimum level of log records.")
    ] = "info"
    log_prompts: Annotated[bool, Field(description="Log prompts and completions.")] = False
