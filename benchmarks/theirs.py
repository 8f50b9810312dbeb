"""The int8 backends of sentence-transformers, in an interpreter that has them; started by encoding.py --theirs.

Talks in lines of JSON. The first line names a bundle, a folder for copies of it, texts to calibrate on and the number
of threads; the answer, the backends that this interpreter has, whose models are then ready. Each line after it names
a backend, a model of the bundle, texts (or pairs of them) and a file; the answer is the seconds that their vectors
(or scores), now in the file, have taken, tokenising included.

Models are quantised by sentence-transformers' own helpers: ONNX dynamically, for AVX512-VNNI; OpenVINO statically, on
the texts.
"""

import json
import os
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

# What libraries print must not mix with the answers.
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

BACKENDS = {"onnx": "onnxruntime", "openvino": "openvino"}
KINDS = {"retriever": "SentenceTransformer", "reranker": "CrossEncoder"}
SPLIT, COLUMN = "train", "text"


def main() -> None:
    wanted = json.loads(sys.stdin.readline())
    import torch

    torch.set_num_threads(wanted["threads"])
    backends = [name for name, package in BACKENDS.items() if find_spec(package)]
    models = {(backend, model): prepare(backend, model, wanted) for backend in backends for model in KINDS}
    answer({"backends": backends})
    for line in sys.stdin:
        request = json.loads(line)
        model = models[request["backend"], request["model"]]
        compute = model.encode if request["model"] == "retriever" else model.predict
        texts = [text if isinstance(text, str) else tuple(text) for text in request["texts"]]
        start = time.perf_counter()
        values = compute(texts)
        seconds = time.perf_counter() - start
        np.save(request["file"], values)
        answer({"seconds": seconds})


def prepare(backend: str, model: str, wanted: dict[str, Any]) -> Any:
    """A model of the bundle, quantised for a backend."""
    import sentence_transformers

    kind = getattr(sentence_transformers, KINDS[model])
    folder = Path(wanted["folder"]) / f"{backend}-{model}"
    shutil.copytree(Path(wanted["bundle"]) / model, folder)
    exact = kind(str(folder), backend=backend, device="cpu")
    if backend == "onnx":
        import onnxruntime

        sentence_transformers.export_dynamic_quantized_onnx_model(exact, "avx512_vnni", str(folder))
        file_name, options = "onnx/model_qint8_avx512_vnni.onnx", onnxruntime.SessionOptions()
        options.intra_op_num_threads = wanted["threads"]
        settings = {"session_options": options}
    else:
        texts = folder / "texts"
        texts.mkdir()
        with (texts / f"{SPLIT}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({COLUMN: text}) + "\n" for text in wanted["texts"][model])
        sentence_transformers.export_static_quantized_openvino_model(
            exact, None, str(folder), str(texts), "default", SPLIT, COLUMN
        )
        file_name = "openvino/openvino_model_qint8_quantized.xml"
        settings = {"ov_config": {"INFERENCE_NUM_THREADS": wanted["threads"]}}
    return kind(str(folder), backend=backend, device="cpu", model_kwargs={"file_name": file_name, **settings})


def answer(value: dict[str, Any]) -> None:
    print(json.dumps(value), file=ANSWERS, flush=True)


if __name__ == "__main__":
    main()
