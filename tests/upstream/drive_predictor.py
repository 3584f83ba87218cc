"""Answer queries with a deploy/qwen_vl folder's Predictor, write token ids to a JSON file; run as a process."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

deploy, first, second, model, queries, out = sys.argv[1:]
sys.path.insert(0, deploy)
from run_static_predict import Predictor  # noqa: E402

predictor = Predictor(
    argparse.Namespace(
        first_model_path=first, second_model_path=second, model_name_or_path=model, device="gpu"
    )
)
answers = []
for query in json.loads(queries):
    inputs = predictor.processor(query=query, return_tensors="pd")
    features = predictor.encode_images(inputs["images"])
    tokens, _ = predictor.generate_with_image_features(features, inputs["input_ids"])
    answers.append({"input_ids": inputs["input_ids"].tolist(), "tokens": tokens})
Path(out).write_text(json.dumps(answers))
