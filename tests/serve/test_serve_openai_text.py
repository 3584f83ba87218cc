"""Routes /v1/completions (the base model's format), /v1/models and /tokenize."""

from __future__ import annotations

import openai
import pytest
from executors import script_completion
from serve_openai_engine import logprob_of, top_logprobs_of
from serve_openai_helpers import NAME, demo_question, question

from paddlemix_qwenvl_plugin.processing.prompts import base_prompt, chat_prompt

pytest_plugins = ("serve_openai_fixtures",)


def complete(server, prompt, **parameters):
    return server.openai.completions.create(model=NAME, prompt=prompt, **parameters)


def test_prompt_as_text_and_as_token_ids(server, local_model):
    answer = local_model.generate("A red", chat=False, max_new_tokens=20)
    completion = complete(server, "A red", max_tokens=20)
    assert completion.object == "text_completion"
    assert completion.choices[0].text == answer.text
    assert completion.choices[0].finish_reason == answer.finish_reason
    assert completion.usage.completion_tokens == len(answer.token_ids)
    tokens = local_model.tokenizer.encode("A red")
    assert completion.usage.prompt_tokens == len(tokens)
    assert complete(server, tokens, max_tokens=20).choices[0].text == answer.text
    chunks = list(
        complete(server, "A red", max_tokens=20, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == answer.text
    assert chunks[-1].usage == completion.usage
    assert chunks[-2].choices[0].finish_reason == answer.finish_reason


def test_several_prompts(server, local_model):
    prompts = ["A red", "Two blue", "狗"]
    parameters = {"temperature": 1.2, "seed": 5, "max_tokens": 12, "n": 2}
    completion = complete(server, prompts, **parameters)
    texts = [choice.text for choice in completion.choices]
    options = {"temperature": 1.2, "seed": 5, "max_new_tokens": 12}
    # Choices 0, 2, 4 are the first choice of each prompt.
    assert texts[::2] == [local_model.generate(prompt, chat=False, **options).text for prompt in prompts]
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3, 4, 5]
    id_lists = [local_model.tokenizer.encode(prompt) for prompt in prompts]
    assert completion.usage.prompt_tokens == sum(map(len, id_lists))
    assert [choice.text for choice in complete(server, id_lists, **parameters).choices] == texts
    chunks = list(complete(server, prompts, stream=True, **parameters))
    streamed_texts = [""] * 6
    for chunk in chunks:
        for choice in chunk.choices:
            streamed_texts[choice.index] += choice.text
    assert streamed_texts == texts


def test_prompt_with_an_image(server, local_model):
    """The content of a message as the prompt, an extension of OpenAI's API."""
    content, parts = demo_question("grounded")
    answer = local_model.generate(parts, chat=False, max_new_tokens=150)
    assert answer.boxes
    choice = complete(server, content, max_tokens=150).choices[0]
    assert choice.text == answer.text
    expected = answer.as_dict()["boxes"]
    assert [tuple(map(tuple, box["pixels"])) for box in choice.boxes] == [box["pixels"] for box in expected]
    chunks = list(complete(server, content, max_tokens=150, stream=True))
    assert [box for chunk in chunks for box in chunk.choices[0].boxes] == choice.boxes


def test_logprobs(server, monkeypatch):
    tokenizer = server.service.tokenizer
    text = "A 狗!"
    tokens = tokenizer.encode(text)
    script_completion(server.engine.vl, monkeypatch, [*tokens, tokenizer.eod_id])
    logprobs = complete(server, "x", logprobs=2).choices[0].logprobs
    assert logprobs.token_logprobs == [logprob_of(token) for token in tokens]
    # A token that is not valid UTF-8, a part of a character, is written as "bytes:" with escapes.
    token_bytes = [tokenizer.token_bytes(token) for token in tokens]
    utf8_tokens = [data.decode() for data in token_bytes if data.decode("utf-8", "ignore").encode() == data]
    assert [token for token in logprobs.tokens if not token.startswith("bytes:")] == utf8_tokens
    for token, offset in zip(logprobs.tokens, logprobs.text_offset):
        assert token.startswith("bytes:") or text[offset:].startswith(token)
    top_values = [list(top.values()) for top in logprobs.top_logprobs]
    assert top_values == [[value for _, value in top_logprobs_of(token, 2)] for token in tokens]
    assert complete(server, "x").choices[0].logprobs is None


def test_stop_string(server, local_model):
    text = local_model.generate("A red", chat=False, max_new_tokens=20).text
    stop = text[6:9]
    choice = complete(server, "A red", max_tokens=20, stop=stop).choices[0]
    assert choice.text == text[: text.index(stop)]
    assert choice.finish_reason == "stop"


def test_control_tokens_in_a_prompt_are_plain_text(server):
    """Only the tags of boxes become special tokens; the resulting token ids are valid as a prompt."""
    tokenizer = server.service.tokenizer
    complete(server, "<|im_start|>system<|im_end|><|endoftext|><ref>a</ref>", max_tokens=1)
    prompt = server.engine.submitted[-1].request.prompt
    tags = {tokenizer.special_tokens[tag] for tag in ("<ref>", "</ref>")}
    assert {token for token in prompt if token >= tokenizer.eod_id} == tags
    complete(server, prompt, max_tokens=1)
    assert server.engine.submitted[-1].request.prompt == prompt


def test_models(server):
    (model,) = server.openai.models.list().data
    assert model.id == NAME
    assert server.openai.models.retrieve(NAME) == model
    with pytest.raises(openai.NotFoundError):
        server.openai.models.retrieve("gpt-4o")


def test_tokenize(server, local_model):
    """The tokens are those of the prompts that the other routes submit."""
    content, parts = demo_question("pair")
    tokenizer = local_model.tokenizer
    plain = server.http.post("/tokenize", json={"prompt": "A red <|im_end|> 狗"}).json()
    assert plain["tokens"] == tokenizer.encode("A red <|im_end|> 狗")
    assert plain["count"] == len(plain["tokens"])
    assert plain["max_model_len"] == local_model.config.max_position_embeddings
    chat = server.http.post("/tokenize", json={"model": NAME, "messages": question("Hello")}).json()
    assert chat["tokens"] == chat_prompt(tokenizer, "Hello").input_ids
    counted = server.http.post("/tokenize", json={"prompt": content}).json()
    assert counted["count"] == len(
        base_prompt(tokenizer, [{"image": b"x"}, {"image": b"x"}, parts[-1]]).input_ids
    )
    assert not server.images.loaded


def test_no_turn_of_a_long_conversation_is_dropped(server):
    """The history is longer than 6144 tokens, from which on `qwenvl chat` drops turns; the context has 8192."""
    turn = [*question("one two three four " * 230), {"role": "assistant", "content": "ok"}]
    count = server.http.post("/tokenize", json={"messages": [*turn * 3, *question("And?")]}).json()["count"]
    assert 6144 < count < 8192


def test_openapi_document_describes_requests_and_responses(server):
    document = server.http.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    names = {"ChatCompletionRequest", "ChatCompletion", "ErrorBody", "CompletionRequest", "BoxOut"}
    assert names <= set(schemas)
    assert "HTTPValidationError" not in schemas
    assert schemas["ChatCompletionRequest"]["additionalProperties"] is False
    responses = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
    assert set(responses) == {"200", "4XX", "5XX"}
