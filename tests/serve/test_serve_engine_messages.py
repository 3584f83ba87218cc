"""Messages between front and engine process: packed into bytes, unpacked from reads of any size."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from paddlemix_qwenvl_plugin import GenerationOptions
from paddlemix_qwenvl_plugin.serve.engine_api import EngineRequest
from paddlemix_qwenvl_plugin.serve.messages import Unpacker, pack, pack_request, unpack_request

headers = st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=20) | st.none(), max_size=4)


@settings(deadline=None)
@given(sent=st.lists(st.tuples(headers, st.binary(max_size=300)), max_size=5), data=st.data())
def test_unpacking_restores_packed_messages(sent, data):
    stream = b"".join(pack(header, [np.frombuffer(content, np.uint8)]) for header, content in sent)
    unpacker, received = Unpacker(), []
    while stream:
        n_bytes = data.draw(st.integers(1, len(stream)))
        received += unpacker.feed(stream[:n_bytes])
        stream = stream[n_bytes:]
    assert received == sent


def test_unpacking_restores_a_request():
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, [7, 7, 3]).astype(np.uint8) for _ in range(3)]
    options = GenerationOptions(max_new_tokens=9, temperature=0.3, top_k=4, seed=2**63)
    request = EngineRequest(range(9000), images, {4, 5}, options, [(2, 5), (9, 12)], 20, "an adapter")
    [(header, content)] = Unpacker().feed(pack_request(7, request))
    assert (header["kind"], header["number"]) == ("submit", 7)
    unpacked = unpack_request(header, content)
    assert list(unpacked.prompt) == list(range(9000))
    assert (set(unpacked.stop_token_ids), unpacked.options, unpacked.n_logprobs) == ({4, 5}, options, 20)
    assert (list(unpacked.generated), unpacked.adapter) == ([(2, 5), (9, 12)], "an adapter")
    np.testing.assert_array_equal(unpacked.images, images)
    assert content == b"".join(image.tobytes() for image in images)
    json.dumps(header)  # only JSON types: unlike pickle, unpacking executes no code
