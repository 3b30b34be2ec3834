"""What a transcoder means: feature tables, evaluation, dashboards and circuits. Loads no language model."""
