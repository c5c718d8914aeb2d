"""Shared by all tests: one torch thread, no network,
and a line that counts the real-model tests."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
import pytest
import torch
import transformers

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "nightly: a second case of what another test shows, run by the nightly workflow "
        "(COURSE_NIGHTLY=1)",
    )


def pytest_collection_modifyitems(items):
    items.sort(
        key=lambda item: item.path.name not in ("test_real_model.py", "test_wheel.py")
    )  # the longest first: none is left to run alone at the end
    if os.environ.get("COURSE_NIGHTLY", "") in ("", "0"):
        for item in items:
            if item.get_closest_marker("nightly"):
                item.add_marker(pytest.mark.skip(reason="nightly: set COURSE_NIGHTLY=1"))


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    "What was found on a real language model, and a line that says whether there was one."
    for r in terminalreporter.stats.get("passed", []):
        for line in r.capstdout.splitlines() if "test_real_model" in r.nodeid else ():
            if line.startswith(("real model:", "held-out loss:")):
                terminalreporter.write_line(line)
    seen = {
        kind: sum("test_real_model" in r.nodeid for r in terminalreporter.stats.get(kind, []))
        for kind in ("passed", "failed", "skipped")
    }
    why = {
        r.longrepr[2]
        for r in terminalreporter.stats.get("skipped", [])
        if "test_real_model" in r.nodeid
    }
    terminalreporter.write_line(
        f"real-model tests: {seen['passed'] + seen['failed']} run, {seen['skipped']} skipped"
        + "".join(f" ({w})" for w in sorted(why))
    )
