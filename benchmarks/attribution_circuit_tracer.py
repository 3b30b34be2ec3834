"""circuit-tracer's side of attribution.py; runs in an environment of its own and imports nothing of this project.

Its TransformerLens loads models of known names from the hub only, so the model is put together from the folder's
configuration and weights by TransformerLens's own converter, and made a replacement model by circuit-tracer's own call.
"""

from __future__ import annotations

import importlib.metadata
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

REPEATS = 3


def open_model(folder: str, transcoders: Any) -> Any:
    """Return the replacement model of a Llama folder with ``transcoders`` in place."""
    from circuit_tracer.replacement_model.replacement_model_transformerlens import (  # type: ignore[import-not-found]
        TransformerLensReplacementModel,
    )
    from transformer_lens import HookedTransformerConfig  # type: ignore[attr-defined]
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, trust_remote_code=False)
    own = hf.config
    d_head = own.hidden_size // own.num_attention_heads
    # This release of transformers does not know where newer ones write it, and would take its default.
    rotary_base = json.loads((Path(folder) / "config.json").read_text())["rope_parameters"]["rope_theta"]
    config = HookedTransformerConfig(
        n_layers=own.num_hidden_layers,
        d_model=own.hidden_size,
        d_head=d_head,
        n_heads=own.num_attention_heads,
        n_key_value_heads=own.num_key_value_heads,
        d_mlp=own.intermediate_size,
        n_ctx=1024,
        d_vocab=own.vocab_size,
        act_fn=own.hidden_act,
        eps=own.rms_norm_eps,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=d_head,
        rotary_base=rotary_base,
        rotary_adjacent_pairs=False,
        gated_mlp=True,
        final_rms=True,
        model_name="llama-from-folder",
        original_architecture="LlamaForCausalLM",
        dtype=torch.float32,
        device="cpu",
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = TransformerLensReplacementModel(config, tokenizer=tokenizer, default_padding_side="right")
    model.load_and_process_state_dict(
        convert_llama_weights(hf, config), fold_ln=False, center_writing_weights=False, center_unembed=False
    )
    model._configure_replacement_model(transcoders)
    return model


def main(arguments: dict[str, Any]) -> dict[str, Any]:
    """Attribute, several times after a first; return the least seconds."""
    from circuit_tracer import attribute
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set  # type: ignore[import-not-found]

    torch.set_num_threads(1)
    folder = Path(arguments["folder"])
    prompt = json.loads((folder / "prompt.json").read_text())
    paths = {layer: str(folder / f"layer_{layer}.safetensors") for layer in range(prompt["n_layers"])}
    transcoders = load_transcoder_set(
        paths,
        scan="",
        feature_input_hook="mlp.hook_in",
        feature_output_hook="mlp.hook_out",
        device=torch.device("cpu"),
        lazy_encoder=False,
        lazy_decoder=False,
    )
    model = open_model(arguments["model"], transcoders)
    seconds, graph = [], None
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        graph = attribute(
            torch.tensor(prompt["tokens"]),
            model,
            attribution_targets=torch.tensor([prompt["next"]]),
            batch_size=arguments["batch"],
            max_feature_nodes=arguments["n_features"],
        )
        seconds.append(time.perf_counter() - started)
    if "write" in arguments:
        n, n_layers = len(prompt["tokens"]), prompt["n_layers"]
        row = graph.adjacency_matrix[-1]
        start = len(graph.selected_features)
        errors = row[start : start + n_layers * n].view(n_layers, n)
        tokens = row[start + n_layers * n : start + (n_layers + 1) * n]
        contributions = {"tokens": tokens.tolist(), "errors": errors[:, 1:].flatten().tolist()}
        Path(arguments["write"]).write_text(json.dumps(contributions))
    names = ("circuit-tracer", "transformer-lens", "transformers", "torch")
    return {
        "seconds": min(seconds[1:]),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
