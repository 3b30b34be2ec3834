-- How sparse and how faithful each transcoder is, with its dead and dense features; of a folder of tables, one line each.
-- needs layers
SELECT site, n_rows, d_sae, l0_mean, l0_p50, l0_p99, fvu, n_dead, dead_fraction, n_dense
FROM layers
ORDER BY site
