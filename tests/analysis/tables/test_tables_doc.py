from __future__ import annotations

import pytest

from tailrace.analysis.harvest.one_pass import Plan, gather
from tailrace.analysis.harvest.table import FEATURES_PER_BATCH, accumulators, tables_page
from tailrace.analysis.tables import EVERY_TABLE, TABLES, examples, features
from tailrace.storage.tables import describe
from tests.support.analysis_subject import FakeCoder, FakeSplit, subject
from tests.support.paths import DOCS

PAGE = DOCS / "tables.md"


def test_the_page_of_tables_is_in_step_with_the_schemas():
    assert PAGE.read_text() == tables_page(EVERY_TABLE), "run: python -m tailrace.analysis.tables docs/tables.md"


def test_names_of_tables_are_distinct():
    assert len({table.name for table in EVERY_TABLE}) == len(EVERY_TABLE)


@pytest.mark.parametrize("table", EVERY_TABLE, ids=lambda table: table.name)
def test_every_column_says_what_it_means(table):
    assert [column.name for column in describe(table.schema) if not column.meaning] == []
    assert table.meaning


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
class TestEveryTable:
    def test_it_is_made_from_what_it_says_it_needs(self, table):
        analysed, plan = subject(), Plan(activation_rows=1000)
        harvest = gather(analysed, plan, table.needs)
        batches = list(table.compute(harvest, analysed, plan))
        assert batches
        assert all(batch.schema.equals(table.schema, check_metadata=True) for batch in batches)

    def test_nothing_is_null_but_where_the_schema_allows_it(self, table):
        analysed, plan = subject(), Plan(activation_rows=1000)
        for batch in table.compute(gather(analysed, plan, table.needs), analysed, plan):
            batch.validate(full=True)
            for field, array in zip(batch.schema, batch.columns, strict=True):
                assert field.nullable or array.null_count == 0, field.name


def test_tables_of_many_features_come_in_several_batches():
    analysed = subject(FakeSplit(4), FakeCoder(d_sae=FEATURES_PER_BATCH + 5))
    plan = Plan(n_examples=2)
    harvest = gather(analysed, plan, accumulators([features.TABLE, examples.TABLE]))
    made = list(features.compute(harvest, analysed, plan))
    assert [batch.num_rows for batch in made] == [FEATURES_PER_BATCH, 5]
    seen = [row for batch in examples.compute(harvest, analysed, plan) for row in batch["feature"].to_pylist()]
    assert seen == sorted(seen)
    assert max(seen) >= FEATURES_PER_BATCH
