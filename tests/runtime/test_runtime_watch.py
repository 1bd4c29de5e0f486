"""What a watch writes, what it must never do, and what `edgetune-rt drift` says of it."""

import dataclasses
import json
import math
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.errors import ConfigError, DataError, IntegrityError
from edgetune.runtime.bundle import open_bundle
from edgetune.runtime.drift import Baseline, Means, Space, dump_baseline
from edgetune.runtime.records import to_mapping
from edgetune.runtime.tasks.classification import Classification
from edgetune.runtime.watch import (
    Watch,
    WatchLine,
    append_line,
    chance,
    latency_bucket,
    latency_quantile_ms,
    read_watch,
    summarize,
)

LABELS = ("cat", "dog")


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def baseline_of_scores(window=4, *, labels=2, limit=1.0):
    """A baseline without features: half of the scores above 0.5, classes alike."""
    even = np.full((labels, 2), 0.5)
    means = Means(values=even, counts=np.full(labels, 100.0), pull=1.0)
    return Baseline(
        window=window,
        samples=100,
        false_alarms=0.01,
        doubts=Means(values=np.zeros((labels, 1)), counts=means.counts, pull=1.0),
        doubt_spread=1.0,
        edges=np.array([0.5]),
        bins=means,
        shares=np.full(labels, 1 / labels),
        space=None,
        thresholds={"doubt": 1e6, "scores": limit, "classes": 1e6},
    )


def predict(watch, *answers, seconds=0.002, inputs=()):
    """Record a batch of (label, score)."""
    results = [Classification(label=label, score=score) for label, score in answers]
    watch.record({"logits": np.zeros((len(answers), 2))}, results, seconds, inputs)


# -- lines --------------------------------------------------------------------------------------


def test_a_full_window_is_one_line(tmp_path):
    clock = Clock()
    watch = Watch(tmp_path, "d1", LABELS, window=3, clock=clock)
    predict(watch, ("cat", 0.95))
    clock.now += 5
    predict(watch, ("dog", 0.55), ("cat", 1.0), seconds=0.03)
    (line,) = read_watch(tmp_path)
    assert line == WatchLine(
        bundle="d1",
        start=1000.0,
        end=1005.0,
        predictions=3,
        classes={"cat": 2, "dog": 1},
        scores=(0, 0, 0, 0, 0, 1, 0, 0, 0, 2),
        # 2 ms = 10^3.3 us, 30 ms = 10^4.47 us
        latency={"33": 1, "44": 1},
    )


def test_a_batch_larger_than_a_window_is_split(tmp_path):
    watch = Watch(tmp_path, "d1", LABELS, window=2)
    predict(watch, *[("cat", 0.9)] * 5)
    watch.close()
    assert [line.predictions for line in read_watch(tmp_path)] == [2, 2, 1]


def test_close_writes_what_is_left_and_nothing_twice(tmp_path):
    watch = Watch(tmp_path, "d1", LABELS, window=10)
    watch.close()
    assert not watch.path.exists()
    predict(watch, ("cat", 0.9))
    watch.close()
    watch.close()
    assert [line.predictions for line in read_watch(tmp_path)] == [1]


def test_a_slow_device_writes_after_the_interval_and_its_window_goes_on(tmp_path):
    clock = Clock()
    watch = Watch(tmp_path, "d1", LABELS, baseline=baseline_of_scores(4), clock=clock)
    for step in (0, 100, 600, 10):
        clock.now += step
        predict(watch, ("cat", 0.9))
    first, second = read_watch(tmp_path)
    assert (first.predictions, first.end, first.statistics) == (3, 1700.0, None)
    assert (second.predictions, second.start) == (1, 1710.0)
    # all four of the window, all above 0.5: shares 0.1 and 0.9 with the sample more
    expected = -0.4 * math.log(0.1 / 0.5) + 0.4 * math.log(0.9 / 0.5)
    assert second.statistics["scores"] == pytest.approx(expected, rel=1e-4)


def test_a_window_that_is_off_carries_its_alarms(tmp_path):
    watch = Watch(tmp_path, "d1", LABELS, baseline=baseline_of_scores(8, limit=0.5))
    predict(watch, *[("cat", 0.3), ("dog", 0.9)] * 4)
    predict(watch, *[("cat", 0.3), ("dog", 0.3)] * 4)
    assert [line.alarms for line in read_watch(tmp_path)] == [(), ("scores",)]


def test_features_are_measured_row_by_row_across_batches(tmp_path):
    even = Means(values=np.zeros((2, 1)), counts=np.full(2, 1e9), pull=1.0)
    space = Space(
        mean=np.zeros(2),
        basis=np.array([[1.0, 0.0]]),
        scale=np.ones(1),
        centres=even,
        energies=dataclasses.replace(even, values=np.zeros((2, 2))),
        spread=np.ones(2),
    )
    limits = dict.fromkeys(("inside", "outside", "doubt", "scores", "classes"), 1e6)
    baseline = dataclasses.replace(
        baseline_of_scores(3), space=space, thresholds=limits | {"mean": 11.9}
    )
    watch = Watch(tmp_path, "d1", LABELS, baseline=baseline)
    answer = Classification(label="cat", score=0.5)
    watch.record({"features": np.array([[1.0, 5.0], [2.0, 5.0]])}, [answer] * 2, 0.001)
    watch.record({"features": np.array([[3.0, 5.0], [9.0, 5.0]])}, [answer] * 2, 0.001)
    (line,) = read_watch(tmp_path)
    # the mean of 1, 2 and 3, squared, against a variance of 1/3
    assert line.statistics["mean"] == pytest.approx(12, rel=1e-4)
    assert line.alarms == ("mean",)


def test_features_that_no_baseline_asks_for_are_left_alone(tmp_path):
    watch = Watch(tmp_path, "d1", LABELS, baseline=baseline_of_scores(2))
    watch.record({"features": np.zeros((1, 7))}, [Classification(label="cat", score=0.5)], 0.001)
    watch.close()
    assert [line.predictions for line in read_watch(tmp_path)] == [1]


# -- what it must not do ------------------------------------------------------------------------


def test_no_input_is_stored_unless_asked_for(tmp_path):
    for folder, keep in (("quiet", 0), ("asked", 1)):
        watch = Watch(tmp_path / folder, "d1", LABELS, window=2, keep_inputs=keep)
        predict(
            watch, ("cat", 0.9), ("dog", 0.6), inputs=["my secret word", "another private text"]
        )
    stored = [
        b"".join(p.read_bytes() for p in (tmp_path / folder).iterdir())
        for folder in ("quiet", "asked")
    ]
    assert b"secret" not in stored[0]
    assert b"private" not in stored[0]
    # the least sure one only
    assert b"secret" not in stored[1]
    assert [line.inputs for line in read_watch(tmp_path / "asked")] == [("another private text",)]


def test_the_file_is_for_its_owner_only(tmp_path):
    watch = Watch(tmp_path, "d1", LABELS, window=1)
    predict(watch, ("cat", 0.9))
    assert watch.path.stat().st_mode & 0o077 == 0


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 2500), min_size=1, max_size=60),
    torn=st.integers(0, 59),
    most=st.integers(2048, 5000),
)
def test_both_files_together_never_outgrow_their_limit(sizes, torn, most):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "telemetry.jsonl"
        for number, size in enumerate(sizes):
            line = b"x" * (size - 1) + b"\n"
            if size + 1 > most:
                with pytest.raises(OSError, match="are allowed"):
                    append_line(path, line, most)
            else:
                append_line(path, line, most)
            if number == torn and path.exists():  # the power was cut in mid-line
                path.write_bytes(path.read_bytes()[:-1])
            files = {p.name for p in Path(folder).iterdir()}
            assert files <= {"telemetry.jsonl", "telemetry.1.jsonl"}
            assert all(p.stat().st_size <= most for p in Path(folder).iterdir())


def test_the_ring_keeps_the_newest_lines(tmp_path):
    clock = Clock()
    watch = Watch(tmp_path, "d1", LABELS, window=1, max_bytes=4096, clock=clock)
    for _ in range(200):
        clock.now += 1
        predict(watch, ("cat", 0.9))
    ends = [line.end for line in read_watch(tmp_path)]
    assert ends == [1200.0 - len(ends) + 1 + i for i in range(len(ends))]
    assert len(ends) > 5
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= 4096


def test_a_file_larger_than_is_allowed_now_goes(tmp_path):
    path = tmp_path / "telemetry.jsonl"
    path.write_bytes(b"x" * 9000)
    append_line(path, b"{}\n", 2048)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"{}\n"]


@pytest.mark.parametrize("torn", [b'{"version": 1, "bund', b"\xff\xfe", b"[1]\n{}\nnull\n"])
def test_a_torn_line_is_skipped_and_the_next_one_is_whole(tmp_path, torn):
    watch = Watch(tmp_path, "d1", LABELS, window=1)
    predict(watch, ("cat", 0.9))
    with watch.path.open("ab") as file:
        file.write(torn)
    predict(watch, ("dog", 0.9))
    assert [line.classes for line in read_watch(tmp_path)] == [{"cat": 1}, {"dog": 1}]


def test_two_threads_lose_no_prediction(tmp_path):
    watch = Watch(tmp_path, "d1", LABELS, baseline=baseline_of_scores(7))

    def work(label):
        for _ in range(500):
            predict(watch, (label, 0.9))

    threads = [threading.Thread(target=work, args=(label,)) for label in LABELS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    watch.close()
    lines = list(read_watch(tmp_path))
    assert summarize(lines)[0].classes == {"cat": 500, "dog": 500}
    assert sorted(line.predictions for line in lines) == [1000 % 7] + [7] * (1000 // 7)
    assert sum(sum(line.latency.values()) for line in lines) == 1000


def test_a_place_that_cannot_be_written_stops_no_prediction_and_is_counted(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    watch = Watch(tmp_path / "file" / "folder", "d1", LABELS, window=2)
    for _ in range(3):
        predict(watch, ("cat", 0.9), ("dog", 0.9))
    assert watch.lost == 6
    assert len(caplog.records) == 1
    assert "predictions go on unwatched" in caplog.text


def test_a_disk_that_is_full_stops_no_prediction_and_leaves_whole_lines(python, tmp_path):
    # the kernel's limit on a file's size stands in for the disk's: writes fail from there on
    code = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from edgetune.runtime.records import to_mapping
from edgetune.runtime.tasks.classification import Classification
from edgetune.runtime.watch import Watch
watch = Watch({str(tmp_path)!r}, "d1", ["cat"], window=1)
for _ in range(20):
    watch.record({{}}, [Classification(label="cat", score=0.9)], 0.001)
print(watch.lost)
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr.decode()
    written = (tmp_path / "telemetry.jsonl").read_bytes()
    assert 0 < len(written) <= 1000
    assert all(json.loads(line) for line in written.splitlines())
    assert written.endswith(b"\n")
    assert int(done.stdout) + len(written.splitlines()) == 20
    # once there is room again, the line says what was lost
    watch = Watch(tmp_path, "d1", LABELS, window=1)
    predict(watch, ("cat", 0.9))
    assert len(list(read_watch(tmp_path))) == 20 - int(done.stdout) + 1


def test_lines_that_follow_a_failure_say_how_many_were_lost(tmp_path):
    blocked = tmp_path / "folder"
    blocked.write_text("in the way")
    watch = Watch(blocked, "d1", LABELS, window=1)
    predict(watch, ("cat", 0.9))
    blocked.unlink()
    predict(watch, ("cat", 0.9))
    assert [line.lost for line in read_watch(blocked)] == [1]


@pytest.mark.parametrize(
    "options", [{"window": 0}, {"max_bytes": 100}, {"keep_inputs": -1}], ids=str
)
def test_settings_that_make_no_sense_are_refused(tmp_path, options):
    with pytest.raises(ConfigError, match=r"^watch: expected a window of 1 or more"):
        Watch(tmp_path, "d1", LABELS, **options)


# -- of a bundle --------------------------------------------------------------------------------


def test_a_bundle_without_baseline_is_watched_without_alarms(color_bundle, tmp_path):
    bundle = open_bundle(color_bundle)
    watch = Watch.open(tmp_path / "watch", bundle)
    watch.record({}, [Classification(label="green", score=0.9)] * 300, 0.001)
    (line,) = read_watch(tmp_path / "watch", bundle=bundle.manifest.digest)
    assert (line.classes, line.statistics) == ({"green": 256}, None)


def test_a_bundle_is_held_against_the_baseline_it_carries(color_bundle, seal, tmp_path):
    baseline = baseline_of_scores(4, labels=3, limit=0.5)
    (color_bundle / "drift.npz").write_bytes(dump_baseline(baseline))
    seal(color_bundle)
    watch = Watch.open(tmp_path / "watch", open_bundle(color_bundle))
    watch.record({}, [Classification(label="green", score=0.9)] * 4, 0.001)
    assert [line.alarms for line in read_watch(tmp_path / "watch")] == [("scores",)]


def test_another_graphs_baseline_is_refused(color_bundle, seal, tmp_path):
    (color_bundle / "drift.npz").write_bytes(dump_baseline(baseline_of_scores()))
    seal(color_bundle)
    with pytest.raises(IntegrityError, match=r"is of 2 labels and .* features; the graph has 3"):
        Watch.open(tmp_path, open_bundle(color_bundle))


# -- summaries ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [(0, 0), (1e-7, 0), (1e-6, 0), (1.3e-6, 1), (1.1e-3, 30), (1.1, 60), (1e9, 90),
     (math.inf, 90), (math.nan, 0)],
)  # fmt: skip
def test_latency_buckets_are_tenths_of_decades(seconds, bucket):
    assert latency_bucket(seconds) == bucket


def test_quantiles_are_within_a_bucket_of_the_true_ones():
    seconds = np.random.default_rng(0).lognormal(-6, 0.7, 5000)
    histogram = {}
    for one in seconds:
        bucket = latency_bucket(one)
        histogram[bucket] = histogram.get(bucket, 0) + 1
    for share in (0.5, 0.95):
        true = 1e3 * float(np.quantile(seconds, share))
        assert latency_quantile_ms(histogram, share) == pytest.approx(true, rel=0.13)


def test_chance_is_the_binomial_tail():
    assert chance(0, 10, 0.01) == pytest.approx(1)
    assert chance(10, 10, 0.5) == pytest.approx(0.5**10)
    # 1 - 0.99^10 - 10 * 0.01 * 0.99^9
    assert chance(2, 10, 0.01) == pytest.approx(0.0042662, rel=1e-4)


def windows(*alarmed, digest="d1"):
    return [
        WatchLine(
            bundle=digest,
            start=float(10 * i),
            end=float(10 * i + 9),
            predictions=4,
            classes={"cat": 4},
            scores=(0,) * 10,
            latency={"30": 4},
            statistics={"mean": 1.0},
            alarms=names,
            false_alarms=0.01,
        )
        for i, names in enumerate(alarmed)
    ]


def test_one_alarm_is_chance_and_two_of_ten_are_not_yet_drift_but_three_are():
    quiet, mean = (), ("mean",)
    for alarmed, since in (
        ([quiet] * 9 + [mean], None),
        ([mean] + [quiet] * 8 + [mean], None),
        ([quiet] * 20 + [mean, quiet, mean, mean], 200.0),
        ([mean] * 3 + [quiet] * 20, None),
        ([mean] * 2, 0.0),
        ([mean], None),
    ):
        (found,) = summarize(windows(*alarmed))
        assert found.drift_since == since, alarmed
    assert (found.alarmed, found.windows, found.expected) == (1, 1, 0.01)


def test_another_mix_of_classes_is_reported_apart():
    (found,) = summarize(windows(*[("classes",)] * 3))
    assert (found.alarmed, found.drift_since, found.classes_since) == (0, None, 0.0)
    assert found.alarms == {"classes": 3}


def test_bundles_are_summed_apart_the_latest_last():
    lines = windows((), (), (), digest="new") + windows((), digest="old")
    old, new = summarize(reversed(lines))
    assert (old.bundle, old.predictions, new.bundle, new.predictions) == ("old", 4, "new", 12)


# -- edgetune-rt drift --------------------------------------------------------------------------


def test_the_command_says_what_was_seen_and_since_when(rt, color_bundle, seal, tmp_path):
    (color_bundle / "drift.npz").write_bytes(
        dump_baseline(baseline_of_scores(4, labels=3, limit=0.5))
    )
    seal(color_bundle)
    watch = Watch.open(tmp_path / "watch", open_bundle(color_bundle))
    for score in [0.4, 0.9] * 10 + [0.9] * 12:
        watch.record({}, [Classification(label="green", score=score)], 0.002)
    done = rt("drift", tmp_path / "watch", "--bundle", color_bundle)
    assert done.returncode == 0, done.stderr.decode()
    text = done.stdout.decode()
    assert "predictions  32\n" in text
    assert "windows      8, 3 with an alarm of the inputs; 0.1 would come by chance" in text
    assert "inputs       DRIFT since " in text
    assert "(scores)" in text
    assert "  green  100.0 %, 33.3 % at export" in text
    failed = rt("drift", tmp_path / "watch", "--fail-on-alarm", "--json")
    assert failed.returncode == 5
    assert failed.stderr.decode().startswith("error: the inputs have drifted since ")
    (found,) = json.loads(failed.stdout)
    assert (found["predictions"], found["alarms"]) == (32, {"scores": 3})


def test_quiet_inputs_pass(rt, tmp_path):
    watch = Watch(tmp_path, "d1", LABELS, baseline=baseline_of_scores(2))
    predict(watch, ("cat", 0.4), ("dog", 0.9))
    done = rt("drift", watch.path, "--fail-on-alarm")
    assert done.returncode == 0
    assert b"inputs       no more alarms of late than chance gives" in done.stdout


def test_nothing_to_look_at_is_an_error(rt, color_bundle, tmp_path):
    done = rt("drift", tmp_path)
    assert done.returncode == 3
    assert b"no such file; name the folder that was watched into" in done.stderr
    predict(Watch(tmp_path, "d1", LABELS, window=1), ("cat", 0.9))
    done = rt("drift", tmp_path, "--bundle", color_bundle)
    assert done.returncode == 3
    assert b"holds no predictions of this bundle" in done.stderr


def test_reading_what_is_not_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        list(read_watch(tmp_path))


# -- what a file may hold, and when ----------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"end": 1e20}, {"start": -1.0}, {"latency": {"99999": 1}}, {"latency": {"3": -1}},
        {"false_alarms": 7.0}, {"predictions": -1}, {"lost": -1}, {"classes": {"a": -3}},
    ],
)  # fmt: skip
def test_a_line_whose_numbers_no_watch_writes_is_left_out(tmp_path, changes):
    good = WatchLine(
        bundle="b", start=1.0, end=2.0, predictions=1, classes={"a": 1}, scores=(0,) * 10,
        latency={"3": 1},
    )  # fmt: skip
    bad = dataclasses.replace(good, **changes)
    lines = "".join(json.dumps(to_mapping(line)) + "\n" for line in (good, bad))
    (tmp_path / "telemetry.jsonl").write_text(lines)
    assert list(read_watch(tmp_path)) == [good]


def test_what_was_lost_is_summed_over_processes():
    line = WatchLine(
        bundle="b", start=1.0, end=2.0, predictions=1, classes={}, scores=(0,) * 10, latency={}
    )
    losses = [0, 3, 8, 0, 2]  # the second process begins with the fourth line
    lines = [dataclasses.replace(line, end=2.0 + i, lost=n) for i, n in enumerate(losses)]
    (summary,) = summarize(lines)
    assert summary.lost == 8 + 2


def test_a_clock_that_is_set_back_stops_no_lines(tmp_path):
    times = iter([10_000.0, 4_000.0, 4_001.0, 4_002.0, 4_003.0, 4_004.0, 4_005.0])
    watch = Watch(tmp_path, "b", ("a",), window=100, clock=lambda: next(times))
    for _ in range(3):
        watch.record({}, [Classification(label="a", score=0.5)], 0.001)
    assert len(list(read_watch(tmp_path))) == 1  # when it was seen to have been set back
    watch.close()
    assert sum(line.predictions for line in read_watch(tmp_path)) == 3


def test_graph_features_of_another_width_are_an_integrity_error(tmp_path):
    scores = baseline_of_scores()
    space = Space(
        mean=np.zeros(4), basis=np.eye(4)[:2], scale=np.ones(2), centres=Means(
            values=np.zeros((2, 2)), counts=np.ones(2), pull=1.0,
        ),
        energies=Means(values=np.zeros((2, 2)), counts=np.ones(2), pull=1.0), spread=np.ones(2),
    )  # fmt: skip
    baseline = dataclasses.replace(scores, space=space)
    watch = Watch(tmp_path, "b", LABELS, baseline=baseline)
    results = [Classification(label="cat", score=0.5)]
    with pytest.raises(IntegrityError, match="no features of width 4"):
        watch.record({"features": np.zeros((1, 5), np.float32)}, results, 0.001)
