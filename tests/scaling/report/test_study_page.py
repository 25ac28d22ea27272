"""The page of studies: answers in words, every run behind a point, nothing loaded, and what a browser shows."""

import html
import itertools
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from recscale.scaling.records import runs
from recscale.scaling.records.overrides import apply, leaves, parse
from recscale.scaling.records.plain import plain
from recscale.scaling.report.redo import redo_command
from recscale.scaling.report.report_command import report
from recscale.scaling.training.config import get_config, resolved

COMMITTED = Path(__file__).parents[3] / "notebooks" / "runs"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def folder(make_runs, tmp_path_factory):
    """Two studies: of one no law is refused, of the other every one is; the second left records, four with metrics."""
    out = tmp_path_factory.mktemp("studies")
    steep = make_runs({"dcnv2": (0.030, 0.55), "rankmixer": (0.024, 0.75)}, noise=3e-5)
    flat = make_runs({"dlrm_mlp": (0.03, 0.02)}, sizes=(2e3, 5e3, 1.2e4, 3e4), truth=False, diverged=False)
    for name, table in (("steep", steep), ("flat", flat)):
        (out / name).mkdir()
        table.to_parquet(out / name / "runs.parquet", index=False)
    for k, row in enumerate(flat.to_dict("records")):
        run = out / "flat" / "runs" / row["run_id"]
        config = plain(get_config("dlrm_mlp", "known_truth").to_dict()) | {"seed": row["seed"]}
        counts, work = {"dense_params": row["dense_params"]}, {"examples": row["examples"]}
        names = {name: row[name] for name in ("run_id", "shape_id", "trunk_id", "status", "sweep")}
        parts = {"config": config, "counts": counts, "work": work, "metrics": {"logloss": row["logloss"]}, "data": {}}
        runs.write_record(run, names | parts)
        for step in range(1, 200 if k < 4 else 1):
            point = {"step": step, "examples": 512 * step, "logloss": 0.6 / step**0.1, "rows": 512}
            runs.append_metrics(run, point)
    return out


@pytest.fixture(scope="module")
def page(folder):
    """(text, data) of the page of both."""
    file = folder / "page.html"
    arguments = [str(folder / "steep"), str(folder / "flat"), "--out", str(file), "--bootstrap", "40", "--no-compare"]
    result = CliRunner().invoke(report, arguments)
    assert result.exit_code == 0, result.output
    text = file.read_text(encoding="utf-8")
    return text, data_of(text)


def data_of(text):
    """The studies a page holds."""
    return json.loads(re.search(r'id="studies">(.*?)</script>', text, re.DOTALL).group(1))


def test_the_page_is_small_and_loads_nothing(page):
    text, _ = page
    assert len(text.encode()) <= 6 * 2**20
    ours = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"(src|href)\s*=|@import|url\(", ours)


def test_the_first_screen_answers_in_words(page):
    text, _ = page
    first = text[text.index("<h1>") : text.index('<div class="controls">')]
    assert "What do more dense parameters buy?" in first
    for name, times in (("dcnv2", 2 ** (1 / 0.55)), ("rankmixer", 2 ** (1 / 0.75))):
        sentence = rf"{name}: halving the excess takes (\S+)x \[(\S+), (\S+)\] the dense parameters \(floor known\)"
        middle, low, high = map(float, re.search(sentence, first).groups())
        assert low <= middle <= high and middle == pytest.approx(times, rel=0.2)
    assert re.search(
        r"flat: dlrm_mlp: no law\. 15x the \w+ \w+ took the logloss from 0\.\d+ to 0\.\d+, but the sizes", first
    )


def test_every_run_is_there_and_only_granted_laws_have_a_curve(page, folder):
    _, data = page
    steep, flat = data["studies"]
    assert [study["name"] for study in data["studies"]] == ["steep", "flat"]
    assert len(steep["runs"]) == 42 and sum(run["status"] == "diverged" for run in steep["runs"]) == 1
    assert {run["roles"]["dense_params"] for run in steep["runs"]} == {"fitted", "held out", "diverged"}
    laws = steep["axes"]["dense_params"]["laws"]
    assert all(len(law["curve"]["x"]) == 60 and law["floor"] for law in laws.values())
    assert flat["axes"]["dense_params"]["laws"]["dlrm_mlp"]["curve"] is None
    assert steep["axes"]["dense_params"]["floor"] == 0.4255 and flat["axes"]["dense_params"]["floor"] is None
    lines = [line for line in flat["learning"] if line["x"]]
    assert len(lines) == 4 and all(len(line["x"]) == 80 for line in lines)
    redone = [run["redo"] for run in flat["runs"]]
    assert all(text.startswith("recscale train dlrm_mlp --out again") for text in redone)
    assert sum("--set seed=2" in text for text in redone) == len(redone) / 3


def test_numbers_of_the_page_have_at_most_four_digits(page):
    text, _ = page
    table = text[text.rindex("<h2>Runs</h2>") :]
    cells = re.findall(r'<td class="num">([^<]+)</td>', table)
    assert len(cells) > 40 and not [cell for cell in cells if len(re.sub(r"^0\.0*|[^\d]", "", cell)) > 4]


def test_the_advised_command_trains_the_recorded_run():
    config = apply(get_config("longer+rankmixer", "known_truth"), {"training.lr": 1e-4, "model.backbone.tower": (8, 4)})
    with config.unlocked():
        config.data.overrides.alpha = 0.3
    record = {"config": plain(config.to_dict()), "data": {}}
    words = shlex.split(redo_command(record))
    assert words[:5] == ["recscale", "train", "longer+rankmixer", "--out", "again"]
    default = get_config("longer+rankmixer", "known_truth")
    again = apply(default, parse(default, [word for flag, word in itertools.pairwise(words) if flag == "--set"]))
    assert plain(leaves(again)) == plain(leaves(config)) and resolved(again)


CHECKS = """
<script>
window.addEventListener("load", () => setTimeout(() => {
  const found = { errors: window.seen, width: document.documentElement.scrollWidth, inner: window.innerWidth };
  found.marks = document.querySelectorAll("#laws .scatterlayer .point").length;
  found.hidden = document.getElementById("beside-part").hidden;
  document.getElementById("beside").click();
  found.with_left_out = document.querySelectorAll("#laws .scatterlayer .point").length;
  const rows = () => document.querySelectorAll("#rows tr").length;
  found.all = rows();
  document.querySelector("#rows tr").click();
  found.hover = [...document.querySelectorAll("#laws .hoverlayer text")].map((text) => text.textContent).join(" ");
  found.run = document.querySelector("#rows tr").dataset.run;
  const filter = document.getElementById("filter");
  filter.value = "rankmixer fitted";
  filter.dispatchEvent(new Event("input"));
  found.filtered = rows();
  const measure = document.getElementById("measure");
  measure.value = "known";
  measure.dispatchEvent(new Event("change"));
  found.scale = document.getElementById("laws").layout.yaxis.type;
  parent.postMessage(JSON.stringify(found), "*");
}, 1500));
</script>
"""


PAGES = {"quickstart": ["quickstart"], "ladder": ["mixer_ladder"], "two": ["quickstart", "mixer_ladder"]}
WATCH = """<script>window.seen = [];
for (const kind of ["error", "warn"]) console[kind] = (...words) => window.seen.push(words.join(" "));
for (const kind of ["error", "unhandledrejection"])
  window.addEventListener(kind, (e) => window.seen.push(e.message || String(e.reason)));
</script>"""


@pytest.fixture(scope="module")
def shown_pages(page, tmp_path_factory):
    """name -> text: the page of made-up studies, and pages of committed tables."""
    out = tmp_path_factory.mktemp("pages")
    for name, tables in PAGES.items():
        sources = [str(COMMITTED / f"{table}.parquet") for table in tables]
        # Comparing takes seconds a pair; the quickstart has one.
        options = ["--bootstrap", "100", *([] if name == "quickstart" else ["--no-compare"])]
        result = CliRunner().invoke(report, [*sources, "--out", str(out / name), *options])
        assert result.exit_code == 0, result.output
    return {"made_up": page[0]} | {name: (out / name).read_text(encoding="utf-8") for name in PAGES}


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("name", ["made_up", *PAGES])
def test_a_browser_shows_and_filters_the_page(shown_pages, tmp_path, name, width):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"SKIPPED: none of {', '.join(BROWSERS)} is installed")
    text = shown_pages[name]
    assert len(text.encode()) <= 6 * 2**20
    (tmp_path / "page.html").write_text(text.replace("<head>", "<head>" + WATCH).replace("</body>", CHECKS + "</body>"))
    # Browsers have a least width of their own; a frame inside has the one it is given.
    (tmp_path / "frame.html").write_text(
        f"<iframe src='page.html' style='width:{width}px;height:900px;border:0'></iframe><pre></pre><script>"
        "addEventListener('message', (e) => { document.querySelector('pre').textContent = e.data; })</script>"
    )
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width + 40},1000"]
    address = (tmp_path / "frame.html").as_uri()
    options = ["--virtual-time-budget=20000", "--dump-dom"]
    shown = subprocess.run([*command, *options, address], capture_output=True, text=True, timeout=180, check=True)
    found = json.loads(html.unescape(re.search(r"<pre>(\{.*?\})</pre>", shown.stdout).group(1)))
    assert found["errors"] == [] and found["width"] <= found["inner"] == width
    runs_of = [run for study in data_of(text)["studies"] for run in study["runs"]]
    fitted = sum(run["roles"].get("dense_params") in ("fitted", "held out") for run in runs_of)
    assert found["marks"] == fitted and found["with_left_out"] == sum(run["loss"] is not None for run in runs_of)
    assert found["hidden"] == (fitted == len(runs_of)) and found["all"] == len(runs_of)
    assert found["run"] in found["hover"] and 0 < found["filtered"] < found["all"] and found["scale"] == "log"
    subprocess.run([*command, f"--screenshot={tmp_path / f'page_{width}.png'}", address], timeout=180, check=True)


@pytest.mark.slow
def test_the_first_screen_of_the_committed_studies(shown_pages):
    first = {
        name: text[text.index("<h1>") : text.index('<div class="controls">')] for name, text in shown_pages.items()
    }
    assert re.search(
        r"For the same logloss dlrm_mlp needs 1\.\d+ \[\S+, \S+\] times the dense parameters of rankmixer",
        first["quickstart"],
    )
    assert first["ladder"].count("no law. ") == 4 and "F_95" not in first["ladder"] and "e+" not in first["ladder"]
    assert "quickstart: rankmixer: halving" in first["two"] and "mixer_ladder: rankmixer: no law" in first["two"]
