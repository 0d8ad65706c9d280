"""The report: complete, self-contained, escaped, and readable from one round to many sites."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from fedvfm import errors, seeding
from fedvfm.config import schema
from fedvfm.data import overlay
from fedvfm.model import adapted_model
from fedvfm.report import bootstrap, charts, page
from fedvfm.report import rounds as rounds_of
from fedvfm.simulation import experiment, run_folder
from fedvfm.simulation import run as simulation
from fedvfm.simulation.results import compare, examination, pictures, report, statistics
from fedvfm.state import checkpoint

VOID = {"meta", "img", "br", "line", "circle", "rect", "polyline"}


class Page(html.parser.HTMLParser):
    """Reads a page: its tags with attributes, its text, and whether every tag is closed where it should be."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words, self._open, self.unbalanced = "", [], []
        self.feed(source)
        self.unbalanced += self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self._open or self._open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data + " "

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def sections(self) -> list[str | None]:
        return [attributes.get("id") for attributes in self.named("section")]


def read(path: Path) -> Page:
    return Page((path / "report.html").read_text(encoding="utf-8"))


def summary(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "summary.json").read_text())
    return found


# --- the whole page ---------------------------------------------------------------------------------------------------


def test_a_run_leaves_all_sections_and_their_figures(tiny_run: Path) -> None:
    found, made = read(tiny_run), summary(tiny_run)
    assert found.sections == [
        "benefit",
        "home",
        "arms",
        "findings",
        "sites",
        "samples",
        "matrix",
        "training",
        "bytes",
        "hospitals",
        "environment",
    ]
    assert not found.unbalanced
    words = " ".join(found.words.split())
    assert "drawn boxes, no patient claim" in words
    for arm in ("federated", "local-only", "pooled", "classical"):
        assert f"{made['arms'][arm]['macro']:.3f}" in words
    for value in (made["fingerprint"], made["backbone"]["sha256"], made["arms"]["classical"]["rule"], "seed"):
        assert value in words
    assert f"{made['arms']['local-only']['matrix']['east']['west']:.3f}" in words
    assert "whole patients" in words


def test_the_page_asks_the_network_for_nothing(tiny_run: Path) -> None:
    source = (tiny_run / "report.html").read_text(encoding="utf-8")
    found = Page(source)
    assert not found.named("script")
    assert not found.named("link")
    targets = [value for _, attributes in found.tags for name, value in attributes.items() if name in ("src", "href")]
    assert targets
    assert all(target is not None and target.startswith(("#", "data:image/png;base64,")) for target in targets)
    assert "@import" not in source
    assert "url(" not in source
    policies = [tag["content"] for tag in found.named("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
    assert policies == [page.POLICY]
    assert (tiny_run / "report.html").stat().st_mode & 0o777 == 0o600


def test_the_page_can_be_read_without_seeing_it(tiny_run: Path) -> None:
    found = read(tiny_run)
    assert all(tag.get("alt") for tag in found.named("img"))
    assert all(tag.get("aria-label") for tag in found.named("svg"))
    assert all(tag.get("scope") in ("row", "col") for tag in found.named("th"))
    assert len(found.named("caption")) == len(found.named("table")) >= 6
    assert found.named("html")[0]["lang"] == "en"
    names = [tag["id"] for tag in found.named("h2")]
    assert len(names) == len(set(names)) == len(found.sections)


def test_text_of_others_is_escaped(tiny_run: Path) -> None:
    source = (tiny_run / "report.html").read_text(encoding="utf-8")
    assert "<h1>Boxes &lt;tiny&gt; &amp; drawn</h1>" in source
    assert "<tiny>" not in source


def test_pictures_show_image_truth_and_prediction(tiny_run: Path) -> None:
    images = read(tiny_run).named("img")
    assert len(images) == 3 * (2 + 1) * 3
    kinds = [str(tag["alt"]).partition(":")[0] for tag in images]
    assert kinds[:3] == ["image", "truth", "prediction"]
    for tag in images:
        data = base64.b64decode(str(tag["src"]).partition(",")[2])
        assert Image.open(io.BytesIO(data)).size == (224, 240)


def test_intervals_and_differences_are_those_of_the_samples(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "No interval: under 10 independent test units at east (2), north (2), west (2)." in read(tiny_run).words
    monkeypatch.setattr(bootstrap, "LEAST_UNITS", 1)
    run, made = run_folder.RunFolder(shutil.copytree(tiny_run, tmp_path / "run")), summary(tiny_run)
    what = experiment.parse(run.read_experiment(), "test")
    hospitals = experiment.hospitals(what)
    report.write(run, what, hospitals, made, [])
    words = read(run.path).words
    scores = compare.scores(run, made, compare.patients_of(hospitals))
    interval = compare.interval([scores["pooled"]])
    assert interval is not None
    assert interval.mean == pytest.approx(made["arms"]["pooled"]["macro"], abs=1e-12)
    assert f"{interval.low:.3f} to {interval.high:.3f}" in words
    change = compare.difference([scores["pooled"]], [scores["federated"]])
    assert change is not None
    assert change[1]
    assert f"{change[0].mean:+.3f} ({change[0].low:+.3f} to {change[0].high:+.3f})" in words
    assert scores[compare.ABROAD].sites.keys() == {"east", "north", "west"}
    away = compare.interval([scores[compare.ABROAD]])
    assert away is not None
    assert away.mean == pytest.approx(made["arms"]["local-only"]["abroad"], abs=1e-12)


def test_every_hospital_is_told_whether_it_gains(tiny_run: Path) -> None:
    words = read(tiny_run).words
    assert "0 hospitals of 3 gain, 0 lose, 3 cannot tell." in words
    assert words.count("none: 2 independent test units; an interval needs 10") == 3
    values = {site: {f"{at}": 0.1 * at for at in range(10)} for site in ("east", "west")}
    better = {"east": {key: x + 0.1 + 0.01 * x for key, x in values["east"].items()}, "west": dict(values["west"])}
    arms = {name: statistics.Scores(name, 0, rows) for name, rows in (("federated", better), ("local-only", values))}
    changes = examination.home(arms)
    assert [changes[site].word for site in ("east", "west")] == [bootstrap.GAINS, bootstrap.UNKNOWN]
    assert report.home_text(changes).endswith("1 hospital of 2 gains, 0 lose, 1 cannot tell.")
    assert report.change_text(changes["west"]) == "none: no spread among the test samples"


def test_classification_of_one_round_without_validation(tiny_classes: Path) -> None:
    found = read(tiny_classes)
    assert found.sections == [
        "arms",
        "findings",
        "sites",
        "answers",
        "samples",
        "training",
        "bytes",
        "hospitals",
        "environment",
    ]
    assert "Attention: one answer for every test image at all 2 sites" in found.words
    assert not found.unbalanced
    assert "macro balanced accuracy" in found.words
    assert "No site validated in this run." in found.words
    assert len(found.named("img")) == 2 * (2 + 1)
    assert found.words.count("truth:") == 2 * (2 + 1)
    assert found.words.index("The worst of each site") < found.words.index("Drawn at random")
    assert "no validation sample" in found.words


# --- parts ------------------------------------------------------------------------------------------------------------


def _experiment(**changes: Any) -> schema.Experiment:
    recipe = {"backbone": {"name": "facebook/dinov2-small"}, "data": {"class_names": ["background", "box"]}}
    return schema.parse(
        schema.Experiment, {"name": "many", "data": {"source": "folder"}, "recipe": recipe, **changes}, "x"
    )


def _found(number: int, rounds: int, *, local: bool = True) -> report.Found:
    """Values of a run with ``number`` sites, as a summary and journal hold them."""
    names = [f"hospital-{at:03d}" for at in range(number)]
    rows = {name: {"dice": 0.5 + at / (4 * number), "num_examples": 5} for at, name in enumerate(names)}
    part = {"sites": rows, "macro": 0.6, "weighted": 0.6, "worst": {"site": names[0], "value": 0.5}, "gap": 0.2}
    arms: dict[str, Any] = {"federated": part}
    if local:
        own = {name: {**row, "dice": row["dice"] + (0.1 if name == names[0] else 0.0)} for name, row in rows.items()}
        matrix = {a: {b: 0.1 + 0.5 * (a == b) for b in names} for a in names}
        arms["local-only"] = {**part, "sites": own, "matrix": matrix, "abroad": 0.1 if number > 1 else None}
    made = {
        **{"seed": 0, "rounds": rounds, "engine": "in-process", "fingerprint": "f" * 64, "primary": "dice"},
        **{"wall_s": 3.0, "peak_mib": 700.0, "trainable_parameters": 1000, "arms": arms},
        **{"threads": 1, "workers": None, "precision": "float32"},
        "bytes": {"up": 8000, "down": 9000, "full_model": 400_000},
        "backbone": {"name": "/home/someone/weights/tiny", "sha256": "", "parameters": 99_000},
    }
    journal = [
        {
            "round": at + 1,
            "cohort": names,
            "refused": {"<north>": {"reason": "not-finite", "detail": "3 values"}} if at == 0 else {},
            "train": {name: {"loss": 1.0 / (at + 1)} for name in names},
            "validation": {name: {"dice": 0.02 * at, "num_examples": 2} for name in names},
            "factor_error": None,
            "bytes": {"up": 1000, "down": 1000},
            "seconds": 1.0,
        }
        for at in range(rounds)
    ]
    return report.Found(_experiment(), made, {}, journal)


def _page(found: report.Found) -> Page:
    return Page(page.document("test", report.body(found, [], [])))


def test_many_sites_are_folded_and_drawn_as_a_field() -> None:
    found = _page(_found(64, 3))
    assert not found.unbalanced
    cells = [tag for tag in found.named("rect") if str(tag.get("fill", "")).startswith("#")]
    assert len(cells) == 64 * 65
    assert "mean of 64" in found.words
    assert len(found.named("details")) >= 3
    assert "All 64 sites" in found.words
    assert max(len(found.named("circle")), 1) < 64


@pytest.mark.parametrize(("number", "rounds"), [(1, 1), (2, 1), (9, 2), (17, 40)])
def test_any_number_of_sites_and_rounds(number: int, rounds: int) -> None:
    found = _page(_found(number, rounds))
    assert not found.unbalanced
    assert found.sections == ["arms", "sites", "matrix", "training", "bytes", "environment"]
    assert "nan" not in found.words.lower().split()


def test_arms_that_are_missing_leave_no_trace() -> None:
    found = _page(_found(3, 2, local=False))
    assert "matrix" not in found.sections
    results = found.words.partition("Environment and settings")[2].partition("Environment and settings")[0]
    assert "Arms compared" in results
    assert "local-only" not in results
    assert "Pooled" not in results


def test_sites_below_their_own_model_are_named() -> None:
    found = _found(3, 2)
    assert report.below_home(found.arms, "dice") == [("hospital-000", 0.5, 0.6)]
    words = _page(found).words
    assert "1 site scores more than 0.02 below" in words
    assert "hospital-000 (0.500 against 0.600)" in words


def test_refused_updates_are_listed_with_their_reason() -> None:
    source = page.document("test", report.body(_found(3, 2), [], []))
    assert "1 update was refused." in source
    assert "&lt;north&gt;" in source
    assert "<north>" not in source


def test_a_local_backbone_shows_no_path_in_the_head() -> None:
    head = "".join(report.body(_found(2, 1), [], [])).partition("<nav")[0]
    assert "on tiny, rule mean" in head
    assert "/home/someone" not in head


def test_bytes_are_set_against_the_whole_model() -> None:
    found = _found(3, 2)
    assert rounds_of.whole_model(found.journal, found.made) == 2 * 400_000 * 3 * 2
    assert rounds_of.traffic_card(found.journal, found.made)[2] == "282 times less than the whole model"
    larger = {**found.made, "bytes": {"up": 4_800_000, "down": 4_800_000, "full_model": 400_000}}
    assert rounds_of.traffic_card(found.journal, larger)[2] == "2.0 times as much as the whole model"


@pytest.mark.parametrize(
    ("number", "expected"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_345_678, "2.35 MB"), (7.7e10, "77 GB")]
)
def test_sizes(number: float, expected: str) -> None:
    assert rounds_of.size(number) == expected


def test_only_marked_text_goes_in_as_it_is() -> None:
    assert page.text("<b>") == "&lt;b&gt;"
    assert page.text(page.Markup("<b>")) == "<b>"
    assert (page.text(0.12345), page.text(3), page.text(None)) == ("0.123", "3", page.ABSENT)


def _luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio."""
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("share", np.linspace(0, 1, 21))
def test_numbers_stand_out_in_every_shade(share: float) -> None:
    assert contrast(*report.shade(share, (0.0, 1.0))) >= 4.5


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out_in_both_schemes(scheme: str) -> None:
    blocks: list[str] = re.findall(r":root \{(.*?)\}", page.STYLE, flags=re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[0 if scheme == "light" else 1]))
    for ground in ("bg", "card"):
        for name in ("fg", "soft", "link"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    assert contrast(colours["fg"], colours["note"]) >= 4.5
    for name in ("c0", "c1", "c2", "c3", "c4", "c5", "plain"):
        assert contrast(colours[name], colours["bg"]) >= 3.0, name


# --- charts -----------------------------------------------------------------------------------------------------------


def test_ticks_are_round_and_inside() -> None:
    assert charts.ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert charts.ticks(0.5, 0.5) == [0.5]
    assert charts.ticks(1, 3, 5) == [1.0, 1.5, 2.0, 2.5, 3.0]
    for low, high in ((0.123, 0.124), (-3.0, 17.0), (1e-7, 2e-7)):
        assert all(low <= tick <= high for tick in charts.ticks(low, high))


def test_labels_are_moved_apart_and_stay_inside() -> None:
    moved = charts.spread([100.0, 101.0, 99.0, 200.0], 15.0, 0.0, 210.0)
    assert sorted(moved)[1] - sorted(moved)[0] >= 15.0
    assert moved[2] < moved[0] < moved[1] < moved[3] <= 210.0


def _points(svg: str) -> list[list[tuple[float, float]]]:
    lines = [str(tag["points"]) for tag in Page(svg).named("polyline") if str(tag["class"]).startswith("line")]
    return [[tuple(map(float, point.split(","))) for point in one.split()] for one in lines]


def test_a_line_goes_through_its_points() -> None:
    svg = charts.line([charts.Series("a", [(1, 0.0), (2, 1.0), (3, 0.5)])], title="t", x_label="x", y_label="y")
    (points,) = _points(svg)
    (x1, y1), (x2, y2), (x3, y3) = points
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.11)
    assert y2 < y3 < y1
    assert y3 - y2 == pytest.approx(y1 - y3, abs=0.11)
    assert "a, x 2: 1" in svg


def test_lines_over_the_limit_become_faint_behind_their_mean() -> None:
    series = [charts.Series(f"s{at}", [(1, float(at)), (2, 2.0 * at)]) for at in range(charts.MANY + 1)]
    svg = charts.line(series, title="t", x_label="x", y_label="y")
    assert svg.count('class="line faint"') == charts.MANY + 1
    assert "mean of 9, x 2: 8" in svg


def test_every_value_of_a_chart_has_a_name_that_is_escaped() -> None:
    svg = charts.whiskers([charts.Whisker('a"<b>', 0.5, 0.4, 0.7), charts.Whisker("c", 0.2)], title="<t>", x_label="x")
    assert "<b>" not in svg
    assert "95 % interval 0.400 to 0.700" in svg
    assert svg.count('class="whisker') == 1
    assert "a&quot;&lt;b&gt;: 0.500" in svg


def test_bars_are_as_long_as_their_values() -> None:
    widths = [
        float(str(tag["width"]))
        for tag in Page(charts.bars([("a", 1.0, "1"), ("b", 4.0, "4")], title="t")).named("rect")
    ]
    assert widths[1] == pytest.approx(4 * widths[0], abs=0.2)


@pytest.mark.parametrize("name", ["short", "hospital-with-a-very-long-name-0042"])
def test_long_names_keep_their_end(name: str) -> None:
    short = charts.shorten(name)
    assert len(short) <= 14
    assert short[-4:] == name[-4:]


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_masks_are_tinted_and_outlined_and_the_rest_is_grey() -> None:
    image, mask = np.full((1, 20, 400), 0.5, dtype=np.float32), np.zeros((20, 400), dtype=np.int64)
    image[0, 0, 0], image[0, 0, 1] = 0.0, 1.0
    mask[5:15, 100:200] = 1
    shown = overlay.drawn(image, mask)
    assert shown.shape == (18, 360, 3)
    outside, inside = shown[9, 300].astype(int), shown[9, 130].astype(int)
    assert outside[0] == outside[1] == outside[2]
    assert inside[0] > inside[1] > inside[2]
    colours = {tuple(int(v) for v in pixel) for pixel in shown.reshape(-1, 3)}
    assert (0xE6, 0x9F, 0x00) in colours


def test_a_caption_covers_nothing_and_has_room() -> None:
    picture = np.full((40, 50, 3), 7, dtype=np.uint8)
    text = "weight 0.213 (all images: 1)"
    shown = overlay.captioned(picture, [text, "x"], ((255, 255, 255), (255, 0, 0)))
    assert np.array_equal(shown[:40, :50], picture)
    assert shown.shape[0] == 40 + overlay.BAR + 3 * overlay.MARGIN + 2 * overlay.LINE
    assert shown.shape[1] > 100
    # The last column is white in all lines of text: none was cut.
    assert (shown[40 + overlay.BAR + 2 * overlay.MARGIN :, -1] == 255).all()
    bar = shown[40 + overlay.MARGIN, overlay.MARGIN : -overlay.MARGIN]
    assert bar[0].tolist() == [255, 255, 255]
    assert bar[-1].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(28, 28, (224, 224)), (60, 56, (240, 224)), (512, 1024, (180, 360)), (300, 300, (300, 300))],
)
def test_sizes_in_the_report(height: int, width: int, expected: tuple[int, int]) -> None:
    assert overlay.display_size(height, width) == expected
    assert overlay.as_shown(np.zeros((3, height, width), dtype=np.float32)).shape == (*expected, 3)


def test_examples_are_drawn_by_the_stream_and_scored_as_the_test_did(tiny_run: Path) -> None:
    run = run_folder.RunFolder(tiny_run)
    what = experiment.parse(run.read_experiment(), "test")
    hospitals = experiment.hospitals(what)
    model = adapted_model.AdaptedModel(what.recipe)
    model.write(checkpoint.read(tiny_run / "adapter.safetensors")[0])
    members = simulation.members(what, hospitals)[:-1]
    shown = pictures.examples(model, members, seeding.stream(0, "test"))
    again = pictures.examples(model, members, seeding.stream(0, "test"))
    assert shown == again
    assert [one.site for one in shown] == ["east", "east", "north", "north", "west", "west"]
    evaluation = run.evaluation("federated")
    assert evaluation is not None
    for one in shown:
        columns: Mapping[str, Any] = evaluation["last"]["samples"][one.site]
        assert one.dice == pytest.approx(columns["dice"][columns["id"].index(one.sample)], abs=1e-6)
    many = pictures.examples(model, members * 7, seeding.stream(0, "test"))
    assert len(many) == pictures.SITES
    ranked = examination.worst_first(evaluation["last"]["samples"])
    beside = pictures.examples(model, members, seeding.stream(0, "test"), ranked)
    assert [one for one in beside if not one.worst] == shown, "the worst ones change no draw"
    for one in beside:
        if one.worst:
            assert one.dice == pytest.approx(min(evaluation["last"]["samples"][one.site]["dice"]), abs=1e-6)
    assert [one.site for one in beside if one.worst] == ["east", "north", "west"]


def test_a_chart_of_a_result_stands_alone(tmp_path: Path) -> None:
    """Out of metrics.csv, with colours of its own, as a picture that XML's own reader takes."""
    lines = ["arm,round,split,site,metric,value"]
    values = (("train", "loss"), ("val", "dice"), ("test", "dice"))
    rows = [(n, split, site, metric) for n in (1, 2) for site in ("<a>", "b") for split, metric in values]
    lines += [f"federated,{n},{split},{site},{metric},{n / 4}" for n, split, site, metric in rows]
    (tmp_path / "metrics.csv").write_text("\n".join([*lines, "federated,1,val,b,hd95,"]) + "\n")
    result = simulation.Result(tmp_path, {"primary": "dice"})
    kept = result.plot().save(tmp_path / "dice.svg")
    drawn = ElementTree.parse(kept).getroot()
    names = "{http://www.w3.org/2000/svg}"
    assert drawn.attrib["aria-label"] == "dice (val) of every site over rounds"
    assert len(drawn.findall(f"{names}polyline[@class]")) >= 2
    assert [each.text for each in drawn.iter(f"{names}title") if "at the end" in str(each.text)] == [
        "<a>: 0.5 at the end",
        "b: 0.5 at the end",
    ]
    assert "loss (train)" in result.plot("loss")._repr_svg_()
    assert all(colour in page.STYLE for colour in re.findall(r"#[0-9a-f]{6}", charts.STYLE)), "as in the report"
    with pytest.raises(errors.ConfigError, match="no auroc of federated by round; there are: dice of federated, loss"):
        result.plot("auroc")
    with pytest.raises(errors.CheckpointError, match="Let it finish"):
        simulation.Result(tmp_path / "none", {"primary": "dice"}).plot()
