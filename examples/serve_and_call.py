"""Start the HTTP server, send it a request in OpenAI's format, and stop it.

    python examples/serve_and_call.py
    python examples/serve_and_call.py --image FILE --question "Is there a dog?" --model out/vision/vision out/text/qwen

The first command prints

    <ref>the blue heart in the centre</ref><box>(380,380),(540,530)</box>
    the blue heart in the centre [[97.28, 97.28], [138.24, 135.68]]
"""

from __future__ import annotations

import base64
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
from demo_model import IMAGES, parser


@contextlib.contextmanager
def server(*flags: str) -> Iterator[str]:
    """Run `qwenvl serve` with these flags within the block; yield its URL."""
    command = [sys.executable, "-m", "paddlemix_qwenvl_plugin.cli", "serve", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            # The server prints "Serving … URL" when it is ready. If it does not start, stderr has the reason.
            line = next((line for line in process.stdout or () if line.startswith("Serving ")), None)
            yield line.split()[-1] if line else sys.exit(1)
        finally:
            process.terminate()


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--image", type=Path, default=IMAGES / "locate.png")
    flags.add_argument("--question", default="Draw a box around the blue heart in the centre.")
    arguments = flags.parse_args()
    common = ["--port", "0", "--device", arguments.device, "--log_level", "warning"]
    stages = arguments.model
    model = ["--first_model_path", stages[0], "--second_model_path", stages[1]] if stages else ["--demo"]
    image = {"url": f"data:;base64,{base64.b64encode(arguments.image.read_bytes()).decode()}"}
    content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": arguments.question}]
    with server(*common, *model) as url, httpx.Client(base_url=url, timeout=600, trust_env=False) as client:
        model_name = client.get("/v1/models").json()["data"][0]["id"]
        request = {"model": model_name, "messages": [{"role": "user", "content": content}]}
        response = client.post("/v1/chat/completions", json=request)
    if response.is_error:
        sys.exit(f"error: {response.json()['error']['message']}")
    message = response.json()["choices"][0]["message"]
    print(message["content"], *(f"{box['ref']} {box['pixels']}" for box in message["boxes"]), sep="\n")


if __name__ == "__main__":
    main()
