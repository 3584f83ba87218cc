"""All settings of the server in one typed object: flags over environment over YAML file over defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Optional

from pydantic import BeforeValidator, Field
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

ENVIRONMENT_PREFIX = "QWENVL_SERVE_"


def _split(value: object) -> object:
    """The items of a list that a variable gives as one text, with commas between them."""
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    return value


Texts = Annotated[list[str], NoDecode, BeforeValidator(_split)]


class ServeSettings(BaseSettings):
    """Settings of `qwenvl serve`. Each field is a flag, `--max_waiting`, a variable, `QWENVL_SERVE_MAX_WAITING`, and a
    key of the YAML file that `--config` names.
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
        Optional[Path], Field(description="Folder with the tokenizer; default: beside the language stage.")
    ] = None
    demo: Annotated[bool, Field(description="Serve the bundled demo model.")] = False
    device: Annotated[str, Field(description="cpu, gpu or gpu:N.")] = "cpu"
    gpu_memory: Annotated[
        float,
        Field(
            gt=0, le=1, description="Share of the GPU memory beside the weights that the KV cache may take."
        ),
    ] = 0.9
    verify: Annotated[bool, Field(description="Read all files of the stages first.")] = False
    picture_label: Annotated[Optional[str], Field(description="Text before an image, {} for its number.")] = (
        None
    )
    served_model_name: Annotated[
        Optional[str],
        Field(description="Name under which clients ask for the model; default: qwen-vl-chat or qwen-vl."),
    ] = None

    # Network
    host: Annotated[str, Field(description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="Port to listen on; 0: any free one.")] = 8000
    reuse_port: Annotated[
        bool, Field(description="Let a second server listen on the same port (SO_REUSEPORT).")
    ] = False
    api_key_file: Annotated[Optional[Path], Field(description="File with an API key on each line.")] = None
    no_auth: Annotated[
        bool, Field(description="Listen on other addresses than this machine's without API keys.")
    ] = False
    cors_origins: Annotated[Texts, Field(description="Origins of other web pages that may ask.")] = []
    page: Annotated[bool, Field(description="Serve the web page at /.")] = True

    # Load
    max_running: Annotated[int, Field(ge=1, le=256, description="Requests that are computed at once.")] = 64
    max_waiting: Annotated[int, Field(ge=0, description="Requests that wait; more are refused with 429.")] = (
        256
    )
    max_per_key: Annotated[
        Optional[int],
        Field(ge=1, description="Requests at once for each API key; default: no limit of its own."),
    ] = None
    waiting_timeout: Annotated[float, Field(gt=0, description="Seconds that a request may wait.")] = 60.0
    running_timeout: Annotated[float, Field(gt=0, description="Seconds that a request may be computed.")] = (
        600.0
    )
    body_timeout: Annotated[float, Field(gt=0, description="Seconds to receive a request.")] = 60.0
    send_timeout: Annotated[
        float, Field(gt=0, description="Seconds that a client may leave what it is sent unread.")
    ] = 30.0
    shutdown_timeout: Annotated[
        float, Field(ge=0, description="Seconds that requests may go on after SIGTERM.")
    ] = 30.0
    max_prompt_tokens: Annotated[
        Optional[int], Field(ge=1, description="Most tokens of a prompt; default: the model's context.")
    ] = None
    max_new_tokens: Annotated[
        int, Field(ge=1, description="Most tokens of a completion that a request may ask for.")
    ] = 2048
    default_max_new_tokens: Annotated[int, Field(ge=1, description="Where a request does not say.")] = 512
    max_choices: Annotated[int, Field(ge=1, le=128, description="Most completions of a request (n).")] = 8
    max_body_bytes: Annotated[int, Field(ge=1024, description="Most bytes of a request.")] = 32 * 2**20
    max_held_bytes: Annotated[
        int, Field(ge=1024, description="Most bytes of all requests that are not answered yet.")
    ] = 2**30

    # Images
    max_images: Annotated[int, Field(ge=0, description="Most images of a request.")] = 8
    max_image_bytes: Annotated[int, Field(ge=1, description="Most bytes of an encoded image.")] = 20 * 2**20
    max_image_pixels: Annotated[int, Field(ge=1, description="Most pixels of an image.")] = 64_000_000
    image_timeout: Annotated[
        float, Field(gt=0, description="Seconds to download an image, and again to decode it.")
    ] = 10.0
    image_workers: Annotated[int, Field(ge=1, le=64, description="Processes that decode images.")] = 2
    image_hosts: Annotated[
        Texts,
        Field(
            description="Hosts from which images may be downloaded; *.example.org for subdomains. Default: none."
        ),
    ] = []

    # Logs
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Field(description="Least level that is logged.")
    ] = "info"
    log_prompts: Annotated[bool, Field(description="Log prompts and completions.")] = False
