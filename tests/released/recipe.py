"""One tiny artifact of every kind and layout: the command lines that make them, as a user types them.

Every path is relative to the folder they are made in, so that nothing in an artifact names a machine.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from tests.support.cache_jobs import Kill

MODEL, TEXT, TASK = "model", "text.jsonl", "task.jsonl"
"""What the first step reads: a random model, its text, and prompts with answers."""

_MODEL = f"--model {MODEL} --dataset {TEXT} --context-length 16 --contexts-per-batch 4"
_TEXT = f"{_MODEL} --holdout 1"
_ROWS = "--shard-rows 64 --chunk-rows 16"
_LITTLE = f"{_MODEL} --holdout 0 --layers all --tokens 48 {_ROWS}"
_RUN = "--d-sae 16 --batch-rows 32 --steps 12 --lr 0.01 --log-every 4 --evaluate-every 6 --precision float32"
_TABLES = "--cache caches/float32 --examples 2 --bands 2 --band-examples 1 --random-examples 1"
_WINDOW = "--window-before 4 --window-after 4"
_CIRCUIT = "circuit 'the people of the government' --iterations 2 --branches 3 --max-features 4"


@dataclass(frozen=True)
class Step:
    """One command line and what it makes; a step that is killed leaves unfinished work."""

    output: str
    line: str
    kill: Kill | None = None

    @property
    def arguments(self) -> list[str]:
        """The command line, split into words."""
        return shlex.split(self.line.format(out=self.output))


STEPS = (
    # caches: every stored type, compressed and not; grown; with its epoch written; of one hook
    Step("caches/float32", f"cache {_TEXT} --layers all --tokens 256 {_ROWS} --storage-dtype float32 --out {{out}}"),
    Step("caches/float32-zstd", f"cache {_LITTLE} --storage-dtype float32 --compression zstd --out {{out}}"),
    Step("caches/bfloat16", f"cache {_LITTLE} --storage-dtype bfloat16 --out {{out}}"),
    Step("caches/bfloat16-blosc", f"cache {_LITTLE} --storage-dtype bfloat16 --compression blosc-zstd --out {{out}}"),
    Step("caches/float16-gzip", f"cache {_LITTLE} --storage-dtype float16 --compression gzip --out {{out}}"),
    Step("caches/int8", f"cache {_LITTLE} --storage-dtype int8 --out {{out}}"),
    Step("caches/int8-lz4", f"cache {_LITTLE} --storage-dtype int8 --compression lz4 --out {{out}}"),
    Step("caches/grown", f"cache {_TEXT} --layers 0 --tokens 100 {_ROWS} --storage-dtype float32 --out {{out}}"),
    Step("caches/grown", "extend {out} --tokens 150"),
    Step("caches/grown", "widen {out} --layers 1"),
    Step("caches/grown", "shuffle {out} --epoch 1 --seed 3"),
    Step(
        "caches/one-hook",
        f"cache {_TEXT} --hooks blocks.1.mlp.hook_out --hooks blocks.0.attn.hook_z[1] --tokens 96 {_ROWS} "
        "--storage-dtype float32 --out {out}",
    ),
    # transcoders
    Step("transcoders/relu", f"train caches/float32 --site layer1 --architecture relu --l1 0.01 {_RUN} --out {{out}}"),
    Step("transcoders/topk", f"train caches/float32 --site layer1 --architecture topk --k 4 {_RUN} --out {{out}}"),
    Step("transcoders/layer0", f"train caches/float32 --site layer0 --architecture topk --k 4 {_RUN} --out {{out}}"),
    Step(
        "transcoders/batch_topk",
        f"train caches/float32 --site layer1 --k 4 {_RUN} --snapshots 1 --keep-best --max-norm-multiple 2 "
        "--out {out}",
    ),
    Step("transcoders/jumprelu", f"train caches/float32 --site layer1 --architecture jumprelu {_RUN} --out {{out}}"),
    Step("transcoders/gated", f"train caches/float32 --site layer1 --architecture gated {_RUN} --out {{out}}"),
    Step(
        "transcoders/matryoshka",
        f"train caches/float32 --site layer1 --architecture matryoshka --k 4 --levels 2 {_RUN} --out {{out}}",
    ),
    Step(
        "transcoders/skip",
        f"train caches/float32 --site layer1 --architecture topk --k 4 --skip {_RUN} --ema 0.9 --out {{out}}",
    ),
    Step(
        "transcoders/sae",
        f"train caches/one-hook --site blocks.1.mlp.hook_out --architecture topk --k 4 {_RUN} --out {{out}}",
    ),
    Step(
        "transcoders/live",
        f"train --live {_TEXT} --layers 1 --k 4 {_RUN} --buffer-rows 128 --heldout-rows 64 --storage-dtype float32 "
        "--out {out}",
    ),
    Step("transcoders/cross-layer", f"train caches/float32 --cross-layer --k 4 {_RUN} --out {{out}}"),
    Step("sweep", f"train caches/float32 --site layer1 --sweep k=2,4 {_RUN} --out {{out}}"),
    Step(
        "layers",
        f"circuits-model --model {MODEL} --dataset {TEXT} --tokens 128 --context-length 16 --holdout 1 --d-sae 16 "
        "--k 4 --steps 6 --batch-rows 32 --out {out}",
    ),
    # what is made of them
    Step("tables/topk", f"analyze transcoders/topk {_TABLES} {_WINDOW} --out {{out}}"),
    Step("tables/relu", f"analyze transcoders/relu {_TABLES} --without-model {_WINDOW} --out {{out}}"),
    Step(
        "tables/layer0", f"analyze transcoders/layer0 {_TABLES} --downstream transcoders/topk {_WINDOW} --out {{out}}"
    ),
    Step("tables/cross-layer", f"analyze transcoders/cross-layer {_TABLES} {_WINDOW} --out {{out}}"),
    Step("tables/bare", f"analyze transcoders/skip {_TABLES} --activations none --without-model --out {{out}}"),
    Step(
        "tables/live",
        f"analyze transcoders/live --live --dataset {TEXT} --rows 96 --context-length 16 --contexts-per-batch 4 "
        "--examples 2 --activations none --out {out}",
    ),
    Step("evaluations/layers", "evaluate transcoders/layer0 transcoders/topk --cache caches/float32 --out {out}"),
    Step("evaluations/cross-layer", "evaluate transcoders/cross-layer --cache caches/float32 --out {out}"),
    Step(
        "circuits/logit",
        f"{_CIRCUIT} --logit of --transcoders transcoders/layer0 --transcoders transcoders/topk --tables tables/topk "
        "--out {out}",
    ),
    Step("circuits/cross-layer", f"{_CIRCUIT} --logit of --transcoders transcoders/cross-layer --out {{out}}"),
    Step("task", f"task {TASK} --transcoder transcoders/topk --kept 0 --kept 4 --leave-out 2 --out {{out}}"),
    Step("dashboards/topk", "dashboard tables/topk --feature 0-5 --window 4 --out {out}"),
    Step("dashboards/blind", "dashboard tables/topk --feature 0-3 --window 4 --blind --out {out}"),
    Step(
        "blind/draw", "blind draw --tables tables/topk --tables tables/relu --n 2 --min-active 1 --window 4 --out {out}"
    ),
    Step("blind/study", "blind study begin {out} --tables tables/topk --seed 3"),
    Step("blind/study", "blind study view {out} 1"),
    Step("blind/study", "blind study hypothesis {out} 'articles before nouns'"),
    # other tools' formats, and a transcoder taken over from one
    Step("exports/saelens", "export transcoders/jumprelu --to saelens --fold-norm --out {out}"),
    Step("exports/saelens-topk", "export transcoders/topk --to saelens --cache caches/float32 --out {out}"),
    Step("exports/saelens-sae", "export transcoders/sae --to saelens --out {out}"),
    Step(
        "exports/circuit-tracer",
        "export transcoders/layer0 transcoders/topk --to circuit-tracer --cache caches/float32 --scan tiny --out {out}",
    ),
    Step("exports/cross-layer", "export transcoders/cross-layer --to circuit-tracer --out {out}"),
    Step("exports/sparsify", "export transcoders/layer0 transcoders/topk --to sparsify --out {out}"),
    Step("exports/features", "export tables/layer0 tables/topk --to circuit-tracer-features --out {out}"),
    Step("exports/delphi", "export tables/topk --to delphi --cache caches/float32 --out {out}"),
    Step(
        "imports/layer",
        "import exports/circuit-tracer/layer_1.safetensors --from circuit-tracer --cache caches/float32 --out {out}",
    ),
    Step("imports/cross-layer", "import exports/cross-layer --from circuit-tracer --cache caches/float32 --out {out}"),
    # unfinished work: killed with some of it on disk
    Step(
        "drafts/cache",
        f"cache {_TEXT} --layers 1 --tokens 192 {_ROWS} --storage-dtype float32 --out {{out}}",
        Kill(1, "train-unit-000001", True),
    ),
    Step("drafts/grown", f"cache {_TEXT} --layers 0 --tokens 80 {_ROWS} --storage-dtype float32 --out {{out}}"),
    Step("drafts/grown", "extend {out} --tokens 200", Kill(1, "train-unit-000001", True)),
    Step(
        "drafts/transcoder",
        f"train caches/float32 --site layer1 --k 4 {_RUN} --snapshots 1 --ema 0.9 --auxiliary auxk "
        "--dead-after-steps 4 --checkpoint-steps 4 --out {out}",
        Kill(1, "000000008.safetensors", True),
    ),
    Step(
        "drafts/live",
        f"train --live {_TEXT} --layers 1 --k 4 {_RUN} --buffer-rows 128 --heldout-rows 64 --storage-dtype float32 "
        "--checkpoint-steps 4 --out {out}",
        Kill(1, "000000008.safetensors", True),
    ),
    Step(
        "drafts/sweep",
        f"train caches/float32 --site layer1 --sweep k=2,4 {_RUN} --checkpoint-steps 4 --out {{out}}",
        Kill(2, "000000004.safetensors", True),
    ),
    Step(
        "drafts/cross-layer",
        f"train caches/float32 --cross-layer --k 4 {_RUN} --checkpoint-steps 4 --out {{out}}",
        Kill(1, "000000008.safetensors", True),
    ),
)
