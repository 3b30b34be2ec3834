"""SAEDashboard's generation of feature pages' data, in its own environment.

Its language model is one layer of attention and no vocabulary to speak of, so that what is timed is what it does with
features. Its SAE has the planted encoder and decoder.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from importlib.metadata import version
from typing import Any

import numpy as np
import torch


def main(arguments: dict[str, Any]) -> None:
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner

    torch.set_num_threads(1)
    encoder, decoder = (
        torch.from_numpy(np.load(f"{arguments['folder']}/{name}.npy")) for name in ("encoder", "decoder")
    )
    model = _small_model(encoder.shape[1])
    sae = _sae(encoder, decoder, arguments["threshold"])
    generator = torch.Generator().manual_seed(0)
    n_prompts = arguments["n_rows"] // 128
    tokens = torch.randint(1, model.cfg.d_vocab, (n_prompts, 128), generator=generator)
    config = SaeVisConfig(
        hook_point=sae.cfg.metadata.hook_name,
        features=list(range(arguments["n_features"])),
        minibatch_size_features=arguments["n_features"],
        minibatch_size_tokens=64,
        device="cpu",
        dtype="float32",
    )
    start = time.process_time()
    found = SaeVisRunner(config).run(encoder=sae, model=model, tokens=tokens)
    seconds = time.process_time() - start
    assert len(found.feature_data_dict) == arguments["n_features"]
    print(json.dumps({"seconds": seconds, "version": version("sae-dashboard")}))


def _small_model(width: int) -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformers import AutoTokenizer

    config = HookedTransformerConfig(
        n_layers=1, d_model=width, n_ctx=128, d_head=64, n_heads=1, d_vocab=1000, attn_only=True, seed=0, device="cpu"
    )
    model = HookedTransformer(config)
    with tempfile.TemporaryDirectory() as folder:
        # TransformerLens loads it anew from where it lies
        _tokenizer(config.d_vocab).save_pretrained(folder)
        model.set_tokenizer(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    return model


def _tokenizer(n_tokens: int) -> Any:
    """Return one whose tokens' text is their number."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({str(token): token for token in range(n_tokens)}, unk_token="0")
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **special)


def _sae(encoder: torch.Tensor, decoder: torch.Tensor, threshold: float) -> Any:
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    metadata = SAEMetadata(model_name="none", hook_name="blocks.0.hook_resid_post")
    sae = StandardSAE(StandardSAEConfig(d_in=encoder.shape[1], d_sae=encoder.shape[0], metadata=metadata, device="cpu"))
    with torch.no_grad():
        sae.W_enc.copy_(encoder.T)
        sae.W_dec.copy_(decoder)
        sae.b_enc.fill_(-threshold)
    return sae


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
