"""Kinds of transcoders by what their manifests call them, for readers that need no torch."""

CROSS_LAYER_KIND = "cross_layer_transcoder"
"""One transcoder over several layers."""

FOR_ONE_LAYER_ONLY = {
    CROSS_LAYER_KIND: (
        "tables, scores and tasks are of one layer each; pipeline analyze makes tables of every layer of a cross-layer "
        "transcoder, which can also be given to pipeline evaluate, pipeline circuit, and pipeline export --to "
        "circuit-tracer"
    )
}
"""What to say, by the kind that was given, where a transcoder of one layer, or tables, are wanted."""
