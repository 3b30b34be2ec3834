"""Environments of the packages that read our exports, and how a script runs in one."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any, NamedTuple

from benchmarks.peers import environment


class Releases(NamedTuple):
    """What an environment has; torch is the release that this project pins."""

    requirements: list[str]
    without: tuple[str, ...] = ()
    """Taken out again."""
    alone: tuple[str, ...] = ()
    """Installed without what it requires."""


SAELENS_YEAR_OLD = "saelens_year_old"
# pyarrow's later releases want numpy 2, and TransformerLens 2 wants numpy 1
_LENS_2 = ["transformer-lens==2.18.0", "pyarrow==21.0.0"]
ENVIRONMENTS = {
    "saelens": Releases(["sae-lens==6.54.12", "psutil"]),
    "saelens_lens2": Releases(["sae-lens==6.54.12", "psutil", *_LENS_2]),
    SAELENS_YEAR_OLD: Releases(["sae-lens==6.22.3", "psutil", "transformer-lens==2.16.1", "pyarrow==21.0.0"]),
    "circuit_tracer": Releases(["circuit-tracer==0.5.0", "psutil"]),
    "circuit_tracer_lens2": Releases(["circuit-tracer==0.5.0", "psutil", *_LENS_2]),
    "sparsify": Releases(["eai-sparsify==1.3.3"]),
    "sparsify_year_old": Releases(["eai-sparsify==1.2.2"]),
    # vLLM and bitsandbytes, which it requires too, are for explaining with a language model, on a GPU
    "delphi": Releases(
        ["eai-sparsify==1.3.3", "asyncer", "blobfile", "faiss-cpu", "orjson", "sentence-transformers", "aiofiles"],
        alone=("eai-delphi==0.1.3",),
    ),
    "dictionary_learning": Releases(["dictionary-learning==0.1.0"], without=("torchvision",)),
}
"""By name: the newest release, and one about a year old where there is one; circuit-tracer has one on PyPI."""
SAELENS, CIRCUIT_TRACER, SPARSIFY = (
    [name for name in ENVIRONMENTS if name.startswith(prefix)] for prefix in ("saelens", "circuit_tracer", "sparsify")
)

LOAD_MODEL = """
import json, shutil, sys, tempfile
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2LMHeadModel
given = json.loads(sys.argv[1])
published = GPT2LMHeadModel.from_pretrained(given["model"]).float()
# transformers 5 writes a name of the tokenizer's class that 4 does not know
copied = Path(tempfile.mkdtemp())
about = json.loads((Path(given["model"]) / "tokenizer_config.json").read_text())
(copied / "tokenizer_config.json").write_text(json.dumps({**about, "tokenizer_class": "PreTrainedTokenizerFast"}))
shutil.copy(Path(given["model"]) / "tokenizer.json", copied)
tokenizer = AutoTokenizer.from_pretrained(copied)
"""
"""Reads a script's argument, and the folder of a GPT-2 in it."""
LOAD_HOOKED = (
    LOAD_MODEL
    + """
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
def load(model_class, **processing):
    shape = published.config
    config = HookedTransformerConfig(
        n_layers=shape.n_layer, d_model=shape.n_embd, n_heads=shape.n_head, d_head=shape.n_embd // shape.n_head,
        d_mlp=4 * shape.n_embd, n_ctx=shape.n_positions, d_vocab=shape.vocab_size, act_fn="gelu_new",
        normalization_type="LN", eps=shape.layer_norm_epsilon,
    )
    model = model_class(config, tokenizer=tokenizer)
    nothing = dict(fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False)
    model.load_and_process_state_dict(convert_gpt2_weights(published, config), **{**nothing, **processing})
    return model
"""
)
"""The same with ``load``, which makes a class of TransformerLens of it: of a local folder, its own loader cannot."""


def run_in(name: str, script: str, arguments: dict[str, Any]) -> None:
    """Run a script in an environment, made at first use, with one JSON argument."""
    releases = ENVIRONMENTS[name]
    python = environment(name, releases.requirements, without=releases.without, alone=releases.alone)
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [str(python), "-c", script, json.dumps(arguments)], capture_output=True, text=True, env=variables, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
