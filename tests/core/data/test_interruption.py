"""Caching is killed at any moment and goes on."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import clips
import pytest

HERE = Path(__file__).parent
sys.path.append(str(HERE))
import caching_process  # noqa: E402

KILLS = 20
CLIPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    clips.render_clips(folder, "zarko", CLIPS, frames=17, size=(64, 48))
    return folder


def contents(cache):
    return {path.name: path.read_bytes() for path in cache.glob("*.safetensors")}


def times(cache):
    return {path.name: path.stat().st_mtime_ns for path in cache.glob("*.safetensors")}


def test_a_cache_that_was_killed_twenty_times_equals_an_undisturbed_one_and_nothing_is_done_twice(folder, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert set(caching_process.cache(folder, whole)) == {"made"}
    rng, made, reached = random.Random(0), {}, []
    command = [sys.executable, HERE / "caching_process.py", folder, killed]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as forker:
        for _ in range(KILLS):
            forker.stdin.write("\n")
            forker.stdin.flush()
            child = int(forker.stdout.readline())
            enough = len(made) + rng.randint(0, 8)
            while len(times(killed)) < enough:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.01))
            os.kill(child, signal.SIGKILL)
            forker.stdout.readline()
            now = times(killed)
            assert {name: now[name] for name in made} == made, "a finished file was made again"
            made = now
            reached.append(len(made))
        forker.stdin.close()
    assert len(set(reached)) > KILLS // 2, reached  # kills fell into the work, not before or after it
    outcomes = caching_process.cache(folder, killed)
    assert outcomes.count("kept") == reached[-1] and outcomes.count("made") == len(outcomes) - reached[-1]
    assert contents(killed) == contents(whole) and len(contents(whole)) == CLIPS * 5
    assert sorted(path.name for path in killed.iterdir()) == sorted(contents(whole))  # nothing is left lying about
