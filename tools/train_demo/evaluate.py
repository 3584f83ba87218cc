"""Score an exported model on held-out samples: both graphs, as users run them.

qwenvl export-vision --model_name_or_path MODEL --save_path OUT/vision/vision
qwenvl export-language --model_name_or_path MODEL --output_path OUT/text --model_prefix qwen
python -m tools.train_demo.evaluate OUT/vision/vision OUT/text/qwen --samples 1000
"""

from __future__ import annotations

import argparse
import time

from paddlemix_qwenvl_plugin import QwenVL
from paddlemix_qwenvl_plugin.demo_world.draw import draw
from paddlemix_qwenvl_plugin.demo_world.tasks import held_out
from paddlemix_qwenvl_plugin.evaluation.demo import mark, score, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("vision", help="prefix of the vision stage")
    parser.add_argument("language", help="prefix of the language stage")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first sample")
    parser.add_argument("--show", action="store_true", help="print every wrong answer")
    options = parser.parse_args()
    model = QwenVL.from_exported(options.vision, options.language)
    marks = []
    began = time.perf_counter()
    for number in range(options.first, options.first + options.samples):
        sample = held_out(number)
        images = [draw(scene) for scene in sample.scenes]
        answer = model.generate(sample.parts(images), chat=sample.form == "chat", max_new_tokens=200)
        marks.append(mark(sample, answer.text))
        if options.show and (not marks[-1].words_right or marks[-1].boxes_right < marks[-1].boxes):
            turn = sample.turns[0]
            print(f"{number} {turn.question!r}\n   want {turn.answer}\n   got  {answer.text}", flush=True)
    print(table(score(marks)))
    print(f"{(time.perf_counter() - began) / options.samples:.3f} s an answer")


if __name__ == "__main__":
    main()
