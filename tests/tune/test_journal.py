"""The journal: a finished sample is on disk, wherever the run is cut."""

from __future__ import annotations

import errno
import json
import os

import pytest

from paretune import clock
from paretune.errors import ParetuneError, UsageError
from paretune.measure.interleave import Sample
from paretune.tune.journal import EVENTS, SAMPLES, Journal

KEY = {"model": "pocket", "goal": {"objective": "tpot"}}


def sample(block, subject="a", value=0.125):
    return Sample(subject, block, 0, value, 1e10, None, 1)


@pytest.fixture
def fake_clock():
    with clock.use(clock.FakeClock(100.0)) as fake:
        yield fake


def written(folder, n=3):
    journal = Journal(folder, KEY, resume=False)
    for i in range(n):
        journal.record("stage", stage=f"s{i}", first=i)
        journal.add_sample(sample(i))
    journal.close()
    return journal


def test_what_was_recorded_comes_back(tmp_path, fake_clock):
    first = written(tmp_path)
    again = Journal(tmp_path, KEY, resume=True)
    assert again.events == first.events and again.samples == first.samples
    assert again.events[0]["event"] == "begin" and again.events[0]["key"] == KEY
    assert again.find("stage")["stage"] == "s2"
    assert again.find("stage", first=1)["stage"] == "s1"
    assert again.find("stage", first=7) is None and again.find("nothing") is None
    assert [e["stage"] for e in again.all("stage")] == ["s0", "s1", "s2"]
    again.close()


def test_a_line_is_on_disk_when_the_call_returns(tmp_path, fake_clock):
    journal = Journal(tmp_path, KEY, resume=False)
    journal.add_sample(sample(4))
    journal.record("wave", index=0)
    assert Sample.from_json(json.loads((tmp_path / SAMPLES).read_text().splitlines()[-1])) == sample(4)
    assert json.loads((tmp_path / EVENTS).read_text().splitlines()[-1])["event"] == "wave"
    journal.close()


@pytest.mark.parametrize("name", [EVENTS, SAMPLES])
def test_a_last_line_cut_anywhere_costs_only_itself(tmp_path, fake_clock, name):
    written(tmp_path)
    whole = {n: (tmp_path / n).read_bytes() for n in (EVENTS, SAMPLES)}
    text = whole[name]
    lines = text.splitlines(keepends=True)
    start = len(text) - len(lines[-1])
    for cut in range(start, len(text) + 1):
        for n, content in whole.items():
            (tmp_path / n).write_bytes(content)
        (tmp_path / name).write_bytes(text[:cut])
        journal = Journal(tmp_path, KEY, resume=True)
        got = journal.samples if name == SAMPLES else journal.events
        # All but the line that was cut; where only its line feed is missing it is whole.
        assert len(got) == len(lines) - 1 + (cut >= len(text) - 1), cut
        # A new line starts on a line of its own.
        journal.add_sample(sample(99))
        journal.record("after")
        journal.close()
        for n in (EVENTS, SAMPLES):
            parsed = [json.loads(line) for line in (tmp_path / n).read_text().splitlines()]
            assert parsed[-1].get("block") == 99 or parsed[-1].get("event") == "after"
        assert Journal(tmp_path, KEY, resume=True).samples[-1] == sample(99)


def test_a_line_cut_inside_a_character(tmp_path, fake_clock):
    journal = Journal(tmp_path, KEY, resume=False)
    journal.record("failed", reason="x")
    journal.close()
    with open(tmp_path / EVENTS, "ab") as f:
        f.write('{"event": "failed", "reason": "ü'.encode()[:-1])
    assert [e["event"] for e in Journal(tmp_path, KEY, resume=True).events] == ["begin", "failed"]


def test_no_temporary_file_stays(tmp_path, fake_clock):
    written(tmp_path)
    Journal(tmp_path, KEY, resume=True).close()
    assert sorted(p.name for p in tmp_path.iterdir()) == [EVENTS, SAMPLES]


def test_another_run_is_refused_and_left_alone(tmp_path, fake_clock):
    written(tmp_path)
    before = {n: (tmp_path / n).read_bytes() for n in (EVENTS, SAMPLES)}
    with pytest.raises(UsageError) as caught:
        Journal(tmp_path, {**KEY, "model": "other"}, resume=True)
    assert str(tmp_path) in str(caught.value) and "--force" in str(caught.value)
    assert before == {n: (tmp_path / n).read_bytes() for n in (EVENTS, SAMPLES)}


def test_samples_without_the_head_of_their_run_are_not_taken_over(tmp_path, fake_clock):
    """Killed before `begin` was whole: nobody knows whose samples these are."""
    written(tmp_path)
    (tmp_path / EVENTS).write_bytes(b'{"event": "beg')
    assert Journal(tmp_path, {**KEY, "model": "other"}, resume=True).samples == []


def test_without_resume_the_old_run_is_gone(tmp_path, fake_clock):
    written(tmp_path)
    journal = Journal(tmp_path, {**KEY, "model": "other"}, resume=False)
    assert journal.samples == [] and len(journal.events) == 1
    journal.close()
    assert (tmp_path / SAMPLES).read_bytes() == b""


def test_the_clock_of_the_budget_goes_on(tmp_path, fake_clock):
    journal = Journal(tmp_path, KEY, resume=False)
    fake_clock.now_sec += 100  # the limits of the machine and the baseline are not on the budget
    assert journal.elapsed_sec == 0
    journal.start_clock()
    fake_clock.now_sec += 40
    journal.record("stage", stage="a")
    assert journal.elapsed_sec == pytest.approx(40)
    journal.close()
    fake_clock.now_sec = 7.0  # another process, another origin of the clock
    again = Journal(tmp_path, KEY, resume=True)
    assert again.elapsed_sec == pytest.approx(40)
    again.start_clock()
    fake_clock.now_sec += 5
    assert again.elapsed_sec == pytest.approx(45)
    assert again.record("stage", stage="b")["elapsed_sec"] == pytest.approx(45)
    again.close()


def test_time_spent_on_samples_counts_after_a_kill(tmp_path, fake_clock):
    """Samples are the longest part of a run; no event stands between them."""
    journal = Journal(tmp_path, KEY, resume=False)
    journal.start_clock()
    for i in range(10):
        fake_clock.now_sec += 3
        journal.add_sample(sample(i))
    journal.close()
    assert Journal(tmp_path, KEY, resume=True).elapsed_sec == pytest.approx(30)


class FullFile:
    """A file on a full disk: what was buffered fails again when it is closed."""

    def __init__(self, file):
        self.file = file

    def write(self, text):
        return len(text)

    def flush(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fileno(self):
        return self.file.fileno()

    def close(self):
        self.file.close()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_one_line(tmp_path, fake_clock):
    journal = Journal(tmp_path, KEY, resume=False)
    journal._sample_file = FullFile(journal._sample_file)
    with pytest.raises(ParetuneError) as caught:
        journal.add_sample(sample(0))
    assert "full" in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_closing_on_a_full_disk_does_not_hide_the_first_error(tmp_path, fake_clock):
    """`cli.tune.run` closes in a `finally`: a second error there would replace the line with the cause."""
    journal = Journal(tmp_path, KEY, resume=False)
    journal._sample_file = FullFile(journal._sample_file)
    with pytest.raises(ParetuneError):
        journal.add_sample(sample(0))
    journal.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")
def test_a_really_full_device(tmp_path, fake_clock):
    journal = Journal(tmp_path, KEY, resume=False)
    journal._sample_file.close()
    journal._sample_file = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115
    with pytest.raises(ParetuneError) as caught:
        journal.add_sample(sample(0))
    assert "the disk is full" in str(caught.value)
    journal.close()


def test_a_folder_that_cannot_be_written(tmp_path, fake_clock):
    with pytest.raises(ParetuneError) as caught:
        Journal(tmp_path / "absent", KEY, resume=False)
    assert "cannot write" in str(caught.value)


def test_a_sample_that_is_damaged_but_whole_json_is_one_line(tmp_path, fake_clock):
    written(tmp_path)
    with open(tmp_path / SAMPLES, "a", encoding="utf-8") as f:
        f.write('{"subject": "a"}\n')
    with pytest.raises(ParetuneError) as caught:
        Journal(tmp_path, KEY, resume=True)
    assert "\n" not in str(caught.value)


def test_the_clock_of_the_budget_stands_still_while_it_is_paused(tmp_path):
    with clock.use(clock.FakeClock()) as fake:
        journal = Journal(tmp_path, {}, resume=False)
        with journal.paused():  # before the budget has begun
            fake.sleep(3.0)
        assert journal.elapsed_sec == 0
        fake.sleep(3.0)
        assert journal.elapsed_sec == 0
        journal.start_clock()
        fake.sleep(1.0)
        with journal.paused(), journal.paused():
            fake.sleep(5.0)
            assert journal.record("inside")["elapsed_sec"] == 1.0
        fake.sleep(2.0)
        assert journal.elapsed_sec == 3.0
        with pytest.raises(ValueError), journal.paused():
            fake.sleep(5.0)
            raise ValueError
        fake.sleep(1.0)
        assert journal.elapsed_sec == 4.0
        journal.close()
