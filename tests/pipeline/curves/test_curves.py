"""``pipeline curves`` and the tables of a run's logs: names, pictures, the page in a browser, SQL."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tailrace.pipeline.curves.picture import labels, page, page_data, write_picture
from tailrace.pipeline.dashboard.serve import open_site
from tailrace.pipeline.query.stage import select
from tailrace.storage.errors import SettingsError
from tailrace.training.loop.curves import read_all
from tests.support.browsers import accessibility_problems, open_browser, watched_page
from tests.support.cache_jobs import command
from tests.support.run_logs import write_run


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for k in (8, 16):
        write_run(tmp_path / f"sweep/runs/architecture=topk,k={k}", n_lines=20, fvu=1 / k, linear=0.4)
    return tmp_path / "sweep"


def test_labels_leave_out_what_all_runs_share_and_name_no_setting_twice() -> None:
    assert labels(["architecture=topk,k=8", "architecture=relu,k=8"]) == ["topk", "relu"]
    assert labels(["architecture=topk,k=8,lr=0.001", "architecture=topk,k=16,lr=0.01"]) == [
        "k8 lr 0.001",
        "k16 lr 0.01",
    ]
    assert labels(["architecture=topk,k=8"]) == ["topk k8"]
    assert labels(["layer1", "layer2"]) == ["layer1", "layer2"]


def test_a_page_has_every_curve_and_no_more_points_than_can_be_seen(tmp_path: Path) -> None:
    write_run(tmp_path / "long", n_lines=1000)
    (run,) = page_data(read_all([tmp_path / "long"]))["runs"]
    assert len(run["curves"]["loss"]["x"]) == 334
    assert run["curves"]["loss"]["x"][:2] == [1280, 3200]
    assert run["curves"]["loss"]["y"][0] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3, rel=1e-4)
    assert run["curves"]["dead"]["y"][-1] == 0.125  # of held-out rows, where there are some
    assert run["verdict"].startswith("under way: ")


def test_a_run_whose_folder_has_a_name_that_is_not_utf_8_is_drawn(tmp_path: Path) -> None:
    write_run(tmp_path / os.fsdecode(b"r\xff"), n_lines=3)
    write_picture(tmp_path / "curves.html", read_all([tmp_path]))
    assert "r?" in (tmp_path / "curves.html").read_text()


def test_the_command_prints_a_line_for_each_run_and_writes_a_page(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = command(capsys, "curves", sweep, "--out", tmp_path / "curves.html")
    assert answer.code == 0, answer
    first, second, last = answer.out.splitlines()
    assert first.startswith("k8   unfinished after 200 of 200 steps, 100%, loss 0.05; loss still falling, by ")
    assert second.endswith("FVU 0.0625 (the mean scores 1, a linear map 0.4)")
    assert last == f"{tmp_path / 'curves.html'}: written"
    assert "k16" in (tmp_path / "curves.html").read_text()
    written = json.loads(command(capsys, "curves", sweep, "--json").out)
    assert [run["name"] for run in written["runs"]] == ["architecture=topk,k=8", "architecture=topk,k=16"]
    with pytest.raises(SettingsError, match="end it in"):
        write_picture(tmp_path / "curves.pdf", [])


def test_serve_shows_runs_as_they_are_at_the_moment(sweep: Path) -> None:
    site = open_site([sweep])
    first = site.read("index.html")
    assert first is not None
    assert b"connect-src 'self'" in first
    write_run(sweep / "runs/architecture=topk,k=8", n_lines=30)
    numbers = json.loads(site.read("curves.json") or b"")
    assert (numbers["live"], numbers["runs"][0]["progress"]) == (True, "300 of 300 steps, 100%, loss 0.03333")
    assert site.read("metrics.jsonl") is None


def test_what_runs_log_answers_sql(sweep: Path) -> None:
    sql = "SELECT run, count(loss) AS n, min(fvu) AS fvu FROM metrics GROUP BY run ORDER BY fvu"
    assert select(sql, sweep).to_pylist() == [
        {"run": "architecture=topk,k=16", "n": 20, "fvu": 0.0625},
        {"run": "architecture=topk,k=8", "n": 20, "fvu": 0.125},
    ]
    one = sweep / "runs" / "architecture=topk,k=8"
    assert select('SELECT "losses/mse_loss" AS x FROM metrics WHERE step = 20 AND loss > 0', one).to_pylist() == [
        {"x": 0.5}
    ]
    assert select("SELECT max(seconds) AS s FROM timing", one).to_pylist() == [{"s": 40.0}]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_reads_numbers_by_pointer_and_keys_and_fits_a_phone(sweep: Path, tmp_path: Path, scheme: str) -> None:
    runs = read_all([sweep])
    write_picture(tmp_path / "curves.png", runs)
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "curves.html").write_text(page(runs))
    with open_browser() as browser, watched_page(browser, scheme) as watched:  # type: ignore[arg-type]
        site = watched.page
        for width in (1360, 390):
            site.set_viewport_size({"width": width, "height": 860})
            site.goto((tmp_path / "curves.html").as_uri())
            assert site.evaluate("document.documentElement.scrollWidth") == width
            assert accessibility_problems(site) == []
            loss = site.locator(".chart[data-key=loss] svg")
            assert loss.locator(".curve").count() == 2
            loss.focus()
            loss.press("ArrowLeft")
            assert site.locator("#tooltip").inner_text().splitlines() == ["12,800 rows", "k8 0.05000", "k16 0.05000"]
            loss.press("ArrowLeft")
            assert site.locator("#tooltip").inner_text().splitlines() == ["12,160 rows", "k8 0.05263", "k16 0.05263"]
            site.get_by_role("button", name="k8").click()
            assert loss.locator(".curve").count() == 1
