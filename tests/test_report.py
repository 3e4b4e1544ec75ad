"""The report: what it computes in the page, what it writes of hostile names, how it looks to a browser."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from browser import driver, window
from conftest import losses
from PIL import Image

from neco import report
from neco.report import charts, collect, gallery, html, pages, similarity, tables
from neco.report.pictures import Picture
from neco.runs import folder

HOSTILE = '</script><img src=x onerror="alert(1)">|&_$%\\'


def made(run: Path, told: dict[str, str], numbers: dict[str, float], seed: int = 0, trained: bool = True) -> Path:
    """A run folder with two steps of these metrics of `overcluster`, what it was told, three images and features."""
    rng = np.random.default_rng(seed)
    records = [
        {
            "step": step, "network": "teacher", "evaluation": "overcluster", "weights": f"w{step}{seed}", "asked": "a",
            "dataset": HOSTILE, "protocol": "overcluster/standard/56", "seconds": 1.5, "peak_memory_gb": 0.5,
            "metrics": {name: value - 0.1 * (not step) for name, value in numbers.items()},
            "details": {name: {"iou": {HOSTILE: 0.1 + step / 100, "b": None}} for name in numbers},
        }
        for step in ((0, 9) if trained else (0,))
    ]  # fmt: skip
    run.mkdir(parents=True)
    records[-1]["pictures"] = gallery.save(
        [Picture("prediction", rng.integers(0, 255, (8, 8, 3), np.uint8), HOSTILE)], run, "x"
    )
    (run / "results.json").write_text(json.dumps(records))
    (run / "overrides.txt").write_text(
        "".join(f"{key}={value}\n" for key, value in {**told, "seed": str(seed)}.items())
    )
    (run / "config.yaml").write_text(
        json.dumps({"task": "train" if trained else "eval", "loss": {"steepness": 30}, "x": HOSTILE})
    )
    (run / "metrics.csv").write_text(
        "step,epoch,loss,lr_a,lr_b,images_per_second\n1,0,2.5,1,2,9\n2,0,nan,1,2,9\n3,1,2,1,2,\n"
    )
    keys = [HOSTILE, "b", "c"]
    for number in range(3):
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(run / f"pictures/image-{number:03d}.jpg")
        Image.fromarray(rng.integers(0, 2, (40, 60), np.uint8)).save(run / f"pictures/label-{number:03d}.png")
    (run / "pictures/shown.json").write_text(json.dumps({"keys": keys, "classes": [HOSTILE, "b"]}))
    samples = [type("Sample", (), {"key": key}) for key in keys]
    for step in (0, 9):
        maps = torch.randn(3, 4, 5, 32, generator=torch.Generator().manual_seed(step + seed)) * torch.linspace(1, 0, 32)
        gallery.save_features(maps, samples, run, f"teacher-{step}", f"w{step}{seed}")
    return run


def test_quantised_cosines_are_those_of_torch() -> None:
    maps = torch.randn(2, 5, 6, 48, generator=torch.Generator().manual_seed(0)) * torch.linspace(2, 0, 48) ** 3
    small, whole = similarity.quantise(maps, 24), similarity.quantise(maps, 48)
    assert small.shape == (2, 5, 6, 24) and small.dtype == torch.int8 and int(small.abs().max()) == 127
    assert similarity.error(maps, whole) < 0.01
    exact = torch.nn.functional.cosine_similarity(maps[0, 0, 0], maps[1, 2, 3], dim=0)
    rough = torch.nn.functional.cosine_similarity(small[0, 0, 0].float(), small[1, 2, 3].float(), dim=0)
    assert abs(exact - rough) < similarity.error(maps, small) < 0.03, "half of the directions hold nearly all"


def test_a_page_keeps_within_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 4 / 3 * similarity.BYTES + html.PICTURES + 1e6 < 15e6
    monkeypatch.setattr(similarity, "BYTES", 3 * 20 * 2 * 21)  # 20 of 32 channels
    monkeypatch.setattr(html, "PICTURES", 9000)
    page = tmp_path / "page.html"
    html.write(page, [collect.read(made(tmp_path / "run", {}, {"miou": 0.5}))])
    text = page.read_text()
    assert "strongest directions (20 of 32)" in text and re.search(r"by at most 0\.\d+", text)
    data = json.loads(re.search(r'id="similarity-data">(.*?)</script>', text, re.DOTALL).group(1))
    assert [len(network["data"]) for network in data["networks"]] == [-(-3 * 20 * 20 // 3) * 4] * 2
    assert re.search(r"[12] more are in ", text), "pictures beyond the room"


@pytest.mark.parametrize(("side", "images", "networks"), [(4, 3, 4), (6, 2, 4), (9, 2, 2), (16, 1, 1), (26, 1, 1)])
def test_large_grids_leave_out_images_and_networks(side, images, networks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "BYTES", 6000)
    maps = torch.randn(3, side, side, 32, generator=torch.Generator().manual_seed(0))
    features = [gallery.Features("teacher", step, str(step), maps) for step in range(4)]
    blank = np.zeros((8, 8, 3), np.uint8)
    shown = gallery.Gallery(["a", "b", "c"], [blank] * 3, [blank[..., 0]] * 3, ["x"], features)
    data, _ = similarity.pack(shown, [(part.weights, part) for part in features], ["data:"] * 3)
    assert (len(data["images"]), len(data["networks"])) == (images, networks)
    assert sum(len(network["data"] + network["labels"]) for network in data["networks"]) <= 4 / 3 * 6000 + 32


def test_names_are_text_in_every_format(tmp_path: Path) -> None:
    runs = [collect.read(made(tmp_path / "run", {"a": HOSTILE}, {HOSTILE: 0.5}))]
    files = {
        path.suffix: path.read_text() for path in report.write(runs, tmp_path, {"html", "markdown", "latex", "csv"})
    }
    assert "<img src=x" not in files[".html"] and "&lt;/script&gt;&lt;img src=x" in files[".html"]
    assert files[".html"].count("</script>") == 2 and "default-src 'none'" in files[".html"]
    row = next(line for line in files[".md"].splitlines() if "teacher" in line)
    assert r"\<img src=x" in row and len(re.findall(r"(?<!\\)\|", row)) == 11
    assert r"\&\_\$\%\textbackslash{}" in files[".tex"] and r"\toprule" in files[".tex"]
    for kinds, body in re.findall(r"begin{tabular}{(\w+)}(.*?)\\end{tabular}", files[".tex"], re.DOTALL):
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len(rows) > 1 and {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(kinds) - 1}


def test_plots_are_means_over_seeds_for_each_line(tmp_path: Path) -> None:
    for steepness in (None, "100", "1000"):
        for loss, bonus in (("neco", 0.0), ("cosine", 0.2)):
            for seed in (1, 2):
                told = {"loss": loss} | ({"loss.steepness": steepness} if steepness else {})
                value = float(steepness or 30) / 2000 + bonus + seed / 100
                made(tmp_path / f"{loss}{steepness}{seed}", told, {"miou_k8": value, "miou_k16": value + 0.1}, seed)
    paths = collect.find([str(tmp_path)])
    runs = [collect.read(*pair) for pair in zip(paths, collect.labels(paths), strict=True)]
    assert len(runs) == 12 and runs[0].label == "cosine1001"
    plots = {(plot.title.partition(",")[0], plot.key): plot.lines for plot in collect.sweeps(runs)}
    assert plots.keys() == {(f"overcluster miou{k}", "loss.steepness") for k in ("_k8", "_k16")} | {
        ("overcluster miou", "k")
    }
    lines = plots["overcluster miou_k8", "loss.steepness"]
    assert lines.keys() == {"before", "loss=neco", "loss=cosine"} and len(lines["before"][0]) == 4
    x, mean, std, count = lines["loss=cosine"][0]
    assert (x, count) == (30, 2) and mean == pytest.approx(23) and std == pytest.approx(0.5**0.5), "30 is the config's"
    assert [point[0] for point in plots["overcluster miou", "k"]["loss=neco, loss.steepness=100"]] == [8, 16]
    text = (report.write(runs, tmp_path, {"html"})[0]).read_text()
    assert text.count('class="chart"') == 3 + 2 and "23.0 ± 0.7 (2)" in text


def test_the_page_opens_on_a_patch_that_changed_as_all_did() -> None:
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(3, h, w, 6, generator=generator) for h, w in ((4, 6), (8, 12)))
    classes = torch.randint(0, 3, (3, 4, 6), generator=generator)
    classes[0, 0] = classes[2, 3, 5] = 255
    finer = classes.repeat_interleave(2, 1).repeat_interleave(2, 2)

    def share(maps: torch.Tensor, kinds: torch.Tensor, image: int, row: int, column: int) -> float:
        query = maps[image, row, column]
        others = [
            (float(torch.nn.functional.cosine_similarity(query, maps[i, r, c], dim=0)), int(kinds[i, r, c]))
            for i in range(3) for r in range(maps.shape[1]) for c in range(maps.shape[2])
            if i != image and kinds[i, r, c] != 255
        ]  # fmt: skip
        best = sorted(others, reverse=True)[:30]
        return sum(kind == kinds[image, row, column] for _, kind in best) / len(best)

    change = {}
    for image in range(3):
        for row in range(4):
            for column in range(6):
                if classes[image, row, column] != 255:
                    before = share(left, classes, image, row, column)
                    change[image, row, column] = share(right, finer, image, 2 * row + 1, 2 * column + 1) - before
    mean = sum(change.values()) / len(change)
    image, x, y, found, average = similarity.representative([(left, classes), (right, finer)])
    assert average == pytest.approx(mean) and found == pytest.approx(change[image, int(4 * y), int(6 * x)])
    assert abs(found - mean) == pytest.approx(min(abs(value - mean) for value in change.values()))
    assert similarity.representative([(left, classes), (right, finer)]) == (image, x, y, found, average)
    for lost in (classes[:1], torch.full_like(classes, 255)):
        with pytest.raises(ValueError, match="no patch with a class"):
            similarity.representative([(left[: len(lost)], lost), (left[: len(lost)], lost)])


def test_worse_and_better_differ_by_more_than_colour(tmp_path: Path) -> None:
    run = made(tmp_path / "run", {}, {"miou": 0.5, "low": 0.4})
    records = json.loads((run / "results.json").read_text())
    records[0]["metrics"] |= {"low": 0.436, "miou": 0.448}
    (run / "results.json").write_text(json.dumps(records))
    text = report.write([collect.read(run)], tmp_path, {"html"})[0].read_text()
    assert text.count('<em class="worse">▼ -3.6</em>') == text.count('<em class="better">▲ +5.2</em>') == 2
    assert 'class="span worse"' in charts.pair(0.6, 0.4) and "worse" not in charts.pair(0.4, 0.6)


def test_numbers_of_other_protocols_share_no_plot(tmp_path: Path) -> None:
    def run(name: str, told: dict[str, str], value: float, protocol: str, k: int = 8) -> None:
        folder = made(tmp_path / name, told, {f"miou_k{k}": value}, trained=False)
        records = json.loads((folder / "results.json").read_text())
        (folder / "results.json").write_text(json.dumps([{**record, "protocol": protocol} for record in records]))

    for lr in ("0.1", "0.2"):
        run(f"a{lr}", {"optim.lr": lr}, 0.6, "overcluster/standard/448/k=8/seeds=0")
        run(f"b{lr}", {"optim.lr": lr}, 0.2, "overcluster/standard/224/k=8,9/seeds=0")
    plots = collect.sweeps([collect.read(path) for path in sorted(tmp_path.iterdir())])
    assert [plot.title.rpartition(" ")[2] for plot in plots] == ["(448)", "(224)"]
    assert [plot.lines["measured"] for plot in plots] == [
        [(0.1, 50, 0, 1), (0.2, 50, 0, 1)], [(0.1, 10, 0, 1), (0.2, 10, 0, 1)],
    ]  # fmt: skip
    for size in ("64", "128"):
        run(f"c/{size}", {"eval.overcluster.size": size}, 0.5, f"overcluster/standard/{size}/k=8/seeds=0")
    (plot,) = collect.sweeps([collect.read(path) for path in sorted((tmp_path / "c").iterdir())])
    assert not plot.connected and "each point by another protocol" in plot.title
    drawing = charts.chart(plot.title, plot.key, plot.lines, marked=True, connected=plot.connected)
    assert drawing.count("<circle") == 2 and 'class="line"' not in drawing
    for k in (8, 16):
        run(f"d/{k}", {"eval.overcluster.k": str(k)}, 0.5, f"overcluster/standard/448/k={k}/seeds=0", k)
    (plot,) = collect.sweeps([collect.read(path) for path in sorted((tmp_path / "d").iterdir())])
    assert plot.key == "k" and plot.connected, "each k is a number of its own, however many are asked for"


@pytest.mark.parametrize(
    ("first", "last", "told"),
    [(0.9995, 1, "0.9995 to 1"), (0.9995, 0.9995, "0.9995 to 0.9995"), (2.512, 1.9, "2.51 to 1.9"), (1, 1, "1 to 1"),
     (0.99996, 1, "0.99996 to 1"), (1234.5, 98765, "1234 to 98.77k"), (0.00123, -4, "0.00123 to -4"),
     (100.01, 100.02, "100.01 to 100.02")],
)  # fmt: skip
def test_the_ends_of_a_curve_are_told_apart(first: float, last: float, told: str) -> None:
    assert charts.first_and_last(first, last) == told


def test_unlabelled_images_are_shown_without_their_labels(train, tmp_path: Path, inside) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c", "d"):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 56, 3), np.uint8)).save(tmp_path / f"images/{name}.png")
    keys = ["dataset=folder", f"dataset.root={tmp_path / 'images'}", "eval=[retrieval]", "train.steps=2"]
    run = train(*keys, "train.batch_size=2", "show=2")
    page = (run / "report.html").read_text()
    data = json.loads(re.search(r'id="similarity-data">(.*?)</script>', page, re.DOTALL).group(1))
    assert len(data["images"]) == 2 and data["classes"] == [] and data["start"] == {"image": 0, "x": 0.5, "y": 0.5}
    assert {network["name"] for network in data["networks"]} == {"before", "student, step 2", "teacher, step 2"}
    assert page.count("principal components of features") == 2 * 2 * 3 and "ground truth" not in page
    code, said = inside("task=export", f"checkpoint={run}", "show=4", "run_dir=out")
    assert code == 0 and "show=4: task=export draws no images" in said


def test_data_of_another_folder_is_other_data(tmp_path: Path) -> None:
    for root in ("one", "two"):
        made(tmp_path / root, {"dataset.root": root, "data_root": root}, {"miou": 0.5}, trained=False)
    (plot,) = collect.sweeps([collect.read(path) for path in sorted(tmp_path.iterdir())])
    assert plot.key == "dataset.root" and plot.categories == ["one", "two"]


def test_a_number_that_is_none_is_said_of_its_seeds(tmp_path: Path) -> None:
    for i, value in enumerate((0.5, float("nan"), 0.5, 0.6)):
        made(tmp_path / str(i), {"loss.steepness": str(i // 2)}, {"miou": value}, i)
    runs = [collect.read(path) for path in sorted(tmp_path.iterdir())]
    report.write(runs, tmp_path, {"html"})
    (plot,) = collect.sweeps(runs)
    assert tables.sweep(plot).rows[-1] == ["after", "nan ± nan (2)", "55.0 ± 7.1 (2)"]


def test_plots_are_of_what_differs_among_their_own_runs(tmp_path: Path) -> None:
    for lr in ("0.1", "0.2"):
        made(tmp_path / f"train-{lr}", {"optim.lr": lr, "train.steps": "3"}, {"miou": 0.5})
    for k in ("4", "8"):
        made(tmp_path / f"eval-{k}", {"eval.overcluster.k": k}, {f"miou_k{k}": 0.5}, trained=False)
    plots = collect.sweeps([collect.read(path) for path in sorted(tmp_path.iterdir())])
    assert [plot.key for plot in plots] == ["optim.lr", "k"]
    assert all("None" not in label for plot in plots for label in plot.lines)


def test_what_has_not_ended_is_no_result(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        made(tmp_path / name, {"optim.lr": name, "launcher.detach": name}, {"miou": 0.5})
    job = {"job": 0, "overrides": []}
    failed = {"status": "failed", "message": "loss is no number\nmore", **job}
    (tmp_path / "b/status.json").write_text(json.dumps(failed))
    held = json.loads((tmp_path / "c/results.json").read_text())
    (tmp_path / "c/results.json").write_text(json.dumps([record for record in held if not record["step"]]))
    (tmp_path / "d/results.json").unlink()
    (tmp_path / "d/status.json").write_text(json.dumps({"status": "queued", **job}))
    runs = [collect.read(path) for path in collect.find([str(tmp_path)])]
    left = [["b", "failed: loss is no number"], ["c", "only its start was evaluated"], ["d", "queued"]]
    assert tables.unfinished(runs).rows == left
    assert {row[0] for row in tables.headline(runs).rows} == {"a", "b"} and "launcher.detach" not in collect.differing(
        runs
    )
    report.write(runs, tmp_path, {"html", "markdown"})
    assert all("loss is no number" in (tmp_path / f"report.{end}").read_text() for end in ("html", "md"))


def test_options_without_numbers_are_places(tmp_path: Path) -> None:
    for value in ("[10,100]", "100"):
        made(tmp_path / value, {"loss.steepness": value}, {"miou": 0.5}, trained=False)
    (plot,) = collect.sweeps([collect.read(path) for path in sorted(tmp_path.iterdir())])
    assert plot.categories == ["100", "[10,100]"] and plot.lines == {"measured": [(0, 40, 0, 1), (1, 40, 0, 1)]}
    assert tables.sweep(plot).rows == [["measured", "40.0", "40.0"]]


@pytest.mark.parametrize(
    ("line", "marked"),
    [
        ([(1, 5.0, 0.5, 2)], True),
        ([(1, 2, 0, 1), (1000, 2, 0, 1)], True),
        ([(0, 1e-9, 0, 1), (9, float("nan"), 0, 1)], False),
    ],
)
def test_a_chart_is_within_its_frame(line, marked) -> None:
    root = ElementTree.fromstring(charts.chart("<a> & b", "step", {"x<y": line, "before": line}, marked=marked))
    assert root.find("svg").get("role") == "img" and "x<y" in root.find("svg").get("aria-label")
    for path in root.iterfind(".//g/path[@class='line']"):
        points = [tuple(map(float, point.split())) for point in path.get("d")[1:].split("L")]
        assert all(charts.LEFT <= x <= charts.WIDTH and 0 <= y <= charts.HEIGHT for x, y in points)
    assert len(root.findall(".//circle")) == 2 * len(line) * marked
    assert charts.chart("empty", "x", {"a": []}) == ""


def test_ticks_are_round_and_inside() -> None:
    assert charts.ticks(0, 10) == [0, 2.5, 5, 7.5, 10] and charts.ticks(0.31, 0.36) == pytest.approx([0.32, 0.34, 0.36])
    assert len(charts.thinned([(i, 1.0) for i in range(1000)])) <= charts.POINTS


def test_text_can_be_read_in_both_schemes() -> None:
    css = (pages.HERE / "page.css").read_text()

    def luminance(colour: str) -> float:
        colour = colour if len(colour) == 6 else "".join(2 * letter for letter in colour)
        parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(p * weight for p, weight in zip(parts, (0.2126, 0.7152, 0.0722), strict=True))

    for scheme in re.findall(r":root \{([^}]*)\}", css):
        colours = {name: luminance(value) for name, value in re.findall(r"--(\w+): #(\w+)", scheme)}
        for ground in ("page", "raised"):
            for name in {*colours} - {"page", "raised", "line"}:
                high, low = sorted((colours[name], colours[ground]), reverse=True)
                assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ground)


def test_a_run_ends_with_its_report_and_survives_without(train, monkeypatch, caplog) -> None:
    light = ["eval=[retrieval]", "eval.retrieval.k=3", "train.steps=2"]
    with caplog.at_level("INFO", "neco"):
        run = train(*light)
    text = (run / "report.html").read_text()
    assert f"report      {run / 'report.html'}" in caplog.text and "What post-training did" in text
    assert "show=N" in text and "<script" not in text, "without pictures nothing is alive"
    monkeypatch.setattr(html, "write", lambda *given: 1 / 0)
    with caplog.at_level("INFO", "neco"):
        run = train(*light, folder="two")
    assert "no report: ZeroDivisionError" in caplog.text and len(losses(run)) == 2
    assert not (train(*light, "report=false", folder="three") / "report.html").exists()


DAMAGE = {
    "pictures/features-teacher-9.safetensors": lambda data: data[:200],
    "environment.json": lambda _: b'{"choices": [1]}',
    "config.yaml": lambda _: b"- 1\n",
    "results.json": lambda data: data.replace(b'"details": {"miou": {', b'"details": {"miou": 3, "x": {'),
}


@pytest.mark.parametrize("file", DAMAGE)
def test_a_damaged_run_is_left_out(file, inside, tmp_path: Path) -> None:
    for seed, run in enumerate(("good", "bad")):
        made(tmp_path / "runs" / run, {"a": "b"}, {"miou": 0.5}, seed)
    damaged = tmp_path / "runs/bad" / file
    damaged.write_bytes(DAMAGE[file](damaged.read_bytes() if damaged.exists() else b""))
    code, said = inside("task=report", "runs=[runs/*]", "formats=[html,csv]", "run_dir=report")
    assert code == 0 and "left out" in said and str(Path("runs/bad")) in said, said
    assert (tmp_path / "report/report.csv").read_text().count("teacher") == 1


def test_secrets_of_a_command_are_kept_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = "postgresql://me:se/CRET@host/studies?password=SECRET"
    told = ["checkpoint=https://me:SECRET@host/a.pth", f"hydra.sweeper.storage={database}", "seed=1"]
    run = made(tmp_path / "run", {}, {"miou": 0.5})
    monkeypatch.setattr("sys.argv", ["neco", *told])
    folder.describe(run, {"checkpoint": told[0]}, told[:1], {}, "cpu")
    command = json.loads((run / "environment.json").read_text())["command"]
    assert command == "neco 'checkpoint=https://***@host/a.pth' 'hydra.sweeper.storage=***' seed=1"
    (page,) = report.write([collect.read(run)], tmp_path, {"html"})
    assert "SECRET" not in page.read_text() and "***@host/a.pth" in page.read_text()


def test_a_run_is_one_however_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        made(tmp_path / "a" / name, {}, {"miou": 0.5})
    monkeypatch.chdir(tmp_path)
    paths = collect.find(["a/one", f"{tmp_path}/a/*", "a/../a/one"])
    assert len(paths) == 2 and collect.labels(paths) == ["one", "two"]
    for name in ("k-30", "k-8"):
        made(tmp_path / "b" / name, {}, {"miou": 0.5})
    assert (
        [path.name for path in collect.find(["b/*"])] == [path.name for path in collect.find(["b"])] == ["k-8", "k-30"]
    )
    odd = made(tmp_path / "a[1]/k=*", {}, {"miou": 0.5})
    assert collect.find(["a[1]/k=*"]) == [odd.relative_to(tmp_path)], "no pattern where it is a name"


def test_a_page_of_a_sweep_that_cannot_be_is_a_warning(tmp_path: Path, caplog) -> None:
    report.of_sweep(tmp_path)
    assert "no report: NecoError" in caplog.text and not (tmp_path / "report.html").exists()
    for i in (1, 2):
        made(tmp_path / str(i), {"loss": "a" * i}, {"miou": 0.5}, i)
    report.of_sweep(tmp_path)
    assert "2: loss=aa" in (tmp_path / "report.html").read_text()


@pytest.fixture(scope="module")
def port():
    with driver() as found:
        yield found


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_and_computes_what_torch_does(width, port, tmp_path: Path) -> None:
    run = made(tmp_path / "run", {"a": HOSTILE}, {"miou_k8": 0.5, "miou_k16": 0.6})
    (page,) = report.write([collect.read(run)], tmp_path, {"html"})
    found = {part.step: part.maps for part in gallery.load(run).features}
    with window(port, width) as browser:
        browser.open(page)
        assert browser.run("return document.documentElement.scrollWidth") <= width
        for network, maps in enumerate(found.values()):
            rows = torch.nn.functional.normalize(maps.flatten(0, 2), dim=1)
            for patch in (0, 27, 59):
                cosines = torch.tensor(browser.run("return similarity(...arguments)", network, patch))
                assert (cosines - rows @ rows[patch]).abs().max() < 0.01
                assert cosines[patch] == pytest.approx(1)
        told = "return document.querySelector('output').innerText"
        first = browser.run(told)
        start = json.loads(re.search(r'id="similarity-data">(.*?)</script>', page.read_text(), re.DOTALL)[1])["start"]
        row, column = int(4 * start["y"]) + 1, int(5 * start["x"]) + 1
        assert first.startswith(f"{[HOSTILE, 'b', 'c'][start['image']]}, row {row}, column {column}.")
        assert first.count("nearest patches in other images are ") == 2
        browser.run("document.querySelectorAll('.map')[2].focus()")
        browser.keys("\ue014\ue015")  # to the right and down
        assert browser.run(told).startswith(f"b, row {min(4, row + 1)}, column {min(5, column + 1)}.")
        browser.run("document.querySelectorAll('.map')[4].scrollIntoView(); scrollBy(0, -50)")
        shown = browser.run("return document.querySelectorAll('.map')[4].getBoundingClientRect().toJSON()")
        browser.click(shown["x"] + 0.99 * shown["width"], shown["y"] + 0.01 * shown["height"])
        assert browser.run(told).startswith("c, row 1, column 5.")
        marks = "return [...document.querySelectorAll('.map i:not(.best)')].map(mark => mark.hidden)"
        assert browser.run(marks) == [True, True, True, True, False, False]
        assert browser.complaints() == [] and browser.requests() == [page.as_uri()]
        jobs = [made(tmp_path / "jobs" / str(i), {"loss.steepness": str(i) * 40}, {"miou": 0.5}, i) for i in (1, 2)]
        (page,) = report.write(collect.told_apart([collect.read(job) for job in jobs]), tmp_path, {"html"})
        browser.open(page)
        assert f"1: loss.steepness={'1' * 40}, seed=1" in browser.run("return document.body.innerText")
        assert browser.run("return document.documentElement.scrollWidth") <= width and browser.complaints() == []
