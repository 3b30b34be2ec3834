"""Ready queries, each on a few rows whose answer can be worked out by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tailrace.analysis.evaluate.evaluation import TOKEN_SCHEMA as TOKENS
from tailrace.analysis.tables import EVERY_TABLE
from tailrace.pipeline import cli
from tailrace.pipeline.query import saved as queries
from tailrace.pipeline.query import stage as query
from tailrace.pipeline.query.__main__ import queries_page
from tailrace.pipeline.query.views import Tables, find_views
from tailrace.storage.draft import Draft
from tailrace.storage.errors import ActionableError, SettingsError
from tailrace.storage.tables import column, write_table
from tests.support.paths import DOCS

PAGE = DOCS / "guides" / "queries.md"


def publish(path: Path, tables: dict[str, pa.Table], kind: str = "tables") -> Path:
    """Publish tables as an artifact; a name with a slash is a part of a table in a folder."""
    with Draft(path, kind, {}) as draft:
        for name, table in tables.items():
            (path / name).parent.mkdir(exist_ok=True)
            write_table(path / f"{name}.parquet", table.schema, table.to_batches())
        draft.publish({}, [f"{name}.parquet" for name in tables])
    return path


def rows(**columns: list[Any]) -> pa.Table:
    return pa.table(columns)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three features over six rows of two contexts; the tokens are a b a | b a c, in documents 5 and 6."""
    return publish(
        tmp_path_factory.mktemp("saved") / "tables",
        {
            "features": rows(
                feature=[0, 1, 2],
                frequency=[0.5, 1 / 6, 0.5],
                n_active=[3, 1, 3],
                mean=[2.0, 9.0, 1.0],
                max=[3.0, 9.0, 1.5],
                top_token=[" a", " c", " b"],
                top_token_share=[1.0, 1.0, 0.5],
                promoted_token_ids=[[1, 2], [2, 3], [3, 1]],
                promoted_tokens=[[" a", " b"], [" b", " c"], [" c", " a"]],
                promoted_logits=[[4.0, 1.0], [3.0, 2.0], [5.0, 0.5]],
                suppressed_tokens=[[" c"], [" a"], [" b"]],
                nearest_features=[[1], [0], [1]],
                nearest_cosines=[[0.3], [0.3], [0.1]],
            ),
            "examples": rows(
                feature=[0, 0, 0, 1],
                kind=["top", "random", "random", "top"],
                activation=[3.0, 3.0, 1.0, 9.0],
                row=[2, 2, 0, 5],
                document=[5, 5, 5, 6],
                position=[3, 3, 1, 3],
                token=[" a", " a", " a", " c"],
                window_start=[1, 1, 0, 2],
                window_tokens=[[" a", " b", " a"], [" a", " b", " a"], ["<s>", " a", " b"], [" a", " c"]],
            ),
            "layers": rows(site=["layer0"], n_rows=[6]),
            "rows": rows(
                row=list(range(6)),
                token=[" a", " b", " a", " b", " a", " c"],
                context=[0, 0, 0, 1, 1, 1],
                position=[1, 2, 3, 1, 2, 3],
                document=[5, 5, 5, 6, 6, 6],
            ),
            "activations/features-000000-000002": rows(
                feature=[0, 0, 0, 1], row=[0, 2, 4, 5], activation=[1.0, 3.0, 2.0, 9.0]
            ),
            "activations/features-000002-000003": rows(
                feature=[2, 2, 2], row=[1, 2, 3], activation=[1.5, 0.5, 1.0]
            ),
            "coactivation": rows(
                feature=[0, 2, 2],
                other=[2, 0, 1],
                n_both=[1, 1, 0],
                jaccard=[0.2, 0.2, 0.0],
                phi=[-0.3, -0.3, -0.4],
                rank=[0, 0, 1],
            ),
            "connections": rows(
                feature=[0, 0, 0, 0, 1, 1],
                kind=["token", "head", "feature", "feature", "feature", "feature"],
                rank=[0, 0, 0, -1, 0, -1],
                layer=[None, 0, 1, 1, 1, 1],
                head=[None, 3, None, None, None, None],
                site=[None, None, "layer1", "layer1", "layer1", "layer1"],
                other=[None, None, 7, 8, 7, 9],
                token=[" a", None, None, None, None, None],
                weight=[5.0, 6.0, 0.75, -1.5, 2.0, -0.5],
            ),
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Position 0 is not replaced; the second context was not evaluated at its last position, which predicts nothing."""
    return publish(
        tmp_path_factory.mktemp("saved") / "evaluation",
        {
            "tokens": rows(
                sites=["layer0"] * 6 + ["all sites"],
                context=[0, 0, 0, 1, 1, 1, 0],
                position=[0, 1, 2, 0, 1, 2, 1],
                replaced=[False, True, True, False, True, True, True],
                delta=[9.0, 1.0, 2.0, 9.0, 4.0, 1.0, 50.0],
            )
        },
        kind="evaluation",
    )


def ask(name: str, *places: Path, **values: Any) -> list[dict[str, Any]]:
    saved = queries.saved_query(name)
    parameters = saved.values([f"{key}={value}" for key, value in values.items()])
    return query.select(saved.sql, list(places), parameters).to_pylist()


@pytest.fixture(scope="module")
def told(tables: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tables of three dictionaries over the rows above, one of them of other rows, and what is known of documents."""
    root = tmp_path_factory.mktemp("told")
    own = {name: pq.read_table(tables / f"{name}.parquet") for name in ("rows", "layers")}
    own["rows"] = own["rows"].append_column("token_id", pa.array([1, 2, 1, 2, 1, 3]))
    moved = own["rows"].set_column(2, "context", pa.array([7] * 6))
    features = rows(
        feature=[0, 1, 2, 3],
        is_dead=[False, True, True, False],
        n_active=[200, 0, 0, 99],
        max=[8.0, None, None, 90.0],
        p99=[4.0, None, None, 1.0],
        p50=[1.0, None, None, 1.0],
        frequency=[0.5, 0.0, 0.0, 0.1],
        top_token=[" a", None, None, " b"],
        encoder_norm=[1.0, 0.5, 0.25, 1.0],
        encoder_bias=[0.0, -1.0, -2.0, 0.0],
        promoted_tokens=[[" a"], [" b"], [" c"], [" d"]],
        nearest_features=[[1, 3], [2, 0], [1, 3], [0, 1]],
        nearest_cosines=[[0.9, 0.1], [0.99, 0.9], [0.99, 0.2], [0.1, 0.0]],
    )
    # features 5 and 6 stand for 0 of the first dictionary: 5 is twice it on every row, 6 fires half as often
    other = rows(feature=[5, 5, 5, 6, 6], row=[0, 2, 4, 2, 5], activation=[2.0, 6.0, 4.0, 1.0, 1.0])
    names = rows(feature=[5, 6], top_token=["five", "six"])
    documents = rows(document=[5, 6], split=["heldout"] * 2, lang=["en", None], id=[70, 71])
    own_pairs = pa.concat_tables(
        pq.read_table(tables / "activations" / f"features-{part}.parquet")
        for part in ("000000-000002", "000002-000003")
    )
    part = "activations/features-000000-000006"
    return {
        "a": publish(root / "a", {"features": features, part: own_pairs, "documents": documents, **own}),
        "b": publish(root / "b", {"features": names, part: other, **own}),
        "moved": publish(root / "moved", {"features": names, part: other, "rows": moved}),
    }


def test_dead_features_come_with_the_live_one_they_are_nearest_to(told: dict[str, Path]) -> None:
    found = ask("dead", told["a"])
    assert [(row["feature"], row["nearest_live"], row["cosine"]) for row in found] == [(1, 0, 0.9), (2, 3, 0.2)]


def test_an_outlier_is_a_maximum_far_above_the_99th_percentile(told: dict[str, Path]) -> None:
    assert [(row["feature"], row["times_p99"]) for row in ask("outliers", told["a"])] == [(0, 2)]
    found = ask("outliers", told["a"], min_rows=1)
    assert [(row["feature"], row["times_p99"]) for row in found] == [(3, 90), (0, 2)]


def test_a_context_is_shown_token_by_token_with_its_strongest_features(tables: Path) -> None:
    found = ask("context", tables, context=0, top=1)
    assert [(row["token"], row["n_active"], row["features"]) for row in found] == [
        (" a", 1, [0]),
        (" b", 1, [2]),
        (" a", 2, [0]),
    ]
    assert [row["features"] for row in ask("context", tables, context=0)][2] == [0, 2]
    assert [row["n_active"] for row in ask("context", tables, context=1)] == [1, 1, 1]


def test_a_features_documents_are_told_by_what_the_dataset_says(told: dict[str, Path]) -> None:
    # feature 0 is active on rows 0, 2 of document 5 and row 4 of document 6: half of all six rows
    found = ask("feature-documents", told["a"], min_rows=1)
    assert [(row["column"], row["value"], row["n_active"], row["n_rows"]) for row in found] == [
        ("id", "70", 2, 3),
        ("lang", "en", 2, 3),
        ("id", "71", 1, 3),
    ]
    assert [row["lift"] for row in found] == pytest.approx([4 / 3, 4 / 3, 2 / 3])
    assert ask("feature-documents", told["a"], feature=9) == []


def test_features_of_a_kind_of_document_are_ranked_by_their_lift(told: dict[str, Path]) -> None:
    # of document 5's three rows feature 0 has two of its three, and feature 2 too; feature 1 fires in document 6 alone
    found = ask("column-features", told["a"], min_active=1)
    assert [(row["feature"], row["n_active"]) for row in found] == [(0, 2), (2, 2)]
    assert [row["lift"] for row in found] == pytest.approx([4 / 3, 4 / 3])
    assert [row["feature"] for row in ask("column-features", told["a"], column="id", value=71, min_active=1)] == [
        1,
        0,
        2,
    ]


def test_layers_are_summed_up_one_line_each(tables: Path, tmp_path: Path) -> None:
    columns = [field.name for table in EVERY_TABLE if table.name == "layers" for field in table.schema]
    facts: dict[str, list[Any]] = {name: [None] for name in columns} | {
        "site": ["layer3"],
        "l0_mean": [8.0],
        "n_dead": [2],
    }
    [row] = ask("layers", publish(tmp_path / "layers", {"layers": rows(**facts)}))
    assert (row["site"], row["l0_mean"], row["n_dead"]) == ("layer3", 8.0, 2)


def test_features_of_two_dictionaries_are_matched_by_how_they_fire(told: dict[str, Path]) -> None:
    saved = queries.saved_query("matched-features")
    found = query.select(saved.sql, {"a": told["a"], "b": told["b"]}, saved.values([])).to_pylist()
    # 0 of a is (1, 0, 3, 0, 2, 0); 5 of b is twice that; 6 is (0, 0, 1, 0, 0, 1); 1 of a is 9 on row 5
    assert [(row["a"], row["b"], row["n_both"], row["b_top_token"]) for row in found[:2]] == [
        (0, 5, 3, "five"),
        (1, 6, 1, "six"),
    ]
    assert found[0]["correlation"] == pytest.approx(1)
    assert found[1]["correlation"] == pytest.approx(np.corrcoef([0, 0, 0, 0, 0, 9], [0, 0, 1, 0, 0, 1])[0, 1])
    assert found[0]["jaccard"] == 1
    assert query.select(saved.sql, {"a": told["a"], "b": told["moved"]}, saved.values([])).num_rows == 0
    with pytest.raises(SettingsError, match="Give tables these names: --tables a=PATH --tables b=PATH"):
        saved.check_tables([view.sql_name for view in find_views(told["a"])])


def test_the_densest_come_first(tables: Path) -> None:
    assert [row["feature"] for row in ask("densest", tables, n=2)] == [0, 2]


def test_one_feature_is_told_in_one_row(tables: Path) -> None:
    [row] = ask("feature", tables, feature=1)
    assert (row["max"], row["promoted_tokens"], row["nearest_features"]) == (9.0, [" b", " c"], [0])


def test_examples_mark_their_token_within_their_text_and_come_once(tables: Path) -> None:
    found = ask("examples", tables, feature=0)
    assert [row["text"] for row in found] == [" a b» a«", "<s>» a« b"]  # one of two kinds is told once
    assert [row["text"] for row in ask("examples", tables, feature=0, n=1)] == [" a b» a«"]
    assert [row["text"] for row in ask("examples", tables, feature=1)] == [" a» c«"]
    assert [row["text"] for row in ask("examples", tables, feature=0, before=1, after=0)] == [" b» a«", "<s>» a«"]
    assert [row["text"] for row in ask("examples", tables, feature=0, before=0, n=1)] == ["» a«"]


def test_features_of_a_token_are_ranked_by_the_share_of_its_occurrences(tables: Path) -> None:
    # ' a' stands on rows 0, 2 and 4: feature 0 is active on all of them, feature 2 on row 2
    found = ask("token-features", tables, token=" a")
    assert [(row["feature"], row["share"], row["lift"]) for row in found] == [
        (0, 1, 2),
        (2, pytest.approx(1 / 3), pytest.approx(2 / 3)),
    ]
    assert [row["mean_activation"] for row in found] == [2, 0.5]


def test_features_promoting_a_token_are_ranked_by_its_logit(tables: Path) -> None:
    found = ask("promoting-token", tables, token=" c")
    assert [(row["feature"], row["logit"], row["place"]) for row in found] == [(2, 5, 1), (1, 2, 2)]


def test_each_pair_that_fires_together_is_told_once(tables: Path) -> None:
    found = ask("fire-together", tables)
    assert [(row["feature"], row["other"], row["n_both"]) for row in found] == [(0, 2, 1), (2, 1, 0)]


def test_what_fires_with_a_feature_comes_in_the_order_of_its_rank(tables: Path) -> None:
    assert [(row["other"], row["top_token"]) for row in ask("fire-with", tables, feature=2)] == [(0, " a"), (1, " c")]


def test_maxima_of_documents_name_the_token_and_the_row(tables: Path) -> None:
    found = ask("document-maxima", tables, feature=0)
    assert found == [
        {"document": 5, "max": 3, "token": " a", "row": 2, "n_active": 2},
        {"document": 6, "max": 2, "token": " a", "row": 4, "n_active": 1},
    ]


def test_what_breaks_the_model_is_told_by_the_excess_over_all_replaced_tokens(tables: Path, evaluation: Path) -> None:
    # evaluated rows: 0 (delta 1), 1 (2), 3 (4), 4 (1), mean 2; feature 0 is on 0 and 4, feature 2 on 1 and 3
    found = ask("break-ce", tables, evaluation, min_tokens=2)
    assert {row["feature"]: (row["mean_delta"], row["excess"], row["n_tokens"]) for row in found} == {
        2: (3, 1, 2),
        0: (1, -1, 2),
    }
    assert ask("break-ce", tables, evaluation, min_tokens=3) == []


def test_tokens_of_all_sites_stand_for_a_layer_that_was_only_replaced_with_others(tables: Path, tmp_path: Path) -> None:
    def evaluated(name: str, site: str) -> Path:
        tokens = rows(
            sites=[site] * 4,
            context=[0, 0, 1, 1],
            position=[1, 2, 1, 2],
            replaced=[True] * 4,
            delta=[1.0, 2.0, 4.0, 1.0],
        )
        return publish(tmp_path / name, {"tokens": tokens}, kind="evaluation")

    found = ask("break-ce", tables, evaluated("all", "all sites"), min_tokens=2)
    assert {row["feature"]: row["mean_delta"] for row in found} == {2: 3, 0: 1}
    assert ask("break-ce", tables, evaluated("other", "layer5"), min_tokens=2) == []


def test_a_large_mean_over_few_tokens_breaks_the_model_less_surely_than_one_over_many(tmp_path: Path) -> None:
    # Mean of all 32 tokens: (8·2 + 8·4 + 16)/32 = 2. Feature 0: 16 tokens, mean 3, s² = 16/15, ν = 15. Feature 1: four
    # tokens 0 0 0 16, mean 4, s² = (3·16 + 144)/3 = 64, ν = 3. Feature 2: one token, which has no spread.
    deltas = [2.0] * 8 + [4.0] * 8 + [0.0, 0.0, 0.0, 16.0] + [0.0] * 12
    firing = [*((0, row) for row in range(16)), *((1, row) for row in range(16, 20)), (2, 19)]
    place = [divmod(row, 8) for row in range(32)]
    tables = publish(
        tmp_path / "tables",
        {
            "features": rows(feature=[0, 1, 2], frequency=[0.5, 0.125, 0.03], top_token=["a", "b", "c"]),
            "layers": rows(site=["layer0"]),
            "rows": rows(row=list(range(32)), context=[one for one, _ in place], position=[one for _, one in place]),
            "activations/features-000000-000003": rows(
                feature=[feature for feature, _ in firing], row=[row for _, row in firing], activation=[1.0] * 21
            ),
        },
    )
    tokens = rows(
        sites=["layer0"] * 32,
        context=[one for one, _ in place],
        position=[one for _, one in place],
        replaced=[True] * 32,
        delta=deltas,
    )
    evaluation = publish(tmp_path / "evaluation", {"tokens": tokens}, kind="evaluation")
    found = ask("break-ce", tables, evaluation, min_tokens=1)
    assert [(row["feature"], row["excess"], row["n_tokens"]) for row in found] == [(0, 1, 16), (1, 2, 4), (2, 14, 1)]
    many, few, single = (row["excess_low"] for row in found)
    assert many == pytest.approx(1 - (1.96 + 2.37 / 15 + 2.82 / 225) * (16 / 15) ** 0.5 / 4)  # 0.450
    assert few == pytest.approx(2 - (1.96 + 2.37 / 3 + 2.82 / 9) * 8 / 2)  # −10.25
    assert single is None


@pytest.mark.parametrize(("n_tokens", "student"), [(10, 2.262157), (20, 2.093024), (100, 1.984217), (1000, 1.962341)])
def test_the_quantile_of_the_interval_is_student_s_within_the_share_it_says(n_tokens: int, student: float) -> None:
    # quantiles from a printed table of Student's t at 97.5 %, for ν = 9, 19, 99 and 999
    (formula,) = re.findall(r"\((1\.96 \+ .*?\*\* 2)\) \* error", queries.saved_query("break-ce").sql)
    found = eval(formula, {"n_tokens": n_tokens})
    assert found == pytest.approx(student, rel=2e-3)


def test_the_most_connected_are_told_by_their_strongest_connection_of_either_sign(tables: Path) -> None:
    found = ask("most-connected", tables)
    assert [(row["feature"], row["strongest"], row["other"], row["n_strong"]) for row in found] == [
        (1, 2, 7, 1),
        (0, 1.5, 8, 2),
    ]


def test_what_a_feature_reads_leaves_later_features_out(tables: Path) -> None:
    assert [(row["kind"], row["token"], row["head"]) for row in ask("read-from", tables, feature=0)] == [
        ("token", " a", None),
        ("head", None, 3),
    ]


@pytest.mark.parametrize("name", queries.saved_queries())
def test_every_ready_query_fits_the_tables_as_they_are_made(tmp_path: Path, name: str) -> None:
    names = {table.name: f"{table.name}/part" if table.is_folder else table.name for table in EVERY_TABLE}
    publish(tmp_path / "tables", {names[table.name]: table.schema.empty_table() for table in EVERY_TABLE})
    publish(tmp_path / "evaluation", {"tokens": TOKENS.empty_table()}, kind="evaluation")
    ready = queries.saved_query(name)
    given: Tables = [tmp_path / "tables", tmp_path / "evaluation"]
    if ready.needs[0].startswith("a."):
        given = {"a": tmp_path / "tables", "b": tmp_path / "tables"}
    ready.check_tables([view.sql_name for view in find_views(given)])
    assert query.select(ready.sql, given, ready.values([])).num_rows == 0


def test_the_page_of_queries_is_in_step_with_their_files() -> None:
    assert PAGE.read_text() == queries_page(), "run: python -m tailrace.pipeline.query docs/guides/queries.md"


def test_every_query_says_what_it_is_for_and_what_it_needs() -> None:
    for saved in queries.saved_queries().values():
        assert len(saved.description) > 20
        assert saved.needs
        assert {name.rpartition(".")[2] for name in saved.needs} <= set(queries.MADE_BY)
        assert all(parameter.meaning and f"${parameter.name}" in saved.sql for parameter in saved.parameters)


def test_a_wrong_name_value_or_table_is_told_with_the_right_ones(tables: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"no such query; did you mean densest\? The ready queries are break-ce, column-features"
    ):
        queries.saved_query("dense")
    with pytest.raises(SettingsError, match=r"--saved zzz: no such query\. The ready queries are break-ce"):
        queries.saved_query("zzz")
    with pytest.raises(SettingsError) as caught:
        queries.saved_query("examples").values(["feature=x", "k=3", "n"])
    assert "--set feature=x: wanted INTEGER, such as 0" in str(caught.value)
    assert "--set k=3: the query examples has the parameters feature, n, before, after; write" in str(caught.value)
    assert "--set n: " in str(caught.value)
    with pytest.raises(SettingsError, match="tokens is made by pipeline evaluate"):
        queries.saved_query("break-ce").check_tables([view.name for view in find_views(tables)])
    with pytest.raises(SettingsError, match="Ready queries read tables of artifacts without a name"):
        queries.saved_query("densest").check_tables([view.sql_name for view in find_views({"a": tables})])


def test_a_table_that_is_not_there_is_told_with_what_makes_it(tables: Path) -> None:
    with pytest.raises(ActionableError, match=r"no table tokens here; it is made by pipeline evaluate\nTables: "):
        query.select("SELECT * FROM tokens", tables)
    with pytest.raises(ActionableError, match=r"there is no table features here; write a\.features or b\.features"):
        query.select("SELECT * FROM features", {"a": tables, "b": tables})
    with pytest.raises(ActionableError, match="Table with name feat does not exist"):
        query.select("SELECT * FROM feat", tables)


def test_a_parameter_is_a_value_and_never_sql(tables: Path) -> None:
    assert ask("token-features", tables, token="' OR true --") == []


# ---- the command


def run(capsys: Any, *arguments: Any) -> tuple[int, str, str]:
    code = 0
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_a_ready_query_is_run_by_name_and_written_as_its_file_is_named(capsys, tables: Path, tmp_path: Path) -> None:
    wanted = ["query", "--saved", "densest", "--set", "n=1", "--tables", tables]
    assert json.loads(run(capsys, *wanted, "--format", "json")[1])[0]["feature"] == 0
    assert run(capsys, *wanted, "--out", tmp_path / "a.csv")[1] == f"{tmp_path / 'a.csv'}: written\n"
    assert (tmp_path / "a.csv").read_text().startswith("feature,frequency,")


def test_own_sql_takes_values_too(capsys, tables: Path) -> None:
    sql = "SELECT feature FROM features WHERE top_token = $token AND max > $least"
    answer = run(capsys, "query", sql, "--set", "token= c", "--set", "least=8.5", "--tables", tables, "--format", "csv")
    assert answer == (0, "feature\n1\n", "")
    code, _, error = run(capsys, "query", sql, "--tables", tables)
    assert code == 1
    assert "Values were not provided for the following parameters: token, least" in error or "least, token" in error
    assert "give each with --set NAME=VALUE" in error
    assert "Traceback" not in error


def test_the_list_tells_columns_with_meaning_and_unit_and_the_queries(capsys, tmp_path: Path) -> None:
    schema = pa.schema([column("delta", pa.float64(), "what it costs", unit="nats", nullable=True)])
    place = publish(tmp_path / "e", {"tokens": schema.empty_table()}, kind="evaluation")
    _, out, _ = run(capsys, "query", "--list", "--tables", place)
    assert "tokens\n  delta  what it costs (double, nats, may be null)\n" in out
    assert "break-ce\n" in out
    assert "--set token=' the'" in out
    listed = json.loads(run(capsys, "query", "--list", "--tables", place, "--format", "json")[1])
    assert listed["columns"] == [
        {
            "table": "tokens",
            "column": "delta",
            "type": "double",
            "unit": "nats",
            "nullable": True,
            "meaning": "what it costs",
        }
    ]
    assert {one["name"] for one in listed["queries"]} == set(queries.saved_queries())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give one of SQL, --saved NAME or --list"),
        (["SELECT 1", "--list"], "give one of SQL"),
        (["SELECT 1"], "--tables PATH is missing"),
        (["--list", "--format", "csv"], "--list shows its answer as text or --format json"),
        (["SELECT 1", "--tables", "t", "--format", "parquet"], "needs --out FILE.parquet"),
    ],
)
def test_what_does_not_go_together_is_refused(capsys, arguments: list[str], said: str) -> None:
    code, _, error = run(capsys, "query", *arguments)
    assert code == 2
    assert said in error


# ---- several artifacts


def test_artifacts_with_different_tables_are_seen_side_by_side(tables: Path, evaluation: Path) -> None:
    names = query.select("SHOW TABLES", [tables, evaluation])["name"].to_pylist()
    assert "tokens" in names
    assert "activations" in names


def test_artifacts_with_the_same_tables_need_names_and_are_joined_by_them(capsys, tables: Path) -> None:
    code, _, error = run(capsys, "query", "SELECT 1", "--tables", tables, "--tables", tables / ".." / "tables")
    assert code == 2
    assert "rows in " in error
    assert f"--tables a={tables}" in error
    sql = "SELECT x.feature FROM a.features x JOIN b.features y USING (feature) WHERE x.max > 5"
    answer = run(capsys, "query", sql, "--tables", f"a={tables}", "--tables", f"b={tables}", "--format", "csv")
    assert answer == (0, "feature\n1\n", "")


def test_names_of_artifacts_are_all_given_or_none(capsys, tables: Path) -> None:
    half = run(capsys, "query", "SELECT 1", "--tables", f"a={tables}", "--tables", tables)
    assert "has no name while others do" in half[2]
    twice = run(capsys, "query", "SELECT 1", "--tables", f"a={tables}", "--tables", f"a={tables}")
    assert "a names several artifacts" in twice[2]
    assert "cannot name tables" in run(capsys, "query", "SELECT 1", "--tables", f"main={tables}")[2]


@pytest.mark.parametrize("name", ["promoting-token", "token-features"])
def test_a_token_without_an_answer_is_told_what_that_does_not_mean(
    tables: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    ready = queries.saved_query(name)
    for token, n_rows in ((" b", 2), (" Paris", 0)):
        values = ready.values([f"token={token}"])
        text = query.run(ready.sql, tables=tables, empty=ready.empty, parameters=values)
        assert ("(no rows)" in text) == (n_rows == 0)
        assert len(caplog.messages) == (n_rows == 0)
    assert caplog.messages == [f"no rows: {ready.empty}"]
    assert "ipeline" in ready.empty
