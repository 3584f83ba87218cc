"""Answer queries with the Predictor of a deploy/qwen_vl folder, and write the token ids to a JSON file.

Run by test_paddlemix.py, on a fake PaddleMIX and on a checkout; the Predictor is adapted by the plugin's hook.

drive_predictor.py DEPLOY_FOLDER VISION_PREFIX LANGUAGE_PREFIX MODEL_FOLDER QUERIES_AS_JSON OUTPUT
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

deploy, vision, language, model, queries, output = sys.argv[1:]
sys.path.insert(0, deploy)
from run_static_predict import Predictor  # noqa: E402

predictor = Predictor(
    argparse.Namespace(
        first_model_path=vision,
        second_model_path=language,
        model_name_or_path=model,
        device="gpu",  # the flag's default; without a GPU, the adapted Predictor takes the CPU
    )
)
answers = []
for query in json.loads(queries):
    inputs = predictor.processor(query=query, return_tensors="pd")
    features = predictor.encode_images(inputs["images"])
    tokens, _ = predictor.generate_with_image_features(features, inputs["input_ids"])
    answers.append({"input_ids": inputs["input_ids"].tolist(), "tokens": tokens})
Path(output).write_text(json.dumps(answers))
