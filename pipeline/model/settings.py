"""The settings of a language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from tailrace.storage.settings import Settings


class ModelSettings(Settings):
    """Which language model, and in what form."""

    help_sections: ClassVar = {"model": "Language model"}

    model: str
    """Language model: a name on the Hugging Face hub, or a folder in its format."""

    revision: str | None = None
    """Branch, tag or commit on the hub; by default the newest. The commit it stands for is recorded."""

    model_dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    """What the model computes in; auto is the checkpoint's own dtype, but float32 for float16 on a CPU."""

    processing: Literal["raw", "compatibility"] = "raw"
    """raw: weights as published. compatibility: norms folded in and weights centred, as HookedTransformer did."""

    bos_token_id: int | None = None
    """Token that begins every context; by default the tokenizer's BOS, else that of config.json, else the EOS."""

    def in_dtype_of(self, identity: Mapping[str, Any]) -> Self:
        """Return settings that ask for the dtype in a recorded ``identity``, if it is there: ``auto`` depends on the
        device.
        """
        dtype = identity.get("dtype")
        return self if dtype is None else self.model_copy(update={"model_dtype": dtype})
