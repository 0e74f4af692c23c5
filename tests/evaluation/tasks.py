"""Tasks for lm-evaluation-harness whose data is files beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STOP = "e"
MULTIPLE_CHOICE = """
task: known_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
GENERATION = """
task: known_text
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/text.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: answer
generation_kwargs: {until: ["STOP"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """
task: known_perplexity
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rolling.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
"""


def write_tasks(folder: Path, data: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """The tasks known_choice, known_text and known_perplexity in `folder`, with the rows of "choice", "text" and
    "rolling"."""
    for name, text in (("choice", MULTIPLE_CHOICE), ("text", GENERATION), ("rolling", ROLLING)):
        lines = "".join(json.dumps(row) + "\n" for row in data[name])
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        filled = text.replace("FOLDER", str(folder)).replace("STOP", STOP)
        (folder / f"{name}.yaml").write_text(filled, encoding="utf-8")
    return folder
