"""Writing a report: of any label set, with and without images, while a build runs; and refusals."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import label_sets
import pytest

import ferkd_data as fd
from ferkd_data.errors import BuildError, MissingExtraError, UsageError
from ferkd_data.report.charts import boxes_picture
from ferkd_data.report.collect import collect
from ferkd_data.report.make import hours_of
from ferkd_data.report.page import asset, duration, facts, inert_json, policy
from ferkd_data.report.tables import teacher_table
from ferkd_data_cli.main import run


class Links(HTMLParser):
    """Collect every address in a page's elements."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]


def test_it_is_one_small_file_that_names_nothing_outside(page):
    text = page.read_text(encoding="utf-8")
    assert len(text.encode()) < 10_000_000
    links = Links()
    links.feed(text)
    assert len(links.found) > 50 and all(link.startswith(("data:", "#")) for link in links.found)
    assert "http" not in asset("report.css") + asset("report.js")


def test_every_link_inside_leads_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = set(re.findall(r'href="#([^"]+)"', text))
    targets = set(re.findall(r' id="([^"]+)"', text))
    explained = {target for target in targets if target.startswith("word-")}
    assert len(explained) > 8 and explained <= links <= targets


def test_the_same_label_set_gives_the_same_file(hostile_labels, hostile_photos, page, tmp_path):
    fd.write_report(hostile_labels, tmp_path / "again.html", images=hostile_photos)
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()


@pytest.mark.parametrize("size", [(48, 64), (375, 500), (3000, 4000), (4000, 300), (300, 4000), (400, 400)])
def test_a_picture_with_boxes_shows_the_whole_image(size):
    """It was cut at 400 pixels, the width of the charts."""
    height, width = size
    box = (height // 2, width // 2, height // 4, width // 4)
    drawn = boxes_picture("data:,", size, [(box, 1, "0.9")], "an image")
    assert f'viewBox="0 0 {width} {height}"' in drawn
    # All that is drawn lies inside.
    rectangles = re.findall(r'<rect x="([^"]+)" y="([^"]+)" width="([^"]+)" height="([^"]+)"', drawn)
    assert len(rectangles) == 3
    for x, y, w, h in (map(float, found) for found in rectangles):
        assert 0 <= x and x + w <= width * 1.001 and 0 <= y and y + h <= height * 1.001


def test_hostile_names_are_escaped(page):
    text = page.read_text(encoding="utf-8")
    outside_script = text.split("<script")[0]
    assert "<script>window.hacked" not in text and "&lt;script&gt;window.hacked" in outside_script
    assert "<img src=x" not in text and "<b>" not in re.findall(r"<bdi>([^<]*)", text)
    # Marks that turn the order of letters do so inside an element that isolates them, and no further.
    assert "<bdi>\u202egnp.exe\u202c &amp; &lt;b&gt;</bdi>" in outside_script


@pytest.mark.parametrize("text", ["</script>", "<!--<script>", "&lt;", "]]>", "\u2028", "\ud800", "'\"\\"])
def test_json_cannot_end_its_element(text):
    made = inert_json({text: [text]})
    assert not set("<>&") & set(made) and made.isascii() and json.loads(made) == {text: [text]}


def test_the_policy_names_the_digests_of_what_is_inline():
    assert "script-src 'sha256-" in policy("a", "b") and "unsafe" not in policy("a", "b")


def test_layout_webdataset_shows_its_own_images(tar_label_set, tmp_path):
    result = fd.write_report(tar_label_set, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert result.pictures == "" and text.count("data:image/jpeg") > 20


def test_without_images_it_says_so(label_set, tmp_path):
    fd.write_report(label_set, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "data:image" not in text and "--images" in text


def test_other_images_are_not_shown(label_set, photos, tmp_path):
    other = shutil.copytree(photos, tmp_path / "photos")
    shutil.copyfile(other / "class1/photo0001.jpg", other / "class0/photo0000.jpg")
    (other / "class2/photo0002.jpg").unlink()
    result = fd.write_report(label_set, tmp_path / "report.html", images=other)
    assert "1 of 20 sampled images are not among the images given" in result.pictures
    assert "class0/photo0000" in result.pictures and "another image" in result.pictures


def test_images_of_another_data_set_are_refused(label_set, tmp_path, make_photos):
    other = make_photos(tmp_path / "other")
    for photo in sorted(other.rglob("*.jpg")):
        photo.rename(photo.with_name(f"other-{photo.name}"))
    with pytest.raises(UsageError, match="none of the keys"):
        fd.write_report(label_set, tmp_path / "r.html", images=other)


def test_from_a_url(label_set, tmp_path, monkeypatch):
    from servers import serve

    monkeypatch.setenv("FERKD_DATA_CACHE", str(tmp_path / "cache"))
    with serve(label_set) as server:
        assert fd.write_report(server.url, tmp_path / "report.html").images == 20


def test_command(label_set, photos, tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"event": "x", "elapsed": seconds}) + "\n" for seconds in (1, 3600, 2, 1800)))
    file = tmp_path / "report.html"
    arguments = [
        "report",
        label_set,
        file,
        "--images",
        photos,
        "--csv",
        tmp_path / "d.csv",
        "--log-json",
        log,
        "--json",
    ]
    assert run([str(argument) for argument in arguments]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 20
    assert "1.5 hours" in file.read_text(encoding="utf-8")


def test_one_file_for_two_things_is_refused(label_set, tmp_path, capsys):
    """The list replaced the page, and the command said that it had written the page."""
    page, log = tmp_path / "report.html", tmp_path / "log.jsonl"
    log.write_text('{"elapsed": 1}\n')
    link = tmp_path / "link.html"
    link.symlink_to(page)
    assert run(["report", str(label_set), str(page), "--csv", str(link)]) == 2
    assert "is given twice" in capsys.readouterr().err and not page.exists()
    assert run(["report", str(label_set), str(page), "--csv", str(log), "--log-json", str(log)]) == 2
    assert run(["report", str(label_set), str(log), "--log-json", str(log)]) == 2 and log.stat().st_size == 15


def test_parts_that_share_a_log_are_each_counted_once(tmp_path):
    """Each line after another part's seemed to begin a run: two parts of an hour were 60 hours."""
    log = tmp_path / "log.jsonl"
    earlier = [{"event": "x", "elapsed": seconds} for seconds in (1, 1800, 2, 1800)]
    parts = [{"event": "x", "elapsed": 60.0 * m + n, "run": f"part {n}"} for m in range(61) for n in (1, 0)]
    log.write_text("".join(json.dumps(event) + "\n" for event in [*earlier, *parts]))
    assert hours_of(log) == pytest.approx(1 + 2, abs=0.001)


def test_a_log_that_is_none_is_refused(tmp_path):
    (tmp_path / "log").write_text("hello\n")
    with pytest.raises(UsageError, match="'hello' is not a line"):
        hours_of(tmp_path / "log")


def test_files_are_written_where_their_names_say(label_set, tmp_path, monkeypatch):
    """A folder called ~ was made for ~/report.html, and one called s3: for a URL."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    result = fd.write_report(label_set, "~/report.html", csv="~/doubtful.csv")
    assert result.path == tmp_path / "home/report.html" and (tmp_path / "home/doubtful.csv").is_file()
    with pytest.raises(UsageError, match="is a URL"):
        fd.write_report(label_set, "s3://bucket/report.html")
    assert run(["report", str(label_set), "s3://bucket/report.html"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_short_build_did_not_take_no_time(tmp_path):
    """Two minutes were 0.0 hours, as was a log without a line."""
    assert [duration(hours) for hours in (0.001, 1 / 30, 1, 1234.5)] == [
        "4 seconds", "2.0 minutes", "1.0 hours", "1,234.5 hours",
    ]  # fmt: skip
    (tmp_path / "log").write_text("")
    with pytest.raises(UsageError, match="is empty"):
        hours_of(tmp_path / "log")


def test_without_the_extra_it_names_the_pip_line(label_set, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"ferkd-data\[report\]"):
        fd.write_report(label_set, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_folder_without_a_label_set_is_refused(tmp_path):
    assert run(["report", str(tmp_path), str(tmp_path / "r.html")]) == 1


def test_an_interrupted_build_is_reported_as_far_as_it_is(tmp_path, photos, tiny_teachers):
    out = tmp_path / "out"

    class Full(Exception):
        pass

    class StopAfterTwo:
        done = 0

        def see(self, event):
            self.done += type(event).__name__ == "ShardDone"
            if self.done == 2:
                raise Full

    with pytest.raises(Full):
        fd.build(
            photos, out, teachers=[tiny_teachers], crops=4, top_k=2, images_per_shard=5, device="cpu",
            thresholds=fd.QuantileThresholds(low=0.1, mid=0.2, top=0.9), watchers=[StopAfterTwo()],
        )  # fmt: skip
    result = fd.write_report(out, tmp_path / "report.html", images=photos)
    assert result.images in (10, 15) and result.pictures == ""
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "The build is not finished" in text and re.search(r"of\s+4 shards are done", text)
    # The thresholds that stand in until the end were described as if they had been chosen.
    assert "which follow at the end of the build" in text and "below 0: ferkd discards" not in text
    assert "Lower the third threshold" not in text
    fd.build(
        photos, out, teachers=[tiny_teachers], crops=4, top_k=2, images_per_shard=5, device="cpu",
        thresholds=fd.QuantileThresholds(low=0.1, mid=0.2, top=0.9),
    )  # fmt: skip
    text = fd.write_report(out, tmp_path / "report.html").path.read_text(encoding="utf-8")
    assert "which follow at the end of the build" not in text and ": ferkd discards them" in text


def test_a_build_that_has_not_begun_is_refused(tmp_path):
    (tmp_path / ".build").mkdir()
    with pytest.raises(BuildError, match="has not labelled anything yet"):
        fd.write_report(tmp_path, tmp_path / "report.html")


def test_it_is_imported_only_when_used():
    code = "import sys, ferkd_data; assert 'jinja2' not in sys.modules; import ferkd_data_cli.report; "
    code += "assert not {'jinja2', 'numpy', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


class ReportReader:
    """A watcher that reads the report whenever a shard is done, after LiveReport has seen it."""

    def __init__(self, path):
        self.path, self.seen = path, []

    def see(self, event):
        if type(event).__name__ == "ShardDone" and self.path.exists():
            self.seen.append(re.search(r"(\d+) of\s+4 shards are done", self.path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
def test_a_build_keeps_its_report_up_to_date(tmp_path, photos, tiny_teachers, layout, monkeypatch):
    monkeypatch.setattr("ferkd_data.report.make.LARGEST_SHARE", 1e9)
    file, out = tmp_path / "report.html", tmp_path / "out"
    live, reader = fd.LiveReport(file, images=photos), ReportReader(file)

    class InTurn:
        """Wait after each shard until the report covers it."""

        def see(self, event):
            if type(event).__name__ == "ShardDone":
                self.done = getattr(self, "done", 0) + 1
                said = re.compile(rf"{self.done} of\s+4 shards are done")
                label_sets.wait_until(lambda: file.exists() and bool(said.search(file.read_text(encoding="utf-8"))))

    fd.build(
        photos, out, teachers=[tiny_teachers], crops=4, top_k=2, images_per_shard=5, device="cpu", layout=layout,
        watchers=[live, InTurn(), reader],
    )  # fmt: skip
    assert [int(match[1]) for match in reader.seen] == [1, 2, 3, 4]
    fd.write_report(out, tmp_path / "again.html", images=photos)
    assert file.read_bytes() == (tmp_path / "again.html").read_bytes()
    assert "is not finished" not in file.read_text(encoding="utf-8")


def test_a_build_that_fails_leaves_the_report_of_its_shards(tmp_path, photos, tiny_teachers):
    class Stop(Exception):
        pass

    class StopAfterOne:
        def see(self, event):
            if type(event).__name__ == "ShardDone":
                raise Stop

    file = tmp_path / "report.html"
    with pytest.raises(Stop):
        fd.build(
            photos, tmp_path / "out", teachers=[tiny_teachers], crops=4, top_k=2, images_per_shard=5, device="cpu",
            watchers=[fd.LiveReport(file), StopAfterOne()],
        )  # fmt: skip
    assert "The build is not finished" in file.read_text(encoding="utf-8")


def test_a_report_that_cannot_be_written_does_not_end_the_build(tmp_path, photos, tiny_teachers, capsys):
    (tmp_path / "reports").mkdir()
    live = fd.LiveReport(tmp_path / "reports" / "report.html")
    (tmp_path / "reports").rmdir()
    (tmp_path / "reports").write_text("a file has taken its place")
    fd.build(photos, tmp_path / "out", teachers=[tiny_teachers], crops=4, top_k=2, device="cpu", watchers=[live])
    assert capsys.readouterr().err.count("cannot be written") == 1
    with pytest.raises(UsageError, match="no folder"):
        fd.LiveReport(tmp_path / "nowhere" / "report.html")


def test_build_command_with_a_report(tmp_path, photos, tiny_teachers):
    file = tmp_path / "report.html"
    command = ["build", photos, tmp_path / "out", "--teacher", tiny_teachers, "--crops", 4, "--top-k", 2]
    assert run([*map(str, command), "--device", "cpu", "--report", str(file)]) == 0
    assert file.read_text(encoding="utf-8").count("data:image/jpeg") > 20


def test_facts_of_a_part_are_not_those_of_the_whole(label_set):
    """Bytes per crop were all files' bytes by the crops shown, and `700: 23 of each image` stood for 7 of each."""
    whole = fd.open_labels(label_set)
    few = fd.open_labels(label_set, crops=4)
    told = {}
    for name, labels in (("whole", whole), ("few", few), ("view", whole.select(rows=range(3)))):
        found = collect(labels)
        told[name] = dict(facts(labels, found, None))
        right = [row[1] for row in teacher_table(labels, found.sketch).rows]
        assert ("not counted" in right) is (name != "whole")
    size = sum(file.bytes for shard in whole.manifest.shards for file in shard.files)
    assert f"{size / 200:.1f} bytes per crop" in told["whole"]["Size"] and told["whole"]["Crops"].startswith(
        "200: 10 of"
    )
    assert told["few"]["Crops"] == "80: 4 of each image" and told["view"]["Crops"] == "30: 10 of each image"
    assert not {"Size"} & {*told["few"], *told["view"]}


def test_views_and_ensembles_have_reports(label_set, tar_label_set, photos, tmp_path):
    own = fd.open_labels(tar_label_set)
    view = own.select(rows=range(5, 17))
    assert fd.write_report(view, tmp_path / "view.html").images == 12
    mapped = own.map_classes({"class0": "first", "class1": "first", "class3": "second"})
    assert fd.write_report(mapped, tmp_path / "mapped.html").pictures == ""
    both = fd.open_labels([label_set, label_set])
    assert fd.write_report(both, tmp_path / "both.html", images=photos).images == 20
