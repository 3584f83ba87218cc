"""`qwenvl serve --adapter`: the parameter `model` of a request selects an adapter."""

from __future__ import annotations

import openai
import pytest
from adapter_folders import write_adapter
from engines import needs_compiler

from paddlemix_qwenvl_plugin import QwenVL

pytestmark = needs_compiler

PROMPT = "Where is the red circle? " * 4


@pytest.fixture(scope="module")
def model(stages, tmp_path_factory) -> QwenVL:
    """The demo model with two adapters, without a server; `folders` maps the names of the adapters to their folders."""
    folder = tmp_path_factory.mktemp("adapters")
    config = QwenVL.from_exported(*stages).config
    adapters = {name: write_adapter(folder / name, config, seed) for seed, name in enumerate(["red", "blue"])}
    model = QwenVL.from_exported(*stages, adapters=adapters)
    model.folders = adapters
    return model


def test_model_of_a_request_selects_the_adapter(serve_demo, model):
    flags = [flag for name, path in model.folders.items() for flag in ("--adapter", f"{name}={path}")]
    url = serve_demo(*flags).wait_until_ready()
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    names = [listed.id for listed in client.models.list()]
    assert names == ["qwen-vl-chat", "red", "blue"]
    assert client.models.retrieve("blue").id == "blue"
    texts = []
    for name in names:
        adapter = None if name == names[0] else name
        expected = model.generate(PROMPT, chat=False, adapter=adapter, max_new_tokens=12).text
        completion = client.completions.create(model=name, prompt=PROMPT, max_tokens=12, temperature=0)
        assert completion.model == name
        assert completion.choices[0].text == expected
        texts.append(expected)
        expected = model.generate("What is it?", chat=True, adapter=adapter, max_new_tokens=12).text
        messages = [{"role": "user", "content": "What is it?"}]
        chunks = client.chat.completions.create(
            model=name, messages=messages, max_tokens=12, temperature=0, stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert len(set(texts)) == 3  # the adapters have an effect
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="green", prompt="a")
    assert caught.value.code == "model_not_found"
    assert "`green` does not exist; this server has `qwen-vl-chat`, `red`, `blue`." in caught.value.message
