"""``pipeline pareto``: which transcoders are on a front, what the picture and the page hold, what is refused."""

from __future__ import annotations

import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from tailrace.pipeline.evaluate import pareto
from tailrace.pipeline.evaluate import stage as evaluate
from tailrace.pipeline.evaluate.pareto import Point, as_json, collect, front, lines
from tailrace.pipeline.evaluate.pareto_plot import draw_points, short_label, style, table, write_plot
from tailrace.pipeline.evaluate.settings import EvaluateSettings
from tailrace.pipeline.shared.compute import Compute
from tailrace.pipeline.shared.pages import NARROW, WIDE
from tailrace.pipeline.train import stage as train
from tailrace.pipeline.train import sweep
from tailrace.pipeline.train.grid import expand, read_grid
from tailrace.storage.errors import ArtifactMismatch, ArtifactMissing, SettingsError
from tailrace.training.loop.settings import TrainSettings
from tests.support.cache_jobs import command, run_cache

BASE: dict[str, Any] = {"d_sae": 24, "steps": 6, "batch_rows": 64, "lr": 1e-2, "architecture": {"kind": "topk", "k": 2}}


def point(name: str, l0: float, fvu: float | None, ce: float | None = None, group: str = "topk") -> Point:
    return Point(name, group, l0, fvu, ce, 24, "mlp", f"there/{name}", f"digest-{name}-{group}")


POINTS = [
    point("a", 8, 0.5, 0.6),
    point("b", 16, 0.3, 0.7),
    point("worse", 16, 0.4, 0.9),
    point("dense", 20, 0.3),
    point("c", 64, 0.1, 0.8),
    point("d", 10, 0.45, 0.5, group="relu"),
]


def test_the_front_is_what_no_other_transcoder_beats() -> None:
    topk = [one for one in POINTS if one.group == "topk"]
    assert [one.name for one in front(topk[::-1], "fvu")] == [
        "a",
        "b",
        "c",
    ]  # dense is no better than b and less sparse
    measured = [one for one in topk if one.ce_recovered is not None]
    assert [one.name for one in front(measured, "ce_recovered")] == ["a", "worse"]


def test_points_are_grouped_by_architecture_and_sorted_by_l0() -> None:
    groups = lines(POINTS, "fvu")
    assert {group: [one.name for one in points] for group, points in groups.items()} == {
        "relu": ["d"],
        "topk": ["a", "b", "worse", "dense", "c"],
    }
    assert sum(map(len, lines(POINTS, "ce_recovered").values())) == 5
    with pytest.raises(SettingsError, match=r"measured for none of 1 transcoders; run `pipeline evaluate`"):
        lines([point("dense", 20, 0.3)], "ce_recovered")


def test_json_says_of_every_point_whether_it_is_on_its_front() -> None:
    found = {one["name"]: one["on_front"] for one in as_json(POINTS, "ce_recovered")}
    assert found == {"a": True, "b": False, "worse": True, "dense": None, "c": False, "d": True}


def test_a_picture_names_every_point_and_line_in_its_own_colour(tmp_path: Path) -> None:
    write_plot(tmp_path / "plot.svg", lines(POINTS, "fvu"), "fvu")
    drawing = (tmp_path / "plot.svg").read_text()
    texts = {element.text for element in ElementTree.fromstring(drawing).iter() if element.tag.endswith("text")}
    assert {"a", "b", "worse", "dense", "c", "d", "topk", "relu"} <= texts
    assert "held-out FVU (lower is better)" in texts
    assert all(style(index)[0] in drawing for index in range(2))
    write_plot(tmp_path / "again.svg", lines(POINTS, "fvu"), "fvu")
    assert (tmp_path / "again.svg").read_bytes() == drawing.encode()
    write_plot(tmp_path / "plot.png", lines(POINTS, "fvu"), "fvu")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_lines_of_one_point_can_be_told_apart() -> None:
    """All architectures with and without skip are twelve, more than there are colours."""
    assert len({style(index)[:2] for index in range(49)}) == 49


def test_a_transcoder_worse_than_none_is_counted_and_listed_but_flattens_no_picture(tmp_path: Path) -> None:
    groups = lines([*POINTS, point("wild", 4, 5e8, -0.1)], "fvu")
    write_plot(tmp_path / "plot.svg", groups, "fvu")
    drawing = ElementTree.fromstring((tmp_path / "plot.svg").read_text())
    texts = [element.text for element in drawing.iter() if element.tag.endswith("text")]
    assert "not drawn: 1 with an FVU above 1, worse than the mean" in texts
    assert "wild" not in texts
    assert "1e8" not in texts
    assert "wild" in [row[1] for row in table(groups, "fvu")]
    write_plot(tmp_path / "ce.svg", lines([*POINTS, point("wild", 4, 5e8, -0.1)], "ce_recovered"), "ce_recovered")
    assert "not drawn: 1 with less than 0, worse than zero ablation" in (tmp_path / "ce.svg").read_text()
    write_plot(tmp_path / "alone.svg", lines([point("wild", 4, 5e8)], "fvu"), "fvu")
    assert "wild" in (tmp_path / "alone.svg").read_text()


def test_labels_cover_neither_each_other_nor_the_frame_and_do_not_repeat_the_legend() -> None:
    crowded = [
        point(f"k={k},architecture={kind}", k, 0.6 / k + nearer, group=kind)
        for k in (8, 16, 32, 64)
        for kind, nearer in (("topk", 0.01), ("jumprelu", 0.012), ("batch_topk", 0.0))
    ]
    for size in (WIDE, NARROW):
        figure = Figure(figsize=size, layout="constrained")
        tips = draw_points(lines(crowded, "fvu"), "fvu", figure)
        [axes] = figure.axes
        assert {label.get_text() for label in axes.texts} == {"k=8", "k=16", "k=32", "k=64"}
        boxes = [label.get_window_extent() for label in axes.texts]
        assert len(boxes) >= 10
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
        frame = axes.get_window_extent().padded(0.5)  # half a pixel of rounding
        assert all(frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1) for box in boxes)
        assert len(tips) == 12
        assert tips["mark 0"].startswith("k=8,architecture=batch_topk\nbatch_topk, 24 features\nL0 8, FVU 0.075")
    assert short_label(point("lr=1,architecture=relu,k=2", 1, 1)) == "lr=1,k=2"


def test_a_page_needs_nothing_else_and_escapes_names(tmp_path: Path) -> None:
    odd = [*POINTS, replace(point("e", 9, 0.2), name="<script>$x$&")]
    write_plot(tmp_path / "plot.html", lines(odd, "fvu"), "fvu")
    page = (tmp_path / "plot.html").read_text()
    assert page.count("<script>") == 1  # the tooltip's
    assert page.count("&lt;script&gt;$x$&amp;") >= 3  # in the picture, in its tooltip, and in the table
    references = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page)
    assert [reference for reference in references if not reference.startswith("#") and reference != "data:,"] == []
    assert "@import" not in page
    assert page.count("<tr>") == 1 + len(odd)
    colours = set(re.findall(r"#[0-9a-f]{6}\b", page.partition("</style>")[2]))
    assert colours == set()  # all are variables, which follow the page from light to dark


def test_the_table_marks_the_front_of_all_and_of_each_line() -> None:
    head, *rows = table(lines(POINTS, "fvu"), "fvu")
    assert head == ("architecture", "transcoder", "L0", "FVU", "CE recovered", "d_sae", "front")
    assert rows[1] == ("topk", "a", "8.0", "0.5000", "60.0%", "24", "of all")
    beaten = replace(POINTS[5], fvu=0.6)
    _, *rows = table(lines([*POINTS[:5], beaten], "fvu"), "fvu")
    assert [(row[1], row[-1]) for row in rows if row[-1]] == [
        ("d", "of its line"),
        ("a", "of all"),
        ("b", "of all"),
        ("c", "of all"),
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep over k and lr, a ReLU transcoder, and an evaluation of one run of the sweep."""
    place = tmp_path_factory.mktemp("pareto")
    run_cache(place / "cache", layers="0")
    runs = expand(read_grid(["k=2,4,8", "lr=1e-3,2e-2"], None), _read)
    sweep.run(runs, cache=place / "cache", output=place / "sweep", compute=Compute(threads=1, quiet=True))
    relu = TrainSettings.read(BASE, {"architecture": {"kind": "relu", "l1": 0.01}})
    train.run(relu, cache=place / "cache", output=place / "relu", compute=Compute(threads=1, quiet=True))
    evaluate.run(
        EvaluateSettings(contexts=3, contexts_per_batch=3),
        transcoders=[place / "sweep" / "runs" / "k=4,lr=0.02"],
        cache=place / "cache",
        output=place / "evaluation",
        compute=Compute(threads=1, quiet=True),
    )
    return place


def _read(chosen: dict[str, Any]) -> TrainSettings:
    return TrainSettings.read(BASE, {"architecture": {"kind": "topk", "k": chosen["k"]}, "lr": chosen["lr"]})


def test_points_have_the_numbers_of_their_manifests_and_evaluations(made: Path) -> None:
    points = {one.name: one for one in collect([made / "sweep", made / "relu", made / "evaluation", made / "relu"])}
    assert len(points) == 7
    manifest = json.loads((made / "sweep" / "runs" / "k=4,lr=0.02" / "manifest.json").read_text())
    found = points["k=4,lr=0.02"]
    assert (found.l0, found.fvu) == (manifest["metrics"]["heldout"]["l0"], manifest["metrics"]["heldout"]["fvu"])
    assert found.ce_recovered == evaluate.read_result(made / "evaluation").scores["layer0"].ce_recovered
    assert points["k=2,lr=0.001"].ce_recovered is None
    assert (found.group, points["relu"].group, found.site) == ("topk", "relu", "layer0")


def test_lines_are_told_apart_by_what_their_transcoders_differ_in(made: Path, tmp_path: Path) -> None:
    skip = TrainSettings.read(BASE, {"architecture": {"kind": "topk", "k": 2, "skip": True}})
    train.run(skip, cache=made / "cache", output=tmp_path / "skip", compute=Compute(threads=1, quiet=True))
    alone = collect([tmp_path / "skip"])
    assert [one.group for one in alone] == ["topk"]
    groups = lines(collect([tmp_path / "skip", made / "relu", made / "sweep"]), "fvu")
    assert {group: len(points) for group, points in groups.items()} == {"relu": 1, "topk": 6, "topk with skip": 1}


def test_the_command_draws_and_prints(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = command(capsys, "pareto", made / "sweep", made / "relu", "--out", tmp_path / "new" / "plot.png")
    assert answer.code == 0, answer.err
    rows = answer.out.splitlines()
    assert rows[0].split() == ["architecture", "transcoder", "L0", "FVU", "CE", "recovered", "d_sae", "front"]
    assert len(rows) == 1 + 7 + 1
    assert (tmp_path / "new" / "plot.png").exists()
    printed = command(capsys, "pareto", made / "sweep", made / "evaluation", "--y", "ce_recovered", "--json")
    assert [one["name"] for one in json.loads(printed.out) if one["on_front"]] == ["k=4,lr=0.02"]


def test_what_cannot_be_compared_is_refused(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = command(capsys, "pareto", made / "sweep", "--out", tmp_path / "plot.pdf")
    assert (wrong.code, "end it in .png, .svg, .html" in wrong.err) == (2, True)
    with pytest.raises(ArtifactMissing, match=r"absent: no published[^\0]*gone: no published"):
        collect([made / "absent", made / "relu", made / "gone"])
    with pytest.raises(ArtifactMismatch, match=r"cache \(activation cache\)|cache \("):
        collect([made / "cache"])
    none = command(capsys, "pareto", made / "relu", "--y", "ce_recovered")
    assert (none.code, "run `pipeline evaluate`" in none.err) == (2, True)


def test_a_diverged_run_is_left_out_with_a_warning(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = TrainSettings.read(BASE, {"lr": 1e39})
    runs = {"good": TrainSettings.read(BASE), "bad": bad}
    sweep.run(runs, cache=made / "cache", output=tmp_path / "s", compute=Compute(threads=1, quiet=True))
    assert [one.name for one in pareto.collect([tmp_path / "s"])] == ["good"]
    assert "run bad diverged and is left out" in caplog.text
