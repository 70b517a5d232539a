"""The pages of ``kvpack bench --html`` and ``kvpack verify --html``, as files and in a browser."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from browser import browse, needs_browser
from models import CONFIGS, save_model
from profiles import TINY, tiny_capture

from kvpack.bench.demo import demo_text
from kvpack.bench.detail import Detail
from kvpack.bench.html import Made, Verified, bench_page, verify_page
from kvpack.bench.html.page import embedded, text
from kvpack.bench.results import NOISE, Results
from kvpack.cache.metadata import NeedleEntry, parse_metadata
from kvpack.errors import FormatError
from kvpack.fidelity import compare
from kvpack.formats.source import Capture
from kvpack.kvp.breakdown import Breakdown, Piece, breakdown
from kvpack.kvp.inspection import inspect

Cli = Callable[..., Any]

HOSTILE = (
    "</script><img src=x onerror=\"document.documentElement.dataset.pwned='img'\">"
    "<script>document.documentElement.dataset.pwned='script'</script>'\"&<!--\x1b[2J"
)
MAPS = ("keys_nmse", "values_nmse", "attention_moved", "output_error")
CODECS = ("lossless", "kivi-4", "kivi-2", "turboquant-2")
TOKENS, LAYERS, NEEDLES = 180, 2, 2


@dataclass(frozen=True)
class Pages:
    """Two pages as the commands wrote them, and what they were made from."""

    folder: Path
    bench: Path
    verify: Path

    @property
    def capture(self) -> Path:
        return self.folder / "0.safetensors"

    @property
    def results(self) -> Results:
        return Results.read(self.folder / "r.json")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    """Both pages, of a tiny model and two documents, by the real command line."""
    folder = tmp_path_factory.mktemp("pages")
    model = save_model(CONFIGS["llama-gqa"](), folder / "model")

    def run(*words: object) -> None:
        command = [sys.executable, "-m", "kvpack", *map(str, words)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    for i in range(2):
        (folder / f"{i}.txt").write_text(demo_text()[1000 * i :][:300])
        limits = ("--max-tokens", TOKENS, "--needles", NEEDLES, "--queries", 8)
        run("capture", "-m", model, "--text", f"{i}.txt", "-o", f"{i}.safetensors", *limits)
    run("compress", "0.safetensors", "-c", "kivi-2", "--keep-probes", "-o", "0.kvp")
    captures = ("0.safetensors", "1.safetensors")
    run("bench", *captures, "-m", model, "--codecs", ",".join(CODECS), "--seeds", 1, "-o", "r.json", "--html", "b.html")
    run("verify", "0.safetensors", "0.kvp", "-m", model, "--html", "v.html", "--json")
    return Pages(folder, folder / "b.html", folder / "v.html")


def data_of(page: Path | bytes) -> Any:
    """The data that a page's charts are drawn from."""
    content = page if isinstance(page, bytes) else page.read_bytes()
    found = re.search(rb'<script type="application/json" id="data">(.*?)</script>', content, flags=re.S)
    assert found is not None
    return json.loads(found[1])


def marks(chart: str, kind: str) -> int:
    """The number of marks of a kind (``rect``, ``symbol``, ``line``, ``rule``) in a chart's SVG, of data alone."""
    groups = re.findall(rf'<g class="mark-{kind} role-mark [^"]*"[^>]*>(.*?)</g>', chart, flags=re.S)
    return sum(group.count("<path") + group.count("<line") + group.count("<text") for group in groups)


# ---- As files ------------------------------------------------------------------------------------------------------


def test_a_page_is_one_file_of_moderate_size_that_names_nothing_outside_it(pages: Pages) -> None:
    for page in (pages.bench, pages.verify):
        content = page.read_text()
        assert 500_000 < len(content) < 2_000_000
        own = re.sub(r"<script>.*?</script>", "", content, flags=re.S)
        assert not re.search(r'\b(src|href)="(?!#)', own)
        assert not re.search(r"@import|url\(", own)
        assert "default-src 'none'; script-src 'sha256-" in own
        assert "unsafe-eval" not in own


def test_the_bench_page_has_every_codec_in_a_table_and_in_its_data(pages: Pages) -> None:
    content, data, results = pages.bench.read_text(), data_of(pages.bench), pages.results
    codecs = list(dict.fromkeys(row.codec for row in results.rows))
    assert len(codecs) > len(CODECS)
    assert [row["codec"] for row in data["rate"]["rows"]] == codecs
    for row in data["rate"]["rows"]:
        assert f'<tr id="{row["row"]}"><th scope="row">{row["codec"]}</th>' in content
    assert [panel["name"] for panel in data["rate"]["panels"]] == ["kl_plain", "kl_repeat"]
    assert [entry["name"] for entry in data["entries"]] == list(CODECS)
    for entry in data["entries"]:
        assert sum(piece["size"] for piece in entry["bytes"]["pieces"]) == entry["bytes"]["size"]
        sizes = {row.size for row in results.rows if row.codec == entry["name"] and row.document == "0.safetensors"}
        assert sizes == {entry["bytes"]["size"]}
        assert len(entry["found"]) == NEEDLES
    assert "kvpack bench 0.safetensors 1.safetensors" in content
    assert "0.safetensors, 1.safetensors" in content


def test_the_verify_page_has_the_figures_that_verify_prints(pages: Pages, cli: Cli) -> None:
    content = pages.verify.read_text()
    model = pages.folder / "model"
    document = json.loads(cli("verify", pages.capture, pages.folder / "0.kvp", "-m", model, "--json").out)
    assert document["map"] is None  # no page, no map
    for layer in document["layers"]:
        table = content.split("Errors of every layer")[2]
        row = re.search(rf'<tr><th scope="row">{layer["index"]}</th>(.*?)</tr>', table)
        assert row is not None
        for figure in (layer["keys"]["nmse"], layer["values"]["max_abs_error"], layer["attention"]["kl"]):
            assert f">{figure:.3g}<" in row[1]
    for name in ("plain", "repeat"):
        assert f">{document['model'][name]['kl_mean']:.3g}<" in content
    data = data_of(pages.verify)
    assert len(data["needles"]) == NEEDLES
    assert [needle["position"] for needle in data["needles"]] == [
        needle.position for needle in parse_metadata(Capture.open(pages.capture).metadata).needles or ()
    ]
    loss = data["entries"][0]["loss"]
    assert (loss["tokens"], len(loss["layers"])) == (TOKENS, LAYERS)
    assert "of this file only serves to measure what it lost" in content
    assert "of this file only serves to measure what it lost" not in pages.bench.read_text()
    assert "rate" not in data


def test_details_are_kept_and_measured_where_they_are_missing(pages: Pages, cli: Cli, tmp_path: Path) -> None:
    """A run that is continued has its page from what was measured before, and measures only what the page lacks."""
    out, page = tmp_path / "r.json", tmp_path / "p.html"
    command = ("bench", pages.capture, "-m", "none", "--quick", "--codecs", "kivi-2,kivi-4", "-o", out)
    assert cli(*command).code == 0
    before = Results.read(out)
    assert not before.details
    assert "details" not in json.loads(out.read_text())
    assert cli(*command, "--html", page).code == 0
    after = Results.read(out)
    assert sorted(row.codec for row in after.rows) == sorted(row.codec for row in before.rows) == ["kivi-2", "kivi-4"]
    assert [key[1] for key in after.details] == ["kivi-4", "kivi-2"]
    seconds = [row.compress_seconds for row in after.rows]
    assert cli(*command, "--html", page).code == 0  # nothing is measured again, and the page is written over
    assert [row.compress_seconds for row in Results.read(out).rows] == seconds
    data = data_of(page)
    assert [panel["name"] for panel in data["rate"]["panels"]] == ["attention_error"]
    assert [entry["name"] for entry in data["entries"]] == ["kivi-4", "kivi-2"]


@pytest.mark.parametrize(
    "wrong", [[["x"]], [["a", "b", 0, {}]], [["a", "b", 0, {"loss": None, "bytes": {"size": -1}}]], 3]
)
def test_results_with_wrong_details_are_refused_by_name(pages: Pages, tmp_path: Path, wrong: Any) -> None:
    document = json.loads((pages.folder / "r.json").read_text())
    (tmp_path / "r.json").write_text(json.dumps({**document, "details": wrong}))
    with pytest.raises(FormatError, match=r"r\.json: not the results of kvpack bench"):
        Results.read(tmp_path / "r.json")


def test_the_html_option_refuses_what_other_outputs_refuse(cli: Cli, small: Path, tmp_path: Path) -> None:
    packed, page = tmp_path / "x.kvp", tmp_path / "x.html"
    assert cli("compress", small, "-o", packed).code == 0
    assert cli("verify", small, packed, "--html", page, "-q").code == 0
    content = page.read_bytes()
    for command in (
        ("verify", small, packed, "--html", page),  # exists
        ("verify", small, packed, "--html", packed, "-f"),  # is read
        ("verify", small, packed, "--html", tmp_path / "no" / "x.html"),
        ("verify", packed, "--html", tmp_path / "y.html"),  # one file alone
        ("verify", small, packed, "--html", "-", "--json"),
        ("bench", small, "-m", "none", "-o", tmp_path / "r", "--html", tmp_path / "r"),
        ("bench", small, "-m", "none", "-o", tmp_path / "r", "--html", small),
    ):
        found = cli(*command)
        assert found.code != 0, command
        assert found.err.count("\n") == 1, (command, found.err)
    assert page.read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.safetensors", "x.html", "x.kvp"]
    again = cli("verify", small, packed, "--html", page, "-f", "--json")
    assert again.code == 0
    assert json.loads(again.out)["map"]["tokens"] == 160
    to_stdout = cli("verify", small, packed, "--html", "-")
    assert to_stdout.raw.startswith(b"<!DOCTYPE html>")
    assert to_stdout.raw.rstrip().endswith(b"</html>")


def test_a_file_that_fails_its_thresholds_has_a_page_that_says_so(cli: Cli, small: Path, tmp_path: Path) -> None:
    packed, page = tmp_path / "x.kvp", tmp_path / "x.html"
    assert cli("compress", small, "-c", "kivi-2", "--keep-probes", "-o", packed).code == 0
    found = cli("verify", small, packed, "--max-nmse", "1e-9", "--html", page, "-q")
    assert found.code == 3
    assert "Thresholds that are not met: NMSE of" in page.read_text()


def test_a_missing_package_is_named_before_any_work(cli: Cli, small: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from kvpack.bench.html.library import javascript

    monkeypatch.setitem(sys.modules, "vl_convert", None)
    javascript.cache_clear()
    for command in (
        ("verify", small, tmp_path / "there-is-none.kvp", "--html", tmp_path / "x.html"),
        ("bench", small, "-m", "none", "-o", tmp_path / "r", "--html", tmp_path / "x.html"),
    ):
        found = cli(*command)
        assert found.code != 0
        assert found.err == "kvpack: --html needs vl-convert-python: pip install 'kvpack[html]'\n"


def test_data_and_text_cannot_end_their_element() -> None:
    assert not set("<>&") & set(embedded({HOSTILE: [HOSTILE]}))
    assert json.loads(embedded({HOSTILE: [HOSTILE]})) == {HOSTILE: [HOSTILE]}
    assert not set("<>\"'\x1b") & set(text(HOSTILE))


def test_bytes_are_told_apart_by_what_they_store(tmp_path: Path, cli: Cli, small: Path) -> None:
    packed = tmp_path / "x.kvp"
    tiny = tiny_capture(tmp_path / "tiny.safetensors")
    for codec, kinds in (("fisher-4", {"keys and values"}), ("kvtc-1", {"keys", "values"})):  # both join layers
        assert cli("compress", tiny, "-c", codec, "-D", TINY, "--keep-probes", "-o", packed, "-f").code == 0
        found = breakdown(packed)
        assert sum(piece.size for piece in found.pieces) == found.size == packed.stat().st_size
        assert not found.layers
        assert {piece.what for piece in found.pieces} == {*kinds, "tokens", "file"}
    assert cli("compress", small, "-c", "kivi-4", "--keep-probes", "-o", packed, "-f").code == 0
    for path in (small, packed):
        found, look = breakdown(path), inspect(path)
        assert sum(piece.size for piece in found.pieces) == found.size == path.stat().st_size
        assert list(found.layers) == look.layers
        for kind in ("keys", "values"):
            mine = sum(piece.size for piece in found.pieces if piece.what == kind)
            assert mine == sum(getattr(layer, kind) for layer in look.layers)
        assert {"keys", "values", "queries", "tokens", "file"} <= {piece.what for piece in found.pieces}


# ---- In a browser --------------------------------------------------------------------------------------------------


@needs_browser
@pytest.mark.parametrize(("dark", "width"), [(False, 1280), (True, 400)])
def test_the_verify_page_renders_and_fetches_nothing(pages: Pages, dark: bool, width: int) -> None:
    found = browse(pages.verify, dark=dark, width=width)
    assert (found.root.get("data-ready"), found.console, found.asked) == ("yes", [], [])
    loss = data_of(pages.verify)["entries"][0]["loss"]
    for name in MAPS:
        cells = sum(figure is not None for layer in loss["layers"] for figure in layer[name])
        assert cells
        assert marks(found.chart(f"map:{name}"), "rect") == cells, name
        assert marks(found.chart(f"map:{name}"), "symbol") == NEEDLES, name
    pieces = data_of(pages.verify)["entries"][0]["bytes"]["pieces"]
    assert marks(found.chart("pieces"), "rect") == len(pieces)
    assert marks(found.chart("layers"), "rect") == 2 * LAYERS


@needs_browser
@pytest.mark.parametrize(("dark", "width"), [(True, 1280), (False, 400)])
def test_the_bench_page_renders_and_fetches_nothing(pages: Pages, dark: bool, width: int) -> None:
    found = browse(pages.bench, dark=dark, width=width)
    assert (found.root.get("data-ready"), found.console, found.asked) == ("yes", [], [])
    rows = data_of(pages.bench)["rate"]["rows"]
    points = [row["codec"] for row in rows if row["drawn"] and "kl_plain" in row["figures"]]
    assert set(CODECS) < set(points)
    assert any(codec.startswith(NOISE) for codec in (row["codec"] for row in rows))
    for name in ("kl_plain", "kl_repeat"):
        chart = found.chart(f"rate:{name}")
        assert marks(chart, "symbol") == len(points)
        assert "hardware noise" in chart
    assert marks(found.chart("shares"), "rect") > 2 * len(CODECS)


@needs_browser
def test_the_page_of_one_document_without_a_model_renders(pages: Pages, tmp_path: Path) -> None:
    results = pages.results
    rows = [replace(row, model=None) for row in results.rows if row.document == "0.safetensors"]
    results = Results(results.setting, results.machine, rows, results.details)
    page = tmp_path / "page.html"
    page.write_bytes(bench_page(results, (), "0.safetensors", None, Made(["kvpack"])))
    found = browse(page)
    assert (found.root.get("data-ready"), found.console, found.asked) == ("yes", [], [])
    drawn = [row for row in data_of(page)["rate"]["rows"] if row["drawn"] and "attention_error" in row["figures"]]
    assert marks(found.chart("rate:attention_error"), "symbol") == len(drawn) > len(CODECS)


@needs_browser
def test_a_point_shows_its_row_and_leads_to_it(pages: Pages) -> None:
    script = """
      const point = [...document.querySelectorAll("[data-chart='rate:kl_plain'] .mark-symbol.role-mark path")]
        .find((mark) => mark.__data__.datum.codec === "kivi-4");
      const box = point.getBoundingClientRect();
      const at = { bubbles: true, view: window, clientX: box.x + 2, clientY: box.y + 2 };
      for (const type of ["pointerover", "pointermove"]) point.dispatchEvent(new PointerEvent(type, at));
      for (const type of ["mouseover", "mousemove"]) point.dispatchEvent(new MouseEvent(type, at));
      await new Promise((done) => setTimeout(done, 200));
      document.documentElement.dataset.tip = document.getElementById("vg-tooltip-element").textContent;
      point.dispatchEvent(new MouseEvent("click", at));
      await new Promise((done) => setTimeout(done, 500));
      const row = document.querySelector("tr:target th");
      document.documentElement.dataset.row = row ? row.textContent : "none";
      document.documentElement.dataset.chosen = document.querySelector("select.entry").value;
    """
    found = browse(pages.bench, script=script)
    assert found.console == []
    assert found.root["data-row"] == found.root["data-chosen"] == "kivi-4"
    row = next(row for row in data_of(pages.bench)["rate"]["rows"] if row["codec"] == "kivi-4")
    assert "kivi-4" in found.root["data-tip"]
    for words in row["tip"].values():
        assert words in found.root["data-tip"]


@needs_browser
def test_another_codec_and_the_tables_of_the_maps_can_be_chosen(pages: Pages) -> None:
    script = """
      const select = document.querySelector("select.entry");
      select.value = "lossless";
      select.dispatchEvent(new Event("change"));
      document.querySelector("details.cells").open = true;
      document.getElementById("rate-axis").value = "ratio";
      document.getElementById("rate-axis").dispatchEvent(new Event("change"));
      await new Promise((done) => setTimeout(done, 1500));
    """
    found = browse(pages.bench, script=script)
    assert found.console == []
    tables = re.findall(
        r"<table><caption>(Keys|Values|Attention moved|Attention outputs)</caption>(.*?)</table>", found.dom
    )
    assert [name for name, _ in tables] == ["Keys", "Values", "Attention moved", "Attention outputs"]
    for _, body in tables:
        cells = re.findall(r"<td>(.*?)</td>", body)
        assert set(cells) <= {"0", "–", "not measured"}  # a lossless file has no error anywhere
        assert "0" in cells
    assert "times smaller" in found.chart("rate:kl_plain")
    shown = re.findall(r'<div class="of" data-name="([\w-]+)">', found.dom)
    assert shown == ["lossless"]  # the others are hidden


@needs_browser
def test_colours_follow_what_the_browser_prefers(pages: Pages) -> None:
    script = "document.documentElement.dataset.paper = getComputedStyle(document.body).backgroundColor;"
    light, dark = (browse(pages.verify, dark=dark, script=script) for dark in (False, True))
    assert light.root["data-paper"] == "rgb(255, 255, 255)"
    assert dark.root["data-paper"] == "rgb(15, 19, 24)"
    assert light.chart("map:keys_nmse") != dark.chart("map:keys_nmse")


def hostile_pages(pages: Pages, folder: Path) -> list[Path]:
    """Both pages with hostile text wherever text comes from files, from the command line or from the machine."""
    capture = Capture.open(pages.capture)
    needles = [NeedleEntry(HOSTILE, HOSTILE, 10 * i) for i in range(NEEDLES)]
    size = breakdown(pages.folder / "0.kvp")
    size = Breakdown(size.size, (*size.pieces, Piece(HOSTILE, HOSTILE, 1000)), size.layers)
    results = pages.results
    old = results.rows[0].codec
    results.rows[:] = [
        replace(row, document=HOSTILE, codec=HOSTILE if row.codec == old else row.codec) for row in results.rows
    ]
    loss = next(iter(results.details.values())).loss
    results.details = {
        (digest, HOSTILE if codec == old else codec, seed): Detail(loss, size)
        for digest, codec, seed in results.details
    }
    results.setting.update(model=HOSTILE, dtype=HOSTILE, profile={"name": HOSTILE, "sha256": HOSTILE, "size": 1})
    results.machine.update(processor=HOSTILE, commit=HOSTILE)
    made = Made(["kvpack", HOSTILE], HOSTILE)
    report = compare(capture, capture, bins=8)
    report = replace(report, notes=(HOSTILE,), extras=replace(report.extras, differ=(HOSTILE,)))
    look = replace(inspect(pages.folder / "0.kvp"), writer=HOSTILE, codec={"name": HOSTILE})
    metadata = {**capture.metadata, "model": json.dumps({"name": HOSTILE}), "dtype": json.dumps(HOSTILE)}
    metadata["needles"] = json.dumps([{"question": HOSTILE, "answer": HOSTILE, "position": 3}])
    capture.metadata = metadata
    written = []
    for name, content in {
        "b.html": bench_page(results, needles, HOSTILE, HOSTILE, made),
        "v.html": verify_page(Verified(HOSTILE, HOSTILE, report, None, [HOSTILE]), capture, look, size, made),
    }.items():
        (folder / name).write_bytes(content)
        written.append(folder / name)
    return written


HOVER = """
  for (const mark of document.querySelectorAll(".role-mark path")) {
    const at = { bubbles: true, view: window, clientX: 5, clientY: 5 };
    mark.dispatchEvent(new PointerEvent("pointermove", at));
    mark.dispatchEvent(new MouseEvent("mousemove", at));
    mark.dispatchEvent(new MouseEvent("click", at));
  }
  for (const details of document.querySelectorAll("details.cells")) details.open = true;
  await new Promise((done) => setTimeout(done, 1500));
"""


@needs_browser
@pytest.mark.parametrize("script", ["", HOVER], ids=["as it is", "without its policy, every mark touched"])
def test_hostile_text_is_shown_and_never_runs(pages: Pages, tmp_path: Path, script: str) -> None:
    for page in hostile_pages(pages, tmp_path):
        own = page.read_text().split("<script>")[0]
        assert "&lt;/script&gt;&lt;img" in own
        assert "<img" not in own
        found = browse(page, script=script)
        assert (found.root.get("data-ready"), found.console, found.asked) == ("yes", [], [])
        assert "data-pwned" not in found.root
        assert "<img" not in found.dom.split("<script>")[0]
        assert "&lt;/script&gt;&lt;img" in found.dom


# ---- The proofs can fail -------------------------------------------------------------------------------------------


@needs_browser
def test_the_browser_tells_errors_fetches_and_code_that_runs(pages: Pages, tmp_path: Path) -> None:
    """Without escaping hostile text runs; the page's policy alone stops it, and is told to have done so."""
    page = tmp_path / "page.html"
    broken = pages.verify.read_text().replace("<main>", f'<main><img src="http://example.invalid/x">{HOSTILE}', 1)
    page.write_text(broken)
    trusting = browse(page, trusting=True)
    assert trusting.root["data-pwned"] in ("img", "script")
    assert "http://example.invalid/x" in trusting.asked
    guarded = browse(page)
    assert "data-pwned" not in guarded.root
    assert guarded.asked == []
    assert any("Content Security Policy" in line for line in guarded.console)


@needs_browser
def test_a_page_without_its_library_is_seen_to_be_empty(pages: Pages, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        re.sub(r"<script>(?!\"use strict\").*?</script>", "", pages.verify.read_text(), count=1, flags=re.S)
    )
    found = browse(page)
    assert "data-ready" not in found.root
    assert found.console
    assert marks(found.chart("map:keys_nmse"), "rect") == 0
